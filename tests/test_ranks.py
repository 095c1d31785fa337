"""Two and four processes against one."""

import json
import os
import shutil
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
from golden_data import write_checkpoint

import magcache
import wan
from wan.configs import WAN_CONFIGS
from wan.utils.utils import cache_video

REPO = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO)}
REFERENCE = {}  # of one process, by kind, size and frames


def torchrun_command(processes: int, *arguments) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*command, *map(str, arguments)]


def torchrun(processes: int, *arguments):
    command = torchrun_command(processes, *arguments)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def start(what: str, processes: int, folder: Path) -> list[dict]:
    """What every process saw."""
    result = torchrun(processes, Path(ranks.__file__), what, folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"{what}{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("i2v", "vace"):
        write_checkpoint(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def pipelines(folder):
    return start("pipelines", 2, folder)


@pytest.fixture(scope="module")
def models(folder):
    return start("models", 4, folder)


@pytest.mark.parametrize("name", ranks.PIPELINE_RUNS)
def test_two_processes_make_the_same_video(pipelines, folder, name):
    _, flags, kind, (size, frame_num) = ranks.PIPELINE_RUNS[name]
    if (kind, size) not in REFERENCE:
        REFERENCE[kind, size] = ranks.pipeline_run(folder, kind, size, frame_num)
    expected, schedule = REFERENCE[kind, size], ranks.schedule()
    assert not torch.equal(expected["plain"], expected["cached"])
    for rank in pipelines:
        result = rank[name]
        for key in ("plain", "cached"):
            torch.testing.assert_close(result[key], expected[key], rtol=0, atol=1e-4)
        assert result["reuse"] == schedule.reuse
        for key, values in expected["lists"].items():
            assert result["lists"][key] == pytest.approx(values, abs=1.5e-5)
        # a reused call moves no weights and no attention, only the result
        result_only = {"c10d.allgather_": 1} if "use_usp" in flags else {}
        for counts, reused in zip(result["collectives"], schedule.reuse, strict=True):
            if reused:
                assert counts == result_only
            else:
                assert sum(counts.values()) > 2
                assert ("c10d._allgather_base_" in counts) == ("dit_fsdp" in flags)


def test_sharded_weights_round_as_autocast_does(pipelines):
    for rank in pipelines:
        assert torch.equal(rank["autocast"]["sharded"], rank["autocast"]["plain"])
        assert rank["autocast"]["dtypes"] == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("name", ranks.MODEL_RUNS)
def test_four_processes(models, name):
    ring, ulysses, grid = ranks.MODEL_RUNS[name]
    expected = ranks.model_run(grid)["outputs"]
    for index, rank in enumerate(models):
        result = rank[name]
        assert result["place"] == (
            index % (ring * ulysses),
            ring * ulysses,
            index // (ring * ulysses),
            4 // (ring * ulysses),
        )
        for u, v in zip(result["outputs"], expected, strict=True):
            torch.testing.assert_close(u, v, rtol=0, atol=1e-5)
        computed, reused = result["collectives"]
        assert sum(computed.values()) > 2
        assert reused == {"c10d.allgather_": 1}


# -- the command line --------------------------------------------------------------------------------------------------

SCRIPT = REPO / "magcache_generate.py"
DEMO = ("--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", ranks.DEMO, "--sample_steps", 3, "--frame_num", 9)
I2V_DEMO = REPO / "examples" / "Wan2.1-I2V-tiny"


IN_ONE_PROCESS = {}


def in_one_process(prompt: str, seed: int, path: Path):
    """The frames of the same request from the Python API."""
    if "t2v" not in IN_ONE_PROCESS:
        IN_ONE_PROCESS["t2v"] = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(ranks.DEMO))
    video = IN_ONE_PROCESS["t2v"].generate(prompt, (64, 64), 9, sampling_steps=3, seed=seed)
    cache_video(video[None], str(path), fps=16, nrow=1)
    return iio.imread(path)


def worker(parent: int, rank: int) -> int:
    """The id of torchrun's process with this rank."""
    for children in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{children}/environ").read_bytes().split(b"\0"):
            return int(children)
    raise AssertionError(f"no process of rank {rank}")


def test_many_prompts_of_which_a_rank_dies(tmp_path):
    """All are made, each once, although one of two processes is killed half way; seeds are those of the lines."""
    out, lines = tmp_path / "out", [{"prompt": f"a red circle moves right {i}"} for i in range(12)]
    lines[3] |= {"seed": 99}
    lines[7] |= {"save_file": str(tmp_path / "seventh.mp4")}
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = (*DEMO, "--prompt_file", tmp_path / "list.jsonl", "--save_file", out, "--base_seed", 5)
    command = torchrun_command(2, SCRIPT, *flags)

    def made():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4") if ".part" not in path.name}

    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as first:
        while len(made()) < 4:
            time.sleep(0.02)
            assert first.poll() is None, first.stdout.read()
        os.kill(worker(first.pid, 1), signal.SIGKILL)
        said, _ = first.communicate(timeout=120)
    assert first.returncode != 0
    assert "rank      : 1" in said
    assert "Signal 9 (SIGKILL)" in said
    before = made()
    assert 4 <= len(before) < 12

    second = torchrun(2, SCRIPT, *flags)
    assert second.returncode == 0, second.stderr
    assert f"12 in {tmp_path / 'list.jsonl'}, {len(before)} of them finished" in second.stdout
    after = made()
    assert len(after) == 12
    assert len(list(out.glob("*.mp4"))) == 11
    assert not list(tmp_path.rglob("*.part*"))
    assert {path: after[path] for path in before} == before
    for i, seed in ((0, 5), (3, 99), (7, 12)):
        (path,) = [tmp_path / "seventh.mp4"] if i == 7 else out.glob(f"{i + 1:05d}_*_{seed}_*.mp4")
        assert np.array_equal(iio.imread(path), in_one_process(lines[i]["prompt"], seed, tmp_path / "api.mp4"))
    third = torchrun(1, SCRIPT, *flags)
    assert third.returncode == 0, third.stderr
    assert "all of them are finished" in third.stdout
    assert made().keys() - {tmp_path / "api.mp4"} == after.keys()


def test_one_failing_prompt_does_not_stop_the_rest(tmp_path):
    """Two processes share every video; an image is gone when its turn comes."""
    lines = []
    for name in "abc":
        shutil.copy(REPO / "examples" / "i2v_tiny_input.png", tmp_path / f"{name}.png")
        lines.append(
            {"prompt": name, "image": str(tmp_path / f"{name}.png"), "save_file": str(tmp_path / f"{name}.mp4")}
        )
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--task", "i2v-tiny", "--ckpt_dir", I2V_DEMO, *DEMO[2:4], *DEMO[6:], "--ulysses_size", 2, "--dit_fsdp")
    command = torchrun_command(2, SCRIPT, *flags, "--prompt_file", tmp_path / "list.jsonl", "--use_magcache")
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("device"):  # the images have been checked
                (tmp_path / "b.png").unlink()
                break
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "1 of 3 videos failed, a rerun tries them again:" in err
    assert f"{tmp_path / 'b.mp4'}: ValueError: cannot read {tmp_path / 'b.png'}" in err
    assert "warning" not in err
    assert out.count("saved ") == 2
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["a.mp4", "c.mp4"]
    assert iio.imread(tmp_path / "c.mp4").shape == (9, 64, 64, 3)


def test_two_processes_calibrate_once(tmp_path):
    """One set of files, with the figures of one process to four decimals."""
    flags = (*DEMO, "--prompt", "a red circle moves right", "--base_seed", 3, "--magcache_calibration")
    flags += ("--calibration_dir", tmp_path / "dumps", "--save_file", tmp_path / "film.mp4", "--ulysses_size", 2)
    result = torchrun(2, SCRIPT, *flags)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "dumps").glob("t2v-tiny_*.json")
    assert len(list((tmp_path / "dumps").iterdir())) == 5
    table = json.loads(path.read_text())
    in_one_process("a red circle moves right", 3, tmp_path / "api.mp4")
    pipeline = IN_ONE_PROCESS["t2v"]
    calibration = magcache.apply_calibration(pipeline.model, 3)
    in_one_process("a red circle moves right", 3, tmp_path / "api.mp4")
    magcache.remove_magcache(pipeline.model)
    for key, values in calibration.lists().items():
        assert table[key] == pytest.approx(values, abs=5e-5)
