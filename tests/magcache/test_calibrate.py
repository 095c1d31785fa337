"""What a calibration measures on a transformer of upstream's shape, by formulas of its own, and the table of it."""

import numpy as np
import pytest
import stock_model
import torch
from test_patch import STEPS, denoise

import magcache


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = stock_model.WanModel(dim=24, text_dim=8, text_len=6, num_layers=3).eval()
    return model.requires_grad_(False)


def residuals_of(model):
    """By call, [tokens, C]."""
    ins, outs = [], []
    model.blocks[0].register_forward_pre_hook(lambda module, args: ins.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda module, args, out: outs.append(out))
    denoise(model)
    return [(out - x)[0].double().numpy() for x, out in zip(ins, outs, strict=True)]


def test_lists(model):
    residuals = residuals_of(model)
    calibration = magcache.apply_calibration(model, STEPS)
    plain = denoise(model)
    lists = calibration.lists()
    for call in range(2, 2 * STEPS):
        now, before = residuals[call], residuals[call - 2]
        norms = np.linalg.norm(now, axis=1), np.linalg.norm(before, axis=1)
        ratio = norms[0] / norms[1]
        cosine = (now * before).sum(axis=1) / norms[0] / norms[1]
        expected = ratio.mean(), ratio.std(ddof=1), (1 - cosine).mean()
        assert [lists[key][call - 2] for key in ("mag_ratio", "mag_std", "cos_dis")] == pytest.approx(
            expected, abs=1e-5
        )
    magcache.remove_magcache(model)
    assert torch.equal(denoise(model), plain)


def test_a_run_that_is_not_complete_has_no_lists(model):
    calibration = magcache.apply_calibration(model, STEPS)
    with pytest.raises(RuntimeError, match="stopped after"):
        calibration.lists()
