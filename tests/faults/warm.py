"""Runs the script in processes of its own that start warm: forks of one that has imported torch and the rest."""

import collections
import json
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from commands import SCRIPT
from torch.nn.modules.module import register_module_forward_hook

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["magcache.app.generate", "magcache.app.compare", "wan.text2video", "matplotlib.figure"])


def start(
    flags: list,
    folder: Path,
    env: dict[str, str],
    arrange: Callable[[], None] | None = None,
    script: Path = SCRIPT,
    streams: Path | None = None,
    threads: int = 1,  # of two processes with two threads each, one waits for the other
):
    """Starts a process that runs the script with these flags in a folder. Its output goes to the files `out` and `err`
    there, or in `streams`. arrange: is called in it before the script."""
    process = FORKS.Process(
        target=run, args=(list(map(str, flags)), folder, env, arrange, script, streams or folder, threads)
    )
    process.start()
    return process


def finished(
    flags: list, folder: Path, arrange: Callable[[], None] | None = None, script: Path = SCRIPT, code: int = 0
) -> subprocess.CompletedProcess:
    """Waits for such a process and returns its result. code: the expected exit code."""
    threads = torch.get_num_threads()  # the number decides on the last bits, and a codec on more
    with tempfile.TemporaryDirectory() as streams:
        process = start(flags, folder, {}, arrange, script, Path(streams), threads)
        process.join(300)
        process.kill()
        out, err = (Path(streams, name).read_text() for name in ("out", "err"))
    assert process.exitcode == code, err
    return subprocess.CompletedProcess(flags, code, out, err)


def counting(path: Path) -> None:
    """Writes, as the process ends, how often modules of each class were called."""
    counts = collections.Counter()
    register_module_forward_hook(
        lambda module, *_: counts.update([f"{type(module).__module__}.{type(module).__name__}"])
    )
    multiprocessing.util.Finalize(None, lambda: path.write_text(json.dumps(counts)), exitpriority=1)


def only_from(folder: Path) -> None:
    """Forgets this repository's packages, so that those of a folder are imported."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("magcache", "wan")]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() not in SCRIPT.parents)]


def run(
    flags: list[str],
    folder: Path,
    env: dict[str, str],
    arrange: Callable[[], None] | None,
    script: Path,
    streams: Path,
    threads: int,
) -> None:
    os.chdir(folder)
    os.environ.update(env)
    tempfile.tempdir = None  # may be of another TMPDIR
    for number, name in ((0, os.devnull), (1, streams / "out"), (2, streams / "err")):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which are ignored where the tests are in background
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    torch.set_num_threads(threads)
    if arrange:
        arrange()
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")
