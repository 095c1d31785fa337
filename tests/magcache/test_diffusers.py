"""diffusers' transformers: what a schedule and a calibration do on tiny random ones, and with what else they hold.

The expected results are of a plain model and the rule written out by hand (`ByHand`).
"""

import copy
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch

import magcache

STEPS = 8
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}
VACE = {"vace_layers": [0, 2], "vace_in_channels": 4}
TARGETS = ("residual", "output")
RATIOS = magcache.load_ratios("t2v-1.3B")


def make_model(kind="wan"):
    torch.manual_seed(0)
    if kind == "vace":
        model = diffusers.WanVACETransformer3DModel(**SIZES, **VACE)
    else:
        model = diffusers.WanTransformer3DModel(**SIZES)
    return model.eval().requires_grad_(False)


def make_schedule(target, steps=STEPS, calls_per_step=2, shift=5.0):
    if target == "residual":
        levels = magcache.noise_levels(steps, shift)
        return magcache.plan(RATIOS, steps, 0.3, 3, 0.2, calls_per_step=calls_per_step, sigmas=levels)
    return magcache.plan_speedup(steps, 2, shift, calls_per_step=calls_per_step)


def noise(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def denoise(model, steps=STEPS, seed=0, shift=5.0, guidance=True, part=slice(None), side=4, as_timestep=None, **given):
    """Euler's method, with guidance 5 or without; called as diffusers' pipelines do. `given`: further arguments.

    part: of the steps. side: of the latent. as_timestep: makes the argument of the noise level on a scale of 1000; the
    default is int64 [1].
    """
    as_timestep = as_timestep or (lambda level: torch.tensor([int(level)]))
    given = {"return_dict": False} | given
    latent, *contexts, control = noise(seed, (1, 16, 2, side, side), (1, 5, 8), (1, 5, 8), (1, 4, 2, side, side))
    if getattr(getattr(model, "model", model), "vace_blocks", None):
        given["control_hidden_states"] = control
    with torch.no_grad():
        for sigma, following in [*itertools.pairwise((*magcache.noise_levels(steps, shift), 0.0))][part]:
            timestep = as_timestep(1000 * sigma)
            answers = [
                model(hidden_states=latent, timestep=timestep, encoder_hidden_states=context, **given)[0]
                for context in contexts[: 1 + guidance]
            ]
            velocity = answers[1] + 5 * (answers[0] - answers[1]) if guidance else answers[0]
            latent = latent + (following - sigma) * velocity
    return latent


class ByHand:
    """Follows a schedule without the library: everything runs in every call, and where it should not have, what came
    out is replaced, by the combination of earlier outputs, or in front of the output norm by tokens plus residual."""

    def __init__(self, model, schedule):
        self.model, self.schedule, self.call = model, schedule, -1
        self.kept = [[] for _ in range(schedule.calls_per_step)]
        if schedule.target == "residual":
            model.patch_embedding.register_forward_hook(self.embedded)
            model.norm_out.register_forward_pre_hook(self.before_the_head)

    def embedded(self, module, args, out):
        self.tokens = out.flatten(2).transpose(1, 2)

    def before_the_head(self, module, args):
        weights, branch = self.schedule.weights[self.call], self.kept[self.call % self.schedule.calls_per_step]
        if weights is None:
            branch[:] = [args[0].to(self.tokens.dtype) - self.tokens]
            return None
        return ((self.tokens + branch[0]).float(),)

    def __call__(self, **kwargs):
        self.call = (self.call + 1) % len(self.schedule.weights)
        out = self.model(**kwargs)[0]
        weights, branch = self.schedule.weights[self.call], self.kept[self.call % self.schedule.calls_per_step]
        if self.schedule.target == "output":
            if weights is None:
                branch.insert(0, out)
            else:
                out = sum(w * v.double() for w, v in zip(weights, branch, strict=False)).to(out.dtype)
        return (out,)


def by_hand(model, schedule, **how):
    model = copy.deepcopy(model)
    magcache.remove_magcache(model)
    return denoise(ByHand(model, schedule), **how)


def count_block_calls(model):
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: calls.append(module))
    return calls


