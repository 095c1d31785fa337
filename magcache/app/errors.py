"""What ends a run with one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """The request makes no sense. The text is the one line to say; the script says it and ends with exit code 2."""


class Failed(Exception):
    """The run cannot go on, for a reason that the user can do something about: the one line to say."""


def refuse_if(wrong: bool, line: str) -> None:
    if wrong:
        raise Refused(line)


class LostResult(Failed):
    """A finished video could be kept nowhere, and no other one could."""


class NotFinite(Failed):
    """A video has become NaN or infinite."""


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Errors of the block whose first line says what is wrong with the request become `Refused`."""
    try:
        yield
    except errors as fault:
        raise Refused(first_line(fault)) from fault


def first_line(fault: Exception) -> str:
    return (str(fault) or "?").splitlines()[0]
