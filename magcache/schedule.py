"""A schedule: what every transformer call of a run does, decided before any model is loaded. Pure Python.

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

    `weights[call]` is None where the call computes, else the weights of what the last computed calls of its branch
    left behind, newest first, whose sum stands in for it. Calls are in call order: cond, uncond, cond, uncond, ... with
    `calls_per_step` 2 (classifier-free guidance), one a step with `calls_per_step` 1. Each branch (cond, uncond) has
    its own.

    `target` is what stands in. "residual": what the blocks add to their input; the last one as it is, so the weights
    are (1.0,). "output": what the model returned, the velocity, of the last computed call or of the last two.

    `sigmas` are the noise levels of the steps, falling, if it was made for any; a run at others is computed in full.

    `boundary` is a noise level, for two transformers that share a run (Wan2.2): the first has the steps at this level
    and above, the second those below. What one left behind never stands in for the other.

    Raises ValueError for another target, for a length that is no multiple of `calls_per_step`, for weights of what no
    earlier call of the branch and transformer has computed or more of it than is kept, for sigmas that are not one a
    step, falling, above 0 and at most 1, and for a boundary without sigmas, or that is not between 0 and 1.
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
                raise ValueError(f"call {call} combines {len(weights)} {self.target}s, {computed[branch]} are computed")
            elif len(weights) > MOST_KEPT[self.target] or (self.target == "residual" and weights != (1.0,)):
                raise ValueError(f"call {call} must combine {self.target}s otherwise than by {weights}")

    @property
    def steps(self) -> int:
        return len(self.weights) // self.calls_per_step

    @cached_property
    def switch(self) -> int | None:
        """The first step of the second transformer (`steps`, if it has none); None without a boundary."""
        return None if self.boundary is None else first_below(self.sigmas, self.boundary)

    @property
    def reuse(self) -> tuple[bool, ...]:
        """Tells of every call, in call order, whether it does not compute."""
        return tuple(weights is not None for weights in self.weights)

    @property
    def computed(self) -> int:
        """Number of calls that compute."""
        return sum(weights is None for weights in self.weights)

    @property
    def speedup_bound(self) -> float:
        """All calls over computed calls: the speed-up if the others cost nothing."""
        return len(self.weights) / self.computed

    @cached_property
    def history(self) -> int:
        """Largest number of residuals or outputs per branch that a call combines; 0 if every call computes."""
        return max(len(weights or ()) for weights in self.weights)

    @cached_property
    def used_later(self) -> tuple[bool, ...]:
        """Tells of every call whether it computes something that a later one combines. The others need no cache."""
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
    """One entry per call, in call order, from one sequence a branch with an entry per step."""
    return tuple(entry for step in zip(*branches, strict=True) for entry in step)
