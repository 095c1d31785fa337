"""How much does an error in one step change the result? On the demo models, beside what was published for Wan2.1.

python -m examples.benchmarks.gain [--picture examples/gain.png]

The guided prediction of one step is replaced by that of the step before; all other steps are computed. The gain is the
error of the final latent over that of the prediction, both as root mean squares. 50 steps, shift 5.
"""

import argparse
import copy
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from examples.benchmarks.pairs import Batch, Pair, guided, make_batch, pairs_of, pipeline_of
from examples.benchmarks.quality import BATCH, KINDS, SHIFT, STEPS
from wan.utils.samplers import make_sampler

AT = (1, 3, 6, 10, 15, 20, 30, 40, 48)
UNSEEN = 80000  # first seed of the pairs


def published(step: np.ndarray) -> np.ndarray:
    """The gain of Wan2.1-T2V-1.3B as RA-CFGCache (arXiv 2609.36433) fitted it, at steps of 50."""
    return 1.214 * ((STEPS - 1 - step) / (STEPS - 1)) ** 3.832 + 0.2463


@torch.inference_mode()
def gains(model, batch: Batch, at: Sequence[int]) -> np.ndarray:
    """Returns the gain of every step in `at` for every pair, [len(at), B]."""
    sampler, latents, before, forks = make_sampler("unipc", STEPS, SHIFT), batch.noise, None, {}
    for step, t in enumerate(sampler.timesteps):
        velocity = guided(model, batch, latents, t)
        if step in at:
            forks[step] = copy.deepcopy(sampler), latents, before, (velocity - before).flatten(1).norm(dim=1)
        latents, before = sampler.step(velocity, t, latents, return_dict=False)[0], velocity
    truth, found = latents, []
    for first in at:
        sampler, latents, replaced, error = forks[first]
        for step, t in enumerate(sampler.timesteps[first:]):
            velocity = guided(model, batch, latents, t) if step else replaced
            latents = sampler.step(velocity, t, latents, return_dict=False)[0]
        found.append((latents - truth).flatten(1).norm(dim=1) / error)
    return torch.stack(found).numpy()


def measure(task: str, pairs: list[Pair]) -> np.ndarray:
    pipeline = pipeline_of(task)
    return gains(pipeline.model, make_batch(pipeline, pairs), AT)


def draw(everything: dict[str, np.ndarray], path: str) -> None:
    from matplotlib.figure import Figure  # without pyplot, so that no window system is looked for

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(STEPS)
    axes.plot(steps, published(steps), color="black", label="Wan2.1-T2V-1.3B, as published (RA-CFGCache's fit)")
    for kind, found in everything.items():
        axes.plot(AT, found.mean(axis=1), marker="o", label=f"{kind}: mean of {found.shape[1]} pairs")
    axes.set_yscale("log")
    axes.set_xlabel(f"step of {STEPS} whose prediction is replaced by the one before")
    axes.set_ylabel("error of the final latent\nover that of the prediction")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="pairs of every kind")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--picture", metavar="PNG")
    args = parser.parse_args()
    everything = {}
    print(f"| final over local error, mean (median); step | {' | '.join(map(str, AT))} |\n|---|{'---|' * len(AT)}")
    with ProcessPoolExecutor(args.workers, torch.multiprocessing.get_context("spawn")) as pool:
        for kind, (task, said) in KINDS.items():
            pairs = pairs_of(said, args.pairs, UNSEEN)
            jobs = [pool.submit(measure, task, pairs[i : i + BATCH]) for i in range(0, len(pairs), BATCH)]
            found = np.concatenate([job.result() for job in tqdm(jobs, desc=kind, unit="batch")], axis=1)
            cells = (
                f"{mean:.2f} ({middle:.2f})" for mean, middle in zip(found.mean(1), np.median(found, 1), strict=True)
            )
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
            everything[kind] = found
    print(f"| Wan2.1-T2V-1.3B, published | {' | '.join(f'{gain:.2f}' for gain in published(np.array(AT)))} |")
    if args.picture:
        draw(everything, args.picture)


if __name__ == "__main__":
    main()
