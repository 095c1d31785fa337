"""The `wan` package of a Wan2.2 checkout: what is otherwise there than in that of Wan2.1."""

from typing import TYPE_CHECKING, Any

from magcache.app.backend import Pipeline
from magcache.app.errors import Refused
from magcache.app.job import OF_OUR_WAN, Inputs, Machine, Sampling
from magcache.app.processes import Processes
from magcache.app.stock_wan import StockWan

if TYPE_CHECKING:
    import torch
    from easydict import EasyDict


class StockWan22(StockWan):
    release = "Wan2.2"
    task = "t2v-A14B"
    lacks = OF_OUR_WAN
    not_used = (
        *("src_root_path", "refert_num", "replace_flag", "use_relighting_lora"),  # of animate
        *("num_clip", "audio", "enable_tts", "tts_prompt_audio", "tts_prompt_text", "tts_text"),  # of s2v
        *("pose_video", "start_from_ref", "infer_frames"),
    )
    sharing = "use_sp"
    remedy = (
        "Wan2.2's loads what speech and animation need with it, too: "
        "pip install -r requirements_s2v.txt -r requirements_animate.txt in its folder"
    )

    def weights_dtype(self, machine: Machine, cuda: bool) -> str:
        return "bfloat16" if machine.convert_model_dtype and not machine.dit_fsdp else "float32"

    def check(self, sampling: Sampling, inputs: Inputs, machine: Machine, config: "EasyDict") -> None:
        if machine.ring_size > 1:
            raise Refused("--ring_size is Wan2.1's, the wan package here is Wan2.2's: it has --ulysses_size only")
        self.check_attention()

    def start_sharing(self, processes: Processes, machine: Machine) -> None:
        from wan.distributed.util import init_distributed_group

        init_distributed_group()

    def placement(self, machine: Machine) -> dict[str, Any]:
        return {"convert_model_dtype": machine.convert_model_dtype}

    def transformers(self, pipeline: Pipeline) -> list["torch.nn.Module"]:
        experts = [getattr(pipeline, f"{noise}_noise_model", None) for noise in ("high", "low")]
        return experts if all(experts) else super().transformers(pipeline)
