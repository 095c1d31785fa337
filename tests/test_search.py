"""The search against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import magcache
from magcache.schedule import forecast_weights, plan_steps, spread_steps
from magcache.search import best_steps, linear_errors, reuse_errors


def random_products(steps: int, seed: int) -> np.ndarray:
    """Inner products of residuals that drift, seen differently in every step."""
    rng = np.random.default_rng(seed)
    residuals = np.cumsum(rng.normal(size=(steps, 7)), axis=0)
    maps = rng.normal(size=(steps, 5, 7))
    seen = np.einsum("jdc,ic->jid", maps, residuals)
    return np.einsum("jid,jkd->jik", seen, seen)


def forecast_error(products, computed, forecast) -> float:
    """The summed error of a schedule from its own weights, step by step."""
    steps, total = len(products), 0.0
    done = []
    for j, weights in enumerate(forecast_weights([step not in computed for step in range(steps)], forecast)):
        if weights is None:
            done.insert(0, j)
            continue
        w = np.zeros(steps)
        w[done[: len(weights)]] = weights
        w[j] -= 1
        total += np.sqrt(max(w @ products[j] @ w, 0))
    return total


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(["reuse", "linear"]), st.data())
def test_the_search_equals_brute_force(steps, seed, forecast, data):
    products, count = random_products(steps, seed), data.draw(st.integers(1, steps))
    single = reuse_errors(products)
    chosen, total = (
        best_steps(single, count) if forecast == "reuse" else best_steps(linear_errors(products), count, single)
    )
    assert len(chosen) == count
    assert chosen[0] == 0
    assert total == pytest.approx(forecast_error(products, chosen, forecast), rel=1e-6, abs=1e-6)
    others = (
        forecast_error(products, (0, *rest), forecast) for rest in itertools.combinations(range(1, steps), count - 1)
    )
    assert total == pytest.approx(min(others), rel=1e-6, abs=1e-6)


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
    assert set(range(min(3, count))) <= set(chosen)
    if count >= 5:
        assert {steps - 2, steps - 1} <= set(chosen)
        gaps = [b - a for a, b in itertools.pairwise(chosen[2:-1])]
        assert max(gaps) - min(gaps) <= 1


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
    with pytest.raises(ValueError, match="forecast must be"):
        magcache.plan([1.0, 1.0], 1, forecast="cubic")
