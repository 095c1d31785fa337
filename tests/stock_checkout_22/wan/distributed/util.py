import torch
from torch import distributed


def init_distributed_group():
    if not distributed.is_initialized():
        distributed.init_process_group(backend="nccl")


def gather(x):
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)


def own_part(x):
    return torch.chunk(x, distributed.get_world_size(), dim=1)[distributed.get_rank()]
