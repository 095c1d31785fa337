"""Measures on the demo models how close the videos of every method come to the uncached ones, at equal computed calls.

python -m examples.benchmark_quality [--only methods|settings|choices] [--picture examples/quality.png]

Truth: the uncached video of the same prompt, seed, steps and shift. PSNR and SSIM of its frames: mean and standard
error over pairs of prompt and seed that nothing was calibrated or tuned on; scatter: their standard deviation. Time:
the uncached run's over the method's, decoding included, median over pairs; every worker has one thread.

methods: 50 steps, shift 5, at several numbers of computed calls: both rules of this package, fewer sampler steps
without a cache, and the methods of `examples.peers`.
settings: the speed-up rule and fewer sampler steps at other steps and shifts.
choices (only when asked for): what the constants of the speed-up rule were chosen by, on other pairs.
"""

import argparse
import dataclasses
import functools
import json
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
from tqdm import tqdm

import magcache
import wan.pipeline
from examples import peers
from examples.train_tiny.check_prompts import DEMOS, check_pairs, generate, load_demo
from examples.train_tiny.shapes import CAPTIONS, Caption
from magcache import speedup
from magcache.app.compare import score
from magcache.app.media import to_frames
from magcache.schedule import Schedule, join_branches
from magcache.trials import read_trials

STEPS, SHIFT = peers.STEPS, peers.SHIFT
BUDGETS = peers.BUDGETS  # computed calls of 2 * STEPS
# thresh, K and retention that compute so many calls, by task
RULES = {"t2v-tiny": {46: (0.12, 2), 38: (0.13, 4), 32: (0.24, 6), 26: (0.16, 5, 0.1), 20: (0.5, 7, 0.1)}}
RULES["i2v-tiny"] = RULES["t2v-tiny"] | {38: (0.1, 4)}
SETTINGS = ((30, 5.0), (50, 3.0), (40, 8.0), (24, 3.0), (40, 3.0))  # steps, shift
CHOICES = ((50, 5.0), (30, 5.0), (40, 3.0))
SHARES = (0.46, 0.32, 0.22)  # of the steps that compute
HERE = Path(__file__).parent
DEVELOPMENT_PROMPTS = HERE / "development_prompts.txt"  # what our constants were chosen on
PLAIN, OURS = "fewer sampler steps", "speed-up rule"
TRIED = "speed-up rule, constants by trials"  # what a run with the table of the demo model takes
COLOURS = {"MagCache": "tab:blue", TRIED: "tab:orange", OURS: "tab:red", PLAIN: "black"}

Pair = tuple[Caption, int]
# the video of (pipeline, caption, seed), and how many calls were computed for it
Run = Callable[[object, Caption, int], tuple[torch.Tensor, float]]


@dataclass(frozen=True)
class Result:
    psnr: float
    ssim: float
    computed: float
    time: float  # the uncached run's over this one's


def unseen_pairs(count: int) -> list[Pair]:
    """Random captions, none of which was calibrated or tuned on, with seeds of their own. 24 of them, as in the
    tables, were not checked either; the second half of the check came later, and 48 share one with it."""
    seen = {str(caption) for caption, _ in [*check_pairs()[:24], *peers.own_pairs(6, 9000), *peers.own_pairs(6, 9100)]}
    for file in (HERE / "train_tiny" / "calibration_prompts.txt", DEVELOPMENT_PROMPTS):
        seen |= set(file.read_text(encoding="utf-8").splitlines())
    chosen = random.Random(31).sample([caption for caption in CAPTIONS if str(caption) not in seen], count)
    return [(caption, 6000 + i) for i, caption in enumerate(chosen)]


def development_pairs() -> list[Pair]:
    captions = {str(caption): caption for caption in CAPTIONS}
    prompts = DEVELOPMENT_PROMPTS.read_text(encoding="utf-8").splitlines()
    return [(captions[prompt], 9000 + i) for i, prompt in enumerate(prompts)]


@functools.cache
def pipeline_of(task: str):
    torch.set_num_threads(1)
    wan.pipeline.tqdm = lambda timesteps, **_: timesteps  # no bar for each of hundreds of videos
    return load_demo(task)


def follow(schedule: Schedule, shift: float = SHIFT) -> Run:
    def run(pipeline, caption, seed):
        magcache.apply_magcache(pipeline.model, schedule)
        video = generate(pipeline, caption, seed, sampling_steps=schedule.steps, shift=shift)
        magcache.remove_magcache(pipeline.model)
        return video, schedule.computed

    return run


def sample(steps: int, shift: float) -> Run:
    """Without a cache."""

    def run(pipeline, caption, seed):
        return generate(pipeline, caption, seed, sampling_steps=steps, shift=shift), 2 * steps

    return run


