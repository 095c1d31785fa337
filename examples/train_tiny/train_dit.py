"""Trains the demo model's DiT together with its text encoder, on latents of the trained VAE.

python -m examples.train_tiny.train_dit --out DIR      (the DIR that train_vae wrote to)
python -m examples.train_tiny.train_dit --out DIR --resume examples/Wan2.1-T2V-tiny      (trains that model further)
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from examples.train_tiny.check_prompts import see
from examples.train_tiny.optim import MuonAdamW
from examples.train_tiny.own_videos import corrected
from examples.train_tiny.shapes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, TRAINABLE, WIDE, Caption, opened, render
from examples.train_tiny.train_vae import BASE_DIM, whole_clip_resample
from magcache.files import written_whole
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.t5 import load_encoder
from wan.modules.vae import load_vae
from wan.utils.samplers import make_sampler

BATCH, WARMUP = 32, 100
CAPTION_DROPOUT = 0.1
LOGIT_STD, SHIFT = 1.1, 3.0  # noise levels: logit-normal, then shifted towards noise as the sampler's are
TEXT_LEN = 16
OWN_STEPS, OWN_SHIFT, OWN_GUIDANCE = 20, 5.0, 5.0  # of the model's own videos
CHECKPOINT_STEPS = 250


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token per word of the captions; any other word is <unk>."""
    words = [*COLORS, *BACKGROUNDS, *SHAPES, *DIRECTIONS, "a", "moves", "on", "background", "something"]
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


def text_features(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, texts: list[str]) -> list:
    """Returns the features [tokens, 64] of every text."""
    ids = tokenizer(texts, padding="max_length", max_length=TEXT_LEN, return_tensors="pt")
    features = encoder(ids.input_ids, ids.attention_mask).last_hidden_state
    return [u[: int(m.sum())] for u, m in zip(features, ids.attention_mask, strict=True)]


def make_dit() -> WanModel:
    dit = WanModel("t2v", TEXT_LEN, dim=192, ffn_dim=768, freq_dim=64, text_dim=64, num_heads=4, num_layers=8)
    for block in dit.blocks:  # residual branches start at zero
        for linear in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(dit.head.head.weight)
    return dit


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Encodes clips [B, 3, 17, 64, 64] as latent means [B, 16, 5, 8, 8]."""
    return vae.quant_conv(vae.encoder(clips.to(memory_format=torch.channels_last_3d)))[:, :16]


def choose_captions(count: int, rng: random.Random, share_open: float) -> tuple[list[Caption], list[Caption]]:
    """Returns what to draw and the captions for it; a share of these leaves one or more parts open."""
    drawn = [rng.choice(TRAINABLE) for _ in range(count)]
    return drawn, [opened(caption, rng) if rng.random() < share_open else caption for caption in drawn]


def make_latents(vae: AutoencoderKLWan, clips: int, seed: int, share_open: float) -> tuple[list[str], torch.Tensor]:
    """Draws and encodes clips, in the wider world if captions may be open. Returns captions and latent means."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    drawn, said = choose_captions(clips, rng, share_open)
    batches = tqdm(range(0, clips, BATCH), desc="encode clips", mininterval=30)
    world = WIDE if share_open else {}
    latents = [encode(vae, render(drawn[start : start + BATCH], generator, **world)) for start in batches]
    return [str(caption) for caption in said], torch.cat(latents)


