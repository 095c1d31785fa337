"""Every task from the command line, with tiny random checkpoints: uncached, cached, calibrating."""

import functools
import json

import imageio.v3 as iio
import numpy as np
import pytest
from checkpoints_22 import write_checkpoint_22
from commands import EXAMPLES
from faults import warm
from golden_data import GOLDEN, read_json, write_checkpoint
from tiny_qwen import save_model

import magcache

pytestmark = pytest.mark.slow
STEPS = 4
CACHE = ["--use_magcache", "--magcache_thresh", "1", "--magcache_K", "2", "--retention_ratio", "0.2"]
SOURCES = GOLDEN / "vace_source"
# task -> kind of checkpoint, its folder, flags, shape of the result
TASKS = {
    "t2v-1.3B": ("t2v", "Wan2.1-T2V-1.3B", ["--size", "480*832", "--frame_num", "1"], (1, 832, 480, 3)),
    "t2i-14B": ("t2v", "Wan2.1-T2V-14B", ["--size", "480*832"], (832, 480, 3)),
    "i2v-14B": ("i2v", "Wan2.1-I2V-14B-480P", [
        "--size", "832*480", "--frame_num", "1", "--image", EXAMPLES / "wan_i2v_2.png",
    ], (1, 464, 832, 3)),
    "flf2v-14B": ("flf2v", "Wan2.1-FLF2V-14B-720P", [
        "--size", "832*480", "--frame_num", "5",
        "--first_frame", EXAMPLES / "flf2v_input_first_frame.png",
        "--last_frame", EXAMPLES / "flf2v_input_last_frame.png",
    ], (5, 464, 832, 3)),
    "vace-1.3B": ("vace", "Wan2.1-VACE-1.3B", [
        "--size", "832*480", "--src_video", SOURCES / "video_a.mp4", "--src_mask", SOURCES / "mask_a.mp4",
        "--src_ref_images", f"{EXAMPLES / 'girl.png'},{EXAMPLES / 'snake.png'}",
    ], (9, 48, 64, 3)),
}  # fmt: skip


def counted(folder, *flags):
    """The result of a run, and how often it called modules of each class."""
    result = warm.finished(flags, folder, functools.partial(warm.counting, folder / "counts.json"))
    return result, json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task, tmp_path):
    kind, folder, flags, shape = TASKS[task]
    checkpoint = write_checkpoint(kind, tmp_path / folder)
    common = ["--task", task, "--ckpt_dir", checkpoint, "--sample_steps", STEPS, "--base_seed", 1, "--prompt", "a bird"]
    table = {"t2i-14B": "t2v-14B", "i2v-14B": "i2v-14B-480P", "flf2v-14B": "i2v-14B-720P"}.get(task, task)
    schedule = magcache.plan(magcache.load_ratios(table), STEPS, 1, 2, 0.2)
    assert any(schedule.reuse)
    model = read_json(f"pipelines/{kind}/config.json")
    blocks = {"model.WanAttentionBlock": model["num_layers"]}
    if kind == "vace":
        blocks = {"vace_model.BaseWanAttentionBlock": model["num_layers"]}
        blocks["vace_model.VaceWanAttentionBlock"] = len(model["vace_layers"])
    results = []
    for more, calls in (
        ([], 2 * STEPS),
        ([*CACHE, "--mag_ratios", table], schedule.computed),
        (["--magcache_calibration"], 2 * STEPS),
    ):
        path = tmp_path / f"{calls}{'.png' if task == 't2i-14B' else '.mp4'}"
        result, counts = counted(tmp_path, *common, *flags, *more, "--save_file", path)
        for name, layers in blocks.items():
            assert counts[f"wan.modules.{name}"] == calls * layers
        assert counts["wan.modules.model.Head"] == 2 * STEPS
        results.append(iio.imread(path))
        assert results[-1].shape == shape
        assert not (calls < 2 * STEPS) or f"{calls} of {2 * STEPS} calls computed" in result.stdout
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])
    (measured,) = tmp_path.glob(f"{task}_*.json")
    magcache.plan(magcache.load_ratios(measured), STEPS, 0.1, 2)


