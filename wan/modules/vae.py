"""The video VAEs of Wan2.1 and Wan2.2's 5B: diffusers' AutoencoderKLWan with weights in the official layout."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from wan.utils.checkpoints import load_pth, reading

# of the latents of Wan2.2's VAE, by channel
MEAN_48 = """
-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098
0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567
-0.0729 0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957
0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667
"""
STD_48 = """
0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454
0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999
0.6866 0.4093 0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444
0.4089 0.7468 0.7744
"""
CHANNELS_48 = {"in_channels": 12, "out_channels": 12, "z_dim": 48, "patch_size": 2, "scale_factor_spatial": 16}
CHANNELS_48 |= {"is_residual": True}

# of a layer in a stage of Wan2.2's VAE: encoder or decoder, down or up, the numbers of both, the rest of the name
IN_STAGE = re.compile(r"(en|de)coder\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.(.+)\.(\w+)")
LAYERS = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
LAYERS |= {"shortcut": "conv_shortcut"}


def in_diffusers(name: str) -> str:
    """The name that diffusers has for a tensor of a stage of Wan2.2's VAE, which its converter does not know."""
    found = IN_STAGE.fullmatch(name)
    if not found:
        return name
    coder, way, stage, number, layer, kind = found.groups()
    resnet = f"resnets.{number}.{LAYERS[layer]}" if layer in LAYERS else f"{way}sampler.{layer}"
    return f"{coder}coder.{way}_blocks.{stage}.{resnet}.{kind}"


def load_vae(vae_pth: str, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLWan:
    """Loads `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`; its widths are read from the tensors. Raises DamagedFile if it is
    damaged, or tensors are missing, left over or of another shape."""
    tensors = load_pth(vae_pth, device)
    with reading(vae_pth):
        settings = {"base_dim": tensors["encoder.conv1.weight"].shape[0]}
        if any(map(IN_STAGE.fullmatch, tensors)):
            mean, std = ([*map(float, values.split())] for values in (MEAN_48, STD_48))
            settings |= CHANNELS_48 | {"latents_mean": mean, "latents_std": std}
            settings["decoder_base_dim"] = tensors["decoder.conv1.weight"].shape[0] // 4  # the widest of its stages
            tensors = {in_diffusers(name): tensor for name, tensor in tensors.items()}
        with torch.device("meta"):
            model = AutoencoderKLWan(**settings)
        state = {name: tensor.to(dtype) for name, tensor in convert_wan_vae_to_diffusers(tensors).items()}
        model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


class WanVAE:
    """Maps videos to normalised latents and back, 4x in time and 8x in height and width, with 48 channels (Wan2.2's 5B)
    16x. Runs in `dtype`. Raises ValueError if the file has other than z_dim latent channels."""

    def __init__(
        self,
        z_dim: int = 16,
        vae_pth: str = "Wan2.1_VAE.pth",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.dtype, self.device = dtype, device
        self.model = load_vae(vae_pth, dtype, device)
        if self.model.config.z_dim != z_dim:
            raise ValueError(f"{vae_pth} has {self.model.config.z_dim} latent channels, not {z_dim}")
        config = self.model.config
        self.mean, self.std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Computes without autocast, and drops the features of neighbouring frames, gigabytes, after a failure, too."""
        try:
            with torch.autocast(torch.device(self.device).type, enabled=False):
                yield
        finally:
            self.model.clear_cache()

    @torch.no_grad()
    def encode(self, videos: list[torch.Tensor]) -> list[torch.Tensor]:
        """videos: [3, F, H, W] in [-1, 1]. Returns float32 [z_dim, 1 + (F - 1) // 4, H / 8, W / 8] each, or
        / 16; frames beyond 1 + 4 n are dropped."""
        with self.working():
            means = (self.model.encode(video[None].to(self.dtype)).latent_dist.mode() for video in videos)
            return [((mean - self.mean) * (1 / self.std)).float()[0] for mean in means]

    @torch.no_grad()
    def decode(self, zs: list[torch.Tensor]) -> list[torch.Tensor]:
        """zs: latents [z_dim, f, h, w]. Returns float32 [3, 4 f - 3, 8 h, 8 w] in [-1, 1] each, or 16 h, 16 w."""
        with self.working():
            latents = (z[None].to(self.dtype) / (1 / self.std) + self.mean for z in zs)
            return [self.model.decode(z, return_dict=False)[0].float().clamp(-1, 1)[0] for z in latents]
