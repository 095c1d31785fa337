"""The Wan transformer by its tensors: what their names and shapes are for given sizes. Pure Python."""

from dataclasses import dataclass
from math import prod

LATENT, IMAGE, CONTROL = 16, 36, 96  # channels of what the pipelines give the transformer; it returns those of a latent
LATENT_5B = 48
PATCH = (1, 2, 2)  # latent pixels to a token: frames, rows, columns
CLIP_TOKENS = 257  # of an image

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a transformer, named as in its config.json. images: how many the image encoder sees, if there is
    one. vace_blocks: of the side branch, 0 without one."""

    dim: int
    ffn_dim: int
    num_layers: int
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    in_dim: int = LATENT
    out_dim: int = LATENT
    clip_dim: int = 1280
    clip_positions: int = 0
    images: int = 0
    vace_blocks: int = 0


def tensor_shapes(sizes: Architecture) -> Shapes:
    """Names and shapes of all tensors."""
    dim, clip_dim = sizes.dim, sizes.clip_dim
    shapes = patches("patch_embedding", sizes.in_dim, dim)
    shapes |= linear("text_embedding.0", sizes.text_dim, dim) | linear("text_embedding.2", dim, dim)
    shapes |= linear("time_embedding.0", sizes.freq_dim, dim) | linear("time_embedding.2", dim, dim)
    shapes |= linear("time_projection.1", dim, 6 * dim)
    shapes |= linear("head.head", dim, prod(PATCH) * sizes.out_dim) | {"head.modulation": (1, 2, dim)}
    for layer in range(sizes.num_layers):
        shapes |= block_shapes(f"blocks.{layer}", dim, sizes.ffn_dim, bool(sizes.images))
    if sizes.images:
        shapes |= norm("img_emb.proj.0", clip_dim) | linear("img_emb.proj.1", clip_dim, clip_dim)
        shapes |= linear("img_emb.proj.3", clip_dim, dim) | norm("img_emb.proj.4", dim)
    if sizes.clip_positions:
        shapes["img_emb.emb_pos"] = (1, sizes.clip_positions, clip_dim)
    if sizes.vace_blocks:
        shapes |= patches("vace_patch_embedding", CONTROL, dim) | linear("vace_blocks.0.before_proj", dim, dim)
    for block in range(sizes.vace_blocks):
        shapes |= block_shapes(f"vace_blocks.{block}", dim, sizes.ffn_dim, False)
        shapes |= linear(f"vace_blocks.{block}.after_proj", dim, dim)
    return shapes


def linear(name: str, width_in: int, width_out: int) -> Shapes:
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def patches(name: str, channels: int, dim: int) -> Shapes:
    return {f"{name}.weight": (dim, channels, *PATCH), f"{name}.bias": (dim,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block_shapes(name: str, dim: int, ffn_dim: int, with_image: bool) -> Shapes:
    shapes = {f"{name}.modulation": (1, 6, dim)} | norm(f"{name}.norm3", dim)
    for attention in ("self_attn", "cross_attn"):
        for layer in "qkvo":
            shapes |= linear(f"{name}.{attention}.{layer}", dim, dim)
        shapes |= {f"{name}.{attention}.norm_{layer}.weight": (dim,) for layer in "qk"}
    if with_image:
        shapes |= linear(f"{name}.cross_attn.k_img", dim, dim) | linear(f"{name}.cross_attn.v_img", dim, dim)
        shapes[f"{name}.cross_attn.norm_k_img.weight"] = (dim,)
    return shapes | linear(f"{name}.ffn.0", dim, ffn_dim) | linear(f"{name}.ffn.2", ffn_dim, dim)
