"""Ratio tables: find, load, check, resample to another number of steps, save. Pure Python.

A table holds |r_t| / |r_{t-1}|, the mean over tokens of the residual's norm against the step before, for every
transformer call of a run in call order: cond, uncond, cond, uncond, ...
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

CALLS_PER_STEP = 2  # cond, uncond
HOW_TO_CALIBRATE = (
    "measure one by the same command with --magcache_calibration in place of --use_magcache, "
    "then give its file with --mag_ratios"
)
TABLES = Path(__file__).with_name("ratios")


def table_names() -> tuple[str, ...]:
    """Names that `load_ratios` knows: the published tables and the demo model's."""
    return tuple(sorted(path.stem for path in TABLES.glob("*.json")))


def load_ratios(name_or_path: str | os.PathLike) -> tuple[float, ...]:
    """Loads a table by name (`table_names()`) or from a JSON file with a list "mag_ratio".

    Returns the ratios in call order with the leading 1.0, 1.0 of the step that has no predecessor, so 2 * steps
    numbers. Raises ValueError with one line that says what is wrong.
    """
    path = Path(name_or_path)
    if str(name_or_path) in table_names():
        path = TABLES / f"{name_or_path}.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(table_names())
        raise ValueError(
            f"no ratio table {str(name_or_path)!r}: neither a file nor one of {known}; {HOW_TO_CALIBRATE}"
        ) from None
    except (OSError, ValueError) as error:  # a directory, no permission, no JSON, no text
        raise ValueError(f"cannot read the ratio table {path}: {error}") from None
    ratios = content.get("mag_ratio") if isinstance(content, dict) else None
    if not isinstance(ratios, list) or not all(isinstance(r, (int, float)) for r in ratios):
        raise ValueError(f'{path} is not a ratio table: it needs a list of numbers "mag_ratio"')
    steps = content.get("calibrated_steps")
    if isinstance(steps, int) and len(ratios) == CALLS_PER_STEP * (steps - 1):
        ratios = [1.0, 1.0, *ratios]  # even where the first measured pair happens to be 1.0, 1.0
    try:
        cond, uncond = split_branches(ratios)
    except ValueError as error:
        raise ValueError(f"{path} is not a ratio table: {error}") from None
    return tuple(ratio for step in zip(cond, uncond, strict=True) for ratio in step)


def choose_table(task: str, ckpt_dir: str | os.PathLike, size: str | None = None) -> tuple[str, str | None]:
    """Finds the table of a checkpoint by task and, where a task has several, by the folder's name, then by the size.

    size: "width*height" of the video.

    Returns the name and a notice for the user, or None. Raises ValueError where no table fits.
    """
    names = table_names()
    if task in names:
        return task, None
    if task == "t2i-14B":
        return "t2v-14B", "t2i-14B uses the table of t2v-14B, which was calibrated on video"
    folder = Path(os.path.abspath(ckpt_dir)).name.lower()
    candidates = [name for name in names if name.startswith(f"{task}-")]
    matches = [name for name in candidates if name.removeprefix(f"{task}-").lower() in folder]
    if len(matches) == 1:
        return matches[0], None
    by_size = f"{task}-{min(map(int, size.split('*')))}P" if size else None
    if by_size in candidates:
        return by_size, f"the name of the checkpoint folder {folder} fits no table, so {by_size} is taken by --size"
    known = f" (it has {', '.join(candidates)})" if candidates else ""
    raise ValueError(
        f"no ratio table fits task {task} with the checkpoint folder {folder!r}{known}; {HOW_TO_CALIBRATE}, "
        "or name the table of another model there"
    )


def save_table(path: str | os.PathLike, table: dict) -> None:
    """Writes a table as JSON, whole or not at all. Raises FileExistsError rather than replace a file."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; move it away or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(part, path)


def split_branches(ratios: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Splits a flat table in call order into (cond, uncond), one ratio a step, 1.0 for the step without predecessor.

    A table may come with that leading pair of 1.0 or without (as the upstream lists do). Raises ValueError if its
    length is odd, it is empty, or a value is not a positive finite number.
    """
    flat = tuple(float(ratio) for ratio in ratios)
    if not flat or len(flat) % CALLS_PER_STEP:
        raise ValueError(f"a ratio table holds pairs of cond and uncond, got {len(flat)} numbers")
    for index, ratio in enumerate(flat):
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"ratio {index} is {ratio}, but a ratio of sizes is positive and finite")
    if flat[:CALLS_PER_STEP] != (1.0, 1.0):
        flat = (1.0, 1.0, *flat)
    return flat[0::2], flat[1::2]


def resample_nearest(values: Sequence[float], steps: int) -> tuple[float, ...]:
    """Picks `steps` of the values by nearest index, first to first and last to last; one step takes the last value."""
    if steps == 1:
        return (values[-1],)
    return tuple(values[round(i * (len(values) - 1) / (steps - 1))] for i in range(steps))


def smooth_sqrt(values: Sequence[float]) -> tuple[float, ...]:
    """Square root of every ratio, which about halves its deviation from 1, as in the MagCache paper's figures."""
    return tuple(math.sqrt(value) for value in values)
