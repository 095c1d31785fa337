"""Measures a model's magnitude ratios in a full run, in which every call computes."""

import torch

from magcache.patch import attach, run_blocks
from magcache.ratios import CALLS_PER_STEP


class Calibration:
    """Compares every residual with the one before in its branch, token by token (padding tokens do not count).

    Three lists in call order from the second step on: `ratios`, the mean over tokens of |r_t| / |r_{t-1}|; `stds`,
    its standard deviation over tokens (unbiased); `cosine_distances`, the mean of 1 - cos(r_t, r_{t-1}). A run begins
    with empty lists.
    """

    def __init__(self, steps: int):
        self.calls = CALLS_PER_STEP * steps
        self.reset()

    def reset(self) -> None:
        self.previous = [None] * CALLS_PER_STEP
        self.ratios, self.stds, self.cosine_distances = [], [], []

    def skips(self, call: int) -> bool:
        return False

    def step(self, call: int, blocks: torch.nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
        out = run_blocks(blocks, x, kwargs)
        residual = (out - x).float()
        is_token = torch.arange(residual.shape[1]) < kwargs["seq_lens"].cpu()[:, None]
        residual = residual[is_token.to(residual.device)]  # [tokens of all samples, C]
        branch = call % CALLS_PER_STEP
        before, self.previous[branch] = self.previous[branch], residual
        if before is not None:
            ratio = residual.norm(dim=-1) / before.norm(dim=-1)
            cosine = torch.nn.functional.cosine_similarity(residual, before, dim=-1, eps=1e-8)
            self.ratios.append(ratio.mean().item())
            self.stds.append(ratio.std().item())
            self.cosine_distances.append((1 - cosine).mean().item())
        return out

    def done(self, call: int, seconds: float) -> None:
        if call == self.calls - 1:
            self.previous = [None] * CALLS_PER_STEP

    @property
    def complete(self) -> bool:
        return len(self.ratios) == self.calls - CALLS_PER_STEP

    def table(self, name: str, measured_on: dict) -> dict:
        """The measured lists, rounded to 5 decimals, in the format of `load_ratios`; raises RuntimeError before the
        run is complete."""
        if not self.complete:
            raise RuntimeError(f"the calibration run stopped after {len(self.ratios)} of {self.calls - 2} ratios")
        lists = {"mag_ratio": self.ratios, "mag_std": self.stds, "cos_dis": self.cosine_distances}
        return {
            "name": name,
            "calibrated_steps": self.calls // CALLS_PER_STEP,
            "order": "cond, uncond interleaved; one pair per step from step 1 on (step 0 has no predecessor)",
            "measured_on": measured_on,
        } | {key: [round(value, 5) for value in values] for key, values in lists.items()}


def apply_calibration(model: torch.nn.Module, steps: int) -> Calibration:
    """Attaches a calibration of `steps` sampling steps with guidance; `magcache.remove_magcache` takes it off.

    Raises the errors of `magcache.apply_magcache`.
    """
    calibration = Calibration(steps)
    attach(model, calibration)
    return calibration
