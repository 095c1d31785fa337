"""Two and four processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from golden_data import write_checkpoint

REPO = Path(__file__).parent.parent
REFERENCE = {}  # of one process, by kind, size and frames


def torchrun(processes: int, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )


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
