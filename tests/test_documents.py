"""What the documents say can be done: links lead somewhere, commands and flags exist, and the first hour works."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from magcache.app.checks import make_job
from magcache.app.flags import make_parser
from magcache.app.prompts import Request
from wan.configs import WAN_CONFIGS

REPO = Path(__file__).parents[1]
TREES = ("magcache", "wan", "calibration", "examples", "tests")
DOCUMENTS = [REPO / "README.md", *sorted(path for tree in TREES for path in (REPO / tree).rglob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
ALL = "\n".join(TEXTS.values())
WORDS = [word for path, text in TEXTS.items() if "tests" not in path.parts for word in text.split()]
PARSER = make_parser(REPO / "magcache_generate.py")
OF_OTHERS = {"local-dir", "nnodes", "node_rank", "master_addr", "master_port", "nproc_per_node"}


def anchors(text):
    heads = (re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M))
    return {*heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_links(path):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", TEXTS[path]):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(TEXTS[target]), link


def test_flags_exist():
    modules = set(re.findall(r"python -m ((?:examples|calibration)[\w.]+)", ALL))
    sources = [Path(importlib.util.find_spec(name).origin).read_text() for name in modules]
    known = {flag for source in sources for flag in re.findall(r'"--(\w+)"', source)}
    known |= {option.lstrip("-") for option in PARSER._option_string_actions} | OF_OTHERS
    assert {flag.rstrip("-") for flag in re.findall(r"--(\w[\w-]*)", re.sub(r"\|[-|]+\|", "", ALL))} <= known


def commands(text, launcher=r"python"):
    return re.findall(rf"^{launcher} ?(.*)(magcache_generate\.py --task .*)$", text, re.M)


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in commands(ALL)))
def test_commands(command, monkeypatch):
    monkeypatch.setattr("magcache.app.prompts.read_prompts", lambda path, seed: [Request(1, "a", seed)])
    if "TABLE.json" in command:
        command = command.replace("calibrated/TABLE.json", "t2v-1.3B")
    args = PARSER.parse_args(shlex.split(command)[1:])
    assert args.magcache_plan or make_job(args).schedule


def test_processes_of_torchrun_commands(monkeypatch):
    monkeypatch.setattr("magcache.app.prompts.read_prompts", lambda path, seed: [Request(1, "a", seed)])
    for launch, command in commands(ALL, "torchrun"):
        nodes, processes = (
            int((re.search(rf"--{f} (\d+)", launch) or [0, 1])[1]) for f in ("nnodes", "nproc_per_node")
        )
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
        monkeypatch.setenv("WORLD_SIZE", str(nodes * processes))
        job = make_job(PARSER.parse_args(shlex.split(command)[1:]))  # refuses a number that does not fit
        assert WAN_CONFIGS[job.sampling.task].num_heads % job.machine.ulysses_size == 0
        assert job.machine.shards > 1


def test_the_plan_that_is_shown():
    text = TEXTS[REPO / "README.md"]
    command = re.search(r"^python (magcache_generate\.py .* --magcache_plan)$", text, re.M)
    shown = text[command.end() :].split("```")[2].strip("\n")
    out = subprocess.run([sys.executable, *shlex.split(command[1])], capture_output=True, text=True, cwd=REPO)
    assert shown in out.stdout


def test_short_enough():
    assert len(TEXTS[REPO / "README.md"].encode()) <= 7500
    assert len(WORDS) <= 8667  # tables and commands included


@pytest.mark.slow
def test_the_first_hour(tmp_path):
    """Its commands, with the demo model and few steps, in its order."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {c} circle moves up" for c in ("red", "green", "blue")))
    size, folder = "--task t2v-1.3B --size 832x480", "./Wan2.1-T2V-1.3B"
    for _, command in commands(TEXTS[REPO / "examples" / "first_hour.md"]):
        assert size in command
        command = command.replace(size, "--task t2v-tiny --size 64*64 --frame_num 5 --sample_steps 10")
        command = command.replace(folder, str(REPO / "examples" / "Wan2.1-T2V-tiny"))
        for table in (tmp_path / "calibrated").glob("t2v-tiny*.json"):
            command = command.replace("calibrated/TABLE.json", f"calibrated/{table.name}")
        command = [sys.executable, str(REPO / "magcache_generate.py"), *shlex.split(command)[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"plan.png", "cat.mp4", "cat.json", "compared_compare.html", "calibrated", "night"}
    assert len([*(tmp_path / "night").glob("*.mp4")]) == 3
