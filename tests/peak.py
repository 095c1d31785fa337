"""Measures how much memory tensors take, fake tensors included."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """`bytes`: the most that tensors made within the block held at any time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.bytes = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.held:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.bytes = max(self.bytes, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key: int) -> None:
        self.now -= self.held.pop(key)
