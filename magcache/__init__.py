"""MagCache: compute a diffusion transformer in a part of its calls only, by a schedule that is known before the run.

    ratios = magcache.load_ratios("t2v-1.3B")
    schedule = magcache.plan(ratios, steps=50, thresh=0.12, K=4, retention_ratio=0.2)  # MagCache as published
    schedule = magcache.plan_speedup(steps=50, speedup=2.5, shift=5.0)  # or: forecasts, without a calibration
    magcache.apply_magcache(model, schedule)
    ...
    magcache.remove_magcache(model)

torch is imported with the first use of what needs it.
"""

import importlib

from magcache.noise_levels import noise_levels, noise_levels_of
from magcache.ratios import (
    RatioTable,
    UnknownTableError,
    load_ratios,
    load_table,
    save_table,
    table_names,
)
from magcache.schedule import Schedule
from magcache.threshold import Settings, plan_threshold

__version__ = "0.1.0"

plan = plan_threshold  # the published method by its short name

_LAZY = {
    "apply_magcache": "magcache.patch",
    "remove_magcache": "magcache.patch",
    "apply_calibration": "magcache.calibrate",
    "Calibration": "magcache.calibrate",
    "make_table": "magcache.calibrate",
    "Constants": "magcache.speedup",
    "plan_speedup": "magcache.speedup",
    "plan_steps": "magcache.speedup",
    "read_trials": "magcache.trials",
}

__all__ = [
    "RatioTable",
    "Schedule",
    "Settings",
    "UnknownTableError",
    "load_ratios",
    "load_table",
    "noise_levels",
    "noise_levels_of",
    "plan",
    "plan_threshold",
    "save_table",
    "table_names",
    *_LAZY,
]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'magcache' has no attribute {name!r}")
