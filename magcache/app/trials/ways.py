"""Which trials a calibration makes, of the speed-ups that it is asked to try."""

from collections.abc import Sequence

from magcache import trials
from magcache.app.errors import Refused
from magcache.app.job import TRIAL_BUDGET, Sampling
from magcache.schedule import CALLS_PER_STEP
from magcache.speedup import DEFAULT, Constants, computed_steps


def read_speedups(text: str, sampling: Sampling) -> tuple[float, ...]:
    """Reads the value of --magcache_calibration: speed-ups, in rising order. Raises Refused."""
    steps = sampling.sample_steps
    try:
        speedups = sorted(float(part) for part in text.split(","))
    except ValueError as fault:
        raise Refused(f"--magcache_calibration takes speed-ups such as 2,2.5,3,4, got {text!r}") from fault
    for speedup in speedups:
        if not 1 < speedup <= steps:
            raise Refused(f"--magcache_calibration takes speed-ups above 1 and at most {steps}, got {speedup:g}")
    counts = [computed_steps(steps, speedup) for speedup in speedups]
    if len(set(counts)) < len(counts):
        same = f"speed-ups that compute the same number of {steps} steps: {counts}"
        raise Refused(f"--magcache_calibration {text} names {same}")
    cost = sum(way.cost for way in forecasts(sampling, speedups, DEFAULT))
    cost += sum(way.cost for way in candidates(sampling, speedups)[1:]) / 2  # at most half of the prompts try them
    runs = cost / (CALLS_PER_STEP * steps)
    if runs > TRIAL_BUDGET:
        dear = f"{runs:.2f} uncached runs per prompt, more than {TRIAL_BUDGET}"
        raise Refused(f"--magcache_calibration {text} would cost {dear}: leave out the smallest speed-ups")
    return tuple(speedups)


def forecasts(sampling: Sampling, speedups: Sequence[float], constants: Constants) -> list[trials.Trial]:
    return [trials.forecast(speedup, sampling.noise_levels, constants) for speedup in speedups]


def candidates(sampling: Sampling, speedups: Sequence[float]) -> list[trials.Trial]:
    """What the constants are chosen by: all that come into question, at the middle one of the speed-ups."""
    speedup = speedups[len(speedups) // 2]
    return [trials.forecast(speedup, sampling.noise_levels, constants) for constants in trials.CANDIDATES]


def others(sampling: Sampling, speedups: Sequence[float], ratios: Sequence[float]) -> list[trials.Trial]:
    """What forecasts are compared with: fewer sampler steps at equal calls, and the task's published settings by the
    ratios of this model, where they reuse anything."""
    steps = sampling.sample_steps
    fewer = [trials.fewer_steps(computed_steps(steps, speedup)) for speedup in speedups]
    rows = [trials.by_ratios(ratios, steps, rule) for rule in sampling.spec.published]
    return fewer + [row for row in rows if any(row.schedule.reuse)]
