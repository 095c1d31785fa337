"""The forwards that a model instance gets where several processes share the sequence, and its times."""

from .util import gather, own_part


def sp_attn_forward(self, x, seq_lens, grid_sizes, freqs):
    return self.o(self.attend(self.q(x), gather(self.k(x)), gather(self.v(x)), seq_lens))


def sp_dit_forward(self, x, t, context, seq_len, y=None):
    x, e, grid_sizes, kwargs = self.embed(x, t, context, seq_len, None, y)
    x, e, kwargs["e"] = map(own_part, (x, e, kwargs["e"]))
    for block in self.blocks:
        x = block(x, **kwargs)
    return self.unpatchify(gather(self.head(x, e)), grid_sizes)
