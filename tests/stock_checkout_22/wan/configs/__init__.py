"""Names that upstream's configs have, no others."""

from .wan_i2v_A14B import i2v_A14B
from .wan_t2v_A14B import t2v_A14B
from .wan_ti2v_5B import ti2v_5B

WAN_CONFIGS = {"t2v-A14B": t2v_A14B, "i2v-A14B": i2v_A14B, "ti2v-5B": ti2v_5B, "animate-14B": None, "s2v-14B": None}
