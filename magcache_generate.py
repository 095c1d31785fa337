#!/usr/bin/env python
"""Generates videos with Wan2.1; with --use_magcache, reuses residuals of its transformer instead of computing them.

Accepts every flag of Wan2.1's generate.py. Runs with the `wan` package beside it: this repository's or Wan2.1's own.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

try:
    import magcache  # without torch until something runs
    from magcache import prompts
    from magcache.processes import Processes, gathered, leaving_at_once
except ImportError as fault:
    remedies = "`pip install .` in its repository, or copy its folder magcache/ beside magcache_generate.py"
    print(f"magcache_generate.py: error: package magcache cannot be imported ({fault}): {remedies}", file=sys.stderr)
    sys.exit(2)

# by the first part of the task: name of the pipeline in `wan`, type of the transformer in a checkpoint's config.json
PIPELINES = {"t2v": "WanT2V", "t2i": "WanT2V", "i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}
MODEL_TYPES = {"t2v": "t2v", "t2i": "t2v", "i2v": "i2v", "flf2v": "flf2v", "vace": "vace"}
INPUTS = {  # flags of the files that a task looks at
    "i2v": ("image",),
    "flf2v": ("first_frame", "last_frame"),
    "vace": ("src_video", "src_mask", "src_ref_images"),
}
TASKS = ("t2v-14B", "t2v-1.3B", "i2v-14B", "t2i-14B", "flf2v-14B", "vace-1.3B", "vace-14B", "t2v-tiny", "i2v-tiny")
VIDEO_ENDINGS, IMAGE_ENDINGS = (".mp4", ".mkv", ".mov"), (".png", ".jpg", ".jpeg", ".webp")
SIZES = ("720*1280", "1280*720", "480*832", "832*480", "1024*1024", "64*64")

# what runs without --prompt and input files; by task, or by its first part
EXAMPLES = {
    "t2v": {
        "prompt": "A paper boat sails down a rain-filled street at dusk, neon signs ripple in the water, slow tracking "
        "shot."
    },
    "t2i": {"prompt": "A lighthouse on a basalt cliff under a clear night sky, long exposure, sharp detail."},
    "i2v": {
        "prompt": "A white cat in sunglasses sits coolly on a striped surfboard that rocks on turquoise waves, its "
        "tail swaying and its fur ruffled by the sea breeze. Foam splashes around the board and white clouds drift "
        "over the green hills on a bright summer day.",
        "image": "i2v_input.JPG",
    },
    "flf2v": {
        "prompt": "A small blue bird with an orange breast pushes off from a blossoming branch, spreads its wings and "
        "flies up to the left over misty green hills. The branch springs back as it leaves; animated illustration, "
        "fixed camera.",
        "first_frame": "flf2v_input_first_frame.png",
        "last_frame": "flf2v_input_last_frame.png",
    },
    "vace": {
        "prompt": "A cheerful little girl with two hair buns and a red dress meets a friendly green snake under "
        "glowing festival lanterns. She laughs and strokes its head while the snake sways and coils around her.",
        "src_ref_images": "girl.png,snake.png",
    },
    "t2v-tiny": {"prompt": "a red circle moves right on a white background"},
    "i2v-tiny": {"prompt": "a purple triangle moves right on a yellow background", "image": "i2v_tiny_input.png"},
}
EXAMPLE_FOLDER = Path(__file__).parent / "examples"


class Explicit(argparse.Action):
    """Stores a value, and that it was given although it may be the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.explicit = {*getattr(namespace, "explicit", ()), self.dest}


