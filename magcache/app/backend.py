"""The `wan` package beside the script: what is asked of it, whichever it is. Two modules answer: `our_wan`, for that
of this repository, and `stock_wan`, for those of Wan2.1 and Wan2.2, which do less."""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magcache.app import checkpoint
from magcache.app.errors import Refused, first_line, refusing
from magcache.app.job import PATHS, Inputs, Job, Machine, Sampling
from magcache.app.lora import merging
from magcache.app.processes import Group, Processes, gathered
from magcache.app.tasks import TASKS, Task

if TYPE_CHECKING:
    import torch
    from easydict import EasyDict

    from magcache.patch import OnCall, Runner


class Backend:
    """A `wan` package. release: whose it is, None for this repository's. task: of a command that names none. lacks:
    flags that it does not take. not_used: flags of its script for tasks that are not run here. sharing: what a pipeline
    calls it that processes share the tokens. remedy: what to do where it cannot be imported. frugal: whether a pipeline
    drops its models once no other video comes, and makes one call a step at a guidance of 1. held: bytes for each
    channel of a token that a call holds, in every process and in all that share the tokens, None where
    `magcache.app.cost` counts them. without_card: what to say where there is no CUDA device."""

    release: str | None = None
    task = "t2v-14B"
    lacks: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()
    sharing = "use_usp"
    remedy = "run this beside one, in its environment"
    frugal: bool
    held: tuple[float, float] | None = None
    without_card: str

    def example(self, sampling: Sampling, folder: Path) -> dict[str, str]:
        """Returns what a request without prompt and files is about, by flag; the prompt is empty if there is no
        example. folder: that of the script."""

    def weights_dtype(self, machine: Machine, cuda: bool) -> str:
        """Returns the dtype of the linear layers in the transformer's blocks."""

    def holds_both(self, machine: Machine, again: bool) -> bool:
        """Whether two transformers are on the card together. again: whether the pipeline is kept for another video."""
        return machine.dit_fsdp or (again and not machine.offload_model)

    def check(self, sampling: Sampling, inputs: Inputs, machine: Machine, config: "EasyDict") -> None:
        """Refuses what this package would fail with only after loading. config: of the task's model."""

    def start_sharing(self, processes: Processes, machine: Machine) -> "torch.distributed.ProcessGroup | None":
        """Prepares the processes, which are connected, for sharing weights or tokens. Returns those that share the
        tokens with this one, if any do."""

    def read_sources(self, sampling: Sampling, inputs: Inputs) -> list | None:
        """Reads the source video, its mask and the references of vace, as lists of one each; returns None if only the
        pipeline can read them. Raises ValueError for what cannot be used."""

    def placement(self, machine: Machine) -> dict[str, Any]:
        """Arguments of a pipeline beside those that upstream's has."""
        return {}

    def transformers(self, pipeline) -> list["torch.nn.Module"]:
        """Returns the pipeline's transformers in the order in which a run calls them."""
        return [pipeline.model]

    def apart(self, group: Group) -> AbstractContextManager:
        """Lets a pipeline load and generate without the other groups."""
        return nullcontext()

    def attach(self, pipeline, runner: "Runner", on_call: "OnCall") -> None:
        """Hands the calls of the pipeline's transformers to `runner`, which starts afresh."""
        from magcache import patch

        patch.attach(self.transformers(pipeline), runner, on_call)


def wan_folder() -> Path:
    """Returns the folder of the `wan` package here, which is not imported for that. Without one it is no folder."""
    package = importlib.util.find_spec("wan")
    return Path([*(package.submodule_search_locations if package else ()), "wan"][0])


@functools.cache
def backend() -> Backend:
    if (wan_folder() / "pipeline.py").is_file():
        from magcache.app.our_wan import OurWan

        return OurWan()
    from magcache.app.stock_wan import StockWan, StockWan22

    if (wan_folder() / "textimage2video.py").is_file():
        return StockWan22()
    return StockWan()


def check_release(task: Task) -> None:
    """Refuses a task that is of another release than a stock package here."""
    release = backend().release
    if release not in (None, task.release) and wan_folder().is_dir():
        raise Refused(f"task {task.name} is of {task.release}, but the wan package here is {release}'s")


def check_before_import(sampling: Sampling, machine: Machine) -> None:
    """Refuses what can be told at once: importing `wan` takes seconds."""
    if sampling.size not in sampling.spec.sizes:
        raise Refused(f"task {sampling.task} supports {', '.join(sampling.spec.sizes)}, not {sampling.size}")
    check_folder(sampling, machine)


def check_wan(sampling: Sampling, inputs: Inputs, machine: Machine) -> "EasyDict":
    """Refuses what the task's model does not do, and an incomplete or damaged folder. Returns the model's config."""
    chosen = backend()
    try:
        from wan.configs import WAN_CONFIGS
    except ImportError as fault:
        raise Refused(f"the wan package cannot be imported ({first_line(fault)}): {chosen.remedy}") from fault
    except (AssertionError, RuntimeError) as fault:  # Wan2.1's own asks for the current CUDA device as it is imported
        needs = "the wan package here needs a CUDA device and a torch that sees it"
        raise Refused(f"{needs} ({first_line(fault)})") from fault
    config = WAN_CONFIGS.get(sampling.task)
    if config is None:
        raise Refused(f"the wan package here has no task {sampling.task}")
    with refusing(ValueError):
        Processes.from_environment().check_gpus()
    check_checkpoint(sampling, machine, config)
    chosen.check(sampling, inputs, machine, config)
    return config