@torch.no_grad()
def make_own(
    trained: torch.nn.ModuleDict, vae: AutoencoderKLWan, count: int, seed: int, share_open: float = 0.0
) -> tuple:
    """Lets the model in training make `count` videos, rounded up to whole batches. Returns, for those that can be
    corrected, the captions, the normalised latents [n, 16, 5, 8, 8], and those of the `corrected` videos, in which all
    that the caption leaves open is as the model made it."""
    rng, generator, tokenizer = random.Random(seed), torch.Generator().manual_seed(seed), make_tokenizer()
    mean, std = latent_statistics(vae)
    captions, made, wanted = [], [], []
    for _ in tqdm(range(0, count, BATCH // 2), desc="own videos", mininterval=30):
        _, batch = choose_captions(BATCH // 2, rng, share_open)
        context = text_features(tokenizer, trained["text_encoder"], [str(c) for c in batch] + [""] * len(batch))
        sampler = make_sampler("unipc", OWN_STEPS, OWN_SHIFT)
        latents = torch.randn(len(batch), 16, 5, 8, 8, generator=generator)
        for t in sampler.timesteps:
            both = trained["dit"]([*latents, *latents], t.expand(2 * len(batch)), context, latents[0, 0].numel() // 4)
            cond, uncond = torch.stack(both).chunk(2)
            velocity = uncond + OWN_GUIDANCE * (cond - uncond)
            latents = sampler.step(velocity, t, latents, return_dict=False)[0]
        videos = vae.decoder(vae.post_quant_conv(latents * std + mean)).clamp(-1, 1)
        drawings = [corrected(c.filled(see(video)), video) for c, video in zip(batch, videos, strict=True)]
        kept = [i for i, drawing in enumerate(drawings) if drawing is not None]
        captions += [str(batch[i]) for i in kept]
        made.append(latents[kept])
        for i in kept:
            videos[i] = drawings[i]
        wanted.append((encode(vae, videos)[kept] - mean) / std)  # encodes all, as the encoder is compiled for that many
    return captions, torch.cat(made), torch.cat(wanted)


def normalise_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Gives every latent channel the mean and standard deviation that Wan's pipelines expect, inside the VAE's own
    1x1x1 convolutions, so that the fixed constants of Wan fit this VAE. Returns the normalised latents."""
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    wanted_mean, wanted_std = (values.flatten() for values in latent_statistics(vae))
    gain = wanted_std / std
    quant, post = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        quant.weight[:16] *= gain[:, None, None, None, None]
        quant.bias[:16] = (quant.bias[:16] - mean) * gain + wanted_mean
        post.bias += post.weight[..., 0, 0, 0] @ (mean - wanted_mean / gain)
        post.weight /= gain[None, :, None, None, None]
    return (latents - mean[:, None, None, None]) / std[:, None, None, None]


def save(content, path: Path) -> None:
    with written_whole(path) as part:
        torch.save(content, part)


def made_once(path: Path, of: list, make: Callable[[], Any]) -> Any:
    """Returns the content of the file, which is made and written first if there is none. of: what it depends on."""
    if not path.exists():
        save((of, make()), path)
    made_of, content = torch.load(path)
    check_origin(path, made_of, of)
    return content


def check_origin(path: Path, made_of: list, of: list) -> None:
    if made_of != of:
        raise SystemExit(f"{path} was made with {made_of}, not {of}; remove it or choose another --out")


def checksum(module: torch.nn.Module) -> float:
    return sum(p.double().abs().sum().item() for p in module.parameters())


def latent_statistics(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation of the latent channels that Wan's pipelines expect, [16, 1, 1, 1]."""
    config = vae.config
    return torch.tensor(config.latents_mean).view(-1, 1, 1, 1), torch.tensor(config.latents_std).view(-1, 1, 1, 1)


def make_parser(description: str, **defaults) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, help="number of clips to train on")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--peak_lr", type=float)
    parser.add_argument("--ema_decay", type=float, help="decay of the moving average of the weights")
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.0,
        help="weight of the loss that makes velocities with and without caption agree",
    )
    parser.add_argument("--seed", type=int)
    parser.set_defaults(**defaults)
    return parser


class Training:
    """Trains `trained`, which has a "text_encoder" and a "dit", by flow matching. Writes its moving average to `out`
    and, beside it, the state from which an interrupted training continues.

    With `args.agreement`, the velocities with and without the caption are drawn towards each other, weighted by the
    signal-to-noise ratio, at most 1: where the noisy video already shows what the caption says, the caption adds
    nothing, and guidance would only multiply the errors of the two.

    With `make_more`, half of every batch starts at what the model itself made and leads to what it should have made.
    `make_more(moving average, step)` is called at every checkpoint and returns captions, latents made and latents
    wanted, which are added to the earlier ones.

    args: those of `make_parser`. predict(indices of the clips, noisy latents, timesteps [B], text features) returns the
    velocities.
    """

    def __init__(
        self,
        trained: torch.nn.ModuleDict,
        predict: Callable[[list[int], list[torch.Tensor], torch.Tensor, list[torch.Tensor]], list[torch.Tensor]],
        captions: list[str],
        latents: torch.Tensor,
        args: argparse.Namespace,
        out: Path,
        make_more: Callable[[torch.nn.ModuleDict, int], tuple[list[str], torch.Tensor, torch.Tensor]] | None = None,
    ):
        self.trained, self.average, self.predict, self.make_more = trained, deepcopy(trained), predict, make_more
        self.captions, self.made, self.wanted, self.clips = captions, latents, latents, len(latents)
        self.args, self.out, self.state_file, self.step = args, out, out.with_suffix(".state"), 0
        for block in [*trained["dit"].blocks, *self.average["dit"].blocks]:
            block.compile()
        matrices = [p for block in trained["dit"].blocks for p in block.parameters() if p.ndim == 2]
        others = [p for p in trained.parameters() if not any(p is matrix for matrix in matrices)]
        self.optimizer, self.tokenizer = MuonAdamW(matrices, others, betas=(0.9, 0.99)), make_tokenizer()
        self.rng, self.generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
        self.of = [str(vars(args)), checksum(trained)]
        if self.state_file.exists():  # left by an interrupted training
            self.resume()

    def resume(self) -> None:
        state = torch.load(self.state_file, weights_only=False)
        check_origin(self.state_file, state["of"], self.of)
        self.step = state["step"]
        print(f"continuing from step {self.step} of {self.state_file}")
        for part in ("trained", "average", "optimizer"):
            getattr(self, part).load_state_dict(state[part])
        self.generator.set_state(state["generator"])
        self.rng.setstate(state["rng"])
        self.add(state["captions"], *state["own"])

    def save(self) -> None:
        save(self.average.state_dict(), self.out)
        state = {part: getattr(self, part).state_dict() for part in ("trained", "average", "optimizer")}
        state |= {"of": self.of, "step": self.step, "generator": self.generator.get_state(), "rng": self.rng.getstate()}
        state["captions"] = self.captions[self.clips :]
        state["own"] = [own[self.clips :].clone() for own in (self.made, self.wanted)]  # views would be saved whole
        save(state, self.state_file)

    def add(self, captions: list[str], made: torch.Tensor, wanted: torch.Tensor) -> None:
        """Adds what the model itself made."""
        self.captions = self.captions + captions
        self.made, self.wanted = torch.cat([self.made, made]), torch.cat([self.wanted, wanted])

    def run(self) -> None:
        start, losses = time.time(), []
        while self.step < self.args.steps:
            if self.make_more and self.step % CHECKPOINT_STEPS == 0:
                self.add(*self.make_more(self.average, self.step))
            losses.append(self.update())
            self.step += 1
            if self.step % 50 == 0:
                recent = sum(losses[-50:]) / 50
                print(f"{self.step}/{self.args.steps} {time.time() - start:.0f}s loss {recent:.4f}", flush=True)
            if self.step % CHECKPOINT_STEPS == 0 or self.step == self.args.steps:
                assert math.isfinite(losses[-1]), "the training diverged"
                self.save()
        self.state_file.unlink()

    def batch(self) -> tuple[list[int], list[str], torch.Tensor, torch.Tensor]:
        """Draws the clips' numbers, captions, noise and noise levels [B, 1, 1, 1, 1]; with `args.agreement` everything
        twice, with the captions and without."""
        agreement, rng = self.args.agreement, self.rng
        count = BATCH // 2 if agreement else BATCH
        index = [rng.randrange(self.clips) for _ in range(count // 2 if self.make_more else count)]
        index += [rng.randrange(self.clips, len(self.made)) for _ in range(count - len(index))]
        texts = ["" if rng.random() < CAPTION_DROPOUT and not agreement else self.captions[i] for i in index]
        noise = torch.randn(len(index), *self.made.shape[1:], generator=self.generator)
        sigma = torch.sigmoid(LOGIT_STD * torch.randn(len(index), generator=self.generator))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        if agreement:
            index, texts = index * 2, texts + [""] * len(texts)
            noise, sigma = torch.cat([noise, noise]), torch.cat([sigma, sigma])
        return index, texts, noise, sigma[:, None, None, None, None]

    def update(self) -> float:
        """Makes one step. Returns the loss of the velocities."""
        args, (index, texts, noise, sigma) = self.args, self.batch()
        noisy = (1 - sigma) * self.made[index] + sigma * noise
        context = text_features(self.tokenizer, self.trained["text_encoder"], texts)
        velocity = torch.stack(self.predict(index, list(noisy), 1000 * sigma.flatten(), context))
        loss = of_velocities = (velocity - (noisy - self.wanted[index]) / sigma).square().mean()
        if args.agreement:
            cond, uncond = velocity.chunk(2)
            clear = ((1 - sigma) / sigma).square().clamp(max=1)[: len(cond)]
            loss = loss + args.agreement * (clear * (cond - uncond).square()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step(args.peak_lr * min((self.step + 1) / WARMUP, 1 - self.step / args.steps, 1))
        with torch.no_grad():
            decay = min(args.ema_decay, self.step / (self.step + 10))
            for mean, p in zip(self.average.parameters(), self.trained.parameters(), strict=True):
                mean.lerp_(p, 1 - decay)
        return of_velocities.item()


def main():
    parser = make_parser(__doc__, clips=4096, steps=3900, peak_lr=1.5e-3, ema_decay=0.995, seed=0)
    parser.add_argument(
        "--resume", type=Path, help="checkpoint folder of a demo model to train further; its VAE is kept"
    )
    parser.add_argument(
        "--own", type=int, default=0, help="with --resume: number of the model's own videos to add at every checkpoint"
    )
    parser.add_argument("--open", type=float, default=0.0, help="share of the captions that leave a part open")
    args = parser.parse_args()
    if args.own and not args.resume:
        parser.error("--own needs --resume, a model that already draws shapes")
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    WanResample.forward = whole_clip_resample
    if args.resume:
        config = WAN_CONFIGS["t2v-tiny"]
        vae = load_vae(args.resume / config.vae_checkpoint, torch.float32, "cpu")
        dit = WanModel.from_pretrained(args.resume)
        text_encoder = load_encoder(args.resume / config.t5_checkpoint, torch.float32, "cpu").requires_grad_(True)
        text_encoder.resize_token_embeddings(len(make_tokenizer()))  # for words that came later
    else:
        vae = AutoencoderKLWan(base_dim=BASE_DIM)
        vae.load_state_dict(torch.load(args.out / "vae_training.pt", weights_only=True))
        dit, text_encoder = make_dit(), make_text_encoder(len(make_tokenizer()))
    vae.encoder.compile()
    vae.decoder.compile()
    of = [args.clips, args.seed, args.open, checksum(vae)]
    captions, latents = made_once(
        args.out / "latents.pt", of, lambda: make_latents(vae, args.clips, args.seed, args.open)
    )
    if args.resume:
        mean, std = latent_statistics(vae)
        latents = (latents - mean) / std
    else:
        latents = normalise_latents(vae, latents)
    torch.save(vae.state_dict(), args.out / "vae.pt")
    trained, tokens = torch.nn.ModuleDict({"text_encoder": text_encoder, "dit": dit}), latents[0, 0].numel() // 4

    def predict(index, noisy, timesteps, context):
        return dit(noisy, timesteps, context, tokens)

    def make_more(average, step):
        return make_own(average, vae, args.own, args.seed * 1_000_000 + step, args.open)

    Training(trained, predict, captions, latents, args, args.out / "dit.pt", make_more if args.own else None).run()


if __name__ == "__main__":
    main()
