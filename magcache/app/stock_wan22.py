"""The `wan` package of a Wan2.2 checkout: what is otherwise there than in that of Wan2.1."""

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from magcache.app.backend import wan_folder
from magcache.app.job import OF_OUR_WAN, Machine
from magcache.app.processes import Processes
from magcache.app.stock_wan import StockWan, assigned
from magcache.app.tasks import TASKS, Task

if TYPE_CHECKING:
    import torch


class StockWan22(StockWan):
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

    def start_sharing(self, processes: Processes, machine: Machine) -> None:
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