def is_first(rank: str) -> bool:
    """By torchrun's name for it: the first of all processes (RANK), or of those on this machine (LOCAL_RANK)."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get(rank, "0") == "0"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, once a machine where several processes find it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if is_first("LOCAL_RANK") else None)


def truth_value(text: str) -> bool:
    """As `wan.utils.utils.str2bool`, whose import would load torch to read one flag."""
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected a truth value (True or False), got {text!r}")
    return text.lower() in ("yes", "true", "t", "y", "1")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("what to generate").add_argument
    add("--task", default="t2v-14B", choices=TASKS)
    add(
        "--size",
        default="1280*720",
        choices=SIZES,
        help="width*height of the video; i2v, flf2v and vace with a source video keep that file's shape, at this area",
    )
    add("--frame_num", type=int, help="frames, 4n+1 (default: 81; t2i 1, demo models 17)")
    add("--prompt", help="what to show (default: an example)")
    add(
        "--prompt_file",
        metavar="FILE",
        help="make a video of every line: a prompt, or JSON with prompt and, where wanted, seed, image, save_file; a "
        "rerun makes those that are missing",
    )
    add("--overwrite", action="store_true", help="with --prompt_file: make finished videos again")
    add(
        "--base_seed",
        type=int,
        default=-1,
        help="seed of the noise; negative: random (default: -1). The i-th prompt of a --prompt_file, from 0, has seed "
        "base_seed + i unless its line says another (default there: 0)",
    )
    add(
        "--save_file",
        help="path of the result (default: a name made of the settings, here); with --prompt_file the folder of the "
        "results (default: the file's name without its ending)",
    )
    add("--image", help="input image (i2v)")
    add("--first_frame", help="first frame (flf2v)")
    add("--last_frame", help="last frame (flf2v)")
    add("--src_video", help="source video (vace)")
    add("--src_mask", help="source mask (vace)")
    add("--src_ref_images", help="reference images, comma separated (vace)")

    add = parser.add_argument_group("sampling").add_argument
    add("--sample_solver", default="unipc", choices=("unipc", "dpm++"))
    add("--sample_steps", type=int, help="sampling steps (default: 50; i2v 40)")
    add("--sample_shift", type=float, help="shift of the noise levels (default: 5; i2v at 480p 3; flf2v, vace 16)")
    add("--sample_guide_scale", type=float, default=5.0, help="classifier-free guidance (default: 5.0)")

    add = parser.add_argument_group("model and machine").add_argument
    add("--ckpt_dir", help="checkpoint folder in the official layout")
    add(
        "--offload_model",
        type=truth_value,
        help="transformer and text encoder on the GPU only while they work (default: True; False on several GPUs)",
    )
    add("--t5_cpu", action="store_true", help="text encoder on the CPU")
    add("--t5_fsdp", action="store_true", help="shard the text encoder over GPUs")
    add("--dit_fsdp", action="store_true", help="shard the DiT over GPUs")
    add("--ulysses_size", type=int, default=1, help="GPUs that share the attention heads")
    add("--ring_size", type=int, default=1, help="GPUs that share the sequence in a ring")

    add = parser.add_argument_group("prompt extension").add_argument
    add("--use_prompt_extend", action="store_true", help="a language model writes the prompt out first")
    add(
        "--prompt_extend_method",
        default="local_qwen",
        choices=("dashscope", "local_qwen"),
        help="a model on this machine (default), or Alibaba's service with the key in DASH_API_KEY",
    )
    add(
        "--prompt_extend_model",
        help="local_qwen: folder or cached hub name of a Qwen2.5 (VL) instruct model; dashscope: name of a model",
    )
    add("--prompt_extend_target_lang", default="zh", choices=("zh", "en"), help="language of the prompt (default: zh)")

    add = parser.add_argument_group("MagCache").add_argument
    add("--use_magcache", action="store_true", help="reuse residuals where the schedule says so")
    add(
        "--magcache_thresh",
        type=float,
        default=0.12,
        action=Explicit,
        help="bound on the error of reused steps in a row (default: 0.12)",
    )
    add("--magcache_K", type=int, default=2, action=Explicit, help="most reused steps in a row (default: 2)")
    add(
        "--retention_ratio",
        type=float,
        default=0.2,
        action=Explicit,
        help="share of the steps, from the start, in full (default: 0.2)",
    )
    add(
        "--magcache_speedup",
        type=float,
        metavar="X",
        help="choose the steps to compute for this speed-up of the transformer, in place of thresh, K and retention",
    )
    add(
        "--magcache_forecast",
        choices=("reuse", "linear"),
        help="what stands in for a residual: the last one (default), or the line through the last two (default with "
        "--magcache_speedup; one more residual per branch is kept)",
    )
    add(
        "--magcache_calibration",
        nargs="?",
        const=True,
        default=False,
        choices=("full",),
        help="measure the ratio table of this model in a run without skips; full: also how the residuals of all steps "
        "relate, for --magcache_speedup",
    )
    add("--mag_ratios", metavar="NAME_OR_PATH", help="ratio table (default: by task and name of the checkpoint folder)")
    add("--mag_ratios_force", action="store_true", help="take a table file of another model or task all the same")
    add(
        "--magcache_resample",
        default="nearest",
        choices=("nearest", "sigma"),
        help="how a table answers other steps than it was measured with: by the nearest ratio (default, as upstream) "
        "or along the noise level, which also answers another shift or solver",
    )
    add("--magcache_smooth", default="none", choices=("none", "sqrt"), help="sqrt: square root of the ratios")
    add(
        "--magcache_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the cached residuals (default: as computed)",
    )
    add("--magcache_offload", action="store_true", help="cached residuals wait in CPU memory")
    add(
        "--magcache_plan",
        nargs="?",
        const=True,
        metavar="PNG",
        help="only say (and draw) what MagCache would do: no weights, no GPU; takes the flags of the run as they are",
    )
    add(
        "--magcache_record",
        default="on",
        choices=("on", "off"),
        help="write a JSON beside the video with all it takes to make it again (default: on)",
    )
    add(
        "--compare",
        action="store_true",
        help="also generate without the cache, and write both and their difference as a video and a page, with scores",
    )
    add("--calibration_dir", default="calibration", help="where a calibration is written (default: calibration)")
    return parser


def check_request(args, error) -> None:
    """Fills in the task's defaults and refuses what makes no sense, by the flags alone."""
    kind = args.task.split("-")[0]
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
    for flag in ("mag_ratios", "mag_ratios_force", "magcache_speedup", "magcache_forecast", "compare"):
        if getattr(args, flag) and not args.use_magcache:
            error(f"--{flag} needs --use_magcache")
    if args.compare:
        for package in ("skimage", "imageio_ffmpeg", "PIL"):
            need_package(package, "--compare", error)
    if args.magcache_speedup is not None:
        if given := getattr(args, "explicit", None):
            error(f"--magcache_speedup chooses the steps in place of --{min(given)}: give one of them")
        if not 1 <= args.magcache_speedup <= args.sample_steps:
            error(f"--magcache_speedup must be between 1 and {args.sample_steps}, at which one step is computed")
    if args.magcache_calibration:
        if args.magcache_calibration == "full" and args.ulysses_size * args.ring_size > 1:
            error("--magcache_calibration full needs all tokens in one process, so --ulysses_size 1 and --ring_size 1")
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
    """Sets args.lines to the lines of --prompt_file, and what a single request would have to the first one's."""
    if args.prompt is not None:
        error("--prompt and --prompt_file exclude each other")
    if args.base_seed < 0:
        args.base_seed = 0  # a rerun has to find what is finished
    try:
        args.lines = prompts.read_prompts(args.prompt_file, args.base_seed)
    except ValueError as fault:
        error(f"--prompt_file: {fault}")
    args.prompt = args.lines[0].prompt
    images = [line.image or args.image for line in args.lines]
    if "image" not in INPUTS.get(args.task.split("-")[0], ()):
        if any(line.image for line in args.lines):
            error(f"--prompt_file {args.prompt_file} names images, task {args.task} takes none")
    elif None in images:
        error(
            f"--prompt_file {args.prompt_file}: prompt {images.index(None) + 1} has no image, and there is no --image"
        )
    args.image = images[0]


def choose_inputs(args, error) -> None:
    """Takes the task's example if neither prompt nor inputs are given, else wants all that the task needs."""
    kind = args.task.split("-")[0]
    for flag in (flag for flags in INPUTS.values() for flag in flags):
        if getattr(args, flag) is not None and flag not in INPUTS.get(kind, ()):
            print(f"note: --{flag} is not used by task {args.task}")
    given = [flag for flag in INPUTS.get(kind, ()) if getattr(args, flag) is not None]
    example = EXAMPLES.get(args.task, EXAMPLES[kind])
    if args.prompt is None and not given:
        for flag, names in example.items():
            path = names if flag == "prompt" else ",".join(str(EXAMPLE_FOLDER / name) for name in names.split(","))
            setattr(args, flag, path)
    elif kind in ("i2v", "flf2v"):
        missing = [flag for flag in INPUTS[kind] if flag not in given]
        if missing:
            error(f"task {args.task} needs --{missing[0]} (without --prompt and --{missing[0]} an example runs)")
    if args.prompt is None:
        args.prompt = example["prompt"]
        print("note: there is no --prompt; the task's example is taken, which knows nothing of your files")


