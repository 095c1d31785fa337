"""Decides, before any model is loaded, which transformer calls of a run compute and which reuse a residual.

Pure Python: the decisions depend on the ratio table, the number of steps and three settings, never on the video.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from magcache.ratios import CALLS_PER_STEP, join_branches, resample_nearest, smooth_sqrt, split_branches

FORECASTS = ("reuse", "linear", "fitted")


@dataclass(frozen=True)
class Schedule:
    """What every transformer call of one generation does.

    `weights[call]` is None where the blocks run, else the weights of the cached residuals, newest first, whose sum
    stands in for the blocks: (1.0,) is plain reuse. Calls are in call order: cond, uncond, cond, uncond, ... with
    `calls_per_step` 2 (classifier-free guidance), one a step with `calls_per_step` 1. Each branch (cond, uncond) has
    its own residuals.

    `corrections[call]`, for calls that run the blocks, are weights of the residual just computed and of those cached
    before it, newest first; their sum is added to the output, to make up for what the forecasts since the last computed
    call were off. Empty where nothing is corrected.

    Raises ValueError if the length is not a multiple of `calls_per_step` or a call needs a residual that no earlier
    call of its branch has computed.
    """

    weights: tuple[tuple[float, ...] | None, ...]
    calls_per_step: int = CALLS_PER_STEP
    corrections: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if self.calls_per_step not in (1, 2):
            raise ValueError(f"calls_per_step must be 1 or 2, got {self.calls_per_step}")
        if not self.weights or len(self.weights) % self.calls_per_step:
            raise ValueError(f"{len(self.weights)} calls do not make whole steps of {self.calls_per_step}")
        if not self.corrections:
            object.__setattr__(self, "corrections", ((),) * len(self.weights))
        if len(self.corrections) != len(self.weights):
            raise ValueError(f"{len(self.corrections)} corrections for {len(self.weights)} calls")
        computed = [0] * self.calls_per_step
        for call, (weights, correction) in enumerate(zip(self.weights, self.corrections, strict=True)):
            branch = call % self.calls_per_step
            if weights is None:
                computed[branch] += 1
            elif correction:
                raise ValueError(f"call {call} does not run the blocks, so there is nothing to correct in it")
            if not (weights is None or weights) or len(weights or correction) > computed[branch]:
                raise ValueError(
                    f"call {call} combines {len(weights or correction)} residuals, {computed[branch]} are computed then"
                )

    @property
    def steps(self) -> int:
        return len(self.weights) // self.calls_per_step

    @property
    def reuse(self) -> tuple[bool, ...]:
        """For every call, in call order: True where the blocks do not run."""
        return tuple(weights is not None for weights in self.weights)

    @property
    def computed(self) -> int:
        """Number of calls that run the blocks."""
        return sum(weights is None for weights in self.weights)

    @property
    def speedup_bound(self) -> float:
        """All calls over computed calls: the speed-up if a reused call cost nothing."""
        return len(self.weights) / self.computed

    @cached_property
    def history(self) -> int:
        """Largest number of cached residuals per branch that a call combines; 0 if every call computes."""
        return max(map(self._combined, range(len(self.weights))))

    def _combined(self, call: int) -> int:
        """How many cached residuals the call combines; the first that a correction weighs is the call's own."""
        return len(self.weights[call] or self.corrections[call][1:])

    @cached_property
    def used_later(self) -> tuple[bool, ...]:
        """For every call: True if it computes a residual that some later call combines. The others need no cache."""
        used = [False] * len(self.weights)
        newest_first = [[] for _ in range(self.calls_per_step)]
        for call, weights in enumerate(self.weights):
            branch = newest_first[call % self.calls_per_step]
            for source in branch[: self._combined(call)]:
                used[source] = True
            if weights is None:
                branch.insert(0, call)
        return tuple(used)


