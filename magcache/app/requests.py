"""Which videos a job makes, and where they go."""

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from magcache.app import prompts
from magcache.app.checks import check_names, check_writable
from magcache.app.choose_schedule import settings_of
from magcache.app.errors import Refused, refuse_if, refusing
from magcache.app.job import OF_OUR_WAN, Job, Request
from magcache.app.record import compared_files, read_record, record_path
from magcache.files import is_special

VIDEO_ENDINGS, IMAGE_ENDINGS = (".mp4", ".mkv", ".mov"), (".png", ".jpg", ".jpeg", ".webp")


def endings_of(job: Job) -> tuple[str, ...]:
    """Of the task's results, the default first."""
    return IMAGE_ENDINGS if job.sampling.spec.makes_image else VIDEO_ENDINGS


def make_requests(job: Job) -> list[Request]:
    if not job.prompt_file:
        (line,) = job.lines
        path = result_path(job, line.prompt, job.output.save_file)
        replaces = bool(job.output.save_file) and path.exists()
        return [Request(line.prompt, line.seed, path, n_prompt=line.n_prompt, replaces=replaces)]
    folder = Path(job.output.save_file or Path(job.prompt_file).stem)
    check_names(folder)
    is_file = folder.suffix.lower() in VIDEO_ENDINGS + IMAGE_ENDINGS or folder.is_file()
    refuse_if(is_file, f"with --prompt_file, --save_file must be a folder, got {folder}")
    check_writable(folder)
    decisive, paths = decisive_settings(job), []
    for line in job.lines:
        if line.save_file:
            try:
                paths.append(result_path(job, line.prompt, line.save_file))
            except Refused as refusal:
                raise Refused(f"prompt {line.number}: {refusal}") from refusal
        else:
            paths.append(folder / prompts.result_name(line, decisive, endings_of(job)[0]))
            check_result(job, paths[-1])
    if clash := prompts.find_clash(paths):
        first, second = (paths[position] for position in clash)
        what = "result" if first.suffix == second.suffix else "record beside the result"
        numbers = f"{clash[0] + 1} and {clash[1] + 1}"
        raise Refused(f"prompts {numbers} of {job.prompt_file} have the same {what} {second}")
    beside = {file for path in paths for file in comparison_paths(path)} if job.output.compare else set()
    for path in beside.intersection(paths):
        raise Refused(f"the result {path} of {job.prompt_file} has the name of another one's comparison")
    own = "image" in job.sampling.spec.inputs
    made = zip(job.lines, paths, strict=True)
    return [
        Request(
            line.prompt,
            line.seed,
            path,
            image=line.image if own else None,
            n_prompt=line.n_prompt,
            replaces=not line.save_file or path.exists(),  # of two with a name that holds all settings, either will do
        )
        for line, path in made
    ]


def decisive_settings(job: Job) -> dict:
    """What, beside its line, decides on a video of a prompt file."""
    schedule = job.schedule
    settings = settings_of(job.sampling, job.machine.ckpt_dir) | {
        "steps": job.sampling.sample_steps,
        "plan": [schedule.target, schedule.weights] if job.cache else None,
    }
    flags = ("use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang")
    settings |= {flag: job.flags[flag] for flag in ("magcache_dtype", *flags)}
    fitting = [flag for flag in OF_OUR_WAN if flag != "offload_blocks"]  # which changes no number
    settings |= {flag: job.flags[flag] for flag in fitting if job.flags[flag]}  # without them names are as ever
    inputs = [path for flag, path in asdict(job.inputs).items() if flag != "image"]
    return settings | {"inputs": inputs}


def choose_requests(job: Job, requests: list[Request]) -> list[Request]:
    """Those that are not finished. Checks their images."""
    if not job.prompt_file:
        return requests
    missing = requests
    if not job.output.overwrite and not job.calibrates:
        missing = [request for request in requests if not prompts.is_result(request.path)]
    finished = len(requests) - len(missing)
    print(f"prompts   {len(requests)} in {job.prompt_file}" + (f", {finished} of them finished" if finished else ""))
    from magcache.app.media import read_image

    with refusing(ValueError):
        for image in dict.fromkeys(request.image for request in missing if request.image):
            read_image(image)
    return missing


