"""The job: which videos it makes, where they go, and what is written beside them."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import magcache
from magcache.app import prompts, record
from magcache.app.checks import check_writable
from magcache.app.choose_schedule import predict, settings_of, settings_words, table_of
from magcache.app.flags import INPUTS, flag_values, input_flags, make_parser
from magcache.app.inputs import describe_video
from magcache.app.plot import draw_calibration
from magcache.app.processes import Processes
from magcache.app.wan_package import device_name
from magcache.files import written_whole

FLAT_LISTS = {
    "mag_ratio": "wan2_1_mag_ratio.json",
    "mag_std": "wan2_1_mag_std.json",
    "cos_dis": "wan2_1_cos_dis.json",
}
VIDEO_ENDINGS, IMAGE_ENDINGS = (".mp4", ".mkv", ".mov"), (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Request:
    """One video. path: of the result. image: path of its own one; None where the flags name the inputs of all."""

    prompt: str
    seed: int
    path: Path
    image: str | None = None


@dataclass(frozen=True)
class Job:
    """A run as it is decided before the models are loaded.

    args: the flags, with their defaults filled in. schedule: None without the cache. made_by: in words what chose it.
    config: the model's, of the `wan` package. processes: all of them. group: this one's `rank` among the `size` that
    make a video together, and the `index` of that group among `count`.
    """

    args: argparse.Namespace
    schedule: magcache.Schedule | None
    made_by: str | None
    config: Any
    processes: Processes
    group: Any

    @property
    def goes_on(self) -> bool:
        """Whether a video that fails does not stop the others."""
        return bool(self.args.prompt_file) and not self.args.magcache_calibration


def endings_of(args) -> tuple[str, ...]:
    """Of the task's results, the default first."""
    return IMAGE_ENDINGS if args.task.startswith("t2i") else VIDEO_ENDINGS


def make_requests(args, schedule, error) -> list[Request]:
    if not args.prompt_file:
        return [Request(args.prompt, args.base_seed, result_path(args, args.prompt, error))]
    endings = endings_of(args)
    folder = Path(args.save_file or Path(args.prompt_file).stem)
    if folder.suffix.lower() in VIDEO_ENDINGS + IMAGE_ENDINGS or folder.is_file():
        error(f"with --prompt_file, --save_file must be a folder, got {folder}")
    check_writable(folder, error)
    decisive = settings_of(args) | {
        "steps": args.sample_steps,
        "plan": schedule and [schedule.target, schedule.weights],
    }
    extension = ("use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang")
    decisive |= {flag: getattr(args, flag) for flag in ("magcache_dtype", *extension)}
    decisive["inputs"] = [getattr(args, flag) for flags in INPUTS.values() for flag in flags if flag != "image"]
    paths = []
    for line in args.lines:
        if line.save_file:
            named = argparse.Namespace(**vars(args) | {"save_file": line.save_file})
            paths.append(result_path(named, line.prompt, lambda fault, n=line.number: error(f"prompt {n}: {fault}")))
        else:
            paths.append(folder / prompts.result_name(line, decisive, endings[0]))
    if clash := prompts.find_clash(paths):
        first, second = (paths[position] for position in clash)
        what = "result" if first.suffix == second.suffix else "record beside the result"
        error(f"prompts {clash[0] + 1} and {clash[1] + 1} of {args.prompt_file} have the same {what} {second}")
    own = "image" in input_flags(args)
    return [
        Request(line.prompt, line.seed, path, line.image if own else None)
        for line, path in zip(args.lines, paths, strict=True)
    ]


def choose_requests(args, requests: list[Request], error) -> list[Request]:
    """Those that are not finished. Checks their images."""
    if not args.prompt_file:
        return requests
    missing = requests
    if not args.overwrite and not args.magcache_calibration:
        missing = [request for request in requests if not prompts.is_finished(request.path)]
    finished = len(requests) - len(missing)
    print(f"prompts   {len(requests)} in {args.prompt_file}" + (f", {finished} of them finished" if finished else ""))
    if images := dict.fromkeys(request.image for request in missing if request.image):
        from magcache.app.media import read_image

        try:
            for image in images:
                read_image(image)
        except ValueError as fault:
            error(fault)
    return missing


