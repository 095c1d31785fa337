"""What a calibration measures, by formulas of its own."""

import numpy as np
import pytest
import torch
from tiny_models import MODELS, STEPS, denoise, make_model

import magcache


def residuals_of(model):
    """By call, [tokens, C]; and the latent."""
    ins, outs = [], []
    model.blocks[0].register_forward_pre_hook(lambda module, args: ins.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda module, args, out: outs.append(out))
    latent = denoise(model)
    return [(out - x)[0].double().numpy() for x, out in zip(ins, outs, strict=True)], latent


@pytest.mark.parametrize("kind", MODELS)
def test_lists(kind):
    model = make_model(kind)
    residuals, plain = residuals_of(model)
    calibration = magcache.apply_calibration(model, STEPS)
    assert torch.equal(denoise(model), plain)
    lists = calibration.lists()
    for call in range(2, 2 * STEPS):
        now, before = residuals[call], residuals[call - 2]
        norms = np.linalg.norm(now, axis=1), np.linalg.norm(before, axis=1)
        ratio, cosine = norms[0] / norms[1], (now * before).sum(axis=1) / norms[0] / norms[1]
        expected = ratio.mean(), ratio.std(ddof=1), (1 - cosine).mean()
        found = [lists[key][call - 2] for key in ("mag_ratio", "mag_std", "cos_dis")]
        assert found == pytest.approx(expected, abs=1e-5)
    magcache.remove_magcache(model)
    assert torch.equal(denoise(model), plain)


def test_a_run_that_is_not_complete_has_no_lists():
    """Without guidance, for which nothing is measured, it has half of the calls."""
    model = make_model("diffusers")
    calibration = magcache.apply_calibration(model, STEPS)
    with pytest.raises(RuntimeError, match="stopped after"):
        calibration.lists()
    with pytest.warns(UserWarning, match="calls_per_step of a plan"):
        denoise(model, guidance=False)
    with pytest.raises(RuntimeError, match="the run stopped after"):
        calibration.lists()
