"""Watching a run, its record, and the comparison with the uncached run."""

import html
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from commands import DEMO, REPO, SCRIPT, TINY, job_of
from faults import warm

import magcache
import wan
from magcache.app import compare, plot, progress, record
from magcache.app.media import to_frames, write_video
from magcache.app.prompts import Request
from magcache.app.record import save_record
from magcache.app.requests import check_targets, make_requests
from wan import pipeline as wan_pipeline
from wan.configs import WAN_CONFIGS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = '-a "red" circle; moves $left on a <b>white</b> background'


def demo(*flags, steps=6):
    command = ["--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", os.path.relpath(DEMO, REPO)]
    return warm.finished([*command, "--sample_steps", steps, f"--prompt={PROMPT}", *flags], REPO)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A run with a drawn seed and a comparison."""
    folder = tmp_path_factory.mktemp("compared")
    cache = ("--use_magcache", "--magcache_thresh", 1, "--magcache_offload")
    return folder, demo(*cache, "--compare", "--save_file", folder / "a film.mp4")


def in_a_terminal(command):
    """Runs a command in a terminal of 90 columns; returns what it wrote there."""
    sized = f"stty cols 90 rows 30; exec {shlex.join(command)}"
    done = subprocess.run(["script", "-qec", sized, os.devnull], capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0
    return done.stdout


def test_the_record_repeats_the_run(compared):
    """From another folder, with stderr on a terminal, where one bar shows what each step did."""
    folder, _ = compared
    found = json.loads((folder / "a film.json").read_text())
    seen = in_a_terminal(found["command"])
    assert (folder / "a film_again.mp4").read_bytes() == (folder / "a film.mp4").read_bytes()
    again = json.loads((folder / "a film_again.json").read_text())
    for key in ("prompt", "seed", "schedule", "table", "versions", "steps_by"):
        assert again[key] == found[key]
    assert re.search(r"denoise \[#\.\.#\.\.] 6/6 in 00:\d\d", seen)
    assert re.search(r"decode 1/5 latent frames, about 00:\d\d left", seen)
    assert "it/s" not in seen  # the package's own bar
    assert "step/s" not in seen


def test_record(compared):
    folder, result = compared
    found = json.loads((folder / "a film.json").read_text())
    schedule = magcache.plan(magcache.load_ratios("t2v-tiny"), 6, 1, 2)
    assert any(schedule.reuse)
    assert found["schedule"]["weights"] == [w and list(w) for w in schedule.weights]
    assert found["schedule"]["computed_steps"]["cond"] == [i for i, r in enumerate(schedule.reuse[::2]) if not r]
    assert found["arguments"]["base_seed"] == found["seed"] >= 0
    assert found["arguments"]["sample_shift"] == 5.0
    assert found["prompt"] == PROMPT
    assert found["table"]["ratios"] == list(magcache.load_ratios("t2v-tiny"))
    assert found["table"]["measured_on"]["seeds"] == [77]
    assert found["versions"]["torch"] == torch.__version__
    assert found["calls"] == {"computed": schedule.computed, "reused": sum(schedule.reuse)}
    assert set(found["seconds"]) == {"load", "text", "inputs", "computed", "reused", "sampler", "decode", "save"}
    assert all(found["seconds"][phase] > 0 for phase in ("load", "text", "computed", "reused", "decode", "save"))
    assert found["peak_memory"]["bytes"] > 1e8
    assert f"seed {found['seed']}" in result.stdout
    assert len(result.stdout.split("now the same")[1].splitlines()) + 2 <= 10
    said = [kind for kind, _ in itertools.groupby(line.split(" ")[0] for line in result.stderr.splitlines())]
    assert said == 2 * ["warning:", "denoise", "decode"]  # no terminal
    left = re.findall(r"^denoise 1/6 .* left(.*)$", result.stderr, re.MULTILINE)
    assert left == [", then decoding", ""]  # the second run knows from the first what that takes
    assert result.stderr.count("warning: the text has 21 tokens, of which the model reads the first 16: ") == 2


def test_paths_of_a_record_mean_the_same_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for task, flag, paths, expected in (
        ("i2v-14B", "image", "cat, dog.png", f"{tmp_path}/cat, dog.png"),
        ("vace-14B", "src_ref_images", "a.png, b.png", f"{tmp_path}/a.png,{tmp_path}/b.png"),
    ):
        flags = ["--task", task, "--ckpt_dir", "x", "--prompt", "a, b", f"--{flag}", paths]
        job = job_of(*flags)
        values = record.replayed_values(job, *make_requests(job))
        assert (values[flag], values["src_mask"], values["prompt"]) == (expected, None, "a, b")


def test_bytes_that_are_no_text_stop_no_record(tmp_path):
    """They reach Python as lone surrogates, which no encoding of a file has."""
    save_record(tmp_path / "film.mp4", {"prompt": "caf\udce9 ü"})
    assert json.loads((tmp_path / "film.json").read_text(encoding="utf-8"))["prompt"] == "caf\udce9 ü"


def test_a_record_takes_its_own_place(tmp_path, capsys):
    """One that cannot be written stops nothing."""
    save_record(tmp_path / "gone" / "film.mp4", {})
    assert "the record could not be written" in capsys.readouterr().err
    save_record(tmp_path / "other.mp4", {})
    check_targets(job_of(*TINY), [Request(1, "a", 1, path=tmp_path / "other.mp4")])
    assert capsys.readouterr().out == f"note: {tmp_path}/other.json will be replaced\n"


def test_comparison_files(compared):
    folder, result = compared
    names = {f"a film{end}" for end in (".mp4", ".json", "_uncached.mp4", "_compare.mp4", "_compare.html")}
    assert {path.name for path in folder.iterdir() if "again" not in path.name} == names
    cached, uncached, both = (iio.imread(folder / f"a film{end}.mp4") for end in ("", "_uncached", "_compare"))
    assert not np.array_equal(cached, uncached)
    height = both.shape[1] - 64
    assert both.shape == (17, 64 + height, 3 * 64, 3)
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(DEMO))
    found = json.loads((folder / "a film.json").read_text())
    alone = pipeline.generate(PROMPT, (64, 64), 17, sampling_steps=6, seed=found["seed"])
    write_video(folder / "again alone.mp4", to_frames(alone), fps=16)
    assert np.array_equal(uncached, iio.imread(folder / "again alone.mp4"))
    for part, expected in ((both[:, height:, :64], cached), (both[:, height:, 64:128], uncached)):
        assert np.abs(part.astype(int) - expected).mean() < 4  # compressed apart
    scores = found["comparison"]
    assert f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}" in result.stdout
    squares = [10 ** (-psnr / 10) for psnr in scores["psnr_by_frame"]]
    assert scores["psnr"] == pytest.approx(-10 * math.log10(sum(squares) / 17))
    assert scores["ssim"] == pytest.approx(sum(scores["ssim_by_frame"]) / 17)


@pytest.mark.slow
def test_a_comparison_that_fails_among_several_prompts(tmp_path, monkeypatch):
    """The others go on, with the cache, and what they came to is said of all together."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    lines = [{"prompt": name, "save_file": str(tmp_path / f"{name}.mp4")} for name in ("first", "second", "third")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, SCRIPT, *TINY, "--sample_steps", 4]
    command += ["--prompt_file", tmp_path / "prompts.jsonl", "--use_magcache", "--magcache_thresh", 1, "--compare"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("now the same"):
            (tmp_path / "first_uncached.mp4").mkdir()
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "1 of 3 comparisons failed; their videos are finished; --overwrite makes both again:\n" in err
    assert re.search(rf"^{tmp_path}/first.mp4: \w+Error: ", err, re.MULTILINE)
    assert "videos failed" not in err
    assert (tmp_path / "second_compare.html").is_file()
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second", "third")]
    assert ["comparison" in found for found in records] == [False, True, True]
    errors = [10 ** (-found["comparison"]["latent_psnr"] / 10) for found in records[1:]]
    pooled = -10 * math.log10(sum(errors) / 2)
    assert "compared  2 videos: latent PSNR " in out
    assert f"(another video), {pooled:.1f} dB pooled (of the mean squared error of all)" in out
    assert records[0]["calls"] == records[1]["calls"]
    assert records[1]["calls"]["reused"] > 0


def test_page_stands_alone(compared):
    folder, _ = compared
    page = (folder / "a film_compare.html").read_text()
    assert html.escape(PROMPT) in page
    assert "<b>white" not in page
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page) == ["a%20film_compare.mp4"]
    assert "http" not in page
    assert page.count("data:video/mp4") == 3
    psnr = json.loads((folder / "a film.json").read_text())["comparison"]["latent_psnr"]
    verdict = "the same video" if psnr >= 35 else "close to another video" if psnr >= 30 else "another video"
    assert f"<div><b>{verdict}</b><span>latent PSNR {psnr:.1f} dB</span></div>" in page
    assert page.count("data:image/svg+xml") == 2


