"""The forwards that a model instance gets where several processes share the sequence."""

import torch
import torch.nn.functional as F
from torch import distributed


def gather(x):
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)


def own_part(x):
    return torch.chunk(x, distributed.get_world_size(), dim=1)[distributed.get_rank()]


def usp_attn_forward(self, x, seq_lens, grid_sizes, freqs):
    return self.o(F.scaled_dot_product_attention(self.q(x), gather(self.k(x)), gather(self.v(x))))


def usp_dit_forward(self, x, t, context, seq_len, clip_fea=None, y=None):
    x, e, grid_sizes, kwargs = self.embed(x, t, context, seq_len, clip_fea, y)
    x = own_part(x)
    for block in self.blocks:
        x = block(x, **kwargs)
    return self.unpatchify(gather(self.head(x, e)), grid_sizes)
