"""Tiny random transformers, a denoise loop, and what a schedule makes of them, by hand."""

import contextlib
import copy
import itertools

import diffusers
import torch

import magcache

STEPS = 8
TARGETS = ("residual", "output")
RATIOS = magcache.load_ratios("t2v-1.3B")
SIZES = {"text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}


class InDiffusers(diffusers.WanTransformer3DModel):
    """diffusers' transformer, called as Wan's."""

    head = property(lambda self: self.norm_out)

    def forward(self, x, t, context, seq_len):
        return list(super().forward(x[0][None], t, context[0][None], return_dict=False)[0])


MODELS = {"diffusers": lambda: InDiffusers(**SIZES, **HEADS)}
with contextlib.suppress(ImportError):  # the magcache package is tested without ours, too
    from wan.modules.model import WanModel

    MODELS["ours"] = lambda: WanModel(**SIZES, dim=24, num_heads=2, text_len=6)


def make_model(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval().requires_grad_(False)


def make_schedule(target="residual", steps=STEPS, calls_per_step=2, shift=5.0):
    if target == "residual":
        levels = magcache.noise_levels(steps, shift)
        return magcache.plan(RATIOS, steps, 0.3, 3, 0.2, calls_per_step=calls_per_step, sigmas=levels)
    return magcache.plan_speedup(steps, 2, shift, calls_per_step=calls_per_step)


def noise(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def as_wan(model, latent, timestep, context):
    return model([latent], t=timestep, context=[context], seq_len=latent[0].numel() // 4)[0]


def as_diffusers(model, latent, timestep, context, **given):
    """As its pipelines do."""
    given = {"hidden_states": latent[None], "encoder_hidden_states": context[None], "return_dict": False} | given
    return model(timestep=timestep, **given)[0][0]


@torch.no_grad()
def denoise(
    model, steps=STEPS, seed=0, shift=5.0, guidance=True, part=slice(None), side=4,
    as_timestep=lambda level: torch.tensor([int(level)]), call=as_wan, **given,
):  # fmt: skip
    """Euler's method, with guidance 5 or without.

    part: of the steps. side: of the latent. as_timestep: makes the argument of the noise level on a scale of 1000.
    given: further arguments of a call.
    """
    latent, *contexts = noise(seed, (16, 2, side, side), (5, 8), (3, 8))
    for sigma, following in [*itertools.pairwise((*magcache.noise_levels(steps, shift), 0.0))][part]:
        timestep = as_timestep(1000 * sigma)
        answers = [call(model, latent, timestep, context, **given) for context in contexts[: 1 + guidance]]
        velocity = answers[1] + 5 * (answers[0] - answers[1]) if guidance else answers[0]
        latent = latent + (following - sigma) * velocity
    return latent


class ByHand:
    """Follows a schedule without the library: everything runs in every call, and where it should not have, what came
    out is replaced, by the combination of earlier outputs, or in front of the head by tokens plus residual.

    models: what is called, where it is not one model.
    """

    def __init__(self, model, schedule, models=()):
        self.model, self.schedule, self.call = model, schedule, -1
        self.kept = [[] for _ in range(schedule.calls_per_step)]
        if schedule.target == "residual":
            for part in models or [model]:
                part.patch_embedding.register_forward_hook(self.embedded)
                head = part.head if hasattr(part, "head") else part.norm_out
                head.register_forward_pre_hook(self.before_the_head)

    def embedded(self, module, args, out):
        self.tokens = out.flatten(2).transpose(1, 2)

    def before_the_head(self, module, args):
        weights, branch = self.schedule.weights[self.call], self.kept[self.call % self.schedule.calls_per_step]
        if weights is None:
            branch[:] = [args[0].to(self.tokens.dtype) - self.tokens]
            return None
        return ((self.tokens + branch[0]).float(), *args[1:])

    def __call__(self, *args, **kwargs):
        self.call = (self.call + 1) % len(self.schedule.weights)
        out = self.model(*args, **kwargs)[0]
        weights, branch = self.schedule.weights[self.call], self.kept[self.call % self.schedule.calls_per_step]
        if self.schedule.target == "output":
            if weights is None:
                branch.insert(0, out)
            else:
                out = sum(w * v.double() for w, v in zip(weights, branch, strict=False)).to(out.dtype)
        return (out,)


def by_hand(model, schedule, **how):
    return denoise(ByHand(copy.deepcopy(model), schedule), **how)


def count_block_calls(model):
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: calls.append(module))
    return calls
