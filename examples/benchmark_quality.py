"""Measures on a demo model how close the videos of every method come to the uncached ones, at the same number of calls.

python -m examples.benchmark_quality [--pairs 24] [--workers 2] [--picture examples/quality.png]
python -m examples.benchmark_quality --only transfer      what calibrating on other prompts, a shift or steps costs
python -m examples.benchmark_quality --only choices       what our constants were chosen by, on 12 other pairs

Truth: the uncached 50-step video of the same prompt and seed. Methods: MagCache and what else this package does with
the computed steps and the residuals between them; fewer sampler steps without a cache; the methods of `examples.peers`.
PSNR and SSIM: mean and standard error over pairs of prompt and seed that nothing was calibrated or tuned on. Time:
the uncached run's over the method's, decoding included, median over pairs; every worker has one thread.
Last, how well the error that a full calibration predicts ranks our schedules by the error measured.
"""

import argparse
import contextlib
import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

import magcache
import wan.pipeline
from examples import peers
from examples.benchmark import STEPS, mean_and_error
from examples.train_tiny.check_prompts import check_pairs, generate, load_demo
from examples.train_tiny.shapes import CAPTIONS, Caption
from magcache.compare import score, to_frames
from magcache.ratios import split_branches
from magcache.schedule import FORECASTS, Schedule, forecast_weights
from magcache.search import best_steps, forecast_errors, load_products, plan_by_products, step_weights

BUDGETS = peers.BUDGETS  # computed calls of 100
OTHER_BUDGETS = (60, 26)  # more schedules to rank
RULES = {46: (0.12, 2), 38: (0.1, 4), 32: (0.24, 6), 60: (0.12, 1), 26: (1.0, 10)}  # thresh, K that compute so many
RANKED_PAIRS = 8
SHIFT, GUIDANCE = 5.0, 5.0
CALIBRATION_PROMPTS = Path(__file__).parent / "train_tiny" / "calibration_prompts.txt"
DEVELOPMENT_PROMPTS = Path(__file__).parent / "development_prompts.txt"  # what our constants were chosen on
FEWER = "fewer steps"
COLOURS = {"MagCache": "tab:blue", "by speed-up": "tab:red", FEWER: "black"}


@dataclass(frozen=True)
class Result:
    psnr: float
    ssim: float
    computed: float
    time: float  # the uncached run's over this one's


def unseen_pairs(count: int) -> list[tuple[Caption, int]]:
    """Random captions, none of which was calibrated, checked or tuned on, with seeds of their own."""
    seen = {str(caption) for caption, _ in [*check_pairs(), *peers.own_pairs(6, 9000), *peers.own_pairs(6, 9100)]}
    for file in (CALIBRATION_PROMPTS, DEVELOPMENT_PROMPTS):
        seen |= set(file.read_text(encoding="utf-8").splitlines())
    chosen = random.Random(31).sample([caption for caption in CAPTIONS if str(caption) not in seen], count)
    return [(caption, 6000 + i) for i, caption in enumerate(chosen)]


def damped(steps: tuple[int, ...], by: float = 0.7) -> Schedule:
    """A linear forecast with a part of the slope."""
    weights = forecast_weights([step not in steps for step in range(STEPS)], "linear")
    flatter = [w if w is None or len(w) == 1 else (1 + by * (w[0] - 1), by * w[1]) for w in weights]
    return Schedule(tuple(w for w in flatter for _ in range(2)))


def schedules(task: str, budget: int) -> dict[str, Schedule]:
    """Ours, by the name of the row."""
    ratios, count = magcache.load_ratios(task), budget // 2
    spread = magcache.spread_steps(STEPS, count)
    found = {
        "MagCache (thresh, K)": magcache.plan(ratios, STEPS, *RULES[budget]),
        "MagCache, linear": magcache.plan(ratios, STEPS, *RULES[budget], forecast="linear"),
        "by speed-up: no calibration, linear": magcache.plan_steps(spread, STEPS, "linear"),
        "by speed-up: no calibration, 0.7 of the slope": damped(spread),
    }
    with contextlib.suppress(ValueError):  # a model without a full calibration
        for forecast in FORECASTS:
            found[f"by speed-up: calibrated, {forecast}"] = magcache.plan_searched(task, {}, count, forecast)
        steps = np.flatnonzero(~np.array(found["by speed-up: calibrated, linear"].reuse[::2]))
        found["by speed-up: calibrated, 0.7 of the slope"] = damped(tuple(steps.tolist()))
    return found


@functools.cache
def pipeline_of(task: str):
    torch.set_num_threads(1)
    wan.pipeline.tqdm = lambda timesteps, **_: timesteps  # no bar for each of hundreds of videos
    return load_demo(task)


def run_schedule(schedule: Schedule, pipeline, caption: Caption, seed: int) -> tuple[torch.Tensor, float]:
    magcache.apply_magcache(pipeline.model, schedule)
    video = generate(pipeline, caption, seed, sampling_steps=STEPS)
    magcache.remove_magcache(pipeline.model)
    return video, schedule.computed


