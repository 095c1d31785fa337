from easydict import EasyDict

from .shared_config import wan_shared_cfg

t2v_A14B = EasyDict(wan_shared_cfg)
t2v_A14B.sample_shift = 12.0
t2v_A14B.sample_steps = 40
t2v_A14B.boundary = 0.875
t2v_A14B.sample_guide_scale = (3.0, 4.0)
