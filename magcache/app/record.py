"""The record of a run, a JSON file beside the video: enough to repeat it."""

import contextlib
import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import magcache
from magcache.app.flags import make_parser
from magcache.app.job import OF_EXTENSION, OF_RULE, PATHS, Job
from magcache.app.prompts import Request
from magcache.app.step_map import reuse_by_branch
from magcache.app.trials.quality import expectation
from magcache.files import read_json, written_whole

MADE_BY = "magcache_generate.py"
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "imageio-ffmpeg", "scikit-image", "flash-attn", "xfuser")
VARIABLES = ("DIFFUSERS_ATTN_BACKEND", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
NOT_OF_ONE_VIDEO = ("prompt_file", "overwrite", "magcache_calibration", "magcache_plan", "compare")


def make_record(job: Job, request: Request, group, pixels: tuple[int, int, int], seconds: dict, calls: list) -> dict:
    """Collects all that it takes to make a video again. group: the processes that made it. pixels: (frames, height,
    width). seconds: by phase. calls: those of the model, as they were watched."""
    import wan

    frames, height, width = pixels
    values = replayed_values(job, request)
    if expected := expectation(job):
        psnr = asdict(expected)
        prompts = psnr.pop("prompts")
        expected = {"latent_psnr": psnr, "table": job.measured.table.name, "prompts": prompts}
    return {
        "video": request.path.name,
        "frames": frames,
        "height": height,
        "width": width,
        "date": datetime.now().isoformat("T", "seconds"),
        "prompt": request.prompt,
        "seed": request.seed,
        "command": command_of(job, group, values),
        "arguments": values | {"save_file": str(request.path.absolute())},
        "versions": versions() | {"wan": os.path.dirname(os.path.abspath(wan.__file__))},
        "device": device(),
        "steps_by": job.made_by,
        "table": describe_table(job.table),
        "lora": [
            asdict(lora) | {"path": os.path.abspath(lora.path), "sha256": lora.sha256} for lora in job.machine.lora
        ],
        "schedule": describe_schedule(job.schedule) if job.cache else None,
        "expected": expected,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "calls": {"computed": sum(not reused for reused, _ in calls), "reused": sum(reused for reused, _ in calls)},
        "peak_memory": peak_memory(),
    }


def replayed_values(job: Job, request: Request) -> dict:
    """Returns the values of all flags that make the request again, from any folder."""
    values = job.flags | asdict(job.sampling) | asdict(job.inputs) | asdict(job.machine)
    values["image"] = request.image or values["image"]
    values |= {name: os.path.abspath(values[name]) for name in PATHS if values[name]}
    values["src_ref_images"] = ",".join(map(os.path.abspath, job.inputs.references)) or None
    if table := job.table or (job.measured and job.measured.table):
        values["mag_ratios"] = table.name if table.named else str(table.path.absolute())
    values["lora"] = [str(replace(lora, path=os.path.abspath(lora.path))) for lora in job.machine.lora]
    again = request.path.with_stem(f"{request.path.stem}_again").absolute()
    values |= {"prompt": request.prompt, "n_prompt": request.n_prompt}
    return values | {"base_seed": request.seed, "save_file": str(again)}


def command_of(job: Job, group, values: dict) -> list[str]:
    """Returns the command for these values of the flags. What is None, a tuple or a switch that is off has no flag."""
    left_out = {*NOT_OF_ONE_VIDEO, *OF_EXTENSION}
    if job.cache and job.cache.speedup is not None:  # or a quality, which is one by now
        left_out |= {*OF_RULE}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(group.size)] if group.size > 1 else []
    command = [sys.executable, *launcher, job.script]
    for action in make_parser(job.script)._actions:
        value, flag = values.get(action.dest), action.option_strings[0]
        if value is None or isinstance(value, tuple) or action.dest in left_out:  # guidance of two is the task's own
            continue
        if action.nargs in (0, "?") and isinstance(value, bool):
            command += [flag] if value else []
            continue
        for one in value if isinstance(value, list) else [value]:  # an equals sign for values such as -1
            command += [f"{flag}={one}"] if str(one).startswith("-") else [flag, str(one)]
    return command


def save_record(path: Path, entries: dict) -> None:
    """Writes the record of the video at `path`, whole or not at all; a full disk must not cost what comes after. Bytes
    of an argument that are no text become JSON escapes."""
    try:
        with written_whole(record_path(path)) as part:
            text = layout({"made_by": MADE_BY} | entries) + "\n"
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
    except (OSError, RecursionError) as fault:
        print(f"warning: the record could not be written: {fault}", file=sys.stderr)


def record_path(video: Path) -> Path:
    return video.with_suffix(".json")


def is_record(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return read_json(path)["made_by"].startswith(MADE_BY)
    return False


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    found = {"python": platform.python_version(), "magcache": magcache.__version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device() -> dict:
    import torch

    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    described = {"name": platform.processor() or platform.machine(), "type": "cpu", "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        name, size = torch.cuda.get_device_name(), torch.cuda.get_device_properties(torch.cuda.current_device())
        described = {"name": name, "type": "cuda", "cuda": torch.version.cuda, "memory_bytes": size.total_memory}
    return described | {"system": platform.platform(), "environment": environment}


def peak_memory() -> dict | None:
    """Returns the peak memory of the process so far, in bytes, and which that is; None if the system does not say."""
    import torch

    if torch.cuda.is_available():
        return {"bytes": torch.cuda.max_memory_allocated(), "of": "GPU memory that torch has allocated"}
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"bytes": peak, "of": "CPU memory of the process (largest resident set)"}


def describe_table(table: magcache.RatioTable | None) -> dict | None:
    return table and {
        "name": table.name,
        "file": str(table.path.resolve()),
        "sha256": hashlib.sha256(table.path.read_bytes()).hexdigest(),
        "measured_on": table.measured_on,
        "ratios": list(table.ratios),
    }


def describe_schedule(schedule: magcache.Schedule) -> dict:
    """Returns the steps that compute by branch, and the weights of every call, None where it computes."""
    branches = reuse_by_branch(schedule).items()
    return {
        "computed_calls": schedule.computed,
        "calls": len(schedule.weights),
        "speedup_bound": schedule.speedup_bound,
        "computed_steps": {name: [i for i, reused in enumerate(reuse) if not reused] for name, reuse in branches},
        "target": schedule.target,
        "weights": [weights and list(weights) for weights in schedule.weights],
    }


def layout(value, indent: int = 0) -> str:
    """Writes JSON with one line per key, and lists on one line unless they hold objects."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, default=str)
    pad = " " * (indent + 1)
    entries = (f"{pad}{json.dumps(str(key))}: {layout(entry, indent + 1)}" for key, entry in value.items())
    return "{\n" + ",\n".join(entries) + "\n" + " " * indent + "}"
