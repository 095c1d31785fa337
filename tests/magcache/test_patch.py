"""What attaching a schedule to a model does, and that it leaves nothing behind; on the transformer of upstream's shape
and, where there is one, on this repository's."""

import contextlib
import copy
import gc
import io
import pickle
import threading
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import stock_model
import torch
from torch.distributed import fsdp
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import magcache

STEPS = 12
PLAN = {"thresh": 0.3, "K": 3, "retention_ratio": 0.2}
SIZES = {"dim": 24, "text_dim": 8, "text_len": 6, "num_layers": 3}
MODELS = {"stock": lambda: stock_model.WanModel(**SIZES)}
with contextlib.suppress(ImportError):  # the magcache package is tested without ours, too
    from wan.modules.model import WanModel

    MODELS["ours"] = lambda: WanModel(**SIZES, ffn_dim=32, freq_dim=16, num_heads=2)


def make_model(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval().requires_grad_(False)


def make_schedule(steps=STEPS):
    return magcache.plan(magcache.load_ratios("t2v-1.3B"), steps, **PLAN)


@torch.no_grad()
def denoise(model, steps=STEPS, seed=0, shift=5.0, stop_after=None):
    """Euler's method with guidance 5; `stop_after` abandons the run after so many steps."""
    generator = torch.Generator().manual_seed(seed)
    latent, *contexts = (torch.randn(shape, generator=generator) for shape in ((16, 2, 4, 4), (5, 8), (3, 8)))
    for sigma, following in [*pairwise((*magcache.noise_levels(steps, shift), 0.0))][:stop_after]:
        t = torch.tensor([int(1000 * sigma)])
        cond, uncond = (model([latent], t=t, context=[context], seq_len=8)[0] for context in contexts)
        latent = latent + (following - sigma) * (uncond + 5 * (cond - uncond))
    return latent


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return make_model(kind)


def two_experts(kind):
    """Different ones, and what calls one or the other by the timestep, from 850 on the first."""
    high, low = make_model(kind), make_model(kind)
    with torch.no_grad():
        for p in low.parameters():
            p.mul_(1.1)
    return (high, low), experts_called(high, low)


def experts_called(high, low, boundary=850):
    return lambda x, t, **given: (high if t >= boundary else low)(x, t=t, **given)


def count_block_calls(model):
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: calls.append(module))
    return calls


def kept(cache):
    return [len(branch) for branch in cache.kept]


TARGETS = ("residual", "output")


def make_schedules():
    return {"residual": make_schedule(), "output": magcache.plan_speedup(STEPS, 2)}


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_schedule_changes_nothing(model, target):
    plain = denoise(model)
    magcache.apply_magcache(model, magcache.Schedule((None,) * 2 * STEPS, target=target))
    assert torch.equal(denoise(model), plain)


def test_reuse_is_the_block_free_forward(model):
    """Every reused call against the same forward with the residual added by hand."""
    schedule, inputs, outputs = make_schedule(), [], []
    magcache.apply_magcache(model, schedule)
    model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda module, args, out: outputs.append(out))
    embedded, heads = [], []
    model.patch_embedding.register_forward_hook(lambda m, a, out: embedded.append(out.flatten(2).transpose(1, 2)))
    model.head.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    denoise(model)
    last, computed = [None, None], iter(zip(inputs, outputs, strict=True))
    for call, reuse in enumerate(schedule.reuse):
        if not reuse:
            before, after = next(computed)
            last[call % 2] = after - before
            assert torch.equal(heads[call], after)
        else:
            assert torch.equal(heads[call], embedded[call] + last[call % 2])


