"""The Wan2.1 diffusion transformer (DiT), with upstream's names for classes, arguments and tensors."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from einops import rearrange
from safetensors import safe_open

from wan.utils.checkpoints import DamagedFile, reading

PATCH_SIZE = (1, 2, 2)  # frames, rows, columns
MAX_PERIOD = 10000.0  # of the time embedding


def sinusoidal_embedding_1d(dim: int, position: torch.Tensor) -> torch.Tensor:
    """Embeds timesteps [B] as [cos | sin] of t * 10000^(-i / (dim / 2)). Returns float64 [B, dim]."""
    half = dim // 2
    frequencies = torch.logspace(
        0, (1 - half) / half, half, base=MAX_PERIOD, dtype=torch.float64, device=position.device
    )
    angles = position.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rope_rotations(grid: tuple[int, int, int], head_dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Returns the rotary position embedding of a (frames, rows, columns) grid as complex64 [frames * rows * columns,
    head_dim / 2]. The channel pairs of a head are split among the axes as (c - 2 * (c // 3), c // 3, c // 3), each with
    frequencies of its own. Angles are float64: far positions would be off by 3e-5 in float32."""
    pairs = head_dim // 2
    widths = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    parts = []
    for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
        positions = torch.arange(length, device=device)
        rotations = get_1d_rotary_pos_embed(2 * width, positions, use_real=False, freqs_dtype=torch.float64)
        shape = [1, 1, 1, width]
        shape[axis] = length
        parts.append(rotations.view(shape).expand(*grid, width))
    return torch.cat(parts, dim=-1).flatten(0, 2).to(torch.complex64)


