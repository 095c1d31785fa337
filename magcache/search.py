"""Finds the steps to compute for which the summed error of the forecasts between them is least, exactly.

The errors come from a full calibration (`magcache.full_calibration`): for every step j it holds the inner products of
all residuals up to j as they would reach the sampler in step j, so the error of any combination of them is a quadratic
form.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from magcache.ratios import load_table, written_whole
from magcache.schedule import Schedule, plan_steps


def reuse_errors(products: np.ndarray) -> np.ndarray:
    """Error of taking residual a for residual j, float64 [steps (a), steps (j)], 0 where j <= a.

    products: [steps (j), steps, steps], the inner products of residuals in what step j does with them.
    """
    steps = len(products)
    j = np.arange(steps)
    own = products[j, j, j]
    taken = products[j[None], j[:, None], j[:, None]]  # [a, j]
    mixed = products[j[None], j[:, None], j[None]]
    errors = np.sqrt(np.maximum(taken - 2 * mixed + own[None], 0))
    return np.where(j[None] > j[:, None], errors, 0.0)


def straight_slopes(steps: int) -> np.ndarray:
    """Slopes of the lines through residuals b and a to step j, float64 [steps (b), steps (a), steps (j)], 0 unless
    b < a < j."""
    b, a, j = np.ogrid[:steps, :steps, :steps]
    return np.where((b < a) & (a < j), (j - a) / np.maximum(a - b, 1), 0.0)


def fitted_slopes(products: np.ndarray) -> np.ndarray:
    """The slopes s for which r_a + s (r_a - r_b) is nearest to r_j, like `straight_slopes`."""
    steps = len(products)
    b, a, j = np.ogrid[:steps, :steps, :steps]
    along = products[j, a, a] - 2 * products[j, a, b] + products[j, b, b]
    towards = products[j, j, a] - products[j, j, b] - products[j, a, a] + products[j, a, b]
    return np.where((b < a) & (a < j) & (along > 0), towards / np.where(along > 0, along, 1.0), 0.0)


def slope_errors(products: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Error of r_a + s (r_a - r_b) in step j, float64 [steps (b), steps (a), steps (j)], 0 unless b < a < j; see
    `magcache.schedule.forecast_weights`."""
    steps = len(products)
    b, a, j = np.ogrid[:steps, :steps, :steps]
    weights = {"a": (a, 1 + slopes), "b": (b, -slopes), "j": (j, -np.ones_like(slopes))}
    squares = sum(w1 * w2 * products[j, i1, i2] for i1, w1 in weights.values() for i2, w2 in weights.values())
    return np.where((b < a) & (a < j), np.sqrt(np.maximum(squares, 0)), 0.0)


def forecast_errors(schedule: Schedule, products: np.ndarray) -> np.ndarray:
    """Error of every step's forecast in a schedule (of its first branch), float64 [steps], 0 where it computes.

    Without what corrections make up for. Raises ValueError for products of another number of steps.
    """
    if schedule.steps != len(products):
        raise ValueError(f"the full calibration has {len(products)} steps, the schedule {schedule.steps}")
    errors, computed = np.zeros(schedule.steps), []
    for j, weights in enumerate(schedule.weights[:: schedule.calls_per_step]):
        if weights is None:
            computed.insert(0, j)
            continue
        sources, w = [*computed[: len(weights)], j], np.array([*weights, -1.0])
        errors[j] = np.sqrt(max(0.0, w @ products[j][np.ix_(sources, sources)] @ w))
    return errors


def step_weights(sigmas: Sequence[float], power: float = 0.5) -> np.ndarray:
    """How much an error of a step counts, float64 [steps]: (1 - sigma)^-power, with sigma at most 0.9999.

    Errors at high noise decide what the picture shows and grow, late ones shrink. On a small trained model a single
    forecast in step 11 of 50 changed the video 15 times as much, for its size, as one in step 47, falling about as
    1 / (1 - sigma) between; of the powers 0, 1/2 and 1 the half did best on the whole.
    """
    return np.maximum(1 - np.asarray(sigmas), 1e-4) ** -power


def best_steps(errors: np.ndarray, count: int, start: np.ndarray | None = None) -> tuple[tuple[int, ...], float]:
    """The `count` steps to compute, with step 0 among them, that minimise the summed error of all others.

    errors: [a, j] where a step follows from the last computed one, or [b, a, j] where it follows from the last two;
    then `start` [a, j] are the errors while only one is computed. Returns the steps and the sum. Raises ValueError
    unless 1 <= count <= steps.

    Dynamic programming over the last computed step, or the last two.
    """
    steps = errors.shape[-1]
    if not 1 <= count <= steps:
        raise ValueError(f"between 1 and {steps} steps can be computed, not {count}")

    # a stretch that is forecast from `state` ends before step n: sum over j < n, for n = 0 ... steps
    def stretches(of: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((*of.shape[:-1], 1)), np.cumsum(of, axis=-1)], axis=-1)

    if errors.ndim == 2:
        return _last_one(stretches(errors), steps, count)
    return _last_two(stretches(errors), stretches(start), steps, count)


