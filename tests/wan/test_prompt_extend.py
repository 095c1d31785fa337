"""Prompt extension: tiny Qwen models with random weights, a local server that speaks DashScope's protocol."""

import base64
import io
import json
import random
import shutil
import subprocess
import sys
import threading
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_qwen import save_model
from transformers import AutoModelForCausalLM

from wan.utils.prompt_extend import (
    DashScopePromptExpander,
    PromptOutput,
    QwenPromptExpander,
    default_system_prompt,
    resolve_model,
)

RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen")
    save_model(root / "text", "qwen2")
    save_model(root / "vl", "qwen2_5_vl")
    return root


@pytest.fixture(scope="module")
def text_expander(folders):
    return QwenPromptExpander(str(folders / "text"))


@pytest.fixture(scope="module")
def vl_expander(folders):
    return QwenPromptExpander(str(folders / "vl"))


def test_a_text_model_answers_by_seed(text_expander):
    first, again, other = (text_expander("a cat", tar_lang="en", seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first == PromptOutput(True, first.prompt, 3, default_system_prompt("en", 0), "")
    assert first.prompt not in ("", other.prompt)
    assert text_expander("two dogs", tar_lang="en", seed=3).prompt != first.prompt
    assert text_expander("a cat", "Answer in verse.", seed=3).system_prompt == "Answer in verse."


def test_an_answer_is_one_line(text_expander):
    """The model's own words are full of line breaks and runs of blanks."""
    answers = [text_expander("a cat", seed=seed).prompt for seed in range(3)]
    assert any(" " in answer for answer in answers)
    assert answers == [" ".join(answer.split()) for answer in answers]


def test_a_random_seed_is_reported(text_expander):
    one, two = (text_expander("a cat") for _ in range(2))
    assert one.seed != two.seed and min(one.seed, two.seed) >= 0
    assert text_expander("a cat", seed=one.seed) == one


def test_weights_are_read_once_and_can_be_freed(folders, monkeypatch):
    expander, loaded, load = QwenPromptExpander(str(folders / "text")), [], AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    one, two = (expander("a cat", seed=3) for _ in range(2))
    assert (one, len(loaded)) == (two, 1)
    expander.free()
    assert loaded[0]() is None
    assert expander("a cat", seed=3) == one


def test_random_numbers_elsewhere_are_not_disturbed(text_expander):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert text_expander("a cat").status
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_vl_model_sees_the_pictures(vl_expander, tmp_path):
    RED.save(tmp_path / "red.png")
    results = [
        vl_expander("a cat", tar_lang="en", image=image, seed=1)
        for image in (None, RED, BLUE, [RED, BLUE], [BLUE, RED], tmp_path / "red.png")
    ]
    assert [result.status for result in results] == [True] * 6, [result.message for result in results]
    assert results[5] == results[1]
    assert len({result.prompt for result in results}) == 5
    counts = [0, 1, 1, 2, 2, 1]
    assert [result.system_prompt for result in results] == [default_system_prompt("en", count) for count in counts]


def test_pictures_are_made_small_for_the_model(folders):
    """28x28 pixels are a token of the model: a large picture must not be thousands of them."""
    expander = QwenPromptExpander(str(folders / "vl"), max_image_size=160 * 90)
    large = Image.effect_noise((480, 270), 50).convert("RGB")
    small, cut = large.resize((160, 90), Image.Resampling.LANCZOS), large.crop((0, 0, 160, 90))
    results = [expander("a cat", image=image, seed=1).prompt for image in (large, small, cut)]
    assert results[0] == results[1] != results[2]


def test_a_text_model_says_that_it_sees_no_pictures(text_expander):
    alone, illustrated = (text_expander("a cat", image=image, seed=3) for image in (None, RED))
    assert illustrated.prompt == alone.prompt and illustrated.status
    assert "sees no pictures" in illustrated.message


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"image": "missing.png"}, "missing.png"),
        ({"image": [RED, RED, BLUE]}, "got 3"),
        ({"tar_lang": "fr"}, "zh or en"),
    ],
)
def test_what_fails_gives_the_prompt_back(vl_expander, arguments, reason):
    result = vl_expander("a cat", **arguments)
    assert (result.status, result.prompt) == (False, "a cat")
    assert reason in result.message and "\n" not in result.message


def test_damaged_weights_give_the_prompt_back(folders, tmp_path):
    shutil.copytree(folders / "text", tmp_path / "text")
    weights = tmp_path / "text" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = QwenPromptExpander(str(tmp_path / "text"))("a cat", seed=5)
    assert (result.status, result.prompt, result.seed) == (False, "a cat", 5)
    assert "Safetensor" in result.message


def test_an_empty_answer_is_a_failure(tmp_path):
    save_model(tmp_path / "mute", "qwen2", mute=True)
    result = QwenPromptExpander(str(tmp_path / "mute"))("a cat")
    assert (result.status, result.prompt) == (False, "a cat")
    assert "empty answer" in result.message


def test_models_that_cannot_be_used(folders, tmp_path):
    def refused(name):
        with pytest.raises(ValueError) as fault:
            QwenPromptExpander(name)
        assert "\n" not in str(fault.value)
        return str(fault.value)

    assert "neither a folder nor" in refused(str(tmp_path / "nowhere"))
    assert "neither a folder nor" in refused("Qwen/no-such-model")
    model = tmp_path / "model"
    shutil.copytree(folders / "text", model)
    (model / "model.safetensors").unlink()
    assert "lacks model.safetensors" in refused(str(model))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-00001-of-00002.safetensors").touch()
    assert "lacks model-00002-of-00002.safetensors" in refused(str(model))
    (model / "config.json").write_text('{"model_type": "umt5"}')
    assert "of type umt5" in refused(str(model))
    (model / "config.json").write_text("[]")
    assert "no usable config.json" in refused(str(model))


