"""diffusers' transformers: what a schedule and a calibration do with their ways to be called, and with what else they
hold. What holds for all models is in test_patch.py."""

import copy
import functools
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import peft
import pytest
import tiny_models
import torch
from tiny_models import HEADS, SIZES, STEPS, TARGETS, ByHand, as_diffusers, count_block_calls, make_schedule, noise

import magcache

VACE = {"vace_layers": [0, 2], "vace_in_channels": 4}
(CONTROL,) = noise(1, (1, 4, 2, 4, 4))
denoise = functools.partial(tiny_models.denoise, call=as_diffusers)
by_hand = functools.partial(tiny_models.by_hand, call=as_diffusers)


def make_model(model_class=diffusers.WanTransformer3DModel, **more):
    torch.manual_seed(0)
    return model_class(**SIZES, **HEADS, **more).eval().requires_grad_(False)


def make_vace():
    return make_model(diffusers.WanVACETransformer3DModel, **VACE)


@pytest.fixture
def model():
    return make_model()


def test_forecasts_of_vace():
    model, schedule = make_vace(), make_schedule("output")
    expected = by_hand(model, schedule, control_hidden_states=CONTROL)
    magcache.apply_magcache(model, schedule)
    torch.testing.assert_close(denoise(model, control_hidden_states=CONTROL), expected)


def test_return_dict_may_change_from_run_to_run(model):
    """What is returned is of the type that the model returns, reused or not."""
    expected, found = by_hand(model, make_schedule("output")), []
    magcache.apply_magcache(model, make_schedule("output"))

    def called(**given):
        found.append(model(**given))
        return found[-1]

    own_type = diffusers.models.modeling_outputs.Transformer2DModelOutput
    for return_dict, returned in ((True, own_type), (False, tuple)):
        torch.testing.assert_close(denoise(called, return_dict=return_dict), expected)
        assert {type(out) for out in found} == {returned}
        found.clear()


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
    model = make_vace()
    run = functools.partial(denoise, model, control_hidden_states=CONTROL)
    plain, blocks = run(), model.blocks
    ATTACHMENTS[attach](model)
    with pytest.raises(RuntimeError, match=r"does not only chain its blocks: use output forecasts \(magcache.plan_"):
        run()
    assert model.blocks is blocks
    magcache.remove_magcache(model)
    assert torch.equal(run(), plain)


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
    before, told = dict(model.__dict__), []
    magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    if order == "after":
        change(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(denoise(model), expected)
    assert tuple(reused for _, reused in told) == 2 * schedule.reuse
    magcache.remove_magcache(model)
    assert model.__dict__ == before or order == "after"
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
