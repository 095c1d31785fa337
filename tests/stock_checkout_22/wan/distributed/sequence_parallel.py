"""The forwards that a model instance gets where several processes share the sequence, and its times."""

from .xdit_context_parallel import gather, own_part


def sp_dit_forward(self, x, t, context, seq_len, y=None):
    x, e, grid_sizes, kwargs = self.embed(x, t, context, seq_len, None, y)
    x, e, kwargs["e"] = map(own_part, (x, e, kwargs["e"]))
    for block in self.blocks:
        x = block(x, **kwargs)
    return self.unpatchify(gather(self.head(x, e)), grid_sizes)
