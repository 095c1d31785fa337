"""diffusers' own pipelines, against this repository's: the demo models with the same weights, converted by diffusers'
converter, prompt features, noise, noise levels and schedule give the same latents."""

import copy
import functools
import re
import warnings
from pathlib import Path

import pytest
import torch

import magcache
from magcache.app.media import to_uint8

pytest.importorskip("wan")  # the magcache package is tested without this repository's, too
import diffusers
from PIL import Image
from sampling import wan_scheduler

from examples.benchmarks.peers import DiffusersModel
from examples.train_tiny.check_prompts import check_pairs, first_frame, load_demo
from wan.pipeline import Denoising

REPO = Path(__file__).parents[2]
STEPS, SHIFT, FRAMES, SIZE = 12, 5.0, 5, 64
CAPTION, SEED = check_pairs()[0]
TASKS = ("t2v-tiny", "i2v-tiny")


class ImageToVideo(diffusers.WanImageToVideoPipeline):
    """Takes the image's features as it takes those of the prompt, which it otherwise refuses along with the image."""

    features: torch.Tensor

    def encode_image(self, image, device=None):
        return self.features


class Demo:
    """A demo model in this repository's pipeline and, with the same weights, in diffusers'."""

    def __init__(self, task):
        self.own = load_demo(task)
        image = task == "i2v-tiny"
        parts = {
            "tokenizer": None,
            "text_encoder": None,
            "vae": self.own.vae.model,
            "scheduler": wan_scheduler(SHIFT),
            "transformer": DiffusersModel(self.own.model).transformer,
        }
        self.pipe = (ImageToVideo if image else diffusers.WanPipeline)(**parts)
        self.pipe.set_progress_bar_config(disable=True)
        self.contexts = self.own.encode_text(str(CAPTION), "", False)
        shape = self.own.latent_shape((SIZE, SIZE), FRAMES)
        self.noise, self.given, self.call = self.own.noise(shape, SEED), {"seq_len": self.own.token_count(shape)}, {}
        if image:
            picture = Image.fromarray(to_uint8(first_frame(CAPTION, SEED).permute(1, 2, 0)))
            pixels = torch.from_numpy(to_uint8(first_frame(CAPTION, SEED))).float() / 127.5 - 1
            self.given["clip_fea"] = self.pipe.features = self.own.encode_images([pixels], False)
            self.given["y"] = [self.own.condition([pixels], shape, FRAMES)]
            self.call["image"] = picture

    def padded_contexts(self):
        return [
            torch.nn.functional.pad(context[0], (0, 0, 0, self.own.config.text_len - len(context[0])))[None]
            for context in self.contexts
        ]

    def latents(self, pipe=None, **how):
        """Of diffusers' pipeline."""
        features = self.padded_contexts()
        settings = {
            "prompt_embeds": features[0],
            "negative_prompt_embeds": features[1],
            "latents": self.noise[None].clone(),
            "height": SIZE,
            "width": SIZE,
            "num_frames": FRAMES,
            "num_inference_steps": STEPS,
            "guidance_scale": 5.0,
            "output_type": "latent",
        }
        given = {name: value for name, value in (settings | self.call | how).items() if value is not None}
        return (pipe or self.pipe)(**given).frames[0]

    def own_latents(self):
        how = Denoising("unipc", STEPS, SHIFT, 5.0, offload_model=False)
        return self.own.denoise(self.noise, self.contexts, self.given, how)


get_demo = functools.cache(Demo)


@pytest.fixture(params=TASKS)
def demo(request):
    demo = get_demo(request.param)
    yield demo
    for model in (demo.own.model, demo.pipe.transformer):
        magcache.remove_magcache(model)


@pytest.fixture
def t2v():
    demo = get_demo("t2v-tiny")
    yield demo
    magcache.remove_magcache(demo.pipe.transformer)


def followed(model, schedule):
    """Applies it. Returns a list that grows by whether a call was reused."""
    told = []
    magcache.apply_magcache(model, schedule, on_call=lambda call, reused: told.append(reused))
    return told


def schedules(demo, calls_per_step=2):
    levels = magcache.noise_levels_of(demo.pipe.scheduler, STEPS)
    return {
        "uncached": magcache.Schedule((None,) * calls_per_step * STEPS, calls_per_step),
        "thresh and K": magcache.plan(
            magcache.load_ratios("t2v-tiny"), STEPS, 0.3, 3, calls_per_step=calls_per_step, sigmas=levels
        ),
        "forecasts": magcache.plan_speedup(STEPS, 2.5, calls_per_step=calls_per_step, sigmas=levels),
    }


@pytest.mark.parametrize("kind", ["uncached", "thresh and K", "forecasts"])
def test_the_latents_of_the_own_pipeline(demo, kind):
    """Twice, so that the second run starts afresh."""
    schedule, results = schedules(demo)[kind], []
    plain = demo.own_latents()
    logs = [followed(model, schedule) for model in (demo.own.model, demo.pipe.transformer)]
    for _ in range(2):
        results.append((demo.own_latents(), demo.latents()))
    for own, theirs in results:
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-3)
        assert ((own - plain).abs().max() > 1e-2) == (kind != "uncached")
    for reused in logs:
        assert tuple(reused) == 2 * schedule.reuse


@pytest.mark.parametrize("kind", ["thresh and K", "forecasts"])
def test_without_guidance(t2v, kind):
    plain = t2v.latents(guidance_scale=1.0)
    reused = followed(t2v.pipe.transformer, schedules(t2v, 1)[kind])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* this run|the run|the schedule")
        assert not torch.equal(t2v.latents(guidance_scale=1.0), plain)
    assert tuple(reused) == schedules(t2v, 1)[kind].reuse


