"""The command line as users type it: real processes, some of which start warm, and real files."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from faults import warm
from golden_data import write_checkpoint
from interrupted import interrupted
from PIL import Image

import magcache
import wan
from magcache.app.checks import make_job
from magcache.app.flags import make_parser
from magcache.app.inputs import read_inputs, video_shape
from magcache.app.media import to_frames, write_video
from magcache.app.requests import choose_requests, default_path, make_requests, named_path
from magcache.app.results import save_result
from magcache.app.tell import announce
from wan.configs import WAN_CONFIGS
from wan.utils.samplers import make_sampler

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "magcache_generate.py"
DEMO = REPO / "examples" / "Wan2.1-T2V-tiny"
PROMPT = "a green square moves up on a gray background"


def run(*arguments, cwd=REPO, python_flags=None):
    """python_flags: of a process that starts cold."""
    if python_flags is None:
        return warm.finished(arguments, cwd)
    command = [sys.executable, *python_flags, str(REPO / "magcache_generate.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def job_of(*flags):
    return make_job(make_parser(SCRIPT).parse_args(list(map(str, flags))))


def demo(*arguments, steps=10, cwd=REPO, python_flags=None):
    flags = ("--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--sample_steps", steps, "--base_seed", 3)
    result = run(*flags, "--prompt", PROMPT, *arguments, cwd=cwd, python_flags=python_flags)
    assert result.returncode == 0, result.stderr
    return result


def generated(steps=10, schedule=None, **sampling):
    """The same video from the Python API."""
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], str(DEMO))
    if schedule:
        magcache.apply_magcache(pipeline.model, schedule)
    return pipeline.generate(PROMPT, (64, 64), 17, sampling_steps=steps, seed=3, **sampling)


def frames_of(video, path):
    write_video(path, to_frames(video), fps=16)
    return iio.imread(path)


def test_help_is_quick():
    result = run("--help", python_flags=("-X", "importtime"))
    assert result.returncode == 0
    assert "--magcache_K" in result.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "diffusers", "numpy"}


def test_flags_are_those_of_the_reference():
    """Name, type, default and choices of Wan2.1's generate.py and of the released MagCache script."""
    flags = {action.dest: action for action in make_parser(SCRIPT)._actions}
    truth = flags["offload_model"].type
    assert all(truth(text) for text in ("yes", "True", "t", "Y", "1"))
    assert not any(truth(text) for text in ("nO", "false", "F", "n", "0"))


def test_the_published_settings_plan_what_they_should():
    plans, documented = {}, (REPO / "calibration" / "README.md").read_text()
    for command in re.findall(r"^python (magcache_generate\.py --task .* --use_magcache.*)$", documented, re.M):
        args = make_parser(SCRIPT).parse_args(shlex.split(command)[1:])
        job = make_job(args)
        read_inputs(job)
        assert job.machine.offload_model
        sampling = job.sampling
        settings = (sampling.frame_num, sampling.sample_steps, sampling.sample_shift)
        plans[args.task] = (job.made_by, job.schedule.computed, *settings)
    assert plans == {
        "t2v-1.3B": ("table t2v-1.3B", 42, 81, 50, 5.0),
        "t2v-14B": ("table t2v-14B", 36, 81, 50, 5.0),
        "i2v-14B": ("table i2v-14B-480P", 30, 81, 40, 3.0),
        "flf2v-14B": ("table i2v-14B-720P", 44, 81, 50, 16.0),
        "vace-1.3B": ("table vace-1.3B", 58, 81, 50, 16.0),
        "t2i-14B": ("table t2v-14B", 50, 1, 50, 5.0),
    }


def test_calibration_of_61_frames_is_planned():
    """The reference fails on it."""
    command = (
        "--task i2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-I2V-14B-720P --image examples/wan_i2v.png "
        '--magcache_calibration --offload_model True --t5_cpu --frame_num 61 --base_seed 0 --prompt "..."'
    )
    job = job_of(*shlex.split(command))
    assert video_shape(job.sampling, read_inputs(job)) == (61, 720, 1280)
    assert (job.sampling.sample_steps, job.sampling.sample_shift) == (40, 5.0)


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


NASTY = [
    "x" * 500,
    "a/b\\c: \"quoted\" 'twice' <tag> | ? * \n new\tline \0",
    "猫" * 100,
    "🦊" * 100,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢" * 30,
    "../../etc/passwd",
    " ",
    "-rf",
]


