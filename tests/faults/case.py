"""A bad input or a fault, and what the command line must say of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Arguments = list | Callable[[Path], list]


def prepared(args: Arguments, folder: Path) -> list[str]:
    """args: of magcache_generate.py, or a function that prepares the fault in an empty folder, where the command will
    run, and returns them."""
    return [str(argument) for argument in (args(folder) if callable(args) else args)]


@dataclass(frozen=True)
class Case:
    """What is refused with exit code 2. line: regular expression of what stderr must hold. env: variables."""

    name: str
    args: Arguments
    line: str
    env: dict[str, str] = field(default_factory=dict)


def later(function: Callable) -> Callable:
    """Decorates f(folder, *more), or one that gets a process before the folder: f(*more) returns what takes these."""
    return lambda *more, **how: lambda *first: function(*first, *more, **how)
