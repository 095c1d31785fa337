"""Weights sharded over the ranks of a group, on torch's FSDP2."""

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard_transformer(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype | None) -> None:
    """Shards a Wan transformer in place and moves it to the mesh's device. The linear layers of a block, nearly all
    its weights, are gathered before the block runs and freed after it, in param_dtype (None: as stored), to which
    autocast rounds them in any case. Everything else stays as stored, since modulation, norms, time embedding and head
    compute in float32. It stays gathered from the first forward on, so a call that runs no block gathers nothing."""
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, cast_forward_inputs=False)
    for block in (*model.blocks, *getattr(model, "vace_blocks", ())):
        linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
        fully_shard(linear, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def shard_text_encoder(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards transformers' UMT5 encoder in place, block by block, and moves it to the mesh's device."""
    for block in model.encoder.block:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
