"""Which ranks of a run under torchrun make a video together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from wan.distributed.sequence import SequenceParallel


@dataclass(frozen=True)
class Groups:
    """This rank's place: `rank` of `size` in its group, which is the `index`-th of `count`. mesh: the group's ranks,
    one-dimensional; None for a single process. sequence: how they share token sequences; None if every rank has all
    tokens."""

    rank: int = 0
    size: int = 1
    index: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None
    sequence: SequenceParallel | None = None


_groups = Groups()


def current_groups() -> Groups:
    """Returns what `start_groups` made, or a group of one if it was not called."""
    return _groups


def start_groups(ulysses_size: int = 1, ring_size: int = 1, fsdp: bool = False) -> Groups:
    """Divides the world into groups of ulysses_size * ring_size neighbouring ranks that share every token sequence.
    fsdp: the transformer or the text encoder will be sharded over the group. Without sequences to share, all ranks then
    form one group in which each computes the same. All ranks must call it once, after
    `torch.distributed.init_process_group`; without that there is one group of one. Raises ValueError if the world is
    not a multiple of the product or the attention backend cannot share sequences; ImportError if torch or diffusers are
    too old."""
    global _groups
    shared = ulysses_size * ring_size
    world = dist.get_world_size() if dist.is_initialized() else 1
    if min(ulysses_size, ring_size) < 1 or world % shared:
        raise ValueError(f"ulysses_size {ulysses_size} times ring_size {ring_size} does not divide {world} ranks")
    if world == 1:
        _groups = Groups()
        return _groups
    if fsdp:
        import wan.distributed.fsdp  # noqa: F401 (fails now rather than after loading)
    size = world if fsdp and shared == 1 else shared
    count, device = world // size, "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (count, size), mesh_dim_names=("group", "rank"))
    sequence = None
    if shared > 1:
        from wan.distributed.sequence import SequenceParallel  # needs a newer diffusers than the rest

        sequence = SequenceParallel(device, count, ring_size, ulysses_size)
    index, rank = divmod(dist.get_rank(), size)
    _groups = Groups(rank, size, index, count, mesh["rank"], sequence)
    return _groups