def result_path(args, prompt: str, error) -> Path:
    """The given path, or upstream's pattern of names with the prompt reduced to characters that are safe anywhere."""
    endings = endings_of(args)
    if args.save_file:
        path = Path(args.save_file)
        if args.save_file.endswith(("/", os.sep)) or not path.name or path.is_dir():
            error(f"--save_file {args.save_file} is a folder")
        if not path.suffix:
            path = path.with_name(path.name + endings[0])
        if path.suffix.lower() not in endings:
            error(f"--save_file must end in one of {', '.join(endings)} for task {args.task}, got {path.name}")
        if not path.parent.is_dir():
            error(f"the folder of --save_file does not exist: {path.parent}")
    else:
        size = args.size.replace("*", "x") if sys.platform == "win32" else args.size
        parts = [args.task, size, str(args.ulysses_size), str(args.ring_size), prompts.slug(prompt)]
        parts.append(datetime.now().strftime("%Y%m%d_%H%M%S"))
        if args.use_magcache:
            settings = f"E{args.magcache_thresh}_K{args.magcache_K}_R{args.retention_ratio}"
            if args.magcache_speedup is not None:
                settings = f"X{args.magcache_speedup}"
            settings = settings.replace(".", "")
            parts = ["magcache", args.task, settings, *parts[1:]]
        path = Path("_".join(parts) + endings[0])
    check_writable(path.parent, error)
    return path


def save_result(video, path: Path, fps: int) -> None:
    """Writes the video or image; if that fails, keeps the pixels as a tensor, since an hour of work is in them."""
    import torch

    from magcache.app.media import to_frames, to_uint8, write_image, write_video

    try:
        if path.suffix.lower() in IMAGE_ENDINGS:
            write_image(path, to_frames(video)[0])
        else:
            write_video(path, to_frames(video), fps)
    except BaseException:
        pixels = torch.from_numpy(to_uint8(video))
        for folder in (tempfile.gettempdir(), "."):
            rescue = Path(folder) / f"{path.stem[:100]}.pt"
            with contextlib.suppress(OSError, RuntimeError):
                torch.save(pixels, rescue)
                print(f"could not write {path}; its pixels are kept in {rescue} (torch.load)", file=sys.stderr)
                break
        raise


def save_calibration(args, runs: list[dict], done: list[Request]) -> None:
    """Writes one table of the calibrated runs; `done` are their requests."""
    import diffusers
    import torch
    import transformers

    sigmas = magcache.noise_levels(args.sample_steps, args.sample_shift, args.sample_solver)
    measured_on = settings_of(args) | {
        "sample_steps": args.sample_steps,
        "prompts": [request.prompt for request in done],
        "seeds": [request.seed for request in done],
        "inputs": {flag: getattr(args, flag) for flag in input_flags(args)}
        | ({"image": [request.image for request in done]} if done[0].image else {}),
        "dtype": "bfloat16 autocast" if torch.cuda.is_available() else "float32",
        "timesteps": [int(1000 * sigma) for sigma in sigmas],
        "sigmas": sigmas,
        "versions": {module.__name__: module.__version__ for module in (magcache, torch, diffusers, transformers)},
        "date": datetime.now().isoformat("T", "seconds"),
    }
    stem = f"{args.task}_{args.size.replace('*', 'x')}_{args.frame_num}f_{args.sample_steps}steps"
    table = magcache.make_table(f"{stem}_{datetime.now():%Y%m%d_%H%M%S}", runs, measured_on)
    published = None
    with contextlib.suppress(ValueError):
        published = magcache.load_table(magcache.choose_table(args.task, args.ckpt_dir, args.size)[0])
    path = write_calibration(Path(args.calibration_dir), table, published)
    print(f"table     {path} (use it with --use_magcache --mag_ratios {path})")


def write_calibration(folder: Path, table: dict, published: magcache.RatioTable | None = None) -> Path:
    """Writes a table of `magcache.make_table` into a folder as NAME.json, with a picture of it, NAME.png, and the three
    flat lists under the names that the released script gives them. Each file is written whole or not at all.

    published: a table to draw beside it. Returns the path of the JSON. Raises FileExistsError rather than replace one;
    the flat lists are of the latest calibration, which is said where they replace another's.
    """
    path = folder / f"{table['name']}.json"
    magcache.save_table(path, table)
    flat = {folder / name: table[key] for key, name in FLAT_LISTS.items()}
    if any(file.exists() for file in flat):
        print(f"note: {', '.join(FLAT_LISTS.values())} in {folder} now hold this calibration, not the one before")
    for file, values in flat.items():
        with written_whole(file) as part:
            part.write_text(json.dumps(values))
    try:
        draw_calibration(table, path.with_suffix(".png"), published)
    except ImportError:
        print(f"note: no picture without matplotlib; later: python -m magcache.app.plot {path} --out {path.stem}.png")
    return path