def check_writable(folder: Path, error) -> None:
    """The folder, or the first above it that exists, must take files."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        error(f"cannot write to {folder}")


def is_stock_wan() -> bool:
    """Whether the `wan` here is Wan2.1's own, which does less than this repository's."""
    return importlib.util.find_spec("wan.pipeline") is None


def check_wan(args, error):
    """Refuses what the task's model does not do, and an incomplete checkpoint folder. Returns the model's config."""
    try:
        from wan.configs import SUPPORTED_SIZES, WAN_CONFIGS
    except ImportError as fault:
        error(f"the wan package cannot be imported ({fault}): run this beside one, in its environment")
    if args.task not in WAN_CONFIGS:
        error(f"the wan package here has no task {args.task}")
    if args.size not in SUPPORTED_SIZES[args.task]:
        error(f"task {args.task} supports {', '.join(SUPPORTED_SIZES[args.task])}, not {args.size}")
    if args.task.startswith("flf2v") and args.frame_num != 81 and is_stock_wan():
        error(f"the wan package here makes flf2v videos of 81 frames only, --frame_num is {args.frame_num}")
    config, folder = WAN_CONFIGS[args.task], Path(args.ckpt_dir)
    if not folder.is_dir():
        error(f"--ckpt_dir {folder} is not a folder")
    single, index = (folder / f"diffusion_pytorch_model.safetensors{suffix}" for suffix in ("", ".index.json"))
    weights = [single]
    try:
        model = json.loads((folder / "config.json").read_text())
        kind, shape = model.get("model_type"), (model.get("dim"), model.get("num_layers"))
        heads = model.get("num_heads", config.num_heads)
        if index.is_file():
            weights = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        elif any(folder.glob("diffusion_pytorch_model-*.safetensors")):
            weights = [index]
    except FileNotFoundError:
        error(f"--ckpt_dir {folder} lacks config.json")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as fault:
        error(f"--ckpt_dir {folder} has a broken config.json or {index.name}: {fault!r}")
    needed = MODEL_TYPES[args.task.split("-")[0]]
    if kind != needed:
        error(f"--ckpt_dir {folder} holds a model of type {kind}, task {args.task} needs {needed}")
    if heads % args.ulysses_size:
        error(
            f"--ulysses_size {args.ulysses_size} does not divide the {heads} attention heads of the model in {folder}"
        )
    files = [config.t5_checkpoint, f"{config.t5_tokenizer}/tokenizer.json", config.vae_checkpoint]
    if needed in ("i2v", "flf2v"):
        files.append(config.clip_checkpoint)
        if is_stock_wan() and not (folder / config.clip_tokenizer).is_dir():
            error(f"--ckpt_dir {folder} lacks {config.clip_tokenizer}/, which the wan package here loads")
    for path in (*weights, *(folder / name for name in files)):
        if not path.is_file():
            error(f"--ckpt_dir {folder} lacks {path.relative_to(folder)}")
    others = [task for task, other in WAN_CONFIGS.items() if (other.dim, other.num_layers) == shape]
    if others and args.task not in others:
        print(f"note: by its size the model in {folder} is that of {others[0]}, not of {args.task}")
    return config


def read_inputs(args, error) -> list:
    """Reads the input files whole, so that a bad one fails now: the images of i2v and flf2v, or the source video, mask
    and references of vace, as lists of one. Empty for tasks without. None for vace with a stock `wan`: its pipeline
    reads them once it is loaded (`prepare_source`), and only what can be told without it is checked."""
    kind = args.task.split("-")[0]
    try:
        if kind == "vace" and is_stock_wan():
            return check_sources(args)
        if kind == "vace":
            from wan.configs import SIZE_CONFIGS
            from wan.utils.vace_source import prepare_source

            refs = reference_paths(args)
            sources = prepare_source(args.src_video, args.src_mask, refs, args.frame_num, SIZE_CONFIGS[args.size])
            return [[source] for source in sources]
        if kind in INPUTS:
            from magcache.images import read_image

            return [read_image(getattr(args, flag)) for flag in INPUTS[kind]]
    except ValueError as fault:
        error(fault)
    return []


def reference_paths(args) -> list[str]:
    return [path.strip() for path in (args.src_ref_images or "").split(",") if path.strip()]


def check_sources(args) -> None:
    """Raises ValueError for source files of vace that are missing, references that are no image, a mask alone."""
    from magcache.images import read_image

    for path in (args.src_video, args.src_mask):
        if path and not Path(path).is_file():
            raise ValueError(f"cannot read {path}: no such file")
    if args.src_mask and not args.src_video:
        raise ValueError(f"the mask {args.src_mask} needs a source video")
    for path in reference_paths(args):
        read_image(path)
    if args.src_video:
        print("note: this wan package reads the source video after loading; its size and length are the video's")


def video_shape(args, inputs: list | None) -> tuple[int, int, int]:
    """(frames, height, width) of the result."""
    from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS

    if args.task.startswith("vace") and inputs:
        return tuple(inputs[0][0].shape[1:])
    if inputs:
        from magcache.images import video_size

        return args.frame_num, *reversed(video_size(inputs[0].size, MAX_AREA_CONFIGS[args.size]))
    return args.frame_num, *reversed(SIZE_CONFIGS[args.size])


def make_schedule(args, error):
    """Returns the schedule and the name of its ratio table, or (None, None) without --use_magcache."""
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
    that was asked for and is not of this model and these settings."""
    steps, forecast = args.sample_steps, args.magcache_forecast or "linear"
    count = int(steps / args.magcache_speedup + 1e-9)
    asked = args.mag_ratios is not None
    with contextlib.nullcontext() if asked else contextlib.suppress(ValueError):
        name = args.mag_ratios or magcache.choose_table(args.task, args.ckpt_dir, args.size)[0]
        computed = magcache.best_steps_for(name, settings_of(args) | {"sample_steps": steps}, count, forecast)
        return magcache.plan_steps(
            computed, steps, forecast
        ), f"steps by the full calibration {name}, {forecast} forecast"
    print(
        "note: there is no full calibration of this model and these settings (--magcache_calibration full makes one), "
        "so the steps are evenly spread"
    )
    return magcache.plan_steps(
        magcache.spread_steps(steps, count), steps, forecast
    ), f"spread steps, {forecast} forecast"


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


