"""The full-size models without their weights: fake tensors carry shapes and dtypes only, so 14B fits a laptop."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import magcache
from wan.configs import SIZE_CONFIGS, WAN_CONFIGS
from wan.modules.model import WanModel

FRAMES = 81
SCHEDULE = magcache.Schedule((None, None, (1.0,), (1.0,)))


@pytest.mark.parametrize(
    ("task", "size", "tokens", "gigabytes"),
    [
        ("t2v-1.3B", "832*480", 32760, 0.201),
        ("t2v-1.3B", "1280*720", 75600, 0.464),
        ("t2v-14B", "832*480", 32760, 0.671),
        ("t2v-14B", "1280*720", 75600, 1.548),
    ],
)
def test_computed_and_reused_forward(task, size, tokens, gigabytes):
    config, (width, height) = WAN_CONFIGS[task], SIZE_CONFIGS[size]
    latent_shape = (16, (FRAMES - 1) // 4 + 1, height // 8, width // 8)
    keys = ("text_len", "dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "eps")
    with FakeTensorMode(), torch.no_grad():
        model = WanModel("t2v", **{key: config[key] for key in keys})
        cache, calls, peak = magcache.apply_magcache(model, SCHEDULE), [], []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out: calls.append(out))
        model.head.register_forward_pre_hook(
            lambda module, args: peak.append(sum(r.nbytes for branch in cache.residuals for r in branch))
        )
        for call in range(4):
            latent, context = torch.empty(latent_shape), torch.empty(77, 4096)
            (out,) = model([latent], t=torch.tensor([999 - call // 2]), context=[context], seq_len=tokens)
            assert out.shape == latent_shape
            assert out.dtype == torch.float32
            assert len(calls) == config.num_layers * min(call + 1, 2)
        assert {x.shape for x in calls} == {(1, tokens, config.dim)}
    assert max(peak) == 2 * tokens * config.dim * 4  # one float32 residual per branch
    assert max(peak) / 2e9 == pytest.approx(gigabytes, abs=1e-3)
    assert not any(cache.residuals)


@pytest.mark.parametrize(("task", "billions"), [("t2v-1.3B", 1.42), ("t2v-14B", 14.29)])
def test_parameter_count(task, billions):
    config = WAN_CONFIGS[task]
    with torch.device("meta"):
        model = WanModel(
            dim=config.dim, ffn_dim=config.ffn_dim, num_heads=config.num_heads, num_layers=config.num_layers
        )
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
