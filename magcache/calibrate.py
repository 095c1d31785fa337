"""Measures a model's magnitude ratios in a full run, in which every call computes."""

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from magcache.patch import Runner, attach, blocks_hidden, find_dit, residual_of, run_blocks
from magcache.schedule import CALLS_PER_STEP, Schedule


class Calibration(Runner):
    """Compares every residual with the one before in its branch, token by token (padding tokens do not count).

    It fills three lists in call order, from the second step on: `ratios`, the mean over tokens of |r_t| / |r_{t-1}|;
    `stds`, its standard deviation over tokens (unbiased); `cosine_distances`, the mean of 1 - cos(r_t, r_{t-1}). A run
    begins with empty lists.

    group: the torch.distributed group of the ranks that share the tokens; each of them gets the figures of all tokens.
    """

    def __init__(self, steps: int, group=None):
        super().__init__(Schedule((None,) * CALLS_PER_STEP * steps))
        self.group = group

    def reset(self) -> None:
        self.previous = [None] * CALLS_PER_STEP
        self.ratios, self.stds, self.cosine_distances = [], [], []

    def run(self, call: int, model: torch.nn.Module, forward: Callable[[], Any]) -> Any:
        with blocks_hidden(find_dit(model), functools.partial(self.step, call)):
            return forward()

    def step(self, call: int, blocks: torch.nn.Module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        out = run_blocks(blocks, x, *args, **kwargs)
        residual = residual_of(out, x).float()
        positions = torch.arange(residual.shape[1])
        if self.group is not None:  # too low for parts of unequal length, but those hold no padding
            positions += torch.distributed.get_rank(self.group) * len(positions)
        lengths = kwargs.get("seq_lens", [len(positions)] * len(residual))  # diffusers pads nothing
        is_token = positions < torch.as_tensor(lengths).cpu()[:, None]
        residual = residual[is_token.to(residual.device)]  # [tokens of all samples, C]
        branch = call % CALLS_PER_STEP
        before = self.previous[branch]
        last = call + CALLS_PER_STEP >= len(self.schedule.weights)
        self.previous[branch] = None if last else residual  # the VAE decodes next
        if before is not None:
            ratio = (residual.norm(dim=-1) / before.norm(dim=-1)).double()
            cosine = torch.nn.functional.cosine_similarity(residual, before, dim=-1, eps=1e-8)
            sums = torch.stack([ratio.new_tensor(len(ratio)), ratio.sum(), ratio.square().sum(), cosine.double().sum()])
            if self.group is not None:
                torch.distributed.all_reduce(sums, group=self.group)
            count, total, squares, cosines = sums.tolist()
            self.ratios.append(total / count)
            self.stds.append(math.sqrt(max(0, squares - total**2 / count) / max(1, count - 1)))
            self.cosine_distances.append(1 - cosines / count)
        return out

    def lists(self) -> dict[str, list[float]]:
        """Returns the three lists of a complete run by their names in a table, rounded to 5 decimals as the released
        script does. Raises RuntimeError before the run is complete."""
        done, calls = len(self.ratios) + CALLS_PER_STEP, len(self.schedule.weights)
        if done != calls:
            raise RuntimeError(f"the run stopped after {done} of {calls} calls")
        lists = {"mag_ratio": self.ratios, "mag_std": self.stds, "cos_dis": self.cosine_distances}
        return {key: [round(value, 5) for value in values] for key, values in lists.items()}


def make_table(name: str, runs: list[dict[str, list[float]]], measured_on: dict) -> dict:
    """Makes one table of several runs' `Calibration.lists()`: their means, rounded to 5 decimals, in the format that
    `magcache.load_table` reads.

    With two runs or more, "mag_ratio_spread" is the standard deviation (unbiased) of the ratios over the runs.
    """
    table = {
        "name": name,
        "calibrated_steps": len(runs[0]["mag_ratio"]) // CALLS_PER_STEP + 1,
        "order": "cond, uncond interleaved; one pair per step from step 1 on (step 0 has no predecessor)",
        "measured_on": measured_on,
    }
    for key in runs[0]:
        columns = list(zip(*(run[key] for run in runs), strict=True))
        table[key] = [round(statistics.fmean(column), 5) for column in columns]
        if key == "mag_ratio" and len(runs) > 1:
            table["mag_ratio_spread"] = [round(statistics.stdev(column), 5) for column in columns]
    return table


def apply_calibration(model: torch.nn.Module, steps: int, group=None) -> Calibration:
    """Attaches a calibration of `steps` sampling steps with guidance; `magcache.remove_magcache` removes it.

    group: the ranks that share the tokens, see `Calibration`.

    Raises the errors of `magcache.apply_magcache` for the target "residual".
    """
    find_dit(model)
    calibration = Calibration(steps, group)
    attach(model, calibration)
    return calibration
