"""What the script asks of the `wan` package beside it: this repository's, or Wan2.1's own, which does less."""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from magcache.app import checkpoint
from magcache.app.errors import Refused, first_line, need_package, refuse_if, refusing
from magcache.app.job import Inputs, Job, Machine, Sampling
from magcache.app.processes import Processes
from magcache.app.tasks import TASKS


def is_stock_wan() -> bool:
    """Whether the `wan` here is Wan2.1's own, which is not imported to tell."""
    return not (wan_folder() / "pipeline.py").is_file()


def wan_folder() -> Path:
    """Of the `wan` package here; one that is not there if there is none."""
    package = importlib.util.find_spec("wan")
    return Path([*(package.submodule_search_locations if package else ()), "wan"][0])


def check_before_import(sampling: Sampling, machine: Machine) -> None:
    """Refuses what can be told at once: importing `wan` takes seconds."""
    other = "the wan package here is Wan2.2's: run this beside that of Wan2.1, or of this script's repository"
    refuse_if((wan_folder() / "textimage2video.py").is_file(), other)
    unknown = f"task {sampling.task} supports {', '.join(sampling.spec.sizes)}, not {sampling.size}"
    refuse_if(sampling.size not in sampling.spec.sizes, unknown)
    check_folder(sampling, machine)


def check_wan(sampling: Sampling, inputs: Inputs, machine: Machine) -> Any:
    """Refuses what the task's model does not do, and a checkpoint folder that is incomplete or damaged. Returns the
    model's config."""
    configs, spec = import_configs(), sampling.spec
    config = configs.get(spec.config or spec.name)
    refuse_if(config is None, f"the wan package here has no task {spec.name}")
    check_machine(machine)
    if is_stock_wan():
        check_stock(sampling, inputs)
    check_checkpoint(sampling, machine, config)
    if not is_stock_wan():
        check_encoders(sampling, machine, config)
    return config


def import_configs() -> dict:
    """The models' configs, by task."""
    if is_stock_wan():  # upstream's script hides all warnings
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module=r"torch\.")
    try:
        from wan.configs import WAN_CONFIGS
    except ImportError as fault:
        remedy = "run this beside one, in its environment"
        raise Refused(f"the wan package cannot be imported ({first_line(fault)}): {remedy}") from fault
    except (AssertionError, RuntimeError) as fault:  # Wan2.1's own asks for the current CUDA device as it is imported
        needs = "the wan package here needs a CUDA device and a torch that sees it"
        raise Refused(f"{needs} ({first_line(fault)})") from fault
    return WAN_CONFIGS


def check_stock(sampling: Sampling, inputs: Inputs) -> None:
    """Refuses what Wan2.1's own package would fail with only after loading."""
    if len(sampling.spec.images) == 2 and sampling.frame_num != 81:
        only = "the wan package here makes flf2v videos of 81 frames only"
        raise Refused(f"{only}, --frame_num is {sampling.frame_num}")
    if inputs.src_video and importlib.util.find_spec("wan.utils.vace_processor"):
        need_package("decord", "--src_video with the wan package here")
    attention = getattr(sys.modules.get("wan.modules.model"), "flash_attention", None)  # imported with the configs
    known = [getattr(attention, "__globals__", {}).get(f"FLASH_ATTN_{number}_AVAILABLE") for number in (2, 3)]
    lacks = False in known and True not in known
    refuse_if(lacks, "the wan package here needs the package flash_attn: pip install flash-attn")


@contextmanager
def to_be_replaced(*errors: type[Exception]) -> Iterator[None]:
    """Errors of the block, which checks files of a checkpoint, become `Refused`: that another download would help where
    they are of these types."""
    try:
        yield
    except errors as fault:
        raise Refused(f"{first_line(fault)}: download it again") from fault
    except ValueError as fault:
        raise Refused(first_line(fault)) from fault


def check_machine(machine: Machine) -> None:
    """Refuses what does not run on this machine. Makes the attention backend that is asked for the one of all
    attention."""
    with refusing(ValueError):
        Processes.from_environment().check_gpus()
    if is_stock_wan():
        return
    import torch
    from diffusers.utils import constants

    old = f"--dit_fsdp with --dit_dtype {machine.dit_dtype} needs torch 2.9 or newer, this is {torch.__version__}"
    mixed = machine.dit_fsdp and machine.dit_dtype not in (None, "float32")  # with the float32 biases of a block
    refuse_if(mixed and torch.__version__ < "2.9", old)
    constants.DIFFUSERS_ATTN_BACKEND = "native"  # with an unknown one what follows could not be imported
    from wan.utils.attention import choose_attention

    attention = machine.attn_backend or os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
    with refusing(ValueError):
        choose_attention(attention, torch_device())


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