def check_replaced(job: Job, requests: list[Request]) -> None:
    """Says which files will be replaced. A video, its record and its comparison take the places of earlier ones, but of
    no other files."""
    kind, replaced = "image" if job.sampling.spec.makes_image else "video", []
    for request in requests:
        path, record = request.path, record_path(request.path)
        if request.replaces and path.exists() and not is_empty(path):
            replaced.append(path)
            wrong = f"{path} exists and is no {kind}: move it, or choose another --save_file"
            refuse_if(not prompts.is_result(path), wrong)
        other = job.output.record and record.exists() and not read_record(record)
        refuse_if(other, f"{record} exists and is no record of a video: move it, or use --magcache_record off")
        if not job.output.compare:
            continue
        earlier = compared_files(record)
        for file in comparison_paths(path):
            other = file.exists() and file.name not in earlier
            refuse_if(other, f"{file} exists and is of no earlier --compare: move it, or choose another --save_file")
    if replaced:
        files = replaced[0] if len(replaced) == 1 else f"{len(replaced)} files, the first {replaced[0]},"
        print(f"note: {files} will be replaced")


def is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def comparison_paths(path: Path) -> tuple[Path, Path, Path, Path]:
    """Files of a comparison beside the video: the uncached one, both as a video or as a picture, the page."""
    both = path.with_name(f"{path.stem}_compare")
    return path.with_stem(f"{path.stem}_uncached"), *(both.with_name(both.name + e) for e in (".mp4", ".png", ".html"))


def free_paths(path: Path) -> Iterator[Path]:
    """The path, then others beside it that neither a video nor a record has."""
    yield path
    for number in itertools.count(2):
        other = path.with_stem(f"{path.stem}_{number}")
        if not other.exists() and not record_path(other).exists():
            yield other


def result_path(job: Job, prompt: str, save_file: str | None) -> Path:
    """save_file, or upstream's pattern of names with the prompt reduced to characters that are safe anywhere."""
    path = checked_path(job, save_file) if save_file else Path(default_name(job, prompt))
    check_writable(path.parent)
    check_result(job, path)
    return path


def check_result(job: Job, path: Path) -> None:
    """Refuses a name that cannot be written, with all that goes beside it, into a folder that takes files."""
    beside = [".json"] if job.output.record else []
    beside += [f"_uncached{path.suffix}", "_compare.html"] if job.output.compare else []
    check_names(path, *beside)
    refuse_if(is_special(path) or path.is_dir(), f"{path} exists and is no regular file")


def checked_path(job: Job, save_file: str) -> Path:
    path, endings = Path(save_file), endings_of(job)
    check_names(path)
    is_folder = save_file.endswith(("/", os.sep)) or not path.name or path.is_dir()
    refuse_if(is_folder, f"--save_file {save_file} is a folder")
    if not path.suffix:
        path = path.with_name(path.name + endings[0])
    wrong = f"--save_file must end in one of {', '.join(endings)} for task {job.sampling.task}, got {path.name}"
    refuse_if(path.suffix.lower() not in endings, wrong)
    refuse_if(not path.parent.is_dir(), f"the folder of --save_file does not exist: {path.parent}")
    return path


def default_name(job: Job, prompt: str) -> str:
    sampling, machine, cache = job.sampling, job.machine, job.cache
    size = sampling.size.replace("*", "x") if sys.platform == "win32" else sampling.size
    parts = [sampling.task, size, str(machine.ulysses_size), str(machine.ring_size), prompts.slug(prompt)]
    parts.append(datetime.now().strftime("%Y%m%d_%H%M%S"))
    if cache:
        rule = cache.rule
        settings = f"E{rule.thresh}_K{rule.K}_R{rule.retention_ratio}"
        if cache.speedup is not None:
            settings = f"X{cache.speedup}" if cache.quality is None else f"Q{cache.quality}"
        parts = ["magcache", sampling.task, settings.replace(".", ""), *parts[1:]]
    return "_".join(parts) + endings_of(job)[0]
