"""What all Wan2.1 pipelines share: loading, text encoding, the denoise loop with guidance, decoding."""

import math
import os
import random
import sys
from contextlib import contextmanager

import torch
from tqdm import tqdm

from wan.modules.model import WanModel
from wan.modules.t5 import T5EncoderModel
from wan.modules.vae import WanVAE
from wan.utils.samplers import make_sampler


class WanPipeline:
    """Loads a checkpoint folder in the official layout.

    config: one of `wan.configs.WAN_CONFIGS`. checkpoint_dir: the folder. device_id: the CUDA device; without CUDA
    everything runs on the CPU in float32. t5_cpu: keeps the text encoder on the CPU, in `config.t5_dtype`.
    rank, t5_fsdp, dit_fsdp, use_usp are upstream's arguments for several GPUs; they raise NotImplementedError here.
    """

    model_class = WanModel

    def __init__(
        self,
        config,
        checkpoint_dir: str,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        t5_cpu: bool = False,
    ):
        if t5_fsdp or dit_fsdp or use_usp:
            raise NotImplementedError("this wan package runs on one device: no t5_fsdp, dit_fsdp, use_usp")
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{device_id}" if cuda else "cpu")
        self.config, self.rank, self.t5_cpu = config, rank, t5_cpu
        self.param_dtype = config.param_dtype
        self.sample_neg_prompt = config.sample_neg_prompt
        # the text encoder waits on the CPU and visits the GPU for every prompt, as the DiT needs the room
        self.text_encoder = T5EncoderModel(
            text_len=config.text_len,
            dtype=config.t5_dtype if cuda else torch.float32,
            device="cpu",
            checkpoint_path=os.path.join(checkpoint_dir, config.t5_checkpoint),
            tokenizer_path=os.path.join(checkpoint_dir, config.t5_tokenizer),
        )
        self.vae = WanVAE(vae_pth=os.path.join(checkpoint_dir, config.vae_checkpoint), device=self.device)
        self.model = self.model_class.from_pretrained(checkpoint_dir).eval().requires_grad_(False)

    def encode_text(self, prompt: str, n_prompt: str, offload_model: bool) -> tuple[list, list]:
        """Returns features of prompt and negative prompt, each a list of one [tokens, text_dim], on the device. An
        empty n_prompt stands for the config's."""
        texts = [prompt, n_prompt or self.sample_neg_prompt]
        device = torch.device("cpu") if self.t5_cpu else self.device
        self.text_encoder.model.to(device)
        features = [[u.to(self.device) for u in self.text_encoder(text, device)] for text in texts]
        if offload_model:
            self.text_encoder.model.cpu()
        return features[0], features[1]

    def latent_shape(self, size: tuple[int, int], frame_num: int) -> tuple[int, int, int, int]:
        """(16, f, h, w) of the latent of a video of size (width, height). Raises ValueError for sizes that the model
        cannot tile or frame counts other than 4 n + 1."""
        width, height = size
        frame_stride, *stride = self.config.vae_stride
        tile = [s * p for s, p in zip(stride, self.config.patch_size[1:], strict=True)]
        if height % tile[0] or width % tile[1]:
            raise ValueError(f"width and height must be multiples of {tile[1]} and {tile[0]}, got {width}*{height}")
        if frame_num < 1 or frame_num % frame_stride != 1:
            raise ValueError(f"frame_num must be {frame_stride}n+1, got {frame_num}")
        return 16, (frame_num - 1) // frame_stride + 1, height // stride[0], width // stride[1]

    def token_count(self, latent_shape: tuple[int, int, int, int]) -> int:
        return math.prod(latent_shape[1:]) // math.prod(self.config.patch_size)

    def noise(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """Float32 noise on the device; a negative seed is drawn at random."""
        seed = seed if seed >= 0 else random.randint(0, sys.maxsize)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    @contextmanager
    def inference(self):
        """No gradients; bfloat16 autocast on CUDA, plain float32 on the CPU."""
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, self.param_dtype, enabled=self.device.type == "cuda"),
        ):
            yield

    def denoise(
        self,
        latent: torch.Tensor,
        cond: dict,
        uncond: dict,
        *,
        sample_solver: str,
        sampling_steps: int,
        shift: float,
        guide_scale: float,
        offload_model: bool,
    ) -> torch.Tensor:
        """Runs the sampler from noise [16, f, h, w] to a latent; cond and uncond are the model's other arguments.

        Every step calls the model for cond, then for uncond, and steps along uncond + guide_scale (cond - uncond).
        """
        sampler = make_sampler(sample_solver, sampling_steps, shift, self.device, self.config.num_train_timesteps)
        self.model.to(self.device)
        with self.inference():
            for t in tqdm(sampler.timesteps, desc="denoise", unit="step", disable=self.rank != 0):
                velocity_cond = self.model([latent], t=t[None], **cond)[0]
                velocity_uncond = self.model([latent], t=t[None], **uncond)[0]
                velocity = velocity_uncond + guide_scale * (velocity_cond - velocity_uncond)
                latent = sampler.step(velocity[None], t, latent[None], return_dict=False)[0][0]
        if offload_model:
            self.model.cpu()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor | None:
        """Latent [16, f, h, w] -> video float32 [3, F, H, W] in [-1, 1] on rank 0, None on others."""
        return self.vae.decode([latent])[0] if self.rank == 0 else None
