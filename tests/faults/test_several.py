"""Several processes that want the same files, a disk that is full, readers that leave, and many videos in a row."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
from commands import REPO, SCRIPT, python, torchrun

from faults import warm
from faults.cases_runs import FAST, FLAGS, ONE, SAVED, names

pytestmark = pytest.mark.slow


def ended(processes) -> list[int]:
    for process in processes:
        process.join(300)
        process.kill()
    return [process.exitcode for process in processes]


def started_together(folder: Path, flags: list[list]) -> list[int]:
    folders = [folder / f"streams{i}" for i in range(len(flags))]
    for one in folders:
        one.mkdir()
    return ended([warm.start(own, one, {}) for own, one in zip(flags, folders, strict=True)])


def test_two_without_a_name(tmp_path):
    """They start in the same second."""
    processes = [warm.start([*ONE, "--base_seed", seed], tmp_path, {}) for seed in (3, 4)]
    assert ended(processes) == [0, 0]
    films = sorted(tmp_path.glob("*.mp4"))
    assert {json.loads(film.with_suffix(".json").read_text())["seed"] for film in films} == {3, 4}
    assert len({film.read_bytes() for film in films}) == 2
    assert names(tmp_path) == {film.with_suffix(ending).name for film in films for ending in (".mp4", ".json")}


def test_eight_with_one_name(tmp_path):
    flags = [[*ONE, "--base_seed", seed, "--save_file", tmp_path / "film.mp4"] for seed in range(8)]
    assert started_together(tmp_path, flags) == [0] * 8
    (film,) = tmp_path.glob("*.mp4")
    assert len(iio.imread(film)) == 5
    assert json.loads(film.with_suffix(".json").read_text())["seed"] in range(8)
    assert not list(tmp_path.rglob("*.part.*"))


def test_two_batches_of_the_same_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moves up on a black background\na cat")
    batch = [*FLAGS, *FAST, "--prompt_file", tmp_path / "prompts.txt", "--save_file", tmp_path / "films"]
    assert started_together(tmp_path, [batch, batch]) == [0, 0]
    assert len(list((tmp_path / "films").glob("*.mp4"))) == 2
    assert not list(tmp_path.rglob("*.part.*"))


def test_a_full_disk(tmp_path):
    """Needs user namespaces, to mount a small file system."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, SCRIPT, *SAVED, "--frame_num", 17, "--save_file", "disk/film.mp4"]
    mounted = f"mount -t tmpfs -o size=4k none {tmp_path}/disk && exec " + '"$@"'
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh", *map(str, command)],
        cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1
    kept, error = [line for line in result.stderr.splitlines() if not line.startswith(("denoise", "decode"))]
    (rescue,) = (tmp_path / "tmp").glob("film_*.pt")
    assert kept == f"could not write disk/film.mp4; its pixels are kept in {rescue} (torch.load)"
    assert "could not write" in error


def test_a_reader_that_leaves(tmp_path):
    """As `| head -1` does."""
    command = [sys.executable, SCRIPT, *SAVED]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("prompt")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(300) == 0
    assert "Error" not in err
    assert len(iio.imread(tmp_path / "film.mp4")) == 5


def test_two_hundred_videos(tmp_path):
    """Memory and open files are those of the tenth."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle moves {i}" for i in range(200)))
    flags = [*FLAGS, "--frame_num", 1, "--sample_steps", 2, "--prompt_file", "prompts.txt", *FAST]
    process, early, late = warm.start(flags, tmp_path, {}), [], []
    while process.is_alive():
        count = len(list((tmp_path / "prompts").glob("*.mp4")))
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            memory = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            (late if count >= 150 else early if 10 <= count < 60 else []).append((memory, files))
        time.sleep(0.05)
    assert process.exitcode == 0
    # the least of each, as a video that is being made takes some
    assert min(memory for memory, _ in late) < 1.05 * min(memory for memory, _ in early)
    assert min(files for _, files in late) <= min(files for _, files in early)


def test_a_decoder_that_fails_once(tmp_path):
    """Of two processes that share a video the first decodes; the other must not take its failure for another place."""
    (tmp_path / "prompts.txt").write_text("a red circle moves up on a black background\na cat")
    (tmp_path / "fails_once.py").write_text(
        "import runpy, sys\n"
        "from wan.modules.vae import WanVAE\n"
        "decode, failed = WanVAE.decode, []\n"
        "def once(self, latents):\n"
        "    if not failed:\n"
        "        failed.append(1)\n"
        "        raise MemoryError('the decoder is full')\n"
        "    return decode(self, latents)\n"
        "WanVAE.decode = once\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = [*FLAGS, *FAST, "--ulysses_size", 2, "--prompt_file", tmp_path / "prompts.txt", "--save_file", "films"]
    command, environment = [*torchrun(2), tmp_path / "fails_once.py", *flags], os.environ | {"PYTHONPATH": str(REPO)}
    result = python(*command, code=1, cwd=tmp_path, env=environment)
    assert "1 of 2 videos failed; a rerun tries them again" in result.stderr
    assert result.stdout.count("failed    films/00001") == 1 and "MemoryError: the decoder is full" in result.stdout
    (film,) = (tmp_path / "films").glob("*.mp4")
    assert film.name.startswith("00002_a_cat") and len(iio.imread(film)) == 5
