"""The speed-up rule: which steps compute for a given speed-up, and a forecast of the model's output in the others.

It needs no calibration, but can take its two constants from one that has tried others (`magcache.trials`). What it
knows is that the output of Wan's transformer, the velocity, changes about evenly along the log-SNR once that is bounded
at high noise: so was it measured on small trained models, whatever the steps and the shift. Along the step index it
does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magcache.noise_levels import checked_levels, log_snr, noise_levels
from magcache.schedule import CALLS_PER_STEP, Schedule, Weights, join_branches

FORECASTS = ("linear", "reuse")
# both chosen on development pairs of two small models, see examples/README.md
FLOOR = 0.008  # added to the signal-to-noise ratio where steps are spread: long before it little is decided
DECAY = 0.25  # of the slope, per squared unit of log-SNR


@dataclass(frozen=True)
class Constants:
    """What the rule does not know by itself: floor: added to the signal-to-noise ratio where steps are spread, see
    `choose_steps`. decay: of the slope of a forecast, see `forecast_weights`. Raises ValueError unless floor is a
    positive number and decay one of 0 or more."""

    floor: float = FLOOR
    decay: float = DECAY

    def __post_init__(self):
        if not (0 < self.floor < math.inf and 0 <= self.decay < math.inf):
            raise ValueError(f"floor must be a positive number and decay at least 0, got {self.floor}, {self.decay}")


DEFAULT = Constants()


def choose_steps(sigmas: Sequence[float], count: int, floor: float = FLOOR) -> tuple[int, ...]:
    """The `count` steps to compute, step 0 among them.

    sigmas: noise levels of the steps, falling, without the final 0.

    Along u = log(SNR + floor) the error of a forecast is taken to grow as the square of the way from the last computed
    step, and to count with the way that the sampler goes by it. The steps are those for which the sum of these errors
    is least, found by dynamic programming.

    Raises ValueError unless 1 <= count <= steps.
    """
    steps = len(sigmas)
    if not 1 <= count <= steps:
        raise ValueError(f"between 1 and {steps} steps can be computed, not {count}")
    u = np.log((1 - np.asarray(sigmas)) / sigmas + floor)
    way = np.diff(u, append=2 * u[-1] - u[max(0, steps - 2)])  # the last step goes as far as the one before it
    # [a, j]: of all forecasts from step a + 1 to j
    errors = np.cumsum(np.maximum(u - u[:, None], 0) ** 2 * way, axis=1)
    # [a, n]: of the forecasts between the computed steps a and n
    between = np.where(np.tri(steps, dtype=bool), np.inf, np.roll(errors, 1, axis=1))
    least, following = errors[:, -1], []  # from a computed step to the end, with so many more
    for _ in range(count - 1):
        totals = between + least
        least, following = totals.min(axis=1), [totals.argmin(axis=1), *following]
    chosen = [0]
    for after in following:
        chosen.append(int(after[chosen[-1]]))
    return tuple(chosen)


def forecast_weights(
    computed: Sequence[int], sigmas: Sequence[float], forecast: str = "linear", decay: float = DECAY
) -> tuple[Weights, ...]:
    """Weights of a branch's last outputs for every step, newest first; None where it computes.

    "linear" continues the line through the last two computed outputs b and a along the log-SNR lambda,

        v_j = v_a + s (v_a - v_b),
        s = exp(-decay (lambda_j - lambda_b)^2) (lambda_j - lambda_a) / (lambda_a - lambda_b),

    ever flatter the longer the way, since over longer ways the velocity turns. "reuse" takes the last one as it is; so
    does "linear" while there is no other.
    """
    snr, weights, last = [log_snr(sigma) for sigma in sigmas], [], []
    for step in range(len(sigmas)):
        if step in computed:
            last = [step, *last][:2]
            weights.append(None)
        elif forecast == "reuse" or len(last) == 1:
            weights.append((1.0,))
        else:
            (a, b), j = (snr[i] for i in last), snr[step]
            # b may be pure noise, infinitely far away
            slope = 0.0 if math.isinf(b) else math.exp(-decay * (j - b) ** 2) * (j - a) / (a - b)
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
    target: str = "output",
    calls_per_step: int = CALLS_PER_STEP,
    decay: float = DECAY,
) -> Schedule:
    """The schedule that computes the given steps, in all branches, and forecasts the others.

    forecast, decay: see `forecast_weights`; for the target "residual" it is "reuse". shift, solver: of the run, see
    `noise_levels`; or sigmas: its noise levels themselves, one a step, falling, see `noise_levels_of`.

    Raises ValueError for steps outside 0 ... steps - 1, or without step 0, and for settings that make no sense.
    """
    sigmas = noise_levels(steps, shift, solver) if sigmas is None else checked_levels(sigmas, steps)
    computed = set(computed)
    if forecast not in FORECASTS:
        raise ValueError(f"forecast must be one of {', '.join(FORECASTS)}, got {forecast!r}")
    if 0 not in computed or not computed <= set(range(steps)):
        raise ValueError(f"computed steps must be among 0 ... {steps - 1}, with 0, got {sorted(computed)}")
    weights = forecast_weights(computed, sigmas, forecast, decay)
    return Schedule(join_branches([weights] * calls_per_step), calls_per_step, target, sigmas)


def plan_speedup(
    steps: int,
    speedup: float,
    shift: float = 5.0,
    solver: str = "unipc",
    calls_per_step: int = CALLS_PER_STEP,
    *,
    sigmas: Sequence[float] | None = None,
    constants: Constants = DEFAULT,
) -> Schedule:
    """The schedule for a speed-up of at least `speedup`, as far as the transformer decides on it.

    steps, shift, solver, sigmas: of the run, see `plan_steps`; steps / speedup of the steps compute, rounded down.
    constants: of the rule, such as those that the trials of a calibration have chosen.

    Raises ValueError unless 1 <= speedup <= steps, and for settings that make no sense.
    """
    sigmas = noise_levels(steps, shift, solver) if sigmas is None else checked_levels(sigmas, steps)
    if not 1 <= speedup <= steps:
        raise ValueError(f"speedup must be between 1 and {steps}, the number of steps, got {speedup}")
    chosen = choose_steps(sigmas, computed_steps(steps, speedup), constants.floor)
    return plan_steps(chosen, steps, sigmas=sigmas, calls_per_step=calls_per_step, decay=constants.decay)


def computed_steps(steps: int, speedup: float) -> int:
    """How many of the steps a speed-up leaves to compute."""
    return int(steps / speedup + 1e-9)
