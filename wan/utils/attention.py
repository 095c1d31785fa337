"""Everything that is used of diffusers without having a public name there, mostly its attention. Tried with diffusers
0.41 and 0.42; what only several processes need is missing in older versions, and is imported only when they run."""

import contextlib
import warnings
from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)


def try_attention(name: str, device: torch.device | str) -> None:
    """Runs a tiny attention by this backend of diffusers. Raises ValueError, with the reason, if it does not run on the
    device, or if it would have to be downloaded."""
    if name.endswith("_hub"):
        raise ValueError(f"attention backend {name} would be downloaded; install its package and choose that instead")
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        q = torch.zeros(1, 64, 2, 128, dtype=dtype, device=device)
        with attention_backend(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about slow backends
            dispatch_attention_fn(q, q, q)
    except Exception as fault:  # its package may be missing, too old, or made for other devices
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise ValueError(f"attention backend {name} does not run here: {reason}") from fault


def attention_backends(device: torch.device | str) -> list[str]:
    """Lists the backends of diffusers that run on the device, without those that would be downloaded."""
    found = []
    for backend in AttentionBackendName:
        with contextlib.suppress(ValueError):
            try_attention(backend.value, device)
            found.append(backend.value)
    return found


def choose_attention(name: str, device: torch.device | str) -> None:
    """Sets the backend of all attention in this process. Raises ValueError if it does not run on the device."""
    if name not in {backend.value for backend in AttentionBackendName}:
        known = ", ".join(attention_backends(device))
        raise ValueError(f"there is no attention backend {name!r}; those that run here are {known}")
    try_attention(name, device)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName(name))


def shared_backend(device: str, ring_size: int) -> AttentionBackendName | None:
    """Returns the backend for sequences that ranks share, or None for the one chosen in diffusers. Raises ValueError if
    the chosen one cannot share."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    if ring_size > 1 and active == AttentionBackendName.NATIVE:
        if device == "cpu":
            raise ValueError("ring_size must be 1 on the CPU: its attention returns no log-sum-exp, which a ring needs")
        return AttentionBackendName._NATIVE_FLASH  # torch's own, too, and it returns the log-sum-exp
    if not _AttentionBackendRegistry._is_context_parallel_available(active):
        raise ValueError(f"attention backend {active.value} cannot share sequences between ranks; native and flash can")
    return None


def process_group(config) -> torch.distributed.ProcessGroup:
    """Returns the group of all ranks that share a sequence, of a diffusers.ContextParallelConfig that is set up."""
    return config._flattened_mesh.get_group()


def attend_exchanged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: torch.distributed.ProcessGroup, attend: Callable
) -> torch.Tensor:
    """Calls `attend(q, k, v)` with all tokens of the group for some of the heads. q, k, v and the result hold all heads
    of this rank's part of the tokens, [B, part, heads, head_dim]."""
    from diffusers.models.attention_dispatch import all_to_all_single_any_o_async, all_to_all_single_any_qkv_async

    part, heads = q.shape[1:3]
    q, k, v = (all_to_all_single_any_qkv_async(u, group)() for u in (q, k, v))
    return all_to_all_single_any_o_async(attend(q, k, v), group, NUM_QO_HEAD=heads, Q_S_LOCAL=part)()


def send_back(model: torch.nn.Module) -> None:
    """Offloads what is left on the device of a model with group offloading: by a call that failed, or the first block,
    which is fetched ahead, by one that called no block."""
    for module in model.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if hook := hooks and hooks.get_hook("group_offloading"):
            hook.group.offload_()
