"""Wan2.2's models against diffusers' own pipelines, with the same tiny random weights."""

import diffusers
import numpy as np
import pytest
import torch
from checkpoints_22 import write_checkpoint_22
from PIL import Image
from sampling import wan_scheduler

import magcache
import wan
from examples.benchmarks.peers import DiffusersModel
from wan.configs import WAN_CONFIGS
from wan.textimage2video import covered_size

STEPS, FRAMES, SEED = 8, 5, 3
PIPELINES = {"t2v-A14B": "WanT2V", "i2v-A14B": "WanI2V", "ti2v-5B": "WanTI2V"}
# task, whether with a picture, guidance of low and of high noise, shift
CASES = [("t2v-A14B", False, (3.0, 4.0), 12.0), ("i2v-A14B", True, (3.5, 2.0), 5.0)]
CASES += [("ti2v-5B", False, 5.0, 5.0), ("ti2v-5B", True, 5.0, 5.0)]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan22")

    def load(task, **how):
        target = folder / task
        return getattr(wan, PIPELINES[task])(
            WAN_CONFIGS[task], target if target.exists() else write_checkpoint_22(task, target), **how
        )

    return load


def picture(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def generated(own, with_picture, guide_scale, shift, size=(64, 32), **how):
    inputs = [picture(size)] if with_picture else []
    shape = {"max_area": size[0] * size[1]} if with_picture else {"size": size}
    settings = {"frame_num": FRAMES, "sampling_steps": STEPS, "shift": shift, "guide_scale": guide_scale, "seed": SEED}
    return own.generate("a bird", *inputs, **shape, **settings, **how)


def by_diffusers(own, with_picture, guide_scale, shift, size=(64, 32)):
    models = [DiffusersModel(model).transformer for model in own.transformers]
    parts = dict(zip(("transformer", "transformer_2"), models, strict=False))
    parts |= {"boundary_ratio": own.config.boundary} if len(models) == 2 else {"expand_timesteps": True}
    kind = diffusers.WanImageToVideoPipeline if with_picture else diffusers.WanPipeline
    pipe = kind(tokenizer=None, text_encoder=None, vae=own.vae.model, scheduler=wan_scheduler(shift), **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = (
        torch.nn.functional.pad(context[0], (0, 0, 0, 512 - len(context[0])))[None]
        for context in own.encode_text("a bird", "", False)
    )
    given = {"image": picture(size)} if with_picture else {}
    low, high = guide_scale if isinstance(guide_scale, tuple) else (None, guide_scale)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        latents=own.noise(own.latent_shape(size, FRAMES), SEED)[None],
        width=size[0],
        height=size[1],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=high,
        guidance_scale_2=low,
        output_type="pt",
        **given,
    ).frames[0]


@pytest.mark.parametrize(("task", "with_picture", "guide_scale", "shift"), CASES)
def test_videos_are_those_of_diffusers(task, with_picture, guide_scale, shift, load):
    own, how = load(task), (with_picture, guide_scale, shift)
    video = generated(own, *how)
    assert video.shape == (3, FRAMES, 32, 64)
    expected = by_diffusers(own, *how).transpose(0, 1) * 2 - 1
    assert expected.std() > 0.01
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-3)


def test_two_experts_with_a_cache(load):
    """Each makes its own steps, bit-identical if everything is computed, and forecasts as planned."""
    own, how = load("t2v-A14B"), CASES[0][1:]
    plain, boundary = generated(own, *how), own.config.boundary
    called = [[], []]
    for calls, model in zip(called, own.transformers, strict=True):
        model.blocks[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
    for speedup in (1, 2):
        schedule = magcache.plan_speedup(STEPS, speedup, 12.0, boundary=boundary)
        told = []
        magcache.apply_magcache(own.transformers, schedule, on_call=lambda *call, told=told: told.append(call[1]))
        for calls in called:
            calls.clear()
        video = generated(own, *how)
        assert tuple(told) == schedule.reuse
        split = 2 * schedule.switch
        assert [*map(len, called)] == [told[:split].count(False), told[split:].count(False)]
        assert torch.equal(video, plain) == (speedup == 1)
    magcache.remove_magcache(own.transformers)
    assert torch.equal(generated(own, *how), plain)


def test_one_expert_at_a_time_is_kept_and_none_after_the_last_video(load):
    own = load("t2v-A14B")
    own.keeps_models = False
    there = []
    for model in own.transformers:
        model.register_forward_pre_hook(
            lambda *_: there.append([m.patch_embedding.weight.device.type for m in own.transformers])
        )
    generated(own, *CASES[0][1:])
    assert there[0] == ["cpu", "cpu"]
    assert there[-1] == ["meta", "cpu"]
    assert {p.device.type for m in own.transformers for p in m.parameters()} == {"meta"}


@pytest.mark.parametrize("task", ["i2v-A14B", "ti2v-5B"])
@pytest.mark.parametrize("how", [{"offload_blocks": True}, {"dit_dtype": torch.bfloat16}, {"vae_tiling": True}])
def test_fitted_to_a_machine(task, how, load):
    case = next(case for case in CASES if case[0] == task and case[1])[1:]
    plain = generated(load(task), *case)
    video = generated(load(task, **how), *case, offload_model=True)
    if "dit_dtype" in how:
        assert 0 < (video - plain).abs().max() < 0.5
    else:
        torch.testing.assert_close(video, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own_size", [(64, 64), (48, 200), (500, 130), (1280, 704), (1333, 750)])
def test_the_size_of_a_covered_video(own_size):
    """As little as possible is cut off, in whole tokens."""
    width, height = covered_size(own_size, 704 * 1280, (32, 32))
    assert width % 32 == height % 32 == 0
    assert 0.9 * 704 * 1280 <= width * height <= 704 * 1280
    assert width / height == pytest.approx(own_size[0] / own_size[1], rel=0.05)
