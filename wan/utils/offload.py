"""Models that wait in CPU memory and are moved to the GPU as a whole or part by part (diffusers' group offloading)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.hooks import apply_group_offloading

from wan.utils.attention import send_back

ALIGNED = 512  # bytes that a tensor within a buffer starts at a multiple of
BUFFERS = 32  # of a model, roughly; fewer if its largest tensor needs larger ones


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device | None, then: str | None = None) -> Iterator[None]:
    """Keeps the model on the device within this block; for a device of None it is not moved. then: where it goes
    afterwards, also after a failure, as another video may come: "cpu", "meta" to drop its weights, None to stay."""
    try:
        if device is not None:
            model.to(device)
        yield
    finally:
        if device is None:
            send_back(model)
        elif then is not None:
            model.to(then)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def offload_transformer(model: torch.nn.Module, device: torch.device) -> None:
    """Keeps one block of a Wan transformer on the device at a time, only while it runs, and everything else only while
    the model runs. On CUDA the blocks wait in pinned memory, and the next one is copied while one runs."""
    stream = device.type == "cuda"
    if stream:
        pin_together([*model.parameters(), *model.buffers()])
    settings = {"num_blocks_per_group": 1, "use_stream": stream, "low_cpu_mem_usage": True}
    model.enable_group_offload(device, offload_type="block_level", **settings)


def offload_text_encoder(model: torch.nn.Module, device: torch.device) -> None:
    """Keeps one layer of the model on the device at a time. The others stay in the mapped file."""
    settings = {"use_stream": device.type == "cuda", "low_cpu_mem_usage": True}
    apply_group_offloading(model, device, offload_type="leaf_level", **settings)


def pin_together(tensors: Sequence[torch.Tensor]) -> None:
    """Moves tensors to pinned memory, many to a buffer: torch rounds every allocation up to a power of two."""
    for size, places in packed([tensor.nbytes for tensor in tensors]):
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for number, start in places:
            tensor = tensors[number]
            part = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensor.data = part.copy_(tensor.data)


def packed(sizes: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Packs tensors of these sizes, in bytes, into buffers. Returns for every buffer its size and where tensors lie in
    it, as (number of the tensor, start). All buffers but the last nearly fill a power of two, so little is wasted."""
    capacity = 1 << max(max(sizes) - 1, sum(sizes) // BUFFERS).bit_length()
    buffers: list[tuple[int, list[tuple[int, int]]]] = []
    for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        room = -(-sizes[number] // ALIGNED) * ALIGNED
        index = next((i for i, (used, _) in enumerate(buffers) if used + room <= capacity), len(buffers))
        used, places = buffers[index] if index < len(buffers) else (0, [])
        buffers[index : index + 1] = [(used + room, [*places, (number, used)])]
    return buffers
