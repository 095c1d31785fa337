from easydict import EasyDict

from .shared_config import wan_shared_cfg

ti2v_5B = EasyDict(wan_shared_cfg)
ti2v_5B.vae_checkpoint = "Wan2.2_VAE.pth"
ti2v_5B.sample_fps = 24
ti2v_5B.sample_shift = 5.0
ti2v_5B.sample_steps = 50
ti2v_5B.sample_guide_scale = 5.0
ti2v_5B.frame_num = 121
