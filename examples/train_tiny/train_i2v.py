"""Turns the trained text-to-video demo model into an image-to-video one, `i2v-tiny`, by further training.

python -m examples.train_tiny.train_i2v --out DIR      (the DIR that train_vae and train_dit wrote to)

The model starts as the text-to-video one with one block less, so that the image's own keys and values fit into the same
file size. Everything new starts at zero, so that at first the image has no effect.
"""

import random

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from examples.train_tiny.shapes import TRAINABLE, render
from examples.train_tiny.train_dit import (
    BATCH,
    TEXT_LEN,
    Training,
    checksum,
    encode,
    latent_statistics,
    made_once,
    make_dit,
    make_parser,
    make_text_encoder,
    make_tokenizer,
)
from examples.train_tiny.train_vae import BASE_DIM, whole_clip_resample
from wan.modules.clip import preprocess
from wan.modules.model import WanModel

DROPPED_BLOCK = 4
IMAGE_SIZE, CLIP_WIDTH = 32, 64


def make_image_encoder() -> CLIPVisionModel:
    """Makes the part of the encoder that the pipeline runs; the file has one more block, see `wan.modules.clip`."""
    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config)


def make_i2v_dit() -> WanModel:
    return WanModel(
        "i2v", TEXT_LEN, in_dim=36, dim=192, ffn_dim=768, freq_dim=64, text_dim=64, num_heads=4, num_layers=7,
        clip_dim=CLIP_WIDTH,
    )  # fmt: skip


def continued(t2v: WanModel) -> WanModel:
    """Makes the i2v transformer that computes, for any image, what the t2v one computes without its DROPPED_BLOCK."""
    del t2v.blocks[DROPPED_BLOCK]
    i2v = make_i2v_dit()
    with torch.no_grad():
        new = i2v.load_state_dict(
            t2v.state_dict() | {"patch_embedding.weight": i2v.patch_embedding.weight}, strict=False
        )
        assert not new.unexpected_keys
        i2v.patch_embedding.weight.zero_()[:, :16] = t2v.patch_embedding.weight
        for block in i2v.blocks:
            block.cross_attn.v_img.weight.zero_()
            block.cross_attn.v_img.bias.zero_()
    return i2v


@torch.no_grad()
def make_clips(vae: AutoencoderKLWan, count: int, seed: int) -> tuple:
    """Draws and encodes clips. Returns their captions, normalised latents, the transformer's `y` of their first frames,
    and these frames as the image encoder sees them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    captions = [rng.choice(TRAINABLE) for _ in range(count)]
    vae.encoder.compile()
    mean, std = latent_statistics(vae)
    latents, conditions, pixels = [], [], []
    for first in tqdm(range(0, count, BATCH), desc="encode clips", mininterval=30):
        clips = render(captions[first : first + BATCH], generator)
        latents.append((encode(vae, clips) - mean) / std)
        pixels.append(preprocess(clips[:, :, 0], IMAGE_SIZE))
        clips[:, :, 1:] = 0
        conditions.append((encode(vae, clips) - mean) / std)
    latents, conditions = torch.cat(latents), torch.cat(conditions)
    known = torch.zeros(count, 4, *latents.shape[2:])
    known[:, :, 0] = 1
    return [str(c) for c in captions], latents, torch.cat([known, conditions], dim=1), torch.cat(pixels)


def main():
    args = make_parser(__doc__, clips=2048, steps=2000, peak_lr=1e-3, ema_decay=0.995, seed=1).parse_args()

    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    WanResample.forward = whole_clip_resample
    vae = AutoencoderKLWan(base_dim=BASE_DIM)
    vae.load_state_dict(torch.load(args.out / "vae.pt", weights_only=True))
    of = [args.clips, args.seed, checksum(vae)]
    made = made_once(args.out / "i2v_latents.pt", of, lambda: make_clips(vae, args.clips, args.seed))
    captions, latents, conditions, pixels = made

    t2v = torch.nn.ModuleDict({"text_encoder": make_text_encoder(len(make_tokenizer())), "dit": make_dit()})
    t2v.load_state_dict(torch.load(args.out / "dit.pt", weights_only=True))
    dit, image_encoder, tokens = continued(t2v["dit"]), make_image_encoder(), latents[0, 0].numel() // 4
    trained = torch.nn.ModuleDict({"text_encoder": t2v["text_encoder"], "dit": dit, "image_encoder": image_encoder})

    def predict(index, noisy, timesteps, context):
        features = image_encoder(pixels[index]).last_hidden_state
        return dit(noisy, timesteps, context, tokens, clip_fea=features, y=list(conditions[index]))

    Training(trained, predict, captions, latents, args, args.out / "i2v.pt").run()


if __name__ == "__main__":
    main()
