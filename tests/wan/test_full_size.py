"""The full-size models without their weights: fake tensors carry shapes and dtypes only, so 14B fits a laptop."""

import pytest
import torch
from full_size import VACE_LAYERS, conditioning, make_model
from torch._subclasses.fake_tensor import FakeTensorMode

import magcache
from magcache.app import cost
from magcache.app.tasks import TASKS
from wan.configs import SIZE_CONFIGS, WAN_CONFIGS

FRAMES = 81
SCHEDULE = magcache.Schedule((None, None, (1.0,), (1.0,)))


@pytest.mark.parametrize(
    ("task", "size", "tokens", "gigabytes"),
    [
        ("t2v-1.3B", "832*480", 32760, 0.201),
        ("t2v-1.3B", "1280*720", 75600, 0.464),
        ("t2v-14B", "832*480", 32760, 0.671),
        ("t2v-14B", "1280*720", 75600, 1.548),
        ("i2v-14B", "832*480", 32760, 0.671),
        ("i2v-14B", "1280*720", 75600, 1.548),
        ("flf2v-14B", "1280*720", 75600, 1.548),
        ("vace-1.3B", "832*480", 32760, 0.201),
        ("vace-14B", "1280*720", 75600, 1.548),
    ],
)
def test_computed_and_reused_forward(task, size, tokens, gigabytes):
    config, (width, height) = WAN_CONFIGS[task], SIZE_CONFIGS[size]
    latent_shape = (16, (FRAMES - 1) // 4 + 1, height // 8, width // 8)
    with FakeTensorMode(), torch.no_grad():
        model = make_model(task)
        control = conditioning(task, latent_shape)
        blocks = [*model.blocks, *(model.vace_blocks if task in VACE_LAYERS else ())]
        cache, calls, peak = magcache.apply_magcache(model, SCHEDULE), [], []
        for block in blocks:
            block.register_forward_hook(lambda module, args, out: calls.append(out))
        model.head.register_forward_pre_hook(
            lambda module, args: peak.append(sum(r.nbytes for branch in cache.kept for r in branch))
        )
        for call in range(4):
            latent, context = torch.empty(latent_shape), torch.empty(77, 4096)
            (out,) = model([latent], t=torch.tensor([999 - call // 2]), context=[context], seq_len=tokens, **control)
            assert out.shape == latent_shape
            assert out.dtype == torch.float32
            assert len(calls) == len(blocks) * min(call + 1, 2)
        outputs = [x for out in calls for x in (out if isinstance(out, tuple) else (out,))]  # vace: tokens and hint
        assert {x.shape for x in outputs} == {(1, tokens, config.dim)}
    assert max(peak) == cost.cached_bytes(SCHEDULE, TASKS[task].architecture, tokens)  # one per branch, in float32
    assert max(peak) / 2e9 == pytest.approx(gigabytes, abs=1e-3)
    assert not any(cache.kept)


@pytest.mark.parametrize(("task", "size"), [("t2v-14B", "1280*720"), ("vace-14B", "832*480")])
def test_forecasts_hold_outputs_only(task, size):
    """At most 80 MB, all branches together, whatever the width of the model."""
    width, height = SIZE_CONFIGS[size]
    latent_shape = (16, (FRAMES - 1) // 4 + 1, height // 8, width // 8)
    schedule = magcache.plan_steps((0, 1, 3), 4)
    with FakeTensorMode(), torch.no_grad():
        model = make_model(task)
        control, held, ran = conditioning(task, latent_shape), [], []
        cache = magcache.apply_magcache(model, schedule)
        model.register_forward_hook(lambda module, args, out: ran.append(module))
        for call in range(8):
            latent, context = torch.empty(latent_shape), torch.empty(77, 4096)
            t = torch.tensor([int(1000 * schedule.sigmas[call // 2])])
            tokens = latent[0].numel() // 4
            (out,) = model([latent], t=t, context=[context], seq_len=tokens, **control)
            assert (out.shape, out.dtype) == (latent_shape, torch.float32)
            held.append(sum(v.nbytes for branch in cache.kept for output in branch for v in output))
    assert len(ran) == schedule.computed
    assert max(held) == cost.cached_bytes(schedule, TASKS[task].architecture, tokens) < 80e6
    assert held[-1] == 0


BILLIONS = {"t2v-1.3B": 1.42, "t2v-14B": 14.29, "i2v-14B": 16.395, "flf2v-14B": 16.396, "vace-1.3B": 2.15}


@pytest.mark.parametrize(("task", "billions"), (BILLIONS | {"vace-14B": 17.34}).items())
def test_parameter_count(task, billions):
    with torch.device("meta"):
        model = make_model(task)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
