"""What attaching a schedule to a model does, and that it leaves nothing behind."""

import copy
import gc
import io
import pickle
import threading
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pretended_card import PretendedCard
from tiny_models import MODELS, STEPS, TARGETS, ByHand, by_hand, count_block_calls, denoise, make_model, make_schedule
from torch.distributed import fsdp
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import magcache


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


def kept(cache):
    return [len(branch) for branch in cache.kept]


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_schedule_changes_nothing(model, target):
    plain = denoise(model)
    magcache.apply_magcache(model, magcache.Schedule((None,) * 2 * STEPS, target=target))
    assert torch.equal(denoise(model), plain)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_a_schedule(model, target, guidance):
    """Against the rule by hand, twice. A reused call runs no block, and a forecast nothing at all."""
    schedule = make_schedule(target, calls_per_step=1 + guidance)
    expected, calls, outside, told = by_hand(model, schedule, guidance=guidance), count_block_calls(model), [], []
    for module in (model.patch_embedding, model.head):
        module.register_forward_hook(lambda module, args, out: outside.append(module))
    cache = magcache.apply_magcache(model, schedule, on_call=lambda *call: told.append(call))
    assert 0 < schedule.computed < len(schedule.weights)
    for _ in range(2):
        torch.testing.assert_close(denoise(model, guidance=guidance), expected)
        assert not any(cache.kept)
    assert len(calls) == 2 * schedule.computed * len(model.blocks)
    assert len(outside) == 2 * 2 * (schedule.computed if target == "output" else len(schedule.weights))
    assert told == 2 * [*enumerate(schedule.reuse)]


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
    magcache.apply_magcache(model, make_schedule(target))
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
    weights = make_schedule(target).weights
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
    magcache.apply_magcache(model, make_schedule(target))
    denoise(model, seed=1, part=slice(5))
    with warnings.catch_warnings(record=True):
        expected = denoise(model)
        (other,) = denoise_in_threads(model, [0])
    torch.testing.assert_close(other, expected)


# Two experts that share a run: the first four of the eight steps at shift 5 are of high noise


def shared_schedule(target, boundary=0.85):
    forecast = "linear" if target == "output" else "reuse"
    return magcache.plan_steps({0, 2, 4, 6, 7}, STEPS, forecast, target=target, boundary=boundary)


@pytest.mark.parametrize("target", TARGETS)
def test_two_experts_share_a_run_and_nothing_else(kind, target):
    models, called = two_experts(kind)
    schedule, twins = shared_schedule(target), copy.deepcopy(models)
    assert schedule.switch == 4
    told, counts = [], [count_block_calls(model) for model in models]
    cache = magcache.apply_magcache([*models], schedule, on_call=lambda *call: told.append(call))
    torch.testing.assert_close(denoise(called), denoise(ByHand(experts_called(*twins), schedule, twins)))
    assert told == [*enumerate(schedule.reuse)]
    assert [len(calls) for calls in counts] == [2 * 2 * 3, 2 * 3 * 3]
    assert kept(cache) == [0, 0]
    magcache.apply_magcache([*models], magcache.Schedule((None,) * 2 * STEPS, target=target))
    full = denoise(called)
    magcache.remove_magcache([*models])
    assert torch.equal(denoise(called), full)


@pytest.mark.parametrize("target", TARGETS)
def test_experts_that_switch_elsewhere_are_said_once_and_the_run_computed(kind, target):
    models, _ = two_experts(kind)
    magcache.apply_magcache([*models], shared_schedule(target))
    for boundary, step, wrong in ((800, 5, "first"), (900, 4, "second"), (0, 5, "first"), (1001, 1, "second")):
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


@pytest.mark.parametrize(("stop_after", "side"), [(2, 4), (5, 4), (1, 6)])
def test_a_run_after_an_abandoned_one_starts_clean(model, stop_after, side):
    """By a schedule that knows no noise levels, and so not that the run was only stopped."""
    magcache.apply_magcache(model, magcache.Schedule(make_schedule().weights))
    fresh = denoise(model)
    denoise(model, seed=1, part=slice(stop_after), side=side)
    with pytest.warns(UserWarning, match=f"ended after {2 * stop_after} of 16 transformer calls"):
        assert torch.equal(denoise(model), fresh)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_a_run_after_a_failed_call_starts_clean(model, calls, target):
    cache = magcache.apply_magcache(model, make_schedule(target))
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
    fresh = []
    for part in (slice(None), slice(1), slice(None)):
        magcache.apply_magcache(model, magcache.Schedule(make_schedule().weights))
        fresh.append(denoise(model, part=part))
    assert torch.equal(fresh[0], fresh[2])


