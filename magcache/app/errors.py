"""What ends a run with one line."""

import importlib.util
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """The request makes no sense. The text is the one line to say; the script says it and ends with exit code 2."""


class Failed(Exception):
    """The run cannot go on, for a reason that the user can do something about: the one line to say."""


class LostResult(Failed):
    """A finished video could be kept nowhere, and no other one could."""


class NotFinite(Failed):
    """A video has become NaN or infinite."""


@contextmanager
def refusing(*errors: type[Exception], about: str = "") -> Iterator[None]:
    """Turns errors of the block, whose first line says what is wrong, into `Refused`. about: goes in front of it."""
    try:
        yield
    except errors as fault:
        raise Refused(about + first_line(fault)) from fault


def first_line(fault: Exception) -> str:
    """Returns the first line of an exception's message, or its type if there is no message."""
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


def shortened(value: object) -> str:
    """Returns any value as a part of a line."""
    text = reprlib.repr(value)
    return text if len(text) < 80 else f"{text[:60]}..."


def reason_in(fault: Exception) -> str:
    """Returns in one line what torch says is wrong with a file of weights, without its headings and its advice to load
    the file unsafely."""
    lines = (line.strip().removeprefix("WeightsUnpickler error: ") for line in str(fault).splitlines())
    headings = re.compile(r"weights.only|error\(s\) in loading", re.IGNORECASE)
    reason = next((line for line in lines if line and not headings.search(line)), "").split(". ")[0][:200]
    return reason if reason and not isinstance(fault, LookupError) else f"{type(fault).__name__} {reason}".strip()


def need_package(name: str, what: str) -> None:
    """Refuses a flag whose package is missing."""
    if importlib.util.find_spec(name) is None:
        package = {"skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg"}.get(name, name)
        raise Refused(f"{what} needs the package {name}: pip install {package}")
