"""The `wan` package of this repository."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magcache.app.backend import Backend
from magcache.app.errors import Refused, refusing
from magcache.app.job import Inputs, Machine, Sampling
from magcache.app.media import read_image
from magcache.app.processes import Processes
from magcache.app.tasks import located

if TYPE_CHECKING:
    import torch
    from easydict import EasyDict


class OurWan(Backend):
    frugal = True
    without_card = "a full-size model takes hours for a video"

    def example(self, sampling: Sampling, folder: Path) -> dict[str, str]:
        return located(sampling.spec.example, folder / "examples")

    def weights_dtype(self, machine: Machine, cuda: bool) -> str:
        return machine.dit_dtype or ("bfloat16" if cuda and not machine.dit_fsdp else "float32")

    def check(self, sampling: Sampling, inputs: Inputs, machine: Machine, config: "EasyDict") -> None:
        """Makes the attention backend that is asked for the one of all attention, too."""
        check_machine(machine)
        import torch

        from wan.modules.clip import load_tower
        from wan.modules.t5 import load_encoder
        from wan.modules.vae import load_vae

        folder = Path(machine.ckpt_dir)
        with refusing(OSError):  # by tensors that are missing, left over or of another shape
            load_encoder(folder / config.t5_checkpoint, torch.float32, "meta")
            load_vae(folder / config.vae_checkpoint, torch.float32, "meta")
            if sampling.spec.architecture.images:
                load_tower(folder / config.clip_checkpoint, config.clip_num_heads, torch.float32, "meta")

    def start_sharing(self, processes: Processes, machine: Machine) -> "torch.distributed.ProcessGroup | None":
        from wan.distributed.groups import start_groups

        sharded = machine.dit_fsdp or machine.t5_fsdp
        with refusing(ValueError, ImportError):  # of a torch or diffusers that is too old
            groups = start_groups(machine.ulysses_size, machine.ring_size, fsdp=sharded)
        return groups.sequence.group if groups.sequence else None

    def read_sources(self, sampling: Sampling, inputs: Inputs) -> list:
        from wan.utils.vace_source import prepare_source

        files = (inputs.src_video, inputs.src_mask, [read_image(path) for path in inputs.references])
        return [[source] for source in prepare_source(*files, sampling.frame_num, sampling.pixels)]

    def transformers(self, pipeline) -> list["torch.nn.Module"]:
        return pipeline.transformers

    def placement(self, machine: Machine) -> dict[str, Any]:
        import torch

        dtype = machine.dit_dtype and getattr(torch, machine.dit_dtype)
        how = {"compile": machine.compile, "vae_tiling": machine.vae_tiling}
        return {"dit_dtype": dtype, "offload_blocks": machine.offload_blocks} | how


def check_machine(machine: Machine) -> None:
    """Refuses what does not run on this machine. Chooses the attention backend."""
    import torch
    from diffusers.utils import constants

    cuda, dtype = torch.cuda.is_available(), machine.dit_dtype
    device = f"cuda:{Processes.from_environment().local_rank}" if cuda else "cpu"
    mixed = machine.dit_fsdp and dtype not in (None, "float32")  # with the float32 biases of a block
    # of which the compiler makes a kernel that these cards do not run (pytorch issue 167082)
    casts = machine.compile and dtype == "float8_e4m3fn" and cuda and torch.cuda.get_device_capability(device) < (8, 9)
    for unsupported, flag, needed in ((mixed, "--dit_fsdp", "2.9"), (casts, "--compile", "2.13")):
        if unsupported and torch.__version__ < needed:
            newer = f"needs torch {needed} or newer here; this is {torch.__version__}"
            raise Refused(f"{flag} with --dit_dtype {dtype} {newer}")
    constants.DIFFUSERS_ATTN_BACKEND = "native"  # with an unknown one what follows could not be imported
    from wan.utils.attention import choose_attention

    with refusing(ValueError):
        choose_attention(machine.attn_backend or os.environ.get("DIFFUSERS_ATTN_BACKEND", "native"), device)
