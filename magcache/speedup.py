"""The speed-up rule: which steps compute for a given speed-up, and how the model's output is forecast in the others.
Pure Python.

It needs no calibration, but can take its constants from one with trials (`magcache.trials`). It rests on two
measurements. The output of Wan's transformer, the velocity, changes about evenly along the log-SNR: on small trained
models for any steps and shift, on the full-size model in the middle of the run. And the earlier an error is made, the
more it counts: on the full-size model, final over local error falls to a sixth from the first step to the last
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
FEWEST = 8  # computed steps from which on a cache is worth it, see `plan_speedup`


@dataclass(frozen=True)
class Constants:
    """The constants of the rule.

    floor: is added to the signal-to-noise ratio when steps are chosen, since little is decided far below it.
    early: how much more an early error counts then, as a power of the noise-to-signal ratio; 0 counts all alike.
    decay: how fast the slope of a forecast decays, per unit of log-SNR, see `forecast_weights`.

    The defaults keep the steps near those that others chose by their effect on full-size models
    (tests/magcache/full_size_schedules.json); among such constants they were chosen on two small models (see
    examples/README.md). Raises ValueError unless floor is a positive number and the others are 0 or more.
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
    """Chooses `count` steps to compute, among them the first one of every transformer.

    sigmas: noise levels of the steps, falling, without the final 0. boundary: between two transformers, see `Schedule`.

    Along u = log(SNR + floor) the error of a forecast is assumed to grow with the square of the distance from the last
    computed step. It is weighted by the distance that the sampler goes with the forecast, times exp(-early u). The
    chosen steps have the least sum of these errors, found by dynamic programming.

    Raises ValueError unless count is at least one per transformer and at most all steps, or for too many steps.
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
    """Returns the first step of every transformer that makes any."""
    switch = 0 if boundary is None else first_below(sigmas, boundary)
    return (0, switch) if 0 < switch < len(sigmas) else (0,)


def forecast_weights(
    computed: Sequence[int],
    sigmas: Sequence[float],
    forecast: str = "linear",
    decay: float = DEFAULT.decay,
    boundary: float | None = None,
) -> tuple[Weights, ...]:
    """Returns for every step the weights of its branch's last outputs, newest first; None where it computes.

    "linear" continues the line through the last two computed outputs b and a along the log-SNR lambda,

        v_j = v_a + s (v_a - v_b),
        s = exp(-decay (lambda_j - lambda_b)) (lambda_j - lambda_a) / (lambda_a - lambda_b),

    which flattens with the distance: the velocity turns, so its slopes at two places have less to do with each other
    the further apart these are. "reuse" takes the last output unchanged; so does "linear" while there is only one
    of the same transformer.
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
    """Makes the schedule that computes the given steps in all branches and forecasts the others.

    forecast, decay: see `forecast_weights`; the target "residual" needs "reuse". shift, solver: those of the run, see
    `noise_levels`; or sigmas: its noise levels themselves, one per step, falling, see `noise_levels_of`. boundary: the
    noise level at which a second transformer takes over, see `Schedule`.

    Raises ValueError for steps outside 0 ... steps - 1, if the first step of a transformer is missing, and for settings
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
    """Makes the schedule for a speed-up of the transformer of at least `speedup`.

    steps, shift, solver, sigmas, boundary: those of the run, see `plan_steps`. steps / speedup steps compute, rounded
    down.
    constants: those of the rule, such as the trials of a calibration have chosen.

    The first steps decide what comes and leave hardly anything to forecast, so a cache is worth it only from about
    `FEWEST` computed steps on: below that, as many sampler steps without a cache came closer on the demo models
    (examples/README.md).

    Raises ValueError unless 1 <= speedup <= steps (half of the steps for two transformers), and for settings that make
    no sense.

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
    """Returns how many of the steps compute at a speed-up."""
    return int(steps / speedup + 1e-9)