@dataclasses.dataclass(frozen=True)
class OneGroup:
    """What upstream's `wan` makes of several processes: all of them work on the same video."""

    rank: int
    size: int
    index: int = 0
    count: int = 1


def start_processes(processes: Processes, args, given: dict, schedule, error):
    """Connects the processes of torchrun, gives them one seed, and starts the sequence parallelism of the `wan` here.

    given: the arguments as they were parsed; they and the plan must be the same everywhere, as every process decides
    on its own what to reuse. Returns the group of processes that makes a video together: this one's `rank` in it, its
    `size`, its `index` among `count` groups.
    """
    try:
        processes.connect()
    except ValueError as fault:
        error(fault)
    compared = {f"--{name}": value for name, value in given.items()} | {"the plan": schedule and schedule.weights}
    compared["the prompts of --prompt_file"] = getattr(args, "lines", None)
    if differences := processes.differences(compared):
        if processes.rank in (0, *differences):
            rank, names = min(differences.items())
            names = ", ".join(names)
            print(f"magcache_generate.py: error: process {rank} differs from process 0 in {names}", file=sys.stderr)
        sys.exit(2)
    args.base_seed = processes.from_first(args.base_seed)
    try:
        from wan.distributed.groups import start_groups
    except ModuleNotFoundError:
        return start_xfuser(processes, args, error)
    try:
        return start_groups(args.ulysses_size, args.ring_size, fsdp=args.dit_fsdp or args.t5_fsdp)
    except (ValueError, ImportError) as fault:  # of a torch or diffusers that is too old
        error(fault)


def start_xfuser(processes: Processes, args, error) -> OneGroup:
    """Upstream's `wan` wants xfuser's groups to be there before the pipeline is made."""
    if args.ulysses_size * args.ring_size > 1:
        if args.ulysses_size * args.ring_size != processes.world:
            error(
                f"--ulysses_size {args.ulysses_size} times --ring_size {args.ring_size} must be the number of "
                f"processes with the wan package here, there are {processes.world}"
            )
        try:
            from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel
        except ImportError as fault:
            error(f"--ulysses_size and --ring_size need the package xfuser with the wan package here: {fault}")
        init_distributed_environment(rank=processes.rank, world_size=processes.world)
        initialize_model_parallel(
            sequence_parallel_degree=processes.world, ring_degree=args.ring_size, ulysses_degree=args.ulysses_size
        )
    return OneGroup(processes.rank, processes.world)


def make_expander(args, error):
    """Returns what extends the prompt, or None. Reads no weights, unless the `wan` here does."""
    if not args.use_prompt_extend:
        return None
    from wan.utils.prompt_extend import DashScopePromptExpander, QwenPromptExpander

    method = {"dashscope": DashScopePromptExpander, "local_qwen": QwenPromptExpander}[args.prompt_extend_method]
    device = {"device": 0} if args.prompt_extend_method == "local_qwen" else {}
    try:
        return method(model_name=args.prompt_extend_model, is_vl=args.task.startswith(("i2v", "flf2v")), **device)
    except (ValueError, OSError, ImportError) as fault:
        error(str(fault).splitlines()[0])


def extend_prompt(args, prompt: str, expander, images: list) -> str:
    """The prompt's extension, or the prompt itself if that fails."""
    print("extending the prompt", flush=True)
    image = None if not images else images[0] if len(images) == 1 else images
    out = expander(prompt, tar_lang=args.prompt_extend_target_lang, image=image, seed=args.base_seed)
    if not out.status:
        print(f"warning: the prompt was not extended: {out.message}", file=sys.stderr)
        return prompt
    if images and not expander.is_vl:
        print(f"note: {expander.model_name} sees no pictures, so only the text was extended")
    print(f"prompt    {out.prompt}")
    return out.prompt


def make_requests(args, schedule, error) -> list[tuple[str, int, Path]]:
    """(prompt, seed, path of the result) of every video."""
    if not args.prompt_file:
        return [(args.prompt, args.base_seed, result_path(args, args.prompt, error))]
    endings = IMAGE_ENDINGS if args.task.startswith("t2i") else VIDEO_ENDINGS
    folder = Path(args.save_file or Path(args.prompt_file).stem)
    if folder.suffix.lower() in VIDEO_ENDINGS + IMAGE_ENDINGS or folder.is_file():
        error(f"with --prompt_file, --save_file must be a folder, got {folder}")
    check_writable(folder, error)
    decisive = settings_of(args) | {"steps": args.sample_steps, "plan": schedule and schedule.weights}
    decisive |= {flag: getattr(args, flag) for flag in ("magcache_dtype", "use_prompt_extend")}
    decisive["inputs"] = [getattr(args, flag) for flags in INPUTS.values() for flag in flags if flag != "image"]
    paths = []
    for line in args.lines:
        if line.save_file:
            named = argparse.Namespace(**vars(args) | {"save_file": line.save_file})
            paths.append(result_path(named, line.prompt, lambda fault, n=line.number: error(f"prompt {n}: {fault}")))
        else:
            line = dataclasses.replace(line, image=line.image or args.image)
            paths.append(folder / prompts.result_name(line, decisive, endings[0]))
    if clash := prompts.find_clash(paths):
        error(f"prompts {clash[0] + 1} and {clash[1] + 1} of {args.prompt_file} have the same result {paths[clash[1]]}")
    return [(line.prompt, line.seed, path) for line, path in zip(args.lines, paths, strict=True)]


def choose_requests(args, requests: list, error) -> list:
    """Those that are not finished. Sets args.images, by path of the result, and checks those that are needed."""
    args.images = {}
    if not args.prompt_file:
        return requests
    missing = requests
    if not args.overwrite and not args.magcache_calibration:
        missing = [request for request in requests if not prompts.is_finished(request[-1])]
    finished = len(requests) - len(missing)
    print(f"prompts   {len(requests)} in {args.prompt_file}" + (f", {finished} of them finished" if finished else ""))
    if "image" in INPUTS.get(args.task.split("-")[0], ()):
        from magcache.images import read_image

        args.images = {path: line.image or args.image for (*_, path), line in zip(requests, args.lines, strict=True)}
        try:
            for image in dict.fromkeys(args.images[path] for *_, path in missing):
                read_image(image)
        except ValueError as fault:
            error(fault)
    return missing


