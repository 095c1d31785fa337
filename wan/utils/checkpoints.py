"""Reading official `.pth` files, and checking them before anything is loaded."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from easydict import EasyDict


class DamagedFile(RuntimeError):
    """A file of a checkpoint that is incomplete, or holds other tensors than it should."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a file's content makes fail in the block becomes DamagedFile with one line: the last of the reason."""
    try:
        yield
    except DamagedFile:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[-1].strip()[:200]
        raise DamagedFile(f"cannot read {path}, is it complete? ({reason})") from error


def load_pth(path: str | Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Loads a file of tensors to the CPU, mapped into memory where its format allows (all but torch's oldest); for the
    device "meta" without their data. Raises DamagedFile if the file is damaged or holds more than tensors."""
    place = "meta" if torch.device(device).type == "meta" else "cpu"
    with reading(path):
        return torch.load(path, map_location=place, weights_only=True, mmap=zipfile.is_zipfile(path))


def check_encoders(folder: Path, config: EasyDict, with_image: bool) -> None:
    """Loads text encoder, VAE and, with_image, image encoder of a task's config without their data. Raises DamagedFile
    for tensors that are missing, left over or of another shape."""
    from wan.modules.clip import load_tower
    from wan.modules.t5 import load_encoder
    from wan.modules.vae import load_vae

    load_encoder(folder / config.t5_checkpoint, torch.float32, "meta")
    load_vae(folder / config.vae_checkpoint, torch.float32, "meta")
    if with_image:
        load_tower(folder / config.clip_checkpoint, config.clip_num_heads, torch.float32, "meta")
