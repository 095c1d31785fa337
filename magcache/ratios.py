"""Ratio tables: find, load, check, resample to another number of steps, save. Pure Python.

A table holds |r_t| / |r_{t-1}|, the mean over tokens of the residual's norm against the step before, for every
transformer call of a run in call order: cond, uncond, cond, uncond, ...
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from magcache.files import read_json, written_whole
from magcache.schedule import CALLS_PER_STEP, join_branches

TABLES = Path(__file__).with_name("ratios")
ABSURD = (0.01, 100)  # no model was seen to have ratios beyond these


class UnknownTableError(ValueError):
    """No table has this name, or none fits the model: measure one or name another."""


@dataclass(frozen=True)
class RatioTable:
    """A table and where it comes from.

    name: what it was loaded by. ratios: in call order, with the leading 1.0, 1.0 of the step that has no predecessor.
    measured_on: what it was measured on, as far as that is known. named: whether it is one of `table_names()`.
    path: its file. trials: what its calibration has tried, as `magcache.trials.read_trials` reads it; None if nothing.
    """

    name: str
    ratios: tuple[float, ...]
    measured_on: dict
    named: bool
    path: Path | None = None
    trials: dict | None = None

    @property
    def steps(self) -> int:
        return len(self.ratios) // CALLS_PER_STEP


def table_names() -> tuple[str, ...]:
    """Returns the names that `load_table` knows: the published tables and the demo models'."""
    return tuple(sorted(path.stem for path in TABLES.glob("*.json")))


def load_ratios(name_or_path: str | os.PathLike) -> tuple[float, ...]:
    """Returns the ratios of `load_table`, 2 * steps numbers in call order, and raises its errors.

    >>> len(magcache.load_ratios("t2v-1.3B"))
    100
    """
    return load_table(name_or_path).ratios


def load_table(name_or_path: str | os.PathLike) -> RatioTable:
    """Loads a table by name (`table_names()`) or from a file: a calibration, or a flat list as the released MagCache
    script writes, with or without the leading 1.0, 1.0.

    Raises ValueError with one line that says what is wrong, UnknownTableError if there is no such table.
    """
    path = Path(name_or_path)
    if named := str(name_or_path) in table_names():
        path = TABLES / f"{name_or_path}.json"
    try:
        return table_of(read_json(path), str(name_or_path), named, path)
    except FileNotFoundError:
        known = ", ".join(table_names())
        raise UnknownTableError(f"no ratio table {str(name_or_path)!r}: neither a file nor one of {known}") from None
    except ValueError as error:
        raise ValueError(f"cannot read the ratio table {path}: {error}") from None


def table_of(content: dict | list, name: str = "", named: bool = False, path: Path | None = None) -> RatioTable:
    """Makes a table from the content of such a file. Raises ValueError with one line that says what is wrong."""
    if isinstance(content, list):
        content = {"mag_ratio": content}
    ratios = content.get("mag_ratio") if isinstance(content, dict) else None
    if not isinstance(ratios, list) or not all(type(r) in (int, float) for r in ratios):
        raise ValueError('it must be a list of numbers or hold one as "mag_ratio"')
    steps, measured_on = content.get("calibrated_steps"), content.get("measured_on", {})
    if not isinstance(measured_on, dict):
        raise ValueError('"measured_on" must hold settings by name')
    if type(steps) is int:
        if len(ratios) == CALLS_PER_STEP * (steps - 1):
            ratios = [1.0, 1.0, *ratios]  # even where the first measured pair happens to be 1.0, 1.0
        if len(ratios) != CALLS_PER_STEP * steps:
            raise ValueError(f"{len(ratios)} ratios do not fit {str(steps)[:40]} steps")
    cond, uncond = split_branches(ratios)
    return RatioTable(name, join_branches((cond, uncond)), measured_on, named, path, content.get("trials"))


def save_table(path: str | os.PathLike, table: dict, replace: bool = False) -> None:
    """Writes a table as JSON, whole or not at all. Raises FileExistsError if there is such a file, unless `replace` is
    true."""
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} already exists; move it away or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(json.dumps(table, indent=1) + "\n")


def split_branches(ratios: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Splits a flat table in call order into (cond, uncond), one ratio a step, 1.0 for the step without predecessor;
    `magcache.schedule.join_branches` puts them together.

    A table may come with that leading pair of 1.0 or without (as the upstream lists do). Raises ValueError if its
    length is odd, it is empty, or it holds a value that no model could have (NaN, 0, negative, below 0.01, above 100).
    """
    if not len(ratios) or len(ratios) % CALLS_PER_STEP:
        raise ValueError(f"a ratio table holds pairs of cond and uncond, got {len(ratios)} numbers")
    for index, ratio in enumerate(ratios):
        if not ABSURD[0] < ratio < ABSURD[1]:
            raise ValueError(f"ratio {index} is {str(ratio)[:40]}; the ratio of one step to the next is near 1")
    flat = tuple(float(ratio) for ratio in ratios)
    if flat[:CALLS_PER_STEP] != (1.0, 1.0):
        flat = (1.0, 1.0, *flat)
    return flat[0::2], flat[1::2]


def resample_nearest(values: Sequence[float], steps: int) -> tuple[float, ...]:
    """Picks `steps` of the values by nearest index, first to first and last to last; one step takes the last value."""
    if steps == 1:
        return (values[-1],)
    return tuple(values[round(i * (len(values) - 1) / (steps - 1))] for i in range(steps))
