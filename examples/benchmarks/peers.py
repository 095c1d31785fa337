"""The methods that users might pick instead of this cache, on the demo models, at given numbers of computed calls.

python -m examples.benchmarks.peers [--task i2v-tiny] [--only NAME ...] [--budgets 26 20]   looks for settings
python -m examples.benchmarks.peers --refit             looks only for new thresholds
python -m examples.benchmarks.peers --fit --pairs 4     fits the polynomial of the TeaCache rule

The settings found are in peers.json.

The TeaCache rule (arXiv 2411.19108) and the EasyCache rule (arXiv 2507.02860) are written here after their papers. The
others are diffusers' own code, with the same weights in its `WanTransformer3DModel`: MagCache (2506.09045),
FirstBlockCache (ParaAttention's), TaylorSeer (2503.06923), SeaCache (2602.18993).
"""

import argparse
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.attention_dispatch import dispatch_attention_fn

import magcache
from examples.benchmarks.pairs import KINDS_OF, Batch, final_latents, make_batch, pairs_of, pipeline_of
from examples.train_tiny.check_prompts import DEMOS
from magcache.patch import Runner, attach, blocks_hidden, run_blocks
from magcache.trials import closeness, pooled
from wan.modules.model import WanModel, stack_padded
from wan.utils.samplers import sampling_sigmas

STEPS = 50
SHIFT = 5.0
BUDGETS = (46, 38, 32, 26, 20)  # computed calls of 2 * STEPS
TUNING = 9000  # first seed of the pairs that the settings are tuned on
Setting = dict[str, float]


def task_of(model: WanModel) -> str:
    """Returns the task of the demo model with this model's kind of input."""
    return f"{model.config.model_type}-tiny"


class Work:
    """How much the blocks of a model compute in a run: `computed` counts the latest run in calls of all blocks.

    It is measured in multiply-adds of the linear layers under `blocks`, with the first call of a run as the unit, since
    every method computes that one. So a method that runs one of 8 blocks in every call, or everything but attention, is
    charged for what it runs.
    """

    def __init__(self, model: torch.nn.Module, blocks: torch.nn.Module, calls: int):
        self.numbers = itertools.cycle(range(calls))
        self.total, self.unit = 0, None
        linear = [layer for layer in blocks.modules() if isinstance(layer, torch.nn.Linear)]
        self.hooks = [layer.register_forward_hook(self._add) for layer in linear]
        self.hooks.append(model.register_forward_pre_hook(self._begin))
        self.hooks.append(model.register_forward_hook(self._end))

    def _begin(self, model, args) -> None:
        if next(self.numbers) == 0:
            self.total, self.unit = 0, None

    def _end(self, model, args, output) -> None:
        self.unit = self.unit or self.total

    def _add(self, layer, args, output) -> None:
        self.total += args[0].numel() * layer.out_features

    @property
    def computed(self) -> float:
        return self.total / self.unit if self.unit else 0.0

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class Peer:
    """One method. `attach(pipeline, **setting)` is a context in which `pipeline.model` follows it.

    A setting is one of `variants(budget)`; with `bounds`, it also has the "threshold" within them that gives the wanted
    number of computed calls (a lower one gives more).
    """

    name: str
    attach: Callable[..., AbstractContextManager]
    variants: Callable[[int], list[Setting]] = field(default=lambda budget: [{}])
    bounds: tuple[float, float] | None = None

    def setting_for(self, task: str, budget: int) -> Setting:
        """Returns the tuned setting for a demo model and one of `BUDGETS`; raises KeyError for another budget."""
        return SETTINGS[task][self.name][str(budget)]

    @contextmanager
    def running(self, pipeline, setting: Setting) -> Iterator[Work]:
        """Makes `pipeline.model` follow the method within this block; afterwards it is as it was, without a cache. What
        is yielded holds the computed calls of the latest run."""
        own = pipeline.model
        magcache.remove_magcache(own)
        with self.attach(pipeline, **setting):
            model = pipeline.model
            work = Work(model, model.transformer.blocks if hasattr(model, "transformer") else model.blocks, 2 * STEPS)
            try:
                yield work
            finally:
                work.remove()
                pipeline.model = own

    def latents(self, pipeline, setting: Setting, batch: Batch) -> tuple[torch.Tensor, float]:
        """Returns the final latents of the batch and how many calls were computed for it."""
        with self.running(pipeline, setting) as work:
            return final_latents(pipeline.model, batch, STEPS, SHIFT), work.computed


