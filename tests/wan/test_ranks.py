"""Two and four processes against one."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import ranks
import torch
from checkpoints_22 import write_checkpoint_22
from commands import DEMO, DEMO_I2V, EXAMPLES, REPO, SCRIPT, python, torchrun
from diffusers.models.attention_dispatch import attention_backend as diffusers_backend
from golden_data import write_checkpoint
from PIL import Image

import magcache
import magcache_generate
import wan
from magcache.app.media import to_frames, write_video
from magcache.patch import shadowed
from magcache.trials import closeness
from wan.configs import WAN_CONFIGS
from wan.utils.attention import shared_backend

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO)}
REFERENCE = {}  # of one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("i2v", "vace"):
        write_checkpoint(kind, folder / kind)
    for task in ("t2v-A14B", "ti2v-5B"):
        write_checkpoint_22(task, folder / task)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What each of four processes saw."""
    python(ranks.__file__, folder, env=ENVIRONMENT)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("name", ranks.PIPELINE_RUNS)
def test_processes_make_the_same_video(seen, folder, name):
    ulysses, flags, kind, (size, frame_num) = ranks.PIPELINE_RUNS[name]
    if (kind, size) not in REFERENCE:
        REFERENCE[kind, size] = ranks.pipeline_run(folder, kind, size, frame_num)
    expected, schedule = REFERENCE[kind, size], ranks.schedule()
    assert not torch.equal(expected["uncached"], expected["cached"])
    results = [rank[name] for rank in seen if name in rank]
    assert len(results) == (2 if ulysses == 2 else 4)
    for result in results:
        for key in ("uncached", "cached", "forecast"):
            torch.testing.assert_close(result[key], expected[key], rtol=0, atol=1e-4)
        assert result["reuse"] == schedule.reuse
        assert not (flags.get("t5_fsdp") and result["text encoder is left"])
        for key, values in expected["lists"].items():
            assert result["lists"][key] == pytest.approx(values, abs=1.5e-5)  # rounded to 5 decimals
        # a reused call moves no weights and no attention, only the result
        result_only = {"c10d.allgather_": 1} if "use_usp" in flags else {}
        for counts, reused in zip(result["collectives"], schedule.reuse, strict=True):
            if reused:
                assert counts == result_only
            else:
                assert ("c10d._allgather_base_" in counts) == ("dit_fsdp" in flags)
                assert any("all_to_all" in name for name in counts) == ("use_usp" in flags)
        for counts, reused in zip(result["forecast collectives"], ranks.forecasts().reuse, strict=True):
            assert (counts == {}) == reused  # a forecast moves nothing at all


@pytest.mark.parametrize("name", ranks.RUNS_22)
def test_processes_make_the_same_video_of_wan22(seen, folder, name):
    expected = ranks.run_22(folder, ranks.RUNS_22[name][2])
    assert not torch.equal(*expected)
    results = [rank[name] for rank in seen if name in rank]
    assert len(results) == 2
    for result in results:
        for u, v in zip(result, expected, strict=True):
            torch.testing.assert_close(u, v, rtol=0, atol=1e-4)


def test_sharded_weights_round_as_autocast_does(seen):
    for rank in seen:
        assert torch.equal(rank["autocast"]["sharded"], rank["autocast"]["plain"])
        assert rank["autocast"]["dtypes"] == {torch.float32, torch.bfloat16}


def test_a_group_goes_on_where_all_fail_alike_or_the_first_in_decoding(seen):
    for rank in seen:  # groups of two
        well, alike, decoding, alone = rank["agreed"]
        assert (well, alike, decoding) == (None, "MemoryError: GPU 0 is full", "ValueError: alone")
        assert alone == "not all processes of a group made the video: [None, 'ValueError: alone']"


@pytest.mark.parametrize("name", ranks.MODEL_RUNS)
def test_rings(seen, name):
    ring, ulysses, grid = ranks.MODEL_RUNS[name]
    expected, size = ranks.model_run(grid)["outputs"], ring * ulysses
    for number, rank in enumerate(seen):
        result = rank[name]
        assert result["place"] == (number % size, size, number // size, 4 // size)
        for u, v in zip(result["outputs"], expected, strict=True):
            torch.testing.assert_close(u, v, rtol=0, atol=1e-5)
        computed, reused = result["collectives"]
        assert sum(computed.values()) > 2
        assert reused == {"c10d.allgather_": 1}


def test_attention_that_cannot_share_is_refused():
    assert shared_backend("cuda", 1) is shared_backend("cpu", 1) is None
    assert shared_backend("cuda", 2) == "_native_flash"
    with pytest.raises(ValueError, match="ring_size must be 1 on the CPU"):
        shared_backend("cpu", 2)
    with diffusers_backend("_native_math"), pytest.raises(ValueError, match="_native_math cannot share sequences"):
        shared_backend("cpu", 1)


def test_two_processes_calibrate_once(seen, folder):
    """One set of files, with the figures of one process to four decimals, and with trials of the same quality."""
    (path,) = (folder / "dumps").glob("t2v-tiny_*.json")
    assert len(list((folder / "dumps").iterdir())) == 7
    assert iio.imread(folder / "dumps" / "film.mp4").shape == (5, 64, 64, 3)
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(DEMO))
    calibration = magcache.apply_calibration(pipeline.model, 3)
    generate = functools.partial(pipeline.generate, ranks.PROMPT, (64, 64), 5, sampling_steps=3, seed=3)
    with shadowed(pipeline.vae, {"decode": lambda latents: latents}):
        truth = generate()
        magcache.apply_magcache(pipeline.model, magcache.plan_speedup(3, 1.5))
        expected, _ = closeness(generate(), truth)
    for key, values in calibration.lists().items():
        assert json.loads(path.read_text())[key] == pytest.approx(values, abs=5e-5)
    (forecast,) = magcache.read_trials(magcache.load_table(path)).forecasts
    assert forecast.psnr[0] == pytest.approx(expected, abs=0.05)


