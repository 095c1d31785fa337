"""A bad input or a fault, and what the command line must say of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """args: of magcache_generate.py, or a function that prepares the fault in an empty folder, where the command will
    run, and returns them. code: exit code. line: regular expression of what stderr must hold. env: variables. slow:
    takes some seconds."""

    name: str
    args: list[str] | Callable[[Path], list[str]]
    code: int
    line: str
    env: dict[str, str] = field(default_factory=dict)
    slow: bool = False

    def prepare(self, folder: Path) -> list[str]:
        """The arguments."""
        return [str(argument) for argument in (self.args(folder) if callable(self.args) else self.args)]
