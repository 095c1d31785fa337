"""The noise levels of Wan2.1's sampling steps. Pure Python."""

import math

SOLVERS = {"unipc": 0.9990000128746033, "dpm++": 1.0}  # their first sigma before the shift; 0.999 is a float32


def noise_levels(steps: int, shift: float, solver: str = "unipc") -> tuple[float, ...]:
    """Sigmas of the sampling steps, falling, without the final 0: linear, then shifted towards noise by
    s x / (1 + (s - 1) x). UniPC ("unipc") starts at 0.999, DPM++ ("dpm++") at pure noise.

    Raises ValueError for another solver, for less than one step or a shift that is not a positive number.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number, got {shift}")
    linear = (SOLVERS[solver] * (1 - step / steps) for step in range(steps))
    return tuple(shift * x / (1 + (shift - 1) * x) for x in linear)


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), the logarithm of the signal-to-noise ratio; minus infinity at pure noise."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
