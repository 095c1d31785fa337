"""Measures on the demo models what MagCache gains in time and costs in quality, next to the plain alternatives.

python -m examples.benchmark [--task t2v-tiny|i2v-tiny] [--pairs 24] [--only speed|calibration|quality]

Speed: wall time of the denoise loop, uncached over cached, as a share of the bound (all calls / computed calls): the
median over rounds of one uncached and the cached runs each, since what else the machine does slows any of them. Beside
it, the time of the computed calls within a cached loop over that loop's time, which needs no second run. The random
model is as large as a laptop can run: on the demo model sampler and embeddings weigh more than they do on a real one.
Calibration: the same for a calibrating loop over an uncached one.
Quality: PSNR against the uncached 50-step video of the same prompt and seed, mean and standard error, at the number of
calls that three settings of MagCache compute: of MagCache, of simply taking fewer sampler steps, and of other steps and
forecasts (`--magcache_speedup`, `--magcache_forecast`).
"""

import argparse
import contextlib
import math
import random
import statistics
import time

import torch
from tqdm import tqdm

import magcache
from examples.train_tiny.check_prompts import DEMOS, check_pairs, generate, load_demo, psnr
from examples.train_tiny.shapes import CAPTIONS, Caption
from wan.modules.model import WanModel
from wan.utils.samplers import make_sampler

STEPS = 50
SETTINGS = ((0.12, 2), (0.12, 4), (0.24, 6))


def schedule_of(task: str, thresh: float, K: int) -> magcache.Schedule:
    return magcache.plan(magcache.load_ratios(task), STEPS, thresh, K)


@torch.inference_mode()  # as the pipelines do
def denoise_seconds(model: WanModel, shape: tuple[int, ...], context: list, steps: int = STEPS) -> float:
    latent, tokens = torch.randn(shape), math.prod(shape[1:]) // 4
    sampler = make_sampler("unipc", steps, 5.0)
    start = time.perf_counter()
    for t in sampler.timesteps:
        cond, uncond = (model([latent], t=t[None], context=[c], seq_len=tokens)[0] for c in context)
        velocity = uncond + 5.0 * (cond - uncond)
        latent = sampler.step(velocity[None], t, latent[None], return_dict=False)[0][0]
    return time.perf_counter() - start


def speed(name: str, model: WanModel, shape: tuple[int, ...], context: list, rounds: int) -> None:
    schedules = [schedule_of("t2v-tiny", *setting) for setting in SETTINGS[:2]]
    speedups, in_blocks = ([[] for _ in schedules] for _ in range(2))
    denoise_seconds(model, shape, context, steps=2)  # warms up
    for _ in tqdm(range(rounds), desc=name):
        magcache.remove_magcache(model)
        uncached = denoise_seconds(model, shape, context)
        for i, schedule in enumerate(schedules):
            cache = magcache.apply_magcache(model, schedule)
            seconds = denoise_seconds(model, shape, context)
            speedups[i].append(uncached / seconds)
            in_blocks[i].append(sum(t for _, skipped, t in cache.log if not skipped) / seconds)
    magcache.remove_magcache(model)
    for i, (thresh, K) in enumerate(SETTINGS[:2]):
        speedup, bound = statistics.median(speedups[i]), schedules[i].speedup_bound
        print(
            f"{name}, thresh {thresh}, K {K}: {schedules[i].computed} of {2 * STEPS} calls, {speedup:.2f}x of at most "
            f"{bound:.2f}x, share {speedup / bound:.3f} (rounds: {min(speedups[i]) / bound:.3f} to "
            f"{max(speedups[i]) / bound:.3f}); computed calls took {statistics.median(in_blocks[i]):.3f} of the loop",
            flush=True,
        )


def calibration_cost(model: WanModel, shape: tuple[int, ...], context: list, rounds: int) -> None:
    kinds = {
        "calibrating": lambda: magcache.apply_calibration(model, STEPS),
        "fully calibrating": lambda: magcache.apply_full_calibration(
            model, STEPS, magcache.noise_levels(STEPS, 5.0), guidance_scale=5.0
        ),
    }
    costs = {kind: [] for kind in kinds}
    denoise_seconds(model, shape, context, steps=2)  # warms up
    for _ in tqdm(range(rounds), desc="calibration"):
        magcache.remove_magcache(model)
        uncached = denoise_seconds(model, shape, context)
        for kind, apply in kinds.items():
            apply()
            costs[kind].append(100 * (denoise_seconds(model, shape, context) / uncached - 1))
    magcache.remove_magcache(model)
    for kind, values in costs.items():
        print(
            f"demo model: a {kind} loop takes {statistics.median(values):.1f} % more time than an uncached one "
            f"(rounds: {min(values):.1f} to {max(values):.1f} %)",
            flush=True,
        )


