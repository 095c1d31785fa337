"""The pairs of prompt and seed that the benchmarks measure on, and their final latents, many in one forward pass."""

import copy
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

import magcache
import wan.pipeline
from examples.train_tiny.check_prompts import first_frame, load_demo
from examples.train_tiny.shapes import CAPTIONS, FRAMES, SIZE, Caption, opened
from magcache.app.media import to_uint8
from magcache.schedule import Schedule
from wan.utils.samplers import make_sampler

GUIDE_SCALE = 5.0
BLOCK = 128  # pairs that are drawn together
KINDS_OF = {"t2v-tiny": ("told", "open"), "i2v-tiny": ("told",)}  # kinds of pairs, by task

Pair = tuple[Caption, int]


def pairs_of(kind: str, count: int, seed: int) -> list[Pair]:
    """Returns that many captions, each with a seed of its own, from `seed` on. kind: "told", the whole caption; "open",
    with one or more parts left out. They are drawn in blocks, which stay the same when more pairs are asked for."""
    pairs = []
    for first in range(seed, seed + count, BLOCK):
        rng = random.Random(f"{kind} {first}")
        captions = rng.choices(CAPTIONS, k=min(BLOCK, seed + count - first))
        if kind == "open":
            captions = [opened(caption, rng) for caption in captions]
        pairs += [(caption, first + i) for i, caption in enumerate(captions)]
    return pairs


class Experts:
    """Two transformers that share a run, as Wan2.2's: `pair` is the one from the boundary up, the one below."""

    boundary = 0.875

    def __init__(self, *pair: torch.nn.Module):
        self.pair = list(pair)

    def __call__(self, x: list[torch.Tensor], t: torch.Tensor, **given) -> list[torch.Tensor]:
        return self.pair[int(t.max() < 1000 * self.boundary)](x, t=t, **given)


def disturbed(model: torch.nn.Module, share: float) -> torch.nn.Module:
    """Returns a copy with noise on the weights of its blocks' linear layers: this share of their standard deviation."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight += share * module.weight.std() * torch.randn(module.weight.shape, generator=generator)
    return model


# two experts of one demo model: the noise on the one for high noise
EXPERTS = {"t2v-tiny twice": 0.0, "t2v-tiny, disturbed": 0.1}


@functools.cache
def pipeline_of(task: str):
    torch.set_num_threads(1)
    if task not in EXPERTS:
        return load_demo(task)
    pipeline = load_demo("t2v-tiny")
    pipeline.model = Experts(disturbed(pipeline.model, EXPERTS[task]), pipeline.model)
    return pipeline


@dataclass(frozen=True)
class Batch:
    """What a transformer gets for some pairs. noise: [B, 16, f, h, w]. contexts: text features of the prompts and of
    the negative prompts. given: its other arguments."""

    noise: torch.Tensor
    contexts: tuple[list[torch.Tensor], list[torch.Tensor]]
    given: dict


@torch.inference_mode()
def make_batch(pipeline, pairs: Sequence[Pair]) -> Batch:
    shape = pipeline.latent_shape((SIZE, SIZE), FRAMES)
    noise = torch.stack([pipeline.noise(shape, seed) for _, seed in pairs])
    texts = [str(caption) for caption, _ in pairs]
    contexts = tuple(
        pipeline.text_encoder(t, pipeline.device) for t in (texts, [pipeline.config.sample_neg_prompt] * len(texts))
    )
    given = {"seq_len": pipeline.token_count(shape)}
    if isinstance(pipeline, wan.WanI2V):
        # as the file that the command line would get
        images = [Image.fromarray(to_uint8(first_frame(*pair).permute(1, 2, 0))) for pair in pairs]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images]
        given["y"] = [pipeline.condition([image], shape, FRAMES) for image in pixels]
        given["clip_fea"] = pipeline.encode_images(pixels, offload_model=False)
    return Batch(noise, contexts, given)


def guided(model, batch: Batch, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Returns the guided velocities [B, 16, f, h, w] at a timestep."""
    cond, uncond = (
        torch.stack(model(list(latents), t=t.expand(len(latents)), context=context, **batch.given))
        for context in batch.contexts
    )
    return uncond + GUIDE_SCALE * (cond - uncond)


@torch.inference_mode()
def final_latents(model, batch: Batch, steps: int, shift: float) -> torch.Tensor:
    """Returns the final latents [B, 16, f, h, w] by UniPC, with whatever cache is on the model."""
    sampler, latents = make_sampler("unipc", steps, shift), batch.noise
    for t in sampler.timesteps:
        latents = sampler.step(guided(model, batch, latents, t), t, latents, return_dict=False)[0]
    return latents


def cached_latents(model, batch: Batch, shift: float, schedule: Schedule) -> torch.Tensor:
    """Returns the final latents of a run that follows the schedule."""
    attached = model.pair if isinstance(model, Experts) else model
    magcache.apply_magcache(attached, schedule)
    try:
        return final_latents(model, batch, schedule.steps, shift)
    finally:
        magcache.remove_magcache(attached)
