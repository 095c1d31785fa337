"""A schedule says what every transformer call of a run does, before any model is loaded. Pure Python.

Two rules make schedules: `magcache.threshold` (MagCache as published) and `magcache.speedup`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from magcache.noise_levels import checked_levels, first_below

CALLS_PER_STEP = 2  # cond, uncond
MOST_KEPT = {"residual": 1, "output": 2}  # per branch, by target

Weights = tuple[float, ...] | None  # of one call


@dataclass(frozen=True)
class Schedule:
    """What every transformer call of one generation does.

    `weights[call]` is None if the call computes. Otherwise the call is replaced by a weighted sum of what the last
    computed calls of its branch left behind, and these are the weights, newest first. Calls are in call order: cond,
    uncond, cond, uncond, ... with `calls_per_step` 2 (classifier-free guidance), one per step with `calls_per_step` 1.

    `target` is what computed calls leave behind. "residual": what the blocks add to their input; only the last one is
    used, unchanged, so the weights are (1.0,). "output": what the model returned, the velocity; the last one or two.

    `sigmas` are the noise levels of the steps, falling, if the schedule was made for any; a run at other levels is
    computed in full.

    `boundary` is a noise level, for two transformers that share a run (Wan2.2): the first makes the steps at this level
    and above, the second those below. What one left behind is never used for the other.

    Raises ValueError for another target, for a length that is not a multiple of `calls_per_step`, for weights of more
    than is kept or than earlier calls of the branch and transformer have computed, for sigmas that are not one per
    step, falling, above 0 and at most 1, and for a boundary without sigmas or not between 0 and 1.
    """

    weights: tuple[Weights, ...]
    calls_per_step: int = CALLS_PER_STEP
    target: str = "residual"
    sigmas: Sequence[float] | None = None
    boundary: float | None = None

    def __post_init__(self):
        if self.target not in MOST_KEPT:
            raise ValueError(f"target must be one of {', '.join(MOST_KEPT)}, got {self.target!r}")
        if self.calls_per_step not in (1, 2):
            raise ValueError(f"calls_per_step must be 1 or 2, got {self.calls_per_step}")
        if not self.weights or len(self.weights) % self.calls_per_step:
            raise ValueError(f"{len(self.weights)} calls do not make whole steps of {self.calls_per_step}")
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", checked_levels(self.sigmas, self.steps))
        if self.boundary is not None and (self.sigmas is None or not 0 < self.boundary < 1):
            raise ValueError(f"a boundary must be between 0 and 1, and needs sigmas, got {self.boundary}")
        computed = [0] * self.calls_per_step
        for call, weights in enumerate(self.weights):
            step, branch = divmod(call, self.calls_per_step)
            if step == self.switch and branch == 0:
                computed = [0] * self.calls_per_step
            if weights is None:
                computed[branch] += 1
            elif not 0 < len(weights) <= computed[branch]:
                raise ValueError(
                    f"call {call} combines {len(weights)} {self.target}s, but {computed[branch]} are computed"
                )
            elif len(weights) > MOST_KEPT[self.target] or (self.target == "residual" and weights != (1.0,)):
                raise ValueError(f"call {call} must not combine {self.target}s by {weights}")

    @property
    def steps(self) -> int:
        return len(self.weights) // self.calls_per_step

    @cached_property
    def switch(self) -> int | None:
        """The first step of the second transformer (`steps`, if it has none); None without a boundary."""
        return None if self.boundary is None else first_below(self.sigmas, self.boundary)

    @property
    def reuse(self) -> tuple[bool, ...]:
        """Says for every call, in call order, whether it reuses, that is, does not compute."""
        return tuple(weights is not None for weights in self.weights)

    @property
    def computed(self) -> int:
        """The number of calls that compute."""
        return sum(weights is None for weights in self.weights)

    @property
    def speedup_bound(self) -> float:
        """All calls over computed calls, which is the speed-up if the other calls cost nothing."""
        return len(self.weights) / self.computed

    @cached_property
    def history(self) -> int:
        """The largest number of residuals or outputs that a call combines; 0 if every call computes."""
        return max(len(weights or ()) for weights in self.weights)

    @cached_property
    def used_later(self) -> tuple[bool, ...]:
        """Says for every call whether a later one uses what it computes. The others need no cache."""
        used = [False] * len(self.weights)
        newest_first = [[] for _ in range(self.calls_per_step)]
        for call, weights in enumerate(self.weights):
            branch = newest_first[call % self.calls_per_step]
            for source in branch[: len(weights or ())]:
                used[source] = True
            if weights is None:
                branch.insert(0, call)
        return tuple(used)


def join_branches(branches: Iterable[Sequence]) -> tuple:
    """Returns one entry per call, in call order, from a sequence per branch with one entry per step."""
    return tuple(entry for step in zip(*branches, strict=True) for entry in step)