def test_names_are_looked_up_in_the_local_cache(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"Qwen/Qwen2\.5-14B-Instruct is neither"):
        resolve_model(None, is_vl=False)
    with pytest.raises(ValueError, match=r"Qwen/Qwen2\.5-VL-7B-Instruct is neither"):
        resolve_model(None, is_vl=True)
    for name, folder in (("Qwen2.5-14B-Instruct", "text"), ("Qwen2.5-VL-7B-Instruct", "vl")):
        cached = tmp_path / f"models--Qwen--{name}"
        shutil.copytree(folders / folder, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
    text, vl = resolve_model(None, is_vl=False), resolve_model(None, is_vl=True)
    assert "Qwen2.5-14B-Instruct" in str(text[0]) and not text[1]
    assert "Qwen2.5-VL-7B-Instruct" in str(vl[0]) and vl[1]
    assert resolve_model("Qwen2.5_14B", is_vl=True) == resolve_model("Qwen/Qwen2.5-14B-Instruct", is_vl=True) == text
    assert resolve_model("QwenVL2.5_7B", is_vl=False) == vl


def test_checks_load_no_torch(folders):
    code = (
        "import sys; from wan.utils.prompt_extend import QwenPromptExpander; "
        f"QwenPromptExpander({str(folders / 'vl')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_system_prompts_differ_by_language_and_pictures():
    prompts = {(lang, count): default_system_prompt(lang, count) for lang in ("zh", "en") for count in (0, 1, 2)}
    assert len(set(prompts.values())) == 6
    for (lang, _), prompt in prompts.items():
        assert ("视频" in prompt) == (lang == "zh") and ("paragraph" in prompt) == (lang == "en")


def test_dashscope_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dashscope", None)
    with pytest.raises(ValueError, match="pip install dashscope"):
        DashScopePromptExpander(api_key="key")


@pytest.fixture
def service(monkeypatch):
    """A local server. `replies`: (HTTP status, content of the answer), the last one for ever; `requests`: what came."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers["Authorization"], body))
            status, content = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
            message = {"role": "assistant", "content": content}
            reply = {"output": {"choices": [{"finish_reason": "stop", "message": message}]}, "request_id": "1"}
            if status != 200:
                reply = {"code": "Trouble", "message": content, "request_id": "1"}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], []
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("DASH_API_URL", f"http://127.0.0.1:{server.server_port}/api/v1")
    monkeypatch.setenv("DASH_API_KEY", "the-key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_dashscope_text(service):
    service.replies = [(200, " A cat,\n black. ")]
    result = DashScopePromptExpander()("a cat", tar_lang="en", image=RED, seed=2**31 + 7)
    assert (result.status, result.prompt, result.seed) == (True, "A cat, black.", 2**31 + 7)
    assert "sees no pictures" in result.message
    [(path, authorization, body)] = service.requests
    assert path == "/api/v1/services/aigc/text-generation/generation"
    assert authorization == "Bearer the-key"
    assert body["model"] == "qwen-plus" and body["parameters"]["seed"] == 7
    expected = [("system", default_system_prompt("en", 0)), ("user", "a cat")]
    assert [(message["role"], message["content"]) for message in body["input"]["messages"]] == expected


def test_dashscope_pictures(service):
    service.replies = [(200, [{"text": "A cat, "}, {"text": "red."}])]
    expander = DashScopePromptExpander(is_vl=True, max_image_size=100 * 50, device=0)
    assert expander("a cat", image=[Image.new("RGB", (400, 200), "red"), BLUE]).prompt == "A cat, red."
    [(path, _, body)] = service.requests
    assert path == "/api/v1/services/aigc/multimodal-generation/generation"
    assert body["model"] == "qwen-vl-max"
    system, user = (message["content"] for message in body["input"]["messages"])
    assert system == [{"text": default_system_prompt("zh", 2)}] and user[2] == {"text": "a cat"}
    sent = [Image.open(io.BytesIO(base64.b64decode(part["image"].split(",")[1]))) for part in user[:2]]
    assert [picture.size for picture in sent] == [(100, 50), (60, 40)]
    assert sent[0].getpixel((5, 5))[0] > 200 and sent[1].getpixel((5, 5))[2] > 200


def test_dashscope_tries_again_while_the_service_is_down(service):
    service.replies = [(503, "busy"), (200, "A black cat.")]
    assert DashScopePromptExpander()("a cat").prompt == "A black cat."
    assert len(service.requests) == 2
    service.replies = [(503, "busy")]
    result = DashScopePromptExpander(retry_times=1)("a cat")
    assert (result.status, result.prompt) == (False, "a cat") and "503 Trouble: busy" in result.message


def test_dashscope_refusals_are_final(service):
    service.replies = [(401, "Invalid API-key provided.")]
    result = DashScopePromptExpander(api_key="another")("a cat")
    assert (result.status, result.prompt) == (False, "a cat") and "Invalid API-key" in result.message
    assert [authorization for _, authorization, _ in service.requests] == ["Bearer another"]


def test_dashscope_out_of_reach(service, monkeypatch):
    monkeypatch.setenv("DASH_API_URL", "http://127.0.0.1:9/api/v1")
    result = DashScopePromptExpander(retry_times=1)("a cat")
    assert (result.status, result.prompt) == (False, "a cat") and "Connection" in result.message