@dataclass(frozen=True)
class Settings:
    """The three settings of the MagCache rule; raises ValueError where one makes no sense.

    thresh: bound on the accumulated error of a stretch of reused steps (exclusive); 0 never reuses.
    K: most steps reused in a row; 0 never reuses.
    retention_ratio: share of all calls, from the start, that always compute; in [0, 1].
    """

    thresh: float = 0.12
    K: int = 2
    retention_ratio: float = 0.2

    def __post_init__(self):
        if not (math.isfinite(self.thresh) and self.thresh >= 0):
            raise ValueError(f"thresh must be a finite number >= 0, got {self.thresh}")
        if isinstance(self.K, bool) or int(self.K) != self.K or self.K < 0:
            raise ValueError(f"K must be a whole number >= 0, got {self.K}")
        if not 0 <= self.retention_ratio <= 1:
            raise ValueError(f"retention_ratio must be in [0, 1], got {self.retention_ratio}")

    def first_free_step(self, steps: int) -> int:
        """The first step that may reuse. Where the split of the 2 * steps calls is odd, both branches wait."""
        split = int(CALLS_PER_STEP * steps * self.retention_ratio)
        return max(1, math.ceil(split / CALLS_PER_STEP))


def threshold_rule(ratios: Sequence[float], settings: Settings, first_free_step: int) -> tuple[bool, ...]:
    """The MagCache rule for one branch: True for every step that reuses (https://arxiv.org/abs/2506.09045).

    Over a stretch of reused steps the product of the ratios says how far the residual's size has moved; the error is
    the sum of its distances from 1. A step reuses while that error stays below thresh and the stretch within K.
    """
    reuse = []
    product, error, stretch = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        if step < first_free_step:
            reuse.append(False)
            continue
        product *= ratio
        error += abs(1.0 - product)
        stretch += 1
        reuse.append(error < settings.thresh and stretch <= settings.K)
        if not reuse[-1]:
            product, error, stretch = 1.0, 0.0, 0
    return tuple(reuse)


def forecast_weights(
    reuse: Sequence[bool], forecast: str = "reuse", slopes: Sequence | None = None
) -> tuple[tuple[float, ...] | None, ...]:
    """Weights of the cached residuals for every step of a branch, newest first, None where it computes.

    forecast: "reuse" takes the last computed residual as it is. "linear" continues the straight line through the last
    two, a being the newer one: r_j = r_a + s (r_a - r_b) with the slope s = (j - a) / (a - b). The line runs along the
    step index j: on a small trained model that came closer than along the noise level. "fitted" takes the slope that
    was measured, `slopes[b][a][j]`. While there is only one residual, both reuse it.

    Raises ValueError for another forecast, if the first step reuses, or for "fitted" without slopes.
    """
    if forecast not in FORECASTS:
        raise ValueError(f"forecast must be one of {', '.join(FORECASTS)}, got {forecast!r}")
    if (forecast == "fitted") != (slopes is not None):
        raise ValueError("the fitted forecast, and no other, takes slopes from a full calibration")
    weights, computed = [], []
    for step, reused in enumerate(reuse):
        if not reused:
            computed.append(step)
            weights.append(None)
        elif not computed:
            raise ValueError("the first step has no residual to reuse")
        elif forecast == "reuse" or len(computed) == 1:
            weights.append((1.0,))
        else:
            before, last = computed[-2:]
            slope = (step - last) / (last - before) if slopes is None else float(slopes[before][last][step])
            weights.append((1.0 + slope, -slope))
    return tuple(weights)


def corrections_of(
    weights: Sequence[tuple[float, ...] | None], sigmas: Sequence[float]
) -> tuple[tuple[float, ...], ...]:
    """What a computed step c adds to make up for the forecasts j since the last computed step a, empty where there is
    nothing to make up for.

    Once the residual of step c is known, the parabola through it and the last two computed ones (a straight line while
    there is only one) tells better what the residuals between were. Each forecast has moved the latent by its error
    times the step's difference of sigmas d_j, so step c adds the sum over j of d_j / d_c times the difference; the
    weights are of the residuals of c, a and the one before a. So do predictor-corrector solvers of differential
    equations.

    weights: of one branch, by `forecast_weights`, of at most two residuals. sigmas: noise levels of the steps, without
    the final 0.
    """
    moved = [sigma - following for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True)]
    corrections, computed = [()] * len(weights), []
    for c, forecast in enumerate(weights):
        if forecast is not None:
            continue
        if computed and computed[-1] < c - 1:
            nodes = [c, *computed[:-3:-1]]
            total = [0.0] * len(nodes)
            for j in range(nodes[1] + 1, c):
                for k, weight in enumerate((0.0, *weights[j])):
                    total[k] -= weight * moved[j] / moved[c]
                for k, node in enumerate(nodes):
                    others = (other for other in nodes if other != node)
                    total[k] += math.prod((j - other) / (node - other) for other in others) * moved[j] / moved[c]
            corrections[c] = tuple(map(float, total))  # no numpy numbers, whatever the noise levels are
        computed.append(c)
    return tuple(corrections)


