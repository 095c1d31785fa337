"""Trials: the measure, the promise and the choices against formulas of their own, and the reruns against whole runs."""

import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trial_tables import fewer, table_with

import magcache
from magcache import trials
from magcache.ratios import table_of

SIGMAS = magcache.noise_levels(50, 5.0)
PSNRS = st.lists(st.floats(5, 90), min_size=5, max_size=5)


def measured(*args, **kwargs):
    return magcache.read_trials(table_of(table_with(*args, **kwargs), "mine"))


def test_closeness():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(16, 3, 4, 4)).astype(np.float32)
    latent = truth + 0.01 * rng.normal(size=truth.shape).astype(np.float32)
    error = np.mean((latent.astype(np.float64) - truth) ** 2)
    expected = 20 * np.log10((truth.max() - truth.min()) / np.sqrt(error)), np.sqrt(error / np.mean(truth**2.0))
    assert trials.closeness(torch.tensor(latent), torch.tensor(truth)) == pytest.approx(expected, rel=1e-6)
    assert trials.closeness(torch.tensor(truth), torch.tensor(truth)) == (trials.EQUAL, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        trials.closeness(torch.tensor(latent), torch.tensor(truth * math.nan))


@pytest.mark.parametrize("count", [4, 8, 9, 24])
def test_nine_of_ten_reach_the_promise(count):
    """Of values from one distribution, which has a heavy tail here."""
    rng = random.Random(count)
    reached = []
    for _ in range(4000):
        *seen, new = (50 - rng.expovariate(0.1) ** 1.3 for _ in range(count + 1))
        reached.append(new >= trials.lower_tenth(seen))
    assert statistics.mean(reached) == pytest.approx(0.9, abs=0.02 if count > 8 else 0.07)


def test_the_promise_of_a_few():
    assert trials.lower_tenth([40.0]) == 40
    assert trials.lower_tenth([40.0, 50.0]) < 40  # as a third video would be below both too often
    assert trials.lower_tenth([60.0, 50.0, 40.0, 70.0]) == pytest.approx(35)
    assert trials.lower_tenth([40.0 + i for i in range(9)]) == pytest.approx(40)


@given(st.lists(PSNRS, min_size=1, max_size=6), st.integers(20, 50))
def test_expectations_lie_on_lines_between_the_trials(prompts, count):
    """count: of the computed steps of 100, tried at five of them."""
    tried = (100, 80, 60, 50, 40)
    found = measured(dict(zip(tried, zip(*prompts, strict=True), strict=True)), steps=100)
    expected = found.expect(100 / count)
    at, curves = [200 / calls for calls in tried], np.array(prompts)
    psnrs = np.array([np.interp(100 / count, at, curve) for curve in curves])
    assert expected.mean == pytest.approx(np.mean(psnrs))
    assert expected.pooled == pytest.approx(-10 * np.log10(np.mean(10 ** (-psnrs / 10))))
    assert expected.others == pytest.approx(np.mean(psnrs < 30), abs=0.3 if np.abs(psnrs - 30).min() < 1e-6 else 1e-9)
    slower = [found.expect(speedup).promised for speedup in at if speedup <= 100 / count]
    assert expected.promised <= min(slower) + 1e-9
    assert found.expect(1.9) is None
    assert found.expect(5.1) is None


@given(st.lists(PSNRS, min_size=1, max_size=6), st.floats(1, 95))
def test_the_fastest_that_is_promised(prompts, psnr):
    found = measured(dict(zip((50, 40, 32, 24, 20), zip(*prompts, strict=True), strict=True)))
    good = [50 / count for count in range(1, 51) if (e := found.expect(50 / count)) is not None and e.promised >= psnr]
    assert found.fastest(psnr, 50) == max(good, default=None)


def test_others_are_compared_prompt_by_prompt():
    """Fewer steps were tried on the worst prompt only, where they are ahead by 2 dB; over several the pooled error
    counts, not the mean of decibels."""
    found = measured({50: [60, 30], 20: [40, 10]}, [fewer(50, [None, 32]), fewer(20, [None, 9]), fewer(10, [5, 5])])
    at_50, _, beyond = found.others
    assert found.ahead(at_50) == (pytest.approx(-2), 1)
    assert at_50.pooled == pytest.approx(32)
    apart = measured({50: [60, 30], 20: [40, 10]}, [fewer(50, [40, 40])])
    assert apart.ahead(apart.others[0]) == (pytest.approx(10 * math.log10(2 / 10.01)), 2)
    assert found.ahead(beyond) is None
    assert found.better_without_cache() == [at_50]
    thresh = ("thresh", {"thresh": 0.1, "K": 2, "retention_ratio": 0.2}, 46, [66, 38])
    both = measured({50: [60, 30], 20: [40, 10]}, [fewer(50, [None, 32]), thresh])
    assert both.better_without_cache() == []  # with fewer calls another cache comes closer
    level = measured({50: [30, 31, 30, 31], 20: [10] * 4}, [fewer(50, [31, 30, 31.1, 30])])
    assert level.ahead(level.others[0])[0] < 0
    assert level.better_without_cache() == []  # the lead is chance


def test_prompts_that_did_not_try_all_do_not_count():
    found = measured({50: [60, 50, 40], 20: [40, 30, None]})
    assert found.prompts == (0, 1)
    assert found.expect(2).mean == 55
    assert measured({50: [60], 20: [None]}) is None


@pytest.mark.parametrize(("method", "way"), [
    ("forecast", trials.forecast(2.5, SIGMAS, magcache.Constants())),
    ("fewer steps", trials.fewer_steps(20)),
    ("thresh", trials.by_ratios([0.98] * 100, 50, magcache.Settings(0.12, 4))),
])  # fmt: skip
def test_what_a_trial_need_not_compute(method, way):
    """Calls before the first that is reused; of residuals not the last before it."""
    computed = way.schedule.reuse.index(True) if any(way.schedule.reuse) else 2
    assert way.method == method
    assert way.cost == way.schedule.computed - computed + (2 if method == "thresh" else 0)


def test_constants_make_the_schedule():
    constants = magcache.Constants(floor=0.02, early=1.0, decay=0.5)
    schedule = magcache.plan_speedup(50, 3, constants=constants)
    computed = magcache.speedup.choose_steps(SIGMAS, 16, constants)
    assert schedule == magcache.plan_steps(computed, 50, decay=0.5)
    assert schedule != magcache.plan_speedup(50, 3)
    for wrong in ({"floor": 0}, {"floor": math.nan}, {"decay": -1}, {"decay": math.inf}, {"early": -1}):
        with pytest.raises(ValueError, match=r"must be (a positive number|numbers of 0 or more)"):
            magcache.Constants(**wrong)


@pytest.mark.parametrize(("leads", "chosen"), [
    ([1, 2, 1, 2], 1), ([9, -8, 9, -8], 0), ([-1, -1, -1, -2], 0), ([6, -5, -5, -5], 0), ([6, 6, -5, -5], 1),
])  # fmt: skip
def test_constants_are_chosen_by_a_clear_lead(leads, chosen):
    """In pooled error, so that what mends the two worst of four may cost the others; one alone does not decide."""
    ways = [trials.forecast(3, SIGMAS, constants) for constants in trials.CANDIDATES[:2]]
    for prompt, lead in enumerate(leads):
        ways[0].add(prompt, (30.0 + 10 * (prompt // 2), 0.1))
        ways[1].add(prompt, (30.0 + 10 * (prompt // 2) + lead, 0.1))
    ways[1].add(4, (500.0, 0.1))  # which the other did not try
    assert trials.choose(ways) == trials.CANDIDATES[chosen]


def test_what_is_written_is_read():
    rows = [trials.forecast(speedup, SIGMAS, magcache.Constants()) for speedup in (2, 3)] + [trials.fewer_steps(25)]
    for row, prompt, close in zip(rows, (0, 0, 1), ((50.123456, 0.0123456), (40.0, 0.1), (44.0, 0.05)), strict=True):
        row.add(prompt, close)
    entry = trials.entry(rows, ["a", "b"], [1, 2], magcache.Constants())
    assert entry["rows"][2]["psnr"] == [None, 44.0]
    again = magcache.read_trials(table_of(table_with({}) | {"trials": entry}, "mine"))
    assert [row.psnr for row in again.forecasts] == [{0: 50.12}, {0: 40.0}]
    assert again.expect(2).mean == 50.12


@pytest.mark.parametrize("broken", [
    [], {}, {"constants": {"floor": 1, "decay": 0}}, {"constants": {"floor": -1, "decay": 0}, "rows": []},
    {"constants": {}, "rows": [{"method": "luck"}]},
    {"constants": {}, "rows": [{"method": "fewer steps", "steps": 5, "calls": 10, "psnr": [math.nan]}]},
    {"constants": {}, "rows": [{"method": "fewer steps", "steps": 5, "calls": 0, "psnr": [1]}]},
])  # fmt: skip
def test_trials_that_cannot_be_read(broken):
    with pytest.raises(ValueError, match=r"the trials of the ratio table .* cannot be read"):
        magcache.read_trials(table_of(table_with({}) | {"trials": broken}, "mine", path="mine.json"))
