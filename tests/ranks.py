"""Runs in one process, with which those of processes that share a video are compared. Run as a script it forks into
several processes, which write what they saw; they are forked, since importing costs more than all they do.

PYTHONPATH=. python tests/ranks.py FOLDER      (which holds tiny checkpoints i2v, vace, t2v-A14B and ti2v-5B)
"""

import contextlib
import gc
import importlib
import os
import socket
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from commands import DEMO, TINY
from diffusers.models import attention_dispatch as attention
from PIL import Image
from torch.distributed.tensor.debug import CommDebugMode

import magcache
import magcache_generate
import wan
from magcache.app.processes import Processes, agreed
from wan.configs import WAN_CONFIGS
from wan.distributed.groups import start_groups
from wan.modules.model import WanModel

PROMPT = "a red circle moves right on a white background"
STEPS = 6
EVEN, ODD = ((64, 64), 9), ((48, 48), 9)  # 48 and 27 tokens
# name: (ulysses_size, flags of the pipeline), kind, size and frames
PIPELINE_RUNS = {
    "t2v ulysses": (2, {"use_usp": True}, "t2v", EVEN),
    "t2v ulysses odd": (2, {"use_usp": True}, "t2v", ODD),
    "t2v fsdp of 4": (1, {"dit_fsdp": True, "t5_fsdp": True}, "t2v", ODD),
    "t2v both": (2, {"use_usp": True, "dit_fsdp": True, "t5_fsdp": True}, "t2v", ODD),
    "i2v both": (2, {"use_usp": True, "dit_fsdp": True}, "i2v", ODD),
    "vace both": (2, {"use_usp": True, "dit_fsdp": True}, "vace", ODD),
}
# the same of Wan2.2
RUNS_22 = {
    "A14B both": (2, {"use_usp": True, "dit_fsdp": True}, "t2v-A14B"),
    "5B with a picture": (2, {"use_usp": True, "dit_fsdp": True}, "ti2v-5B"),
}
# name: (ring_size, ulysses_size), tokens per axis
MODEL_RUNS = {
    "ring": (2, 1, (2, 3, 4)),
    "ring odd": (2, 1, (3, 3, 3)),
    "ring and ulysses": (2, 2, (2, 3, 4)),
    "ring and ulysses odd": (2, 2, (3, 3, 3)),
    "ulysses 4 odd": (1, 4, (3, 3, 3)),
}


def schedule():
    return magcache.plan(magcache.load_ratios("t2v-1.3B"), STEPS, 0.3, 3, 0.2)


def forecasts():
    return magcache.plan_speedup(STEPS, 2)


class Counted:
    """A model that counts, by name, the collectives of every call."""

    def __init__(self, model):
        self.model, self.counts = model, []

    def __call__(self, *args, **kwargs):
        with CommDebugMode() as counter:
            out = self.model(*args, **kwargs)
        self.counts.append({str(name): count for name, count in counter.get_comm_counts().items()})
        return out

    def to(self, device):
        pass

    def modules(self):
        return self.model.modules()


