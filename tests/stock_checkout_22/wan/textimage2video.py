"""Upstream's pipelines, as in tests/stock_checkout."""

from pathlib import Path

import torch

from . import pipelines
from .distributed.sequence_parallel import sp_dit_forward
from .distributed.xdit_context_parallel import usp_attn_forward
from .modules.model_with_times import WanModel
from .pipelines import TOKENS, Pipeline


class Pipeline22(Pipeline):
    model_class = WanModel

    def __init__(
        self, config, checkpoint_dir, device_id=0, rank=0, t5_fsdp=False, dit_fsdp=False, use_sp=False, t5_cpu=False,
        init_on_cpu=True, convert_model_dtype=False,
    ):  # fmt: skip
        converted = {"use_sp": use_sp, "convert_model_dtype": convert_model_dtype}
        self.begin(config, device_id=device_id, rank=rank, **converted, experts=[])
        self.load_models(Path(checkpoint_dir), (usp_attn_forward, sp_dit_forward) if use_sp else None, dit_fsdp)


class TwoExperts(Pipeline22):
    def load_models(self, folder, *how):
        self.low_noise_model = self.load(folder, *how, subfolder=self.config.low_noise_checkpoint, seed=1)
        self.high_noise_model = self.load(folder, *how, subfolder=self.config.high_noise_checkpoint, seed=2)

    def expert(self, timestep, guide_scale):
        low, high = (guide_scale, guide_scale) if isinstance(guide_scale, float) else guide_scale
        is_high = timestep.item() >= self.config.boundary * self.config.num_train_timesteps
        self.record["experts"].append("high" if is_high else "low")
        return (self.high_noise_model, high) if is_high else (self.low_noise_model, low)


class WanT2V(TwoExperts):
    pass


class WanI2V(TwoExperts, pipelines.WanI2V):
    def arguments(self, img):
        return {"y": super().arguments(img)["y"]}


class WanTI2V(Pipeline22):
    shape, own = (48, 3, 4, 4), ("size", "max_area")

    def load_models(self, folder, *how):
        self.model = self.load(folder, *how)

    def arguments(self, img=None):
        """first: latent frame, which an image gives."""
        self.first = None
        if img is not None:
            generator = torch.Generator().manual_seed(sum(img.getpixel((0, 0))))
            self.first = torch.randn(48, 1, 4, 4, generator=generator)
        return {}

    def times(self, timestep):
        """Zero for the tokens of a given frame."""
        times = timestep.float().repeat(TOKENS)
        times[: 0 if self.first is None else 4] = 0
        return times.unsqueeze(0)

    def after_step(self, latent):
        return latent if self.first is None else torch.cat([self.first, latent[:, 1:]], dim=1)