def plan_steps(
    computed: Sequence[int],
    steps: int,
    forecast: str = "reuse",
    *,
    slopes: Sequence | None = None,
    sigmas: Sequence[float] | None = None,
    calls_per_step: int = CALLS_PER_STEP,
) -> Schedule:
    """The schedule that computes the given steps, in both branches, and forecasts the others.

    forecast, slopes: see `forecast_weights`. sigmas: noise levels of the steps; with them the forecasts are corrected
    afterwards, see `corrections_of`.

    Raises ValueError for steps outside 0 ... steps - 1, or without step 0, or for another number of sigmas.
    """
    chosen = set(computed)
    if 0 not in chosen or not chosen <= set(range(steps)):
        raise ValueError(f"computed steps must be among 0 ... {steps - 1}, with 0, got {sorted(chosen)}")
    if sigmas is not None and len(sigmas) != steps:
        raise ValueError(f"there are {len(sigmas)} noise levels for {steps} steps")
    weights = forecast_weights([step not in chosen for step in range(steps)], forecast, slopes)
    corrections = corrections_of(weights, sigmas) if sigmas is not None else [()] * steps
    calls = [tuple(v for v in values for _ in range(calls_per_step)) for values in (weights, corrections)]
    return Schedule(calls[0], calls_per_step, calls[1])


def spread_steps(steps: int, count: int, power: float = 1.5, last: int = 2) -> tuple[int, ...]:
    """`count` steps, the last ones among them, the others ever further apart: the k-th at a power of its share.

    Early steps decide the picture, so they are close; on a small trained model the power 1.5 came closer to computing
    every step than 1 and 2. With fewer than two more steps the last ones give way. Raises ValueError unless
    1 <= count <= steps.
    """
    if not 1 <= count <= steps:
        raise ValueError(f"between 1 and {steps} steps can be computed, not {count}")
    last = max(0, min(last, count - 2))
    inner, room = count - last, steps - last
    chosen = []
    for k in range(inner):
        wanted = round((k / inner) ** power * room)
        lowest = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(wanted, lowest), room - inner + k))
    return (*chosen, *range(room, steps))


def plan(
    ratios: Sequence[float],
    steps: int,
    thresh: float = 0.12,
    K: int = 2,
    retention_ratio: float = 0.2,
    *,
    smooth: str = "none",
    forecast: str = "reuse",
    calls_per_step: int = CALLS_PER_STEP,
) -> Schedule:
    """Makes the schedule of the MagCache rule.

    ratios: magnitude ratios |r_t| / |r_{t-1}| in call order (cond, uncond, ...), see `load_ratios`. A table measured
        at another number of steps is resampled by nearest index, as the released code does.
    steps: sampling steps, >= 1.
    thresh, K, retention_ratio: see `Settings`.
    smooth: "none", or "sqrt" for the square root of every ratio.
    forecast: what stands in for the residual of a step that is not computed, see `forecast_weights`.
    calls_per_step: 2, or 1 for a model that runs without guidance; that one follows the cond ratios.

    Raises ValueError for a setting or a table that makes no sense.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps}")
    if smooth not in ("none", "sqrt"):
        raise ValueError(f"smooth must be 'none' or 'sqrt', got {smooth!r}")
    settings = Settings(thresh, K, retention_ratio)
    branches = []
    for values in split_branches(ratios)[:calls_per_step]:
        if len(values) != steps:
            values = resample_nearest(values, steps)
        if smooth == "sqrt":
            values = smooth_sqrt(values)
        reuse = threshold_rule(values, settings, settings.first_free_step(steps))
        branches.append(forecast_weights(reuse, forecast))
    return Schedule(join_branches(branches), calls_per_step)