PICTURE = EXAMPLES / "wan_i2v_2.png"
OF_WAN22 = {  # task, flags -> shape of the result, calls computed
    "t2v": ("t2v-A14B", ["--size", "480*832"], (1, 832, 480, 3)),
    "i2v": ("i2v-A14B", ["--size", "832*480", "--image", PICTURE], (1, 464, 832, 3)),
    "text": ("ti2v-5B", ["--size", "1280*704"], (1, 704, 1280, 3)),
    "picture": ("ti2v-5B", ["--size", "1280*704", "--image", PICTURE], (5, 704, 1248, 3)),
}


@pytest.mark.parametrize("name", OF_WAN22)
def test_wan22(name, tmp_path):
    """A run with the cache, compared with one without; its record repeats it."""
    task, flags, shape = OF_WAN22[name]
    checkpoint = write_checkpoint_22(task, tmp_path / "model")
    command = ["--task", task, "--ckpt_dir", checkpoint, *flags, "--frame_num", shape[0], "--sample_steps", STEPS]
    command += ["--prompt", "a bird", "--base_seed", 1, "--save_file", tmp_path / "cached.mp4"]
    command += ["--use_magcache", "--magcache_speedup", 2, "--compare"]
    result, counts = counted(tmp_path, *command)
    assert "please report" not in result.stderr
    assert counts["wan.modules.model.WanAttentionBlock"] == 2 * (STEPS + 2 * STEPS)
    record = json.loads((tmp_path / "cached.json").read_text())
    assert record["calls"] == {"computed": STEPS, "reused": STEPS}
    guidance = {"t2v-A14B": [3.0, 4.0], "i2v-A14B": [3.5, 3.5], "ti2v-5B": 5.0}[task]
    assert record["arguments"]["sample_guide_scale"] == guidance
    assert ("--sample_guide_scale" in record["command"]) == (task == "ti2v-5B")
    plain, video = (iio.imread(tmp_path / f"{file}.mp4") for file in ("cached_uncached", "cached"))
    assert video.shape == shape
    assert not np.array_equal(plain, video)
    if name != "t2v":
        return
    warm.finished(record["command"][2:], tmp_path)
    assert np.array_equal(iio.imread(tmp_path / "cached_again.mp4"), video)


def test_trials_with_input_files(tmp_path):
    """What a trial has measured is what a run of the same prompt and noise gives, with a video, a mask, references."""
    task = "vace-1.3B"
    kind, folder, flags, _ = TASKS[task]
    checkpoint = write_checkpoint(kind, tmp_path / folder)
    common = ["--task", task, "--ckpt_dir", checkpoint, *flags, "--sample_steps", 6, "--base_seed", 1]
    common += ["--prompt", "a bird", "--save_file", tmp_path / "film.mp4"]
    warm.finished([*common, "--magcache_calibration", 2], tmp_path)
    (path,) = tmp_path.glob(f"{task}_*.json")
    warm.finished([*common, "--use_magcache", "--magcache_speedup", 2, "--compare", "--mag_ratios", path], tmp_path)
    (forecast,) = magcache.read_trials(magcache.load_table(path)).forecasts
    record = json.loads((tmp_path / "film.json").read_text())
    assert record["comparison"]["latent_psnr"] == pytest.approx(forecast.psnr[0], abs=0.01)
    assert record["expected"]["latent_psnr"]["mean"] == forecast.psnr[0]


def test_prompt_extension(tmp_path):
    save_model(tmp_path / "qwen", "qwen2_5_vl")
    checkpoint = write_checkpoint("i2v", tmp_path / "Wan2.1-I2V-14B-480P")
    flags = ["--task", "i2v-14B", "--size", "832*480", "--frame_num", "1", "--ckpt_dir", checkpoint]
    flags += ["--sample_steps", "1", "--image", EXAMPLES / "wan_i2v.png", "--prompt", "a boat", "--base_seed", "1"]
    flags += ["--use_prompt_extend", "--prompt_extend_model", tmp_path / "qwen", "--prompt_extend_target_lang", "en"]
    said = warm.finished([*flags, "--save_file", tmp_path / "film.mp4"], tmp_path).stdout
    given, extended = (line[10:] for line in said.splitlines() if line.startswith("prompt "))
    assert given == "a boat"
    assert set(extended) <= set("abcdefghijklmnop ")
    assert len(extended) > 10
    assert iio.imread(tmp_path / "film.mp4").shape == (1, 464, 832, 3)
