"""How should a ratio table answer other step counts and shifts? Compares nearest index with the noise level.

python -m examples.compare_resampling [--pairs 12]

A table of 50 steps at shift 5 is resampled both ways and set against fresh calibrations on the same prompts: mean
distance of the ratios over all steps that may reuse. Then videos are made with either plan at equal threshold (0.12,
K 4): computed calls, and PSNR against the uncached video of the same steps and shift, beside that of simply taking
fewer steps at the same number of computed calls.
"""

import argparse
import math
import statistics
from functools import partial

from tqdm import tqdm

import magcache
from examples.benchmark import benchmark_pairs, mean_and_error
from examples.train_tiny.check_prompts import generate, load_demo, psnr
from magcache.ratios import join_branches, resample_nearest, split_branches

SETTINGS = [(steps, 5.0) for steps in (8, 10, 20, 25, 30, 100)] + [(50, 3.0), (50, 8.0)]
THRESH, K, RETENTION = 0.12, 4, 0.2
MEASURED = (50, 5.0)
CALIBRATION_PAIRS = 4


def calibrate(pipeline, pairs: list, steps: int, shift: float) -> tuple[float, ...]:
    calibration, runs = magcache.apply_calibration(pipeline.model, steps), []
    for caption, seed in pairs:
        generate(pipeline, caption, seed, sampling_steps=steps, shift=shift)
        runs.append(calibration.lists())
    magcache.remove_magcache(pipeline.model)
    return (1.0, 1.0, *magcache.make_table("", runs, {})["mag_ratio"])


def nearest(ratios: tuple[float, ...], steps: int) -> tuple[float, ...]:
    return join_branches(resample_nearest(branch, steps) for branch in split_branches(ratios))


def distance(ratios: tuple[float, ...], fresh: tuple[float, ...]) -> float:
    free = math.ceil(len(fresh) * RETENTION)
    return statistics.fmean(abs(a - b) for a, b in zip(ratios[free:], fresh[free:], strict=True))


def video_of(pipeline, caption, seed, steps: int, shift: float, schedule: magcache.Schedule | None = None):
    magcache.remove_magcache(pipeline.model)
    if schedule:
        magcache.apply_magcache(pipeline.model, schedule)
    return generate(pipeline, caption, seed, sampling_steps=steps, shift=shift)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    args = parser.parse_args()
    pipeline = load_demo("t2v-tiny")
    chosen = benchmark_pairs(CALIBRATION_PAIRS + args.pairs)
    calibration_pairs, pairs = chosen[:CALIBRATION_PAIRS], chosen[CALIBRATION_PAIRS:]
    table = calibrate(pipeline, calibration_pairs, *MEASURED)

    print(
        "| steps, shift | distance of the ratios, nearest | sigma | computed calls, nearest | sigma | fresh | ", end=""
    )
    print("PSNR, nearest | fewer steps | sigma | fewer steps |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for steps, shift in tqdm(SETTINGS):
        fresh = calibrate(pipeline, calibration_pairs, steps, shift)
        tables = {
            "nearest": nearest(table, steps),
            "sigma": magcache.resample_sigma(
                table, magcache.noise_levels(*MEASURED), magcache.noise_levels(steps, shift)
            ),
            "fresh": fresh,
        }
        plans = {name: magcache.plan(ratios, steps, THRESH, K, RETENTION) for name, ratios in tables.items()}
        scores = {name: [] for name in ("nearest", "nearest, fewer", "sigma", "sigma, fewer")}
        for caption, seed in pairs:
            make = partial(video_of, pipeline, caption, seed, shift=shift)
            uncached = make(steps)
            for name in ("nearest", "sigma"):
                scores[name].append(psnr(make(steps, schedule=plans[name]), uncached))
                scores[f"{name}, fewer"].append(psnr(make(math.ceil(plans[name].computed / 2)), uncached))
        columns = [f"{steps}, {shift:g}", *(f"{distance(tables[name], fresh):.4f}" for name in ("nearest", "sigma"))]
        columns += [f"{plans[name].computed} of {2 * steps}" for name in tables]
        columns += map(mean_and_error, scores.values())
        print("| " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