# The TeaCache rule


def relative_change(now: torch.Tensor, before: torch.Tensor) -> float:
    """Returns the mean absolute difference over the mean absolute value before."""
    return ((now - before).abs().mean() / before.abs().mean()).item()


# Relative change of the residual from that of the time modulation, highest power first: `fit_teacache` on four pairs
TEACACHE_POLYNOMIALS = {
    "t2v-tiny": (124044.0, -15403.7, 663.575, -9.79179, 0.0734726),
    "i2v-tiny": (259.944, -277.443, 39.3398, -0.169949, 0.0185018),
}
TEACACHE_WARMUP = 5  # steps; that of the released TeaCache for Wan2.1 in its careful mode


class TeaCache(Runner):
    """The TeaCache rule (arXiv 2411.19108) as it is used on Wan2.1.

    From step to step the relative L1 change of the time modulation, which the blocks get, is mapped by a fitted
    polynomial to a change of the output; a branch reuses its residual while the sum of these since the last computed
    step stays below the threshold. The first `warmup` steps and the last one compute.
    """

    def __init__(self, threshold: float, warmup: int, polynomial: tuple[float, ...], steps: int = STEPS):
        self.threshold, self.warmup, self.polynomial, self.steps = threshold, warmup, polynomial, steps
        super().__init__(magcache.Schedule((None,) * 2 * steps))

    def reset(self) -> None:
        self.residuals, self.before, self.error = [None, None], [None, None], [0.0, 0.0]

    def run(self, call: int, model: torch.nn.Module, forward: Callable[[], object]) -> object:
        with blocks_hidden(model, functools.partial(self.step, call)):
            return forward()

    def step(self, call: int, blocks: torch.nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
        step, branch = divmod(call, 2)
        if step >= self.warmup:
            change = relative_change(kwargs["e"], self.before[branch])
            self.error[branch] += max(0.0, float(np.polyval(self.polynomial, change)))
        self.before[branch] = kwargs["e"]
        if self.warmup <= step < self.steps - 1 and self.error[branch] < self.threshold:
            return x + self.residuals[branch]
        self.error[branch] = 0.0
        out = run_blocks(blocks, x, **kwargs)
        self.residuals[branch] = out - x if step < self.steps - 1 else None
        return out


@contextmanager
def teacache(pipeline, threshold: float, warmup: int) -> Iterator[None]:
    attach(pipeline.model, TeaCache(threshold, int(warmup), TEACACHE_POLYNOMIALS[task_of(pipeline.model)]))
    try:
        yield
    finally:
        magcache.remove_magcache(pipeline.model)


class Changes(TeaCache):
    """Computes every call and notes the relative changes from step to step: (of the modulation, of the residual)."""

    def __init__(self):
        self.points: list[tuple[float, float]] = []
        super().__init__(threshold=0.0, warmup=STEPS, polynomial=())

    def step(self, call: int, blocks: torch.nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
        branch = call % 2
        modulation, residual = self.before[branch], self.residuals[branch]
        out = super().step(call, blocks, x, **kwargs)
        new = self.residuals[branch]
        if residual is not None and new is not None:  # none is kept of the last step
            self.points.append((relative_change(kwargs["e"], modulation), relative_change(new, residual)))
        return out


def fit_teacache(pipeline, batches: list[Batch]) -> np.ndarray:
    """Fits a polynomial of degree 4 by least squares to both branches and all pairs, from the first reusable step on.
    Returns its coefficients, highest power first. Earlier steps would spoil the fit: their modulation changes as little
    as that of later ones, but their residual by 20 %."""
    changes = Changes()
    attach(pipeline.model, changes)
    for batch in batches:
        final_latents(pipeline.model, batch, STEPS, SHIFT)
    magcache.remove_magcache(pipeline.model)
    first = 2 * (TEACACHE_WARMUP - 1)  # a step's change is from the one before
    points = np.array(changes.points).reshape(len(batches), -1, 2)[:, first:]
    modulation, residual = points.reshape(-1, 2).T
    polynomial = np.polyfit(modulation, residual, 4)
    off = np.sqrt(((residual - np.polyval(polynomial, modulation)) ** 2).mean())
    print(f"residual changes of {residual.min():.3f} to {residual.max():.3f}, predicted within {off:.3f} (RMS)")
    return polynomial


# The EasyCache rule


class EasyCache(torch.nn.Module):
    """The EasyCache rule (arXiv 2507.02860) around a model that is called as the pipelines do.

    Input x and output v of the whole model count. The rate |v - v'| / |x - x'| between the last two computed steps
    hardly changes in time, so with the change of x since the step before it predicts the relative change of v. While
    these changes add up to less than the threshold, a step returns x + (v - x of the last computed step). The cond
    branch decides for both. The first `warmup` steps and the last one compute. |.| is the mean absolute value.
    """

    def __init__(self, model: WanModel, threshold: float, warmup: int, steps: int = STEPS):
        super().__init__()
        self.model, self.threshold, self.warmup, self.steps = model, threshold, warmup, steps
        self.numbers = itertools.cycle(range(2 * steps))

    @property
    def blocks(self) -> torch.nn.Module:
        return self.model.blocks

    def forward(self, x: list[torch.Tensor], t: torch.Tensor, **kwargs) -> list[torch.Tensor]:
        step, branch = divmod(next(self.numbers), 2)
        (latent,) = x
        if branch == 0:
            self.compute = self.decide(step, latent)
        if not self.compute:
            return [latent + self.offset[branch]]
        (velocity,) = self.model(x, t=t, **kwargs)
        self.offset[branch] = velocity - latent
        if branch == 0:
            if self.computed is not None:
                before, velocity_before = self.computed
                self.rate = ((velocity - velocity_before).abs().mean() / (latent - before).abs().mean()).item()
            self.computed = latent, velocity
        return [velocity]

    def decide(self, step: int, latent: torch.Tensor) -> bool:
        if step == 0:
            self.computed = self.rate = None
            self.offset, self.error = [None, None], 0.0
        elif step >= self.warmup:
            size = self.computed[1].abs().mean()
            self.error += (self.rate * (latent - self.before).abs().mean() / size).item()
        self.before = latent
        if self.warmup <= step < self.steps - 1 and self.error < self.threshold:
            return False
        self.error = 0.0
        return True


@contextmanager
def easycache(pipeline, threshold: float, warmup: int) -> Iterator[None]:
    pipeline.model = EasyCache(pipeline.model, threshold, int(warmup))
    yield


# Peers that live in diffusers


class ImageAttention:
    """A processor for diffusers' cross-attention to image and text, for a text of `text_len` tokens behind the image's.
    The one in diffusers expects 512 text tokens; the demo model has 16."""

    def __init__(self, text_len: int):
        self.text_len = text_len

    def __call__(self, attn: torch.nn.Module, x: torch.Tensor, context: torch.Tensor, mask: None, rotations: None):
        """x [B, L, dim], context [B, image tokens + text_len, dim] -> [B, L, dim]."""

        def split_heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (attn.heads, -1))

        image, text = context[:, : -self.text_len], context[:, -self.text_len :]
        query = split_heads(attn.norm_q(attn.to_q(x)))
        key, value = attn.norm_k(attn.to_k(text)), attn.to_v(text)
        out = dispatch_attention_fn(query, split_heads(key), split_heads(value))
        key, value = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
        out = out + dispatch_attention_fn(query, split_heads(key), split_heads(value))
        return attn.to_out[0](out.flatten(2))


class DiffusersModel(torch.nn.Module):
    """The weights of a text- or image-to-video model in diffusers' transformer, called as the pipelines call theirs.

    It expects calls in the order cond, uncond, cond, ... in runs of `STEPS` steps, and calls `restart` at the start of
    each run.
    """

    def __init__(self, model: WanModel):
        super().__init__()
        config = model.config
        image = config.model_type == "i2v" and config.clip_dim > 0
        self.transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
            image_dim=config.clip_dim if image else None,
            added_kv_proj_dim=config.dim if image else None,
        )
        self.transformer.load_state_dict(convert_wan_transformer_to_diffusers(dict(model.state_dict())))
        if image:
            for block in self.transformer.blocks:
                block.attn2.set_processor(ImageAttention(config.text_len))
        self.eval().requires_grad_(False)
        self.text_len = config.text_len
        self.numbers = itertools.cycle(range(2 * STEPS))
        self.sigmas = sampling_sigmas("unipc", STEPS, SHIFT)
        self.restart: Callable[[], None] = self.transformer._reset_stateful_cache  # as diffusers' pipelines do

    def forward(
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        context: list[torch.Tensor],
        seq_len: int,
        clip_fea: torch.Tensor | None = None,
        y: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Does what `WanModel.forward` does, for samples of one size."""
        latents = torch.cat([torch.stack(part) for part in (x, y) if part], dim=1)
        call = next(self.numbers)
        if call == 0:
            self.restart()
        step, branch = divmod(call, 2)
        where = {"step_index": step, "sigma": float(self.sigmas[step]), "num_inference_steps": STEPS}
        with self.transformer.cache_context(("cond", "uncond")[branch], **where):
            text = stack_padded(context, self.text_len)
            return list(self.transformer(latents, t, text, clip_fea, return_dict=False)[0])


@contextmanager
def in_diffusers(pipeline, make_config: Callable[..., object] | None = None, **setting: float) -> Iterator[None]:
    """Makes the pipeline use diffusers' transformer with the cache of `make_config(**setting)`, or without one."""
    model = DiffusersModel(pipeline.model)
    if make_config:
        model.transformer.enable_cache(make_config(**setting))
    pipeline.model = model
    yield


def magcache_config(task: str, threshold: float, K: int, retention_ratio: float):
    """Makes the setting. One list of ratios serves both branches; it is that of the cond branch in the task's table."""
    return diffusers.MagCacheConfig(
        threshold=threshold,
        max_skip_steps=int(K),
        retention_ratio=retention_ratio,
        num_inference_steps=STEPS,
        mag_ratios=list(magcache.load_ratios(task))[::2],
    )


def diffusers_magcache(pipeline, **setting: float) -> AbstractContextManager:
    return in_diffusers(pipeline, functools.partial(magcache_config, task_of(pipeline.model)), **setting)


def first_block_config(threshold: float):
    return diffusers.FirstBlockCacheConfig(threshold=threshold)


def taylorseer_config(interval: int, warmup: int, order: int, lite: bool, last: int):
    """Makes the setting. lite: the output of the head is forecast and all blocks are skipped; else the output of every
    attention and feed-forward layer is forecast. last: how many steps at the end compute.

    The default patterns of diffusers 0.42 match no layer of its Wan transformer ("attn1" is not "attn").
    """
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=int(interval),
        disable_cache_before_step=int(warmup),
        disable_cache_after_step=STEPS - int(last),
        max_order=int(order),
        taylor_factors_dtype=torch.float32,
        cache_identifiers=None if lite else [r"blocks\.\d+\.(attn1|attn2|ffn)"],
        use_lite_mode=bool(lite),
    )


