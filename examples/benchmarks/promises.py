"""Do the trials of a table predict videos that they have not seen? Compares expected and measured latent PSNR.

python -m examples.benchmarks.promises [--picture examples/trials.png]

For every pair of prompt and seed the uncached latent is compared with that of every speed-up, planned with the table's
constants. The pairs are of the same kinds as those of the trials: for t2v-tiny half told, half open.
"""

import argparse
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from scipy.stats import spearmanr
from tqdm import tqdm

import magcache
from examples.benchmarks.pairs import KINDS_OF, Pair, cached_latents, final_latents, make_batch, pairs_of, pipeline_of
from examples.benchmarks.quality import BATCH, SHIFT, STEPS, pooled_of
from examples.train_tiny.check_prompts import DEMOS
from magcache.trials import Measured, closeness, pooled, read_trials, share_of_others

SPEEDUPS = (2.0, 2.5, 3.0, 4.0, 5.0)
UNSEEN = 70000  # first seed of the pairs


def read_table(name: str) -> Measured:
    measured = read_trials(magcache.load_table(name))
    if measured is None:
        raise SystemExit(f"the table {name} holds no trials: see calibration/README.md")
    return measured


def plan(measured: Measured, speedup: float) -> magcache.Schedule:
    return magcache.plan_speedup(STEPS, speedup, SHIFT, constants=measured.constants)


def measure(task: str, table: str, speedups: tuple[float, ...], pairs: list[Pair]) -> list[tuple[float, ...]]:
    """Returns for every pair its latent PSNR at each speed-up."""
    pipeline, measured = pipeline_of(task), read_table(table)
    batch = make_batch(pipeline, pairs)
    truth = final_latents(pipeline.model, batch, STEPS, SHIFT)
    runs = [cached_latents(pipeline.model, batch, SHIFT, plan(measured, speedup)) for speedup in speedups]
    found = [[closeness(*both)[0] for both in zip(latents, truth, strict=True)] for latents in runs]
    return list(zip(*found, strict=True))


def print_check(task: str, measured: Measured, speedups: tuple[float, ...], found: list[list[float]]) -> None:
    """Prints a table and a summary. found: for every pair the PSNR at each speed-up."""
    print(f"\n| {task}: speed-up | all videos: expected | measured | below 30 dB: expected | measured |", end="")
    print(" nine of ten: promised | reached it | mean: expected | measured |\n|---|---|---|---|---|---|---|---|---|")
    expected, reached, within = [], 0, 0
    for speedup, psnrs in zip(speedups, zip(*found, strict=True), strict=True):
        expectation = measured.expect(plan(measured, speedup).speedup_bound)
        expected.append(expectation.mean)
        counts = [sum(psnr >= expectation.promised - slack for psnr in psnrs) for slack in (0, 1)]
        reached, within = reached + counts[0], within + counts[1]
        print(
            f"| {speedup:g} | {expectation.pooled:.1f} | {pooled(psnrs):.1f} ({pooled_of(psnrs).std():.1f}) | "
            f"{expectation.others:.0%} | {share_of_others(psnrs):.0%} | {expectation.promised:.1f} | "
            f"{counts[0]} of {len(psnrs)} | {expectation.mean:.1f} | {statistics.mean(psnrs):.1f} |"
        )
    everything = [(mean, psnr) for psnrs in found for mean, psnr in zip(expected, psnrs, strict=True)]
    count, mean = len(everything), statistics.mean(psnr for _, psnr in everything)
    each = statistics.mean(spearmanr(expected, psnrs).statistic for psnrs in found)
    print(
        f"\n{task}: {reached} of {count} reach the promise ({reached / count:.0%}), {within / count:.0%} within 1 dB; "
        f"mean {mean:.1f} dB measured, {statistics.mean(expected):.1f} expected; rank correlation "
        f"{spearmanr(*zip(*everything, strict=True)).statistic:.2f} over all, {each:.2f} within a video"
    )


def draw(checks: dict[str, tuple], path: str) -> None:
    """Draws what was found. checks: for every task the further arguments of `print_check`."""
    from matplotlib.figure import Figure  # without pyplot, so that no window system is looked for

    figure = Figure(figsize=(5.5 * len(checks), 5), layout="constrained")
    for axes, (task, (measured, speedups, found)) in zip(figure.subplots(1, len(checks), squeeze=False)[0],
                                                         checks.items(), strict=True):  # fmt: skip
        columns = list(zip(*found, strict=True))
        expected = [measured.expect(plan(measured, speedup).speedup_bound) for speedup in speedups]
        for number, (expectation, psnrs) in enumerate(zip(expected, columns, strict=True)):
            at = [expectation.mean] * len(psnrs)
            axes.plot(at, psnrs, ".", color="tab:blue", alpha=0.35, label="a video" if number == 0 else None)
        means = [e.mean for e in expected]
        errors = [statistics.stdev(psnrs) / math.sqrt(len(psnrs)) for psnrs in columns]
        axes.errorbar(means, [statistics.mean(p) for p in columns], errors, fmt="o", color="tab:red", capsize=3,
                      label="their mean, standard error")  # fmt: skip
        axes.plot(
            means, [e.promised for e in expected], "_", color="black", markersize=16, label="promised to nine of ten"
        )
        ends = (min(means), max(means))
        axes.plot(ends, ends, color="gray", linewidth=0.8, label="as expected")
        axes.set_title(f"{task}, {len(found)} unseen pairs, {len(measured.prompts)} prompts in its trials", fontsize=10)
        axes.set_xlabel("expected mean of the latent PSNRs, dB")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("measured, dB")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=tuple(DEMOS), choices=tuple(DEMOS))
    parser.add_argument(
        "--tables", nargs="+", metavar="NAME_OR_PATH", help="one table per task (default: the task's own)"
    )
    parser.add_argument("--speedups", nargs="+", type=float, default=SPEEDUPS)
    parser.add_argument("--pairs", type=int, default=48, help="pairs per task")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--picture", metavar="PNG")
    args = parser.parse_args()
    checks, speedups = {}, tuple(args.speedups)
    with ProcessPoolExecutor(args.workers, torch.multiprocessing.get_context("spawn")) as pool:
        for task, table in zip(args.tasks, args.tables or args.tasks, strict=True):
            kinds = KINDS_OF[task]
            pairs = [pair for kind in kinds for pair in pairs_of(kind, args.pairs // len(kinds), UNSEEN)]
            parts = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
            jobs = [pool.submit(measure, task, table, speedups, part) for part in parts]
            found = [psnrs for job in tqdm(jobs, desc=task, unit="batch") for psnrs in job.result()]
            checks[task] = read_table(table), speedups, found
            print_check(task, *checks[task])
    if args.picture:
        draw(checks, str(Path(args.picture)))


if __name__ == "__main__":
    main()
