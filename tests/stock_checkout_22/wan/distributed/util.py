from torch import distributed


def init_distributed_group():
    if not distributed.is_initialized():
        distributed.init_process_group(backend="nccl")
