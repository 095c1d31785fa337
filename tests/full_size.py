"""The full-size transformers, on fake tensors or the meta device."""

import torch

from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel

IMAGES = {"i2v": 1, "flf2v": 2}  # images that the image encoder sees
VACE_LAYERS = {"vace-1.3B": range(0, 30, 2), "vace-14B": range(0, 40, 5)}


def make_model(task):
    keys = ("text_len", "dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "eps")
    config = WAN_CONFIGS[task]
    sizes = {key: config[key] for key in keys}
    if task in VACE_LAYERS:
        return VaceWanModel(list(VACE_LAYERS[task]), 96, **sizes)
    kind = task.split("-")[0]
    image = {"clip_dim": 1280 if "clip_checkpoint" in config else 0, "clip_positions": 514 if kind == "flf2v" else 0}
    return WanModel(kind, in_dim=36 if kind in IMAGES else config.z_dim, out_dim=config.z_dim, **sizes, **image)


def conditioning(task, latent_shape):
    """Makes the arguments of the transformer other than latent, timestep and text."""
    if task in VACE_LAYERS:
        return {"vace_context": [torch.empty(96, *latent_shape[1:])]}
    count = IMAGES.get(task.split("-")[0])
    if not count:
        return {}
    return {"y": [torch.empty(20, *latent_shape[1:])], "clip_fea": torch.empty(count, 257, 1280)}
