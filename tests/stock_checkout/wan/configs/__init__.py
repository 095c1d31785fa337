"""Names that upstream's configs have, no others."""

import torch
from easydict import EasyDict

_text = EasyDict(
    param_dtype=torch.bfloat16,
    sample_fps=16,
    sample_neg_prompt="",
    t5_checkpoint="models_t5_umt5-xxl-enc-bf16.pth",
    t5_tokenizer="google/umt5-xxl",
    vae_checkpoint="Wan2.1_VAE.pth",
)
_images = EasyDict(
    _text,
    clip_checkpoint="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    clip_tokenizer="xlm-roberta-large",
)
WAN_CONFIGS = dict.fromkeys(("t2v-14B", "t2v-1.3B", "t2i-14B", "vace-1.3B", "vace-14B"), _text)
WAN_CONFIGS |= dict.fromkeys(("i2v-14B", "flf2v-14B"), _images)
