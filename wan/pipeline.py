"""What all Wan pipelines share: loading, text encoding, the denoise loop with guidance, decoding."""

import gc
import itertools
import math
import os
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from wan.distributed.groups import Groups, current_groups
from wan.modules.model import WanModel
from wan.modules.t5 import T5EncoderModel
from wan.modules.vae import WanVAE
from wan.utils.offload import offload_text_encoder, offload_transformer, on_device
from wan.utils.samplers import make_sampler


@dataclass(frozen=True)
class Denoising:
    """How the noise becomes a latent; see `wan.text2video.WanT2V.generate`."""

    solver: str
    steps: int
    shift: float
    guide_scale: float | tuple[float, float]  # a pair for the steps of low and of high noise
    offload_model: bool


class WanPipeline:
    """Loads a checkpoint folder in the official layout. Set `keeps_models` to False before the last `generate`, and the
    encoders and the transformer are freed as soon as they are done.

    config: one of `wan.configs.WAN_CONFIGS`. checkpoint_dir: the folder. device_id: the CUDA device; without CUDA
    everything runs on the CPU in float32. t5_cpu: keeps the text encoder on the CPU, in `config.t5_dtype`. init_on_cpu
    is upstream's and changes nothing: the transformer is always loaded to the CPU.

    dit_dtype: of the weights of the linear layers in the transformer's blocks; all others stay float32. torch.float32,
    torch.bfloat16 or torch.float8_e4m3fn; with the latter two it runs under bfloat16 autocast on the CPU, too. None:
    float32 on the CPU and with dit_fsdp, which rounds by itself; else bfloat16, to which autocast rounds in any case.
    offload_blocks: the transformer is on the GPU block by block, and the text encoder leaf by leaf; else as a whole, as
    offload_model says. compile: the transformer's blocks, by torch.compile.
    vae_tiling: the VAE works in tiles.

    Several processes make a video together after `wan.distributed.groups.start_groups`: rank: this one's in its group,
    of which the first decodes. use_usp: they share the tokens. dit_fsdp, t5_fsdp: they share the weights of transformer
    and text encoder, which then stay on the GPU, whatever offload_model and t5_cpu say. All must call `generate` with
    the same arguments. RuntimeError without such groups.
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
        init_on_cpu: bool = True,
        *,
        dit_dtype: torch.dtype | None = None,
        offload_blocks: bool = False,
        compile: bool = False,
        vae_tiling: bool = False,
    ):
        groups = current_groups()
        if (use_usp and not groups.sequence) or ((t5_fsdp or dit_fsdp) and not groups.mesh):
            raise RuntimeError("use_usp, t5_fsdp and dit_fsdp need wan.distributed.groups.start_groups before")
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{device_id}" if cuda else "cpu")
        self.config, self.rank, self.t5_cpu = config, rank, t5_cpu
        self.t5_fsdp, self.dit_fsdp, self.offload_blocks = t5_fsdp, dit_fsdp, offload_blocks
        self.dit_dtype = dit_dtype or (torch.bfloat16 if cuda and not dit_fsdp else torch.float32)
        self.keeps_models = True
        self.load_text_encoder(checkpoint_dir, groups)
        self.vae = WanVAE(config.z_dim, os.path.join(checkpoint_dir, config.vae_checkpoint), device=self.device)
        if vae_tiling:
            self.vae.model.enable_tiling()
        if "boundary" in config:
            names = config.high_noise_checkpoint, config.low_noise_checkpoint
            paths = (os.path.join(checkpoint_dir, name) for name in names)
            experts = [self.load_transformer(path, groups, use_usp, compile) for path in paths]
            self.high_noise_model, self.low_noise_model = experts
        else:
            self.model = self.load_transformer(checkpoint_dir, groups, use_usp, compile)
        self.load_image_encoder(checkpoint_dir)

    def load_text_encoder(self, checkpoint_dir: str, groups: Groups) -> None:
        """Loads the text encoder. Unless it is sharded or comes leaf by leaf, it waits on the CPU and visits the GPU
        for every prompt, since the transformer needs the room."""
        config, cuda = self.config, self.device.type == "cuda"
        paths = [os.path.join(checkpoint_dir, name) for name in (config.t5_checkpoint, config.t5_tokenizer)]
        self.text_encoder = T5EncoderModel(config.text_len, config.t5_dtype if cuda else torch.float32, "cpu", *paths)
        if self.t5_fsdp:
            from wan.distributed.fsdp import shard_text_encoder

            shard_text_encoder(self.text_encoder.model, groups.mesh)
        elif self.offload_blocks and not self.t5_cpu:
            offload_text_encoder(self.text_encoder.model, self.device)

    def load_transformer(self, folder: str, groups: Groups, use_usp: bool, compile: bool) -> WanModel:
        model = self.model_class.from_pretrained(folder, torch_dtype=self.dit_dtype)
        model.requires_grad_(False)
        if use_usp:
            model.share_sequences(groups.sequence)
        if compile:
            model.compile_repeated_blocks()
        if self.offload_blocks:
            offload_transformer(model, self.device)
        if self.dit_fsdp:
            from wan.distributed.fsdp import shard_transformer

            shard_transformer(model, groups.mesh, self.config.param_dtype if self.device.type == "cuda" else None)
        return model

    @property
    def transformers(self) -> list[WanModel]:
        """The transformers as a run calls them: the only one, or those for high and for low noise."""
        return [self.high_noise_model, self.low_noise_model] if "boundary" in self.config else [self.model]

    def load_image_encoder(self, checkpoint_dir: str) -> None:
        """Does nothing for tasks without images."""

    def afterwards(self, offload_model: bool) -> str | None:
        """Says where a model goes when it is done; see `on_device`."""
        if not self.keeps_models:
            return "meta"
        return "cpu" if offload_model else None

    def encode_text(
        self, prompt: str, n_prompt: str, offload_model: bool, guide_scale: float | tuple[float, float] = 5.0
    ) -> tuple[list, list]:
        """Returns features of prompt and negative prompt, each a list of one [tokens, text_dim], on the device. An
        empty n_prompt stands for the config's. Where no step is guided (a guide_scale of 1) the negative prompt is not
        needed: the prompt's features take its place."""
        texts = [prompt] if guide_scale in (1, (1, 1)) else [prompt, n_prompt or self.config.sample_neg_prompt]
        device = torch.device("cpu") if self.t5_cpu and not self.t5_fsdp else self.device
        visits = None if self.t5_fsdp or self.offload_blocks else device
        with on_device(self.text_encoder.model, visits, self.afterwards(offload_model)):
            features = [[u.to(self.device) for u in self.text_encoder(text, device)] for text in texts]
        if not self.keeps_models:
            self.text_encoder = None
            if self.t5_fsdp:  # which refers to it in circles
                gc.collect()
                torch.cuda.empty_cache()
        return features[0], features[-1]

    def latent_shape(self, size: tuple[int, int], frame_num: int) -> tuple[int, int, int, int]:
        """Returns the shape (z_dim, f, h, w) of the latent of a video of size (width, height). Raises ValueError for
        sizes that the model cannot tile or frame counts other than 4 n + 1."""
        width, height = size
        frame_stride, *stride = self.config.vae_stride
        tile = [s * p for s, p in zip(stride, self.config.patch_size[1:], strict=True)]
        if height % tile[0] or width % tile[1]:
            raise ValueError(f"width and height must be multiples of {tile[1]} and {tile[0]}, got {width}*{height}")
        if frame_num < 1 or frame_num % frame_stride != 1:
            raise ValueError(f"frame_num must be {frame_stride}n+1, got {frame_num}")
        return self.config.z_dim, (frame_num - 1) // frame_stride + 1, height // stride[0], width // stride[1]

    def token_count(self, latent_shape: tuple[int, int, int, int]) -> int:
        return math.prod(latent_shape[1:]) // math.prod(self.config.patch_size)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Returns an image as float32 [3, H, W] in [-1, 1] on the device."""
        return torch.from_numpy(np.array(image.convert("RGB"))).to(self.device).permute(2, 0, 1).float() / 127.5 - 1

    def noise(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """Draws float32 noise on the device. For a negative seed the first rank of a group draws one for all."""
        if seed < 0:
            seed, groups = random.randint(0, sys.maxsize), current_groups()
            if groups.size > 1:
                group, box = groups.mesh.get_group(), [seed]
                dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
                seed = box[0]
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    @contextmanager
    def inference(self):
        """Computes without gradients, in bfloat16 autocast on CUDA and where weights are rounded, else in float32."""
        autocasts = self.device.type == "cuda" or self.dit_dtype != torch.float32
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, self.config.param_dtype, enabled=autocasts):
                yield
        except BaseException:
            for model in self.transformers:
                if hasattr(model, "reset_iter_state"):  # FSDP's, for the next video
                    model.reset_iter_state()
            raise
        finally:
            for model in self.transformers:
                if hasattr(model, "forget_rotations"):  # the GPU's memory for them
                    model.forget_rotations()

    def denoise(
        self,
        latent: torch.Tensor,
        contexts: tuple[list, list],
        given: dict,
        how: Denoising,
        first: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the sampler from noise [z_dim, f, h, w] to a latent. contexts: of prompt and negative prompt, as
        `encode_text` returns them; given: the model's other arguments. first: latent [z_dim, 1, h, w] of a given first
        frame, which takes that place in every step; its tokens have the timestep 0.

        Every step calls the model for cond, then for uncond, and steps along uncond + guide_scale (cond - uncond); at a
        guide_scale of 1 it calls it for cond alone.
        """
        sampler = make_sampler(how.solver, how.steps, how.shift, self.device, self.config.num_train_timesteps)
        cond, uncond = ({"context": context} | given for context in contexts)

        def with_first(latent: torch.Tensor) -> torch.Tensor:
            return latent if first is None else torch.cat([first, latent[:, 1:]], dim=1)

        latent = with_first(latent)
        visits = None if self.dit_fsdp or self.offload_blocks else self.device
        boundary = self.config.get("boundary", 0) * self.config.num_train_timesteps
        scales = how.guide_scale if isinstance(how.guide_scale, tuple) else (how.guide_scale,)
        steps = tqdm(sampler.timesteps, desc="denoise", unit="step", disable=self.rank != 0)
        for high, timesteps in itertools.groupby(steps, lambda t: bool(t >= boundary)):
            model, scale = self.transformers[0 if high else -1], scales[-1 if high else 0]
            with on_device(model, visits, self.afterwards(how.offload_model)), self.inference():
                for t in timesteps:
                    times = t[None] if first is None else token_times(t, given["seq_len"], latent.shape[1])
                    velocity = model([latent], t=times, **cond)[0]
                    if scale != 1:
                        velocity_uncond = model([latent], t=times, **uncond)[0]
                        velocity = velocity_uncond + scale * (velocity - velocity_uncond)
                    latent = with_first(sampler.step(velocity[None], t, latent[None], return_dict=False)[0][0])
        return latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor | None:
        """Decodes a latent [z_dim, f, h, w] to a video, float32 [3, F, H, W] in [-1, 1]; None but on rank 0."""
        return self.vae.decode([latent])[0] if self.rank == 0 else None


def token_times(t: torch.Tensor, tokens: int, frames: int) -> torch.Tensor:
    """Returns the timestep t, [], for each of the tokens of so many frames, but 0 for the first: [1, tokens]."""
    times = t.repeat(tokens)
    times[: tokens // frames] = 0
    return times[None]
