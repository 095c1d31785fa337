"""Measures on the demo models how close each method comes to the uncached run, at equal numbers of computed calls.

python -m examples.benchmarks.quality [--only methods|settings|experts|constants|peers] [--picture examples/quality.png]

The reference is the final latent of the uncached run of the same prompt, seed, steps and shift. Closeness is the latent
PSNR in dB, whose peak is that latent's range. First come the figures that tell whether it is still the same video: the
pooled PSNR (of the mean squared error over all pairs) with its standard error by resampling the pairs, the share below
30 dB, and the worst tenth; then the mean. Pairs are told (the caption says everything) or open (it leaves parts out),
and nothing was calibrated or tuned on them.

methods: 50 steps, shift 5, at several numbers of computed calls: the speed-up rule with the constants that trials chose
for the model, with the default constants, and with constants that weigh every error alike; MagCache as published; fewer
sampler steps without a cache; TaylorSeer.
peers: other methods, which decide as they run (`examples.benchmarks.peers`), on `--peer_pairs` pairs.
settings: the speed-up rule and fewer sampler steps, with other numbers of steps and shifts.
experts (only on request): two transformers that share a run, as Wan2.2's, with the steps, shift and boundary of its
t2v-A14B: t2v-tiny twice, and t2v-tiny with noise on the weights of the first. Beside the speed-up rule and fewer steps,
for the same twice, the rule for one transformer, whose forecasts know no boundary.
constants (only on request): the runs by which the constants of the speed-up rule were chosen, on pairs of their own.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import magcache
from examples.benchmarks import peers
from examples.benchmarks.pairs import (
    EXPERTS,
    Batch,
    Experts,
    Pair,
    cached_latents,
    final_latents,
    make_batch,
    pairs_of,
    pipeline_of,
)  # fmt: skip
from magcache.schedule import Schedule
from magcache.speedup import DEFAULT, Constants
from magcache.trials import ANOTHER, closeness, pooled, read_trials, share_of_others

STEPS, SHIFT, BUDGETS = peers.STEPS, peers.SHIFT, peers.BUDGETS  # budgets: computed calls of 2 * STEPS
KINDS = {
    "t2v-tiny, told": ("t2v-tiny", "told"),
    "t2v-tiny, open": ("t2v-tiny", "open"),
    "i2v-tiny": ("i2v-tiny", "told"),
} | {task: (task, "told") for task in EXPERTS}
PAIRS = {"t2v-tiny, told": 160, "t2v-tiny, open": 256, "i2v-tiny": 32} | dict.fromkeys(EXPERTS, 64)
UNSEEN, DEVELOPMENT = 30000, 50000  # first seeds of pairs
BATCH = 16
# thresh, K and retention that compute so many calls, by task
RULES = {
    "t2v-tiny": {46: (0.12, 2), 38: (0.12, 4), 32: (0.24, 6), 26: (0.2, 6, 0.1), 20: (0.52, 7, 0.1)},
    "i2v-tiny": {46: (0.12, 2), 38: (0.1, 4), 32: (0.24, 6), 26: (0.16, 5, 0.1), 20: (0.5, 7, 0.1)},
}
SETTINGS = ((30, 5.0), (50, 3.0), (40, 8.0), (24, 3.0), (40, 3.0), (12, 5.0), (8, 5.0))  # steps, shift
EXPERT_STEPS, EXPERT_SHIFT, EXPERT_BUDGETS = 40, 12.0, (40, 32, 24)
SHARES = (0.46, 0.32, 0.22)  # of the steps that compute
PLAIN = "fewer sampler steps"
TRIED, OURS = "`--magcache_speedup`, calibrated", "`--magcache_speedup`, not calibrated"
WHOLE = "the same for one transformer"
ALIKE, PUBLISHED, TAYLOR = "every error alike", "MagCache as published", "diffusers TaylorSeer"
COLOURS = {
    PUBLISHED: "tab:blue",
    TRIED: "tab:red",
    OURS: "tab:orange",
    PLAIN: "black",
    TAYLOR: "tab:green",
}

VARIANTS = {"the rule": (DEFAULT, "linear"), "reuse": (DEFAULT, "reuse")}
VARIANTS |= {f"early {x:g}": (Constants(early=x), "linear") for x in (0.25, 0.4, 0.5, 0.75, 0.875)}
VARIANTS |= {f"floor {x:g}": (Constants(floor=x), "linear") for x in (0.0002, 0.004)}
VARIANTS |= {f"decay {x:g}": (Constants(decay=x), "linear") for x in (0.25, 1.0)}

# final latents of (pipeline, batch), and the calls computed for them
Run = Callable[[object, Batch], tuple[torch.Tensor, float]]
Found = dict[tuple[str, int], list[tuple[float, float]]]  # by method and budget: PSNR and computed calls of every pair


def follow(schedule: Schedule, shift: float = SHIFT) -> Run:
    return lambda pipeline, batch: (cached_latents(pipeline.model, batch, shift, schedule), schedule.computed)


def follow_one(schedule: Schedule, shift: float) -> Run:
    """Of two experts that are the same, the one makes all steps."""
    return lambda pipeline, batch: (cached_latents(pipeline.model.pair[0], batch, shift, schedule), schedule.computed)


def sample(steps: int, shift: float = SHIFT) -> Run:
    """Makes a run without a cache."""
    return lambda pipeline, batch: (final_latents(pipeline.model, batch, steps, shift), 2 * steps)


def follow_peer(task: str, peer: peers.Peer, budget: int) -> Run:
    return lambda pipeline, batch: peer.latents(pipeline, peer.setting_for(task, budget), batch)


def by_rule(task: str, budget: int) -> Schedule:
    rule = RULES[task][budget]
    schedule = magcache.plan(magcache.load_ratios(task), STEPS, *rule)
    if schedule.computed != budget:
        raise ValueError(f"{rule} computes {schedule.computed} calls of {task}, not {budget}")
    return schedule


def methods(task: str) -> dict[tuple, Run]:
    runs, measured = {}, read_trials(magcache.load_table(task))
    taylor = peers.all_peers()[TAYLOR]
    constants = {TRIED: measured.constants if measured else DEFAULT, OURS: DEFAULT, ALIKE: Constants(0.008, 0.0)}
    for budget in BUDGETS:
        for name, chosen in constants.items():
            runs[name, budget] = follow(magcache.plan_speedup(STEPS, 2 * STEPS / budget, SHIFT, constants=chosen))
        runs[PUBLISHED, budget] = follow(by_rule(task, budget))
        runs[PLAIN, budget] = sample(budget // 2)
        runs[TAYLOR, budget] = follow_peer(task, taylor, budget)
    return runs


def adaptive(task: str) -> dict[tuple, Run]:
    """Returns the runs of the peers that decide by what they see, after those of `TRIED`."""
    runs = {key: run for key, run in methods(task).items() if key[0] == TRIED}
    for name, peer in peers.all_peers().items():
        if name != TAYLOR:
            runs |= {(name, budget): follow_peer(task, peer, budget) for budget in BUDGETS}
    return runs


def at_settings(steps: int, shift: float) -> dict[tuple, Run]:
    """Returns runs by name and number of computed steps."""
    runs = {}
    for count in (round(share * steps) for share in SHARES):
        runs[OURS, count] = follow(magcache.plan_speedup(steps, steps / count, shift), shift)
        runs[PLAIN, count] = sample(count, shift)
    return runs


def experts(task: str) -> dict[tuple, Run]:
    runs = {}
    for budget in EXPERT_BUDGETS:
        plan = functools.partial(magcache.plan_speedup, EXPERT_STEPS, 2 * EXPERT_STEPS / budget, EXPERT_SHIFT)
        runs[OURS, budget] = follow(plan(boundary=Experts.boundary), EXPERT_SHIFT)
        runs[PLAIN, budget] = sample(budget // 2, EXPERT_SHIFT)
        if EXPERTS[task] == 0:
            runs[WHOLE, budget] = follow_one(plan(), EXPERT_SHIFT)
    return runs


def variants(changes: dict[str, tuple[Constants, str]], steps: int, shift: float) -> dict[tuple, Run]:
    """Returns runs of the speed-up rule with other constants and forecasts, by name and number of computed steps."""
    sigmas, runs = magcache.noise_levels(steps, shift), {}
    for count in (round(share * steps) for share in SHARES):
        for name, (constants, forecast) in changes.items():
            chosen = magcache.speedup.choose_steps(sigmas, count, constants)
            schedule = magcache.plan_steps(chosen, steps, forecast, shift=shift, decay=constants.decay)
            runs[name, count] = follow(schedule, shift)
        runs[PLAIN, count] = sample(count, shift)
    return runs


def measure(task: str, make_runs: Callable[[], dict], steps: int, shift: float, pairs: list[Pair]) -> Found:
    """Returns the latent PSNRs of the pairs, computed in one batch, by the keys of the runs."""
    pipeline = pipeline_of(task)
    batch = make_batch(pipeline, pairs)
    truth = final_latents(pipeline.model, batch, steps, shift)
    found = {}
    for key, run in make_runs().items():
        latents, computed = run(pipeline, batch)
        found[key] = [(closeness(*both)[0], computed) for both in zip(latents, truth, strict=True)]
    return found


def measure_all(pool, kind: str, make_runs: Callable, steps: int, shift: float, pairs: list[Pair], batch: int) -> Found:
    task, found = KINDS[kind][0], {}
    jobs = [
        pool.submit(measure, task, make_runs, steps, shift, pairs[i : i + batch]) for i in range(0, len(pairs), batch)
    ]
    for job in tqdm(jobs, desc=f"{kind}, {steps} steps, shift {shift:g}", unit="batch"):
        for key, values in job.result().items():
            found.setdefault(key, []).extend(values)
    return found


def psnrs(values: list[tuple[float, float]]) -> list[float]:
    return [psnr for psnr, _ in values]


def resampled(count: int, times: int = 1000) -> np.ndarray:
    """Draws numbers of pairs with replacement, [times, count]."""
    return np.random.default_rng(0).integers(count, size=(times, count))


def pooled_of(psnrs: Sequence[float]) -> np.ndarray:
    """Returns the pooled PSNR of every resampling of the pairs."""
    errors = 10 ** (-np.asarray(psnrs) / 10)
    return 10 * -np.log10(errors[resampled(len(errors))].mean(axis=1))


def cell(psnrs: Sequence[float]) -> str:
    middle = f"{pooled(psnrs):.1f} ({pooled_of(psnrs).std():.1f})"
    return f"{middle}, {share_of_others(psnrs):.0%}, {np.quantile(psnrs, 0.1):.1f}, {np.mean(psnrs):.1f}"


def lead(psnrs: Sequence[float], others: Sequence[float]) -> str:
    """Says how many dB of pooled PSNR the first are ahead (its standard error)."""
    return f"{pooled(psnrs) - pooled(others):+.1f} ({(pooled_of(psnrs) - pooled_of(others)).std():.1f})"


def print_methods(kind: str, found: Found) -> None:
    """Prints a table. A cell holds pooled PSNR (its standard error), share of other videos, worst tenth, mean, and the
    computed calls where the method decides on them as it runs; then come the leads of the first method."""
    names, budgets = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    pairs = len(next(iter(found.values())))
    heads = " | ".join(f"{budget} calls" for budget in budgets)
    print(f"\n| {kind}, {pairs} pairs: pooled, below 30 dB, worst tenth, mean | {heads} |")
    print("|---|" + "---|" * len(budgets))
    for name in names:
        cells = [cell(psnrs(found[name, budget])) for budget in budgets]
        computed = [np.mean([calls for _, calls in found[name, budget]]) for budget in budgets]
        if not np.allclose(computed, budgets):
            cells = [f"{text}; {calls:.1f} calls" for text, calls in zip(cells, computed, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")
    for name in names[1:]:
        leads = (lead(psnrs(found[names[0], budget]), psnrs(found[name, budget])) for budget in budgets)
        print(f"| ahead of {name}, pooled | {' | '.join(leads)} |")


def print_settings(kind: str, everything: dict[tuple, Found]) -> None:
    """Prints a table. A cell holds the computed steps, and by how much the rule is ahead of as many sampler steps."""
    pairs = len(next(iter(next(iter(everything.values())).values())))
    heads = " | ".join(f"{share:.0%} of the steps" for share in SHARES)
    print(f"\n| {kind}, {pairs} pairs: ahead of {PLAIN}, pooled; steps, shift | {heads} |")
    print("|---|" + "---|" * len(SHARES))
    for (steps, shift), found in everything.items():
        counts = dict.fromkeys(count for _, count in found)
        leads = (f"{count}: {lead(psnrs(found[OURS, count]), psnrs(found[PLAIN, count]))}" for count in counts)
        print(f"| {steps}, {shift:g} | {' | '.join(leads)} |")


def draw(everything: dict[str, Found], path: str) -> None:
    from matplotlib.figure import Figure  # without pyplot, so that no window system is looked for

    figure = Figure(figsize=(5 * len(everything), 5), layout="constrained")
    for axes, (kind, found) in zip(
        figure.subplots(1, len(everything), squeeze=False)[0], everything.items(), strict=True
    ):
        for name, colour in COLOURS.items():
            budgets = [budget for method, budget in found if method == name]
            if budgets:
                middle = [pooled(psnrs(found[name, budget])) for budget in budgets]
                spread = [pooled_of(psnrs(found[name, budget])).std() for budget in budgets]
                axes.errorbar(budgets, middle, spread, label=name.replace("`", ""), color=colour, marker="o", capsize=2)
        axes.axhline(ANOTHER, color="gray", linewidth=0.8)
        axes.set_title(f"{kind}: {len(found[PLAIN, BUDGETS[0]])} pairs", fontsize=10)
        axes.set_xlabel(f"computed calls of {2 * STEPS}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("pooled latent PSNR against the uncached run, dB")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("methods", "peers", "settings", "experts", "constants"))
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="share of the pairs to measure, for a quick look")
    parser.add_argument("--peer_pairs", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--picture", metavar="PNG", help="draw pooled PSNR over calls")
    parser.add_argument("--results", metavar="JSON", help="keep results in this file and measure only what it lacks")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, float32, one thread a worker; UniPC, guidance 5")
    results = Path(args.results) if args.results else None
    known = json.loads(results.read_text()) if results and results.exists() else {}

    def everything(kind, make_runs, steps=STEPS, shift=SHIFT, first=UNSEEN, count=None, batch=BATCH) -> Found:
        pairs = pairs_of(KINDS[kind][1], count or int(PAIRS[kind] * args.share), first)
        keys = {
            key: f"{kind}, {steps}, {shift:g}, {len(pairs)} from {first}, {key[1]}, {key[0]}" for key in make_runs()
        }
        if not all(key in known for key in keys.values()):
            found = measure_all(pool, kind, make_runs, steps, shift, pairs, batch)
            known.update({keys[key]: values for key, values in found.items()})
            if results:
                results.write_text(json.dumps(known))
        return {key: known[name] for key, name in keys.items()}

    drawn = {}
    with ProcessPoolExecutor(args.workers, torch.multiprocessing.get_context("spawn")) as pool:
        of_experts = args.only == "experts"
        for kind in args.kinds or [kind for kind, (task, _) in KINDS.items() if (task in EXPERTS) == of_experts]:
            task = KINDS[kind][0]
            if of_experts:
                print_methods(kind, everything(kind, functools.partial(experts, task), EXPERT_STEPS, EXPERT_SHIFT))
            if args.only in (None, "methods"):
                drawn[kind] = everything(kind, functools.partial(methods, task))
                print_methods(kind, drawn[kind])
            if args.only in (None, "peers"):
                # one pair at a time, as they decide by what they see
                found = everything(kind, functools.partial(adaptive, task), count=args.peer_pairs, batch=1)
                print_methods(kind, found)
            if args.only in (None, "settings"):
                runs = {setting: functools.partial(at_settings, *setting) for setting in SETTINGS}
                print_settings(kind, {setting: everything(kind, make, *setting) for setting, make in runs.items()})
            if args.only == "constants":
                make = functools.partial(variants, VARIANTS, STEPS, SHIFT)
                print_methods(kind, everything(kind, make, first=DEVELOPMENT))
    if args.picture and drawn:
        draw(drawn, args.picture)


if __name__ == "__main__":
    main()
