import torch
from easydict import EasyDict

wan_shared_cfg = EasyDict()
wan_shared_cfg.param_dtype = torch.bfloat16
wan_shared_cfg.num_train_timesteps = 1000
wan_shared_cfg.sample_fps = 16
wan_shared_cfg.sample_neg_prompt = ""
wan_shared_cfg.frame_num = 81
wan_shared_cfg.t5_checkpoint = "models_t5_umt5-xxl-enc-bf16.pth"
wan_shared_cfg.t5_tokenizer = "google/umt5-xxl"
wan_shared_cfg.vae_checkpoint = "Wan2.1_VAE.pth"
wan_shared_cfg.low_noise_checkpoint = "low_noise_model"
wan_shared_cfg.high_noise_checkpoint = "high_noise_model"
