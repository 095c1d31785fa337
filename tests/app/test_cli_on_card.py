"""The command line on a pretended card, every kind of task on a small model."""

import dataclasses
import gc
import sys

import pytest
import torch
from golden_data import write_checkpoint
from PIL import Image
from pretended_card import PretendedCard, named_phases

import magcache_generate
from magcache.app.tasks import TASKS
from wan import pipeline
from wan.configs import WAN_CONFIGS

SMALL = {"sizes": ("48*32",), "frames": 5, "steps": 4, "tables": (), "is_demo": True}
CACHED = ("--use_magcache", "--magcache_speedup", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_checkpoint(kind, tmp_path_factory.mktemp(kind)) for kind in ("t2v", "i2v", "flf2v", "vace")}


@pytest.fixture
def run(folders, monkeypatch, tmp_path):
    """run(kind, *flags) is the card after the command, whose phases are those of the pipeline."""
    current = named_phases(monkeypatch, {pipeline.WanPipeline: ("encode_text", "denoise", "decode")})
    picture = tmp_path / "picture.png"
    Image.new("RGB", (48, 32), (200, 30, 30)).save(picture)
    inputs = {"i2v": ("--image",), "flf2v": ("--first_frame", "--last_frame"), "vace": ("--src_ref_images",)}

    def run(kind, *flags):
        task = dataclasses.replace(TASKS[f"{kind}-14B"], name=f"{kind}-small", **SMALL)
        monkeypatch.setitem(TASKS, task.name, task)
        monkeypatch.setitem(WAN_CONFIGS, task.name, WAN_CONFIGS[f"{kind}-14B"])
        given = [part for flag in inputs.get(kind, ()) for part in (flag, picture)]
        flags = ("--task", task.name, "--size", "48*32", "--ckpt_dir", folders[kind], "--base_seed", 1, *given, *flags)
        monkeypatch.setattr(sys, "argv", ["magcache_generate.py", *map(str, flags)])
        with PretendedCard() as card:
            current.append(card)
            try:
                magcache_generate.main()
            except SystemExit as stop:
                card.code = stop.code
            gc.collect()
        assert card.held == 0
        return card

    return run


def phases(card, name):
    return [(start, most, end) for found, start, most, end in card.phases if found == name]


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "vace"])
def test_every_kind(run, kind, tmp_path, capsys):
    """Uncached, then with a cache and all that makes it fit."""
    video = tmp_path / "video.mp4"
    plain = run(kind, "--prompt", "a fox", "--save_file", video)
    assert video.stat().st_size
    fitting = ("--offload_blocks", "--vae_tiling", "--t5_cpu", "--magcache_offload")
    small = run(kind, "--prompt", "a fox", "--save_file", video, *CACHED, *fitting)
    assert "4 of 8 transformer calls computed" in capsys.readouterr().out
    for name in ("encode_text", "denoise"):
        assert phases(small, name)[0][1] < phases(plain, name)[0][1], name


def test_three_videos_one_of_which_fails(run, monkeypatch, tmp_path, capsys):
    """The second one, in its second step; it leaves to the third what the first has left to it."""
    denoise, count = pipeline.WanPipeline.denoise, []

    def failing(self, *args):
        count.append(1)
        if len(count) != 2:
            return denoise(self, *args)
        calls = []

        def fail(module, args):
            calls.append(1)
            if len(calls) == 3:
                raise torch.cuda.OutOfMemoryError("out of memory")

        hook = self.model.blocks[-1].register_forward_pre_hook(fail)
        try:
            return denoise(self, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(pipeline.WanPipeline, "denoise", failing)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na hen\na cow\n")
    card = run("t2v", "--prompt_file", prompts, "--save_file", tmp_path / "videos", *CACHED)
    assert card.code == 1
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    assert "1 of 3 videos failed" in capsys.readouterr().err
    texts, decodes = phases(card, "encode_text"), phases(card, "decode")
    assert texts[0] == texts[1] == texts[2]
    assert decodes[0] == decodes[1]


def test_trials_hold_no_more_than_the_run_before_them(run, tmp_path, capsys):
    """Of two speed-ups, of i2v, whose encoders work for the first trial only; then the transformer stays."""
    tables = ("--save_file", tmp_path / "video.mp4")
    card = run("i2v", "--prompt", "a fox", "--magcache_calibration", "2,4", *tables)
    (_, most, _), *trials = phases(card, "denoise")
    assert len(trials) > 3
    assert all(tried <= 1.02 * most for _, tried, _ in trials)
    begun, done = ([trial[i] for trial in trials] for i in (0, 2))
    assert done[-1] == done[0] < min(done[1:-1]), "the transformer stays from the second trial to the last"
    assert min(begun[2:]) > begun[1]
    (_, most, _), *texts = phases(card, "encode_text")
    assert texts[0][1] <= most
    assert all(inside - start < 1000 for start, inside, _ in texts[1:])
