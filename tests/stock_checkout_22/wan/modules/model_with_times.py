"""The transformer of Wan2.1, with a timestep for every token."""

from .model import WanModel as WanModelOf21


class WanModel(WanModelOf21):
    def embed(self, x, t, context, seq_len, clip_fea, y):
        if t.dim() == 1:
            t = t.expand(len(t), seq_len)
        return super().embed(x, t, context, seq_len, clip_fea, y)
