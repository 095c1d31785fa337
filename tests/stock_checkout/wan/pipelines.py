"""Upstream's pipelines without text and image encoder, and hardly a VAE: they have nothing to do with the cache."""

import types
import zlib
from itertools import pairwise
from pathlib import Path

import torch
import torch.cuda.amp as amp
from torch import distributed

from .distributed.fsdp import shard_model
from .modules.model import WanModel
from .modules.vace_model import VaceWanModel

SHAPE = (16, 3, 4, 4)  # of the latent, whatever video is asked for
TOKENS = 12
# arguments of every `generate`
DEFAULTS = {"frame_num": 81, "shift": 5.0, "sample_solver": "unipc", "sampling_steps": 50, "guide_scale": 5.0}
DEFAULTS |= {"n_prompt": "", "seed": -1, "offload_model": True}


class Vae:
    frames = 1

    def encode(self, videos):
        raise NotImplementedError

    def decode(self, latents):
        return [latent[:3, :1].repeat(1, self.frames, 8, 8).tanh() for latent in latents]


def usp_forwards():
    from .distributed.xdit_context_parallel import usp_attn_forward, usp_dit_forward

    return usp_attn_forward, usp_dit_forward


class Pipeline:
    """own: further arguments of `generate`."""

    model_class, shape, own = WanModel, SHAPE, ("size",)

    def __init__(
        self, config, checkpoint_dir, device_id=0, rank=0, t5_fsdp=False, dit_fsdp=False, use_usp=False, t5_cpu=False
    ):
        self.begin(config, device_id=device_id, rank=rank, use_usp=use_usp)
        self.model = self.load(Path(checkpoint_dir), usp_forwards() if use_usp else None, dit_fsdp)
        if use_usp:
            from xfuser.core.distributed import CALLS

            self.record["xfuser"] = CALLS

    def begin(self, config, **record):
        self.record = {"calls": []} | record
        self.device, self.rank, self.config, self.vae = torch.device("cpu"), record["rank"], config, Vae()

    def load(self, folder, shared_forwards, dit_fsdp, subfolder="", seed=0):
        torch.manual_seed(seed)
        model = self.model_class.from_pretrained(folder, subfolder=subfolder).eval().requires_grad_(False)
        for module in model.modules():
            if "AttentionBlock" in type(module).__name__:
                module.register_forward_hook(self.count)
        if shared_forwards:
            of_attention, of_model = shared_forwards
            for block in model.blocks:
                block.self_attn.forward = types.MethodType(of_attention, block.self_attn)
            model.forward = types.MethodType(of_model, model)
        if distributed.is_initialized():
            distributed.barrier()
        return shard_model(model, self.device) if dit_fsdp else model

    def count(self, *_):
        self.record["calls"][-1] += 1

    def expert(self, timestep, guide_scale):
        """The model of a step, and its guidance."""
        return self.model, guide_scale

    def times(self, timestep):
        return timestep

    def after_step(self, latent):
        return latent

    def arguments(self):
        """Of the model, by the inputs."""
        return {}

    def generate(self, input_prompt, *inputs, **given):
        assert given.keys() <= DEFAULTS.keys() | {*self.own}
        settings, arguments = DEFAULTS | given, self.arguments(*inputs)
        self.record |= settings | {"prompt": input_prompt}
        steps, shift = settings["sampling_steps"], settings["shift"]
        generator = torch.Generator().manual_seed(settings["seed"])
        latent = self.after_step(torch.randn(self.shape, generator=generator))
        contexts = [
            torch.randn(4, 8, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))
            for text in (input_prompt, self.config.sample_neg_prompt)
        ]
        sigmas = torch.linspace(0.999, 0, steps + 1)
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        with amp.autocast(dtype=self.config.param_dtype), torch.no_grad():
            for sigma, following in pairwise(sigmas):
                timestep = torch.stack([(sigma * 1000).long()])
                model, scale = self.expert(timestep, settings["guide_scale"])
                velocities = []
                for context in contexts:
                    self.record["calls"].append(0)
                    call = {"context": [context], "seq_len": TOKENS} | arguments
                    velocities.append(model([latent], t=self.times(timestep), **call)[0])
                cond, uncond = velocities
                latent = self.after_step(latent + (following - sigma) * (uncond + scale * (cond - uncond)))
        if distributed.is_initialized():
            distributed.barrier()
        self.record["latent"] = latent
        torch.save(self.record, f"record.{distributed.get_rank() if distributed.is_initialized() else 0}.pt")
        self.vae.frames = settings["frame_num"]
        return self.vae.decode([latent])[0] if self.rank == 0 else None


class WanT2V(Pipeline):
    pass


def image_arguments(*images):
    colour = sum(sum(image.getpixel((0, 0))) for image in images)
    generator = torch.Generator().manual_seed(colour)
    y = torch.randn(20, *SHAPE[1:], generator=generator)
    return {"clip_fea": torch.randn(1, 5, 8, generator=generator), "y": [y]}


class WanI2V(Pipeline):
    own = ("max_area",)

    def arguments(self, img):
        return image_arguments(img)


class WanFLF2V(WanI2V):
    def arguments(self, first_frame, last_frame):
        return image_arguments(first_frame, last_frame)


class WanVace(Pipeline):
    model_class = VaceWanModel

    def prepare_source(self, src_video, src_mask, src_ref_images, num_frames, image_size, device):
        self.record["sources"] = (src_video, src_mask, src_ref_images, num_frames, image_size)
        frames = [torch.full(SHAPE, 0.5, device=device)]
        return frames, [torch.ones(SHAPE, device=device)], src_ref_images

    def arguments(self, input_frames, input_masks, input_ref_images):
        return {"vace_context": [input_frames[0] * input_masks[0]], "vace_context_scale": 1.0}
