"""What examples.card measures, on a model that takes seconds; its times are only sane, its other numbers exact."""

import json

import card_kit
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from pretended_card import PretendedCard
from torch._subclasses.fake_tensor import FakeTensorMode

from examples import card
from examples.train_tiny.check_prompts import load_demo
from wan.modules.model import WanModel


def test_report(capsys):
    parts = ("forward", "loop", "dtypes", "attention")
    flags = ["--task", "t2v-tiny", "--size", "64*64", "--frame_num", "5", "--layers", "2", "--steps", "4"]
    report = card.main([*flags, "--rounds", "1", "--only", *parts])
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == json.loads(json.dumps(report))
    rows = {row["what"]: row for row in report["rows"]}
    assert len(out) == len(rows) + 2
    assert report["tokens"] == 2 * 4 * 4
    assert rows["diffusers' WanTransformer3DModel"]["error"] < 1e-5
    assert rows["weights in bfloat16"]["error"] == 0
    assert 0 < rows["weights in float8_e4m3fn"]["error"] < 0.05
    assert rows["weights in bfloat16"]["weight_bytes"] < rows["weights in float32"]["weight_bytes"]
    for name in ("reused residuals", "forecasts"):
        row = rows[f"4 steps, {name}"]
        assert row["bound"] == 2
        assert row["seconds_a_call"] > 0
    assert "attention by native" in rows


def test_the_kit_runs_on_a_card(monkeypatch, capsys):
    """All of it, on a small model and a pretended card, so that no minute of a real one is lost."""
    parts = tuple(part for part in card.PARTS if part not in ("compile", "attention"))
    convolutions = set()
    convolve = WanCausalConv3d.forward
    monkeypatch.setattr(
        WanCausalConv3d, "forward", lambda *args: convolutions.add((out := convolve(*args)).dtype) or out
    )
    with PretendedCard():
        monkeypatch.setattr(card, "DEVICE", torch.device("cuda:0"))
        monkeypatch.setattr(card, "HELD", torch.bfloat16)
        small = ("--frame_num", "5", "--layers", "2")
        assert card_kit.main(10, [("t2v-tiny", "64*64", 2, parts)], *small) == 0
    out = capsys.readouterr().out
    for line in (
        "t2v_a pred_cond_step0 0.0",
        "computed call",
        "by the plan",
        "one block at a time",
        "VAE decodes in tiles",
    ):
        assert line in out
    assert "no time for" not in out
    assert convolutions == {torch.float32}  # of the VAE


def small_card(monkeypatch, *parts):
    """The rows of these parts, of a small model, by name."""
    monkeypatch.setattr(card, "DEVICE", torch.device("cuda:0"))
    monkeypatch.setattr(card, "HELD", torch.bfloat16)
    flags = ["--task", "t2v-tiny", "--size", "64*64", "--frame_num", "5", "--layers", "2", "--rounds", "1"]
    return {row["what"]: row for row in card.main([*flags, "--only", *parts])["rows"]}


def test_what_a_card_has_no_room_for_costs_nothing_else(monkeypatch):
    """A part that fails leaves the others, and so does a dtype."""

    def full(*args):
        raise torch.OutOfMemoryError("out of memory\nmore")

    with PretendedCard():
        model = card.Subject.model
        monkeypatch.setattr(
            card.Subject,
            "model",
            lambda self, dtype, *place: full() if dtype == torch.float32 else model(self, dtype, *place),
        )
        monkeypatch.setattr(card, "measure_loop", full)
        rows = small_card(monkeypatch, "loop", "dtypes", "offload")
    assert [rows[f"{name}: failed"]["error"] for name in ("loop", "weights in float32")] == ["out of memory"] * 2
    assert {"weights in bfloat16", "weights in float8_e4m3fn", "one block at a time"} <= rows.keys()


def test_the_peak_of_a_call_is_its_own(monkeypatch):
    """Not that of the products that the machine's rate is measured by, nor of diffusers' model."""
    with PretendedCard() as pretended:
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(pretended, "most", pretended.held))
        monkeypatch.setattr(card, "matmul_rate", lambda *args: torch.zeros(10**8, device="cuda:0").numel())
        row = small_card(monkeypatch, "forward")["computed call"]
    assert row["peak_bytes"] < 10**8


def test_demo_models_are_measured_on_the_cpu():
    with PretendedCard():
        assert load_demo("t2v-tiny").device.type == "cpu"


@pytest.mark.parametrize("task", ["t2v-14B", "ti2v-5B"])
def test_the_vae_of_every_release_decodes(task):
    with FakeTensorMode():
        rows = card.measure_vae(card.Subject(task, "64*64", 5, layers=1))
    assert [row["what"] for row in rows] == ["VAE decodes", "VAE decodes in tiles"]


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
@torch.inference_mode()
def test_diffusers_transformer_has_the_same_weights(task):
    """Of every kind that it knows."""
    subject = card.Subject(task, "64*64", 5, layers=1)
    small = {"dim": 160, "ffn_dim": 64, "text_dim": 32, "clip_dim": 24}
    subject.shape = card.replace(subject.shape, **small)
    model, arguments = subject.model(torch.float32), subject.arguments()
    assert isinstance(model, WanModel)
    assert card.error(model(**arguments)[0], subject.peer(model)(**arguments)[0]) < 1e-5
