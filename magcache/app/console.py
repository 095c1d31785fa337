"""What is between a run and whoever started it: streams that may close, signals that may come."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TextIO

SIGNALS = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}  # the last one is unknown to Windows
GRACE = 5.0  # seconds after a signal in which others change nothing: they often come in pairs, and clean-up takes some


class Stopped(KeyboardInterrupt):
    """A signal came. number: which. reached: how far the run was, if that is known."""

    def __init__(self, number: int, reached: str = ""):
        super().__init__(f"stopped by {SIGNALS[signal.Signals(number).name]}{reached}")
        self.number = number


def stop_cleanly() -> None:
    """Makes SIGTERM and SIGHUP do what Ctrl-C does: they raise `Stopped`, so that files are cleaned up and results
    kept. A signal that is ignored, as under nohup, stays ignored."""
    latest = -GRACE

    def stop(number, frame):
        nonlocal latest
        if time.monotonic() - latest > GRACE:
            latest = time.monotonic()
            raise Stopped(number)

    for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


class Speaker:
    """A text stream that nothing printed can break: when its reader is gone or its disk is full, the rest goes nowhere;
    characters that its encoding lacks become escapes."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self.trying(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.trying(self.stream.flush)

    def trying(self, function: Callable, *args: str) -> None:
        try:
            function(*args)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # also for what the stream still holds, and for child processes
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def speak_safely() -> None:
    """Makes standard output and error a `Speaker` each; one that was closed goes nowhere. Warnings take one line,
    without their place in the code."""
    warnings.formatwarning = lambda message, *place: f"warning: {message}\n"
    for name in ("stdout", "stderr"):
        setattr(sys, name, Speaker(getattr(sys, name) or open(os.devnull, "w")))  # noqa: SIM115