def test_runs_of_one_step(model):
    magcache.apply_magcache(model, make_schedule(steps=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the schedule")
        assert torch.equal(denoise(model, 1), denoise(model, 1))


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_with_a_cache_is_not_pickled(model, target):
    magcache.apply_magcache(model, make_schedule(target))
    for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(
            TypeError, match=r"cannot be pickled: remove it first, by magcache.remove_magcache\(model\)"
        ):
            save(model)
    torch.save(model.state_dict(), io.BytesIO())
    magcache.remove_magcache(model)
    assert "__reduce_ex__" not in vars(type(model))


def test_calls_beyond_the_schedule_are_computed_and_said_once(model):
    schedule = magcache.Schedule(make_schedule(steps=5).weights)
    cache, calls = magcache.apply_magcache(model, schedule), count_block_calls(model)
    with pytest.warns(UserWarning, match="the schedule ends after 10 transformer calls") as caught:
        denoise(model)
    assert sum("the schedule" in str(warning.message) for warning in caught) == 1
    assert len(calls) == 3 * (schedule.computed + 2 * (STEPS - 5))
    assert kept(cache) == [0, 0]


@pytest.mark.parametrize(("target", "most", "own"), [("residual", 1, 0), ("output", 2, 1)])
def test_what_is_kept(model, target, most, own):
    """One residual or two outputs per branch; the oldest goes before the next is computed. After the run none is left.

    own: how many its branch still holds while a call computes.
    """
    cache, seen, alive = magcache.apply_magcache(model, make_schedule(target)), [], []

    def watch(module, args):
        seen.append(kept(cache))
        alive.extend(weakref.ref(tensor) for tensor in torch.utils._pytree.tree_leaves(cache.kept))

    model.blocks[0].register_forward_pre_hook(watch)
    denoise(model)
    computed = [call for call, reused in enumerate(make_schedule(target).reuse) if not reused]
    assert max(map(max, seen)) == most
    assert max(counts[call % 2] for call, counts in zip(computed, seen, strict=True)) == own
    gc.collect()
    assert kept(cache) == [0, 0]
    assert alive and not [tensor for tensor in alive if tensor() is not None]


@pytest.mark.parametrize("target", TARGETS)
def test_dtype_and_device_of_the_cache(model, target):
    schedule = make_schedule(target)
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
    denoise(model, 2, part=slice(1))
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
    plan = make_schedule(target)
    magcache.apply_magcache(model, plan)
    expected = denoise(model)
    magcache.remove_magcache(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if version == 1:
            policy = ModuleWrapPolicy({type(model.blocks[0])})
            device = torch.device("cpu")
            sharded = fsdp.FullyShardedDataParallel(
                model, auto_wrap_policy=policy, device_id=device, use_orig_params=True
            )
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


class Spread(torch.nn.Module):
    """Blocks of which the last is on a card, as diffusers' device_map spreads them; the head takes both."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.blocks[1].forward = lambda x: (x * 0.5).to("cuda:0")

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return 2 * x.cpu()


def test_blocks_on_several_devices():
    calls = [(torch.randn(1, 3, 4), torch.tensor(t)) for t in (900, 500)]
    with PretendedCard(), torch.no_grad():
        model = Spread()
        plain = model(*calls[0])
        magcache.apply_magcache(model, magcache.Schedule((None, (1.0,)), calls_per_step=1))
        found = [model(*call) for call in calls]
        calibration = magcache.apply_calibration(model, 1)
        assert torch.equal(model(*calls[0]), plain)
        assert calibration.ratios == []
    assert torch.equal(found[0], plain)
    torch.testing.assert_close(found[1], plain + 2 * (calls[1][0] - calls[0][0]))
