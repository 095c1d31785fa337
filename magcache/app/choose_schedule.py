"""From the flags to the schedule: by a ratio table or by a speed-up; and what to expect of it."""

import contextlib
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import magcache
from magcache import RatioTable, Schedule
from magcache.app.errors import Refused, refusing
from magcache.app.job import CacheSettings, Machine, Sampling
from magcache.app.tasks import Task
from magcache.files import read_json

HOW_TO_CALIBRATE = (
    "measure one with the same command, but --magcache_calibration in place of --use_magcache, "
    "then name its file with --mag_ratios"
)
HOW_TO_TRY = HOW_TO_CALIBRATE.replace("--magcache_calibration", "--magcache_calibration 2,2.5,3,4")


def settings_of(sampling: Sampling, machine: Machine) -> dict:
    """Returns what a model's ratios depend on, by the keys of a calibration's `measured_on`."""
    settings = asdict(sampling) | {"checkpoint": Path(machine.ckpt_dir).resolve().name}
    if machine.lora:
        settings["lora"] = ", ".join(str(replace(lora, path=Path(lora.path).name)) for lora in machine.lora)
    # refused with the rest of the folder, later
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        model = read_json(Path(machine.ckpt_dir) / sampling.spec.transformers[0] / "config.json")
        shape = {key: value for key, value in model.items() if not key.startswith("_")}  # without diffusers' version
        settings["fingerprint"] = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
    return settings


def compare_settings(table: RatioTable, run: dict) -> list[str]:
    """Returns notices about what a table was measured on, where a run (with the same keys as `measured_on`) differs."""
    known = {key: value for key, value in table.measured_on.items() if isinstance(value, str | int | float)}
    measured, run = {"lora": "none"} | known, {"lora": "none"} | run
    different = {key: (measured[key], run[key]) for key in run if measured.get(key, run[key]) != run[key]}
    notices = {
        "lora": "with LoRA {}, not {}",
        "task": "on task {}, not {}",
        "fingerprint": "on a model whose config.json has the fingerprint {}, not {}",
    }
    found = [text.format(*different.pop(key)) for key, text in notices.items() if key in different]
    if different:
        parts = (f"{'' if key == 'checkpoint' else '--'}{key} {values[0]}" for key, values in different.items())
        found.append(f"with {', '.join(parts)}")
    return [f"ratio table {table.name} was measured {what}" for what in found]


def fitting_table(task: Task, ckpt_dir: str, size: str) -> tuple[str, str | None]:
    """Returns the name of the task's ratio table, and a notice for the user or None. Of several tables it takes the one
    whose name is part of the checkpoint folder's name, else that of the size. Raises magcache.UnknownTableError if none
    fits."""
    if len(task.tables) == 1:
        (name,) = task.tables
        return name, f"{task.name} uses the table of {name}" if name != task.name else None
    folder = Path(ckpt_dir).absolute().name.lower()
    matches = [name for name in task.tables if name.removeprefix(f"{task.name}-").lower() in folder]
    if len(matches) == 1:
        return matches[0], None
    by_size = f"{task.name}-{min(map(int, size.split('*')))}P"
    if by_size in task.tables:
        unclear = "fits several tables" if matches else "fits no table"
        return by_size, f"the name of the checkpoint folder {folder} {unclear}, so {by_size} is chosen by the size"
    known = f" (it has {', '.join(task.tables)})" if task.tables else ""
    unknown = f"no ratio table fits task {task.name} with the checkpoint folder {folder!r}{known}"
    raise magcache.UnknownTableError(unknown)


def choose_table(
    sampling: Sampling, cache: CacheSettings, machine: Machine
) -> tuple[RatioTable | None, "magcache.trials.Measured | None"]:
    """Takes the ratio table that the flags name, or that of the model. Returns it for the MagCache rule; for a speed-up
    or a quality it returns its trials, None if a speed-up finds none, which needs none. Says where the table was
    measured on something else. Raises Refused if there is none that can be used."""
    by_rule = cache.speedup is None and cache.quality is None
    optional = cache.speedup is not None and not cache.table
    name, notice = cache.table, None
    try:
        if not name:
            name, notice = fitting_table(sampling.spec, machine.ckpt_dir, sampling.size)
        table = magcache.load_table(name)
        measured = None if by_rule else magcache.read_trials(table)
    except magcache.UnknownTableError as fault:
        if optional:
            return None, None
        other = ", or name the table of another model there; --magcache_speedup needs none"
        remedy = HOW_TO_CALIBRATE + ("" if cache.table else other) if by_rule else HOW_TO_TRY
        raise Refused(f"{fault}; {remedy}") from fault
    except ValueError as fault:
        raise Refused(str(fault)) from fault
    if not by_rule and not measured:
        if optional:
            return None, None
        unused = "and --magcache_speedup takes nothing else of a table: leave --mag_ratios out"
        without = f"ratio table {table.name} holds no trials"
        raise Refused(f"{without}, {unused}" if cache.quality is None else f"{without}; {HOW_TO_TRY}")
    run = settings_of(sampling, machine)
    if by_rule:
        del run["sample_steps"]
    notices = [notice] if notice else compare_settings(table, run)
    if not by_rule:
        notices = [f"{line}; its trials choose the rule's constants all the same" for line in notices]
    elif table.steps != sampling.sample_steps:
        notices.append(f"the ratios of {table.steps} calibrated steps are resampled to this run's by nearest index")
    for line in notices:
        print(f"note: {line}")
    return (table, None) if by_rule else (None, measured)


def make_schedule(sampling: Sampling, cache: CacheSettings | None, table: RatioTable | None) -> Schedule:
    """Makes the schedule of a run. cache: None computes every call. table: None for a speed-up."""
    steps, given = sampling.sample_steps, {"calls_per_step": sampling.calls_per_step, "sigmas": sampling.noise_levels}
    if cache is None:
        return all_computed(steps, sampling.calls_per_step)
    with refusing(ValueError):
        if cache.speedup is not None:
            given |= {"boundary": sampling.spec.boundary, "constants": cache.constants}
            return magcache.plan_speedup(steps, cache.speedup, **given)
        return magcache.plan(table.ratios, steps, **asdict(cache.rule), **given)


def all_computed(steps: int, calls_per_step: int = 2) -> Schedule:
    """Makes the schedule without the cache."""
    return Schedule((None,) * calls_per_step * steps, calls_per_step)
