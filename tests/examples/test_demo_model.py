"""The tools around the demo model: its data, its checker, and the VAE training's short cut."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

from examples.train_tiny import train_dit
from examples.train_tiny.check_prompts import (
    check_pairs,
    find_shape,
    first_frame,
    generate,
    is_whole,
    load_demo,
    overlap,
    psnr,
    see,
)  # fmt: skip
from examples.train_tiny.own_videos import corrected
from examples.train_tiny.shapes import DIRECTIONS, HELD_OUT, SHAPES, TRAINABLE, Caption, render
from examples.train_tiny.train_vae import whole_clip_resample


def test_the_checker_reads_what_was_drawn():
    pairs, generator = check_pairs(), torch.Generator().manual_seed(1)
    clips = render([caption for caption, _ in pairs], generator)
    noisy = clips + 0.1 * torch.randn(clips.shape, generator=generator)
    assert [see(clip) for clip in noisy] == [caption for caption, _ in pairs]
    masks = [find_shape(clip)[0] for clip in clips]
    assert all(map(is_whole, masks))
    assert min(overlap(caption.shape, mask) for (caption, _), mask in zip(pairs, masks, strict=True)) > 0.95


def test_the_checker_finds_faults():
    """A second shape, a hole, and a dent of a fifth of the radius."""
    caption = Caption("red", "square", "left", "white")
    clip = render([caption], torch.Generator().manual_seed(1))[0]
    mask = find_shape(clip)[0]
    frame = torch.from_numpy(mask[8])
    rows, columns = frame.any(1).nonzero().flatten().tolist(), frame.any(0).nonzero().flatten().tolist()
    middle = rows[len(rows) // 2], columns[len(columns) // 2]
    inside, outside = clip[:, 8, middle[0], middle[1]], clip[:, 0, 0, 0]
    for place, color in ((middle, outside), ((2 if rows[0] > 8 else 60, 30), inside)):
        spoilt = clip.clone()
        spoilt[:, 8, place[0] : place[0] + 3, place[1] : place[1] + 3] = color[:, None, None]
        assert not is_whole(find_shape(spoilt)[0])
    dented = clip.clone()
    dented[:, :, :, columns[-2] :] = outside[:, None, None, None]
    assert overlap("square", find_shape(dented[:, 8:9])[0]) < overlap("square", mask[8:9])
    assert overlap("circle", mask) < 0.9
    mask[8] = False
    assert not is_whole(mask)
    assert overlap("square", mask) == pytest.approx(16 / 17, abs=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dented_video_is_corrected(shape):
    """Towards the drawing it was made from; what shows two shapes, or goes elsewhere, is not."""
    caption = Caption("red", shape, "up", "white")
    clip = render([caption], torch.Generator().manual_seed(1))[0]
    assert psnr(corrected(caption, clip), clip) > 30
    dented, mask = clip.clone(), torch.from_numpy(find_shape(clip)[0])
    for frame in range(0, 17, 2):  # the two leftmost columns of every other frame
        columns = mask[frame].any(0).nonzero().flatten()
        dented[:, frame, :, columns[0] : columns[0] + 2] = clip[:, 0, :1, :1]
    assert psnr(corrected(caption, dented), clip) > psnr(dented, clip) + 3
    assert corrected(Caption("red", shape, "left", "white"), clip) is None
    dented[:, 3, 58:62, 2:6] = clip[:, 8][:, mask[8]][:, :1, None]
    assert corrected(caption, dented) is None


@pytest.mark.slow
def test_own_videos_are_where_the_model_put_them(monkeypatch):
    pipeline = load_demo("t2v-tiny")
    trained = torch.nn.ModuleDict({"text_encoder": pipeline.text_encoder.model, "dit": pipeline.model})
    monkeypatch.setattr(train_dit, "BATCH", 8)
    with monkeypatch.context() as patched:
        patched.setattr(WanResample, "forward", whole_clip_resample)
        captions, made, wanted = train_dit.make_own(trained, pipeline.vae.model, 4, seed=3)
    assert len(captions) == len(made) == len(wanted) > 2
    for caption, before, after in zip(captions, *map(pipeline.vae.decode, (made, wanted)), strict=True):
        assert str(see(after)) == caption
        assert overlap(see(after).shape, find_shape(after)[0]) > 0.92
        assert psnr(after, before) > 18


def test_the_check_is_fair():
    captions = [caption for caption, _ in check_pairs()]
    assert len(set(captions)) == 48
    assert sum(caption in HELD_OUT for caption in captions) == 24
    assert not HELD_OUT & set(TRAINABLE)
    assert {d: sum(c.direction == d for c in captions) for d in DIRECTIONS} == dict.fromkeys(DIRECTIONS, 12)


def test_image_to_video_starts_with_its_image():
    """Where the shape is stands in the image only. The other image has the same caption."""
    pipeline, (caption, seed) = load_demo("i2v-tiny"), check_pairs()[0]
    video = generate(pipeline, caption, seed, sampling_steps=20)
    assert psnr(video[:, 0], first_frame(caption, seed)) > 24
    assert psnr(video[:, 0], first_frame(caption, seed + 1)) < 20
    assert see(video) == caption


@torch.no_grad()
def test_whole_clips_equal_chunks(monkeypatch):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4).eval()
    clip = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    latent = vae.encode(clip).latent_dist.mean
    video = vae.decode(latent, return_dict=False)[0]
    monkeypatch.setattr(WanResample, "forward", whole_clip_resample)
    torch.testing.assert_close(vae.quant_conv(vae.encoder(clip))[:, :16], latent, rtol=1e-4, atol=1e-5)
    whole = vae.decoder(vae.post_quant_conv(latent)).clamp(-1, 1)
    torch.testing.assert_close(whole, video, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_normalised_latents_decode_to_the_same_video():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4).eval()
    clips = torch.rand(3, 3, 5, 16, 16) * 2 - 1
    raw = vae.encode(clips).latent_dist.mean
    video = vae.decode(raw, return_dict=False)[0]
    normalised = train_dit.normalise_latents(vae, raw)
    assert normalised.mean((0, 2, 3, 4)).abs().max() < 1e-4
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    stored = vae.encode(clips).latent_dist.mean
    torch.testing.assert_close((stored - mean) / std, normalised, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(vae.decode(stored, return_dict=False)[0], video, rtol=1e-3, atol=1e-4)