def use_image(args, path: Path, inputs: list) -> list:
    """The inputs of the request with this path, whose image args.image becomes."""
    if path not in args.images:
        return inputs
    from magcache.images import read_image

    args.image = args.images[path]
    return [read_image(args.image)]


def result_path(args, prompt: str, error) -> Path:
    """The given path, or upstream's pattern of names with the prompt reduced to characters that are safe anywhere."""
    endings = IMAGE_ENDINGS if args.task.startswith("t2i") else VIDEO_ENDINGS
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


def describe_video(args, shape: tuple[int, int, int], seed: int | str) -> str:
    """shape: (frames, height, width)."""
    frames, height, width = shape
    return (
        f"{args.task}, {width}x{height}, {frames} frames, {args.sample_steps} steps, {args.sample_solver}, shift "
        f"{args.sample_shift:g}, guidance {args.sample_guide_scale:g}, seed {seed}"
    )


def settings_words(args) -> str:
    if args.magcache_speedup is not None:
        return f"speed-up {args.magcache_speedup:g}"
    smooth = "" if args.magcache_smooth == "none" else f", smoothed ({args.magcache_smooth})"
    return f"thresh {args.magcache_thresh:g}, K {args.magcache_K}, retention {args.retention_ratio:g}{smooth}"


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, float32"


def announce(args, schedule, table: str | None, shape: tuple[int, int, int], requests: list) -> None:
    """Says before the models are loaded what is going to happen."""
    calls = 2 * args.sample_steps
    if not args.prompt_file:
        print(f"prompt    {args.prompt}")
    for flag in INPUTS.get(args.task.split("-")[0], ()):
        if getattr(args, flag) and not args.images:
            print(f"{flag:<9} {getattr(args, flag)}")
    seed = args.base_seed if len(requests) == 1 else f"{args.base_seed} and up"
    print(f"video     {describe_video(args, shape, seed)}")
    if schedule:
        print(
            f"MagCache  {schedule.computed} of {calls} transformer calls computed, at most "
            f"{schedule.speedup_bound:.2f}x faster; {table}"
        )
        if schedule.computed == calls:
            print("note: these settings reuse nothing; a larger --magcache_thresh or --magcache_K would")
    else:
        print(f"MagCache  off: all {calls} transformer calls computed")
    if args.magcache_calibration:
        print(f"          their ratios are measured and written to {args.calibration_dir}/")
        if args.magcache_calibration == "full":
            gigabytes = magcache.host_bytes(args.sample_steps, width_of(args)) / 1e9
            print(f"          the residuals of all steps are sampled: {gigabytes:.2f} GB of CPU memory")
    if len(requests) > 1:
        print(f"results   {len(requests)} files in {', '.join(sorted({str(path.parent) for *_, path in requests}))}")
    else:
        print(f"result    {requests[0][-1]}", flush=True)


def width_of(args) -> int:
    """Channels of a token in the transformer."""
    return json.loads((Path(args.ckpt_dir) / "config.json").read_text())["dim"]


def settings_of(args) -> dict:
    """What decides on a model's ratios, by the keys of a calibration's `measured_on`."""
    keys = ("task", "size", "frame_num", "sample_solver", "sample_shift", "sample_guide_scale")
    settings = {key: getattr(args, key) for key in keys} | {"checkpoint": Path(args.ckpt_dir).resolve().name}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # refused with the rest of the folder, later
        model = json.loads((Path(args.ckpt_dir) / "config.json").read_text())
        shape = {key: value for key, value in model.items() if not key.startswith("_")}  # without diffusers' version
        settings["fingerprint"] = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
    return settings


