"""The MagCache rule (https://arxiv.org/abs/2506.09045): which calls reuse their branch's residual. Pure Python.

The decisions depend on the ratio table, the number of steps and three settings, never on the video.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from magcache.ratios import resample_nearest, split_branches
from magcache.schedule import CALLS_PER_STEP, Schedule, join_branches


@dataclass(frozen=True)
class Settings:
    """The three settings of the MagCache rule; raises ValueError where one makes no sense.

    thresh: bound on the accumulated error of a stretch of reused steps (exclusive); 0 never reuses.
    K: most steps reused in a row; 0 never reuses.
    retention_ratio: share of all calls, from the start, that always compute; in [0, 1].
    """

    thresh: float = 0.12
    K: int = 2
    retention_ratio: float = 0.2

    def __post_init__(self):
        if not (math.isfinite(self.thresh) and self.thresh >= 0):
            raise ValueError(f"thresh must be a finite number >= 0, got {self.thresh}")
        if isinstance(self.K, bool) or int(self.K) != self.K or self.K < 0:
            raise ValueError(f"K must be a whole number >= 0, got {self.K}")
        if not 0 <= self.retention_ratio <= 1:
            raise ValueError(f"retention_ratio must be in [0, 1], got {self.retention_ratio}")

    def first_free_step(self, steps: int) -> int:
        """The first step that may reuse. Where the split of the 2 * steps calls is odd, both branches start later."""
        split = int(CALLS_PER_STEP * steps * self.retention_ratio)
        return max(1, math.ceil(split / CALLS_PER_STEP))


def threshold_rule(ratios: Sequence[float], settings: Settings, first_free_step: int) -> tuple[bool, ...]:
    """The rule for one branch: True for every step that reuses.

    Over a stretch of reused steps the product of the ratios says how far the residual's size has moved; the error is
    the sum of its distances from 1. A step reuses while that error stays below thresh and the stretch within K.
    """
    reuse = [False] * min(first_free_step, len(ratios))
    product, error, stretch = 1.0, 0.0, 0
    for ratio in ratios[first_free_step:]:
        product *= ratio
        error += abs(1.0 - product)
        stretch += 1
        reuse.append(error < settings.thresh and stretch <= settings.K)
        if not reuse[-1]:
            product, error, stretch = 1.0, 0.0, 0
    return tuple(reuse)


def plan_threshold(
    ratios: Sequence[float],
    steps: int,
    thresh: float = 0.12,
    K: int = 2,
    retention_ratio: float = 0.2,
    *,
    calls_per_step: int = CALLS_PER_STEP,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """Makes the schedule of the MagCache rule.

    ratios: magnitude ratios |r_t| / |r_{t-1}| in call order (cond, uncond, ...), see `load_ratios`. A table measured
        at another number of steps is resampled by nearest index, as the released code does.
    steps: sampling steps, >= 1.
    thresh, K, retention_ratio: see `Settings`.
    calls_per_step: 2, or 1 for a model that runs without guidance, which then follows the cond ratios.
    sigmas: noise levels of the steps, see `Schedule`; they do not change what is reused.

    Raises ValueError for a setting or a table that makes no sense.

    >>> schedule = magcache.plan(magcache.load_ratios("t2v-1.3B"), steps=50, thresh=0.12, K=4)
    >>> schedule.computed, len(schedule.reuse)
    (42, 100)
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps}")
    settings = Settings(thresh, K, retention_ratio)
    branches = []
    for values in split_branches(ratios)[:calls_per_step]:
        reuse = threshold_rule(resample_nearest(values, steps), settings, settings.first_free_step(steps))
        branches.append([(1.0,) if reused else None for reused in reuse])
    return Schedule(join_branches(branches), calls_per_step, sigmas=sigmas)