def pipeline_run(folder: Path, kind: str, size, frame_num: int, rank: int = 0, **flags) -> dict:
    """Returns latents, the schedule as it ran, collectives of cached calls and ratios, all after a failed run."""
    if kind == "t2v":
        pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(DEMO), rank=rank, **flags)
        inputs, arguments = (PROMPT,), {"size": size}
    elif kind == "i2v":
        config = {**WAN_CONFIGS["i2v-14B"], "text_len": 512, "clip_num_heads": 2}
        pipeline = wan.WanI2V(type(WAN_CONFIGS["i2v-14B"])(config), str(folder / kind), rank=rank, **flags)
        image = Image.effect_noise(size, 60).convert("RGB")
        image.putdata([(x % 256, x * 7 % 256, x * 3 % 256) for x in range(size[0] * size[1])])
        inputs, arguments = ("a", image), {"max_area": size[0] * size[1]}
    else:
        pipeline = wan.WanVace(WAN_CONFIGS["vace-1.3B"], str(folder / kind), rank=rank, **flags)
        video = torch.linspace(-1, 1, 3 * frame_num * size[0] * size[1]).view(3, frame_num, *size)
        inputs, arguments = ("a", [video], [(video > 0)[:1].float()], None), {}
    latents = []
    pipeline.decode = latents.append
    arguments |= {"frame_num": frame_num} if kind != "vace" else {}
    arguments |= {"sampling_steps": STEPS, "seed": 3, "offload_model": False}
    model = pipeline.model
    fail_within_a_block(model, lambda: pipeline.generate(*inputs, **arguments))
    calibration = magcache.apply_calibration(model, STEPS, model.sequence.group if model.sequence else None)
    pipeline.generate(*inputs, **arguments)
    told = []
    magcache.apply_magcache(model, schedule(), on_call=lambda *call: told.append(call))
    pipeline.model = counted = Counted(model)
    pipeline.generate(*inputs, **arguments)
    magcache.apply_magcache(model, forecasts())
    pipeline.model = forecast = Counted(model)
    pipeline.keeps_models = False
    text = [weakref.ref(weight) for weight in pipeline.text_encoder.model.parameters()]
    gc.disable()
    pipeline.generate(*inputs, **arguments)
    gc.enable()
    return {
        "text encoder is left": any(weight() is not None for weight in text),
        "uncached": latents[0],
        "cached": latents[1],
        "reuse": tuple(reused for _, reused in told),
        "collectives": counted.counts,
        "forecast": latents[2],
        "forecast collectives": forecast.counts,
        "lists": calibration.lists(),
    }


def run_22(folder: Path, task: str, rank: int = 0, **flags) -> list[torch.Tensor]:
    """Returns latents, uncached and with forecasts, all after a run that failed in the second transformer, or the only
    one. 45 tokens, which two processes share unevenly."""
    pipeline_class = wan.WanTI2V if task == "ti2v-5B" else wan.WanT2V
    pipeline, latents, size = pipeline_class(WAN_CONFIGS[task], str(folder / task), rank=rank, **flags), [], (80, 48)
    inputs, arguments = ("a",), {"size": size}
    if task == "ti2v-5B":
        inputs, arguments = ("a", Image.linear_gradient("L").convert("RGB").resize((160, 96))), {"max_area": 160 * 96}
    pipeline.decode = latents.append
    arguments |= {"frame_num": 9, "shift": 12.0, "sampling_steps": STEPS, "seed": 3, "offload_model": False}
    fail_within_a_block(pipeline.transformers[-1], lambda: pipeline.generate(*inputs, **arguments))
    pipeline.generate(*inputs, **arguments)
    boundary = WAN_CONFIGS[task].get("boundary")
    magcache.apply_magcache(pipeline.transformers, magcache.plan_speedup(STEPS, 2, 12.0, boundary=boundary))
    pipeline.generate(*inputs, **arguments)
    return latents


def fail_within_a_block(model, run) -> None:
    """Makes a run fail within a block, which leaves the model as a failing video does."""

    def fail(*_):
        raise FloatingPointError

    hook = model.blocks[0].cross_attn.register_forward_pre_hook(fail)
    with contextlib.suppress(FloatingPointError):
        run()
    hook.remove()


def who_agrees(group) -> list:
    """Returns what `agreed` says if all are well, if all fail with different words, and if one fails alone: the first,
    which decodes, or another."""
    answers, rank = [], dist.get_rank(group)
    alone = ("ValueError", "alone")
    for fault in (None, ("MemoryError", f"GPU {rank} is full"), None if rank else alone, alone if rank else None):
        try:
            answers.append(agreed(fault, group))
        except RuntimeError as error:
            answers.append(str(error))
    return answers


def model_run(grid, sequence=None) -> dict:
    """Returns the outputs of a small random model, the second from a cached call, and the collectives of both calls."""
    torch.manual_seed(0)
    model = WanModel(dim=48, ffn_dim=64, freq_dim=16, text_dim=8, text_len=6, num_heads=4, num_layers=2).eval()
    x, context = torch.randn(16, grid[0], 2 * grid[1], 2 * grid[2]), torch.randn(5, 8)
    if sequence:
        model.share_sequences(sequence)
    magcache.apply_magcache(model, magcache.Schedule((None, (1.0,)), calls_per_step=1))
    counted, outputs = Counted(model), []
    with torch.no_grad():
        for t in (900, 800):
            outputs += counted([x], torch.tensor([t]), [context], seq_len=40)  # padded where nothing is shared
    return {"outputs": outputs, "collectives": counted.counts}


