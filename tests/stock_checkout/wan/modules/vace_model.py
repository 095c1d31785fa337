import torch
import torch.nn as nn

from .model import WanAttentionBlock, WanModel


class VaceWanAttentionBlock(WanAttentionBlock):
    def forward(self, c, x, **kwargs):
        return super().forward(c + x, **kwargs)


class BaseWanAttentionBlock(WanAttentionBlock):
    def forward(self, x, hints, context_scale=1.0, **kwargs):
        return super().forward(x, **kwargs) + hints[0] * context_scale


class VaceWanModel(WanModel):
    block_class = BaseWanAttentionBlock

    def __init__(self, dim=24, **kwargs):
        super().__init__(dim=dim, **kwargs)
        self.vace_blocks = nn.ModuleList([VaceWanAttentionBlock(dim)])
        self.vace_patch_embedding = nn.Conv3d(16, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))

    def forward_vace(self, x, vace_context, seq_len, kwargs):
        c = self.vace_patch_embedding(torch.stack(vace_context)).flatten(2).transpose(1, 2)
        return [block(c, x, **kwargs) for block in self.vace_blocks]

    def forward(self, x, t, vace_context, context, seq_len, vace_context_scale=1.0, clip_fea=None, y=None):
        x, e, grid_sizes, kwargs = self.embed(x, t, context, seq_len, clip_fea, y)
        hints = self.forward_vace(x, vace_context, seq_len, kwargs)
        kwargs |= {"hints": hints, "context_scale": vace_context_scale}
        for block in self.blocks:
            x = block(x, **kwargs)
        return self.unpatchify(self.head(x, e), grid_sizes)
