"""Token sequences shared by the ranks of a group, on diffusers' context-parallel attention: Ulysses, ring, both."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    all_to_all_single_any_o_async,
    all_to_all_single_any_qkv_async,
    dispatch_attention_fn,
)
from torch.distributed.device_mesh import init_device_mesh


class SequenceParallel:
    """Splits sequences over ring_size * ulysses_size ranks, in order. Where a length does not divide evenly, the first
    ranks have one token more: nothing is padded, so nothing needs the mask that most attention backends cannot take.
    device: "cuda" or "cpu". groups: how many groups of this size there are. Raises ValueError if the attention backend
    chosen in diffusers cannot do it."""

    def __init__(self, device: str, groups: int, ring_size: int, ulysses_size: int):
        self.size, self.ulysses_size = ring_size * ulysses_size, ulysses_size
        self.backend = attention_backend(device, ring_size)
        shape = (groups, ring_size, ulysses_size)
        self.mesh = init_device_mesh(device, shape, mesh_dim_names=("group", "ring", "ulysses"))["ring", "ulysses"]
        self.even = self.parallel_config(ring_degree=ring_size, ulysses_degree=ulysses_size)
        self.exchange = None
        if ring_size == 1:
            self.uneven = self.parallel_config(ulysses_degree=ulysses_size, ulysses_anything=True)
        else:
            self.uneven = self.parallel_config(ring_degree=ring_size, ring_anything=True)
            if ulysses_size > 1:  # both have no uneven mode together: the ring's attention within an exchange of heads
                self.exchange = self.mesh["ulysses"].get_group()
        self.group = self.even.context_parallel_config._flattened_mesh.get_group()
        self.rank = dist.get_rank(self.group)

    def parallel_config(self, **degrees) -> ParallelConfig:
        config = ParallelConfig(context_parallel_config=ContextParallelConfig(**degrees))
        config.setup(dist.get_rank(), self.size, torch.device(self.mesh.device_type), mesh=self.mesh)
        return config

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of this rank's part of x [B, L, ...] along L, so that the whole can be freed. Raises ValueError if
        there are fewer tokens than ranks."""
        if x.shape[1] < self.size:
            raise ValueError(f"{x.shape[1]} tokens cannot be shared by {self.size} ranks")
        return x.tensor_split(self.size, dim=1)[self.rank].clone()

    def gather(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """The parts x [B, part, C] of all ranks as [B, length, C]."""
        parts = [length // self.size + (rank < length % self.size) for rank in range(self.size)]
        x = F.pad(x, (0, 0, 0, parts[0] - x.shape[1])).contiguous()  # equal sizes, which gloo needs
        gathered = [torch.empty_like(x) for _ in parts]
        dist.all_gather(gathered, x, group=self.group)
        return torch.cat([u[:, :part] for u, part in zip(gathered, parts, strict=True)], dim=1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
        """Attention of this rank's queries to the keys of all ranks, all [B, part, heads, head_dim], of a sequence of
        so many tokens."""
        if length % self.size == 0:
            return dispatch_attention_fn(q, k, v, backend=self.backend, parallel_config=self.even)
        if self.exchange is None:
            return dispatch_attention_fn(q, k, v, backend=self.backend, parallel_config=self.uneven)
        part, heads = q.shape[1:3]
        q, k, v = (all_to_all_single_any_qkv_async(u, self.exchange)() for u in (q, k, v))
        out = dispatch_attention_fn(q, k, v, backend=self.backend, parallel_config=self.uneven)
        return all_to_all_single_any_o_async(out, self.exchange, NUM_QO_HEAD=heads, Q_S_LOCAL=part)()


def attention_backend(device: str, ring_size: int) -> AttentionBackendName | None:
    """The backend for shared sequences, None for the one chosen in diffusers. Raises ValueError if that cannot."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    if ring_size > 1 and active == AttentionBackendName.NATIVE:
        if device == "cpu":
            raise ValueError("ring_size must be 1 on the CPU, whose attention does not return what a ring adds up")
        return AttentionBackendName._NATIVE_FLASH  # torch's own, too, which returns its log-sum-exp
    if not _AttentionBackendRegistry._is_context_parallel_available(active):
        raise ValueError(f"attention backend {active.value} cannot share sequences between ranks, native and flash can")
    return None