@pytest.mark.parametrize("prompt", NASTY, ids=range(len(NASTY)))
def test_file_names_are_safe(prompt, tmp_path):
    flags = ["--ckpt_dir", "x", "--use_magcache", "--magcache_K", "4", "--size", "832*480"]
    name = str(default_path(job_of(*flags), prompt))
    assert re.fullmatch(r"magcache_t2v-14B_E012_K4_R02_832\*480_1_1_[\w-]*_\d{8}_\d{6}_[0-9a-f]{6}\.mp4", name)
    path = tmp_path / name
    frames = frames_of(torch.zeros(3, 5, 16, 16), path)
    assert frames.shape == (5, 16, 16, 3)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_file_names_without_the_cache():
    job = job_of("--task", "t2i-14B", "--size", "1024*1024", "--ckpt_dir", "x")
    assert re.fullmatch(
        r"t2i-14B_1024\*1024_1_1_one_fox_\d{8}_\d{6}_[0-9a-f]{6}\.png",
        str(default_path(job, "one fox")),
    )
    assert named_path(job, "film") == Path("film.png")


def test_without_guidance(tmp_path):
    """One call a step, of which the cache leaves half."""
    flags = ("--sample_guide_scale", 1, "--use_magcache", "--magcache_speedup", 2)
    said = demo(*flags, "--compare", "--save_file", tmp_path / "film.mp4", steps=4).stdout
    assert "2 of 4 transformer calls computed, at most 2.00x" in said
    assert "2 of 4 calls computed, reused 2 of 4 cond (bound 2.00x" in said
    model = ("--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--sample_steps", 4)
    schedule = job_of(*model, *flags).schedule
    expected = generated(4, schedule=schedule, guide_scale=1)
    assert np.array_equal(iio.imread(tmp_path / "film.mp4"), frames_of(expected, tmp_path / "api.mp4"))
    assert json.loads((tmp_path / "film.json").read_text())["calls"] == {"computed": 2, "reused": 2}


def test_a_negative_prompt(tmp_path):
    """The video is that of the pipeline, and its record repeats it."""
    unwanted = "a red circle moves down on a white background"
    result = demo("--n_prompt", unwanted, "--size", "64X64", "--save_file", tmp_path / "film.mp4", steps=2)
    assert f"\nn_prompt  {unwanted}\n" in result.stdout
    film = iio.imread(tmp_path / "film.mp4")
    assert np.array_equal(film, frames_of(generated(2, n_prompt=unwanted), tmp_path / "api.mp4"))
    assert not np.array_equal(film, frames_of(generated(2), tmp_path / "other.mp4"))
    command = json.loads((tmp_path / "film.json").read_text())["command"]
    assert command[command.index("--n_prompt") + 1] == unwanted
    assert command[command.index("--size") + 1] == "64*64"


def test_uncached_equals_the_unpatched_model(tmp_path):
    result = demo("--save_file", tmp_path / "plain.mp4", python_flags=())
    assert "off: all 20 transformer calls computed" in result.stdout
    frames = iio.imread(tmp_path / "plain.mp4")
    assert frames.shape == (17, 64, 64, 3)
    assert iio.immeta(tmp_path / "plain.mp4")["fps"] == 16
    assert np.array_equal(frames, frames_of(generated(), tmp_path / "api.mp4"))


def test_cached(tmp_path):
    flags = ("--use_magcache", "--magcache_thresh", 0.3, "--magcache_K", 3)
    result = demo(*flags, "--magcache_offload", cwd=tmp_path)
    schedule = magcache.plan(magcache.load_ratios("t2v-tiny"), 10, 0.3, 3)
    assert any(schedule.reuse)
    announced = result.stdout.index(f"{schedule.computed} of 20 transformer calls computed, at most")
    assert announced < result.stdout.index("ms a call")
    assert f"reused {sum(schedule.reuse[::2])} of 10 cond and {sum(schedule.reuse[1::2])} of 10 uncond" in result.stdout
    assert "table t2v-tiny" in result.stdout
    (path,) = tmp_path.glob("magcache_t2v-tiny_E03_K3_R02_64*64_1_1_a_green_square_moves_up_on_a_gray_background_*.mp4")
    assert path.name in result.stdout
    assert np.array_equal(iio.imread(path), frames_of(generated(schedule=schedule), tmp_path / "api.mp4"))


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


