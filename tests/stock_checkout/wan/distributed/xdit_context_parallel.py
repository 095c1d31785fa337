"""The forwards that a model instance gets where several processes share the sequence."""

import torch
from torch import distributed
from xfuser.core.distributed import get_sequence_parallel_rank, get_sequence_parallel_world_size


def gather(x):
    parts = [torch.empty_like(x) for _ in range(get_sequence_parallel_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)


def usp_attn_forward(self, x, seq_lens, grid_sizes, freqs):
    return self.o(self.attend(self.q(x), gather(self.k(x)), gather(self.v(x)), seq_lens))


def usp_dit_forward(self, x, t, context, seq_len, clip_fea=None, y=None):
    x, e, grid_sizes, kwargs = self.embed(x, t, context, seq_len, clip_fea, y)
    x = torch.chunk(x, get_sequence_parallel_world_size(), dim=1)[get_sequence_parallel_rank()]
    for block in self.blocks:
        x = block(x, **kwargs)
    return self.unpatchify(gather(self.head(x, e)), grid_sizes)