def check_folder(sampling: Sampling, machine: Machine) -> list[tuple[Path, dict, dict[str, set[str] | None]]]:
    """Refuses a checkpoint folder of another model. Returns the folder of every transformer, with what `read_config`
    and `find_weights` say of it."""
    task, folder = sampling.spec, Path(machine.ckpt_dir)
    given = f"--ckpt_dir {folder}"
    if not os.path.isdir(folder) and not os.path.isfile(folder):
        raise Refused(f"{given} is not a folder")
    parts, found = [folder / name for name in task.transformers], []
    for place in parts if parts[0].is_dir() else [folder]:
        if other := checkpoint.other_content(place, task):
            needed = f"task {task.name} needs the folder of {task.repository} as it is"
            raise Refused(f"--ckpt_dir {place} holds {other}: {needed}")
    for part in parts:
        with refusing(ValueError):
            model = checkpoint.read_config(part)
            found.append((part, model, checkpoint.find_weights(part)))
        kind, heads = model.get("model_type"), model["num_heads"]
        if kind != task.model_type:
            needs = f"task {task.name} needs {task.model_type}"
            raise Refused(f"--ckpt_dir {part} holds a model of type {kind}, but {needs}")
        if heads % machine.ulysses_size:
            ulysses = f"--ulysses_size {machine.ulysses_size}"
            raise Refused(f"{ulysses} does not divide the {heads} attention heads of the model in {part}")
    return found


def check_checkpoint(sampling: Sampling, machine: Machine, config: "EasyDict") -> None:
    """Checks the files of a checkpoint. config: the task's, which has their names."""
    parts, task, folder = check_folder(sampling, machine), sampling.spec, Path(machine.ckpt_dir)
    files = [part / name for part, _, weights in parts for name in weights]
    names = [config.t5_checkpoint, f"{config.t5_tokenizer}/tokenizer.json", config.vae_checkpoint]
    names += [config.clip_checkpoint] if task.architecture.images else []
    for file in (*files, *(folder / name for name in names)):
        if not file.is_file():
            raise Refused(f"--ckpt_dir {folder} lacks {file.relative_to(folder)}")
    with refusing(ValueError):
        found = [
            checkpoint.check_transformer(part, model, weights, task.architecture) for part, model, weights in parts
        ]
        checkpoint.check_encoders(folder, config, found)
    _, model, _ = parts[-1]
    size = (model["dim"], model["num_layers"])
    alike = [other for other in TASKS.values() if (other.architecture.dim, other.architecture.num_layers) == size]
    if alike and task not in alike:
        mistaken = f"by its size, the model in {folder} is that of {alike[0].name}, not of {task.name}"
        if alike[0].is_demo:
            raise Refused(mistaken)
        print(f"note: {mistaken}")


def start_processes(job: Job) -> Group:
    """Connects the processes of torchrun, and divides them into groups. Every process decides on its own what to reuse,
    so flags and plan must be the same everywhere; the folders of files may differ from machine to machine."""
    processes = Processes.from_environment()
    with refusing(ValueError):
        processes.connect()
    everyone = processes.patient_group(processes.world)
    compared = {f"--{name}": value for name, value in job.flags.items()} | {"the plan": job.schedule}
    compared |= {f"--{name}": Path(job.flags[name] or "").name for name in PATHS}
    compared["the prompts of --prompt_file"] = job.prompt_file and job.lines
    compared["the files of --lora"] = [lora.sha256 for lora in job.machine.lora]
    first, *others = gathered(compared, everyone)
    for rank, theirs in enumerate(others, 1):
        if names := [name for name in compared if theirs[name] != first[name]]:
            raise Refused(f"process {rank} differs from process 0 in {', '.join(names)}")
    machine, size = job.machine, job.machine.group_size
    sharing, own = backend().start_sharing(processes, machine), processes.patient_group(size)
    index, rank = divmod(processes.rank, size)
    group = Group(rank, size, index, processes.world // size, sharing, own, everyone)
    if job.calibration and group.count > 1:
        shared = f"--ulysses_size {machine.ulysses_size} and --ring_size {machine.ring_size} make {group.count} groups"
        one = "--magcache_calibration needs one group of processes"
        raise Refused(f"{one}, but {processes.world} processes with {shared}")
    return group


def load_pipeline(job: Job, config: "EasyDict", group: Group):
    """Returns the task's pipeline in the `wan` package."""
    import torch

    import wan

    sampling, machine, chosen = job.sampling, job.machine, backend()
    processes = Processes.from_environment()
    several = f"{processes.world} processes, " if processes.world > 1 else ""
    print(f"device    {several}{device_name(machine)}; loading {machine.ckpt_dir}", flush=True)
    if not torch.cuda.is_available() and not sampling.spec.is_demo:
        print(f"note: there is no CUDA device; {chosen.without_card}", flush=True)
    spread = {flag: getattr(machine, flag) for flag in ("t5_fsdp", "dit_fsdp", "t5_cpu")} | {"rank": group.rank}
    spread |= {"device_id": processes.local_rank, chosen.sharing: machine.shards > 1} | chosen.placement(machine)
    with chosen.apart(group), merging(machine.lora) if machine.lora else nullcontext():
        return getattr(wan, sampling.spec.pipeline)(config=config, checkpoint_dir=machine.ckpt_dir, **spread)


def device_name(machine: Machine) -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {machine.dit_dtype or 'float32'}"
