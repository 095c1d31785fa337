from easydict import EasyDict

from .shared_config import wan_shared_cfg

i2v_A14B = EasyDict(wan_shared_cfg)
i2v_A14B.sample_shift = 5.0
i2v_A14B.sample_steps = 40
i2v_A14B.boundary = 0.900
i2v_A14B.sample_guide_scale = (3.5, 3.5)
