"""Reading official `.pth` files."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class DamagedFile(OSError):
    """A file of a checkpoint that is incomplete, or holds other tensors than it should."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns every exception in this block into DamagedFile with one line, which quotes the last line of the reason."""
    try:
        yield
    except DamagedFile:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[-1].strip()[:200]
        raise DamagedFile(f"cannot read {path}, is it complete? ({reason}): download it again") from error


def load_pth(path: str | Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Loads a file of tensors to the CPU, mapped into memory where its format allows (all but torch's oldest). For the
    device "meta" the data are not loaded. Raises DamagedFile if the file is damaged or holds more than tensors."""
    place = "meta" if torch.device(device).type == "meta" else "cpu"
    with reading(path):
        return torch.load(path, map_location=place, weights_only=True, mmap=zipfile.is_zipfile(path))
