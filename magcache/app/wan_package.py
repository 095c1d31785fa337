"""What the script asks of the `wan` package beside it: this repository's, or Wan2.1's own, which does less."""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from magcache.app.errors import Refused, refuse_if, refusing
from magcache.app.job import Job, Machine, Sampling
from magcache.app.processes import Processes

# in `wan`, by the kind of task
PIPELINES = {"t2v": "WanT2V", "t2i": "WanT2V", "i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}


def is_stock_wan() -> bool:
    """Whether the `wan` here is Wan2.1's own."""
    return importlib.util.find_spec("wan.pipeline") is None


def check_wan(sampling: Sampling, machine: Machine) -> Any:
    """Refuses what the task's model does not do, and an incomplete checkpoint folder. Returns the model's config."""
    try:
        from wan.configs import SUPPORTED_SIZES, WAN_CONFIGS
    except ImportError as fault:
        remedy = "run this beside one, in its environment"
        raise Refused(f"the wan package cannot be imported ({fault}): {remedy}") from fault
    task = sampling.task
    refuse_if(task not in WAN_CONFIGS, f"the wan package here has no task {task}")
    sizes = SUPPORTED_SIZES[task]
    refuse_if(sampling.size not in sizes, f"task {task} supports {', '.join(sizes)}, not {sampling.size}")
    if sampling.kind == "flf2v" and sampling.frame_num != 81 and is_stock_wan():
        only = "the wan package here makes flf2v videos of 81 frames only"
        raise Refused(f"{only}, --frame_num is {sampling.frame_num}")
    check_machine(machine)
    check_checkpoint(sampling, machine, WAN_CONFIGS)
    return WAN_CONFIGS[task]


OF_OUR_WAN = ("dit_dtype", "offload_blocks", "compile", "attn_backend", "vae_tiling")


def check_machine(machine: Machine) -> None:
    """Refuses what Wan2.1's own `wan` does not have, and what does not run on this machine."""
    if not (given := [name for name in OF_OUR_WAN if getattr(machine, name)]):
        return
    refuse_if(is_stock_wan(), f"--{given[0]} needs the wan package of magcache_generate.py, this one is Wan2.1's own")
    from wan.utils.machine import choose_attention, try_compiler

    with refusing(ValueError):
        if machine.attn_backend:
            choose_attention(machine.attn_backend, torch_device())
        if machine.compile:
            try_compiler(torch_device())


def torch_device() -> str:
    """Where this process computes."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def placement(machine: Machine) -> dict:
    """The arguments of a pipeline that only the `wan` of this repository takes."""
    if is_stock_wan():
        return {}
    import torch

    dtype = machine.dit_dtype and getattr(torch, machine.dit_dtype)
    how = {"compile": machine.compile, "vae_tiling": machine.vae_tiling}
    return {"dit_dtype": dtype, "offload_blocks": machine.offload_blocks or 0} | how


def check_checkpoint(sampling: Sampling, machine: Machine, configs: dict) -> None:
    """configs: of all tasks."""
    task, folder = sampling.task, Path(machine.ckpt_dir)
    config, given = configs[task], f"--ckpt_dir {folder}"
    needed = {"t2i": "t2v"}.get(sampling.kind, sampling.kind)
    refuse_if(not folder.is_dir(), f"{given} is not a folder")
    model, weights = read_model(folder)
    kind, heads = model.get("model_type"), model.get("num_heads", config.num_heads)
    refuse_if(kind != needed, f"{given} holds a model of type {kind}, task {task} needs {needed}")
    ulysses = f"--ulysses_size {machine.ulysses_size}"
    uneven = f"{ulysses} does not divide the {heads} attention heads of the model in {folder}"
    refuse_if(heads % machine.ulysses_size != 0, uneven)
    files = [*weights, config.t5_checkpoint, f"{config.t5_tokenizer}/tokenizer.json", config.vae_checkpoint]
    if needed in ("i2v", "flf2v"):
        files.append(config.clip_checkpoint)
        without = is_stock_wan() and not (folder / config.clip_tokenizer).is_dir()
        refuse_if(without, f"{given} lacks {config.clip_tokenizer}/, which the wan package here loads")
    for name in files:
        refuse_if(not (folder / name).is_file(), f"{given} lacks {name}")
    shape = (model.get("dim"), model.get("num_layers"))
    others = [other for other, config in configs.items() if (config.dim, config.num_layers) == shape]
    if others and task not in others:
        print(f"note: by its size the model in {folder} is that of {others[0]}, not of {task}")


def read_model(folder: Path) -> tuple[dict, list[str]]:
    """The transformer's config.json, and the names of its files of weights."""
    single = "diffusion_pytorch_model.safetensors"
    index, weights = f"{single}.index.json", [single]
    try:
        model = dict(json.loads((folder / "config.json").read_text()).items())
        if (folder / index).is_file():
            weights = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
        elif any(folder.glob("diffusion_pytorch_model-*.safetensors")):
            weights = [index]
    except FileNotFoundError as fault:
        raise Refused(f"--ckpt_dir {folder} lacks config.json") from fault
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as fault:
        raise Refused(f"--ckpt_dir {folder} has a broken config.json or {index}: {fault!r}") from fault
    return model, weights


def start_processes(processes: Processes, job: Job):
    """Connects the processes of torchrun and starts the sequence parallelism of the `wan` here. Every process decides
    on its own what to reuse, so flags and plan must be the same everywhere.

    Returns the group of processes that makes a video together: this one's `rank` in it, its `size`, its `index` among
    `count` groups.
    """
    with refusing(ValueError):
        processes.connect()
    compared = {f"--{name}": value for name, value in job.flags.items()} | {"the plan": job.schedule}
    compared["the prompts of --prompt_file"] = job.prompt_file and job.lines
    if differences := processes.differences(compared):
        rank, names = min(differences.items())
        raise Refused(f"process {rank} differs from process 0 in {', '.join(names)}")
    machine = job.machine
    try:
        from wan.distributed.groups import start_groups
    except ModuleNotFoundError:
        return start_xfuser(processes, machine)
    with refusing(ValueError, ImportError):  # of a torch or diffusers that is too old
        group = start_groups(machine.ulysses_size, machine.ring_size, fsdp=machine.dit_fsdp or machine.t5_fsdp)
    if job.calibrates and group.count > 1:
        shared = f"--ulysses_size {machine.ulysses_size} and --ring_size {machine.ring_size} are {group.count}"
        one = "--magcache_calibration needs one group of processes"
        raise Refused(f"{one}, and {processes.world} processes with {shared}")
    return group


def start_xfuser(processes: Processes, machine: Machine) -> SimpleNamespace:
    """Upstream's `wan` wants xfuser's groups to be there before the pipeline is made; all processes are one group."""
    if machine.shards > 1:
        if machine.shards != processes.world:
            sizes = f"--ulysses_size {machine.ulysses_size} times --ring_size {machine.ring_size}"
            number = "must be the number of processes with the wan package here"
            raise Refused(f"{sizes} {number}, there are {processes.world}")
        try:
            from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel
        except ImportError as fault:
            needs = "--ulysses_size and --ring_size need the package xfuser with the wan package here"
            raise Refused(f"{needs}: {fault}") from fault
        init_distributed_environment(rank=processes.rank, world_size=processes.world)
        degrees = {"ring_degree": machine.ring_size, "ulysses_degree": machine.ulysses_size}
        initialize_model_parallel(sequence_parallel_degree=processes.world, **degrees)
    return SimpleNamespace(rank=processes.rank, size=processes.world, index=0, count=1, sequence=None)


def sharing_group(machine: Machine, group):
    """The processes that share the tokens of a video, None if each has all of them."""
    if machine.shards == 1:
        return None
    import torch

    # upstream's `wan` shares them among all
    return group.sequence.group if group.sequence else torch.distributed.group.WORLD


def damaged_file() -> tuple[type[Exception], ...]:
    """What the `wan` here raises for a file that it cannot read; Wan2.1's own has nothing of the kind."""
    try:
        from wan.utils.checkpoints import DamagedFile
    except ImportError:
        return ()
    return (DamagedFile,)


def device_name(machine: Machine) -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {machine.dit_dtype or 'float32'}"