def measure(pipeline, runs: dict, caption: Caption, seed: int) -> dict:
    """Result by the key of the run; a run returns the video and the number of computed calls."""
    magcache.remove_magcache(pipeline.model)

    def timed(run: Callable) -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        video, computed = run(pipeline, caption, seed)
        return to_frames(video), computed, time.perf_counter() - start

    truth, _, seconds = timed(lambda *pair: (generate(*pair, sampling_steps=STEPS), 2 * STEPS))
    results = {}
    for key, run in runs.items():
        frames, computed, taken = timed(run)
        scores = score(frames, truth)
        results[key] = Result(scores.overall_psnr or math.inf, scores.overall_ssim, computed, seconds / taken)
    return results


def run_peer(peer: peers.Peer, budget: int, pipeline, caption: Caption, seed: int) -> tuple[torch.Tensor, float]:
    return peer.video(pipeline, peer.setting_for(budget), caption, seed)


def ours(planned: dict) -> dict:
    return {key: functools.partial(run_schedule, schedule) for key, schedule in planned.items()}


def measure_pair(task: str, pair: tuple[Caption, int], everything: bool) -> dict:
    """All methods on one pair; with everything, the schedules of the other budgets, too."""
    pipeline = pipeline_of(task)
    budgets = (*BUDGETS, *OTHER_BUDGETS) if everything else BUDGETS
    planned = {(name, b): schedule for b in budgets for name, schedule in schedules(task, b).items()}
    runs = ours(planned)
    if task == "t2v-tiny":  # the others are tuned for that one
        for name, peer in peers.all_peers().items():
            for budget in BUDGETS:
                runs[name, budget] = functools.partial(run_peer, peer, budget)
    return measure(pipeline, runs, *pair)


def quality(task: str, pairs: list, workers: int) -> list[dict]:
    """The results of every pair."""
    with ProcessPoolExecutor(workers, torch.multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(measure_pair, task, pair, i < RANKED_PAIRS) for i, pair in enumerate(pairs)]
        return [job.result() for job in tqdm(jobs, desc=f"pairs, {task}")]


def print_table(results: list[dict]) -> None:
    names = dict.fromkeys(name for name, budget in results[-1])
    best = "by speed-up: calibrated, fitted"
    for budget in BUDGETS:
        print(f"\n| at {budget} of {2 * STEPS} calls | calls | PSNR, dB | SSIM | time | best of ours minus this, dB |")
        print("|---|---|---|---|---|---|")
        for name in names:
            values = [result[name, budget] for result in results]
            if (best, budget) not in results[0] or name == best:
                ahead = ""
            else:
                ahead = mean_and_error(
                    [result[best, budget].psnr - v.psnr for result, v in zip(results, values, strict=True)]
                )
            ssim = mean_and_error([v.ssim for v in values], digits=4)
            print(
                f"| {name} | {statistics.mean(v.computed for v in values):.1f} | "
                f"{mean_and_error([v.psnr for v in values])} | {ssim} | "
                f"{statistics.median(v.time for v in values):.2f}x | {ahead} |"
            )


def print_ranking(task: str, results: list[dict]) -> None:
    """Spearman's rank correlation of predicted and measured errors, over all schedules of ours."""
    products, measured_on = load_products(magcache.load_table(task).path.with_suffix(".npz"))
    weights, predicted, measured = step_weights(measured_on["sigmas"]), [], []
    for budget in (*BUDGETS, *OTHER_BUDGETS):
        for name, schedule in schedules(task, budget).items():
            predicted.append((forecast_errors(schedule, products) * weights).sum())
            measured.append(-statistics.mean(result[name, budget].psnr for result in results[:RANKED_PAIRS]))
    print(
        f"\nerror predicted by the full calibration and error measured on {RANKED_PAIRS} pairs (as -PSNR): rank "
        f"correlation {spearmanr(predicted, measured).statistic:.3f} over {len(predicted)} schedules"
    )