@pytest.fixture
def model():
    return make_model()


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_a_schedule(target, guidance, model):
    schedule = make_schedule(target, calls_per_step=1 + guidance)
    expected, calls = by_hand(model, schedule, guidance=guidance), count_block_calls(model)
    told = []
    cache = magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    for _ in range(2):
        calls.clear()
        torch.testing.assert_close(denoise(model, guidance=guidance), expected)
        assert 0 < schedule.computed < len(schedule.weights)
        assert len(calls) == schedule.computed * len(model.blocks)
        assert not any(cache.kept)
    assert tuple(reused for _, reused in told) == 2 * schedule.reuse


@pytest.mark.parametrize("kind", ["wan", "vace"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_forecasts(kind, return_dict):
    """Computed calls give what the model itself gives, forecast calls the combination; in the type that it returns."""
    model, schedule = make_model(kind), make_schedule("output")
    plain, outputs, computed = copy.deepcopy(model), [], [[], []]
    magcache.apply_magcache(model, schedule)

    def compared(**kwargs):
        out = model(**kwargs)
        branch, weights = computed[len(outputs) % 2], schedule.weights[len(outputs)]
        if weights is None:
            branch.insert(0, plain(**kwargs)[0])
            assert torch.equal(out[0], branch[0])
        else:
            expected = sum(w * v.double() for w, v in zip(weights, branch, strict=False))
            torch.testing.assert_close(out[0].double(), expected, rtol=1e-6, atol=1e-6)
        outputs.append(out)
        return out

    compared.model = model
    denoise(compared, return_dict=return_dict)
    own_type = diffusers.models.modeling_outputs.Transformer2DModelOutput if return_dict else tuple
    assert {type(out) for out in outputs} == {own_type}
    assert len(outputs) == 2 * STEPS


def test_return_dict_may_change_from_run_to_run(model):
    magcache.apply_magcache(model, make_schedule("output"))
    expected = denoise(model, return_dict=True)
    for return_dict in (False, True):
        assert torch.equal(denoise(model, return_dict=return_dict), expected)


def by_token(level):
    """Of Wan2.2's 5B model: one for every token; those of a given first frame are at 0."""
    timestep = torch.full((1, 8), int(level))
    timestep[:, :4] = 0
    return timestep


@pytest.mark.parametrize("target", TARGETS)
def test_a_timestep_for_every_token(target, model):
    schedule = make_schedule(target)
    expected = by_hand(model, schedule, as_timestep=by_token)
    magcache.apply_magcache(model, schedule)
    for _ in range(2):
        torch.testing.assert_close(denoise(model, as_timestep=by_token), expected)
        denoise(model, seed=1, part=slice(3), as_timestep=by_token)


class Identity(torch.nn.Module):
    def forward(self, x, *args, **kwargs):
        return (x,)


@pytest.mark.parametrize("form", ["t", "timestep", "second"])
def test_ways_to_give_a_timestep(form):
    model = Identity()
    magcache.apply_magcache(model, magcache.plan_steps([0, 2], 4, "reuse", calls_per_step=1))
    for _ in range(2):
        for step, (expected, level) in enumerate(zip((0, 0, 2, 2), magcache.noise_levels(4, 5.0), strict=True)):
            timestep = torch.tensor(int(1000 * level))
            x = torch.tensor([float(step)])
            out = model(x, timestep) if form == "second" else model(x, **{form: timestep})
            assert out[0].item() == expected
    with pytest.raises(TypeError, match="no timestep: pass it as `t`, as `timestep` or as second argument"):
        model(torch.zeros(1), sigma=torch.tensor(3.0))


# A wrong number of calls a step


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("guidance", [True, False])
def test_a_wrong_number_of_calls_is_said_once_and_the_run_computed(target, guidance, model):
    plain, calls = denoise(model, guidance=guidance), count_block_calls(model)
    schedule = make_schedule(target, calls_per_step=2 - guidance)
    warm = magcache.Schedule((None,) * 4 + schedule.weights[4:], 2 - guidance, target)
    told = []
    cache = magcache.apply_magcache(model, warm, on_call=lambda *call: told.append(call))
    with pytest.warns(UserWarning, match="calls_per_step of a plan is 2 with guidance, 1 without") as caught:
        assert torch.equal(denoise(model, guidance=guidance), plain)
    assert len(caught) == 1
    assert len(calls) == STEPS * (1 + guidance) * 3
    assert told == [(call, False) for call in range(STEPS * (1 + guidance))]
    assert not any(cache.kept)
    magcache.apply_magcache(model, make_schedule(target, calls_per_step=1 + guidance))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoise(model, guidance=guidance)


def test_a_calibration_without_guidance_is_refused(model):
    calibration = magcache.apply_calibration(model, STEPS)
    with pytest.warns(UserWarning, match="calls_per_step of a plan"):
        denoise(model, guidance=False)
    with pytest.raises(RuntimeError, match="the run stopped after"):
        calibration.lists()


@pytest.mark.parametrize("calls_per_step", [1, 2])
@pytest.mark.parametrize(
    ("steps", "shift", "dtype"),
    [
        (100, 16.0, torch.int64),
        (100, 20.0, torch.int64),  # in pairs, as if there were two calls a step
        (200, 10.0, torch.float32),
        (50, 8.0, torch.bfloat16),  # which knows every fourth number below 1000
    ],
)
def test_steps_that_share_a_timestep_are_no_wrong_number(steps, shift, dtype, calls_per_step):
    timesteps = [torch.tensor(1000 * sigma) for sigma in magcache.noise_levels(steps, shift)]
    timesteps = [(t if dtype == torch.bfloat16 else t.int()).to(dtype) for t in timesteps]
    assert len({float(t) for t in timesteps}) < steps
    model, schedule = Identity(), make_schedule("output", steps, calls_per_step, shift)
    told = []
    magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, timestep, _ in itertools.product(range(2), timesteps, range(calls_per_step)):
            model(torch.zeros(1), timestep)
    assert tuple(reused for _, reused in told) == 2 * schedule.reuse


def test_cond_and_uncond_in_one_batch(model):
    """One call a step, whose output holds both."""
    schedule, (cond, uncond) = make_schedule("output", calls_per_step=1), noise(1, (1, 5, 8), (1, 5, 8))
    both = torch.cat([cond, uncond])
    magcache.apply_magcache(model, schedule)
    kept = []
    for weights, sigma in zip(schedule.weights, magcache.noise_levels(STEPS, 5.0), strict=True):
        x, timestep = noise(int(1000 * sigma), (1, 16, 2, 4, 4))[0].repeat(2, 1, 1, 1, 1), torch.tensor([1000 * sigma])
        out = model(x, timestep.expand(2), both, return_dict=False)[0]
        if weights is None:
            kept.insert(0, out)
        else:
            expected = sum(w * v.double() for w, v in zip(weights, kept, strict=False))
            torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
        assert out.shape == x.shape


# Runs that do not fit the schedule


def lines_said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = run()
    return out, [str(warning.message) for warning in caught]


OTHER_RUNS = {  # what they say; None: nothing, as they only ended early
    "one step": ({"steps": 1}, None),
    "stopped in the first step": ({"part": slice(1)}, None),
    "stopped": ({"part": slice(5)}, None),
    "stopped, of another size": ({"part": slice(5), "side": 6}, None),
    "fewer steps": ({"steps": 5}, "step 2 of this run is at timestep "),
    "more steps": ({"steps": 40}, "step 2 of this run is at timestep "),
    "another shift": ({"shift": 3.0}, "step 2 of this run is at timestep "),
    "a start in the middle": (
        {"part": slice(3, None)},
        "step 1 of this run is at timestep ",
    ),
    "only the end": ({"part": slice(6, None)}, "step 1 of this run is at timestep "),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_run_that_does_not_fit_is_computed_and_leaves_nothing_to_the_next(name, target, model):
    how, said = OTHER_RUNS[name]
    magcache.apply_magcache(model, make_schedule(target))
    fresh, lines = lines_said(lambda: denoise(model))
    assert lines == []
    magcache.remove_magcache(model)
    plain = denoise(model, seed=1, **how)
    magcache.apply_magcache(model, make_schedule(target))
    for number in range(3):
        out, lines = lines_said(lambda: denoise(model, seed=1, **how))
        if said:
            assert torch.equal(out, plain)
            (line,) = lines
            assert line.startswith(said)
            assert "the run is computed in full from here" in line
        else:
            assert lines == []
        if number > 0:  # and two of them in a row
            out, lines = lines_said(lambda: denoise(model))
            assert torch.equal(out, fresh)
            assert lines == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calls_per_step", [1, 2])
def test_two_videos_at_once(target, calls_per_step, model):
    """Twice the calls in every step, the same timestep for all of them: nothing of one stands in for the other."""
    latents = noise(2, (1, 16, 2, 4, 4), (1, 16, 2, 4, 4))
    prompts = noise(3, *[(1, 5, 8)] * (2 * calls_per_step))

    def run():
        return [
            model(latents[i // calls_per_step], torch.tensor([int(1000 * level)]), prompt, return_dict=False)[0]
            for level in magcache.noise_levels(STEPS, 5.0)
            for i, prompt in enumerate(prompts)
        ]

    plain = run()
    magcache.apply_magcache(model, make_schedule(target, calls_per_step=calls_per_step))
    answers, lines = lines_said(run)
    assert all(torch.equal(*pair) for pair in zip(answers, plain, strict=True))
    assert len(lines) == 1


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_timesteps_in_other_dtypes_and_scales_fit(scale, dtype):
    if scale == 1 and dtype == torch.int64:
        return
    model, schedule, told = Identity(), make_schedule("output", 50), []
    magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    for level in magcache.noise_levels(50, 5.0):
        for _ in range(2):
            model(torch.zeros(1), torch.tensor(scale * level).to(dtype))
    assert told == [*enumerate(schedule.reuse)]


# Two transformers, as Wan2.2 has them


class Levels(diffusers.UniPCMultistepScheduler):
    """UniPC at the noise levels of the other tests."""

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=np.float32(magcache.noise_levels(steps, 5.0)), device=device)


def wan22_pipeline(boundary_ratio=0.85):
    transformers = make_model(), make_model()
    for p in transformers[1].parameters():
        p.mul_(1.1)
    torch.manual_seed(0)
    parts = {"transformer": transformers[0], "transformer_2": transformers[1], "boundary_ratio": boundary_ratio}
    vae = diffusers.AutoencoderKLWan(base_dim=3, num_res_blocks=1, dim_mult=[1, 1, 1, 1])
    levels = Levels(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=levels, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan22_latents(pipe, **how):
    latents, prompt, negative = noise(0, (1, 16, 2, 4, 4), (1, 5, 8), (1, 5, 8))
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "height": 32, "width": 32, "num_frames": 5}
    given |= {"num_inference_steps": STEPS, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "output_type": "latent"}
    return pipe(latents=latents, **given | how).frames


def test_two_transformers_of_a_pipeline():
    """Every computed call against the pipeline without the cache, every other against outputs of its own expert."""
    pipe = wan22_pipeline()
    models, outputs = [pipe.transformer, pipe.transformer_2], []
    plain = wan22_latents(pipe)
    sigmas, boundary = magcache.noise_levels_of(pipe.scheduler, STEPS), pipe.config.boundary_ratio
    full = magcache.plan_speedup(STEPS, 1, sigmas=sigmas, boundary=boundary)
    magcache.apply_magcache(models, full)
    assert torch.equal(wan22_latents(pipe), plain)
    schedule = magcache.plan_speedup(STEPS, 2, sigmas=sigmas, boundary=boundary)
    assert schedule.switch == 4
    ran, by_expert = [], [[[], []], [[], []]]  # by expert and branch, newest first
    for model in models:
        model.proj_out.register_forward_hook(lambda module, args, out: ran.append(out))

    def note(call, reused):
        outputs.append(reused)
        assert bool(ran) == (not reused)
        ran.clear()

    magcache.apply_magcache(models, schedule, on_call=note)
    answers = {model: type(model).__call__ for model in models}
    for expert, model in enumerate(models):

        class Compared(type(model)):
            def __call__(self, *args, expert=expert, answer=answers[model], **kwargs):
                call = len(outputs)
                out, branch = answer(self, *args, **kwargs), by_expert[expert][call % 2]
                assert expert == (call >= 8)
                weights = schedule.weights[call]
                if weights is None:
                    branch.insert(0, out[0])
                else:
                    expected = sum(w * v.double() for w, v in zip(weights, branch, strict=False))
                    torch.testing.assert_close(out[0].double(), expected, rtol=1e-6, atol=1e-6)
                return out

        model.__class__ = Compared
    wan22_latents(pipe)
    assert tuple(outputs) == schedule.reuse


@pytest.mark.parametrize(("boundary_ratio", "said"), [(0.95, "step 3 of this run calls the second"), (0.7, "step 5 ")])
def test_another_boundary_than_planned_is_said_once_and_the_run_computed(boundary_ratio, said):
    pipe = wan22_pipeline(boundary_ratio)
    plain = wan22_latents(pipe)
    computed = {0, 1, 2, 4, 5, 6} if boundary_ratio < 0.85 else {0, 2, 4, 6}
    sigmas = magcache.noise_levels_of(pipe.scheduler, STEPS)
    schedule = magcache.plan_steps(computed, STEPS, sigmas=sigmas, boundary=0.85)
    magcache.apply_magcache([pipe.transformer, pipe.transformer_2], schedule)
    found, lines = lines_said(lambda: wan22_latents(pipe))
    assert len(lines) == 1
    assert lines[0].startswith(said)
    reached = schedule.weights[: 2 * int(said.split()[1]) - 2]
    assert torch.equal(found, plain) == (None in reached and all(weights is None for weights in reached))


# What has no residual


class Chain(torch.nn.Module):
    """Hands its blocks what `between` makes of the tokens, and the further arguments of `given`."""

    def __init__(self, between=lambda x: x, given=lambda i: ()):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Add() for _ in range(3)])
        self.between, self.given = between, given

    def forward(self, x, timestep):
        for i, block in enumerate(self.blocks):
            x = self.between(block(x, *self.given(i)))
        return x


class Add(torch.nn.Module):
    def forward(self, x, *args):
        return x + 1


ATTACHMENTS = {
    "residual": lambda model: magcache.apply_magcache(model, make_schedule("residual")),
    "calibration": lambda model: magcache.apply_calibration(model, STEPS),
}


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_hints_between_the_blocks_are_refused(attach):
    model = make_model("vace")
    plain, blocks = denoise(model), model.blocks
    ATTACHMENTS[attach](model)
    with pytest.raises(RuntimeError, match=r"does not only chain its blocks: use output forecasts \(magcache.plan_"):
        denoise(model)
    assert model.blocks is blocks
    magcache.remove_magcache(model)
    assert torch.equal(denoise(model), plain)


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_loops_that_do_more_than_chain_their_blocks_are_refused(attach):
    shared, x, timestep = torch.ones(1), torch.zeros(1, 4, 2), torch.tensor([999])
    for good in (Chain(), Chain(given=lambda i: (shared, "a", None))):
        ATTACHMENTS[attach](good)
        assert torch.equal(good(x, timestep), x + 3)
    edits = Chain(lambda x: 2 * x), Chain(lambda x: x.add_(1))
    for bad in (*edits, Chain(given=lambda i: (torch.ones(1),)), Chain(given=lambda i: [1] * i)):
        ATTACHMENTS[attach](bad)
        with pytest.raises(RuntimeError, match="does not only chain its blocks"):
            bad(x, timestep)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compile_it", [compiled, compiled_in_place])
@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_compiled_models_are_refused(attach, compile_it, model):
    with pytest.raises(TypeError, match=r"or is compiled: use output forecasts \(magcache.plan_speedup\)"):
        ATTACHMENTS[attach](compile_it(model))


def test_compiling_in_place_later_is_refused(model):
    ATTACHMENTS["residual"](model)
    with pytest.raises(TypeError, match="or is compiled"):
        denoise(compiled_in_place(model))


@pytest.mark.parametrize("compile_it", [compiled, compiled_in_place])
def test_forecasts_on_a_compiled_model(compile_it, model):
    schedule = make_schedule("output")
    expected, model = by_hand(model, schedule), compile_it(model)
    told = []
    magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    torch.testing.assert_close(denoise(model), expected)
    assert tuple(reused for _, reused in told) == schedule.reuse


# With what else diffusers does to a transformer


def group_offload(model, folder):
    """To disk, so that weights that no hook fetched are not there."""
    path = str(folder / "offloaded")
    model.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=path)


def leaf_offload(model, folder):
    model.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(folder / "offloaded"))


