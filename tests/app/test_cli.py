"""The command line as users type it: real processes, some of which start warm, and real files."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from commands import DEMO, REPO, SCRIPT, TINY, job_of
from faults import warm
from PIL import Image

import magcache
import wan
from magcache.app import requests
from magcache.app.flags import make_parser
from magcache.app.inputs import read_inputs
from magcache.app.media import to_frames, write_video
from magcache.app.processes import Processes
from magcache.app.requests import default_path, make_requests, named_path
from magcache.app.stock_wan import StockWan22
from magcache.app.tasks import TASKS
from wan.configs import WAN_CONFIGS
from wan.utils.samplers import make_sampler

PROMPT = "a green square moves up on a gray background"


def demo(*arguments, steps=10, cwd=REPO):
    return warm.finished(flags_of(*arguments, steps=steps), cwd)


def flags_of(*arguments, steps=10):
    return [*TINY, "--sample_steps", steps, "--base_seed", 3, "--prompt", PROMPT, *arguments]


def generated(steps=10, schedule=None, **sampling):
    """The same video from the Python API."""
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(DEMO))
    if schedule:
        magcache.apply_magcache(pipeline.model, schedule)
    return pipeline.generate(PROMPT, (64, 64), 17, sampling_steps=steps, seed=3, **sampling)


def frames_of(video, path):
    write_video(path, to_frames(video), fps=16)
    return iio.imread(path)


def test_truth_values():
    """Of upstream's flags."""
    (truth,) = (action.type for action in make_parser(SCRIPT)._actions if action.dest == "offload_model")
    assert all(truth(text) for text in ("yes", "True", "t", "Y", "1"))
    assert not any(truth(text) for text in ("nO", "false", "F", "n", "0"))


def test_the_published_settings_plan_what_they_should():
    plans, documented = {}, (REPO / "calibration" / "README.md").read_text()
    for command in re.findall(r"^python magcache_generate\.py (--task .* --use_magcache.*)$", documented, re.M):
        job = job_of(*shlex.split(command))
        read_inputs(job)
        assert job.machine.offload_model
        sampling = job.sampling
        settings = (sampling.frame_num, sampling.sample_steps, sampling.sample_shift)
        plans[sampling.task] = (job.made_by, job.schedule.computed, *settings)
        assert {(job.cache.rule.thresh, job.cache.rule.K)} <= {(r.thresh, r.K) for r in TASKS[sampling.task].published}
    assert plans == {
        "t2v-1.3B": ("table t2v-1.3B", 42, 81, 50, 5.0),
        "t2v-14B": ("table t2v-14B", 36, 81, 50, 5.0),
        "i2v-14B": ("table i2v-14B-480P", 30, 81, 40, 3.0),
        "flf2v-14B": ("table i2v-14B-720P", 44, 81, 50, 16.0),
        "vace-1.3B": ("table vace-1.3B", 58, 81, 50, 16.0),
        "t2i-14B": ("table t2v-14B", 50, 1, 50, 5.0),
    }


def test_what_is_refused_is_said_once_a_machine(monkeypatch, command):
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert command("--ckpt_dir", "x", "--ulysses_size", "4") == ""


def test_what_the_lines_of_a_prompt_file_have_of_their_own(tmp_path):
    """A line without it has that of the flag, whatever the lines before it have."""
    for flag, task in (("image", "i2v-14B"), ("n_prompt", "t2v-14B")):
        (tmp_path / "list.jsonl").write_text(f'{{"prompt": "a", "{flag}": "own"}}\n{{"prompt": "b"}}')
        job = job_of("--task", task, "--ckpt_dir", "x", f"--{flag}", "all", "--prompt_file", tmp_path / "list.jsonl")
        assert [getattr(request, flag) for request in make_requests(job)] == ["own", "all"]


