"""Measures what MagCache gains in time and calibrating costs; for the quality see `examples.benchmark_quality`.

python -m examples.benchmark [--only speed|calibration]

Speed: wall time of the denoise loop, uncached over cached, as a share of the bound (all calls / computed calls): the
median over rounds of one uncached and the cached runs each, since what else the machine does slows any of them. Beside
it, the time of the computed calls within a cached loop over that loop's time, which needs no second run. The random
model is as large as a laptop can run: on the demo model sampler and embeddings weigh more than they do on a real one.
Calibration: the same for a calibrating loop over an uncached one.
"""

import argparse
import math
import random
import statistics
import time

import torch
from tqdm import tqdm

import magcache
from examples.train_tiny.check_prompts import check_pairs, load_demo
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


def mean_and_error(values: list[float], digits: int = 1) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ({error:.{digits}f})"


def benchmark_pairs(count: int) -> list[tuple[Caption, int]]:
    """Random captions and seeds, none of which the prompt check, a calibration or the tuning of a method used."""
    used = {caption for caption, _ in check_pairs()}
    chosen = random.Random(2026).sample([caption for caption in CAPTIONS if caption not in used], count)
    return [(caption, 5000 + i) for i, caption in enumerate(chosen)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "calibration"))
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


if __name__ == "__main__":
    main()