def random_model() -> tuple[WanModel, tuple[int, ...], list]:
    """8 blocks, width 768, 1,000 tokens."""
    torch.manual_seed(0)
    model = WanModel(dim=768, ffn_dim=3072, num_heads=6, num_layers=8, text_dim=64, text_len=64).eval()
    return model.requires_grad_(False), (16, 5, 20, 40), [torch.randn(20, 64), torch.randn(5, 64)]


def mean_and_error(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({statistics.stdev(values) / math.sqrt(len(values)):.1f})"


def benchmark_pairs(count: int) -> list[tuple[Caption, int]]:
    """Random captions and seeds, none of which the prompt check or the calibration (seed 77) uses."""
    used = {caption for caption, _ in check_pairs()}
    chosen = random.Random(2026).sample([caption for caption in CAPTIONS if caption not in used], count)
    return [(caption, 5000 + i) for i, caption in enumerate(chosen)]


def methods(task: str) -> dict[tuple[str, str], magcache.Schedule | int]:
    """(budget, method) -> a schedule, or a number of sampler steps without a cache."""
    found = {}
    for thresh, K in SETTINGS:
        schedule = schedule_of(task, thresh, K)
        budget, count = f"{thresh}, {K}", schedule.computed // 2
        found[budget, "MagCache"] = schedule
        found[budget, "MagCache, linear"] = magcache.plan(
            magcache.load_ratios(task), STEPS, thresh, K, forecast="linear"
        )
        found[budget, "fewer steps, no cache"] = math.ceil(schedule.computed / 2)  # an odd count in favour of this
        found[budget, "spread steps, linear"] = magcache.plan_steps(
            magcache.spread_steps(STEPS, count), STEPS, "linear"
        )
        for forecast in ("reuse", "linear"):
            with contextlib.suppress(ValueError):  # a model without a full calibration
                steps = magcache.best_steps_for(task, {}, count, forecast)
                found[budget, f"searched steps, {forecast}"] = magcache.plan_steps(steps, STEPS, forecast)
    return found


def quality(task: str, pairs: list[tuple[Caption, int]]) -> None:
    pipeline, runs = load_demo(task), methods(task)
    scores = {key: [] for key in runs}
    for caption, seed in tqdm(pairs, desc=f"quality of {task}"):

        def video(run=None, caption=caption, seed=seed):
            magcache.remove_magcache(pipeline.model)
            if isinstance(run, magcache.Schedule):
                magcache.apply_magcache(pipeline.model, run)
            return generate(pipeline, caption, seed, sampling_steps=run if isinstance(run, int) else STEPS)

        reference = video()
        for key, run in runs.items():
            scores[key].append(psnr(video(run), reference))
    print(
        f"{task}: PSNR in dB against the uncached {STEPS}-step video, {len(pairs)} (prompt, seed) pairs, "
        "mean (standard error)"
    )
    print("| thresh, K | computed calls | method | PSNR | minus MagCache's |")
    print("|---|---|---|---|---|")
    for (budget, method), run in runs.items():
        computed = 2 * run if isinstance(run, int) else run.computed
        values, plain = scores[budget, method], scores[budget, "MagCache"]
        paired = [a - b for a, b in zip(values, plain, strict=True)]
        print(f"| {budget} | {computed} | {method} | {mean_and_error(values)} | {mean_and_error(paired)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2v-tiny", choices=tuple(DEMOS), help="of the quality part")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--only", choices=("speed", "calibration", "quality"))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, float32")
    pipeline = load_demo("t2v-tiny")
    context, context_null = pipeline.encode_text(str(CAPTIONS[0]), "", offload_model=True)
    demo = (pipeline.model, (16, 5, 8, 8), [context[0], context_null[0]])
    if args.only in (None, "speed"):
        speed("demo model", *demo, rounds=15)
        speed("random model", *random_model(), rounds=2)
    if args.only in (None, "calibration"):
        calibration_cost(*demo, rounds=15)
    if args.only in (None, "quality"):
        quality(args.task, benchmark_pairs(args.pairs))


if __name__ == "__main__":
    main()