def draw(results: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    names = dict.fromkeys(name for name, budget in results[-1])
    others = (plt.get_cmap("tab20").colors[i] for i in (4, 5, 14, 2, 8, 9, 10, 11, 16))  # no blue, no red
    for name in names:
        points = [[result[name, budget] for result in results] for budget in BUDGETS]
        kind = next((kind for kind in COLOURS if name.startswith(kind)), None)
        dashes = {"linear": "--", "0.7": ":", "reuse": "-."}
        axes.errorbar(
            [statistics.mean(v.computed for v in values) for values in points],
            [statistics.mean(v.psnr for v in values) for values in points],
            [statistics.stdev([v.psnr for v in values]) / math.sqrt(len(values)) for values in points],
            label=name,
            color=COLOURS[kind] if kind else next(others),
            linestyle=next((style for word, style in dashes.items() if kind and word in name), "-"),
            alpha=0.5 if kind == "by speed-up" and "no calibration" in name else 1,
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes.set_xlabel(f"computed calls of {2 * STEPS}")
    axes.set_ylabel("PSNR against the uncached video, dB")
    axes.set_title(f"t2v-tiny, {len(results)} pairs of prompt and seed, mean and standard error")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


# What a calibration under other circumstances costs


def calibrate(pipeline, captions: list[str], steps: int, shift: float) -> list[np.ndarray]:
    """Products of every caption."""
    calibration = magcache.apply_full_calibration(pipeline.model, steps, magcache.noise_levels(steps, shift), GUIDANCE)
    found = []
    for i, caption in enumerate(tqdm(captions, desc=f"calibrating, {steps} steps, shift {shift:g}")):
        pipeline.generate(caption, (64, 64), 17, sampling_steps=steps, shift=shift, seed=7000 + i)
        found.append(calibration.products.copy())
    magcache.remove_magcache(pipeline.model)
    return found


def stretched(products: np.ndarray) -> np.ndarray:
    """Products of another number of steps by nearest index, as ratio tables are resampled."""
    index = np.round(np.linspace(0, len(products) - 1, STEPS)).astype(int)
    return products[np.ix_(index, index, index)]


def transfer(task: str, pairs: list) -> None:
    pipeline = pipeline_of(task)
    captions = CALIBRATION_PROMPTS.read_text(encoding="utf-8").splitlines()
    own = calibrate(pipeline, captions, STEPS, SHIFT)
    other_shift = np.mean(calibrate(pipeline, captions, STEPS, 3.0), axis=0)
    other_steps = stretched(np.mean(calibrate(pipeline, captions, 30, SHIFT), axis=0))
    sigmas = magcache.noise_levels(STEPS, SHIFT)
    sources = {
        "8 prompts, as shipped": np.mean(own, axis=0),
        "at shift 3": other_shift,
        "at 30 steps, by nearest index": other_steps,
    } | {f"prompt {i + 1} alone": products for i, products in enumerate(own)}
    planned = {
        (source, budget): plan_by_products(products, sigmas, budget // 2)
        for source, products in sources.items()
        for budget in BUDGETS
    }
    results = [measure(pipeline, ours(planned), *pair) for pair in tqdm(pairs, desc="pairs")]
    totals = [(forecast_errors(planned[next(iter(sources)), 38], p) * step_weights(sigmas)).sum() for p in own]
    print(
        f"error predicted for the shipped schedule at 38 calls by each prompt's own calibration: mean "
        f"{statistics.mean(totals):.3f}, standard deviation {statistics.stdev(totals):.3f}, "
        f"{min(totals):.3f} to {max(totals):.3f}\n"
    )
    print(f"| calibrated | {' | '.join(f'{budget} calls' for budget in BUDGETS)} |")
    print("|---|---|---|---|")
    for source in sources:
        cells = (mean_and_error([result[source, budget].psnr for result in results]) for budget in BUDGETS)
        print(f"| {source} | {' | '.join(cells)} |")


# What our constants were chosen by


def choices(task: str) -> None:
    products, measured_on = load_products(magcache.load_table(task).path.with_suffix(".npz"))
    # the error of the MagCache rule when residual a stands in for residual j, both branches together
    table_errors = np.zeros((STEPS, STEPS))
    for ratios in split_branches(magcache.load_ratios(task)):
        for a in range(STEPS - 1):
            table_errors[a, a + 1 :] += np.abs(1 - np.cumprod(ratios[a + 1 :]))
    planned = {}
    for budget in (46, 32):
        count = budget // 2
        for power in (1.0, 1.5, 2.0):
            steps = magcache.spread_steps(STEPS, count, power)
            planned[f"spread steps, power {power:g}, linear", budget] = magcache.plan_steps(steps, STEPS, "linear")
        steps, _ = best_steps(table_errors, count)
        planned["steps by the error of the ratio table, linear", budget] = magcache.plan_steps(steps, STEPS, "linear")
        for forecast, power in itertools.product(("linear", "fitted"), (0.0, 0.5, 1.0)):
            schedule = plan_by_products(products, measured_on["sigmas"], count, forecast, power)
            planned[f"searched steps, errors by power {power:g}, {forecast}", budget] = schedule
    pairs = [(prompt, 9000 + i) for i, prompt in enumerate(DEVELOPMENT_PROMPTS.read_text("utf-8").splitlines())]
    results = [measure(pipeline_of(task), ours(planned), *pair) for pair in tqdm(pairs, desc="pairs")]
    print("| PSNR, dB | 46 calls | 32 calls |\n|---|---|---|")
    for name in dict.fromkeys(name for name, _ in planned):
        cells = (mean_and_error([result[name, budget].psnr for result in results]) for budget in (46, 32))
        print(f"| {name} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2v-tiny", choices=("t2v-tiny", "i2v-tiny"))
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--picture", help="draws PSNR over calls")
    parser.add_argument("--only", choices=("transfer", "choices"))
    args = parser.parse_args()
    pairs = unseen_pairs(args.pairs)
    print(f"torch {torch.__version__}, CPU, float32, one thread; {args.task}")
    if args.only:
        transfer(args.task, pairs) if args.only == "transfer" else choices(args.task)
        return
    results = quality(args.task, pairs, args.workers)
    print_table(results)
    if args.task == "t2v-tiny":
        print_ranking(args.task, results)
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