def save_calibration(args, runs: list[dict], products: list, done: list[tuple[str, int, Path]]) -> None:
    """Writes one table of the calibrated runs, with their products if there are any; `done` are their requests."""
    import diffusers
    import torch
    import transformers

    sigmas = magcache.noise_levels(args.sample_steps, args.sample_shift, args.sample_solver)
    measured_on = settings_of(args) | {
        "sample_steps": args.sample_steps,
        "prompts": [prompt for prompt, *_ in done],
        "seeds": [seed for _, seed, _ in done],
        "inputs": {flag: getattr(args, flag) for flag in INPUTS.get(args.task.split("-")[0], ())}
        | ({"image": [args.images[path] for *_, path in done]} if args.images else {}),
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
    path = magcache.save_calibration(args.calibration_dir, table, published)
    if products:
        magcache.save_products(path.with_suffix(".npz"), sum(products) / len(products), measured_on)
    print(f"table     {path} (use it with --use_magcache --mag_ratios {path})")


def save_result(video, path: Path, fps: int) -> None:
    """Writes the video or image; if that fails, keeps the pixels as a tensor, since an hour of work is in them."""
    import torch

    from wan.utils.utils import cache_image, cache_video

    try:
        with magcache.ratios.written_whole(path) as part:
            if path.suffix.lower() in IMAGE_ENDINGS:
                written = cache_image(video[None, :, 0], str(part), nrow=1)
            else:
                written = cache_video(video[None], str(part), fps=fps, nrow=1)
            if written is None:  # upstream's writers report a failure so
                raise OSError(f"cannot write {path}")
    except BaseException:
        pixels = ((video.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu()
        for folder in (tempfile.gettempdir(), "."):
            rescue = Path(folder) / f"{path.stem[:100]}.pt"
            with contextlib.suppress(OSError, RuntimeError):
                torch.save(pixels, rescue)
                print(f"could not write {path}; its pixels are kept in {rescue} (torch.load)", file=sys.stderr)
                break
        raise


def summarise(schedule, made_by: str | None, watches: list, seconds: dict[str, float]) -> None:
    """Says what happened, from what was seen of the calls and not from the plan."""
    from magcache.record import peak_memory
    from magcache.report import number_of_bytes

    for watch in watches:
        for phase, value in watch.seconds.items():
            phase = "denoise" if phase in ("computed", "reused", "sampler") else phase
            seconds[phase] = seconds.get(phase, 0.0) + value
    print("time      " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    calls = [call for watch in watches for call in watch.calls]
    if schedule and calls:
        times = {kind: [duration for reused, duration in calls if reused == kind] for kind in (False, True)}
        cond, uncond = (sum(reused for w in watches for reused, _ in w.calls[branch::2]) for branch in (0, 1))
        steps = schedule.steps * len(watches)
        print(
            f"MagCache  {len(times[False])} of {len(calls)} calls computed, reused {cond} of {steps} cond and "
            f"{uncond} of {steps} uncond (bound {schedule.speedup_bound:.2f}x, {made_by})"
        )
        typical = statistics.fmean(times[False])
        line = f"          computed {1000 * typical:.1f} ms a call"
        if times[True]:
            line += f", reused {1000 * statistics.fmean(times[True]):.1f} ms a call"
        speedup = len(calls) * typical / sum(times[False] + times[True])
        print(f"{line}; {speedup:.2f}x faster than computing every call")
    if memory := peak_memory():
        print(f"memory    at most {number_of_bytes(memory['bytes'])} of {memory['of']}")
    if schedule and any(tuple(reused for reused, _ in watch.calls) != schedule.reuse for watch in watches):
        print("warning: the calls of the model did not follow the schedule; please report this", file=sys.stderr)


def check_records(args, requests: list, error) -> None:
    """A record takes the place of an earlier one, but of no other file."""
    from magcache.record import is_record, record_path

    for *_, path in requests if args.magcache_record == "on" else ():
        record = record_path(path)
        if record.exists() and not is_record(record):
            error(f"{record} exists and is no record of a video: move it, or use --magcache_record off")


def make_record(args, group, request, pixels, schedule, made_by: str | None, watch, seconds: dict) -> dict:
    """All that it takes to make a video again. request: its prompt, seed and path; pixels: (frames, height, width);
    seconds: of what came before the video."""
    import wan
    from magcache import record

    prompt, seed, path = request
    values = {action.dest: getattr(args, action.dest) for action in make_parser()._actions if action.dest != "help"}
    values |= {name: record.absolute(name, values[name]) for name in record.PATHS}
    again = path.with_stem(f"{path.stem}_again").absolute()
    values |= {"prompt": prompt, "base_seed": seed, "save_file": str(again)}
    left_out = ["prompt_file", "overwrite", "magcache_calibration", "calibration_dir", "magcache_plan", "compare"]
    left_out += ["use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang"]
    table = table_of(args) if schedule else None
    if table and not table.named:
        values["mag_ratios"] = str(table.path.absolute())
    if args.magcache_speedup is not None:
        left_out += ["magcache_thresh", "magcache_K", "retention_ratio"]
    elif table and table.named:
        values["mag_ratios"] = table.name
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(group.size)] if group.size > 1 else []
    flags = record.command_line(make_parser(), values, left_out)
    frames, height, width = pixels
    return {
        "video": path.name,
        "frames": frames,
        "height": height,
        "width": width,
        "date": datetime.now().isoformat("T", "seconds"),
        "prompt": prompt,
        "seed": seed,
        "command": [sys.executable, *launcher, os.path.abspath(__file__), *flags],
        "arguments": values | {"save_file": str(path.absolute())},
        "versions": record.versions() | {"wan": os.path.dirname(os.path.abspath(wan.__file__))},
        "device": record.device(),
        "steps_by": made_by,
        "table": record.describe_table(table),
        "schedule": record.describe_schedule(schedule) if schedule else None,
        "seconds": {name: round(value, 4) for name, value in (seconds | watch.seconds).items()},
        "calls": {"computed": sum(not r for r, _ in watch.calls), "reused": sum(r for r, _ in watch.calls)},
        "peak_memory": record.peak_memory(),
    }


def write_record(args, path: Path, record: dict) -> bool:
    """Writes the record of the video at `path` where it is wanted; a full disk must not cost what comes after."""
    from magcache.record import record_path, write_record

    if args.magcache_record == "off":
        return False
    try:
        write_record(record_path(path), record)
    except OSError as fault:
        print(f"warning: the record could not be written: {fault}", file=sys.stderr)
        return False
    return True


def compare(args, pipeline, run, cache, schedule, made_by: str, watch, frames, request, fps: int) -> dict | None:
    """Generates the same video without the cache and writes the comparison.

    frames: of the cached video, uint8; None where this process got none. request: its prompt, seed and path. Returns
    what a record holds of it.
    """
    from magcache.compare import Comparison, in_words, to_frames
    from magcache.patch import attach
    from magcache.progress import watched

    prompt, seed, path = request
    print("now the same without the cache, to compare", flush=True)
    magcache.remove_magcache(pipeline.model)
    try:
        with watched(pipeline, all_computed(args), show=watch.show) as plain:
            video = run()
        if frames is None:
            return None
        uncached = path.with_stem(f"{path.stem}_uncached")
        save_result(video, uncached, fps)
        plain.lap("save")
        comparison = Comparison(
            prompt=prompt,
            made_by=f"{made_by}, {settings_words(args)}",
            video=describe_video(args, frames.shape[:3], seed),
            device=device_name(),
            schedule=schedule,
            prediction=predict(args, schedule, made_by),
            cached=watch.seconds,
            uncached=plain.seconds,
        )
        scores, files = comparison.write(path, frames, to_frames(video), fps)
    except BaseException:
        print(f"the comparison failed; the video with the cache is in {path}", file=sys.stderr)
        raise
    finally:
        attach(pipeline.model, cache)  # for the next video
    print(f"compared  PSNR {in_words(scores.overall_psnr)}, SSIM {scores.overall_ssim:.4f}; {uncached.name}")
    for file in files:
        print(f"          {file}", flush=True)
    return {
        "psnr": scores.overall_psnr,
        "ssim": scores.overall_ssim,
        "psnr_by_frame": scores.psnr,
        "ssim_by_frame": scores.ssim,
        "uncached_seconds": {name: round(value, 4) for name, value in plain.seconds.items()},
        "files": [file.name for file in (uncached, *files)],
    }


def all_computed(args) -> magcache.Schedule:
    return magcache.Schedule((None, None) * args.sample_steps)


def generate(
    args, processes: Processes, group, config, schedule, table: str | None, inputs: list, expander, requests: list
) -> list[str]:
    """Makes this group's share of the requests. Returns what went wrong in any group, a line for each video."""
    import torch
    from tqdm import tqdm

    import wan
    from magcache.compare import to_frames
    from magcache.progress import watched
    from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS

    seconds, clock = {}, time.perf_counter()

    def lap(name):
        nonlocal clock
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - clock
        clock = time.perf_counter()

    vace = args.task.startswith("vace")
    if expander:
        requests = [
            (extend_prompt(args, prompt, expander, [] if vace else use_image(args, path, inputs)), seed, path)
            for prompt, seed, path in requests
        ]
    if args.use_prompt_extend:
        requests = processes.from_first(requests)
        lap("extend")
    requests = prompts.share(requests, group.index, group.count)
    everyone, own = processes.patient_group(processes.world), processes.patient_group(group.size)
    if not requests:  # fewer videos than groups
        return list(itertools.chain(*gathered([], everyone)))
    if group.rank == 0:
        for *_, path in requests:
            path.parent.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    device = device_name()
    if processes.world > 1:
        device = f"{processes.world} processes, {device}"
    print(f"device    {device}; loading {args.ckpt_dir}", flush=True)
    if not cuda and not args.task.endswith("-tiny"):
        slow = "the wan package here is made for one" if is_stock_wan() else "a full-size model takes hours for a video"
        print(f"note: there is no CUDA device; {slow}", flush=True)
    pipeline_class = getattr(wan, PIPELINES[args.task.split("-")[0]])
    pipeline = pipeline_class(
        config=config,
        checkpoint_dir=args.ckpt_dir,
        device_id=processes.local_rank,
        rank=group.rank,
        t5_fsdp=args.t5_fsdp,
        dit_fsdp=args.dit_fsdp,
        use_usp=args.ulysses_size * args.ring_size > 1,
        t5_cpu=args.t5_cpu,
    )
    lap("load")
    cache = calibration = None
    if schedule:
        cache = magcache.apply_magcache(
            pipeline.model,
            schedule,
            dtype=getattr(torch, args.magcache_dtype) if args.magcache_dtype else None,
            device="cpu" if args.magcache_offload else None,
        )
    elif args.magcache_calibration:
        if args.magcache_calibration == "full":
            sigmas = magcache.noise_levels(args.sample_steps, args.sample_shift, args.sample_solver)
            scale = args.sample_guide_scale
            calibration = magcache.apply_full_calibration(pipeline.model, args.sample_steps, sigmas, scale)
        else:
            calibration = magcache.apply_calibration(pipeline.model, args.sample_steps, sharing_group(args, group))

    if inputs is None:
        paths = ([args.src_video], [args.src_mask], [reference_paths(args) or None])
        inputs = pipeline.prepare_source(*paths, args.frame_num, SIZE_CONFIGS[args.size], pipeline.device)
    given = {"size": SIZE_CONFIGS[args.size]}
    if args.task.startswith(("i2v", "flf2v")):
        given = {"max_area": MAX_AREA_CONFIGS[args.size]}
    runs, products, watches, failures = [], [], [], []  # what was measured and seen of the requests so far
    several = bool(args.prompt_file) and not calibration  # one that fails does not stop the others
    bar = tqdm(requests, desc="videos", unit="video", disable=None if several and processes.rank == 0 else True)
    try:
        for number, request in enumerate(bar, start=1):
            prompt, seed, path = request
            if args.prompt_file:
                whose = f", those of group 1 of {group.count}" if group.count > 1 else ""
                print(f"video     {number} of {len(requests)}{whose}, seed {seed}: {prompt}", flush=True)
            fault = None
            try:
                run = functools.partial(
                    pipeline.generate,
                    prompt,
                    *use_image(args, path, inputs),
                    **given,
                    frame_num=args.frame_num,
                    shift=args.sample_shift,
                    sample_solver=args.sample_solver,
                    sampling_steps=args.sample_steps,
                    guide_scale=args.sample_guide_scale,
                    seed=seed,
                    offload_model=args.offload_model,
                )
                with watched(pipeline, schedule or all_computed(args), cache, processes.rank == 0) as watch:
                    video = run()
            except Exception as raised:
                if not several:
                    raise
                fault = f"{type(raised).__name__}: {raised}".splitlines()[0]
            if several and (fault := agreed(fault, own)):
                failures.append(f"{path}: {fault}")
                continue
            watches.append(watch)
            if calibration:
                runs.append(calibration.lists())
                if args.magcache_calibration == "full":
                    products.append(calibration.products.copy())
            if group.rank == 0:  # the others get no video
                save_result(video, path, config.sample_fps)
                watch.lap("save")
                frames, height, width = video.shape[1:]
                print(f"saved     {path} ({width}x{height}, {frames} frames)", flush=True)
                record = make_record(args, group, request, (frames, height, width), schedule, table, watch, seconds)
                if write_record(args, path, record):
                    print(f"record    {path.with_suffix('.json')}", flush=True)
            if args.compare:
                frames = to_frames(video) if group.rank == 0 else None
                del video  # the second one needs its memory
                scores = compare(args, pipeline, run, cache, schedule, table, watch, frames, request, config.sample_fps)
                if scores:
                    write_record(args, path, record | {"comparison": scores})
    except BaseException:
        if calibration and len(runs) < len(requests):
            print(
                f"the calibration stopped in prompt {len(runs) + 1} of {len(requests)}, after {calibration.reached} of "
                f"{calibration.calls} calls; {'only the prompts before count' if runs else 'nothing is written'}",
                file=sys.stderr,
            )
        raise
    finally:
        if runs and processes.rank == 0:
            save_calibration(args, runs, products, requests[: len(runs)])
    summarise(schedule, table, watches, seconds)
    return list(itertools.chain(*gathered(failures if group.rank == 0 else [], everyone)))


def sharing_group(args, group):
    """The processes that share the tokens of a video, None if each has all of them."""
    if args.ulysses_size * args.ring_size == 1:
        return None
    import torch

    sequence = getattr(group, "sequence", None)  # upstream's `wan` shares them among all
    return sequence.group if sequence else torch.distributed.group.WORLD


def agreed(fault: str | None, group) -> str | None:
    """What went wrong with a video, None if nothing did. Raises RuntimeError if its processes disagree: then they are
    no longer at the same point, and could not go on together."""
    faults = gathered(fault, group)
    if len(set(faults)) > 1:
        raise RuntimeError(f"not all processes of a group made the video: {faults}")
    return fault


def table_of(args):
    """The ratio table that these flags stand for, None if there is none."""
    with contextlib.suppress(ValueError):
        return magcache.load_table(args.mag_ratios or magcache.choose_table(args.task, args.ckpt_dir, args.size)[0])


def predict(args, schedule, made_by: str):
    """The error to expect of a schedule of `make_schedule`, None where there is no table of the model."""
    from magcache import report

    table = table_of(args)
    if not table:
        return None
    if args.magcache_speedup is None:
        ratios = resampled(table, args, [])
        return report.predict_by_ratios(schedule, ratios, args.magcache_smooth, args.magcache_thresh)
    if "full calibration" in made_by:
        from magcache.search import load_products

        return report.predict_by_products(schedule, load_products(table.path.with_suffix(".npz"))[0])
    return report.predict_by_ratios(schedule, table.ratios)


def make_neighbours(args, error):
    """What the settings around the given ones would give, each made as a run makes it."""
    from magcache import report

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
    forecasts = ("reuse", "linear")
    cells = [[cell(magcache_speedup=x, magcache_forecast=name) for name in forecasts] for x in speedups]
    notes = []
    for row in cells:
        predicted = [predict(other, schedule, made_by) for schedule, made_by, other in row]
        notes.append([f", error {p.largest:.3g}" if p and "both" in p.rows else "" for p in predicted])
    heading = "other     speed-ups and forecasts: calls computed, bound (* as asked)"
    schedules = [[schedule for schedule, *_ in row] for row in cells]
    asked = (speedups.index(args.magcache_speedup), forecasts.index(args.magcache_forecast or "linear"))
    rows = [f"speedup {x:g}" for x in speedups]
    return report.Neighbours(heading, rows, list(forecasts), schedules, notes, asked)


def planned_video(args) -> tuple[int, int, int, int]:
    """(frames, height, width, reference images) of a run with these flags, as far as they tell without its files."""
    width, height = map(int, args.size.split("*"))
    kind = args.task.split("-")[0]
    if kind in ("i2v", "flf2v"):
        path = getattr(args, INPUTS[kind][0])
        if path and Path(path).is_file():
            from magcache.images import read_image, video_size

            try:
                width, height = video_size(read_image(path).size, width * height)
            except ValueError as fault:
                print(f"note: {fault}; here its shape is that of --size")
        else:
            print(f"note: the image, {path or 'which is not given'}, decides on the shape; here it is that of --size")
    references = len(reference_paths(args)) if kind == "vace" else 0
    if kind == "vace" and args.src_video:
        print("note: the source video decides on shape and length; the largest that it may have is taken")
    return args.frame_num, height, width, references


def show_plan(args, error) -> None:
    """Says what a run with these flags would do, by the same code, without the wan package or any weights."""
    from magcache import report

    args.use_magcache, args.ckpt_dir = True, args.ckpt_dir or args.task
    picture = Path(args.magcache_plan) if args.magcache_plan is not True else None
    if picture:
        need_package("matplotlib", "--magcache_plan with a picture", error)
        check_writable(picture.parent, error)
    with contextlib.redirect_stdout(io.StringIO()) as notes:
        check_request(args, error)
        schedule, made_by = make_schedule(args, error)
        frames, height, width, references = planned_video(args)
        if args.size not in report.SIZES[args.task]:
            print(f"note: task {args.task} does not run at {args.size}, only at {', '.join(report.SIZES[args.task])}")
    table, shards = table_of(args), args.ulysses_size * args.ring_size
    where = "in CPU memory" if args.magcache_offload else "on the GPU" if shards == 1 else f"on each of {shards} GPUs"
    with contextlib.redirect_stdout(io.StringIO()):  # it says again what the asked one has said
        neighbours = make_neighbours(args, error)
    plan = report.Plan(
        schedule,
        f"{made_by}, {settings_words(args)}",
        report.table_origin(table) if table else "no table",
        f"{args.task}, {width}x{height}, {frames} frames, {args.sample_steps} steps",
        report.token_count(frames, height, width, references),
        report.shape_of(args.task, args.ckpt_dir),
        predict(args, schedule, made_by),
        neighbours,
        args.magcache_dtype,
        where,
        shards,
    )
    print("\n".join(plan.lines()))
    print(notes.getvalue(), end="")
    if picture:
        from magcache.plot import draw_plan

        draw_plan(plan, resampled(table, args, []) if table else None, picture)
        print(f"picture   {picture}")


def need_package(name: str, what: str, error) -> None:
    """Refuses a flag whose package is missing."""
    packages = {"skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg"}
    if importlib.util.find_spec(name) is None:
        error(f"{what} needs the package {name}: pip install {packages.get(name, name)}")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    given = dict(vars(args))
    if not is_first("RANK"):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all)
    if args.magcache_plan:
        return show_plan(args, parser.error)
    check_request(args, parser.error)
    schedule, table = make_schedule(args, parser.error)
    config = check_wan(args, parser.error)
    inputs = read_inputs(args, parser.error)
    processes = Processes.from_environment()
    group = start_processes(processes, args, given, schedule, parser.error)
    if args.magcache_calibration and group.count > 1:
        parser.error(
            f"--magcache_calibration needs one group of processes, and {processes.world} processes with --ulysses_size "
            f"{args.ulysses_size} and --ring_size {args.ring_size} are {group.count}"
        )
    requests = processes.from_first(make_requests(args, schedule, parser.error))
    requests = processes.from_first(choose_requests(args, requests, parser.error))
    if not requests:
        print("all of them are finished; --overwrite makes them again")
        return
    check_records(args, requests, parser.error)
    expander = make_expander(args, parser.error) if processes.rank == 0 else None
    announce(args, schedule, table, video_shape(args, inputs), requests)
    if group.count > len(requests):
        print(f"note: {len(requests)} videos for {group.count} groups of processes; the others have nothing to do")
    failures = generate(args, processes, group, config, schedule, table, inputs, expander, requests)
    if failures:
        if processes.rank == 0:
            lines = "\n".join(failures)
            print(
                f"{len(failures)} of {len(requests)} videos failed, a rerun tries them again:\n{lines}", file=sys.stderr
            )
        sys.exit(1)


if __name__ == "__main__":
    with leaving_at_once():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
        except RuntimeError as fault:
            reason = (str(fault) or "?").splitlines()[0]
            if type(fault).__name__ == "OutOfMemoryError":  # torch's, without importing torch to name it
                sys.exit(
                    f"magcache_generate.py: error: out of GPU memory ({reason}); --offload_model True, --t5_cpu, "
                    "--magcache_offload, a smaller --size or fewer frames need less"
                )
            if reason.startswith("cannot read "):
                sys.exit(f"magcache_generate.py: error: {reason}")
            raise