def taylorseer_steps(interval: int, warmup: int, last: int) -> int:
    """Counts the steps that compute: after the warm-up one is forecast, then the first of every interval computes."""
    return sum(step < warmup or (step - warmup - 1) % interval == 0 or step >= STEPS - last for step in range(STEPS))


def taylorseer_variants(budget: int) -> list[Setting]:
    """Returns variants that give the budget: those of the three shortest intervals that can, each with 1 to 4 or 6
    computed steps at the end and the shortest warm-up (2 steps to a quarter of all) that gives it."""
    warmups: dict[tuple[int, int], int] = {}
    for interval, last, warmup in itertools.product(range(3, 12), (1, 2, 3, 4, 6), range(2, STEPS // 4)):
        if 2 * taylorseer_steps(interval, warmup, last) == budget:
            warmups.setdefault((interval, last), warmup)
    intervals = sorted({interval for interval, _ in warmups})[:3]
    return [
        {"interval": interval, "warmup": warmup, "order": order, "lite": lite, "last": last}
        for (interval, last), warmup in warmups.items()
        for order, lite in itertools.product((1, 2), (0, 1))
        if interval in intervals
    ]


def sea_config(threshold: float, most: int, last: int):
    def latents(transformer: torch.nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        """Leaves out the image's channels, which never change; by default SeaCache takes text-to-video only."""
        return list(args[0][:, : transformer.config.out_channels])

    return diffusers.SeaCacheConfig(
        threshold=threshold,
        cache_end_steps=int(last),
        max_consecutive_cached=int(most),
        raw_vision_callback=latents,
    )


def grid(**choices: tuple) -> Callable[[int], list[Setting]]:
    """Makes a function that returns all combinations, whatever the budget."""
    settings = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return lambda budget: settings


def below_32(few: Callable[[int], list[Setting]], more: Callable[[int], list[Setting]]):
    """Chooses `few` for budgets so small that hardly any of `more` can meet them."""
    return lambda budget: (few if budget < 32 else more)(budget)


def all_peers() -> dict[str, Peer]:
    """Returns the peers that can run here, by name."""

    def diffusers_peer(make_config: Callable[..., object]) -> Callable[..., AbstractContextManager]:
        return functools.partial(in_diffusers, make_config=make_config)

    magcache_variants = below_32(
        grid(K=(6, 8, 10), retention_ratio=(0.1, 0.2)), grid(K=(2, 4, 6), retention_ratio=(0.2,))
    )
    sea_variants = below_32(grid(most=(4, 6, 8), last=(1, 4, 6)), grid(most=(2, 4), last=(1, 4, 6)))

    peers = [
        Peer("TeaCache rule", teacache, grid(warmup=(TEACACHE_WARMUP, 10)), (0.03, 1.0)),
        Peer("EasyCache rule", easycache, grid(warmup=(2, 5, 10)), (0.01, 1.0)),
        Peer("diffusers MagCache", diffusers_magcache, magcache_variants, (0.01, 1.0)),
        Peer("diffusers FirstBlockCache", diffusers_peer(first_block_config), bounds=(0.01, 1.0)),
        Peer("diffusers TaylorSeer", diffusers_peer(taylorseer_config), taylorseer_variants),
    ]
    if hasattr(diffusers, "SeaCacheConfig"):  # since 0.42
        peers.append(Peer("diffusers SeaCache", diffusers_peer(sea_config), sea_variants, (0.03, 10.0)))
    return {peer.name: peer for peer in peers}


# by task, peer and computed calls of 100; tuned on three pairs
SETTINGS: dict[str, dict[str, dict[str, Setting]]] = json.loads(
    (Path(__file__).parent / "peers.json").read_text(encoding="utf-8")
)


def score(
    peer: Peer, pipeline, setting: Setting, batches: list[Batch], truths: list
) -> tuple[list[float], list[float]]:
    """Returns latent PSNR in dB and computed calls of every pair."""
    results = [peer.latents(pipeline, setting, batch) for batch in batches]
    psnrs = [closeness(latents[0], truth[0])[0] for (latents, _), truth in zip(results, truths, strict=True)]
    return psnrs, [computed for _, computed in results]


class Tuner:
    """Looks for the settings of a peer at several budgets; what a threshold gave is remembered for the next budget."""

    def __init__(self, peer: Peer, pipeline, batches: list[Batch], truths: list[torch.Tensor]):
        self.peer, self.pipeline, self.batches, self.truths = peer, pipeline, batches, truths
        self.known: dict[str, dict[float, float]] = {}  # variant -> threshold -> calls

    def nearest(self, variant: Setting, budget: int, trials: int = 8) -> tuple[Setting, float]:
        """Bisects for the threshold that gives about the budget on two pairs. Returns the setting and its calls."""
        if self.peer.bounds is None:
            return variant, budget
        known = self.known.setdefault(str(variant), {})
        for _ in range(trials):
            low = max([t for t, calls in known.items() if calls > budget], default=self.peer.bounds[0])
            high = min([t for t, calls in known.items() if calls <= budget and t > low], default=self.peer.bounds[1])
            best = min(known.values(), key=lambda calls: abs(calls - budget), default=math.inf)
            if abs(best - budget) < 0.25 or high < 1.005 * low:
                break
            threshold = float(f"{math.sqrt(low * high):.4g}")
            setting = variant | {"threshold": threshold}
            calls = [self.peer.latents(self.pipeline, setting, batch)[1] for batch in self.batches[:2]]
            known[threshold] = statistics.mean(calls)
        threshold = min(known, key=lambda t: abs(known[t] - budget))
        return variant | {"threshold": threshold}, known[threshold]

    def tune(self, budget: int, variants: list[Setting]) -> Setting:
        """Returns the setting of the best pooled PSNR among those within one call of the budget (or the nearest)."""
        found = [self.nearest(variant, budget) for variant in variants]
        least = max(1.0, min(abs(calls - budget) for _, calls in found))
        best = (-math.inf, {})
        for setting, calls in found:
            if abs(calls - budget) > least:
                continue
            psnrs, computed = score(self.peer, self.pipeline, setting, self.batches, self.truths)
            print(f"  {setting}, {statistics.mean(computed):.1f} calls, {pooled(psnrs):.1f} dB", flush=True)
            best = max(best, (pooled(psnrs), setting), key=lambda one: one[0])
        return best[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(DEMOS), default="t2v-tiny")
    parser.add_argument("--only", nargs="+", choices=tuple(all_peers()), default=tuple(all_peers()))
    parser.add_argument("--budgets", nargs="+", type=int, choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of every kind")
    parser.add_argument("--refit", action="store_true", help="keep all of peers.json but the thresholds")
    parser.add_argument("--fit", action="store_true", help="fit the polynomial of the TeaCache rule instead")
    args = parser.parse_args()
    pipeline = pipeline_of(args.task)
    pairs = [pair for kind in KINDS_OF[args.task] for pair in pairs_of(kind, args.pairs, TUNING)]
    batches = [make_batch(pipeline, [pair]) for pair in pairs]
    if args.fit:
        print(tuple(float(f"{c:.6g}") for c in fit_teacache(pipeline, batches)))
        return
    truths = [final_latents(pipeline.model, batch, STEPS, SHIFT) for batch in batches]
    for name in args.only:
        peer = all_peers()[name]
        tuner = Tuner(peer, pipeline, batches, truths)
        for budget in args.budgets:
            variants = peer.variants(budget)
            if args.refit:
                known = peer.setting_for(args.task, budget)
                variants = [{key: value for key, value in known.items() if key != "threshold"}]
            print(f"{name!r}, {budget}: {tuner.tune(budget, variants)}", flush=True)


if __name__ == "__main__":
    main()
