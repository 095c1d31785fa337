"""diffusers' transformers: what a schedule and a calibration do on tiny random ones, and with what else they hold.

The expected results are of a plain model and the rule written out by hand (`ByHand`).
"""

import copy
import itertools
import warnings

import pytest
import torch

import magcache

diffusers = pytest.importorskip("diffusers")

STEPS = 10
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


def make_schedule(target, steps=STEPS, calls_per_step=2):
    if target == "residual":
        return magcache.plan(RATIOS, steps, 0.3, 3, 0.2, calls_per_step=calls_per_step)
    return magcache.plan_speedup(steps, 2, calls_per_step=calls_per_step)


def noise(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def denoise(model, steps=STEPS, seed=0, shift=5.0, guidance=True, stop_after=None, as_timestep=None, **given):
    """Euler's method, with guidance 5 or without; called as diffusers' pipelines do. `given`: further arguments.

    as_timestep: makes the argument of the noise level on a scale of 1000; the default is int64 [1].
    """
    as_timestep = as_timestep or (lambda level: torch.tensor([int(level)]))
    given = {"return_dict": False} | given
    latent, *contexts, control = noise(seed, (1, 16, 2, 4, 4), (1, 5, 8), (1, 5, 8), (1, 4, 2, 4, 4))
    if getattr(getattr(model, "model", model), "vace_blocks", None):
        given["control_hidden_states"] = control
    with torch.no_grad():
        for sigma, following in [*itertools.pairwise((*magcache.noise_levels(steps, shift), 0.0))][:stop_after]:
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
            self.hooks = [
                model.patch_embedding.register_forward_hook(self.embedded),
                model.norm_out.register_forward_pre_hook(self.before_the_head),
            ]

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
    cache = magcache.apply_magcache(model, schedule)
    for _ in range(2):
        calls.clear()
        torch.testing.assert_close(denoise(model, guidance=guidance), expected)
        assert 0 < schedule.computed < len(schedule.weights)
        assert len(calls) == schedule.computed * len(model.blocks)
        assert not any(cache.kept)
    assert tuple(skipped for _, skipped, _ in cache.log) == 2 * schedule.reuse


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
    assert {type(out) for out in outputs} == {type(plain_output(plain, return_dict))}
    assert len(outputs) == 2 * STEPS


def plain_output(model, return_dict):
    answers = []

    def recorded(**kwargs):
        answers.append(model(**kwargs))
        return answers[-1]

    recorded.model = model
    denoise(recorded, 1, return_dict=return_dict)
    return answers[0]


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


class Identity(torch.nn.Module):
    def forward(self, x, *args, **kwargs):
        return (x,)


@pytest.mark.parametrize("form", ["t", "timestep", "second"])
def test_ways_to_give_a_timestep(form):
    model = Identity()
    magcache.apply_magcache(model, magcache.plan_steps([0, 2], 4, "reuse", calls_per_step=1))
    for _ in range(2):
        for step, expected in enumerate((0, 0, 2, 2)):
            timestep = torch.tensor(900 - step)
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
    cache = magcache.apply_magcache(model, warm)
    with pytest.warns(UserWarning, match=f"plan with calls_per_step={1 + guidance}") as caught:
        assert torch.equal(denoise(model, guidance=guidance), plain)
    assert len(caught) == 1
    assert len(calls) == STEPS * (1 + guidance) * 3
    assert len(cache.log) <= 3
    assert not any(cache.kept)
    magcache.apply_magcache(model, make_schedule(target, calls_per_step=1 + guidance))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoise(model, guidance=guidance)


def test_a_calibration_without_guidance_is_refused(model):
    calibration = magcache.apply_calibration(model, STEPS)
    with pytest.warns(UserWarning, match="calls_per_step=1"):
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
    model, schedule = Identity(), make_schedule("output", steps, calls_per_step)
    cache = magcache.apply_magcache(model, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, timestep, _ in itertools.product(range(2), timesteps, range(calls_per_step)):
            model(torch.zeros(1), timestep)
    assert tuple(skipped for _, skipped, _ in cache.log) == 2 * schedule.reuse


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
    for bad in (Chain(between=lambda x: 2 * x), Chain(given=lambda i: (torch.ones(1),))):
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
    with pytest.raises(TypeError, match=r"or is compiled as a whole: use output forecasts \(magcache.plan_speedup\)"):
        ATTACHMENTS[attach](compile_it(model))


@pytest.mark.parametrize("compile_it", [compiled, compiled_in_place])
def test_forecasts_on_a_compiled_model(compile_it, model):
    schedule = make_schedule("output")
    expected, model = by_hand(model, schedule), compile_it(model)
    cache = magcache.apply_magcache(model, schedule)
    torch.testing.assert_close(denoise(model), expected)
    assert tuple(skipped for _, skipped, _ in cache.log) == schedule.reuse


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
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.requires_grad_(False)


def fused_lora(model, folder):
    lora(model, folder)
    model.fuse_lora()


def bfloat16(model, folder):
    model.to(torch.bfloat16)


TOGETHER = (group_offload, leaf_offload, layerwise_casting, compile_blocks, lora, fused_lora)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", TOGETHER)
def test_together(change, order, target, model, tmp_path):
    """`order`: of the change, as seen from the cache."""
    schedule, twin = make_schedule(target), copy.deepcopy(model)
    change(twin, tmp_path / "twin")
    expected = denoise(ByHand(twin, schedule))
    changes, plain = [change] if order == "before" else [], denoise(model)
    for step in (*changes, None, *([change] if order == "after" else [])):
        if step is None:
            cache = magcache.apply_magcache(model, schedule)
        else:
            step(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(denoise(model), expected)
    assert tuple(skipped for _, skipped, _ in cache.log) == 2 * schedule.reuse
    magcache.remove_magcache(model)
    alone = denoise(model)
    assert not torch.equal(alone, expected)
    assert torch.equal(alone, plain) == (change in (group_offload, leaf_offload, compile_blocks))
