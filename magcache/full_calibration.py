"""A calibration that also measures how the residuals of all steps relate in what reaches the sampler.

For step j let v_i be what residual i would add to the guided velocity if it stood in for residual j: mean removed,
divided by the token's standard deviation, times 1 + scale (the head's LayerNorm and modulation in step j), times the
head's weight, cond and uncond combined by the guidance scale; and let it count by the step's difference of sigmas, as
it moves the latent. The inner products of the v_i, averaged over a random sample of tokens, give the squared error of
any linear forecast of residual j as a quadratic form, without another run; see `magcache.search`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from magcache.calibrate import Calibration
from magcache.patch import attach
from magcache.ratios import CALLS_PER_STEP

TOKENS = 512


def host_bytes(steps: int, width: int) -> int:
    """Memory on the host for the sampled residuals of all steps, in bytes: float32 of both branches."""
    return CALLS_PER_STEP * steps * TOKENS * width * 4


class FullCalibration(Calibration):
    """Measures `products`, float64 [steps (j), steps, steps], besides the ratios; see the module's docstring.

    sigmas: noise levels of the steps, falling, without the final 0. guidance_scale: weight of cond, 1 - it of uncond.
    """

    def __init__(self, steps: int, sigmas: Sequence[float], guidance_scale: float):
        super().__init__(steps)
        self.weights = (guidance_scale, 1 - guidance_scale)
        self.differences = -np.diff([*sigmas, 0.0])
        self.products = np.zeros((steps, steps, steps))

    def reset(self) -> None:
        super().reset()
        self.samples = None  # [branch, step, token, C], on the CPU
        self.index = None  # of the sampled tokens
        self.seen = [None] * CALLS_PER_STEP  # per branch: what the head does with a residual in this step

    def observe(self, call: int, residual: torch.Tensor) -> None:
        step, branch = divmod(call, CALLS_PER_STEP)
        if self.samples is None:
            count = len(residual)
            chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:TOKENS].sort().values
            self.index = chosen.to(residual.device)
            steps = self.calls // CALLS_PER_STEP
            self.samples = torch.empty(CALLS_PER_STEP, steps, len(chosen), residual.shape[1])
        sample = residual[self.index]
        self.samples[branch, step] = sample - sample.mean(dim=-1, keepdim=True)

    def watched(self, call: int, dit: torch.nn.Module) -> dict[str, Callable]:
        head = dit.head

        def watched_head(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
            self.see_head(call, head, x, e)
            return head(x, e)

        return {"head": watched_head}

    def see_head(self, call: int, head: torch.nn.Module, x: torch.Tensor, e: torch.Tensor) -> None:
        """x: the tokens [1, L, C] after the blocks, e: the time embedding [1, C]."""
        step, branch = divmod(call, CALLS_PER_STEP)
        spread = x[0, self.index].float().var(dim=-1, unbiased=False).add(head.norm.eps).sqrt().cpu()
        scale = 1 + (head.modulation[0, 1] + e[0]).float()
        self.seen[branch] = ((head.head.weight.float() * scale).cpu(), spread)
        if branch == CALLS_PER_STEP - 1:
            self.products[step, : step + 1, : step + 1] = self.inner_products(step)

    def inner_products(self, step: int) -> np.ndarray:
        """[step + 1, step + 1], means over the sampled tokens."""
        velocity = 0
        for weight, samples, (projection, spread) in zip(self.weights, self.samples, self.seen, strict=True):
            velocity = velocity + weight * (samples[: step + 1] @ projection.T) / spread[:, None]
        flat = velocity.flatten(1).double()
        return (flat @ flat.T).numpy() * self.differences[step] ** 2 / velocity.shape[1]

    def done(self, call: int, seconds: float) -> None:
        super().done(call, seconds)
        if call == self.calls - 1:
            self.samples = None


def apply_full_calibration(
    model: torch.nn.Module, steps: int, sigmas: Sequence[float], guidance_scale: float
) -> FullCalibration:
    """Attaches a full calibration of a run with guidance; `magcache.remove_magcache` takes it off. Works for one sample
    at a time. Raises the errors of `magcache.apply_magcache`."""
    calibration = FullCalibration(steps, sigmas, guidance_scale)
    attach(model, calibration)
    return calibration
