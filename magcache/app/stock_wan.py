"""The `wan` packages of upstream's checkouts of Wan2.1 and Wan2.2, and all that is known here of their inside."""

import ast
import contextlib
import functools
import importlib.util
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magcache.app.backend import Backend, wan_folder
from magcache.app.errors import Refused, need_package
from magcache.app.job import OF_OUR_WAN, Inputs, Machine, Sampling
from magcache.app.media import frames_at_most, read_image
from magcache.app.processes import Group, Processes
from magcache.app.tasks import TASKS, Task, located

if TYPE_CHECKING:
    import torch
    from easydict import EasyDict

    from magcache.patch import OnCall, Runner


class StockWan(Backend):
    release = "Wan2.1"
    lacks = (*OF_OUR_WAN, "convert_model_dtype")
    frugal = False
    held = (0.0, 42.5)  # measured on upstream's transformers of full size, by fake tensors
    without_card = "the wan package here is made for one"

    def __init__(self):
        warnings.filterwarnings("ignore", category=FutureWarning)  # upstream's script hides all of them
        warnings.filterwarnings("ignore", module=r"torch\.")

    def example(self, sampling: Sampling, folder: Path) -> dict[str, str]:
        """Returns the example in upstream's script, which is read but not run."""
        root = wan_folder().parent
        with contextlib.suppress(KeyError, TypeError):
            example = assigned(root / "generate.py")["EXAMPLE_PROMPT"][sampling.task]
            known = {name: example[name] for name in ("prompt", *sampling.spec.inputs) if name in example}
            return located(known, root)
        return {"prompt": ""}

    def weights_dtype(self, machine: Machine, cuda: bool) -> str:
        return "float32"

    def check(self, sampling: Sampling, inputs: Inputs, machine: Machine, config: "EasyDict") -> None:
        if len(sampling.spec.images) == 2 and sampling.frame_num != 81:
            only = "the wan package here makes flf2v videos of 81 frames only"
            raise Refused(f"{only}, but --frame_num is {sampling.frame_num}")
        if inputs.src_video and importlib.util.find_spec("wan.utils.vace_processor"):
            need_package("decord", "--src_video with the wan package here")
        if sampling.spec.architecture.images and not (Path(machine.ckpt_dir) / config.clip_tokenizer).is_dir():
            loads = f"{config.clip_tokenizer}/, which the wan package here loads"
            raise Refused(f"--ckpt_dir {machine.ckpt_dir} lacks {loads}")
        attention = getattr(sys.modules.get("wan.modules.model"), "flash_attention", None)  # imported with the configs
        known = [getattr(attention, "__globals__", {}).get(f"FLASH_ATTN_{number}_AVAILABLE") for number in (2, 3)]
        if False in known and True not in known:
            raise Refused("the wan package here needs the package flash_attn: pip install flash-attn")

    def start_sharing(self, processes: Processes, machine: Machine) -> "torch.distributed.ProcessGroup | None":
        if machine.shards == 1:
            return None
        if machine.shards != processes.world:
            sizes = f"--ulysses_size {machine.ulysses_size} times --ring_size {machine.ring_size}"
            number = "must be the number of processes with the wan package here"
            raise Refused(f"{sizes} {number}, but there are {processes.world}")
        self.start_parallel(processes, machine)
        import torch

        return torch.distributed.group.WORLD

    def start_parallel(self, processes: Processes, machine: Machine) -> None:
        """Starts xfuser's groups, which must be there before the pipeline is made."""
        try:
            from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel
        except ImportError as fault:
            needs = "--ulysses_size and --ring_size need the package xfuser with the wan package here"
            raise Refused(f"{needs}: {fault}") from fault
        init_distributed_environment(rank=processes.rank, world_size=processes.world)
        degrees = {"ring_degree": machine.ring_size, "ulysses_degree": machine.ulysses_size}
        initialize_model_parallel(sequence_parallel_degree=processes.world, **degrees)

    def read_sources(self, sampling: Sampling, inputs: Inputs) -> None:
        """Checks the sources as far as possible; the pipeline itself reads them."""
        frames = {path: frames_at_most(2, path) for path in (inputs.src_video, inputs.src_mask) if path}
        if inputs.src_mask and not inputs.src_video:
            raise ValueError(f"the mask {inputs.src_mask} needs a source video")
        if inputs.src_mask and frames[inputs.src_mask] < frames[inputs.src_video]:
            only = "the wan package here takes no picture as a mask, only a video"
            raise ValueError(f"cannot use {inputs.src_mask}: {only}")
        for path in inputs.references:
            read_image(path)
        if inputs.src_video:
            print("note: this wan package reads the source video after loading; its size and length are the video's")

    def apart(self, group: Group) -> AbstractContextManager:
        """Removes the pipelines' barriers, since each process makes its own number of videos."""
        if group.count == 1:
            return nullcontext()
        import torch

        from magcache.patch import shadowed

        return shadowed(torch.distributed, {"barrier": lambda *args, **kwargs: None})

    def attach(self, pipeline, runner: "Runner", on_call: "OnCall") -> None:
        if runner.schedule.calls_per_step == 2:
            return super().attach(pipeline, runner, on_call)
        super().attach(pipeline, CondForBoth(runner), lambda call, reused: call % 2 or on_call(call // 2, reused))


class StockWan22(StockWan):
    """What is otherwise than in Wan2.1's."""

    release = "Wan2.2"
    task = "t2v-A14B"
    lacks = (*OF_OUR_WAN, "ring_size")
    not_used = (
        *("src_root_path", "refert_num", "replace_flag", "use_relighting_lora"),  # of animate
        *("num_clip", "audio", "enable_tts", "tts_prompt_audio", "tts_prompt_text", "tts_text"),  # of s2v
        *("pose_video", "start_from_ref", "infer_frames"),
    )
    sharing = "use_sp"
    held = (28.0, 66.5)  # with the modulation of every token, of which each process has all
    remedy = (
        "Wan2.2's loads what speech and animation need with it, too: "
        "pip install -r requirements_s2v.txt -r requirements_animate.txt in its folder"
    )

    def __init__(self):
        super().__init__()
        TASKS.update({task.name: configured(task) for task in TASKS.values() if task.release == self.release})

    def weights_dtype(self, machine: Machine, cuda: bool) -> str:
        return "bfloat16" if machine.convert_model_dtype and not machine.dit_fsdp else "float32"

    def holds_both(self, machine: Machine, again: bool) -> bool:
        return machine.group_size > 1  # from the start; a process alone has them take turns, whatever the flags

    def start_parallel(self, processes: Processes, machine: Machine) -> None:
        from wan.distributed.util import init_distributed_group

        init_distributed_group()

    def placement(self, machine: Machine) -> dict[str, Any]:
        return {"convert_model_dtype": machine.convert_model_dtype}

    def transformers(self, pipeline) -> list["torch.nn.Module"]:
        experts = [getattr(pipeline, f"{noise}_noise_model", None) for noise in ("high", "low")]
        return experts if None not in experts else super().transformers(pipeline)


def configured(task: Task) -> Task:
    """Returns the task with the settings of the checkout's configs, which are read but not run."""
    found = {}
    for name in ("shared_config", f"wan_{task.name.replace('-', '_')}"):
        found |= assigned(wan_folder() / "configs" / f"{name}.py")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        scale = found["sample_guide_scale"]
        guidance = scale if isinstance(scale, tuple) else (scale,) * len(task.guidance)
        return replace(
            task,
            frames=int(found["frame_num"]),
            steps=int(found["sample_steps"]),
            shift=float(found["sample_shift"]),
            guidance=tuple(map(float, guidance)),
            boundary=task.boundary and float(found["boundary"]),
        )
    return task


def assigned(path: Path) -> dict[str, Any]:
    """Returns the literal values that a Python file, which is not run, assigns to names and attributes, by name."""
    values = {}
    with contextlib.suppress(OSError, ValueError, SyntaxError):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            with contextlib.suppress(ValueError, TypeError, AttributeError):  # AttributeError: no plain assignment
                target = statement.targets[0]
                name = target.attr if isinstance(target, ast.Attribute) else target.id
                values[name] = ast.literal_eval(statement.value)
    return values


class CondForBoth:
    """A runner for pipelines that also make the second call of a step where it has no weight, at a guidance of 1: that
    one returns what the first did. `runner` is handed the first ones."""

    def __init__(self, runner: "Runner"):
        self.runner, self.out = runner, None
        self.schedule = replace(runner.schedule, weights=(None,) * 2 * runner.schedule.steps, calls_per_step=2)

    def reset(self) -> None:
        self.out = None
        self.runner.reset()

    def skips(self, call: int) -> bool:
        return call % 2 == 1 or self.runner.skips(call // 2)

    def run(self, call: int, model: "torch.nn.Module", forward: functools.partial) -> Any:
        if call % 2 == 0:
            self.out = self.runner.run(call // 2, model, forward)
            return self.out
        out, self.out = self.out, None
        return out