def follow_peer(task: str, peer: peers.Peer, budget: int) -> Run:
    return lambda pipeline, caption, seed: peer.video(pipeline, peer.setting_for(task, budget), caption, seed)


def by_rule(task: str, budget: int) -> Schedule:
    rule = RULES[task][budget]
    schedule = magcache.plan(magcache.load_ratios(task), STEPS, *rule)
    if schedule.computed != budget:
        raise ValueError(f"{rule} computes {schedule.computed} calls of {task}, not {budget}")
    return schedule


def methods(task: str, with_peers: bool) -> dict[tuple, Run]:
    """By name and budget."""
    runs, others = {}, peers.all_peers() if with_peers else {}
    constants = read_trials(magcache.load_table(task)).constants
    for budget in BUDGETS:
        runs[OURS, budget] = follow(magcache.plan_speedup(STEPS, 2 * STEPS / budget, SHIFT))
        runs[TRIED, budget] = follow(magcache.plan_speedup(STEPS, 2 * STEPS / budget, SHIFT, constants=constants))
        runs["MagCache: thresh, K", budget] = follow(by_rule(task, budget))
        runs[PLAIN, budget] = sample(budget // 2, SHIFT)
        for name, peer in others.items():
            if name != "fewer steps":
                runs[name, budget] = follow_peer(task, peer, budget)
    return runs


def at_settings(steps: int, shift: float) -> dict[tuple, Run]:
    """By name and number of computed steps."""
    counts, runs = [round(share * steps) for share in SHARES], {}
    for count in counts:
        runs[OURS, count] = follow(magcache.plan_speedup(steps, steps / count, shift), shift)
        runs[PLAIN, count] = sample(count, shift)
    return runs


def variants(steps: int, shift: float) -> dict[tuple, Run]:
    """The speed-up rule with other constants, by name and number of computed steps."""
    sigmas, runs = magcache.noise_levels(steps, shift), {}

    def schedule(count, floor=speedup.FLOOR, decay=speedup.DECAY, forecast="linear"):
        chosen = speedup.choose_steps(sigmas, count, floor)
        weights = speedup.forecast_weights(chosen, sigmas, forecast, decay)
        return Schedule(join_branches([weights] * 2), target="output")

    changes = {OURS: {}, "reuse": {"forecast": "reuse"}}
    changes |= {f"floor {x:g}": {"floor": x} for x in (0.002, 0.004, 0.012, 0.018)}
    changes |= {f"decay {x:g}": {"decay": x} for x in (0.0, 0.1, 0.5)}
    for count in (round(share * steps) for share in SHARES):
        for name, change in changes.items():
            runs[name, count] = follow(schedule(count, **change), shift)
    return runs


def measure(task: str, make_runs: Callable[[], dict], steps: int, shift: float, pair: Pair) -> dict[tuple, Result]:
    """The results of all runs on one pair, by their keys."""
    pipeline = pipeline_of(task)
    magcache.remove_magcache(pipeline.model)

    def timed(run: Run) -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        video, computed = run(pipeline, *pair)
        return to_frames(video), computed, time.perf_counter() - start

    truth, _, seconds = timed(sample(steps, shift))
    results = {}
    for key, run in make_runs().items():
        frames, computed, taken = timed(run)
        scores = score(frames, truth)
        results[key] = Result(scores.overall_psnr or math.inf, scores.overall_ssim, computed, seconds / taken)
    return results


def measure_all(pool, task: str, make_runs: Callable[[], dict], steps: int, shift: float, pairs: list[Pair]) -> dict:
    """Lists of results, one a pair, by the keys of the runs."""
    jobs = [pool.submit(measure, task, make_runs, steps, shift, pair) for pair in pairs]
    results = [job.result() for job in tqdm(jobs, desc=f"{task}, {steps} steps, shift {shift:g}", unit="pair")]
    return {key: [result[key] for result in results] for key in results[0]}


def mean_and_error(values: list[float], digits: int = 1) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ({error:.{digits}f})"


def psnrs(results: list[Result]) -> list[float]:
    return [result.psnr for result in results]


def ahead(results: dict, key: tuple, other: tuple) -> str:
    """By how much one run's PSNR is above another's, pair by pair."""
    pairs = zip(psnrs(results[key]), psnrs(results[other]), strict=True)
    return mean_and_error([a - b for a, b in pairs])


def print_methods(task: str, results: dict) -> None:
    for budget in BUDGETS:
        head = f"{task}, {budget} of {2 * STEPS} calls"
        print(f"\n| {head} | calls | PSNR, dB | scatter | SSIM | time | {OURS} minus this, dB |")
        print("|---|---|---|---|---|---|---|")
        for name in dict.fromkeys(name for name, _ in results):
            values = results[name, budget]
            lead = ahead(results, (OURS, budget), (name, budget)) if name != OURS else ""
            print(
                f"| {name} | {statistics.mean(v.computed for v in values):.1f} | {mean_and_error(psnrs(values))} | "
                f"{statistics.stdev(psnrs(values)):.1f} | {mean_and_error([v.ssim for v in values], digits=4)} | "
                f"{statistics.median(v.time for v in values):.2f}x | {lead} |"
            )


def print_settings(task: str, found: dict[tuple, dict]) -> None:
    print(f"\n| {task}: steps, shift; computed steps | {PLAIN} | {OURS} | ahead by |\n|---|---|---|---|")
    for (steps, shift), results in found.items():
        for count in dict.fromkeys(count for _, count in results):
            cells = (mean_and_error(psnrs(results[name, count])) for name in (PLAIN, OURS))
            lead = ahead(results, (OURS, count), (PLAIN, count))
            print(f"| {steps}, {shift:g}; {count} | {' | '.join(cells)} | {lead} |")


def print_choices(task: str, found: dict[tuple, dict]) -> None:
    cells = [(setting, count) for setting, results in found.items() for count in dict.fromkeys(c for _, c in results)]
    names = dict.fromkeys(name for results in found.values() for name, _ in results)
    heads = (f"{steps}, {shift:g}; {count}" for (steps, shift), count in cells)
    print(f"\n| {task} | mean | {' | '.join(heads)} |\n|---|---|{'---|' * len(cells)}")
    for name in names:
        means = [statistics.mean(psnrs(found[setting][name, count])) for setting, count in cells]
        print(f"| {name} | {statistics.mean(means):.2f} | {' | '.join(f'{mean:.1f}' for mean in means)} |")


def draw(tasks: dict[str, dict], path: str) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot, so that no window system is looked for

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (task, results) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        others = (colormaps["tab20"].colors[i] for i in (4, 5, 14, 2, 8, 9, 10, 11, 16))  # no blue, no red
        for name in dict.fromkeys(name for name, _ in results):
            points = [results[name, budget] for budget in BUDGETS]
            colour = next((COLOURS[kind] for kind in COLOURS if name.startswith(kind)), None) or next(others)
            axes.errorbar(
                [statistics.mean(v.computed for v in values) for values in points],
                [statistics.mean(psnrs(values)) for values in points],
                [statistics.stdev(psnrs(values)) / math.sqrt(len(values)) for values in points],
                label=name,
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
            )
        pairs = len(next(iter(results.values())))
        axes.set_title(f"{task}, {pairs} pairs of prompt and seed, mean and standard error", fontsize=10)
        axes.set_xlabel(f"computed calls of {2 * STEPS}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PSNR against the uncached video, dB")
    figure.axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("methods", "settings", "choices"))
    parser.add_argument("--no_peers", action="store_true", help="leaves the methods of others out")
    parser.add_argument("--tasks", nargs="+", default=tuple(DEMOS), choices=tuple(DEMOS))
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--picture", metavar="PNG", help="draws PSNR over calls")
    parser.add_argument("--results", metavar="JSON", help="writes what was measured on every pair")
    args = parser.parse_args()
    pairs = development_pairs() if args.only == "choices" else unseen_pairs(args.pairs)
    print(f"torch {torch.__version__}, CPU, float32, one thread; {len(pairs)} pairs of prompt and seed")
    drawn, written = {}, {}

    def everything(task, make_runs, steps, shift):
        results = measure_all(pool, task, make_runs, steps, shift, pairs)
        for (name, count), values in results.items():
            written[f"{task}, {steps}, {shift:g}, {count}, {name}"] = [dataclasses.asdict(v) for v in values]
        if args.results:
            Path(args.results).write_text(json.dumps(written, indent=1))
        return results

    with ProcessPoolExecutor(args.workers, torch.multiprocessing.get_context("spawn")) as pool:
        for task in args.tasks:
            if args.only in (None, "methods"):
                drawn[task] = everything(task, functools.partial(methods, task, not args.no_peers), STEPS, SHIFT)
                print_methods(task, drawn[task])
            kinds = {None: at_settings, "settings": at_settings, "choices": variants}
            if make := kinds.get(args.only):
                settings = SETTINGS if make is at_settings else CHOICES
                found = {setting: everything(task, functools.partial(make, *setting), *setting) for setting in settings}
                (print_settings if make is at_settings else print_choices)(task, found)
    if args.picture and drawn:
        draw(drawn, args.picture)


if __name__ == "__main__":
    main()
