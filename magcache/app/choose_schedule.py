"""From the flags to the schedule: by a ratio table or by a speed-up; and what to expect of it."""

import argparse
import contextlib
import hashlib
import json
from pathlib import Path

import magcache
from magcache import RatioTable, UnknownTableError
from magcache.app import plan as report

HOW_TO_CALIBRATE = (
    "measure one by the same command with --magcache_calibration in place of --use_magcache, "
    "then give its file with --mag_ratios"
)


def settings_of(args) -> dict:
    """What decides on a model's ratios, by the keys of a calibration's `measured_on`."""
    keys = ("task", "size", "frame_num", "sample_solver", "sample_shift", "sample_guide_scale")
    settings = {key: getattr(args, key) for key in keys} | {"checkpoint": Path(args.ckpt_dir).resolve().name}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # refused with the rest of the folder, later
        model = json.loads((Path(args.ckpt_dir) / "config.json").read_text())
        shape = {key: value for key, value in model.items() if not key.startswith("_")}  # without diffusers' version
        settings["fingerprint"] = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
    return settings


def compare_settings(table: RatioTable, run: dict) -> list[str]:
    """Notices on what a table was measured on, where a run (the same keys as `measured_on`) differs from it."""
    different = {
        key: (table.measured_on[key], run[key]) for key in run if table.measured_on.get(key, run[key]) != run[key]
    }
    notices = []
    for key, what in (("task", "task"), ("fingerprint", "a model whose config.json has the fingerprint")):
        if key in different:
            notices.append("ratio table {} was measured on {} {}, not {}".format(table.name, what, *different[key]))
    described = {
        "checkpoint": "checkpoint",
        "size": "--size",
        "frame_num": "--frame_num",
        "sample_shift": "--sample_shift",
        "sample_solver": "--sample_solver",
        "sample_guide_scale": "--sample_guide_scale",
    }
    parts = [f"{what} {different[key][0]}" for key, what in described.items() if key in different]
    return notices + ([f"ratio table {table.name} was measured with {', '.join(parts)}"] if parts else [])


def make_schedule(args, error):
    """Returns the schedule and in words what chose it, or (None, None) without --use_magcache."""
    if not args.use_magcache:
        return None, None
    if args.magcache_speedup is not None:
        run = (args.sample_steps, args.magcache_speedup, args.sample_shift, args.sample_solver)
        return magcache.plan_speedup(*run), "outputs forecast along the noise level"
    try:
        name, notice = args.mag_ratios, None
        if not name:
            name, notice = magcache.choose_table(args.task, args.ckpt_dir, args.size)
        table = magcache.load_table(name)
        settings = (args.magcache_thresh, args.magcache_K, args.retention_ratio)
        schedule = magcache.plan(table.ratios, args.sample_steps, *settings)
    except UnknownTableError as fault:
        error(
            f"{fault}; {HOW_TO_CALIBRATE}" + ("" if args.mag_ratios else ", or name the table of another model there")
        )
    except ValueError as fault:
        error(fault)
    notices = [notice] if notice else compare_settings(table, settings_of(args))
    if table.steps != args.sample_steps:
        notices.append(f"the ratios of {table.steps} calibrated steps are resampled to this run's by nearest index")
    for notice in notices:
        print(f"note: {notice}")
    return schedule, f"table {name}"


def table_of(args):
    """The ratio table that these flags stand for, None if there is none or none is needed."""
    if args.magcache_speedup is not None:
        return None
    with contextlib.suppress(ValueError):
        return magcache.load_table(args.mag_ratios or magcache.choose_table(args.task, args.ckpt_dir, args.size)[0])


def predict(args, schedule):
    """The error to expect of a schedule by the ratio table that made it, None where none did."""
    table = table_of(args)
    return table and report.predict_by_ratios(schedule, table.ratios, args.magcache_thresh)


def make_neighbours(args, error):
    """What the settings around the given ones would give, each made as a run makes it."""

    def cell(**changed):
        return make_schedule(argparse.Namespace(**vars(args) | changed), error)[0]

    if args.magcache_speedup is not None:
        speedups = report.neighbour_speedups(args.magcache_speedup, args.sample_steps)
        cells = [[cell(magcache_speedup=x)] for x in speedups]
        asked = (speedups.index(args.magcache_speedup), 0)
        return report.Neighbours("other     speed-ups", [f"speedup {x:g}" for x in speedups], [""], cells, asked)
    thresholds, lengths = report.neighbour_settings(args.magcache_thresh, args.magcache_K)
    cells = [[cell(magcache_thresh=thresh, magcache_K=K) for K in lengths] for thresh in thresholds]
    rows, columns = [f"thresh {thresh:g}" for thresh in thresholds], [f"K {K}" for K in lengths]
    asked = (thresholds.index(args.magcache_thresh), lengths.index(args.magcache_K))
    return report.Neighbours("other     thresh and K", rows, columns, cells, asked)


def settings_words(args) -> str:
    if args.magcache_speedup is not None:
        return f"speed-up {args.magcache_speedup:g}"
    return f"thresh {args.magcache_thresh:g}, K {args.magcache_K}, retention {args.retention_ratio:g}"


def all_computed(args) -> magcache.Schedule:
    """The schedule without the cache."""
    return magcache.Schedule((None, None) * args.sample_steps)
