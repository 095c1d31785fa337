"""Presses Ctrl-C once a command has come to a certain point."""

import re
import signal
import subprocess


def interrupted(command: list, pattern: bytes) -> tuple[int, bytes]:
    """Sends Ctrl-C to a command once its stderr matches. Returns its exit code and the rest of stderr."""
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # a shell's background jobs ignore Ctrl-C, and so would this one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = b""
    while not re.search(pattern, seen):
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err