def test_the_seed_of_the_only_prompt_that_is_left(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a fox\na hen\n")
    where = ("--prompt_file", tmp_path / "prompts.txt", "--save_file", tmp_path / "films")
    job = job_of("--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--base_seed", 5, *where)
    finished, left = make_requests(job)
    finished.path.parent.mkdir()
    frames_of(torch.zeros(3, 1, 16, 16), finished.path)
    assert choose_requests(job, [finished, left]) == [left]
    announce(job, (17, 64, 64), [left], 1)
    assert re.search(r"^video .*, seed 6$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_calibration_on_several_prompts(tmp_path):
    prompts = ["a red circle moves left on a black background", "a blue square moves up on a white background"]
    (tmp_path / "prompts.txt").write_text(f"{prompts[0]}\n\n  {prompts[1]}\n")
    flags = ("--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--sample_steps", 3, "--base_seed", 5)
    calibrate = (*flags, "--magcache_calibration")
    both = run(*calibrate, "--prompt_file", tmp_path / "prompts.txt", "--save_file", tmp_path / "films")
    assert both.returncode == 0, both.stderr
    films = sorted((tmp_path / "films").glob("0*.mp4"))
    single = run(*calibrate, "--prompt", prompts[1], "--base_seed", 6, "--save_file", tmp_path / "films" / "x.mp4")
    assert "now hold this calibration, not the one before" in single.stdout
    tables = {
        tuple(t["measured_on"]["prompts"]): t for t in map(read_table, (tmp_path / "films").glob("t2v-tiny_*.json"))
    }
    average, second = tables[tuple(prompts)], tables[(prompts[1],)]
    assert average["measured_on"]["seeds"] == [5, 6]
    for mean, spread, value in zip(
        *(average[k] for k in ("mag_ratio", "mag_ratio_spread")), second["mag_ratio"], strict=True
    ):
        assert spread == pytest.approx(2**0.5 * abs(mean - value), abs=3e-5)  # of two values
    assert np.array_equal(iio.imread(films[1]), iio.imread(tmp_path / "films" / "x.mp4"))
    assert not np.array_equal(iio.imread(films[0]), iio.imread(films[1]))


def read_table(path):
    return json.loads(path.read_text())


def test_an_aborted_calibration_leaves_nothing(tmp_path):
    flags = ["--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--sample_steps", 3000, "--prompt", PROMPT]
    flags += ["--magcache_calibration", "--save_file", tmp_path / "film.mp4"]
    command = [sys.executable, "-u", REPO / "magcache_generate.py", *flags]
    code, err = interrupted(command, rb" [1-9]\d*/3000")  # in the progress bar
    assert code == 130
    assert re.search(rb"stopped in prompt 1 of 1, after \d+ of 6000 calls; nothing is written", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("speedup", "changed"),
    [(2, {}), pytest.param(3.2, {"sample_shift": 3.0, "sample_solver": "dpm++"}, marks=pytest.mark.slow)],
)
def test_a_speedup(speedup, changed, tmp_path):
    flags = [value for name, given in changed.items() for value in (f"--{name}", given)]
    fast = demo("--use_magcache", "--magcache_speedup", speedup, *flags, "--save_file", tmp_path / "fast.mp4")
    settings = changed.get("sample_shift", 5.0), changed.get("sample_solver", "unipc")
    constants = magcache.read_trials(magcache.load_table("t2v-tiny")).constants
    schedule = magcache.plan_speedup(10, speedup, *settings, constants=constants)
    assert f"{schedule.computed} of 20 transformer calls computed, at most {schedule.speedup_bound:.2f}x" in fast.stdout
    assert f"reused {10 - schedule.computed // 2} of 10 cond" in fast.stdout
    sampling = {name.replace("sample_", ""): value for name, value in changed.items()}
    if solver := sampling.pop("solver", None):
        sampling["sample_solver"] = solver
    expected = frames_of(generated(schedule=schedule, **sampling), tmp_path / "expected.mp4")
    assert np.array_equal(iio.imread(tmp_path / "fast.mp4"), expected)


def test_a_speedup_needs_no_table():
    flags = "--task flf2v-14B --size 1280*720 --ckpt_dir x --use_magcache --magcache_speedup 2.5"
    schedule = job_of(*flags.split()).schedule
    assert schedule == magcache.plan_speedup(50, 2.5, shift=16.0)
    assert schedule.speedup_bound == 2.5


def test_a_table_of_another_model_is_used_with_a_notice(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"mag_ratio": [0.9, 0.9], "measured_on": {"task": "i2v-14B"}}')
    job_of("--task", "t2v-1.3B", "--ckpt_dir", "x", "--use_magcache", "--mag_ratios", tmp_path / "other.json")
    assert "was measured on task i2v-14B, not t2v-1.3B" in capsys.readouterr().out


def test_text_to_image(tmp_path):
    model = write_checkpoint("t2v", tmp_path / "model")
    flags = ("--task", "t2i-14B", "--size", "480*832", "--ckpt_dir", model, "--sample_steps", 2, "--use_magcache")
    result = run(*flags, "--save_file", tmp_path / "fox.png")
    assert result.returncode == 0, result.stderr
    assert "t2i-14B uses the table of t2v-14B" in result.stdout
    assert iio.imread(tmp_path / "fox.png").shape == (832, 480, 3)


def test_a_result_that_cannot_be_saved_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    video = torch.rand(3, 5, 16, 16)
    with pytest.raises(OSError, match="gone"):
        save_result(video, tmp_path / "gone" / "film.mp4", 16)
    with pytest.raises(OSError, match="gone"):
        save_result(video, tmp_path / "gone" / "film.mp4", 16)
    kept, other = tmp_path.glob("film_*.pt")  # neither takes the other's place
    assert kept.stat().st_size == other.stat().st_size
    err = capsys.readouterr().err
    assert str(kept) in err
    assert str(other) in err
    kept = torch.load(kept, weights_only=True)
    assert kept.dtype == torch.uint8
    torch.testing.assert_close(kept / 127.5 - 1, video, rtol=0, atol=1 / 127)
