"""Faults while the script runs: signals, full disks, closed streams, NaN, and others that write the same files."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import pytest
import torch
from commands import DEMO, TINY
from safetensors.torch import load_file, save_file

import magcache
from faults.case import Arguments, later

DIT, VAE = "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"
FLAGS = [*TINY, "--frame_num", 5, "--sample_steps", 4]
ONE = [*FLAGS, "--prompt", "a red circle moves up on a black background", "--base_seed", 3]
SAVED = [*ONE, "--save_file", "film.mp4"]
FAST = ["--use_magcache", "--magcache_speedup", 2]
LONG = ["--sample_steps", 900]  # some seconds


@dataclass(frozen=True)
class RunCase:
    """A run that loads the model. code: exit code. line: regular expression of what stderr must hold. env: variables.
    arrange: is called in its process before the script. disturb: is called with the process and its folder while it
    runs. check: with the folder, afterwards."""

    name: str
    args: Arguments
    code: int
    line: str
    env: dict[str, str] = field(default_factory=dict)
    arrange: Callable[[], None] | None = None
    disturb: Callable[[object, Path], None] | None = None
    check: Callable[[Path], None] | None = None


def wait_for(folder: Path, pattern: str, what: str = "", seconds: float = 60) -> None:
    """Until a file of the folder holds the text."""
    end = time.monotonic() + seconds
    while not any(what in file.read_text(errors="replace") for file in folder.glob(pattern)):
        assert time.monotonic() < end, f"{pattern} never held {what!r}"
        time.sleep(0.01)


@later
def signalled(process, folder: Path, number: int, pattern: str, what: str = "", again: int | None = None) -> None:
    """Sends a signal once a file holds a text, and another one right behind it."""
    wait_for(folder, pattern, what)
    os.kill(process.pid, number)
    if again:
        os.kill(process.pid, again)


def film(path: Path, frames: int = 5) -> None:
    assert len(iio.imread(path)) == frames


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"out", "err"}


def nothing(folder: Path) -> None:
    assert names(folder) <= {"model", "prompts.txt", "slow", "started", "tmp", "film.part.mp4"}


@later
def said(folder: Path, text: str) -> None:
    assert text in (folder / "out").read_text()


@later
def both(folder: Path, *checks: Callable[[Path], None]) -> None:
    for one in checks:
        one(folder)


@later
def slow_encoder(folder: Path, flags: list) -> list:
    """ffmpeg waits before it starts, so that signals find the script saving."""
    (folder / "tmp").mkdir()
    encoder = imageio_ffmpeg.get_ffmpeg_exe()
    (folder / "slow").write_text(f'#!/bin/sh\ntouch started\nsleep 5\nexec {encoder} "$@"\n')
    (folder / "slow").chmod(0o755)
    return flags


IN_FOLDER = {"TMPDIR": "tmp", "IMAGEIO_FFMPEG_EXE": "./slow"}


def rescued(folder: Path) -> None:
    """The pixels are in one new file, and there is nothing else."""
    (kept,) = (folder / "tmp").glob("film_*.pt")
    pixels = torch.load(kept)
    assert (pixels.shape, pixels.dtype) == ((3, 5, 64, 64), torch.uint8)
    assert str(kept.name) in (folder / "err").read_text()
    nothing(folder)


@later
def prompts(folder: Path, count: int, flags: list) -> list:
    shapes = ("circle", "square", "triangle")
    lines = (f"a red {shapes[i % 3]} moves up on a black background" for i in range(count))
    (folder / "prompts.txt").write_text("\n".join(lines))
    return [*FLAGS, "--prompt_file", "prompts.txt", *flags]


@later
def calibrated(folder: Path, count: int, where: str = "calibration") -> None:
    """The table is of that many prompts."""
    (table,) = (folder / where).glob("t2v-tiny_*.json")
    assert len(json.loads(table.read_text())["measured_on"]["prompts"]) == count
    assert not list(folder.rglob("*.part*"))


def tried_one(folder: Path) -> None:
    """Of two prompts."""
    calibrated(2)(folder)
    (table,) = (folder / "calibration").glob("t2v-tiny_*.json")
    assert magcache.read_trials(magcache.load_table(table)).prompts == (0,)


@later
def poisoned(folder: Path, name: str, tensor: str, flags: list) -> list:
    """A checkpoint with a tensor of NaN."""
    path = shutil.copytree(DEMO, folder / "model") / name
    tensors = load_file(path) if name == DIT else torch.load(path)
    tensors[tensor] = torch.full_like(tensors[tensor], float("nan"))
    (save_file if name == DIT else torch.save)(tensors, path)
    return [*flags, "--ckpt_dir", "model"]


@later
def folder_for(folder: Path, flags: list | Callable[[Path], list]) -> list:
    """Makes the folders `gone`, for results, and `tmp`."""
    for name in ("gone", "tmp"):
        (folder / name).mkdir()
    return flags(folder) if callable(flags) else flags


@later
def existing(folder: Path, name: str, content: bytes, flags: list) -> list:
    (folder / name).write_bytes(content)
    return flags


@later
def kept_whole(folder: Path, name: str, content: bytes) -> None:
    assert (folder / name).read_bytes() == content


@later
def once(process, folder: Path, pattern: str, what: str, function: Callable[[Path], object]) -> None:
    """Something else happens once a file holds a text."""
    wait_for(folder, pattern, what)
    function(folder)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def stream_to(number: int, path: str) -> None:
    os.dup2(os.open(path, os.O_WRONLY), number)


def close_stream(name: str) -> None:
    os.close(getattr(sys, name).fileno())
    setattr(sys, name, None)  # as Python starts then


def plain_locale() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")


def turned_into_a_file(folder: Path) -> None:
    (folder / "calibration").rmdir()
    (folder / "calibration").touch()


def not_finite_then(folder: Path) -> None:
    """The other video of the batch is there."""
    assert len(list((folder / "prompts").glob("*.mp4"))) == 1


STOPS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
CALIBRATION = ["--magcache_calibration"]
BATCH = prompts(2, FAST)
CASES = [
    *(
        RunCase(f"{name} while denoising", [*SAVED, *LONG], 128 + number,
                rf"stopped by {name} in prompt 1 of 1, after \d+ of 1800 calls; videos saved: 0",
                disturb=signalled(number, "err", "denoise"), check=nothing)
        for number, name in STOPS.items()
    ),
    RunCase("SIGHUP and SIGTERM at once while saving", slow_encoder(SAVED), 129, "stopped by SIGHUP", IN_FOLDER,
            disturb=signalled(signal.SIGHUP, "started", again=signal.SIGTERM), check=rescued),
    RunCase("SIGHUP where it is ignored, as by nohup", SAVED, 0, "",
            arrange=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN),
            disturb=signalled(signal.SIGHUP, "out", "loading"), check=lambda folder: film(folder / "film.mp4")),
    RunCase("SIGINT in the first prompt of a calibration", [*SAVED, *CALIBRATION, *LONG], 130,
            r"the calibration stopped in prompt 1 of 1, after \d+ of 1800 calls; nothing is written",
            disturb=signalled(signal.SIGINT, "err", "denoise"), check=nothing),
    RunCase("SIGINT in the trials of a calibration", prompts(2, [*CALIBRATION, "2,3", "--sample_steps", 20]), 130,
            "the calibration stopped in the trials of prompt 2 of 2; what was measured until then is written",
            disturb=signalled(signal.SIGINT, "err", "trials of prompt 2 of 2"), check=tried_one),
    RunCase("SIGINT in the third prompt of a calibration", prompts(8, [*CALIBRATION, "--sample_steps", 15]), 130,
            "stopped by Ctrl-C", disturb=signalled(signal.SIGINT, "out", "3 of 8"), check=calibrated(2)),
    RunCase("SIGKILL in the third prompt of a calibration", prompts(8, [*CALIBRATION, "--sample_steps", 15]),
            -signal.SIGKILL, "", disturb=signalled(signal.SIGKILL, "out", "3 of 8"), check=calibrated(2)),
    RunCase("the folder of a calibration becomes a file", folder_for(prompts(2, CALIBRATION)), 0,
            r"calibration no longer takes files \(.*\); the calibration is in .*/tmp", {"TMPDIR": "tmp"},
            disturb=once("out", "loading", turned_into_a_file), check=calibrated(2, "tmp")),
    RunCase("SIGTERM in the second video of a batch", prompts(2, ["--sample_steps", 30]), 143,
            r"stopped by SIGTERM in prompt 2 of 2, after \d+ of 60 calls; videos saved: 1",
            disturb=signalled(signal.SIGTERM, "out", "2 of 2"), check=not_finite_then),
    RunCase("NaN in a weight", poisoned(DIT, "head.head.bias", SAVED), 1,
            r"the latent became NaN or infinite in step 1 of 4 \(computed, computed\)", check=nothing),
    RunCase("NaN in the VAE", poisoned(VAE, "decoder.head.2.bias", SAVED), 1,
            "the VAE decoded NaN or infinite values", check=nothing),
    RunCase("guidance that overflows, with a comparison", [*SAVED, *FAST, "--compare", "--sample_guide_scale", "1e38"],
            1, r"in steps? [\d to]+ of 4", check=nothing),
    RunCase("a calibration of NaN", poisoned(DIT, "head.head.bias", [*SAVED, *CALIBRATION]), 1,
            "the calibration stopped in prompt 1 of 1", check=nothing),
    RunCase("a batch whose guidance overflows", prompts(2, ["--sample_guide_scale", "1e38"]), 1,
            "2 of 2 videos failed", check=said("failed    prompts/00001")),
    RunCase("file sizes are limited", SAVED, 1, r"could not write film.mp4 \(.*\), nor its pixels anywhere else",
            arrange=partial(limit_files, 2000), check=nothing),
    RunCase("the folder of the result goes", folder_for([*ONE, "--save_file", "gone/film.mp4"]), 1,
            "could not write gone/film.mp4; its pixels are kept in", {"TMPDIR": "tmp"},
            disturb=once("out", "loading", lambda folder: (folder / "gone").rmdir()), check=rescued),
    RunCase("the folder of a batch goes", folder_for(prompts(2, ["--save_file", "gone"])), 1,
            r"2 of 2 videos failed; a rerun tries them again:\ngone/00001", {"TMPDIR": "tmp"},
            disturb=once("out", "1 of 2", lambda folder: (folder / "gone").rmdir()),
            check=lambda folder: len(list((folder / "tmp").glob("*.pt"))) == 2 or pytest.fail("a video is lost")),
    RunCase("standard output is full", SAVED, 0, "", arrange=partial(stream_to, 1, "/dev/full"),
            check=lambda folder: film(folder / "film.mp4")),
    RunCase("standard error is closed", SAVED, 0, "", arrange=partial(close_stream, "stderr"),
            check=lambda folder: film(folder / "film.mp4")),
    RunCase("a locale without the prompt's characters", [*FLAGS, "--prompt", "a 🦊 moves", "--save_file", "film.mp4"],
            0, "", arrange=plain_locale, check=both(said("a \\U0001f98a moves"), lambda f: film(f / "film.mp4"))),
    RunCase("a file has the name", existing("film.mp4", b"my notes", SAVED), 0, "",
            check=both(said("note: film.mp4 will be replaced"), lambda folder: film(folder / "film.mp4"))),
    RunCase("a file of another has a name like a part", existing("film.part.mp4", b"mine", SAVED), 0, "",
            check=both(kept_whole("film.part.mp4", b"mine"), lambda folder: film(folder / "film.mp4"))),
]  # fmt: skip