def test_processes_without_a_local_rank(monkeypatch):
    """As where each has a machine of its own, and no torchrun."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert Processes.from_environment() == Processes(1, 2, 0)


def test_file_names(monkeypatch):
    flags = ("--ckpt_dir", "x", "--use_magcache", "--magcache_K", "4", "--size", "832*480")
    name = str(default_path(job_of(*flags), "a/b"))
    assert re.fullmatch(r"magcache_t2v-14B_E012_K4_R02_832\*480_1_1_a_b_\d{8}_\d{6}_[0-9a-f]{6}\.mp4", name)
    job = job_of("--task", "t2i-14B", "--size", "1024*1024", "--ckpt_dir", "x")
    name = str(default_path(job, "one fox"))
    assert re.fullmatch(r"t2i-14B_1024\*1024_1_1_one_fox_\d{8}_\d{6}_[0-9a-f]{6}\.png", name)
    assert named_path(job, "film") == Path("film.png")
    monkeypatch.setattr(requests, "backend", lambda: StockWan22)  # whose names have no ring size
    assert str(default_path(job, "one fox")).startswith("t2i-14B_1024*1024_1_one_fox_")


CACHE = ("--use_magcache", "--magcache_thresh", 0.3, "--magcache_K", 3)
FAST = ("--use_magcache", "--magcache_speedup", 2)
CONSTANTS = magcache.read_trials(magcache.load_table("t2v-tiny")).constants
UNWANTED = "a red circle moves down on a white background"
OTHER = ("--sample_shift", 3.0, "--sample_solver", "dpm++")
# flags, the schedule, other arguments of the pipeline, what is said
RUNS = {
    "uncached": ((), None, {}, "off: all 12 transformer calls computed"),
    "thresh": (CACHE, magcache.plan(magcache.load_ratios("t2v-tiny"), 6, 0.3, 3), {}, "table t2v-tiny"),
    "offload": ((*FAST, "--magcache_offload"), magcache.plan_speedup(6, 2, constants=CONSTANTS), {}, "at most 2.00x"),
    "sampler": (
        (*FAST, *OTHER),
        magcache.plan_speedup(6, 2, 3.0, "dpm++", constants=CONSTANTS),
        {"shift": 3.0, "sample_solver": "dpm++"},
        "at most 2.00x",
    ),
    "guidance": (
        (*FAST, "--compare", "--sample_guide_scale", 1),
        magcache.plan_speedup(6, 2, constants=CONSTANTS, calls_per_step=1),
        {"guide_scale": 1},
        "3 of 6 calls computed, reused 3 of 6 cond (bound 2.00x",
    ),
    "n_prompt": (("--n_prompt", UNWANTED), None, {"n_prompt": UNWANTED}, f"\nn_prompt  {UNWANTED}\n"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_video_is_that_of_the_pipeline(name, tmp_path):
    """In the folder where the command runs; its record repeats it."""
    flags, schedule, sampling, line = RUNS[name]
    command = flags_of(*flags, "--size", "64X64", steps=6)
    said = warm.finished(command, tmp_path).stdout
    path = tmp_path / re.search(r"^saved     (.*) \(64x64, 17 frames\)$", said, re.MULTILINE)[1]
    film, record = iio.imread(path), json.loads(path.with_suffix(".json").read_text())
    assert np.array_equal(film, frames_of(generated(6, schedule, **sampling), tmp_path / "api.mp4"))
    assert iio.immeta(path)["fps"] == 16
    reused = schedule.reuse if schedule else (False,) * 12
    assert record["calls"] == {"computed": reused.count(False), "reused": sum(reused)}
    first, again = job_of(*command), job_of(*record["command"][2:])
    asked = [(job.sampling, job.schedule, replace(*job.lines, save_file=None)) for job in (first, again)]
    assert asked[0] == asked[1]
    assert line in said
    if schedule:
        assert any(reused)
        announced = said.index(f"{schedule.computed} of {len(reused)} transformer calls computed, at most")
        branches = [reused[i :: schedule.calls_per_step] for i in range(schedule.calls_per_step)]
        counts = (f"{sum(branch)} of 6 {name}" for name, branch in zip(("cond", "uncond"), branches, strict=False))
        assert announced < said.index(f"reused {' and '.join(counts)}") < said.index("ms a call")


def test_calibrate_then_use(tmp_path):
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    result = demo("--magcache_calibration", "--save_file", dumps / "a.mp4")
    (path,) = dumps.glob("t2v-tiny_64x64_17f_10steps_*.json")
    assert str(path) in result.stdout
    table = json.loads(path.read_text())
    flat = {"mag_ratio": "wan2_1_mag_ratio", "mag_std": "wan2_1_mag_std", "cos_dis": "wan2_1_cos_dis"}
    for key, name in flat.items():
        assert len(table[key]) == 18
        assert json.loads((dumps / f"{name}.json").read_text()) == table[key]
    measured_on = table["measured_on"]
    assert (measured_on["prompts"], measured_on["seeds"]) == ([PROMPT], [3])
    assert measured_on["timesteps"] == make_sampler("unipc", 10, 5.0).timesteps.tolist()
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 500
    names = {path.name, path.with_suffix(".png").name, *(f"{name}.json" for name in flat.values())}
    assert {file.name for file in dumps.iterdir()} == names | {"a.mp4", "a.json"}
    assert np.array_equal(iio.imread(dumps / "a.mp4"), frames_of(generated(), tmp_path / "api.mp4"))

    cached = demo("--use_magcache", "--mag_ratios", path, "--magcache_K", 1, "--save_file", tmp_path / "b.mp4")
    by_hand = magcache.plan([1.0, 1.0, *table["mag_ratio"]], 10, 0.12, 1)
    assert any(by_hand.reuse)
    assert f"{by_hand.computed} of 20 transformer calls computed" in cached.stdout
    assert magcache.load_table(path).steps == 10
    assert f"table {path}" in cached.stdout
    assert "note: " not in cached.stdout


def test_the_seed_of_the_only_prompt_that_is_left(tmp_path, command):
    (tmp_path / "prompts.txt").write_text("a fox\na hen\n")
    where = ("--prompt_file", tmp_path / "prompts.txt", "--save_file", tmp_path / "films")
    for left in ("5 and up", "6"):
        said = command(*TINY, "--frame_num", 1, "--sample_steps", 1, "--base_seed", 5, *where)
        assert re.search(rf"^video .*, seed {left}$", said, re.MULTILINE)
        (film,) = (tmp_path / "films").glob("00002*.mp4")
        film.unlink()


@pytest.mark.slow
def test_calibration_on_several_prompts(tmp_path):
    prompts = ["a red circle moves left on a black background", "a blue square moves up on a white background"]
    (tmp_path / "prompts.txt").write_text(f"{prompts[0]}\n\n  {prompts[1]}\n")
    calibrate = [*TINY, "--sample_steps", 3, "--base_seed", 5, "--magcache_calibration"]
    warm.finished([*calibrate, "--prompt_file", tmp_path / "prompts.txt", "--save_file", tmp_path / "films"], tmp_path)
    films = sorted((tmp_path / "films").glob("0*.mp4"))
    single = ["--prompt", prompts[1], "--base_seed", 6, "--save_file", tmp_path / "films" / "x.mp4"]
    said = warm.finished([*calibrate, *single], tmp_path).stdout
    assert "now hold this calibration, not the one before" in said
    tables = [json.loads(path.read_text()) for path in (tmp_path / "films").glob("t2v-tiny_*.json")]
    tables = {tuple(table["measured_on"]["prompts"]): table for table in tables}
    average, second = tables[tuple(prompts)], tables[(prompts[1],)]
    assert average["measured_on"]["seeds"] == [5, 6]
    for mean, spread, value in zip(
        *(average[k] for k in ("mag_ratio", "mag_ratio_spread")), second["mag_ratio"], strict=True
    ):
        assert spread == pytest.approx(2**0.5 * abs(mean - value), abs=3e-5)  # of two values
    assert np.array_equal(iio.imread(films[1]), iio.imread(tmp_path / "films" / "x.mp4"))
    assert not np.array_equal(iio.imread(films[0]), iio.imread(films[1]))