def rope_apply(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotates adjacent channel pairs of x [B, L, heads, head_dim] by freqs complex64 [B or 1, L, head_dim / 2].
    Computed and returned in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs[:, :, None]).flatten(-2)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def by_token(u: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Spreads u [B, dim] to [B, 1, dim], or, by the row of every token, rows int64 [B, L], to [B, L, dim]."""
    return u[:, None] if rows is None else u[rows]


class Attention(nn.Module):
    """Projections that self- and cross-attention share. q and k are RMS-normalised over all heads together."""

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def query(self, x: torch.Tensor) -> torch.Tensor:
        return self.split_heads(self.norm_q(self.q(x).float()))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None):
        """Attends: q, k, v [B, L, heads, head_dim] -> [B, L, dim], computed in v's dtype, which is that of autocast."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        if v.device.type == "cpu":  # contiguous heads speed torch's attention up there by more than the copies cost
            q, k, v = (u.transpose(1, 2).contiguous().transpose(1, 2) for u in (q, k, v))
        return dispatch_attention_fn(q, k, v, attn_mask=mask).flatten(2)


class WanSelfAttention(Attention):
    sequence = None  # what shares the tokens with other ranks, see `WanModel.share_sequences`

    def forward(self, x: torch.Tensor, seq_lens: list[int], freqs: torch.Tensor) -> torch.Tensor:
        q = rope_apply(self.query(x), freqs)
        k = rope_apply(self.split_heads(self.norm_k(self.k(x).float())), freqs)
        v = self.split_heads(self.v(x))
        if self.sequence:
            return self.o(self.sequence.attend(q.to(v.dtype), k.to(v.dtype), v, seq_lens[0]).flatten(2))
        return self.o(self.attend(q, k, v, padding_mask(seq_lens, x.shape[1], x.device)))


class WanCrossAttention(Attention):
    """Attends to the text; with `image`, also to image tokens in front of the text, through their own k and v."""

    def __init__(self, dim: int, num_heads: int, text_len: int, image: bool, eps: float = 1e-6):
        super().__init__(dim, num_heads, eps)
        self.text_len = text_len
        self.image = image
        if image:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.RMSNorm(dim, eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q = self.query(x)
        text = context[:, -self.text_len :]
        out = self.attend(q, self.split_heads(self.norm_k(self.k(text).float())), self.split_heads(self.v(text)))
        if self.image:
            image = context[:, : -self.text_len]
            k = self.split_heads(self.norm_k_img(self.k_img(image).float()))
            out = out + self.attend(q, k, self.split_heads(self.v_img(image)))
        return self.o(out)


def stack_padded(sequences: list[torch.Tensor], length: int) -> torch.Tensor:
    """Sequences [L <= length, C] -> [B, length, C], zeros behind each."""
    return torch.stack([F.pad(u, (0, 0, 0, length - u.shape[0])) if u.shape[0] < length else u for u in sequences])


def padding_mask(seq_lens: list[int], length: int, device: torch.device) -> torch.Tensor | None:
    """Returns a mask that is True for real tokens, bool [B, 1, 1, length]; None if nothing is padded."""
    if all(tokens == length for tokens in seq_lens):
        return None
    positions = torch.arange(length, device=device)
    return torch.stack([positions < tokens for tokens in seq_lens])[:, None, None]


class WanAttentionBlock(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, num_heads: int, text_len: int, image: bool, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = WanSelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = WanCrossAttention(dim, num_heads, text_len, image, eps)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        seq_lens: list[int],
        freqs: torch.Tensor,
        context: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, L, dim], e float32 [B, 6, dim], seq_lens the tokens of every sample, freqs see `rope_apply`, context
        [B, image tokens + text_len, dim]. rows: of e, one for every token, see `by_token`; None for one a sample.
        Returns [B, L, dim]; the modulation keeps it in float32 under autocast.

        Where ranks share the tokens, L is this rank's part and seq_lens counts those of all."""
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = (self.modulation + e).unbind(1)
        modulated = modulate(self.norm1(x.float()), by_token(shift_sa, rows), by_token(scale_sa, rows))
        attended = self.self_attn(modulated, seq_lens, freqs)
        x = torch.addcmul(x, by_token(gate_sa, rows), attended)
        del modulated, attended
        x = x + self.cross_attn(self.norm3(x), context)
        modulated = modulate(self.norm2(x), by_token(shift_ffn, rows), by_token(scale_ffn, rows))
        return torch.addcmul(x, by_token(gate_ffn, rows), self.ffn(modulated))


class Head(nn.Module):
    def __init__(self, dim: int, out_channels: int, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: torch.Tensor, e: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, L, dim], e float32 [B, dim] (the time embedding, not its projection), rows as a block takes them.
        Computed in float32."""
        shift, scale = (by_token(u, rows) for u in (self.modulation + e[:, None]).unbind(1))
        with torch.autocast(x.device.type, enabled=False):
            return self.head(modulate(self.norm(x.float()), shift, scale))


class MLPProj(nn.Module):
    """Maps CLIP tokens to the transformer's width; `positions` > 0 adds a learned position table (flf2v)."""

    def __init__(self, clip_dim: int, dim: int, positions: int):
        super().__init__()
        mlp = nn.Linear(clip_dim, clip_dim), nn.GELU(), nn.Linear(clip_dim, dim)
        self.proj = nn.Sequential(nn.LayerNorm(clip_dim), *mlp, nn.LayerNorm(dim))
        if positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, clip_dim))

    def forward(self, clip_fea: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "emb_pos"):  # the tokens of first and last frame of a sample follow each other
            clip_fea = clip_fea.reshape(-1, *self.emb_pos.shape[1:]) + self.emb_pos
        return self.proj(clip_fea)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Reads names and shapes of all tensors of a diffusers model folder from the headers of its safetensors files.
    Raises DamagedFile if one is damaged."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with reading(file), safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


