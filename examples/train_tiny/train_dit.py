"""Trains the demo model's DiT together with its text encoder, on latents of the trained VAE.

python -m examples.train_tiny.train_dit --out DIR      (the DIR that train_vae wrote to)
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from examples.train_tiny.optim import MuonAdamW
from examples.train_tiny.shapes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, TRAINABLE, render
from examples.train_tiny.train_vae import BASE_DIM, whole_clip_resample
from wan.modules.model import WanModel

CLIPS = 4096
STEPS, BATCH = 3900, 32
PEAK_LR, WARMUP = 1.5e-3, 100
CAPTION_DROPOUT = 0.1
LOGIT_STD, SHIFT = 1.1, 3.0  # noise levels: logit-normal, then shifted towards noise as the sampler's are
EMA_DECAY = 0.995
TEXT_LEN = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the captions, any other word is <unk>."""
    words = [*COLORS, *BACKGROUNDS, *SHAPES, *DIRECTIONS, "a", "moves", "on", "background"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocab["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LEN
    )


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=vocab_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def make_dit() -> WanModel:
    dit = WanModel("t2v", TEXT_LEN, dim=192, ffn_dim=768, freq_dim=64, text_dim=64, num_heads=4, num_layers=8)
    for block in dit.blocks:  # residual branches start at zero
        for linear in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(dit.head.head.weight)
    return dit


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Clips [B, 3, 17, 64, 64] -> latent means [B, 16, 5, 8, 8]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return vae.quant_conv(vae.encoder(clips.to(memory_format=torch.channels_last_3d))).float()[:, :16]


def make_latents(vae: AutoencoderKLWan, generator: torch.Generator, rng: random.Random):
    """Draws and encodes CLIPS clips. Returns their captions and latent means."""
    captions = [rng.choice(TRAINABLE) for _ in range(CLIPS)]
    vae.encoder.compile()
    batches = tqdm(range(0, CLIPS, BATCH), desc="encode clips", mininterval=30)
    latents = [encode(vae, render(captions[start : start + BATCH], generator)) for start in batches]
    return [str(caption) for caption in captions], torch.cat(latents)


def normalise_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Gives every latent channel the mean and standard deviation that Wan's pipelines expect, inside the VAE's own
    1x1x1 convolutions, so that the fixed constants of Wan fit this VAE. Returns the normalised latents."""
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    wanted_mean, wanted_std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    gain = wanted_std / std
    quant, post = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        quant.weight[:16] *= gain[:, None, None, None, None]
        quant.bias[:16] = (quant.bias[:16] - mean) * gain + wanted_mean
        post.bias += post.weight[..., 0, 0, 0] @ (mean - wanted_mean / gain)
        post.weight /= gain[None, :, None, None, None]
    return (latents - mean[:, None, None, None]) / std[:, None, None, None]


def fit(
    trained: torch.nn.ModuleDict,
    predict: Callable[[list[int], list[torch.Tensor], torch.Tensor, list[torch.Tensor]], list[torch.Tensor]],
    captions: list[str],
    latents: torch.Tensor,
    steps: int,
    peak_lr: float,
    generator: torch.Generator,
    rng: random.Random,
    out: Path,
) -> None:
    """Flow matching of `trained`, which has a "text_encoder" and a "dit"; its moving average is written to `out`.

    predict(indices of the clips, noisy latents, timesteps [B], text features) returns the velocities.
    """
    average = deepcopy(trained)
    for block in trained["dit"].blocks:
        block.compile()
    matrices = [p for block in trained["dit"].blocks for p in block.parameters() if p.ndim == 2]
    others = [p for p in trained.parameters() if not any(p is matrix for matrix in matrices)]
    optimizer = MuonAdamW(matrices, others, betas=(0.9, 0.99))
    tokenizer, text_encoder = make_tokenizer(), trained["text_encoder"]
    start, losses = time.time(), []
    for step in range(steps):
        index = [rng.randrange(len(latents)) for _ in range(BATCH)]
        texts = ["" if rng.random() < CAPTION_DROPOUT else captions[i] for i in index]
        ids = tokenizer(texts, padding="max_length", max_length=TEXT_LEN, return_tensors="pt")
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        sigma = torch.sigmoid(LOGIT_STD * torch.randn(BATCH, generator=generator))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        clean, s = latents[index], sigma[:, None, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = text_encoder(ids.input_ids, ids.attention_mask).last_hidden_state
            context = [u[: int(m.sum())] for u, m in zip(features, ids.attention_mask, strict=True)]
            velocity = torch.stack(predict(index, list((1 - s) * clean + s * noise), 1000 * sigma, context))
        loss = (velocity - (noise - clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step(peak_lr * min((step + 1) / WARMUP, 1 - step / steps, 1))
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            for mean, p in zip(average.parameters(), trained.parameters(), strict=True):
                mean.lerp_(p, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"{step + 1}/{steps} {time.time() - start:.0f}s loss {recent:.4f}", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            assert math.isfinite(losses[-1]), "the training diverged"
            part = out.with_suffix(".part")
            torch.save(average.state_dict(), part)
            part.replace(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    torch.set_flush_denormal(True)
    WanResample.forward = whole_clip_resample
    vae = AutoencoderKLWan(base_dim=BASE_DIM)
    vae.load_state_dict(torch.load(args.out / "vae_training.pt", weights_only=True))
    start = time.time()
    captions, latents = make_latents(vae, generator, rng)
    latents = normalise_latents(vae, latents)
    torch.save(vae.state_dict(), args.out / "vae.pt")
    print(f"{CLIPS} latents in {time.time() - start:.0f} s", flush=True)

    dit, tokens = make_dit(), latents[0, 0].numel() // 4
    trained = torch.nn.ModuleDict({"text_encoder": make_text_encoder(len(make_tokenizer())), "dit": dit})

    def predict(index, noisy, timesteps, context):
        return dit(noisy, timesteps, context, tokens)

    fit(trained, predict, captions, latents, STEPS, PEAK_LR, generator, rng, args.out / "dit.pt")


if __name__ == "__main__":
    main()
