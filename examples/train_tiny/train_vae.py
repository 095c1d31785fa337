"""Trains the demo models' VAE, which is Wan2.1's at 1/8 of its width, and writes `vae_training.pt`.

python -m examples.train_tiny.train_vae --out DIR
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock

from examples.train_tiny.optim import MuonAdamW
from examples.train_tiny.shapes import TRAINABLE, render

BASE_DIM = 12
# (steps, batch, frames, crop): small crops teach the texture of an edge cheaply, whole clips the long caches
STAGES = ((1000, 16, 5, 32), (400, 8, 9, 64), (60, 6, 17, 64))
PEAK_LR, WARMUP = 2e-3, 30
KL_WEIGHT = 1e-4


def whole_clip_resample(self, x, feat_cache=None, feat_idx=None):
    """Does what `WanResample.forward` does, with the same numbers, in one pass over all frames: a third faster.

    The released VAE walks over the clip in chunks with caches to save memory. Its rules, written for a whole clip:
    the first frame is never resampled in time, and the temporal upsampling of the others does not see it.
    """
    if self.mode == "upsample3d" and x.shape[2] > 1:
        rest = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # two output frames per input frame
        rest = rest.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], rest], dim=2)
    frames = x.shape[2]
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


def near_identity(vae: AutoencoderKLWan) -> None:
    """Starts residual branches at zero, and resampling near plain pooling and repetition."""
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, WanResample) and module.mode != "none":
            conv = module.resample[1]
            eye = torch.eye(*conv.weight.shape[:2])
            with torch.no_grad():
                if "down" in module.mode:
                    conv.weight[:, :, :2, :2] += eye[..., None, None] / 4
                else:
                    conv.weight[:, :, 1, 1] += eye
                if module.mode == "downsample3d":
                    module.time_conv.weight[:, :, :, 0, 0] += eye[..., None] / 3
                elif module.mode == "upsample3d":
                    module.time_conv.weight[:, :, 2, 0, 0] += torch.eye(eye.shape[1]).repeat(2, 1)


def batch_of(batch: int, frames: int, crop: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
    clips = render(rng.choices(TRAINABLE, k=batch), generator)
    out = []
    for clip in clips:
        t, y, x = (rng.randint(0, full - part) for full, part in zip(clip.shape[1:], (frames, crop, crop), strict=True))
        out.append(clip[:, t : t + frames, y : y + crop, x : x + crop])
    return torch.stack(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    WanResample.forward = whole_clip_resample
    vae = AutoencoderKLWan(base_dim=BASE_DIM)
    near_identity(vae)
    kernels = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] > 3 and p.shape[1] > 3]
    others = [p for p in vae.parameters() if not any(p is kernel for kernel in kernels)]
    optimizer = MuonAdamW(kernels, others, betas=(0.9, 0.99))
    total, step, start = sum(stage[0] for stage in STAGES), 0, time.time()
    for steps, *shape in STAGES:
        for _ in range(steps):
            lr = PEAK_LR * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / total) + 1e-3)
            x = batch_of(*shape, rng, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                moments = vae.quant_conv(vae.encoder(x.to(memory_format=torch.channels_last_3d)))
                mean, logvar = moments.float().chunk(2, dim=1)
                logvar = logvar.clamp(-20, 10)
                z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
                y = vae.decoder(vae.post_quant_conv(z)).float()
            mse = F.mse_loss(y, x)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = mse + F.l1_loss(y, x) + KL_WEIGHT * kl
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step(lr)
            step += 1
            if step % 20 == 0:
                psnr = -10 * math.log10(mse.item() / 4)
                print(f"{step}/{total} {time.time() - start:.0f}s psnr {psnr:.2f} kl {kl.item():.2f}", flush=True)
            if step % 100 == 0 or step == total:
                torch.save(vae.state_dict(), args.out / "vae_training.pt")


if __name__ == "__main__":
    main()