def check_folder(sampling: Sampling, machine: Machine) -> tuple[dict, dict[str, set[str] | None]]:
    """Refuses a checkpoint folder of another model. Returns what `read_config` and `find_weights` say of it."""
    task, folder = sampling.spec, Path(machine.ckpt_dir)
    given, needed = f"--ckpt_dir {folder}", task.model_type
    refuse_if(not os.path.isdir(folder) and not os.path.isfile(folder), f"{given} is not a folder")
    if other := checkpoint.other_content(folder):
        raise Refused(f"{given} holds {other}: task {task.name} needs the folder of {task.repository} as it is")
    with to_be_replaced(checkpoint.Damaged):
        model = checkpoint.read_config(folder)
        weights = checkpoint.find_weights(folder)
    kind, heads = model.get("model_type"), model["num_heads"]
    refuse_if(kind != needed, f"{given} holds a model of type {kind}, task {task.name} needs {needed}")
    ulysses = f"--ulysses_size {machine.ulysses_size}"
    uneven = f"{ulysses} does not divide the {heads} attention heads of the model in {folder}"
    refuse_if(heads % machine.ulysses_size != 0, uneven)
    return model, weights


def check_checkpoint(sampling: Sampling, machine: Machine, names: Any) -> None:
    """names: the task's config, which has the names of the files."""
    (model, weights), task, folder = check_folder(sampling, machine), sampling.spec, Path(machine.ckpt_dir)
    given = f"--ckpt_dir {folder}"
    files = [*weights, names.t5_checkpoint, f"{names.t5_tokenizer}/tokenizer.json", names.vae_checkpoint]
    if task.images:
        files.append(names.clip_checkpoint)
        without = is_stock_wan() and not (folder / names.clip_tokenizer).is_dir()
        refuse_if(without, f"{given} lacks {names.clip_tokenizer}/, which the wan package here loads")
    for name in files:
        refuse_if(not (folder / name).is_file(), f"{given} lacks {name}")
    with to_be_replaced(checkpoint.Damaged):
        shapes = checkpoint.check_transformer(folder, model, weights)
        checkpoint.check_encoders(folder, names, shapes, bool(task.images))
    size = (model["dim"], model["num_layers"])
    alike = [other for other in TASKS.values() if (other.architecture.dim, other.architecture.num_layers) == size]
    if alike and task not in alike:
        print(f"note: by its size the model in {folder} is that of {alike[0].name}, not of {task.name}")


def check_encoders(sampling: Sampling, machine: Machine, config: Any) -> None:
    """Refuses encoders whose tensors are not exactly those that our own `wan` needs."""
    from wan.utils.checkpoints import check_encoders as check

    with to_be_replaced(*damaged_file()):
        check(Path(machine.ckpt_dir), config, bool(sampling.spec.images))


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
    if is_stock_wan():
        group = start_xfuser(processes, machine)
    else:
        from wan.distributed.groups import start_groups

        with refusing(ValueError, ImportError):  # of a torch or diffusers that is too old
            group = start_groups(machine.ulysses_size, machine.ring_size, fsdp=machine.dit_fsdp or machine.t5_fsdp)
    if job.calibrates and group.count > 1:
        shared = f"--ulysses_size {machine.ulysses_size} and --ring_size {machine.ring_size} are {group.count}"
        one = "--magcache_calibration needs one group of processes"
        raise Refused(f"{one}, and {processes.world} processes with {shared}")
    return group


def start_xfuser(processes: Processes, machine: Machine) -> SimpleNamespace:
    """Upstream's `wan` wants xfuser's groups to be there before the pipeline is made; all processes are one group, but
    where they share neither tokens nor weights: then each makes videos of its own."""
    if machine.shards == 1 and not (machine.dit_fsdp or machine.t5_fsdp):
        if processes.world > 1:
            import torch

            # upstream's pipelines end with one, and here every process makes its own number of videos
            torch.distributed.barrier = lambda *args, **kwargs: None
        return SimpleNamespace(rank=0, size=1, index=processes.rank, count=processes.world, sequence=None)
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