def check_records(args, requests: list[Request], error) -> None:
    """A record takes the place of an earlier one, but of no other file."""
    for request in requests if args.magcache_record == "on" else ():
        path = record.record_path(request.path)
        if path.exists() and not record.is_record(path):
            error(f"{path} exists and is no record of a video: move it, or use --magcache_record off")


def make_record(job: Job, request: Request, pixels: tuple[int, int, int], watch, seconds: dict) -> dict:
    """All that it takes to make a video again. pixels: (frames, height, width). seconds: of what came before it."""
    import wan

    args, path, parser = job.args, request.path, make_parser(job.args.script)
    values = flag_values(parser, args)
    if request.image:
        values["image"] = request.image
    values |= {name: record.absolute(name, values[name]) for name in record.PATHS}
    again = path.with_stem(f"{path.stem}_again").absolute()
    values |= {"prompt": request.prompt, "base_seed": request.seed, "save_file": str(again)}
    left_out = ["prompt_file", "overwrite", "magcache_calibration", "calibration_dir", "magcache_plan", "compare"]
    left_out += ["use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang"]
    table = table_of(args) if job.schedule else None
    if table and not table.named:
        values["mag_ratios"] = str(table.path.absolute())
    if args.magcache_speedup is not None:
        left_out += ["magcache_thresh", "magcache_K", "retention_ratio"]
    elif table and table.named:
        values["mag_ratios"] = table.name
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(job.group.size)] if job.group.size > 1 else []
    flags = record.command_line(parser, values, left_out)
    frames, height, width = pixels
    return {
        "video": path.name,
        "frames": frames,
        "height": height,
        "width": width,
        "date": datetime.now().isoformat("T", "seconds"),
        "prompt": request.prompt,
        "seed": request.seed,
        "command": [sys.executable, *launcher, args.script, *flags],
        "arguments": values | {"save_file": str(path.absolute())},
        "versions": record.versions() | {"wan": os.path.dirname(os.path.abspath(wan.__file__))},
        "device": record.device(),
        "steps_by": job.made_by,
        "table": record.describe_table(table),
        "schedule": record.describe_schedule(job.schedule) if job.schedule else None,
        "seconds": {name: round(value, 4) for name, value in (seconds | watch.seconds).items()},
        "calls": {"computed": sum(not r for r, _ in watch.calls), "reused": sum(r for r, _ in watch.calls)},
        "peak_memory": record.peak_memory(),
    }


def write_record(args, path: Path, entries: dict) -> bool:
    """Writes the record of the video at `path` where it is wanted; a full disk must not cost what comes after."""
    if args.magcache_record == "off":
        return False
    try:
        record.write_record(record.record_path(path), entries)
    except OSError as fault:
        print(f"warning: the record could not be written: {fault}", file=sys.stderr)
        return False
    return True


def write_comparison(job: Job, request: Request, cached: tuple, uncached: tuple) -> dict:
    """Writes the video without the cache, and its comparison with the one with it. Returns what a record holds of it.

    cached: frames, uint8 [F, H, W, 3], and what was watched. uncached: video, [3, F, H, W] in [-1, 1], and the same.
    """
    from magcache.app.compare import Comparison, in_words
    from magcache.app.media import to_frames

    (frames, watch), (video, plain) = cached, uncached
    path, fps = request.path, job.config.sample_fps
    uncached_path = path.with_stem(f"{path.stem}_uncached")
    save_result(video, uncached_path, fps)
    plain.lap("save")
    comparison = Comparison(
        prompt=request.prompt,
        made_by=f"{job.made_by}, {settings_words(job.args)}",
        video=describe_video(job.args, frames.shape[:3], request.seed),
        device=device_name(),
        schedule=job.schedule,
        prediction=predict(job.args, job.schedule),
        cached=watch.seconds,
        uncached=plain.seconds,
    )
    scores, files = comparison.write(path, frames, to_frames(video), fps)
    print(f"compared  PSNR {in_words(scores.overall_psnr)}, SSIM {scores.overall_ssim:.4f}; {uncached_path.name}")
    for file in files:
        print(f"          {file}", flush=True)
    return {
        "psnr": scores.overall_psnr,
        "ssim": scores.overall_ssim,
        "psnr_by_frame": scores.psnr,
        "ssim_by_frame": scores.ssim,
        "uncached_seconds": {name: round(value, 4) for name, value in plain.seconds.items()},
        "files": [file.name for file in (uncached_path, *files)],
    }
