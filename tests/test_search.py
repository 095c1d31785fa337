"""The search against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import magcache
from magcache.schedule import Schedule, corrections_of, forecast_weights, plan_steps, spread_steps
from magcache.search import (
    best_steps,
    fitted_slopes,
    forecast_errors,
    plan_by_products,
    reuse_errors,
    slope_errors,
    step_weights,
    straight_slopes,
)


def random_products(steps: int, seed: int) -> np.ndarray:
    """Inner products of residuals that drift, seen differently in every step."""
    rng = np.random.default_rng(seed)
    residuals = np.cumsum(rng.normal(size=(steps, 7)), axis=0)
    maps = rng.normal(size=(steps, 5, 7))
    seen = np.einsum("jdc,ic->jid", maps, residuals)
    return np.einsum("jid,jkd->jik", seen, seen)


def forecast_error(products, computed, forecast, weights=1.0) -> float:
    """The summed error of a schedule from its own weights, step by step."""
    steps, total = len(products), 0.0
    slopes = fitted_slopes(products) if forecast == "fitted" else None
    done = []
    reuse = [step not in computed for step in range(steps)]
    for j, combined in enumerate(forecast_weights(reuse, forecast, slopes)):
        if combined is None:
            done.insert(0, j)
            continue
        w = np.zeros(steps)
        w[done[: len(combined)]] = combined
        w[j] -= 1
        total += np.sqrt(max(w @ products[j] @ w, 0)) * np.broadcast_to(weights, steps)[j]
    return total


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(["reuse", "linear", "fitted"]), st.data())
def test_the_search_equals_brute_force(steps, seed, forecast, data):
    products, count = random_products(steps, seed), data.draw(st.integers(1, steps))
    weights = np.random.default_rng(seed).uniform(0.1, 2, steps)
    errors = single = reuse_errors(products) * weights
    if forecast != "reuse":
        slopes = straight_slopes(steps) if forecast == "linear" else fitted_slopes(products)
        errors = slope_errors(products, slopes) * weights
    chosen, total = best_steps(errors, count, single)
    assert len(chosen) == count
    assert chosen[0] == 0
    assert total == pytest.approx(forecast_error(products, chosen, forecast, weights), rel=1e-6, abs=1e-6)
    others = (
        forecast_error(products, (0, *rest), forecast, weights)
        for rest in itertools.combinations(range(1, steps), count - 1)
    )
    assert total == pytest.approx(min(others), rel=1e-6, abs=1e-6)


def test_fitted_slopes_are_least_squares():
    products, rng = random_products(6, 3), np.random.default_rng(0)
    slopes, errors = fitted_slopes(products), slope_errors(products, fitted_slopes(products))
    assert (errors <= slope_errors(products, straight_slopes(6)) + 1e-9).all()
    for _ in range(20):
        assert (errors <= slope_errors(products, slopes + rng.normal(size=slopes.shape)) + 1e-9).all()


def test_a_plan_by_products():
    """The noise levels decide how errors count and what a correction weighs."""
    products, sigmas = random_products(10, 5), magcache.noise_levels(10, 1.0)
    for forecast in ("reuse", "linear", "fitted"):
        schedule = plan_by_products(products, sigmas, 5, forecast)
        computed = [step for step, reused in enumerate(schedule.reuse[::2]) if not reused]
        counted = 1 / np.sqrt(1 - np.array(sigmas))
        total = forecast_error(products, computed, forecast, counted)
        assert (forecast_errors(schedule, products) * counted).sum() == pytest.approx(total)
        assert total == pytest.approx(
            min(
                forecast_error(products, (0, *rest), forecast, counted)
                for rest in itertools.combinations(range(1, 10), 4)
            )
        )
        corrections = corrections_of(schedule.weights[::2], sigmas) if forecast == "fitted" else ((),) * 10
        assert schedule.corrections[::2] == schedule.corrections[1::2] == corrections
    assert np.isfinite(step_weights([1.0, 0.5])).all()
    with pytest.raises(ValueError, match="has 10 steps, the schedule 5"):
        forecast_errors(plan_steps((0,), 5), products)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_corrections_make_up_for_forecasts(reuse, coefficients):
    """Residuals on a parabola: forecasts and corrections together move the latent as far as the true ones would."""
    sigmas = np.linspace(1, 0.02, len(reuse) + 3)
    moved = -np.diff([*sigmas, 0.0])
    true = np.polynomial.Polynomial(coefficients)(np.arange(len(sigmas)) / 5)
    weights = forecast_weights([False, False, *reuse, False], "linear")  # so the last stretch is corrected, too
    corrections = corrections_of(weights, sigmas)
    seen, done = [], []
    for step, (forecast, correction) in enumerate(zip(weights, corrections, strict=True)):
        if forecast is None:
            done.insert(0, true[step])
            seen.append(true[step] + sum(w * r for w, r in zip(correction, done, strict=False)))
        else:
            seen.append(sum(w * r for w, r in zip(forecast, done, strict=False)))
    assert moved @ seen == pytest.approx(moved @ true, abs=1e-9)


def test_a_correction_while_only_one_residual_is_computed():
    """The line through r_0 and r_2 is their mean in step 1, which took r_0 and moves the latent 1.5 times as far."""
    (correction,) = filter(None, corrections_of((None, (1.0,), None), [1.0, 0.5, 0.2]))
    assert correction == pytest.approx((0.75, -0.75))


@pytest.mark.parametrize("count", [0, 9])
def test_counts_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"between 1 and 8 steps can be computed, not {count}"):
        best_steps(np.zeros((8, 8)), count)
    with pytest.raises(ValueError, match=f"not {count}"):
        spread_steps(8, count)


@given(st.integers(1, 100), st.data())
def test_spread_steps(steps, data):
    count = data.draw(st.integers(1, steps))
    chosen = spread_steps(steps, count)
    assert len(chosen) == len(set(chosen)) == count
    assert list(chosen) == sorted(chosen)
    assert chosen[0] == 0
    if count >= 4:
        assert {steps - 2, steps - 1} <= set(chosen)


def test_spread_steps_grow_apart():
    assert spread_steps(50, 16) == (0, 1, 3, 5, 7, 10, 13, 17, 21, 25, 29, 33, 38, 43, 48, 49)
    gaps = np.diff(spread_steps(100, 30)[:-1])
    assert (np.diff(gaps) >= -1).all()  # but for rounding


@given(st.lists(st.booleans(), max_size=30), st.floats(-3, 3), st.floats(-3, 3))
def test_a_line_is_continued_exactly(reuse, offset, slope):
    reuse = [False, False, *reuse]
    residuals = [offset + slope * step for step in range(len(reuse))]
    done = []
    for step, weights in enumerate(forecast_weights(reuse, "linear")):
        if weights is None:
            done.insert(0, residuals[step])
        else:
            forecast = sum(w * r for w, r in zip(weights, done, strict=False))
            assert forecast == pytest.approx(residuals[step], abs=1e-9)


def test_schedules_of_given_steps():
    schedule = plan_steps((0, 2), 5, "linear")
    assert schedule.weights[::2] == (None, (1.0,), None, (1.5, -0.5), (2.0, -1.0))
    assert schedule.weights[::2] == schedule.weights[1::2]
    assert schedule.history == 2
    for wrong in ((1, 2), (0, 5)):
        with pytest.raises(ValueError, match=r"among 0 \.\.\. 4, with 0"):
            plan_steps(wrong, 5)
    for sigmas in ([0.9] * 4, [0.9] * 6):
        with pytest.raises(ValueError, match=f"{len(sigmas)} noise levels for 5 steps"):
            plan_steps((0, 2), 5, sigmas=sigmas)
    with pytest.raises(ValueError, match="forecast must be"):
        magcache.plan([1.0, 1.0], 1, forecast="cubic")
    for arguments in (("fitted",), ("linear", np.zeros((5, 5, 5)))):
        with pytest.raises(ValueError, match="the fitted forecast, and no other, takes slopes"):
            forecast_weights([False, True], *arguments)
    corrected = ((), (), (1.0, 0.5))
    assert Schedule((None, (1.0,), None), 1, corrected).history == 1
    for weights, corrections in (((None, (1.0,), None), ((), (1.0,), ())), ((None, None), ((), (1.0, 0.5, 0.5)))):
        with pytest.raises(ValueError, match=r"nothing to correct|combines 3 residuals, 2 are computed"):
            Schedule(weights, 1, corrections)
    with pytest.raises(ValueError, match="1 corrections for 2 calls"):
        Schedule((None, None), 1, ((),))
