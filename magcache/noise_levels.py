"""The noise levels of the sampling steps: Wan2.1's, or those of a scheduler of diffusers. Pure Python."""

import copy
import math
from array import array
from collections.abc import Sequence
from itertools import pairwise

SOLVERS = {"unipc": 0.9990000128746033, "dpm++": 1.0}  # their first sigma before the shift; 0.999 is a float32


def noise_levels(steps: int, shift: float, solver: str = "unipc") -> tuple[float, ...]:
    """Returns the sigmas of the sampling steps, falling, without the final 0: linear, then shifted towards noise by
    s x / (1 + (s - 1) x). UniPC ("unipc") starts at 0.999, DPM++ ("dpm++") at pure noise.

    Raises ValueError for another solver, for less than one step, a shift that is not a positive number, and levels that
    are 0 or equal in float32.

    >>> [round(sigma, 3) for sigma in magcache.noise_levels(4, shift=5.0)]
    [1.0, 0.937, 0.833, 0.625]
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number, got {shift}")
    first = SOLVERS[solver]  # the next two lines round as numpy does, since timesteps are cut to whole numbers
    linear = [step * (-first / steps) + first for step in range(steps)]
    # at x = 1 a tiny shift rounds the divisor to 0, where it should be the shift
    levels = checked_levels([shift * x / (1 + (shift - 1) * x or shift) for x in linear], steps)
    try:
        checked_levels(array("f", levels), steps)  # the samplers' precision
    except ValueError as error:
        raise ValueError(f"{steps} steps with shift {shift:g} are too close for float32: {error}") from None
    return levels


def checked_levels(sigmas: Sequence[float], steps: int) -> tuple[float, ...]:
    """Returns the sigmas; raises ValueError unless there is one per step, falling and, up to rounding, in (0, 1]."""
    levels = tuple(min(float(sigma), 1.0) if sigma < 1 + 1e-6 else float(sigma) for sigma in sigmas)
    falling = all(a > b for a, b in pairwise((math.nextafter(1, 2), *levels, 0.0)))
    if len(levels) != steps or not falling:
        got = f"{len(levels)}, the largest {max(levels, default=math.nan):.4g}"
        raise ValueError(f"sigmas must be {steps} noise levels, falling, above 0 and at most 1, got {got}")
    return levels


def noise_levels_of(scheduler, steps: int) -> tuple[float, ...]:
    """Returns the sigmas of the sampling steps, falling, without the final one, that a flow scheduler of diffusers has
    after `set_timesteps(steps)`. The scheduler itself is not changed.

    Raises ValueError if it is not configured for flow matching, does not call the model exactly once per step, or draws
    fresh noise in every step: then the outputs of neighbouring steps are too far apart for a forecast.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    draws = config.get("stochastic_sampling") or config.get("eta") or "tau_func" in config or "LCM" in name
    if draws or str(config.get("algorithm_type")).startswith("sde"):
        raise ValueError(f"{name}, as it is configured, draws fresh noise in every step, so no output can be forecast")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    try:
        return checked_levels(getattr(scheduler, "sigmas", ())[:-1], steps)
    except ValueError as error:
        raise ValueError(f"{name} is not a flow scheduler with one call per step: {error}") from None


def first_below(sigmas: Sequence[float], boundary: float) -> int:
    """Returns the first step whose noise level is below the boundary, or `len(sigmas)` if there is none. Both are
    compared as timesteps: whole numbers on a scale of 1000, as in Wan's samplers."""
    return sum(int(1000 * sigma) >= 1000 * boundary for sigma in sigmas)


def log_snr(sigma: float) -> float:
    """Returns lambda = log((1 - sigma) / sigma), log of the signal-to-noise ratio; minus infinity at pure noise."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