class WanModel(ModelMixin, ConfigMixin):
    """The DiT of Wan2.1 and Wan2.2; see `forward`. model_type: "t2v", "i2v", "ti2v" or "flf2v" ("vace" is
    `VaceWanModel`). text_dim and clip_dim are the widths of the text and image features, clip_dim 0 for a model without
    image features (Wan2.2's i2v); official config files do not hold them, so `from_pretrained` reads them from
    the tensors."""

    # all but the weights of the blocks' linear layers, which autocast rounds to bfloat16 in any case
    _keep_in_fp32_modules: ClassVar = [
        *("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb", "head"),
        *("modulation", "norm_q", "norm_k", "norm_k_img", "norm3", "bias"),
    ]
    _repeated_blocks: ClassVar = ["WanAttentionBlock"]  # for `compile_repeated_blocks`

    @register_to_config
    def __init__(
        self,
        model_type: str = "t2v",
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        eps: float = 1e-6,
        clip_dim: int = 1280,
        clip_positions: int = 0,
    ):
        super().__init__()
        self.model_type, self.text_len, self.freq_dim, self.dim = model_type, text_len, freq_dim, dim
        self.out_dim, self.num_heads = out_dim, num_heads
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        image = model_type in ("i2v", "flf2v") and clip_dim > 0
        self.blocks = nn.ModuleList(
            WanAttentionBlock(dim, ffn_dim, num_heads, text_len, image, eps) for _ in range(num_layers)
        )
        self.head = Head(dim, out_dim * PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2], eps)
        if image:
            self.img_emb = MLPProj(clip_dim, dim, clip_positions)
        self.forget_rotations()
        self.sequence = None

    def share_sequences(self, sequence) -> None:
        """Makes the model compute only this rank's part of the tokens between patch embedding and head from now on; it
        still returns the whole output. All ranks must call it alike. sequence: a
        `wan.distributed.sequence.SequenceParallel`.

        Raises ValueError if the attention heads cannot be shared.
        """
        if self.num_heads % sequence.ulysses_size:
            raise ValueError(f"{self.num_heads} attention heads cannot be shared by {sequence.ulysses_size} ranks")
        self.sequence = sequence
        for module in self.modules():
            if isinstance(module, WanSelfAttention):
                module.sequence = sequence

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads an official folder: `config.json` and `diffusion_pytorch_model*.safetensors`, single or sharded. Raises
        DamagedFile if a file is damaged, or tensors are missing or left over."""
        folder = Path(pretrained_model_name_or_path)
        declared = json.loads((folder / "config.json").read_text())
        shapes = tensor_shapes(folder)
        widths = {"clip_dim": 0} if declared.get("model_type") == "i2v" else {}
        for name, tensor, axis in (
            ("text_dim", "text_embedding.0.weight", 1),
            ("clip_dim", "img_emb.proj.0.weight", 0),
            ("clip_positions", "img_emb.emb_pos", 1),
        ):
            if tensor in shapes:
                widths[name] = shapes[tensor][axis]
        kwargs = {name: width for name, width in widths.items() if name not in declared} | kwargs
        model, info = super().from_pretrained(folder, output_loading_info=True, **kwargs)
        if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise DamagedFile(f"{folder} has missing or unexpected tensors, such as {wrong[0]}: download it again")
        return model

    def forward(
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        context: list[torch.Tensor],
        seq_len: int,
        clip_fea: torch.Tensor | None = None,
        y: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Predicts the velocity of every sample.

        x: latents, one [in_dim, F, H, W] per sample (grids may differ). t: timesteps [B], or of every token,
        [B, seq_len]. context: text features, one [length <= text_len, text_dim] per sample. seq_len: tokens that each
        sample is padded to. clip_fea (i2v, flf2v): image features [B or 2 B, 257, clip_dim]. y (i2v, flf2v):
        conditioning, one [channels, F, H, W] per sample, stacked behind x. Returns float32 [out_dim, F, H, W] per
        sample (odd H, W are cropped to even).

        Raises ValueError if a sample has more tokens than seq_len, or, where ranks share the tokens, if samples have
        different grids.
        """
        if y is not None:
            x = [torch.cat([u, v]) for u, v in zip(x, y, strict=True)]
        return self.predict(x, t, seq_len, self.embed_context(context, clip_fea))

    def predict(
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        seq_len: int,
        context: torch.Tensor,
        further: Callable | None = None,
    ) -> list[torch.Tensor]:
        """Does what `forward` says. context: embedded. further: makes further arguments of the blocks from the embedded
        tokens [B, L, dim] and the other arguments."""
        tokens, seq_lens, freqs, grids = self.embed_patches(x, seq_len)
        rows = None
        if t.ndim == 2:  # only a few are different, and all that follows from them is of few rows, too
            t, rows = t.unique(return_inverse=True)
            rows = self.part(rows.to(tokens.device))
        t = t.to(tokens.device, non_blocking=True)
        with torch.autocast(t.device.type, enabled=False):
            e = self.time_embedding(sinusoidal_embedding_1d(self.freq_dim, t).float())
            projected = self.time_projection(e).unflatten(1, (6, self.dim))
        kwargs = {"e": projected, "rows": rows, "seq_lens": seq_lens, "freqs": freqs, "context": context}
        kwargs |= further(tokens, kwargs) if further else {}
        for block in self.blocks:
            tokens = block(tokens, **kwargs)
        out = self.head(tokens, e, rows)
        return self.unpatchify(self.sequence.gather(out, seq_lens[0]) if self.sequence else out, grids)

    def embed_patches(self, x: list[torch.Tensor], seq_len: int):
        """Returns tokens [B, seq_len, dim] padded with zeros, their counts, the RoPE rotations
        [B or 1, seq_len, head_dim / 2] (1 for padding) and the grids (frames, rows, columns) in patches.

        Where ranks share the tokens, tokens and rotations are this rank's part, without padding."""
        embedded = [self.patch_embedding(u[None]) for u in x]
        grids = [tuple(u.shape[2:]) for u in embedded]
        tokens = [u[0].flatten(1).T for u in embedded]
        seq_lens = [u.shape[0] for u in tokens]
        if max(seq_lens) > seq_len:
            raise ValueError(f"a sample has {max(seq_lens)} tokens, but seq_len is {seq_len}")
        if self.sequence:
            if len(set(grids)) > 1:
                raise ValueError("samples with different grids cannot be shared by ranks")
            seq_len = seq_lens[0]
        tokens = stack_padded(tokens, seq_len)
        freqs = self.rotations(grids, seq_len, tokens.device)
        return self.part(tokens), seq_lens, self.part(freqs), grids

    def rotations(self, grids: list[tuple[int, int, int]], seq_len: int, device: torch.device) -> torch.Tensor:
        """Returns the RoPE rotations [B or 1, seq_len, head_dim / 2] of the grids, 1 for padding. The last ones are
        kept, since all calls of a run ask for the same."""
        key = (grids if len(set(grids)) > 1 else grids[:1], seq_len, device)
        if self.kept_rotations[0] != key:
            with torch.inference_mode(False):  # a later call may want gradients
                rotations = [rope_rotations(grid, self.dim // self.num_heads, device) for grid in key[0]]
                padded = [torch.cat([r, r.new_ones(seq_len - r.shape[0], r.shape[1])]) for r in rotations]
                self.kept_rotations = (key, torch.stack(padded))
        return self.kept_rotations[1]

    def forget_rotations(self) -> None:
        """Drops the rotations that the last run has left."""
        self.kept_rotations = (None, None)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of x [B, L, ...]."""
        return self.sequence.split(x) if self.sequence else x

    def embed_context(self, context: list[torch.Tensor], clip_fea: torch.Tensor | None) -> torch.Tensor:
        text = self.text_embedding(stack_padded(context, self.text_len))
        return text if clip_fea is None else torch.cat([self.img_emb(clip_fea), text], dim=1)

    def unpatchify(self, x: torch.Tensor, grids: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Turns x [B, L, patch * out_dim], with the patch ordered (frame, row, column, channel), into videos."""
        videos = []
        for u, grid in zip(x, grids, strict=True):
            sizes = dict(zip("fhwpqr", (*grid, *PATCH_SIZE), strict=True))
            video = rearrange(u[: math.prod(grid)], "(f h w) (p q r c) -> c (f p) (h q) (w r)", **sizes)
            videos.append(video.float())
        return videos
