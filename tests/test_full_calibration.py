"""What a full calibration predicts, against what a forecast really does to the velocity of the demo model."""

import numpy as np
import pytest
import torch
from sampling import denoise

import magcache
from examples.train_tiny.check_prompts import DEMOS
from magcache.full_calibration import FullCalibration, apply_full_calibration
from magcache.search import forecast_errors, load_products, plan_searched, save_products
from wan.modules.model import WanModel

STEPS, GUIDANCE = 8, 5.0
SIGMAS = magcache.noise_levels(STEPS, 5.0)


@pytest.fixture(scope="module")
def model():
    return WanModel.from_pretrained(DEMOS["t2v-tiny"][1]).eval()


def inputs():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(16, 5, 8, 8, generator=generator)
    context = torch.randn(9, 64, generator=generator)
    return latent, {"context": [context], "seq_len": 90}, {"context": [context[-1:]], "seq_len": 90}


def guided_velocities(model, schedule=None) -> list[torch.Tensor]:
    """Of every step."""
    calls = []
    hook = model.register_forward_hook(lambda module, args, out: calls.append(out[0]))
    if schedule:
        magcache.apply_magcache(model, schedule)
    denoise(model, *inputs(), STEPS)
    hook.remove()
    magcache.remove_magcache(model)
    return [uncond + GUIDANCE * (cond - uncond) for cond, uncond in zip(calls[::2], calls[1::2], strict=True)]


@pytest.fixture(scope="module")
def products(model):
    calibration = apply_full_calibration(model, STEPS, SIGMAS, GUIDANCE)
    denoise(model, *inputs(), STEPS)
    assert calibration.samples is None  # the memory is given back
    magcache.remove_magcache(model)
    return calibration.products


@pytest.mark.parametrize("step", [3, 5, 7])
@pytest.mark.parametrize("forecast", ["reuse", "linear"])
def test_predicted_errors_of_a_single_forecast(model, products, step, forecast):
    schedule = magcache.plan_steps([s for s in range(STEPS) if s != step], STEPS, forecast)
    difference = guided_velocities(model, schedule)[step] - guided_velocities(model)[step]
    change_of_sigma = SIGMAS[step] - [*SIGMAS, 0.0][step + 1]
    error = (difference.square().sum() / 80).sqrt().item() * change_of_sigma  # 80 tokens, the rest is padding
    predicted = forecast_errors(schedule, products)
    assert np.flatnonzero(predicted).tolist() == [step]
    # not exact: the head divides by the standard deviation of the tokens, which a forecast changes a little
    assert predicted[step] == pytest.approx(error, rel=0.1)


def test_lists_are_those_of_the_plain_calibration(model, products):
    calibrations = [magcache.apply_calibration(model, STEPS)]
    denoise(model, *inputs(), STEPS)
    calibrations.append(apply_full_calibration(model, STEPS, SIGMAS, GUIDANCE))
    denoise(model, *inputs(), STEPS)
    magcache.remove_magcache(model)
    assert calibrations[0].lists() == calibrations[1].lists()
    assert np.array_equal(calibrations[1].products, products)


def test_memory_of_the_largest_model():
    assert magcache.host_bytes(50, 5120) == 2 * 50 * 512 * 5120 * 4
    assert magcache.host_bytes(100, 5120) < 4e9


def test_files(tmp_path, products):
    settings = {"task": "t2v-tiny", "sample_steps": STEPS, "sample_shift": 5.0, "sigmas": list(SIGMAS)}
    (tmp_path / "mine.json").write_text("[" + ", ".join(["0.9"] * 14) + "]")
    path = tmp_path / "mine.npz"
    save_products(path, products, settings)
    loaded, measured_on = load_products(path)
    assert loaded == pytest.approx(products, rel=1e-6)
    assert measured_on == settings
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.json", "mine.npz"]
    assert plan_searched(tmp_path / "mine.json", settings, 4).computed == 8
    with pytest.raises(ValueError, match="is for sample_steps 8, not 50"):
        plan_searched(tmp_path / "mine.json", settings | {"sample_steps": 50}, 4)
    whole = path.read_bytes()
    start = 30 + whole[26] + whole[28]  # of the compressed data, behind a ZIP entry's header, name and extra field
    damaged = whole[:start] + b"\xff" + whole[start + 1 :]
    for content in (b"", b"PK\x03\x04", b"[1]", whole[:500], damaged):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the full calibration"):
            load_products(path)
    np.savez(path, products=np.zeros((2, 2)), measured_on="{}")
    with pytest.raises(ValueError, match="products have the shape"):
        load_products(path)
    save_products(path, products, settings | {"sigmas": list(SIGMAS)[1:]})
    with pytest.raises(ValueError, match=f"lacks the noise levels of its {STEPS} steps"):
        load_products(path)


def test_a_second_run_starts_afresh(model):
    calibration = FullCalibration(STEPS, SIGMAS, GUIDANCE)
    magcache.patch.attach(model, calibration)
    runs = []
    for _ in range(2):
        denoise(model, *inputs(), STEPS)
        runs.append(calibration.products.copy())
    magcache.remove_magcache(model)
    assert np.array_equal(*runs)