def test_the_drawings():
    job = job_of(*TINY, "--use_magcache", "--magcache_K", 4)
    (skips,) = plot.plan_figure(job, None).axes[-1].images
    assert np.array_equal(skips.get_array(), np.array(job.schedule.reuse).reshape(-1, 2).T)
    assert skips.get_clim()[0] < 0 < 1 < skips.get_clim()[1]  # reused ones, 1, are the light end of Blues_r
    figure = plot.score_figure({"PSNR": [30.0, None, 40.0], "SSIM": [0.5, 1.0, 0.75]})
    assert [axes.get_ylabel() for axes in figure.axes] == ["PSNR", "SSIM"]
    assert np.array_equal(figure.axes[0].lines[0].get_ydata(), [30.0, np.nan, 40.0], equal_nan=True)
    assert list(figure.axes[1].lines[0].get_ydata()) == [0.5, 1.0, 0.75]


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_page_in_a_browser(compared, tmp_path):
    """The slider takes all videos to its frame. Playing them is no test: how far they get is chance."""
    folder, _ = compared
    said = "video.dataset.at = Math.floor(video.currentTime * FPS)"
    move = f"videos.forEach(video => video.onseeked = () => {{ {said} }}); seek.value = 9; seek.oninput();"
    page = (folder / "a film_compare.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{move}</script></body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000"]
    url = (tmp_path / "page.html").as_uri()
    result = subprocess.run([CHROMIUM, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    assert "frame 9 of 17" in result.stdout
    left, right = map(float, re.search(r'data-left="([\d.]+)" data-right="([\d.]+)"', page).groups())
    shown = float(re.search(r'class="playhead"[^>]*style="left: ([\d.]+)%', result.stdout)[1])
    assert shown == pytest.approx(100 * (left + (right - left) * 9 / 16), abs=0.1)
    assert result.stdout.count('data-at="9"') == 3


def test_scores():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (3, 32, 48, 3), np.uint8)
    frames = reference.copy()
    frames[1] ^= 1
    frames[2] = 255 - frames[2]
    scores = compare.score(frames, reference)
    psnrs, ssims = scores["psnr_by_frame"], scores["ssim_by_frame"]
    assert psnrs[0] is None
    assert ssims[0] == pytest.approx(1)
    assert psnrs[1] == pytest.approx(20 * math.log10(255))
    error = np.mean((frames.astype(float) - reference) ** 2)
    assert scores["psnr"] == pytest.approx(10 * math.log10(255**2 / error))
    assert ssims[2] < 0 < ssims[1]
    assert compare.score(frames[:1], reference[:1])["psnr"] is None


def test_difference():
    reference = np.zeros((2, 16, 16, 3), np.uint8)
    frames = reference.copy()
    frames[0, 0] = 20
    apart, factor = compare.difference(frames, reference)
    assert factor == 8
    assert np.array_equal(apart, 8 * frames)
    assert compare.difference(frames, frames)[1] == 32


def test_a_single_picture(tmp_path):
    """Equal ones at that: nothing to draw or to divide by."""
    picture = np.full((1, 32, 48, 3), 77, np.uint8)
    seconds = dict.fromkeys(progress.PHASES, 0.1)
    job = job_of(*TINY, "--use_magcache", "--magcache_speedup", 2, "--frame_num", 1)
    request = Request(1, "a fox \udce9", 1, path=tmp_path / "fox\udce9.png")
    video = torch.full((3, 1, 32, 48), 77 / 127.5 - 1)
    watch = SimpleNamespace(video=video, latent=torch.ones(1), seconds=seconds, lap=lambda phase: None)
    compare.compare_results(SimpleNamespace(job=job, fps=16), request, picture, watch, watch)
    both, about = (tmp_path / f"fox\udce9_compare.{ending}" for ending in ("png", "html"))
    assert iio.imread(both).shape[1] == 3 * 48
    page = about.read_text()
    assert page.count("data:image/png") == 3
    assert page.count("data:image/svg+xml") == 1
    assert "equal" in page
    assert "<video" not in page


@pytest.mark.parametrize("target", ["output", "residual", None])
def test_watching_leaves_no_trace(target, capsys):
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(DEMO))
    schedule = magcache.Schedule((None,) * 8)
    if target:
        schedule = magcache.plan_steps((0, 2), 4, "reuse", target=target)

    def state():
        return dict(vars(pipeline.vae)), wan_pipeline.tqdm, len(pipeline.model._forward_pre_hooks)

    before = state()
    with progress.watched(pipeline, schedule) as watch:
        magcache.apply_magcache(pipeline.model, schedule, on_call=watch.called)
        pipeline.generate("a circle", (64, 64), 5, sampling_steps=4, seed=1)
    assert state() == before
    assert not pipeline.text_encoder.model._forward_hooks
    assert [reused for reused, _ in watch.calls] == list(schedule.reuse)
    assert sum(watch.seconds.values()) == pytest.approx(watch.clock - watch.start)
    for kind, phase in ((False, "computed"), (True, "reused")):
        assert watch.seconds[phase] == pytest.approx(sum(seconds for reused, seconds in watch.calls if reused == kind))
    with pytest.raises(RuntimeError), progress.watched(pipeline, schedule):
        raise RuntimeError
    assert state() == before


def test_time_left():
    schedule = magcache.plan_steps((0, 1, 4), 6)  # computed, computed, reused, reused, computed, reused
    calls = [(False, 100.0)] * 2
    assert progress.seconds_left(calls, schedule, 4.0) == 4 * 100.0 + 10 * 2.0  # a reused call is not known yet
    calls += [(False, 10.0)] * 2 + [(True, 1.0)] * 2
    assert progress.seconds_left(calls, schedule, 6.0) == 2 * 10 + 4 * 1 + 6 * 1.0
    assert progress.seconds_left([*calls, *[(True, 1.0)] * 6], schedule, 12.0) == 0


@pytest.mark.parametrize("package", ["skimage", "matplotlib"])
def test_a_missing_package_is_said_first(package, monkeypatch, command):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    flags = ["--use_magcache", "--compare"] if package == "skimage" else ["--magcache_plan", "plan.png"]
    err = command(*TINY, *flags)
    assert f"pip install {'scikit-image' if package == 'skimage' else package}" in err
