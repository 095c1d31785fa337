"""MagCache: skip a diffusion transformer's blocks in the steps where calibration says their residual hardly changes.

    ratios = magcache.load_ratios("t2v-1.3B")
    schedule = magcache.plan(ratios, steps=50, thresh=0.12, K=4, retention_ratio=0.2)
    magcache.apply_magcache(model, schedule)
    ...
    magcache.remove_magcache(model)

Planning is pure Python; torch and numpy are imported with the first use of what needs them.
"""

import importlib

from magcache.ratios import (
    RatioTable,
    choose_table,
    compare_settings,
    load_ratios,
    load_table,
    noise_levels,
    resample_sigma,
    save_table,
    table_names,
)
from magcache.schedule import Schedule, Settings, plan, plan_steps, spread_steps

__version__ = "0.1.0"

_LAZY = {
    "apply_magcache": "magcache.patch",
    "remove_magcache": "magcache.patch",
    "ResidualCache": "magcache.patch",
    "apply_calibration": "magcache.calibrate",
    "Calibration": "magcache.calibrate",
    "make_table": "magcache.calibrate",
    "save_calibration": "magcache.calibrate",
    "apply_full_calibration": "magcache.full_calibration",
    "plan_searched": "magcache.search",
    "host_bytes": "magcache.full_calibration",
    "save_products": "magcache.search",
}

__all__ = [
    "RatioTable",
    "Schedule",
    "Settings",
    "choose_table",
    "compare_settings",
    "load_ratios",
    "load_table",
    "noise_levels",
    "plan",
    "plan_steps",
    "resample_sigma",
    "save_table",
    "spread_steps",
    "table_names",
    *_LAZY,
]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'magcache' has no attribute {name!r}")