def test_forecasts_are_the_combinations_that_the_schedule_says(model):
    """Every output against the formula, from those of the computed calls; on the others nothing of the model runs."""
    schedule, outputs, ran = make_schedules()["output"], [], []
    magcache.apply_magcache(model, schedule)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: ran.append(module))
    answer = type(model).__call__

    def recorded(*args, **kwargs):
        before = len(ran)
        outputs.append((answer(model, *args, **kwargs), len(ran) - before))
        return outputs[-1][0]

    denoise(recorded)
    computed = [[], []]  # per branch, newest first
    for call, (weights, (output, count)) in enumerate(zip(schedule.weights, outputs, strict=True)):
        branch = computed[call % 2]
        assert isinstance(output, list)
        assert (count == 0) == (weights is not None)
        if weights is None:
            branch.insert(0, output[0])
        else:
            expected = sum(w * v.double() for w, v in zip(weights, branch, strict=False))
            torch.testing.assert_close(output[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_outputs_of_any_structure_and_dtype():
    """A tuple with a bfloat16 tensor comes back as one; what the caller changes in place does not reach the cache."""

    class Double(torch.nn.Module):
        def forward(self, x, t):
            return 2 * x, {"more": x.bfloat16()}

    model = Double()
    magcache.apply_magcache(model, magcache.plan_steps([0, 2], 4, "reuse", calls_per_step=1))
    x, seen = torch.ones(3), []
    for level in magcache.noise_levels(4, 5.0):
        out, more = model(x, torch.tensor([level]))
        seen.append((out.clone(), more["more"].clone()))
        out.zero_()
        more["more"].zero_()
        x = x + 1
    for step, value in enumerate((1, 1, 3, 3)):
        assert torch.equal(seen[step][0], torch.full((3,), 2.0 * value))
        assert torch.equal(seen[step][1], torch.full((3,), value, dtype=torch.bfloat16))


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_run_as_planned(model, target):
    schedule, calls = make_schedules()[target], count_block_calls(model)
    told = []
    magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    denoise(model)
    assert sum(schedule.reuse) > 0
    assert len(calls) == schedule.computed * len(model.blocks)
    assert told == [*enumerate(schedule.reuse)]


def test_who_is_told_may_stop_the_run(model):
    schedule, told = make_schedule(), []

    def stop(call, reused):
        told.append(call)
        if told.count(call) == 1 and call == 9:
            raise RuntimeError("stopped")

    cache = magcache.apply_magcache(model, schedule, on_call=stop)
    with pytest.raises(RuntimeError, match="stopped"):
        denoise(model)
    assert kept(cache) == [0, 0]
    denoise(model)
    assert told == [*range(10), *range(2 * STEPS)]


def test_remove_restores_the_instance_exactly(model):
    plain, before, own_class = denoise(model), dict(model.__dict__), type(model)
    magcache.remove_magcache(model)  # nothing there yet
    magcache.apply_magcache(model, make_schedule())
    assert not torch.equal(denoise(model), plain)
    magcache.apply_magcache(model, make_schedule())  # on top of itself
    magcache.remove_magcache(model)
    assert model.__dict__ == before
    assert type(model) is own_class
    assert torch.equal(denoise(model), plain)


def test_the_class_and_other_instances_are_untouched(kind):
    model, other, third = make_model(kind), make_model(kind), make_model(kind)
    plain = denoise(third)
    magcache.apply_magcache(model, make_schedule())
    magcache.apply_magcache(other, magcache.plan(magcache.load_ratios("t2v-14B"), STEPS, 0.06, 1))
    alone = denoise(model), denoise(other)
    assert not torch.equal(*alone)
    assert torch.equal(denoise(third), plain)

    original, results = make_model(kind), []
    for schedule in (make_schedule(), magcache.plan(magcache.load_ratios("t2v-14B"), STEPS, 0.06, 1)):
        magcache.apply_magcache(original, schedule)
        results.append(denoise(original))
    assert torch.equal(results[0], alone[0])
    assert torch.equal(results[1], alone[1])


@pytest.mark.parametrize("target", TARGETS)
def test_a_deep_copy_is_a_model_of_its_own(model, target):
    magcache.apply_magcache(model, make_schedules()[target])
    expected = denoise(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(denoise(twin), expected)


def denoise_in_threads(call, seeds):
    """What runs of these seeds give, each in a thread of its own, at the same time."""
    with ThreadPoolExecutor(len(seeds)) as pool:
        return list(pool.map(lambda seed: denoise(call, seed=seed), seeds))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sigmas", [None, magcache.noise_levels(STEPS, 5.0)], ids=["any levels", "known levels"])
def test_runs_of_two_threads_at_the_same_time_are_not_mixed(model, target, sigmas):
    plain = [denoise(model, seed=seed) for seed in (0, 1)]
    weights = make_schedules()[target].weights
    magcache.apply_magcache(model, magcache.Schedule(weights, target=target, sigmas=sigmas))
    cached = [denoise(model, seed=seed) for seed in (0, 1)]
    turns = threading.Barrier(2)

    def in_turns(*args, **kwargs):
        turns.wait(timeout=30)
        return model(*args, **kwargs)

    with pytest.warns(UserWarning, match="another thread has called the model within this run; the run is computed"):
        both = denoise_in_threads(in_turns, (0, 1))
    first = 0 if torch.allclose(both[0], plain[0]) else 1
    torch.testing.assert_close(both[first], plain[first])
    torch.testing.assert_close(both[1 - first], cached[1 - first])


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_of_another_thread_is_cached_like_any_other(model, target):
    magcache.apply_magcache(model, make_schedules()[target])
    denoise(model, seed=1, stop_after=7)
    with warnings.catch_warnings(record=True):
        expected = denoise(model)
        (other,) = denoise_in_threads(model, [0])
    torch.testing.assert_close(other, expected)


# Two experts that share a run: the first six of the twelve steps at shift 5 are of high noise


def shared_schedule(target, boundary=0.85):
    computed = {0, 2, 4, 6, 9, 10}
    forecast = "linear" if target == "output" else "reuse"
    return magcache.plan_steps(computed, STEPS, forecast, target=target, boundary=boundary)


@pytest.mark.parametrize("target", TARGETS)
def test_two_experts_share_a_run_and_nothing_else(kind, target):
    models, called = two_experts(kind)
    schedule, plain = shared_schedule(target), denoise(called)
    assert schedule.switch == 6
    told, counts = [], [count_block_calls(model) for model in models]
    cache = magcache.apply_magcache([*models], schedule, on_call=lambda *call: told.append(call))
    cached = denoise(called)
    assert told == [*enumerate(schedule.reuse)]
    assert [len(calls) for calls in counts] == [2 * 3 * 3, 2 * 3 * 3]
    assert kept(cache) == [0, 0]
    assert not torch.equal(cached, plain)
    magcache.apply_magcache([*models], magcache.Schedule((None,) * 24, target=target))
    full = denoise(called)
    magcache.remove_magcache([*models])
    assert torch.equal(denoise(called), full)


@pytest.mark.parametrize("target", TARGETS)
def test_experts_that_switch_elsewhere_are_said_once_and_the_run_computed(kind, target):
    models, _ = two_experts(kind)
    magcache.apply_magcache([*models], shared_schedule(target))
    for boundary, step, wrong in ((800, 7, "first"), (890, 6, "second"), (0, 7, "first"), (1001, 1, "second")):
        called = experts_called(*models, boundary)
        with pytest.warns(UserWarning, match=f"step {step} of this run calls the {wrong} transformer") as caught:
            found = denoise(called)
        assert sum("computed in full from here" in str(warning.message) for warning in caught) == 1
        if wrong == "second" and step == 1:
            magcache.remove_magcache(models[0])
            assert torch.equal(denoise(called), found)


@pytest.mark.parametrize("taken_from", [0, 1, None])
def test_taken_off_either_it_is_off_both(kind, taken_from):
    models, called = two_experts(kind)
    plain, before = denoise(called), [(type(model), dict(model.__dict__)) for model in models]
    magcache.apply_magcache(models, shared_schedule("output"))
    cached, twins = denoise(called), copy.deepcopy(models)
    magcache.remove_magcache(models if taken_from is None else models[taken_from])
    assert [(type(model), model.__dict__) for model in models] == before
    assert torch.equal(denoise(called), plain)
    assert torch.equal(denoise(experts_called(*twins)), cached)
    magcache.remove_magcache(twins[1])
    assert torch.equal(denoise(experts_called(*twins)), plain)
    magcache.apply_magcache(models, shared_schedule("output"))
    magcache.apply_magcache(models[0], make_schedule())  # of one, in place of both
    assert type(models[1]) is before[1][0]


def test_a_cache_for_other_than_one_or_two(model):
    twin = copy.deepcopy(model)
    for models, schedule, message in (
        ([model, model], shared_schedule("output"), "one transformer, or for two instances"),
        ([model, twin, copy.deepcopy(model)], shared_schedule("output"), "not for 3"),
        (model, shared_schedule("output"), "a schedule with a boundary is for the two .* there is 1"),
        ([model, twin], make_schedule(), "one without for one; there are 2"),
    ):
        with pytest.raises(ValueError, match=message):
            magcache.apply_magcache(models, schedule)
    assert "_magcache" not in model.__dict__


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stop_after", [2, 5, 9])
def test_a_run_after_an_abandoned_one_starts_clean(model, stop_after, target):
    magcache.apply_magcache(model, make_schedules()[target])
    fresh = denoise(model)
    denoise(model, seed=1, stop_after=stop_after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(denoise(model), fresh)
    said = [str(warning.message) for warning in caught if warning.filename == __file__]
    if target == "output":  # whose schedule knows the noise levels, and so that the run was only stopped
        assert said == []
    else:
        assert [f"ended after {2 * stop_after} of 24 transformer calls" in line for line in said] == [True]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calls", [0, 1, 2, 7])
def test_a_run_after_a_failed_call_starts_clean(model, calls, target):
    cache = magcache.apply_magcache(model, make_schedules()[target])
    fresh = denoise(model)
    left = [calls * 3 + 1]  # fails inside the stack, Ctrl-C included

    def interrupt(module, args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    hooks = [block.register_forward_pre_hook(interrupt) for block in model.blocks]
    with pytest.raises(KeyboardInterrupt):
        denoise(model, seed=1)
    for hook in hooks:
        hook.remove()
    assert kept(cache) == [0, 0]
    assert isinstance(model.blocks, torch.nn.ModuleList)
    assert torch.equal(denoise(model), fresh)


def test_an_abort_within_the_first_step_is_cleared_by_applying_again(model):
    magcache.apply_magcache(model, make_schedule())
    fresh = denoise(model)
    denoise(model, stop_after=1)
    magcache.apply_magcache(model, make_schedule())
    assert torch.equal(denoise(model), fresh)


def test_runs_of_one_step(model):
    magcache.apply_magcache(model, make_schedule(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the schedule")
        assert torch.equal(denoise(model, 1), denoise(model, 1))


def test_steps_that_share_a_timestep(model):
    assert len({int(1000 * sigma) for sigma in magcache.noise_levels(100, 16.0)}) < 100
    schedule, calls = make_schedule(100), count_block_calls(model)
    magcache.apply_magcache(model, schedule)
    for _ in range(2):
        calls.clear()
        denoise(model, 100, shift=16.0)
        assert len(calls) == schedule.computed * len(model.blocks)


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_with_a_cache_is_not_pickled(model, target):
    magcache.apply_magcache(model, make_schedules()[target])
    for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(
            TypeError, match=r"cannot be pickled: remove it first, by magcache.remove_magcache\(model\)"
        ):
            save(model)
    torch.save(model.state_dict(), io.BytesIO())
    magcache.remove_magcache(model)
    assert "__reduce_ex__" not in vars(type(model))


def test_calls_beyond_the_schedule_are_computed_and_said_once(model):
    cache, calls = magcache.apply_magcache(model, make_schedule(5)), count_block_calls(model)
    with pytest.warns(UserWarning, match="the schedule ends after 10 transformer calls") as caught:
        denoise(model, 12)
    assert sum("the schedule" in str(warning.message) for warning in caught) == 1
    assert len(calls) == 3 * (make_schedule(5).computed + 14)
    assert kept(cache) == [0, 0]


def test_one_residual_per_branch_and_none_while_the_next_is_computed(model):
    cache, seen, alive = magcache.apply_magcache(model, make_schedule()), [], weakref.WeakSet()

    def watch(module, args):
        branch = model._magcache.served.call % 2
        seen.append(kept(cache))
        assert not cache.kept[branch]
        alive.update(residual for branch in cache.kept for residual in branch)

    model.blocks[0].register_forward_pre_hook(watch)
    denoise(model)
    assert max(max(counts) for counts in seen) == 1
    gc.collect()
    assert kept(cache) == [0, 0]
    assert not alive


def test_two_outputs_per_branch_at_most_and_one_while_the_next_is_computed(model):
    cache, seen, alive = magcache.apply_magcache(model, make_schedules()["output"]), [], []

    def watch(module, args):
        seen.append(kept(cache))
        alive.extend(weakref.ref(tensor) for branch in cache.kept for tensors in branch for tensor in tensors)

    model.blocks[0].register_forward_pre_hook(watch)
    denoise(model)
    assert max(map(max, seen)) == 2  # in the other branch
    assert max(counts[call % 2] for call, counts in enumerate(seen)) == 1
    gc.collect()
    assert kept(cache) == [0, 0]
    assert alive
    assert not [tensor for tensor in alive if tensor() is not None]


@pytest.mark.parametrize("target", TARGETS)
def test_dtype_and_device_of_the_cache(model, target):
    schedule = make_schedules()[target]
    magcache.apply_magcache(model, schedule)
    exact = denoise(model)
    cache = magcache.apply_magcache(model, schedule, dtype=torch.bfloat16, device="cpu")
    dtypes = []

    def watch(module, args):
        for content in (content for branch in cache.kept for content in branch):
            dtypes.extend(tensor.dtype for tensor in (content if target == "output" else [content]))

    model.blocks[0].register_forward_pre_hook(watch)
    rounded = denoise(model)
    assert set(dtypes) == {torch.bfloat16}
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_the_cache_waits_on_its_device(model):
    """The meta device shows that the residual was moved; on "cpu" a CPU test could not tell."""
    cache = magcache.apply_magcache(model, magcache.Schedule((None, None, (1.0,), (1.0,))), device="meta")
    denoise(model, 2, stop_after=1)
    assert {residual.device.type for branch in cache.kept for residual in branch} == {"meta"}


def test_hooks_that_replace_the_forward_come_and_go(model):
    """accelerate's do, and diffusers' offloading; before or after makes no difference."""
    hooks = pytest.importorskip("accelerate.hooks")
    plain = denoise(model)
    magcache.apply_magcache(model, make_schedule())
    cached = denoise(model)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    assert torch.equal(denoise(model), cached)
    magcache.remove_magcache(model)
    assert torch.equal(denoise(model), plain)
    magcache.apply_magcache(model, make_schedule())
    hooks.remove_hook_from_module(model)
    assert torch.equal(denoise(model), cached)


def test_a_class_changed_after_applying_is_not_lost(model):
    """As `fully_shard` does."""
    magcache.apply_magcache(model, make_schedule())
    model.__class__ = type("Sharded", (type(model),), {})
    for undo in (magcache.remove_magcache, lambda m: magcache.apply_magcache(m, make_schedule())):
        with pytest.raises(RuntimeError, match="class was changed after apply_magcache"):
            undo(model)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", [1, 2])
def test_under_fsdp(version, target, model, tmp_path):
    """One process: the wrappers and their hooks are real. A reused call runs no block, a forecast none of the hooks
    that gather weights."""
    if version == 2 and not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no public FSDP2")
    plan = make_schedules()[target]
    magcache.apply_magcache(model, plan)
    expected = denoise(model)
    magcache.remove_magcache(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if version == 1:
            policy = ModuleWrapPolicy({type(model.blocks[0])})
            device = torch.device("cpu")
            sharded = fsdp.FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device)
        else:
            for block in model.blocks:
                fsdp.fully_shard(block)
            sharded = fsdp.fully_shard(model)
        calls, entered = count_block_calls(magcache.patch.find_dit(sharded)), []
        sharded.register_forward_pre_hook(lambda module, args: entered.append(module), prepend=True)
        magcache.apply_magcache(sharded, plan)
        torch.testing.assert_close(denoise(sharded), expected)
        assert len(calls) == 3 * plan.computed
        assert len(entered) == (plan.computed if target == "output" else 2 * STEPS)
        magcache.remove_magcache(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_an_instance_with_its_own_forward(model):
    """As sequence parallelism sets it: the instance carries a forward that the class does not know."""
    plain, calls = denoise(model), count_block_calls(model)

    def own_forward(self, x, t, context, seq_len):
        return [2 * u for u in type(self).forward(self, x, t, context, seq_len)]

    model.forward = types.MethodType(own_forward, model)
    doubled, method = denoise(model), model.__dict__["forward"]
    calls.clear()
    schedule = make_schedule()
    magcache.apply_magcache(model, schedule)
    cached = denoise(model)
    assert len(calls) == 3 * schedule.computed
    assert not torch.equal(cached, doubled)
    magcache.remove_magcache(model)
    assert model.__dict__["forward"] is method
    assert torch.equal(denoise(model), doubled)
    assert not torch.equal(doubled, plain)


def test_a_wrapped_model(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    magcache.apply_magcache(model, make_schedule())
    expected = denoise(model)
    magcache.remove_magcache(model)
    wrapped = Wrapper(model)
    magcache.apply_magcache(wrapped, make_schedule())
    assert torch.equal(denoise(wrapped), expected)


def test_hints_are_not_computed_on_reuse(model):
    """A VACE forward asks `forward_vace` for the hints before it loops over the blocks."""
    asked = []

    class Vace(type(model)):
        def forward_vace(self):
            asked.append(1)

        def forward(self, *args, **kwargs):
            self.forward_vace()
            return super().forward(*args, **kwargs)

    model.__class__ = Vace
    schedule = make_schedule()
    magcache.apply_magcache(model, schedule)
    denoise(model)
    assert len(asked) == schedule.computed


def test_models_without_blocks_are_refused():
    for attach in (lambda m: magcache.apply_magcache(m, make_schedule()), lambda m: magcache.apply_calibration(m, 9)):
        with pytest.raises(TypeError, match="blocks"):
            attach(torch.nn.Linear(2, 2))


@pytest.mark.skipif("ours" not in MODELS, reason="needs this repository's wan")
def test_under_autocast():
    """The dtypes of a run on CUDA: bfloat16 inside the blocks, float32 between them and in the cache."""
    model = make_model("ours")
    with torch.autocast("cpu", torch.bfloat16):
        plain = denoise(model)
        magcache.apply_magcache(model, magcache.Schedule((None,) * 2 * STEPS))
        assert torch.equal(denoise(model), plain)
        cache, dtypes = magcache.apply_magcache(model, make_schedule()), []
        model.head.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
        model.head.register_forward_hook(lambda m, a, out: dtypes.extend(r.dtype for b in cache.kept for r in b))
        cached = denoise(model)
    assert set(dtypes) == {torch.float32}
    assert cached.dtype == torch.float32
    assert not torch.equal(cached, plain)