def layerwise_casting(model, folder):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def compile_blocks(model, folder):
    model.compile_repeated_blocks(backend="eager")


def lora(model, folder):
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.requires_grad_(False)


def fused_lora(model, folder):
    lora(model, folder)
    model.fuse_lora()


CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # what is loaded anew may lie otherwise in memory, and take other kernels
TOGETHER = (group_offload, leaf_offload, layerwise_casting, compile_blocks, lora, fused_lora)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", TOGETHER)
def test_together(change, order, target, model, tmp_path):
    """`order`: of the change and the cache."""
    schedule, twin, plain = make_schedule(target), copy.deepcopy(model), denoise(model)
    change(twin, tmp_path / "twin")
    expected = denoise(ByHand(twin, schedule))
    if order == "before":
        change(model, tmp_path)
    told = []
    magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    if order == "after":
        change(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(denoise(model), expected)
    assert tuple(reused for _, reused in told) == 2 * schedule.reuse
    magcache.remove_magcache(model)
    alone = denoise(model)
    assert not torch.allclose(alone, expected, **CLOSE)
    assert torch.allclose(alone, plain, **CLOSE) == (change in (group_offload, leaf_offload, compile_blocks))


@pytest.mark.slow
def test_context_parallel(model, tmp_path):
    """Two processes: forecasts are those of one, and a residual is refused, as its tokens are split in the blocks."""
    repo, here = Path(__file__).parents[2], Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (repo, repo / "tests", here)))}
    subprocess.run([sys.executable, here / "context_parallel.py", tmp_path], check=True, env=environment)
    schedule = make_schedule("output")
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(seen["uncached"], denoise(model))
        torch.testing.assert_close(seen["forecasts"][0], by_hand(model, schedule))
        assert seen["forecasts"][1] == schedule.reuse
        for name in ATTACHMENTS:
            assert seen[name].startswith("no residual of blocks that turn [1, 8, 24] into [1, 4, 24]: use output fore")


