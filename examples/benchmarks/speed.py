"""Measures how much time MagCache saves and a calibration costs; for quality see `examples.benchmarks.quality`.

python -m examples.benchmarks.speed [--only speed|calibration]

Speed: wall time of the denoise loop, uncached over cached, as a share of the bound (all calls / computed calls). It is
the median over rounds of one uncached and each cached run, since other work on the machine may slow any of them. Beside
it stands the share of the computed calls in the time of a cached loop, which needs no second run. The random model is
as large as a laptop can run: on the demo model, sampler and embeddings weigh more than on a real one.
Calibration: time of a calibrating loop compared with an uncached one, in the same way.
"""

import argparse
import math
import statistics
import time

import torch
from tqdm import tqdm

import magcache
from examples.train_tiny.check_prompts import load_demo
from examples.train_tiny.shapes import CAPTIONS
from wan.modules.model import WanModel
from wan.utils.samplers import make_sampler

STEPS = 50
SCHEDULES = {
    "thresh 0.12, K 2": magcache.plan(magcache.load_ratios("t2v-tiny"), STEPS, 0.12, 2),
    "thresh 0.12, K 4": magcache.plan(magcache.load_ratios("t2v-tiny"), STEPS, 0.12, 4),
    "speed-up 2.5": magcache.plan_speedup(STEPS, 2.5),
}


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
    speedups, in_computed, reused = ({name: [] for name in SCHEDULES} for _ in range(3))
    denoise_seconds(model, shape, context, steps=2)  # warms up
    for _ in tqdm(range(rounds), desc=name):
        magcache.remove_magcache(model)
        uncached = denoise_seconds(model, shape, context)
        for settings, schedule in SCHEDULES.items():
            told = []

            def note(call: int, skips: bool, told: list = told) -> None:
                told.append((skips, time.perf_counter()))

            magcache.apply_magcache(model, schedule, on_call=note)
            seconds = denoise_seconds(model, shape, context)
            # of uncond calls, each of which follows its cond call at once
            times = [(skips, end - start) for (_, start), (skips, end) in zip(told[::2], told[1::2], strict=True)]
            speedups[settings].append(uncached / seconds)
            in_computed[settings].append(2 * sum(t for skips, t in times if not skips) / seconds)
            reused[settings] += [t for skips, t in times if skips]
    magcache.remove_magcache(model)
    for settings, schedule in SCHEDULES.items():
        speedup, bound = statistics.median(speedups[settings]), schedule.speedup_bound
        shares = [value / bound for value in speedups[settings]]
        print(
            f"{name}, {settings}: {schedule.computed} of {2 * STEPS} calls, {speedup:.2f}x of at most {bound:.2f}x, "
            f"share {speedup / bound:.3f} (rounds: {min(shares):.3f} to {max(shares):.3f}); computed calls took "
            f"{statistics.median(in_computed[settings]):.3f} of the loop, a reused one "
            f"{1000 * statistics.median(reused[settings]):.3f} ms",
            flush=True,
        )


def calibration_cost(model: WanModel, shape: tuple[int, ...], context: list, rounds: int) -> None:
    costs = []
    denoise_seconds(model, shape, context, steps=2)  # warms up
    for _ in tqdm(range(rounds), desc="calibration"):
        magcache.remove_magcache(model)
        uncached = denoise_seconds(model, shape, context)
        magcache.apply_calibration(model, STEPS)
        costs.append(100 * (denoise_seconds(model, shape, context) / uncached - 1))
    magcache.remove_magcache(model)
    print(
        f"demo model: a calibrating loop takes {statistics.median(costs):.1f} % more time than an uncached one "
        f"(rounds: {min(costs):.1f} to {max(costs):.1f} %)",
        flush=True,
    )


def random_model() -> tuple[WanModel, tuple[int, ...], list]:
    """8 blocks, width 768, 1,000 tokens."""
    torch.manual_seed(0)
    model = WanModel(dim=768, ffn_dim=3072, num_heads=6, num_layers=8, text_dim=64, text_len=64).eval()
    return model.requires_grad_(False), (16, 5, 20, 40), [torch.randn(20, 64), torch.randn(5, 64)]


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
