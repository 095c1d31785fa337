"""What the script asks of the `wan` package beside it: this repository's, or Wan2.1's own, which does less."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

from magcache.app.flags import task_kind
from magcache.app.processes import Processes

# by the first part of the task: name of the pipeline in `wan`, type of the transformer in a checkpoint's config.json
PIPELINES = {"t2v": "WanT2V", "t2i": "WanT2V", "i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}
MODEL_TYPES = {"t2v": "t2v", "t2i": "t2v", "i2v": "i2v", "flf2v": "flf2v", "vace": "vace"}


def is_stock_wan() -> bool:
    """Whether the `wan` here is Wan2.1's own."""
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
    needed = MODEL_TYPES[task_kind(args)]
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


@dataclasses.dataclass(frozen=True)
class OneGroup:
    """What upstream's `wan` makes of several processes: all of them work on the same video."""

    rank: int
    size: int
    index: int = 0
    count: int = 1


def start_processes(processes: Processes, args, given: dict, schedule, error):
    """Connects the processes of torchrun, gives them one seed, and starts the sequence parallelism of the `wan` here.

    given: the flags as they were parsed; they and the plan must be the same everywhere, as every process decides
    on its own what to reuse. Returns the group of processes that makes a video together: this one's `rank` in it, its
    `size`, its `index` among `count` groups.
    """
    try:
        processes.connect()
    except ValueError as fault:
        error(fault)
    compared = {f"--{name}": value for name, value in given.items()} | {"the plan": schedule}
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
        group = start_groups(args.ulysses_size, args.ring_size, fsdp=args.dit_fsdp or args.t5_fsdp)
    except (ValueError, ImportError) as fault:  # of a torch or diffusers that is too old
        error(fault)
    if args.magcache_calibration and group.count > 1:
        error(
            f"--magcache_calibration needs one group of processes, and {processes.world} processes with --ulysses_size "
            f"{args.ulysses_size} and --ring_size {args.ring_size} are {group.count}"
        )
    return group


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


def sharing_group(args, group):
    """The processes that share the tokens of a video, None if each has all of them."""
    if args.ulysses_size * args.ring_size == 1:
        return None
    import torch

    sequence = getattr(group, "sequence", None)  # upstream's `wan` shares them among all
    return sequence.group if sequence else torch.distributed.group.WORLD


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, float32"