def sharded_under_autocast() -> dict:
    """Runs with the dtypes of CUDA: float32 weights, of which FSDP gathers the blocks' linear layers in bfloat16."""
    from wan.distributed.fsdp import shard_transformer

    torch.manual_seed(0)
    model = WanModel(dim=48, ffn_dim=64, freq_dim=16, text_dim=8, text_len=6, num_heads=4, num_layers=2).eval()
    model.requires_grad_(False)
    arguments = [torch.randn(16, 2, 6, 8)], torch.tensor([900]), [torch.randn(5, 8)], 24
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        plain = model(*arguments)[0]
    with torch.inference_mode(False):
        shard_transformer(model, start_groups(1, 1, fsdp=True).mesh, torch.bfloat16)
    gathered = set()
    model.blocks[0].register_forward_hook(lambda m, a, out: gathered.add(m.modulation.dtype))
    model.blocks[0].ffn[0].register_forward_pre_hook(lambda m, a: gathered.add(m.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        sharded = model(*arguments)[0]
    return {"plain": plain, "sharded": sharded, "dtypes": gathered}


def register_cpu_attention_with_lse() -> None:
    """Puts an attention of torch in place of the one that rings use on CUDA, since it returns the log-sum-exp that a
    ring needs; diffusers' attention on the CPU does not."""

    def forward_op(ctx, query, key, value, mask=None, dropout=0, causal=False, scale=None, gqa=False, lse=False, **_):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out, sums = (
            x.transpose(1, 2) for x in torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
        )
        return (out, sums) if lse else out

    name = attention.AttentionBackendName._NATIVE_FLASH

    @attention._AttentionBackendRegistry.register(name, supports_context_parallel=True)
    def cpu_flash(query, key, value, attn_mask=None, _parallel_config=None):
        if _parallel_config is None:
            return forward_op(None, query, key, value)
        return attention._templated_context_parallel_attention(
            query, key, value, None, forward_op=forward_op, backward_op=None, _parallel_config=_parallel_config
        )

    attention._AttentionBackendRegistry.set_active_backend(name)


def share_videos(rank: int, world: int, folder: Path) -> None:
    """What one of four processes does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = {}
    for number, (name, (ulysses, flags, kind, (size, frame_num))) in enumerate(PIPELINE_RUNS.items()):
        groups = start_groups(ulysses, 1, fsdp="dit_fsdp" in flags)
        if number % groups.count == groups.index:  # each group has its own to do
            results[name] = pipeline_run(folder, kind, size, frame_num, groups.rank, **flags)
    for number, (name, (ulysses, flags, task)) in enumerate(RUNS_22.items()):
        groups = start_groups(ulysses, 1, fsdp="dit_fsdp" in flags)
        if number % groups.count == groups.index:
            results[name] = run_22(folder, task, groups.rank, **flags)
    results["autocast"] = sharded_under_autocast()
    results["agreed"] = who_agrees(Processes(rank, world).patient_group(2))
    register_cpu_attention_with_lse()
    for name, (ring, ulysses, grid) in MODEL_RUNS.items():
        groups = start_groups(ulysses, ring)
        place = {"place": (groups.rank, groups.size, groups.index, groups.count)}
        results[name] = model_run(grid, groups.sequence) | place
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def calibrate(rank: int, world: int, folder: Path, port: int) -> None:
    """What one of two processes of the command line does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    flags = [*TINY, "--frame_num", 5, "--sample_steps", 3, "--prompt", PROMPT, "--base_seed", 3]
    flags += ["--magcache_calibration", 1.5, "--ulysses_size", 2, "--dit_fsdp", "--t5_fsdp"]
    flags += ["--save_file", folder / "dumps" / "film.mp4"]
    (folder / "dumps").mkdir(exist_ok=True)
    sys.argv = ["magcache_generate.py", *map(str, flags)]
    magcache_generate.main()


def main(folder: Path) -> None:
    for name in wan.__all__:
        getattr(wan, name)  # imports it
    importlib.import_module("wan.distributed.fsdp")
    torch.multiprocessing.start_processes(share_videos, (4, folder), 4, start_method="fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(calibrate, (2, folder, port), 2, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