@pytest.mark.parametrize("kind", ["thresh and K", "forecasts"])
def test_pipe_to(t2v, kind):
    """To bfloat16, with the cache already there or not yet."""
    results = []
    for order in ("before", "after"):
        parts = t2v.pipe.components | {
            name: copy.deepcopy(t2v.pipe.components[name]) for name in ("transformer", "vae")
        }
        pipe = diffusers.WanPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        if order == "before":
            pipe.to(torch.bfloat16)
        reused = followed(pipe.transformer, schedules(t2v)[kind])
        pipe.to("cpu", torch.bfloat16)
        results.append(t2v.latents(pipe))
        assert tuple(reused) == schedules(t2v)[kind].reuse
    assert torch.equal(*results)
    magcache.apply_magcache(t2v.pipe.transformer, schedules(t2v)[kind])
    exact = t2v.latents()
    assert 0 < (results[0] - exact).abs().mean() < 0.2 * exact.abs().mean()


def two_experts(t2v):
    """As in Wan2.2: one transformer takes the noisy steps, the other the rest. Also the noise levels of each."""
    parts = t2v.pipe.components | {"transformer_2": copy.deepcopy(t2v.pipe.transformer)}
    pipe = diffusers.WanPipeline(**parts, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    levels = magcache.noise_levels_of(pipe.scheduler, STEPS)
    return pipe, *([level for level in levels if (int(1000 * level) >= 800) == noisy] for noisy in (True, False))


def test_one_schedule_on_two_transformers(t2v):
    """The first steps of it are those of the noisy one; what the other one is called with does not fit."""
    pipe, high, _ = two_experts(t2v)
    schedule = schedules(t2v)["forecasts"]
    logs, results = [followed(model, schedule) for model in (pipe.transformer, pipe.transformer_2)], []
    for _ in range(2):
        with pytest.warns(UserWarning, match="step 1 of this run is at timestep"):
            results.append(t2v.latents(pipe))
    assert torch.equal(*results)
    assert tuple(logs[0]) == 2 * schedule.reuse[: 2 * len(high)]
    assert not any(logs[1])


def test_two_transformers_in_turn(t2v):
    """Each by a schedule of its own."""
    pipe, *parts = two_experts(t2v)
    plain, logs, schedules = t2v.latents(pipe), [], []
    for model, part in zip((pipe.transformer, pipe.transformer_2), parts, strict=True):
        schedules.append(magcache.plan_speedup(len(part), 1.5, sigmas=part))
        logs.append(followed(model, schedules[-1]))
    first, second = t2v.latents(pipe), t2v.latents(pipe)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    for reused, schedule in zip(logs, schedules, strict=True):
        assert any(schedule.reuse)
        assert tuple(reused) == 2 * schedule.reuse


def test_two_transformers_share_a_run(t2v):
    pipe, high, _ = two_experts(t2v)
    models, levels = [pipe.transformer, pipe.transformer_2], magcache.noise_levels_of(pipe.scheduler, STEPS)
    plain = t2v.latents(pipe)
    for speedup in (1, 2):
        schedule = magcache.plan_speedup(STEPS, speedup, sigmas=levels, boundary=pipe.config.boundary_ratio)
        assert schedule.switch == len(high)
        reused = followed(models, schedule)
        assert torch.equal(t2v.latents(pipe), plain) == (speedup == 1)
        assert tuple(reused) == schedule.reuse


def test_vace(t2v):
    """A random one, with forecasts; residuals are refused."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 64, "freq_dim": 16, "ffn_dim": 32}
    model = diffusers.WanVACETransformer3DModel(**sizes, num_layers=3, vace_layers=[0, 2]).eval().requires_grad_(False)
    pipe = diffusers.WanVACEPipeline(None, None, t2v.pipe.vae, wan_scheduler(SHIFT), model)
    pipe.set_progress_bar_config(disable=True)
    frame = Image.fromarray(to_uint8(first_frame(CAPTION, SEED).permute(1, 2, 0)))
    control = {"video": [frame] * FRAMES}
    plain, reused = t2v.latents(pipe, **control), followed(model, schedules(t2v)["forecasts"])
    assert not torch.equal(t2v.latents(pipe, **control), plain)
    assert tuple(reused) == schedules(t2v)["forecasts"].reuse
    magcache.apply_magcache(model, schedules(t2v)["thresh and K"])
    with pytest.raises(RuntimeError, match="use output forecasts"):
        t2v.latents(pipe, **control)


def test_the_lines_of_the_readme(t2v, tmp_path):
    """On the demo model, saved as a pipeline of diffusers, with fewer and smaller steps."""
    section = (REPO / "README.md").read_text().split("**In diffusers**")[1]
    (code,) = re.findall("```python\n(.*?)```", section, re.DOTALL)
    parts = t2v.pipe.components | {
        "tokenizer": t2v.own.text_encoder.tokenizer,
        "text_encoder": t2v.own.text_encoder.model,
        "scheduler": diffusers.UniPCMultistepScheduler(**t2v.pipe.scheduler.config),
    }
    diffusers.WanPipeline(**parts).save_pretrained(tmp_path / "demo")
    changes = {
        '"cuda"': '"cpu"',
        "height=480, width=832": "height=64, width=64, num_frames=5",
        "50": "8",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": str(tmp_path / "demo"),  # last, as it may hold any number
    }
    for text, other in changes.items():
        assert text in code
        code = code.replace(text, other)
    names = {}
    exec(code, names)
    assert names["schedule"].computed == 2 * 4
    assert names["video"].shape == (5, 64, 64, 3)
