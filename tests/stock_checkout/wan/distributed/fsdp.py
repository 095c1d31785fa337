from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy


def shard_model(model, device_id):
    """Wraps the root and every block."""

    def policy(module, recurse, **kwargs):
        return lambda_auto_wrap_policy(module, recurse, lambda_fn=lambda m: m in model.blocks, **kwargs)

    return FSDP(model, auto_wrap_policy=policy, device_id=device_id)
