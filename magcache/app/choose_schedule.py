"""From the flags to the schedule: by a ratio table or by a speed-up; and what to expect of it."""

import contextlib
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import magcache
from magcache import RatioTable, Schedule
from magcache.app.errors import Refused, refusing
from magcache.app.job import CacheSettings, Job, Machine, Sampling
from magcache.app.step_map import predict_by_ratios
from magcache.app.tasks import Task
from magcache.files import read_json

HOW_TO_CALIBRATE = (
    "measure one with the same command, but --magcache_calibration in place of --use_magcache, "
    "then name its file with --mag_ratios"
)


def settings_of(sampling: Sampling, machine: Machine) -> dict:
    """Returns what a model's ratios depend on, by the keys of a calibration's `measured_on`."""
    settings = asdict(sampling) | {"checkpoint": Path(machine.ckpt_dir).resolve().name}
    if machine.lora:
        settings["lora"] = ", ".join(str(replace(lora, path=Path(lora.path).name)) for lora in machine.lora)
    del settings["sample_steps"]
    # refused with the rest of the folder, later
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        model = read_json(Path(machine.ckpt_dir) / sampling.spec.transformers[0] / "config.json")
        shape = {key: value for key, value in model.items() if not key.startswith("_")}  # without diffusers' version
        settings["fingerprint"] = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
    return settings


def compare_settings(table: RatioTable, run: dict) -> list[str]:
    """Returns notices about what a table was measured on, where a run (with the same keys as `measured_on`) differs."""
    measured = {key: value for key, value in table.measured_on.items() if isinstance(value, str | int | float)}
    different = {key: (measured[key], run[key]) for key in run if measured.get(key, run[key]) != run[key]}
    measured_with, with_ = (settings.get("lora", "none") for settings in (measured, run))
    notices = []
    if measured_with != with_:
        notices.append(f"ratio table {table.name} was measured with LoRA {measured_with}, not {with_}")
    for key, what in (("task", "task"), ("fingerprint", "a model whose config.json has the fingerprint")):
        if key in different:
            notices.append("ratio table {} was measured on {} {}, not {}".format(table.name, what, *different[key]))
    flags = ("size", "frame_num", "sample_steps", "sample_shift", "sample_solver", "sample_guide_scale")
    described = {"checkpoint": "checkpoint"} | {flag: f"--{flag}" for flag in flags}
    parts = [f"{what} {different[key][0]}" for key, what in described.items() if key in different]
    return notices + ([f"ratio table {table.name} was measured with {', '.join(parts)}"] if parts else [])


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


def find_table(sampling: Sampling, cache: CacheSettings, ckpt_dir: str) -> tuple[RatioTable, str | None]:
    """Returns the table that the flags name, or that of the model, and a notice on how it was chosen. Raises the
    ValueErrors of `fitting_table` and `magcache.load_table`."""
    name, notice = cache.table, None
    if not name:
        name, notice = fitting_table(sampling.spec, ckpt_dir, sampling.size)
    return magcache.load_table(name), notice


def choose_table(sampling: Sampling, cache: CacheSettings, machine: Machine) -> tuple[RatioTable | None, str]:
    """Returns the ratio table, None where none is needed, and in words what chooses the steps. Says where the table was
    measured on something else. Raises Refused if there is no table that can be used."""
    if cache.speedup is not None:
        return None, "outputs forecast along the noise level"
    try:
        table, notice = find_table(sampling, cache, machine.ckpt_dir)
    except magcache.UnknownTableError as fault:
        other = "" if cache.table else ", or name the table of another model there; --magcache_speedup needs none"
        raise Refused(f"{fault}; {HOW_TO_CALIBRATE}{other}") from fault
    except ValueError as fault:
        raise Refused(str(fault)) from fault
    notices = [notice] if notice else compare_settings(table, settings_of(sampling, machine))
    if table.steps != sampling.sample_steps:
        notices.append(f"the ratios of {table.steps} calibrated steps are resampled to this run's by nearest index")
    for line in notices:
        print(f"note: {line}")
    return table, f"table {table.name}"


def make_schedule(sampling: Sampling, cache: CacheSettings | None, table: RatioTable | None) -> Schedule:
    """Makes the schedule of a run. cache: None computes every call. table: None for a speed-up."""
    steps, per_step = sampling.sample_steps, sampling.calls_per_step
    if cache is None:
        return all_computed(steps, per_step)
    if cache.speedup is not None:
        with refusing(ValueError):
            given = {"constants": cache.constants} if cache.constants else {}
            given |= {"sigmas": sampling.noise_levels, "boundary": sampling.spec.boundary}
            return magcache.plan_speedup(steps, cache.speedup, calls_per_step=per_step, **given)
    with refusing(ValueError):
        given = {"calls_per_step": per_step, "sigmas": sampling.noise_levels}
        return magcache.plan(table.ratios, steps, **asdict(cache.rule), **given)


def all_computed(steps: int, calls_per_step: int = 2) -> Schedule:
    """Makes the schedule without the cache."""
    return Schedule((None,) * calls_per_step * steps, calls_per_step)


def predict(job: Job) -> dict[str, tuple[float, ...]] | None:
    """Returns the expected error of every step, by branch, according to the ratio table that made the schedule; None if
    none did. No error reaches thresh."""
    return job.table and predict_by_ratios(job.schedule, job.table.ratios)
