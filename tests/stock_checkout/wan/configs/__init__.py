"""The names that upstream's configs have, no more."""

import torch
from easydict import EasyDict

_shared = {
    "t5_dtype": torch.bfloat16,
    "text_len": 512,
    "param_dtype": torch.bfloat16,
    "num_train_timesteps": 1000,
    "sample_fps": 16,
    "sample_neg_prompt": "",
    "t5_checkpoint": "models_t5_umt5-xxl-enc-bf16.pth",
    "t5_tokenizer": "google/umt5-xxl",
    "vae_checkpoint": "Wan2.1_VAE.pth",
    "vae_stride": (4, 8, 8),
    "patch_size": (1, 2, 2),
}
_clip = {
    "clip_checkpoint": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "clip_tokenizer": "xlm-roberta-large",
}
_1_3B = EasyDict(_shared | {"dim": 1536, "num_heads": 12, "num_layers": 30})
_14B = EasyDict(_shared | {"dim": 5120, "num_heads": 40, "num_layers": 40})
_i2v = EasyDict(_14B | _clip)

WAN_CONFIGS = {
    "t2v-14B": _14B,
    "t2v-1.3B": _1_3B,
    "i2v-14B": _i2v,
    "t2i-14B": _14B,
    "flf2v-14B": _i2v,
    "vace-1.3B": _1_3B,
    "vace-14B": _14B,
}
SIZE_CONFIGS = {
    "720*1280": (720, 1280),
    "1280*720": (1280, 720),
    "480*832": (480, 832),
    "832*480": (832, 480),
    "1024*1024": (1024, 1024),
}
MAX_AREA_CONFIGS = {name: width * height for name, (width, height) in SIZE_CONFIGS.items() if width != height}
_small = ("480*832", "832*480")
SUPPORTED_SIZES = {task: _small if task.endswith("1.3B") else tuple(MAX_AREA_CONFIGS) for task in WAN_CONFIGS}
SUPPORTED_SIZES["t2i-14B"] = tuple(SIZE_CONFIGS)
