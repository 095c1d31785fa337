"""A transformer that is called as Wan2.1's and calls its blocks and its head as that does, a few channels wide."""

import json
import math
from pathlib import Path

import torch
import torch.cuda.amp as amp
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file


def sinusoidal_embedding_1d(dim, position):
    half = dim // 2
    angles = torch.outer(position.double(), torch.pow(10000, -torch.arange(half, dtype=torch.float64) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def parts(e):
    """The parts of e [B, n, C], or of e [B, L, n, C], which has its own for every token."""
    return [part.flatten(1, -2) for part in e.chunk(e.shape[-2], dim=-2)]


class WanSelfAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, seq_lens, grid_sizes, freqs):
        return self.o(self.attend(self.q(x), self.k(x), self.v(x), seq_lens))

    @staticmethod
    def attend(q, k, v, seq_lens):
        real = torch.arange(k.shape[1]) < seq_lens[:, None]
        return F.scaled_dot_product_attention(q, k, v, real[:, None])


class WanAttentionBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.self_attn = WanSelfAttention(dim)
        self.cross_attn = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        assert e.dtype == torch.float32
        with amp.autocast(dtype=torch.float32):
            e = parts(self.modulation + e)
        y = self.self_attn(self.norm1(x).float() * (1 + e[1]) + e[0], seq_lens, grid_sizes, freqs)
        with amp.autocast(dtype=torch.float32):
            x = x + y * e[2]
        x = x + self.cross_attn(context).mean(dim=1, keepdim=True)
        y = self.ffn(self.norm2(x).float() * (1 + e[4]) + e[3])
        with amp.autocast(dtype=torch.float32):
            return x + y * e[5]


class Head(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, e):
        assert e.dtype == torch.float32
        with amp.autocast(dtype=torch.float32):
            shift, scale = parts(self.modulation + e.unsqueeze(-2))
            return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    block_class = WanAttentionBlock

    def __init__(self, model_type="t2v", in_dim=16, dim=24, out_dim=16, num_layers=3, text_dim=8, text_len=6):
        super().__init__()
        self.model_type, self.dim, self.out_dim, self.text_len, self.freq_dim = model_type, dim, out_dim, text_len, 16
        self.patch_size = (1, 2, 2)
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Linear(text_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(self.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([self.block_class(dim) for _ in range(num_layers)])
        self.head = Head(dim, out_dim * math.prod(self.patch_size))
        self.freqs = torch.ones(1024, dim // 2, dtype=torch.complex64)
        if model_type in ("i2v", "flf2v"):
            self.img_emb = nn.Linear(text_dim, dim)

    @classmethod
    def from_pretrained(cls, folder, subfolder=""):
        """Random, and on top of that what the folder's file has of the same names and shapes."""
        folder = Path(folder, subfolder)
        kept = ("model_type", "in_dim", "dim", "out_dim", "num_layers")
        declared = json.loads((folder / "config.json").read_text())
        model = cls(**{key: declared[key] for key in kept})
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
        """Returns tokens, time embedding, grids, and what the blocks are called with."""
        if self.model_type in ("i2v", "flf2v"):
            x = [torch.cat([u, v]) for u, v in zip(x, y, strict=True)]
        x = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:]) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.shape[1] for u in x])
        assert seq_lens.max() <= seq_len
        x = torch.cat([torch.cat([u, u.new_zeros(1, seq_len - u.shape[1], u.shape[2])], dim=1) for u in x])
        with amp.autocast(dtype=torch.float32):
            e = sinusoidal_embedding_1d(self.freq_dim, t.flatten()).unflatten(0, t.shape)
            e = self.time_embedding(e.float())
            e0 = self.time_projection(e).unflatten(-1, (6, self.dim))
        padded = [torch.cat([u, u.new_zeros(self.text_len - len(u), u.shape[1])]) for u in context]
        context = self.text_embedding(torch.stack(padded))
        if clip_fea is not None:
            context = torch.cat([self.img_emb(clip_fea), context], dim=1)
        kwargs = {"e": e0, "seq_lens": seq_lens, "grid_sizes": grid_sizes, "freqs": self.freqs, "context": context}
        return x, e, grid_sizes, kwargs | {"context_lens": None}

    def unpatchify(self, x, grid_sizes):
        out = []
        for u, (f, h, w) in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: f * h * w].view(f, h, w, *self.patch_size, self.out_dim)
            u = torch.einsum("fhwpqrc->cfphqwr", u)
            out.append(u.reshape(self.out_dim, f, 2 * h, 2 * w).float())
        return out
