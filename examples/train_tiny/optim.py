"""One optimizer for both trainings: Muon where a parameter is a matrix inside the network, AdamW for the rest."""

from collections.abc import Iterable

import torch


class MuonAdamW:
    """`torch.optim.Muon` for `matrices` (convolution kernels as [out, in * window]), `torch.optim.AdamW` for `others`.

    Both take the same learning rate: Muon's update is scaled to the RMS of an AdamW update ("match_rms_adamw").
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], others: Iterable[torch.nn.Parameter], betas):
        self.matrices = list(matrices)
        # Muon takes 2D parameters only, so kernels are handed to it as views of the same storage
        self.views = [torch.nn.Parameter(p.data.view(p.shape[0], -1)) for p in self.matrices]
        muon = torch.optim.Muon(self.views, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.optimizers = (muon, torch.optim.AdamW(others, lr=0.0, betas=betas, weight_decay=0.0))

    def step(self, lr: float) -> None:
        for view, p in zip(self.views, self.matrices, strict=True):
            view.grad = p.grad.view_as(view)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        for p in self.matrices:
            p.grad = None

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
