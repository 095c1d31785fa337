"""Models that wait in CPU memory and visit the GPU part by part, by diffusers' group offloading."""

import torch
from diffusers.hooks import apply_group_offloading


def offload_transformer(model: torch.nn.Module, device: torch.device, blocks: int) -> None:
    """Has so many blocks of a Wan transformer on the device at a time, and only while they run; what is no block only
    while the model runs. On CUDA they wait in pinned memory, and with one block the next one is copied meanwhile
    (diffusers' streams take no larger groups)."""
    stream = device.type == "cuda" and blocks == 1
    if stream:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.pin_memory()  # one by one: diffusers would hold all of them twice for a while
    settings = {"num_blocks_per_group": blocks, "use_stream": stream, "low_cpu_mem_usage": True}
    model.enable_group_offload(device, offload_type="block_level", **settings)


def offload_text_encoder(model: torch.nn.Module, device: torch.device) -> None:
    """Has one layer of it on the device at a time. The others stay in the mapped file."""
    settings = {"use_stream": device.type == "cuda", "low_cpu_mem_usage": True}
    apply_group_offloading(model, device, offload_type="leaf_level", **settings)