# -- the command line --------------------------------------------------------------------------------------------------

IMAGE = EXAMPLES / "i2v_tiny_input.png"
I2V = ("--task", "i2v-tiny", "--ckpt_dir", DEMO_I2V, "--size", "64*64", "--frame_num", 5, "--sample_steps", 2)


def in_one_process(prompt: str, seed: int, path: Path):
    """The frames of the same i2v request from the Python API."""
    if "i2v-tiny" not in REFERENCE:
        REFERENCE["i2v-tiny"] = wan.WanI2V(WAN_CONFIGS["i2v-tiny"], str(DEMO_I2V))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have: the number decides on the last bits, and a codec on more
    video = REFERENCE["i2v-tiny"].generate(prompt, Image.open(IMAGE), 64 * 64, 5, sampling_steps=2, seed=seed)
    torch.set_num_threads(threads)
    write_video(path, to_frames(video), fps=16)
    return iio.imread(path)


def worker(parent: int, rank: int) -> int:
    """The id of torchrun's process with this rank."""
    for children in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{children}/environ").read_bytes().split(b"\0"):
            return int(children)
    raise AssertionError(f"no process of rank {rank}")


def test_many_prompts_of_which_a_rank_dies(tmp_path, monkeypatch, capsys):
    """Two processes share them out, one is killed half way. The rerun makes each that is missing once, goes on after
    one that fails, and touches none that is finished. Seeds are those of the lines."""
    out, lines = tmp_path / "out", [{"prompt": f"a purple triangle moves right {i}"} for i in range(12)]
    lines[3] |= {"seed": 99}
    lines[7] |= {"save_file": str(tmp_path / "eighth.mp4")}
    lines[11] |= {"image": str(tmp_path / "other.png")}
    flipped = Image.open(IMAGE).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    flipped.save(tmp_path / "other.png")
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = (*I2V, "--image", IMAGE, "--prompt_file", tmp_path / "list.jsonl", "--save_file", out, "--base_seed", 5)

    def made(ending="mp4"):
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob(f"*.{ending}") if ".part" not in path.name}

    command = list(map(str, [sys.executable, *torchrun(2), SCRIPT, *flags]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen(command, **pipes) as first:
        while len(made("json")) < 4:  # their records, so that none is being written
            time.sleep(0.02)
            assert first.poll() is None, first.stdout.read()
        os.kill(worker(first.pid, 1), signal.SIGKILL)
        said, _ = first.communicate(timeout=120)
    assert first.returncode != 0
    assert "rank      : 1" in said
    assert "Signal 9 (SIGKILL)" in said
    before, unfinished = made(), {*tmp_path.rglob("*.part*")}  # the killed one may have been writing
    assert 4 <= len(before) < 11

    with subprocess.Popen(command, **pipes) as second:
        for line in second.stdout:
            if f"12 in {tmp_path / 'list.jsonl'}, {len(before)} of them finished" in line:
                break
        for line in second.stdout:
            if line.startswith("device"):  # the images have been checked
                (tmp_path / "other.png").unlink()
                break
        said, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert f"1 of {12 - len(before)} videos failed; a rerun tries them again:" in said
    assert f"{lines[11]['image']}: No such file" in said
    after = made()
    assert len(after) == 11
    assert len({*out.glob("*.mp4")} - unfinished) == 10
    assert {*tmp_path.rglob("*.part*")} <= unfinished
    assert {path: after[path] for path in before} == before
    for i, seed in ((0, 5), (3, 99), (7, 12)):
        (path,) = [tmp_path / "eighth.mp4"] if i == 7 else out.glob(f"{i + 1:05d}_*_{seed}_*.mp4")
        assert np.array_equal(iio.imread(path), in_one_process(lines[i]["prompt"], seed, tmp_path / "api.mp4"))

    flipped.save(tmp_path / "other.png")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    for finished in (11, 12):  # by one process, which finds what two have made
        magcache_generate.main()
        assert f"{finished} of them finished" in capsys.readouterr().out
        assert len({*out.glob("*.mp4")} - unfinished) == 11
    assert {path: made()[path] for path in after} == after
