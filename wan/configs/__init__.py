"""The numbers of every Wan2.1 model, of Wan2.2's A14B and 5B, of the sizes and of the demo models. Data only."""

import torch
from easydict import EasyDict

# The models were trained against these words; they are parameters, not prose, and must stay as they are.
_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
_NEGATIVE_I2V = "镜头晃动，" + _NEGATIVE
_NEGATIVE_FLF2V = "镜头切换，" + _NEGATIVE_I2V

_SHARED = {
    "t5_dtype": torch.bfloat16,
    "text_len": 512,
    "param_dtype": torch.bfloat16,
    "num_train_timesteps": 1000,
    "sample_fps": 16,
    "sample_neg_prompt": _NEGATIVE,
    "t5_checkpoint": "models_t5_umt5-xxl-enc-bf16.pth",
    "t5_tokenizer": "google/umt5-xxl",
    "vae_checkpoint": "Wan2.1_VAE.pth",
    "vae_stride": (4, 8, 8),
    "z_dim": 16,  # channels of the latents
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "eps": 1e-6,
}
_1_3B = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
_A14B = _14B | {
    "low_noise_checkpoint": "low_noise_model",
    "high_noise_checkpoint": "high_noise_model",
    "sample_steps": 40,
    "frame_num": 81,
}
_5B = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
_5B |= {"vae_checkpoint": "Wan2.2_VAE.pth", "vae_stride": (4, 16, 16), "z_dim": 48}
_5B |= {"sample_fps": 24, "sample_shift": 5.0, "sample_steps": 50, "sample_guide_scale": 5.0, "frame_num": 121}
_CLIP = {
    "clip_dtype": torch.float16,
    "clip_checkpoint": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "clip_tokenizer": "xlm-roberta-large",
    "clip_num_heads": 16,
}

_TINY = {
    "dim": 192,
    "ffn_dim": 768,
    "num_heads": 4,
    "freq_dim": 64,
    "text_len": 16,
    "sample_neg_prompt": "",  # what was trained for no prompt
}


def _config(name: str, *parts: dict, **values) -> EasyDict:
    merged = {"__name__": f"Config: {name}"} | _SHARED
    for part in parts:
        merged |= part
    return EasyDict(merged | values)


_t2v_14B = _config("Wan T2V 14B", _14B)
_t2v_1_3B = _config("Wan T2V 1.3B", _1_3B)

WAN_CONFIGS = {
    "t2v-14B": _t2v_14B,
    "t2v-1.3B": _t2v_1_3B,
    "i2v-14B": _config("Wan I2V 14B", _14B, _CLIP, sample_neg_prompt=_NEGATIVE_I2V),
    "t2i-14B": _t2v_14B,
    "flf2v-14B": _config("Wan FLF2V 14B", _14B, _CLIP, sample_neg_prompt=_NEGATIVE_FLF2V),
    "vace-1.3B": _t2v_1_3B,
    "vace-14B": _t2v_14B,
    # boundary: timesteps over 1000 from which on, downwards, the low-noise expert is called; guidance: low, high noise
    "t2v-A14B": _config("Wan T2V A14B", _A14B, sample_shift=12.0, boundary=0.875, sample_guide_scale=(3.0, 4.0)),
    "i2v-A14B": _config("Wan I2V A14B", _A14B, sample_shift=5.0, boundary=0.9, sample_guide_scale=(3.5, 3.5)),
    "ti2v-5B": _config("Wan TI2V 5B", _5B),
    # the demo models in examples/, see examples/train_tiny/README.md
    "t2v-tiny": _config("Wan T2V tiny", _TINY, num_layers=8),
    "i2v-tiny": _config("Wan I2V tiny", _TINY, _CLIP, num_layers=7, clip_num_heads=4),
}

_SIZES = ((720, 1280), (1280, 720), (480, 832), (832, 480), (704, 1280), (1280, 704), (1024, 1024), (64, 64))
SIZE_CONFIGS = {f"{width}*{height}": (width, height) for width, height in _SIZES}

_VIDEO_SIZES = ("720*1280", "1280*720", "480*832", "832*480")
SUPPORTED_SIZES = {
    **dict.fromkeys(("t2v-14B", "i2v-14B", "flf2v-14B", "vace-14B"), _VIDEO_SIZES),
    **dict.fromkeys(("t2v-1.3B", "vace-1.3B"), ("480*832", "832*480")),
    "t2i-14B": (*_VIDEO_SIZES, "1024*1024"),
    **dict.fromkeys(("t2v-A14B", "i2v-A14B"), _VIDEO_SIZES),
    "ti2v-5B": ("704*1280", "1280*704"),
    **dict.fromkeys(("t2v-tiny", "i2v-tiny"), ("64*64",)),
}
