"""Reading official `.pth` files."""

import pickle
import zipfile

import torch


class DamagedFile(RuntimeError):
    """A file of a checkpoint that is incomplete, or holds other tensors than it should."""


def load_pth(path: str) -> dict[str, torch.Tensor]:
    """Loads a file of tensors to the CPU, mapped into memory where its format allows (all but torch's oldest). Raises
    DamagedFile with one line if the file is damaged or holds more than tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedFile(f"cannot read {path}, is it complete? ({reason})") from error
