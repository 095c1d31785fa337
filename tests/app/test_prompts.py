"""Files of many prompts."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from magcache.app.prompts import Request, read_prompts, result_name, slug

PROMPT = st.text(min_size=1).filter(lambda text: text.strip())


def write(folder, text, name="prompts.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_one_prompt_a_line(tmp_path):
    path = write(tmp_path, "\ufeffa cat\n\n  ein Hund im Schnee \r\n")
    assert read_prompts(path, 7) == [Request(1, "a cat", 7), Request(2, "ein Hund im Schnee", 8)]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_json_lines(tmp_path, name):
    lines = [
        {"prompt": "a cat"},
        {"prompt": "b", "seed": 3, "image": "b.png", "save_file": "b.mp4"},
        {"prompt": "c\n\u2028d", "n_prompt": "blurred"},
    ]
    path = write(tmp_path, "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), name)
    assert read_prompts(path, 5) == [
        Request(1, "a cat", 5),
        Request(2, "b", 3, "b.png", "b.mp4"),
        Request(3, "c\n\u2028d", 7, n_prompt="blurred"),
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_files_of_windows(encoding, tmp_path):
    (tmp_path / "prompts.txt").write_text("ein Käse\r\neine 猫\r\n", encoding=encoding, newline="")
    assert [line.prompt for line in read_prompts(tmp_path / "prompts.txt", 0)] == ["ein Käse", "eine 猫"]


@given(st.lists(PROMPT.filter(lambda text: text.strip() == text), min_size=1))
def test_texts_come_back(tmp_path_factory, prompts):
    path = write(tmp_path_factory.getbasetemp(), "\n".join(json.dumps({"prompt": p}) for p in prompts), "a.jsonl")
    assert [line.prompt for line in read_prompts(path, 0)] == prompts


@example("𝔘𝔫𝔦𝔠𝔬𝔡𝔢" * 30, 0)
@example("../../etc/passwd", 0)
@given(PROMPT, st.integers(0, 2**63 - 1))
def test_names_are_safe(prompt, seed):
    name = result_name(Request(1, prompt, seed), {}, ".mp4")
    assert len(name.encode()) < 200
    assert not set(slug(prompt)) & set('/\\:*?"<>|\0\n. ')


def test_names_change_with_what_decides_on_the_video():
    lines = [
        Request(1, "x" * 60, 1),
        Request(1, "x" * 60 + "y", 1),  # beyond what the name shows
        Request(1, "x" * 60, 2),
        Request(1, "x" * 60, 1, image="a.png"),
        Request(1, "x" * 60, 1, n_prompt="blurred"),
    ]
    names = {result_name(line, settings, ".mp4") for line in lines for settings in ({}, {"steps": 3})}
    assert len(names) == 10
    assert result_name(lines[0], {"a": 1, "b": 2}, "") == result_name(lines[0], {"b": 2, "a": 1}, "")