def _last_one(sums: np.ndarray, steps: int, count: int) -> tuple[tuple[int, ...], float]:
    best = np.full((count + 1, steps), np.inf)  # [computed so far, last of them]
    came_from = np.zeros((count + 1, steps), int)
    best[1, 0] = 0.0
    for n in range(2, count + 1):
        for last in range(n - 1, steps):
            totals = best[n - 1, :last] + sums[:last, last]
            came_from[n, last] = totals.argmin()
            best[n, last] = totals[came_from[n, last]]
    totals = best[count] + sums[:, steps]
    chosen = [int(totals.argmin())]
    for n in range(count, 1, -1):
        chosen.append(int(came_from[n, chosen[-1]]))
    return tuple(reversed(chosen)), float(totals.min())


def _last_two(sums: np.ndarray, start: np.ndarray, steps: int, count: int) -> tuple[tuple[int, ...], float]:
    if count == 1:
        return (0,), float(start[0, steps])
    best = np.full((count + 1, steps, steps), np.inf)  # [computed so far, last but one, last]
    came_from = np.zeros((count + 1, steps, steps), int)
    best[2, 0, 1:] = start[0, 1:steps]
    for last in range(1, steps):
        for new in range(last + 1, steps):
            totals = best[2:count, :last, last] + sums[:last, last, new]  # [computed so far, last but one]
            if totals.size:
                came_from[3:, last, new] = totals.argmin(axis=1)
                best[3:, last, new] = totals.min(axis=1)
    totals = best[count] + sums[..., steps]
    before, last = np.unravel_index(totals.argmin(), totals.shape)
    chosen = [int(last), int(before)]
    for n in range(count, 2, -1):
        chosen.append(int(came_from[n, chosen[-1], chosen[-2]]))
    return tuple(reversed(chosen)), float(totals.min())


def plan_searched(name_or_path: str | os.PathLike, run: dict, count: int, forecast: str = "fitted") -> Schedule:
    """The schedule with the `count` computed steps for which a full calibration predicts the least error.

    name_or_path: of the table that the full calibration belongs to (`magcache.load_table`). run: settings of the run,
    by the keys of `measured_on`. forecast: see `magcache.schedule.forecast_weights`; a fitted one is corrected, too.

    Raises ValueError if there is no full calibration, or if it was measured on another model or task, or with other
    steps, shift, solver or guidance.
    """
    table = load_table(name_or_path)
    products, measured_on = load_products(table.path.with_suffix(".npz"))
    keys = ("task", "fingerprint", "sample_steps", "sample_shift", "sample_solver", "sample_guide_scale")
    for key in keys:
        if key in run and run[key] != measured_on.get(key):
            raise ValueError(
                f"the full calibration {name_or_path} is for {key} {measured_on.get(key)}, not {run[key]}; "
                "its steps are no guide here"
            )
    return plan_by_products(products, measured_on["sigmas"], count, forecast)


def plan_by_products(
    products: np.ndarray, sigmas: Sequence[float], count: int, forecast: str = "fitted", power: float = 0.5
) -> Schedule:
    """`plan_searched` from the products [steps, steps, steps] and the noise levels [steps] themselves; errors count by
    `step_weights`."""
    steps, weights = len(products), step_weights(sigmas, power)
    single = reuse_errors(products) * weights
    if forecast == "reuse":
        return plan_steps(best_steps(single, count)[0], steps)
    slopes = fitted_slopes(products) if forecast == "fitted" else straight_slopes(steps)
    chosen, _ = best_steps(slope_errors(products, slopes) * weights, count, single)
    if forecast == "linear":
        return plan_steps(chosen, steps, forecast)
    return plan_steps(chosen, steps, forecast, slopes=slopes, sigmas=sigmas)


def save_products(path: str | os.PathLike, products: np.ndarray, measured_on: dict) -> None:
    """Writes the products (mean over prompts) with what they were measured on, whole or not at all."""
    with written_whole(path) as part, part.open("wb") as file:
        np.savez_compressed(file, products=products.astype(np.float32), measured_on=json.dumps(measured_on))


def load_products(path: str | os.PathLike) -> tuple[np.ndarray, dict]:
    """Reads what `save_products` wrote. Raises ValueError with one line if that cannot be."""
    try:
        with np.load(path) as file:
            products, measured_on = file["products"].astype(np.float64), json.loads(str(file["measured_on"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read the full calibration {path}: {error}") from None
    if products.ndim != 3 or len(set(products.shape)) != 1 or not np.isfinite(products).all():
        raise ValueError(f"{path} is not a full calibration: its products have the shape {products.shape}")
    if len(measured_on.get("sigmas", ())) != len(products):
        raise ValueError(f"{path} is not a full calibration: it lacks the noise levels of its {len(products)} steps")
    return products, measured_on
