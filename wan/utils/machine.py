"""What this machine can do, asked before anything is loaded."""

import ctypes
import warnings

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

from magcache.app.errors import first_line


def try_attention(name: str, device: torch.device | str) -> None:
    """Runs a tiny attention by this backend of diffusers. Raises ValueError, with the reason, if it does not run on the
    device, or would have to be downloaded."""
    if name.endswith("_hub"):
        raise ValueError(f"attention backend {name} would be downloaded: install its package and choose that one")
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        q = torch.zeros(1, 64, 2, 128, dtype=dtype, device=device)
        with attention_backend(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow ones
            dispatch_attention_fn(q, q, q)
    except Exception as fault:  # of packages that are missing, too old, made for other devices
        raise ValueError(f"attention backend {name} does not run here: {first_line(fault)}") from fault


def attention_backends(device: torch.device | str) -> list[str]:
    """The backends of diffusers that run on the device, without what is to be downloaded."""
    found = []
    for backend in AttentionBackendName:
        try:
            try_attention(backend.value, device)
        except ValueError:
            continue
        found.append(backend.value)
    return found


def choose_attention(name: str, device: torch.device | str) -> None:
    """Makes it the backend of all attention in this process. Raises ValueError if it does not run on the device."""
    if name not in {backend.value for backend in AttentionBackendName}:
        raise ValueError(f"there is no attention backend {name!r}; here run {', '.join(attention_backends(device))}")
    try_attention(name, device)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName(name))


def try_compiler(device: torch.device | str) -> None:
    """Compiles a tiny function. Raises ValueError if torch.compile cannot do that here."""
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as fault:  # no compiler, no triton, no Python headers
        raise ValueError(f"torch.compile does not work here: {first_line(fault)}") from fault


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for what is allocated next. Elsewhere than with glibc it does nothing. On a
    CPU every large tensor is otherwise new memory, and getting it costs as much as computing many a tensor."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX: nothing apart from the heap, which would go back when freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
