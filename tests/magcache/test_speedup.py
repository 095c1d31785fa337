"""The speed-up rule: the steps against brute force, the forecasts against curves that they must meet."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import magcache
from magcache.noise_levels import log_snr
from magcache.speedup import DEFAULT, MOST_STEPS, Constants, choose_steps, forecast_weights

RUNS = {"steps": st.integers(1, 60), "shift": st.floats(0.01, 20), "solver": st.sampled_from(["unipc", "dpm++"])}


FULL_SIZE = json.loads((Path(__file__).parent / "full_size_schedules.json").read_text(encoding="utf-8"))


def spread_error(chosen, sigmas, constants):
    """Sum over the forecast steps of the squared way along u since the last computed step, times their own way, times
    what an error counts there."""
    u = [math.log((1 - sigma) / sigma + constants.floor) for sigma in sigmas]
    ways = [b - a for a, b in itertools.pairwise(u)]
    total, last = 0.0, 0
    for step in range(len(sigmas)):
        if step in chosen:
            last = step
        else:
            snr = (1 - sigmas[step]) / sigmas[step]
            counts = (snr + constants.floor) ** -constants.early
            total += (u[step] - u[last]) ** 2 * [*ways, ways[-1]][step] * counts
    return total


BOUNDARIES = st.none() | st.sampled_from([0.9, 0.875]) | st.floats(0.05, 0.95)


@given(RUNS["shift"], RUNS["solver"], st.floats(1e-4, 0.02), st.floats(0, 1.5), BOUNDARIES, st.data())
def test_the_steps_are_the_best_of_all(shift, solver, floor, early, boundary, data):
    steps = data.draw(st.integers(2, 10))
    sigmas, constants = magcache.noise_levels(steps, shift, solver), Constants(floor, early)
    firsts = {0} if boundary is None else {0, sum(int(1000 * sigma) >= 1000 * boundary for sigma in sigmas)} - {steps}
    count = data.draw(st.integers(len(firsts), steps))
    chosen = choose_steps(sigmas, count, constants, boundary)
    assert len(set(chosen)) == count
    assert firsts <= set(chosen)
    assert chosen == tuple(sorted(chosen))
    others = [{*rest} | firsts for rest in itertools.combinations(set(range(steps)) - firsts, count - len(firsts))]
    least = min(spread_error(other, sigmas, constants) for other in others)
    assert spread_error(chosen, sigmas, constants) == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("lists", "shift", "most"),
    [("50 steps, shift 5", 5, 2.5), ("40 steps, i2v-14B", 5, 1.5), ("40 steps, i2v-14B", 3, 1.5)],
)
def test_the_steps_are_near_those_of_full_size_models(lists, shift, most):
    """Mean distance, in steps, to schedules of as many steps that others chose by their effect on the real Wan2.1."""
    distances = []
    for theirs in FULL_SIZE[lists].values():
        ours = choose_steps(magcache.noise_levels(int(lists.split()[0]), shift), len(theirs))
        distances.append(statistics.fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    assert statistics.fmean(distances) <= most


def test_steps_without_end_are_refused():
    assert len(choose_steps(magcache.noise_levels(MOST_STEPS, 5.0), 2)) == 2
    with pytest.raises(ValueError, match="among at most 1000, not 1001"):
        magcache.plan_speedup(MOST_STEPS + 1, 2)


@given(**RUNS, speedup=st.floats(1, 60), calls_per_step=st.integers(1, 2))
def test_any_run_has_a_schedule(steps, shift, solver, speedup, calls_per_step):
    if speedup > steps:
        with pytest.raises(ValueError, match="speedup must be between 1 and"):
            magcache.plan_speedup(steps, speedup, shift, solver, calls_per_step)
        return
    schedule = magcache.plan_speedup(steps, speedup, shift, solver, calls_per_step)
    assert schedule.target == "output"
    assert schedule.steps == steps
    assert schedule.computed == calls_per_step * math.floor(steps / speedup + 1e-9)
    assert schedule.speedup_bound >= speedup - 1e-6
    assert schedule.history <= 2
    for weights in schedule.weights:
        assert weights is None or sum(weights) == pytest.approx(1)  # a velocity that does not change is met
        assert weights is None or all(map(math.isfinite, weights))
    branches = {schedule.weights[branch::calls_per_step] for branch in range(calls_per_step)}
    assert len(branches) == 1


@given(st.integers(4, 60), st.floats(0.5, 20), st.data())
def test_a_straight_line_along_log_snr_is_met_without_decay(steps, shift, data):
    sigmas = magcache.noise_levels(steps, shift)
    computed = {0, 1} | data.draw(st.sets(st.integers(2, steps - 1)))
    line = [3 - 2 * log_snr(sigma) for sigma in sigmas]
    last = []
    for step, weights in enumerate(forecast_weights(computed, sigmas, decay=0.0)):
        if weights is None:
            last = [line[step], *last]
        else:
            assert sum(w * v for w, v in zip(weights, last, strict=False)) == pytest.approx(line[step], rel=1e-6)


def test_there_is_no_slope_from_pure_noise():
    """Where DPM++ starts; without decay, too, which would be 0 times infinity."""
    schedule = magcache.plan_steps({0, 3}, 10, solver="dpm++", decay=0.0)
    assert schedule.weights[2 * 5] == (1.0, 0.0)


def test_the_slope_decays_with_the_way():
    sigmas = magcache.noise_levels(20, 5.0)
    weights = forecast_weights({0, 4, 7}, sigmas)
    b, a, j = (log_snr(sigmas[step]) for step in (4, 7, 11))
    slope = math.exp(-DEFAULT.decay * (j - b)) * (j - a) / (a - b)
    assert weights[11] == pytest.approx((1 + slope, -slope))
    assert weights[2] == (1.0,)  # nothing to draw a line through
    assert forecast_weights({0, 4, 7}, sigmas, "reuse")[11] == (1.0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"computed": [1, 2]}, "with 0, got"),
        ({"computed": [0, 10]}, "must be among 0 ... 9"),
        ({"forecast": "fitted"}, "forecast must be one of linear, reuse"),
        ({"solver": "euler"}, "solver must be one of"),
        ({"shift": 0.0}, "shift must be a positive number"),
        ({"shift": math.nan}, "shift must be a positive number"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"target": "residual"}, "must not combine residuals"),
    ],
)
def test_what_cannot_be_planned(settings, message):
    with pytest.raises(ValueError, match=message):
        magcache.plan_steps(**{"computed": [0, 1, 5], "steps": 10} | settings)


@pytest.mark.parametrize("speedup", [0.5, math.nan, math.inf, -2.0, 51])
def test_speedups_that_are_none(speedup):
    with pytest.raises(ValueError, match="speedup must be between 1 and 50"):
        magcache.plan_speedup(50, speedup)


@given(**RUNS, calls_per_step=st.integers(1, 2))
def test_the_noise_levels_themselves(steps, shift, solver, calls_per_step):
    sigmas = magcache.noise_levels(steps, shift, solver)
    expected = magcache.plan_speedup(steps, min(steps, 2), shift, solver, calls_per_step)
    given_levels = {"sigmas": sigmas, "calls_per_step": calls_per_step}
    assert magcache.plan_speedup(steps, min(steps, 2), **given_levels) == expected
    computed = [step for step in range(steps) if not expected.reuse[step * calls_per_step]]
    assert magcache.plan_steps(computed, steps, **given_levels) == expected


@pytest.mark.parametrize(
    "sigmas", [(), (0.9, 0.5), (1.1, 0.5, 0.1), (0.9, 0.5, 0.0), (0.9, 0.5, 0.5), (0.9, math.nan, 0.1)]
)
def test_noise_levels_that_are_none(sigmas):
    for plan in (magcache.plan_speedup, lambda steps, count, sigmas: magcache.plan_steps([0], steps, sigmas=sigmas)):
        with pytest.raises(ValueError, match=f"sigmas must be 3 noise levels, falling, .*got {len(sigmas)}"):
            plan(3, 2, sigmas=sigmas)


@pytest.mark.parametrize(("boundary", "shift", "first"), [(0.875, 12.0, 26), (0.9, 5.0, 15)])
def test_the_second_transformer_starts_afresh(boundary, shift, first):
    """Wan2.2's A14B at its defaults: its first step computes, the next forecast has nothing but that one."""
    schedule = magcache.plan_speedup(40, 2.5, shift, boundary=boundary)
    assert schedule.switch == first
    assert schedule.computed == 32
    assert schedule.weights[2 * first] is None
    after = [weights for weights in schedule.weights[2 * first :: 2] if weights]
    assert len(after[0]) == 1
    assert magcache.plan_speedup(40, 20, shift, boundary=boundary).computed == 4


def test_a_boundary_that_no_run_has():
    sigmas = magcache.noise_levels(4, 5.0)
    for refused, message in (
        (lambda: magcache.plan_speedup(10, 6, boundary=0.5), "between 1 and 5, half of the steps, got 6"),
        (lambda: magcache.plan_steps([0, 2], 10, boundary=0.5), "with 0 and 9, got"),
        (lambda: choose_steps(sigmas, 1, boundary=0.7), "between 2 and 4 steps can be computed"),
        (lambda: magcache.Schedule((None,) * 8, boundary=0.5), "a boundary must be between 0 and 1, and needs sigmas"),
        (lambda: magcache.Schedule((None,) * 8, sigmas=sigmas, boundary=1.5), "a boundary must be between 0 and 1"),
        (lambda: magcache.Schedule((None, None, (1.0,), None), 1, sigmas=sigmas, boundary=0.9), "0 are computed"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    whole = magcache.plan_speedup(10, 10, boundary=0.001)  # below all levels: there is no second one
    assert whole.switch == 10


def test_reuse_of_residuals_by_hand():
    schedule = magcache.plan_steps([0, 2], 4, "reuse", target="residual")
    assert schedule.reuse == (False, False, True, True) * 2
    assert schedule.target == "residual"