# What diffusers' own tests of its hooks look at: state, contexts, removal


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stop_after", [1, 2, 6])
def test_a_run_after_an_abandoned_one_starts_clean(target, stop_after, model):
    magcache.apply_magcache(model, make_schedule(target))
    fresh = denoise(model)
    denoise(model, seed=1, part=slice(stop_after))
    assert torch.equal(denoise(model), fresh)


@pytest.mark.parametrize("target", TARGETS)
def test_cond_and_uncond_do_not_mix(target, model):
    """Runs with either prompt only, alternating or on their own."""
    (latent, *prompts), results = noise(0, (1, 16, 2, 4, 4), (1, 5, 8), (1, 5, 8)), []
    timesteps = [torch.tensor([int(1000 * sigma)]) for sigma in magcache.noise_levels(STEPS, 5.0)]
    for chosen in (prompts, prompts[:1], prompts[1:]):
        magcache.apply_magcache(model, make_schedule(target, calls_per_step=len(chosen)))
        answers = [model(latent, t, prompt, return_dict=False)[0] for t in timesteps for prompt in chosen]
        results.append([answers[i :: len(chosen)] for i in range(len(chosen))])
    for both, alone in zip(results[0], results[1] + results[2], strict=True):
        torch.testing.assert_close(both, alone)
    assert not torch.equal(results[0][0][-1], results[0][1][-1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("offloaded", [False, True])
def test_removal_restores_the_instance_exactly(target, offloaded, model, tmp_path):
    if offloaded:
        group_offload(model, tmp_path)
    plain, before, own_class = denoise(model), dict(model.__dict__), type(model)
    magcache.apply_magcache(model, make_schedule(target))
    assert not torch.allclose(denoise(model), plain, **CLOSE)
    assert isinstance(model, own_class)
    magcache.remove_magcache(model)
    assert model.__dict__ == before
    assert type(model) is own_class
    torch.testing.assert_close(denoise(model), plain, **CLOSE)


def diffusers_magcache(model, thresh, K):
    """diffusers' own hook, for the cond ratios; its contexts as its pipelines set them."""
    config = diffusers.MagCacheConfig(thresh, K, 0.2, STEPS, list(RATIOS[::2]))
    model.enable_cache(config)
    branches = itertools.cycle(("cond", "uncond"))

    def called(**kwargs):
        with model.cache_context(next(branches)):
            return model(**kwargs)

    return called


@pytest.mark.parametrize(("thresh", "K"), [(0.3, 3), (0.06, 1), (0.5, 6)])
def test_magcache_is_that_of_diffusers(thresh, K):
    ours, theirs = make_model(), make_model()
    one_list = [ratio for ratio in RATIOS[::2] for _ in ("cond", "uncond")]
    magcache.apply_magcache(ours, magcache.plan(one_list, STEPS, thresh, K, 0.2))
    results = []
    for model, run in ((ours, ours), (theirs, diffusers_magcache(theirs, thresh, K))):
        calls = []
        for block in model.blocks:  # its attention, as their hook may replace what a block does
            block.attn1.register_forward_hook(lambda module, args, out, calls=calls: calls.append(module))
        model.norm_out.register_forward_pre_hook(lambda module, args, calls=calls: calls.append("head"))
        latents = denoise(run)
        decisions = [len(list(group)) for is_head, group in itertools.groupby(calls, lambda c: c == "head")]
        results.append((latents, decisions))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert max(results[0][1][1::2]) > 1  # heads in a row


# Calibration


def residuals_of(model):
    """By call, [tokens of all samples, C]."""
    ins, outs = [], []
    model.blocks[0].register_forward_pre_hook(lambda module, args: ins.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda module, args, out: outs.append(out))
    plain = denoise(model)
    return plain, [(out - x).flatten(0, 1).double().numpy() for x, out in zip(ins, outs, strict=True)]


def test_calibration(model, tmp_path):
    """All tokens count; the table is saved and loaded as that of any other model."""
    plain, residuals = residuals_of(model)
    calibration = magcache.apply_calibration(model, STEPS)
    assert torch.equal(denoise(model), plain)
    lists = calibration.lists()
    for call in range(2, 2 * STEPS):
        now, before = residuals[call], residuals[call - 2]
        norms = np.linalg.norm(now, axis=1), np.linalg.norm(before, axis=1)
        ratio, cosine = norms[0] / norms[1], (now * before).sum(axis=1) / norms[0] / norms[1]
        expected = ratio.mean(), ratio.std(ddof=1), (1 - cosine).mean()
        assert [lists[key][call - 2] for key in lists] == pytest.approx(expected, abs=1e-5)
    magcache.save_table(tmp_path / "mine.json", magcache.make_table("mine", [lists], {"model": "diffusers"}))
    ratios = magcache.load_ratios(tmp_path / "mine.json")
    assert ratios == (1.0, 1.0, *lists["mag_ratio"])
    magcache.apply_magcache(model, magcache.plan(ratios, STEPS, thresh=10.0, K=4))
    assert not torch.equal(denoise(model), plain)


# Noise levels of a scheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
        diffusers.DPMSolverMultistepScheduler(**FLOW),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
@pytest.mark.parametrize("steps", [1, 20])
def test_noise_levels_of(scheduler, steps):
    """They are of the timesteps that the scheduler then has; it keeps those that it had."""
    scheduler.set_timesteps(7)
    sigmas = magcache.noise_levels_of(scheduler, steps)
    assert len(scheduler.timesteps) == 7
    scheduler.set_timesteps(steps)
    assert list(sigmas) == scheduler.sigmas.tolist()[:steps]
    assert 0.99 < sigmas[0] <= 1
    assert [1000 * sigma for sigma in sigmas] == pytest.approx(scheduler.timesteps.tolist(), abs=1)
    if steps > 1:
        schedule = magcache.plan_speedup(steps, 2, sigmas=sigmas)
        assert schedule.computed == steps


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.UniPCMultistepScheduler(), "got 9, the largest 157.4"),
        (diffusers.EulerDiscreteScheduler(), "got 9, the largest 157.4"),
        (diffusers.DDIMScheduler(), "got 0"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "got 17, the largest 1"),
    ],
)
def test_schedulers_without_flow_or_with_more_calls(scheduler, message):
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} is not a flow scheduler.*{message}"):
        magcache.noise_levels_of(scheduler, 9)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchLCMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
        diffusers.SASolverScheduler(**FLOW),
        diffusers.LTXEulerAncestralRFScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_fresh_noise_are_refused(scheduler):
    with pytest.raises(
        ValueError, match=f"^{type(scheduler).__name__}, as it is configured, draws fresh noise in every"
    ):
        magcache.noise_levels_of(scheduler, 9)
