"""From the flags to the schedule: by a ratio table, a full calibration or a rule; and what to expect of it."""

import argparse
import contextlib
import hashlib
import json
from pathlib import Path

import magcache
from magcache import report
from magcache.schedule import FORECASTS


def settings_of(args) -> dict:
    """What decides on a model's ratios, by the keys of a calibration's `measured_on`."""
    keys = ("task", "size", "frame_num", "sample_solver", "sample_shift", "sample_guide_scale")
    settings = {key: getattr(args, key) for key in keys} | {"checkpoint": Path(args.ckpt_dir).resolve().name}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # refused with the rest of the folder, later
        model = json.loads((Path(args.ckpt_dir) / "config.json").read_text())
        shape = {key: value for key, value in model.items() if not key.startswith("_")}  # without diffusers' version
        settings["fingerprint"] = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
    return settings


def make_schedule(args, error):
    """Returns the schedule and in words what chose it, or (None, None) without --use_magcache."""
    if not args.use_magcache:
        return None, None
    try:
        if args.magcache_speedup is not None:
            return make_fast_schedule(args)
        name, notice = args.mag_ratios, None
        if not name:
            name, notice = magcache.choose_table(args.task, args.ckpt_dir, args.size)
        table = magcache.load_table(name)
        notices = [notice] if notice else magcache.compare_settings(table, settings_of(args), args.mag_ratios_force)
        schedule = magcache.plan(
            resampled(table, args, notices),
            args.sample_steps,
            args.magcache_thresh,
            args.magcache_K,
            args.retention_ratio,
            smooth=args.magcache_smooth,
            forecast=args.magcache_forecast or "reuse",
        )
    except ValueError as fault:
        error(fault)
    for notice in notices:
        print(f"note: {notice}")
    return schedule, f"table {name}"


def make_fast_schedule(args) -> tuple[magcache.Schedule, str]:
    """The schedule for --magcache_speedup, and what its steps were chosen by. Raises ValueError for a full calibration
    that was asked for, by its table or by its forecast, and is not of this model and these settings."""
    steps, forecast = args.sample_steps, args.magcache_forecast
    count = int(steps / args.magcache_speedup + 1e-9)
    asked = args.mag_ratios is not None or forecast == "fitted"
    with contextlib.nullcontext() if asked else contextlib.suppress(ValueError):
        name = args.mag_ratios or magcache.choose_table(args.task, args.ckpt_dir, args.size)[0]
        run = settings_of(args) | {"sample_steps": steps}
        schedule = magcache.plan_searched(name, run, count, forecast or "fitted")
        return schedule, f"steps by the full calibration {name}, {forecast or 'fitted'} forecast"
    print(
        "note: there is no full calibration of this model and these settings (--magcache_calibration full makes one), "
        "so the steps are spread by rule"
    )
    schedule = magcache.plan_steps(magcache.spread_steps(steps, count), steps, forecast or "linear")
    return schedule, f"spread steps, {forecast or 'linear'} forecast"


def resampled(table, args, notices: list[str]) -> tuple[float, ...]:
    """The table's ratios for this run. Notices say what was done, where it was not measured with the same steps."""
    wanted = magcache.noise_levels(args.sample_steps, args.sample_shift, args.sample_solver)
    method = args.magcache_resample
    if wanted == table.sigmas:
        return table.ratios
    if table.steps != args.sample_steps or method == "sigma":
        how = "by nearest index" if method == "nearest" else "along the noise level"
        notices.append(f"the ratios of {table.steps} calibrated steps are resampled to this run's {how}")
    if method == "nearest":
        return table.ratios  # `magcache.plan` does it
    if table.sigmas is None:
        raise ValueError(
            f"--magcache_resample sigma needs to know the noise levels that ratio table {table.name} was measured at, "
            "and it does not tell its shift and solver"
        )
    return magcache.resample_sigma(table.ratios, table.sigmas, wanted)


def table_of(args):
    """The ratio table that these flags stand for, None if there is none."""
    with contextlib.suppress(ValueError):
        return magcache.load_table(args.mag_ratios or magcache.choose_table(args.task, args.ckpt_dir, args.size)[0])


def predict(args, schedule, made_by: str):
    """The error to expect of a schedule of `make_schedule`, None where there is no table of the model."""
    table = table_of(args)
    if not table:
        return None
    if args.magcache_speedup is None:
        ratios = resampled(table, args, [])
        return report.predict_by_ratios(schedule, ratios, args.magcache_smooth, args.magcache_thresh)
    if "full calibration" in made_by:
        from magcache.search import load_products

        products, measured_on = load_products(table.path.with_suffix(".npz"))
        return report.predict_by_products(schedule, products, measured_on["sigmas"])
    return report.predict_by_ratios(schedule, table.ratios)


def make_neighbours(args, made_by: str, error):
    """What the settings around the given ones would give, each made as a run makes it. made_by: of `make_schedule`."""

    def cell(**changed):
        other = argparse.Namespace(**vars(args) | changed)
        schedule, made_by = make_schedule(other, error)
        return schedule, made_by, other

    if args.magcache_speedup is None:
        thresholds, lengths = report.neighbour_settings(args.magcache_thresh, args.magcache_K)
        cells = [[cell(magcache_thresh=thresh, magcache_K=K)[0] for K in lengths] for thresh in thresholds]
        rows, columns = [f"thresh {thresh:g}" for thresh in thresholds], [f"K {K}" for K in lengths]
        heading = "other     thresh and K: calls computed, bound (* as asked)"
        asked = (thresholds.index(args.magcache_thresh), lengths.index(args.magcache_K))
        return report.Neighbours(heading, rows, columns, cells, [[""] * len(row) for row in cells], asked)
    speedups = report.neighbour_speedups(args.magcache_speedup, args.sample_steps)
    forecasts = [name for name in FORECASTS if name != "fitted" or "full calibration" in made_by]
    cells = [[cell(magcache_speedup=x, magcache_forecast=name) for name in forecasts] for x in speedups]
    notes = []
    for row in cells:
        predicted = [predict(other, schedule, made_by) for schedule, made_by, other in row]
        notes.append([f", error {p.largest:.3g}" if p and "both" in p.rows else "" for p in predicted])
    heading = "other     speed-ups and forecasts: calls computed, bound (* as asked)"
    schedules = [[schedule for schedule, *_ in row] for row in cells]
    asked = (speedups.index(args.magcache_speedup), forecasts.index(args.magcache_forecast or forecasts[-1]))
    rows = [f"speedup {x:g}" for x in speedups]
    return report.Neighbours(heading, rows, forecasts, schedules, notes, asked)


def settings_words(args) -> str:
    if args.magcache_speedup is not None:
        return f"speed-up {args.magcache_speedup:g}"
    smooth = "" if args.magcache_smooth == "none" else f", smoothed ({args.magcache_smooth})"
    return f"thresh {args.magcache_thresh:g}, K {args.magcache_K}, retention {args.retention_ratio:g}{smooth}"


def all_computed(args) -> magcache.Schedule:
    """The schedule without the cache."""
    return magcache.Schedule((None, None) * args.sample_steps)
