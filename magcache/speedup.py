"""The speed-up rule: which steps compute for a given speed-up, and a forecast of the model's output in the others.
Pure Python.

It needs no calibration, but can take its constants from one that has tried others (`magcache.trials`). It rests on two
measurements. The output of Wan's transformer, the velocity, changes about evenly along the log-SNR: on small trained
models for any steps and shift, on the full-size model in the middle of the run. And an error counts the more the
earlier it is made: on the full-size model, final over local error falls to a sixth from the first step to the last
(RA-CFGCache, arXiv 2609.36433).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from magcache.noise_levels import checked_levels, first_below, log_snr, noise_levels
from magcache.schedule import CALLS_PER_STEP, Schedule, Weights, join_branches

FORECASTS = ("linear", "reuse")
MOST_STEPS = 1000  # Wan's timesteps
FEWEST = 8  # computed steps that a cache is worth it from, see `plan_speedup`


@dataclass(frozen=True)
class Constants:
    """What the rule does not know by itself.

    floor: is added to the signal-to-noise ratio where steps are chosen, since long before it little is decided.
    early: how much more an early error counts there, as the power of the noise-to-signal ratio; 0 counts all alike.
    decay: of the slope of a forecast, per unit of log-SNR, see `forecast_weights`.

    The defaults keep the steps near those that others chose by their effect on full-size models
    (tests/magcache/full_size_schedules.json), and were chosen among such constants on two small ones (see
    examples/README.md). Raises ValueError unless floor is a positive number, and the others are 0 or more.
    """

    floor: float = 0.001
    early: float = 0.6
    decay: float = 0.5

    def __post_init__(self):
        if not 0 < self.floor < math.inf:
            raise ValueError(f"floor must be a positive number, got {self.floor}")
        if not (0 <= self.early < math.inf and 0 <= self.decay < math.inf):
            raise ValueError(f"early and decay must be numbers of 0 or more, got {self.early} and {self.decay}")


DEFAULT = Constants()


def choose_steps(
    sigmas: Sequence[float], count: int, constants: Constants = DEFAULT, boundary: float | None = None
) -> tuple[int, ...]:
    """The `count` steps to compute, the first one of every transformer among them.

    sigmas: noise levels of the steps, falling, without the final 0. boundary: between two transformers, see `Schedule`.

    Along u = log(SNR + floor) the error of a forecast is taken to grow as the square of the way from the last computed
    step. It counts with the way that the sampler goes by it, times exp(-early u). The steps are those for which the sum
    of these errors is least, found by dynamic programming.

    Raises ValueError unless the count is one a transformer or more, up to all steps, and for more than `MOST_STEPS`.
    """
    steps = len(sigmas)
    if steps > MOST_STEPS:
        raise ValueError(f"steps can be chosen among at most {MOST_STEPS}, not {steps}")
    starts = first_steps(sigmas, boundary)
    if not len(starts) <= count <= steps:
        raise ValueError(f"between {len(starts)} and {steps} steps can be computed, not {count}")
    u = [math.log((1 - sigma) / sigma + constants.floor) for sigma in sigmas]
    ways = [b - a for a, b in pairwise(u)]
    ways.append(ways[-1] if ways else 0.0)  # the last step goes as far as the one before it
    counts = [way * math.exp(-constants.early * at) for at, way in zip(u, ways, strict=True)]

    def error(a: int, j: int) -> float:  # of a forecast of step j from step a; the first ones have none
        return math.inf if j in starts else (u[j] - u[a]) ** 2 * counts[j]

    # [a][n]: of the first n forecasts after the computed step a
    errors = [list(accumulate((error(a, j) for j in range(a + 1, steps)), initial=0.0)) for a in range(steps)]
    least = [row[-1] for row in errors]  # from a computed step to the end, with so many more computed steps
    following = []
    for more in range(1, count):
        totals, nexts = [], []
        for a in range(steps - more):
            # the next one comes no sooner than after the step before a, and no later than with fewer to come
            first = max(a + 1, nexts[-1] if nexts else 0)
            last = min(following[-1][a] if following else steps, steps - more)
            total, after = min((errors[a][n - a - 1] + least[n], n) for n in range(first, last + 1))
            totals.append(total)
            nexts.append(after)
        least = totals
        following.append(nexts)
    chosen = [0]
    for nexts in reversed(following):
        chosen.append(nexts[chosen[-1]])
    return tuple(chosen)


def first_steps(sigmas: Sequence[float], boundary: float | None) -> tuple[int, ...]:
    """The first step of every transformer that has any."""
    switch = 0 if boundary is None else first_below(sigmas, boundary)
    return (0, switch) if 0 < switch < len(sigmas) else (0,)


def forecast_weights(
    computed: Sequence[int],
    sigmas: Sequence[float],
    forecast: str = "linear",
    decay: float = DEFAULT.decay,
    boundary: float | None = None,
) -> tuple[Weights, ...]:
    """Weights of a branch's last outputs for every step, newest first; None where it computes.

    "linear" continues the line through the last two computed outputs b and a along the log-SNR lambda,

        v_j = v_a + s (v_a - v_b),
        s = exp(-decay (lambda_j - lambda_b)) (lambda_j - lambda_a) / (lambda_a - lambda_b),

    ever flatter the longer the way: the velocity turns, so its slope here and there have less and less to do with one
    another. "reuse" takes the last one as it is; so does "linear" while there is no other of the same transformer.
    """
    snr, weights, last = [log_snr(sigma) for sigma in sigmas], [], []
    starts = first_steps(sigmas, boundary)
    for step in range(len(sigmas)):
        if step in starts:
            last = []
        if step in computed:
            last = [step, *last][:2]
            weights.append(None)
        elif forecast == "reuse" or len(last) == 1:
            weights.append((1.0,))
        else:
            (a, b), j = (snr[i] for i in last), snr[step]
            # b may be pure noise, infinitely far away
            slope = 0.0 if math.isinf(b) else math.exp(-decay * (j - b)) * (j - a) / (a - b)
            weights.append((1 + slope, -slope))
    return tuple(weights)


def plan_steps(
    computed: Sequence[int],
    steps: int,
    forecast: str = "linear",
    *,
    shift: float = 5.0,
    solver: str = "unipc",
    sigmas: Sequence[float] | None = None,
    boundary: float | None = None,
    target: str = "output",
    calls_per_step: int = CALLS_PER_STEP,
    decay: float = DEFAULT.decay,
) -> Schedule:
    """The schedule that computes the given steps, in all branches, and forecasts the others.

    forecast, decay: see `forecast_weights`; for the target "residual" it is "reuse". shift, solver: of the run, see
    `noise_levels`; or sigmas: its noise levels themselves, one a step, falling, see `noise_levels_of`. boundary: the
    noise level at which a second transformer takes over, see `Schedule`.

    Raises ValueError for steps outside 0 ... steps - 1, or without the first one of a transformer, and for settings
    that make no sense.

    >>> magcache.plan_steps([0, 2], steps=4, forecast="reuse", calls_per_step=1).weights
    (None, (1.0,), None, (1.0,))
    """
    sigmas = noise_levels(steps, shift, solver) if sigmas is None else checked_levels(sigmas, steps)
    computed = set(computed)
    if forecast not in FORECASTS:
        raise ValueError(f"forecast must be one of {', '.join(FORECASTS)}, got {forecast!r}")
    starts = first_steps(sigmas, boundary)
    if not {*starts} <= computed <= set(range(steps)):
        needed = " and ".join(map(str, starts))
        raise ValueError(f"computed steps must be among 0 ... {steps - 1}, with {needed}, got {sorted(computed)}")
    weights = forecast_weights(computed, sigmas, forecast, decay, boundary)
    return Schedule(join_branches([weights] * calls_per_step), calls_per_step, target, sigmas, boundary)


def plan_speedup(
    steps: int,
    speedup: float,
    shift: float = 5.0,
    solver: str = "unipc",
    calls_per_step: int = CALLS_PER_STEP,
    *,
    sigmas: Sequence[float] | None = None,
    boundary: float | None = None,
    constants: Constants = DEFAULT,
) -> Schedule:
    """The schedule for a speed-up of at least `speedup`, as far as the transformer decides on it.

    steps, shift, solver, sigmas, boundary: of the run, see `plan_steps`; steps / speedup of the steps compute, rounded
    down.
    constants: of the rule, such as those that the trials of a calibration have chosen.

    The first steps decide what comes and leave hardly anything to forecast, so a run needs some `FEWEST` computed steps
    before a cache is worth it: with less, as many sampler steps without one came closer on the demo models
    (examples/README.md).

    Raises ValueError unless 1 <= speedup <= steps, half of them for two transformers, and for settings that make no
    sense.

    >>> magcache.plan_speedup(steps=50, speedup=2.5, shift=5.0).computed
    40
    """
    sigmas = noise_levels(steps, shift, solver) if sigmas is None else checked_levels(sigmas, steps)
    transformers = len(first_steps(sigmas, boundary))
    if not 1 <= speedup <= steps / transformers:
        most = f"{steps / transformers:g}, " + ("the number of steps" if transformers == 1 else "half of the steps")
        raise ValueError(f"speedup must be between 1 and {most}, got {speedup}")
    chosen = choose_steps(sigmas, computed_steps(steps, speedup), constants, boundary)
    given = {"sigmas": sigmas, "boundary": boundary, "decay": constants.decay}
    return plan_steps(chosen, steps, calls_per_step=calls_per_step, **given)


def computed_steps(steps: int, speedup: float) -> int:
    """How many of the steps a speed-up leaves to compute."""
    return int(steps / speedup + 1e-9)
