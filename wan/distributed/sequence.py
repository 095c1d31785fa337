"""Token sequences shared by the ranks of a group, on diffusers' context-parallel attention: Ulysses, ring, or both."""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.distributed.device_mesh import init_device_mesh

from wan.utils.attention import attend_exchanged, process_group, shared_backend


class SequenceParallel:
    """Splits sequences over ring_size * ulysses_size ranks, in order. Where a length does not divide evenly, the first
    ranks have one token more; nothing is padded, since most attention backends cannot take the mask for that.
    device: "cuda" or "cpu". groups: how many groups of this size there are. Raises ValueError if the attention backend
    chosen in diffusers cannot share sequences."""

    def __init__(self, device: str, groups: int, ring_size: int, ulysses_size: int):
        self.size, self.ulysses_size = ring_size * ulysses_size, ulysses_size
        self.backend = shared_backend(device, ring_size)
        shape = (groups, ring_size, ulysses_size)
        self.mesh = init_device_mesh(device, shape, mesh_dim_names=("group", "ring", "ulysses"))["ring", "ulysses"]
        self.even = self.parallel_config(ring_degree=ring_size, ulysses_degree=ulysses_size)
        self.exchange = None
        if ring_size == 1:
            self.uneven = self.parallel_config(ulysses_degree=ulysses_size, ulysses_anything=True)
        else:
            self.uneven = self.parallel_config(ring_degree=ring_size, ring_anything=True)
            if ulysses_size > 1:  # both together have no uneven mode: the ring runs within an exchange of heads
                self.exchange = self.mesh["ulysses"].get_group()
        self.group = process_group(self.even.context_parallel_config)
        self.rank = dist.get_rank(self.group)

    def parallel_config(self, **degrees) -> ParallelConfig:
        config = ParallelConfig(context_parallel_config=ContextParallelConfig(**degrees))
        config.setup(dist.get_rank(), self.size, torch.device(self.mesh.device_type), mesh=self.mesh)
        return config

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Copies this rank's part of x [B, L, ...] along L, so that the whole can be freed. Raises ValueError if
        there are fewer tokens than ranks."""
        if x.shape[1] < self.size:
            raise ValueError(f"{x.shape[1]} tokens cannot be shared by {self.size} ranks")
        return x.tensor_split(self.size, dim=1)[self.rank].clone()

    def gather(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """Joins the parts x [B, part, C] of all ranks to [B, length, C]."""
        parts = [length // self.size + (rank < length % self.size) for rank in range(self.size)]
        x = F.pad(x, (0, 0, 0, parts[0] - x.shape[1])).contiguous()  # equal sizes, which gloo needs
        gathered = [torch.empty_like(x) for _ in parts]
        dist.all_gather(gathered, x, group=self.group)
        return torch.cat([u[:, :part] for u, part in zip(gathered, parts, strict=True)], dim=1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
        """Attends with this rank's queries to the keys of all ranks. q, k, v: [B, part, heads, head_dim]. length: that
        of the whole sequence, in tokens."""
        even = length % self.size == 0
        config = self.even if even else self.uneven
        attend = functools.partial(dispatch_attention_fn, backend=self.backend, parallel_config=config)
        return attend(q, k, v) if even or not self.exchange else attend_exchanged(q, k, v, self.exchange, attend)
