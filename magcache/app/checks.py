"""Refuses requests that make no sense, with one line and before anything is loaded.

Where functions of this package take `error`, they call it with that line; it does not return.
"""

import dataclasses
import importlib.util
import math
import os
import random
from pathlib import Path

import magcache
from magcache.app import prompts
from magcache.app.flags import input_flags, task_kind
from magcache.app.inputs import choose_inputs
from magcache.app.processes import Processes


def check_request(args, error) -> None:
    """Fills in the task's defaults and refuses what makes no sense, by the flags alone."""
    kind = task_kind(args)
    if not args.magcache_plan:
        check_processes(args, error)
    if args.frame_num is None:
        args.frame_num = {"t2i-14B": 1, "t2v-tiny": 17, "i2v-tiny": 17}.get(args.task, 81)
    elif kind == "vace" and args.src_video:
        print("note: --frame_num is not used with --src_video, whose own length decides")
        args.frame_num = 81
    if kind == "t2i" and args.frame_num != 1:
        error(f"t2i makes one image: --frame_num must be 1, got {args.frame_num}")
    if kind == "flf2v" and args.frame_num < 5:
        error(f"task {args.task} needs --frame_num 5 or more, got {args.frame_num}")
    if args.frame_num < 1 or args.frame_num % 4 != 1:
        error(f"--frame_num must be 4n+1 (1, 5, 9, ..., 81, ...), got {args.frame_num}")
    if args.sample_steps is None:
        args.sample_steps = 40 if args.task == "i2v-14B" else 50
    if args.sample_steps < 1:
        error(f"--sample_steps must be at least 1, got {args.sample_steps}")
    if args.sample_shift is None:
        small = kind == "i2v" and args.size in ("832*480", "480*832")
        args.sample_shift = 16.0 if kind in ("flf2v", "vace") else 3.0 if small else 5.0
    if not 0 < args.sample_shift < math.inf:
        error(f"--sample_shift must be positive, got {args.sample_shift}")
    if not math.isfinite(args.sample_guide_scale):
        error(f"--sample_guide_scale must be finite, got {args.sample_guide_scale}")
    if args.base_seed >= 2**63:
        error(f"--base_seed must be below 2^63, got {args.base_seed}")
    if args.overwrite and not args.prompt_file:
        error("--overwrite needs --prompt_file: a single video is always made")
    if args.prompt and not prompts.is_text(args.prompt):
        error(f"--prompt is no valid UTF-8 text: {args.prompt!r}")
    if args.prompt_file:
        read_prompts(args, error)
    if args.base_seed < 0:
        args.base_seed = random.randrange(2**32)
    choose_inputs(args, error if not args.magcache_plan else lambda message: None)  # a plan needs no files
    if not args.ckpt_dir:
        error("--ckpt_dir is needed: the checkpoint folder, such as ./Wan2.1-T2V-1.3B")

    try:
        magcache.Settings(args.magcache_thresh, args.magcache_K, args.retention_ratio)
    except ValueError as fault:
        error(fault)
    if args.use_magcache and args.magcache_calibration:
        error("--use_magcache and --magcache_calibration exclude each other: calibrate first, then use the table")
    for flag in ("mag_ratios", "magcache_speedup", "compare"):
        if getattr(args, flag) and not args.use_magcache:
            error(f"--{flag} needs --use_magcache")
    if args.compare:
        for package in ("skimage", "imageio_ffmpeg", "PIL"):
            need_package(package, "--compare", error)
    if args.magcache_speedup is not None:
        if given := getattr(args, "explicit", None):
            error(f"--magcache_speedup chooses the steps in place of --{min(given)}: give one of them")
        if args.mag_ratios:
            error("--magcache_speedup takes no ratio table: leave --mag_ratios out")
        if not 1 <= args.magcache_speedup <= args.sample_steps:
            error(f"--magcache_speedup must be between 1 and {args.sample_steps}, at which one step is computed")
    if args.magcache_calibration:
        if args.sample_steps < 2:
            error("--magcache_calibration compares steps, so it needs --sample_steps 2 or more")
        check_writable(Path(args.calibration_dir), error)


def check_processes(args, error) -> None:
    """Refuses flags for several GPUs that the number of processes does not fit, and fills in --offload_model."""
    try:
        world = Processes.from_environment().world
    except ValueError as fault:
        error(fault)
    size = args.ulysses_size * args.ring_size
    if min(args.ulysses_size, args.ring_size) < 1:
        error(f"--ulysses_size and --ring_size must be at least 1, got {args.ulysses_size} and {args.ring_size}")
    if world == 1:
        for flag in ("t5_fsdp", "dit_fsdp"):
            if getattr(args, flag):
                error(f"--{flag} shards over several processes: start them with torchrun --nproc_per_node N")
        if size > 1:
            error(
                f"--ulysses_size {args.ulysses_size} and --ring_size {args.ring_size} need {size} processes: "
                f"start them with torchrun --nproc_per_node {size}"
            )
    if world % size:
        error(
            f"{world} processes are no multiple of --ulysses_size {args.ulysses_size} times --ring_size "
            f"{args.ring_size}"
        )
    if args.offload_model and (args.dit_fsdp or args.t5_fsdp):
        print("note: --offload_model True does not move what --dit_fsdp and --t5_fsdp have sharded")
    if args.offload_model is None:
        args.offload_model = world == 1


def read_prompts(args, error) -> None:
    """Sets args.lines to the lines of --prompt_file, with their images; prompt and image of args to the first one's."""
    if args.prompt is not None:
        error("--prompt and --prompt_file exclude each other")
    if args.base_seed < 0:
        args.base_seed = 0  # a rerun has to find what is finished
    try:
        lines = prompts.read_prompts(args.prompt_file, args.base_seed)
    except ValueError as fault:
        error(f"--prompt_file: {fault}")
    images = [line.image or args.image for line in lines]
    if "image" not in input_flags(args):
        if any(line.image for line in lines):
            error(f"--prompt_file {args.prompt_file} names images, task {args.task} takes none")
    elif None in images:
        error(
            f"--prompt_file {args.prompt_file}: prompt {images.index(None) + 1} has no image, and there is no --image"
        )
    args.lines = [dataclasses.replace(line, image=image) for line, image in zip(lines, images, strict=True)]
    args.prompt, args.image = args.lines[0].prompt, args.lines[0].image


def check_writable(folder: Path, error) -> None:
    """The folder, or the first above it that exists, must take files."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        error(f"cannot write to {folder}")


def need_package(name: str, what: str, error) -> None:
    """Refuses a flag whose package is missing."""
    packages = {"skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg"}
    if importlib.util.find_spec(name) is None:
        error(f"{what} needs the package {name}: pip install {packages.get(name, name)}")
