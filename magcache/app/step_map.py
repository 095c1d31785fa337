"""A schedule over its steps, before anything is loaded: its map, and the error that is predicted along the way. Pure
Python.
"""

from collections.abc import Sequence
from itertools import pairwise

from magcache.ratios import RatioTable, resample_nearest, split_branches
from magcache.schedule import Schedule

BRANCHES = ("cond", "uncond")


def rule_errors(ratios: Sequence[float], reuse: Sequence[bool]) -> tuple[float, ...]:
    """Returns the accumulated error of the MagCache rule along one branch, for any choice of steps: over every stretch
    of reused steps the sum of the distances from 1 of the product of its ratios; 0 where a step computes."""
    errors, product, error = [], 1.0, 0.0
    for ratio, reused in zip(ratios, reuse, strict=True):
        product = product * ratio if reused else 1.0
        error = error + abs(1.0 - product) if reused else 0.0
        errors.append(error)
    return tuple(errors)


def predict(schedule: Schedule, table: RatioTable | None) -> dict[str, tuple[float, ...]] | None:
    """Returns the `rule_errors` of every branch by the table that made the schedule; None if none did. A table of
    another number of steps is resampled by nearest index, as by `plan`."""
    if not table:
        return None
    branches = zip(split_branches(table.ratios), reuse_by_branch(schedule).items(), strict=False)
    return {name: rule_errors(resample_nearest(values, schedule.steps), reuse) for values, (name, reuse) in branches}


def step_map(reuse: Sequence[bool | None], width: int | None = None) -> str:
    """Draws a mark per step: # computed, . reused, blank for None. A smaller width merges some, + if they differ."""
    marks = [" " if r is None else "." if r else "#" for r in reuse]
    if width is None or width >= len(marks):
        return "".join(marks)
    edges = [round(i * len(marks) / width) for i in range(width + 1)]
    cells = [set(marks[a:b]) for a, b in pairwise(edges)]
    return "".join(cell.pop() if len(cell) == 1 else "+" for cell in cells)


def ruler(steps: int) -> str:
    return "".join(f"{step:<10}" for step in range(0, steps, 10))[: max(steps, 10)].rstrip()


def digits(errors: Sequence[float], reuse: Sequence[bool], unit: float) -> str:
    """Writes errors as tenths of `unit`, one character per step, blank where it computes."""
    steps = zip(errors, reuse, strict=True)
    return "".join(str(min(9, int(10 * error / unit))) if reused else " " for error, reused in steps).rstrip()


def reuse_by_branch(schedule: Schedule) -> dict[str, tuple[bool, ...]]:
    """Tells of every step, by branch, whether it reuses."""
    count = schedule.calls_per_step
    return {BRANCHES[branch]: schedule.reuse[branch::count] for branch in range(count)}
