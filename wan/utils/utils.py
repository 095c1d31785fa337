"""Saving results, and the truth values of the command line."""

import argparse

import torch
from einops import rearrange

from magcache.app.media import to_uint8, write_image, write_video


def str2bool(value: str | bool) -> bool:
    """yes/true/t/y/1 or no/false/f/n/0 in any case; else argparse.ArgumentTypeError."""
    text = str(value).lower()
    if text in ("yes", "true", "t", "y", "1"):
        return True
    if text in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected a truth value (True or False), got {value!r}")


def grid_rows(tensor: torch.Tensor, nrow: int) -> torch.Tensor:
    """Lays a batch [B, C, F, H, W] out as a grid of nrow columns, [F, rows * H, nrow * W, C]; gaps are black (-1)."""
    columns = min(nrow, len(tensor))
    missing = -len(tensor) % columns
    tensor = torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), -1)])
    return rearrange(tensor, "(r n) c f h w -> f (r h) (n w) c", n=columns)


def cache_video(
    tensor: torch.Tensor,
    save_file: str,
    fps: int = 30,
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
) -> str:
    """Writes videos [B, 3, F, H, W] side by side as H.264 (quality 8), whole or not at all. fps: frames per second.
    Returns the path. Raises OSError if frames are missing from the file."""
    frames = to_uint8(grid_rows(tensor, nrow), value_range if normalize else (0, 1))
    write_video(save_file, frames, fps)
    return save_file


def cache_image(
    tensor: torch.Tensor,
    save_file: str,
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
) -> str:
    """Writes images [B, 3, H, W] as one picture, whole or not at all. Returns the path."""
    picture = to_uint8(grid_rows(tensor[:, :, None], nrow), value_range if normalize else (0, 1))[0]
    write_image(save_file, picture)
    return save_file
