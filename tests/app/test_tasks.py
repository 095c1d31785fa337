"""The registry of tasks: it agrees with the wan package, and a new task is one entry."""

import dataclasses
import json
from pathlib import Path

import pytest

from magcache.app.checkpoint import architecture_of
from magcache.app.tasks import TASKS
from wan.configs import SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMOS = {"t2v-tiny": EXAMPLES / "Wan2.1-T2V-tiny", "i2v-tiny": EXAMPLES / "Wan2.1-I2V-tiny"}


def test_registry_and_configs_are_about_the_same_models():
    assert set(TASKS) == set(WAN_CONFIGS) == set(SUPPORTED_SIZES)
    for name, task in TASKS.items():
        for key in ("dim", "ffn_dim", "num_layers", "freq_dim", "text_len"):
            assert getattr(task.architecture, key) == WAN_CONFIGS[name][key], (name, key)
        assert set(task.sizes) == set(SUPPORTED_SIZES[name]) <= set(SIZE_CONFIGS)
        config = WAN_CONFIGS[name]
        assert bool(task.architecture.images) == ("clip_checkpoint" in config)
        assert task.boundary == config.get("boundary")
        assert [*task.transformers] == [config.get(f"{noise}_noise_checkpoint", "") for noise in ("high", "low")][
            : 2 if task.boundary else 1
        ]
        defaults = {"sample_steps": task.steps, "sample_shift": task.shift, "frame_num": task.frames}
        assert {key: config.get(key, value) for key, value in defaults.items()} == defaults
        assert config.get("sample_guide_scale", 5.0) == (task.guidance if task.boundary else task.guidance[0])
        assert task.token_pixels == config.vae_stride[1] * config.patch_size[1]
        assert task.architecture.out_dim == config.z_dim
        for files in [value for key, value in task.example.items() if key != "prompt"]:
            assert all((EXAMPLES / file).is_file() for file in files.split(","))


@pytest.mark.parametrize("name", DEMOS)
def test_demo_models_have_the_sizes_of_their_entry(name):
    assert architecture_of(TASKS[name], DEMOS[name]) == TASKS[name].architecture


def test_a_new_task_is_one_entry(monkeypatch, command, tmp_path):
    """It is planned, checked and run by nothing but its entry, and that of its model in the wan package."""
    sizes, prompt = ("48*32",), {"prompt": "a red circle moves right on a white background"}
    new = dataclasses.replace(TASKS["t2v-tiny"], name="t2v-new", sizes=sizes, frames=5, steps=4)
    monkeypatch.setitem(WAN_CONFIGS, "t2v-new", WAN_CONFIGS["t2v-tiny"])
    monkeypatch.setitem(TASKS, "t2v-new", dataclasses.replace(new, example=prompt, tables=(), shift=3.0))
    flags = ("--task", "t2v-new", "--size", "48*32", "--ckpt_dir", DEMOS["t2v-tiny"])
    said = command(*flags, "--magcache_speedup", 2, "--magcache_plan")
    assert "video     t2v-new, 48x32, 5 frames, 4 steps; 12 tokens a call" in said
    assert "no ratio table fits task t2v-new" in command(*flags, "--use_magcache")
    video = tmp_path / "new.mp4"
    command(*flags, "--use_magcache", "--magcache_speedup", 2, "--save_file", video)
    record = json.loads(video.with_suffix(".json").read_text())
    assert (record["width"], record["height"], record["frames"]) == (48, 32, 5)
    assert record["calls"] == {"computed": 4, "reused": 4}
    assert record["arguments"]["sample_shift"] == 3.0
