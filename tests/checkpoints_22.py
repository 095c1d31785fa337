"""Tiny random checkpoints of Wan2.2 in the official layout."""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from golden_data import GOLDEN, read_tensors
from safetensors.torch import save_file

from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel

SIZES = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 48}
KINDS = {
    "t2v-A14B": {"model_type": "t2v"},
    "i2v-A14B": {"model_type": "i2v", "in_dim": 36, "clip_dim": 0},
    "ti2v-5B": {"model_type": "ti2v", "in_dim": 48, "out_dim": 48},
}
NOT_OFFICIAL = ("text_dim", "clip_dim", "clip_positions")  # entries of config.json


def write_checkpoint_22(task: str, target: Path) -> Path:
    """A complete official folder: the transformers, text encoder and tokenizer, VAE."""
    config = WAN_CONFIGS[task]
    folders = ("high_noise_model", "low_noise_model") if "boundary" in config else ("",)
    for seed, folder in enumerate(folders):
        write_transformer(target / folder, seed, **SIZES, **KINDS[task])
    t5 = read_tensors("pipelines/common/models_t5_umt5-xxl-enc-bf16.safetensors")
    vae = read_tensors("vae/Wan2.1_VAE.safetensors") if config.z_dim == 16 else vae_tensors()
    torch.save(t5, target / config.t5_checkpoint)
    torch.save(vae, target / config.vae_checkpoint)
    shutil.copytree(GOLDEN / "pipelines/common/tokenizer", target / config.t5_tokenizer)
    return target


def write_transformer(folder: Path, seed: int, **sizes) -> None:
    torch.manual_seed(seed)
    model = WanModel(**sizes)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + ("norm" in name and name.endswith("weight"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    own = {key: value for key, value in model.config.items() if key not in NOT_OFFICIAL and not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps(own))


def vae_tensors() -> dict[str, torch.Tensor]:
    """Of the 5B model's VAE, by the official names."""
    torch.manual_seed(0)
    sides = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "is_residual": True}
    sides |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    state = AutoencoderKLWan(base_dim=2, decoder_base_dim=2, z_dim=48, **sides).state_dict()
    outside = {name: name for name in read_tensors("vae/Wan2.1_VAE.safetensors") if "samples" not in name}
    official = convert_wan_vae_to_diffusers(outside)
    return {official.get(name) or in_stage(name): tensor for name, tensor in state.items()}


def in_stage(name: str) -> str:
    coder, way, stage, rest = re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d)\.(.+)", name).groups()
    if found := re.fullmatch(r"resnets\.(\d)\.(\w+)\.(\w+)", rest):
        number, layer, kind = found.groups()
        places = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
        rest = f"{number}.{places.get(layer, 'shortcut')}.{kind}"
    else:
        rest = rest.replace(f"{way}sampler", "2" if way == "down" else "3")
    return f"{coder}.{way}samples.{stage}.{way}samples.{rest}"
