"""Which videos a job makes, and where they go."""

import contextlib
import os
import secrets
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from magcache.app import prompts
from magcache.app.backend import backend
from magcache.app.choose_schedule import settings_of
from magcache.app.errors import Refused, refusing
from magcache.app.job import OF_EXTENSION, OF_OUR_WAN, Job
from magcache.app.media import read_image
from magcache.app.prompts import Request
from magcache.app.record import is_record, record_path
from magcache.app.tasks import IMAGE_ENDINGS, VIDEO_ENDINGS
from magcache.files import is_special, new_part, reason_of


def results_folder(job: Job) -> Path | None:
    """Returns the folder for videos of a prompt file that name no file; None for a single prompt."""
    if not job.prompt_file:
        return None
    folder = Path(job.flags["save_file"] or Path(job.prompt_file).stem)
    if folder.suffix.lower() in VIDEO_ENDINGS + IMAGE_ENDINGS:
        raise Refused(f"with --prompt_file, --save_file must be a folder, got {folder}")
    return folder


def make_requests(job: Job) -> list[Request]:
    """Gives every line of the job a path."""
    folder, requests = results_folder(job), []
    decisive = decisive_settings(job) if folder else {}
    for line in job.lines:
        if line.save_file:
            with refusing(Refused, about=f"prompt {line.number}: " if folder else ""):
                path = named_path(job, line.save_file)
        elif folder:
            path = folder / prompts.result_name(line, decisive, job.sampling.spec.endings[0])
        else:
            path = default_path(job, line.prompt)
        requests.append(replace(line, path=path))
    if folder:
        check_apart(job, requests)
    return requests


def check_apart(job: Job, requests: list[Request]) -> None:
    """Refuses requests of which two would write the same file."""
    seen = {}
    for number, request in enumerate(requests, 1):
        for file in files_of(job, request.path):
            first = seen.setdefault(os.path.realpath(file), number)
            if first != number:
                raise Refused(f"prompts {first} and {number} of {job.prompt_file} would both write {file}")


def decisive_settings(job: Job) -> dict:
    """Returns what a video of a prompt file depends on beside its line."""
    schedule = job.schedule
    settings = settings_of(job.sampling, job.machine)
    settings |= {"steps": settings.pop("sample_steps"), "plan": None}
    if job.cache:
        settings["plan"] = [schedule.target, schedule.weights]
    settings |= {flag: job.flags[flag] for flag in OF_EXTENSION}
    fitting = [flag for flag in OF_OUR_WAN if flag != "offload_blocks"]  # which changes no number
    settings |= {flag: job.flags[flag] for flag in fitting if job.flags[flag]}  # without them names are as ever
    if loras := job.machine.lora:
        settings["lora"] = [(lora.expert, lora.sha256, lora.strength) for lora in loras]
    inputs = [path for flag, path in asdict(job.inputs).items() if flag != "image"]
    return settings | {"inputs": inputs}


def choose_requests(job: Job, requests: list[Request]) -> list[Request]:
    """Returns the requests that are not finished, and checks their images."""
    if not job.prompt_file:
        return requests
    missing = requests
    if not job.flags["overwrite"] and not job.calibration:
        missing = [r for r in requests if not (os.path.isfile(r.path) and os.path.getsize(r.path))]
    finished = len(requests) - len(missing)
    print(f"prompts   {len(requests)} in {job.prompt_file}" + (f", {finished} of them finished" if finished else ""))
    with refusing(ValueError):
        for image in dict.fromkeys(request.image for request in missing if request.image):
            read_image(image)
    return missing


def check_targets(job: Job, requests: list[Request]) -> None:
    """Refuses, by trying, what cannot be written, says what will be replaced, and makes the folders that are ours."""
    files = [file for request in requests for file in files_of(job, request.path)]
    tables = [job.calibration] if job.calibration else []
    ours = {results_folder(job), *(table.parent for table in tables)}  # where a file is named, the user says which
    for file in (*files, *tables):
        check_target(file, make_folder=file.parent in ours)
    replaced = [file for file in files if file.exists()]
    for file in replaced:
        if file.suffix == ".json" and not is_record(file):
            raise Refused(f"{file} exists and is not the record of a video: move it or choose another --save_file")
    if replaced:
        more = f" and {len(replaced) - 1} more files" if len(replaced) > 1 else ""
        print(f"note: {replaced[0]}{more} will be replaced")


def check_target(path: Path, make_folder: bool = False) -> None:
    """Refuses a file that cannot be written, by trying."""
    try:
        if make_folder and not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # finds a name that is too long
        if is_special(path) or path.is_dir():
            raise Refused(f"{path} exists and is not a regular file")
        new_part(path).unlink()
    except (OSError, ValueError) as fault:
        raise Refused(f"cannot write {str(path)!r}: {reason_of(fault)}") from fault


def files_of(job: Job, path: Path) -> list[Path]:
    """Lists all files that are written for a video: itself, its record, its comparison."""
    return [path, record_path(path), *(comparison_paths(job, path) if job.compare else ())]


def comparison_paths(job: Job, path: Path) -> tuple[Path, Path, Path]:
    """Returns the files of a comparison beside the video: the uncached one, both as one, the page."""
    both = path.with_name(f"{path.stem}_compare{'.png' if job.sampling.frame_num == 1 else '.mp4'}")
    return path.with_stem(f"{path.stem}_uncached"), both, both.with_suffix(".html")


def named_path(job: Job, save_file: str) -> Path:
    path, endings = Path(save_file), job.sampling.spec.endings
    if save_file.endswith(("/", os.sep)) or not path.name or os.path.isdir(path):
        raise Refused(f"--save_file {save_file} is a folder")
    if not path.suffix:
        path = path.with_name(path.name + endings[0])
    if path.suffix.lower() not in endings:
        wrong = f"--save_file must end in one of {', '.join(endings)} for task {job.sampling.task}"
        raise Refused(f"{wrong}, got {path.name}")
    return path


def default_path(job: Job, prompt: str) -> Path:
    """Names a result by upstream's pattern, in characters that are safe anywhere, and with what makes it unique."""
    sampling, machine, cache = job.sampling, job.machine, job.cache
    size = sampling.size.replace("*", "x") if sys.platform == "win32" else sampling.size
    degrees = [flag for flag in ("ulysses_size", "ring_size") if flag not in backend().lacks]
    parts = [sampling.task, size, *(str(getattr(machine, flag)) for flag in degrees), prompts.slug(prompt)]
    parts += [datetime.now().strftime("%Y%m%d_%H%M%S"), secrets.token_hex(3)]
    if cache:
        rule = cache.rule
        settings = f"E{rule.thresh}_K{rule.K}_R{rule.retention_ratio}"
        if cache.speedup is not None:
            settings = f"X{cache.speedup}" if cache.quality is None else f"Q{cache.quality}"
        parts = ["magcache", sampling.task, settings.replace(".", ""), *parts[1:]]
    return Path("_".join(parts) + sampling.spec.endings[0])
