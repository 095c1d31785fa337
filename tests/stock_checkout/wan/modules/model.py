"""A transformer that is called as Wan2.1's and calls its blocks and its head as that does, a few channels wide."""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file


class WanSelfAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, seq_lens, grid_sizes, freqs):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def modulated(x, e):
    """x [1, L, C], e [1, 1, C], or [1, L, C], which has its own for every token."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + e)


class WanAttentionBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.self_attn, self.cross_attn = WanSelfAttention(dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        x = x + self.self_attn(modulated(x, e), seq_lens, grid_sizes, freqs)
        x = x + self.cross_attn(context).mean(dim=1, keepdim=True)
        return x + self.ffn(modulated(x, e))


class Head(nn.Linear):
    def forward(self, x, e):
        return super().forward(modulated(x, e))


class WanModel(nn.Module):
    block_class = WanAttentionBlock

    def __init__(self, in_dim=16, dim=24, out_dim=16, num_layers=3):
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text_embedding, self.img_emb = nn.Linear(8, dim), nn.Linear(8, dim)
        self.time_embedding = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([self.block_class(dim) for _ in range(num_layers)])
        self.head = Head(dim, 4 * out_dim)

    @classmethod
    def from_pretrained(cls, folder, subfolder=""):
        """Random, and on top of that what the folder's file has of the same names and shapes."""
        folder = Path(folder, subfolder)
        declared = json.loads((folder / "config.json").read_text())
        model = cls(**{key: declared[key] for key in ("in_dim", "dim", "out_dim", "num_layers")})
        own = dict(model.named_parameters())
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                if name in own and own[name].shape == tensor.shape:
                    own[name].data += tensor
        return model

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None):
        x, e, grid_sizes, kwargs = self.embed(x, t, context, seq_len, clip_fea, y)
        for block in self.blocks:
            x = block(x, **kwargs)
        return self.unpatchify(self.head(x, e), grid_sizes)

    def embed(self, x, t, context, seq_len, clip_fea, y):
        """Returns tokens, time embedding, the grid, and what the blocks are called with."""
        x = self.patch_embedding(torch.cat([*x, *(y or [])])[None])
        grid_sizes = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        assert x.shape[1] == seq_len
        waves = torch.cos(t[..., None] / 10 ** torch.linspace(0, 3, 16))
        e = self.time_embedding(waves).view(1, -1, self.dim)
        context = self.text_embedding(torch.stack(context))
        if clip_fea is not None:
            context = torch.cat([self.img_emb(clip_fea), context], dim=1)
        kwargs = {
            "e": e,
            "seq_lens": torch.tensor([seq_len]),
            "grid_sizes": grid_sizes,
            "freqs": None,
            "context": context,
        }
        return x, e, grid_sizes, kwargs | {"context_lens": None}

    def unpatchify(self, x, grid_sizes):
        f, h, w = grid_sizes
        x = torch.einsum("fhwqrc->cfhqwr", x.view(f, h, w, 2, 2, self.out_dim))
        return [x.reshape(self.out_dim, f, 2 * h, 2 * w)]
