"""Trials of a real model: what they cost and measure, what a run by quality does with them, and what is said of it."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from commands import DEMO, REPO, TINY, job_of
from faults import warm
from golden_data import write_checkpoint
from PIL import Image
from trial_tables import fewer, table_with

import magcache
import wan
from magcache.app.processes import Group
from magcache.app.prompts import Request
from magcache.app.trials.run import TrialRuns
from magcache.patch import shadowed
from wan.configs import WAN_CONFIGS

PROMPTS = ["a red circle moves left on a black background", "a blue square moves up on a white background"]
SPEEDUPS = (2, 2.5, 3, 4, 5)


def run(*arguments):
    return warm.finished([*TINY, *arguments], REPO).stdout


def latent_of(pipeline, prompt, seed, steps, schedule=None, size=(64, 64), frames=17):
    magcache.remove_magcache(pipeline.model)
    if schedule:
        magcache.apply_magcache(pipeline.model, schedule)
    with shadowed(pipeline.vae, {"decode": lambda latents: latents}):
        return pipeline.generate(prompt, size, frames, sampling_steps=steps, seed=seed)


def psnr(latent, truth):
    latent, truth = latent.double().numpy(), truth.double().numpy()
    return 20 * np.log10(np.ptp(truth) / np.sqrt(np.mean((latent - truth) ** 2)))


@pytest.fixture(scope="module")
def pipeline():
    return wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(DEMO))


def test_costs_and_results(tmp_path):
    """Eight prompts, of which four choose the constants: the calls of the model are counted, and what was measured is
    measured again by whole runs."""
    write_checkpoint("t2v", tmp_path)
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-1.3B"], str(tmp_path))
    steps, count, ratios = 16, 8, [0.99, 0.98] * 15
    flags = ["--sample_steps", steps, "--magcache_calibration", ",".join(map(str, SPEEDUPS))]
    job = job_of(*TINY, *flags)

    def generate(request, steps):
        return pipeline.generate(request.prompt, (32, 32), 1, sampling_steps=steps, seed=request.seed)

    runs = TrialRuns(job, pipeline, generate, Group(), count)
    requests = [Request(number, f"{number} circles", 5 + number) for number in range(count)]
    calls, truths = [], []
    hook = pipeline.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for request in requests:
        magcache.remove_magcache(pipeline.model)
        with runs.recording(request), shadowed(pipeline.vae, {"decode": lambda latents: latents}):
            truths.append(generate(request, steps))
        runs.try_prompt(truths[-1], ratios)
    hook.remove()
    assert len(calls) - count * 2 * steps == runs.spent
    assert runs.spent <= 2.5 * count * 2 * steps
    forecasts, compared = runs.forecasts, runs.others
    assert [way.settings for way in forecasts] == [{"speedup": s} | asdict(runs.constants) for s in SPEEDUPS]
    assert all([*way.psnr] == [*range(count)] for way in forecasts)
    assert [way.method for way in compared] == ["fewer steps"] * 5 + ["thresh"] * 2
    times = [len(way.psnr) for way in compared]
    assert max(times) - min(times) <= 1
    for way in (forecasts[-1], compared[2], compared[-1]):
        prompt, plain = max(way.psnr), way.method == "fewer steps"
        request, schedule = requests[prompt], None if plain else way.schedule
        again = latent_of(pipeline, request.prompt, request.seed, way.schedule.steps, schedule, (32, 32), 1)
        assert way.psnr[prompt] == pytest.approx(psnr(again, truths[prompt]), abs=0.006)


@pytest.mark.slow
def test_calibrate_with_trials_then_ask_for_a_quality(tmp_path, pipeline):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    where = ("--save_file", tmp_path / "films")
    tried = ("--magcache_calibration", "1.5,2,3", "--sample_steps", 16, "--base_seed", 5)
    said = run("--prompt_file", tmp_path / "prompts.txt", *tried, *where)
    assert "speed-ups 1.5, 2, 3, and fewer steps and MagCache as published for comparison; at most 2.5" in said
    assert re.search(r"^time .*, trials \d", said, re.M)
    (path,) = (tmp_path / "films").glob("t2v-tiny_*.json")
    table = json.loads(path.read_text())
    assert len(table["mag_ratio"]) == 30
    assert table["trials"]["prompts"] == PROMPTS
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.height > picture.width
    measured = magcache.read_trials(magcache.load_table(path))
    at_2 = measured.forecasts[1]
    truth, latent = (
        latent_of(pipeline, PROMPTS[1], 6, 16, schedule) for schedule in (None, magcache.plan_speedup(16, 2))
    )
    assert at_2.psnr[1] == pytest.approx(psnr(latent, truth), abs=0.01)

    asked = measured.expect(2).promised
    film = tmp_path / "film.mp4"
    flags = ("--prompt", PROMPTS[1], "--base_seed", 6, "--sample_steps", 16, "--save_file", film)
    said = run("--use_magcache", "--magcache_quality", asked - 1e-3, "--mag_ratios", path, "--compare", *flags)
    assert "16 of 32 transformer calls computed" in said
    e = measured.expect(2)
    expected = f"{asked:.1f} dB or more in nine of ten videos (a guess from {len(PROMPTS)}), "
    expected += f"{e.others:.0%} below 30 dB (another video), "
    expected += f"{e.pooled:.1f} dB pooled (of the mean squared error of all)"
    assert f"quality   latent PSNR {expected}" in said
    close = at_2.psnr[1]
    verdict = "the same video" if close >= 35 else "close to another video" if close >= 30 else "another video"
    assert f", latent PSNR {close:.2f} dB: {verdict}; film_uncached.mp4" in said
    assert f"expected from trials: {expected}" in said
    assert "note: " not in said
    record = json.loads(film.with_suffix(".json").read_text())
    found = record["expected"]
    assert found["latent_psnr"] | {"prompts": found["prompts"]} == asdict(e)
    assert record["comparison"]["latent_psnr"] == pytest.approx(at_2.psnr[1], abs=0.01)
    again = job_of(*record["command"][2:])
    assert again.schedule == magcache.plan_speedup(16, 2, constants=measured.constants)


@pytest.fixture
def demo_plan(plan):
    return lambda *flags: plan(*TINY, *flags)


@pytest.fixture
def table(tmp_path):
    """50 steps, four prompts; fewer steps are ahead at 5x, on the two prompts that tried them."""
    forecasts = {50: [60, 62, 64, 66], 40: [50, 52, 54, 56], 20: [30, 32, 34, 36]}
    others = [fewer(50, [50, None, None, 56]), fewer(20, [34, None, None, 40])]
    others.append(("thresh", {"thresh": 0.12, "K": 2, "retention_ratio": 0.2}, 40, [40, None, None, None]))
    constants = {"floor": 0.016, "early": 0.25, "decay": 0.1}
    on = {"task": "t2v-tiny", "size": "64*64", "sample_steps": 50, "sample_shift": 5.0}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table_with(forecasts, others, constants=constants, **on)))
    return path


def test_the_plan_of_a_quality(demo_plan, table):
    lines = demo_plan("--magcache_quality", 40, "--mag_ratios", table)
    assert lines[0] == "28 of 100 DiT calls computed, at most 3.57x"  # on the way from 49 dB at 2.5x to 29 dB at 5x
    assert lines[1].endswith("speed-up 3.57143, the fastest for 40 dB")
    quality = "40.4 dB or more in nine of ten videos (a guess from 4), 0% below 30 dB (another video), 43.9 dB pooled "
    quality += "(of the mean squared error of all)"
    assert f"quality   {quality}" in lines
    text = "\n".join(lines)
    assert re.search(r"^ +2\.00x +50 +62\.4 +59\.0 +0% +63\.0 +10\.0 on 2 prompts$", text, re.M)
    assert re.search(r"^ +2\.50x +40 +52\.4 +49\.0 +0% +53\.0 +not tried$", text, re.M)
    assert re.search(r"^ +5\.00x +20 +32\.4 +29\.0 +0% +33\.0 +-4\.0 on 2 prompts$", text, re.M)
    assert "thresh 0.12, K 2, retention 0.2, 40 calls: forecasts are ahead by 10.0 on 1 prompt" in text
    assert "constants of the speed-up rule" not in text
    (better,) = (line.strip() for line in lines if "closer than any cache" in line)
    assert better == ("at 5x fewer sampler steps come closer than any cache: leave it out and take 10 of 50 steps")
    assert "note: " not in text
    schedule = magcache.plan_speedup(50, 50 / 14, constants=magcache.Constants(0.016, 0.25, 0.1))
    (row,) = (line.split()[1] for line in lines if line.startswith("cond"))
    assert [mark == "." for mark in row] == list(schedule.reuse[::2])


def test_constants_that_trials_chose_are_said(demo_plan):
    text = "\n".join(demo_plan("--magcache_speedup", 2))
    assert "the trials chose these constants of the speed-up rule: floor 0.001, early 0.6, decay 0.25\n" in text


def test_a_speedup_takes_the_constants_of_a_table(demo_plan, table):
    lines = demo_plan("--magcache_speedup", 2.5, "--mag_ratios", table)
    assert any(
        line.startswith("quality   49.0 dB or more in nine of ten videos (a guess from 4), 0% below 30 dB ")
        for line in lines
    )
    assert "quality   not tried at these settings" in demo_plan("--magcache_speedup", 8, "--mag_ratios", table)


def test_trials_of_other_settings_are_said(demo_plan, table):
    flags = ("--sample_steps", 30, "--sample_shift", 3)
    lines = demo_plan("--magcache_speedup", 2, "--mag_ratios", table, *flags)
    assert "quality   not tried at these settings" in lines
    (note,) = (line for line in lines if "note: " in line)
    assert note.startswith(f"note: ratio table {table} was measured with --sample_steps 50, --sample_shift 5.0; ")


def test_too_few_steps_for_a_cache_are_said(demo_plan, table):
    """Unless trials of just these settings tell what to expect."""
    (note,) = (line for line in demo_plan("--magcache_speedup", 2, "--sample_steps", 8) if "computed steps" in line)
    assert note.startswith("note: 4 computed steps are too few for forecasts between; --sample_steps 4 without ")
    assert not any("too few" in line for line in demo_plan("--magcache_speedup", 2, "--sample_steps", 16))
    assert any("too few" in line for line in demo_plan("--magcache_speedup", 10, "--mag_ratios", table))
    assert not any("too few" in line for line in demo_plan("--magcache_speedup", 5, "--mag_ratios", table))


def test_a_quality_that_none_reaches(command, table):
    line = command(*TINY, "--use_magcache", "--magcache_quality", 61, "--mag_ratios", table).strip()
    assert line.endswith(f"promised at no speed-up that table {table} has tried: 59.0 dB at 2x is the most")
