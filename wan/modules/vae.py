"""The video VAE: diffusers' AutoencoderKLWan with weights in the official layout."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from wan.utils.checkpoints import load_pth, reading


def load_vae(vae_pth: str, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLWan:
    """Loads `Wan2.1_VAE.pth`; its width is read from the tensors. Raises DamagedFile if it is damaged, or tensors are
    missing, left over or of another shape."""
    tensors = load_pth(vae_pth, device)
    with reading(vae_pth):
        with torch.device("meta"):
            model = AutoencoderKLWan(base_dim=tensors["encoder.conv1.weight"].shape[0])
        state = {name: tensor.to(dtype) for name, tensor in convert_wan_vae_to_diffusers(tensors).items()}
        model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


class WanVAE:
    """Maps videos to normalised latents and back, 4x in time and 8x in height and width. Runs in `dtype`. Raises
    ValueError if the file has other than z_dim latent channels."""

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

    @torch.no_grad()
    def encode(self, videos: list[torch.Tensor]) -> list[torch.Tensor]:
        """videos: [3, F, H, W] in [-1, 1]. Returns float32 [16, 1 + (F - 1) // 4, H / 8, W / 8] each; frames beyond
        1 + 4 n are dropped."""
        with torch.autocast(torch.device(self.device).type, enabled=False):
            means = (self.model.encode(video[None].to(self.dtype)).latent_dist.mode() for video in videos)
            return [((mean - self.mean) * (1 / self.std)).float()[0] for mean in means]

    @torch.no_grad()
    def decode(self, zs: list[torch.Tensor]) -> list[torch.Tensor]:
        """zs: latents [16, f, h, w]. Returns float32 [3, 4 f - 3, 8 h, 8 w] in [-1, 1] each."""
        with torch.autocast(torch.device(self.device).type, enabled=False):
            latents = (z[None].to(self.dtype) / (1 / self.std) + self.mean for z in zs)
            return [self.model.decode(z, return_dict=False)[0].float().clamp(-1, 1)[0] for z in latents]
