"""The command line as users type it: real processes, some of which start warm, and real files."""

import json
import re
import shlex
import shutil
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
import magcache_generate
import wan
from magcache.app.checks import make_job
from magcache.app.flags import make_parser
from magcache.app.inputs import read_inputs, video_shape
from magcache.app.media import to_frames, write_video
from magcache.app.prompts import Line
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


def documented_commands(file):
    return re.findall(r"^python (magcache_generate\.py --task .*)$", (REPO / file).read_text(), flags=re.MULTILINE)


def test_documented_commands_parse_and_plan():
    plans = {}
    for command in (*documented_commands("README.md"), *documented_commands("calibration/README.md")):
        args = make_parser(SCRIPT).parse_args(shlex.split(command)[1:])
        if args.magcache_plan or not args.use_magcache:
            continue  # see test_report
        job = make_job(args)
        read_inputs(job)
        assert job.machine.offload_model
        sampling = job.sampling
        settings = (sampling.frame_num, sampling.sample_steps, sampling.sample_shift)
        plans[args.task, args.magcache_speedup] = (job.made_by, job.schedule.computed, *settings)
    assert plans == {
        ("t2v-14B", 2.5): ("outputs forecast along the noise level", 40, 81, 50, 5.0),
        ("t2v-1.3B", None): ("table t2v-1.3B", 42, 81, 50, 5.0),
        ("t2v-14B", None): ("table t2v-14B", 36, 81, 50, 5.0),
        ("i2v-14B", None): ("table i2v-14B-480P", 30, 81, 40, 3.0),
        ("flf2v-14B", None): ("table i2v-14B-720P", 44, 81, 50, 16.0),
        ("vace-1.3B", None): ("table vace-1.3B", 58, 81, 50, 16.0),
        ("t2i-14B", None): ("table t2v-14B", 50, 1, 50, 5.0),
    }


def test_readme_torchrun_commands(monkeypatch):
    """The processes that they start are those that their flags need."""
    text = (REPO / "README.md").read_text()
    commands = re.findall(r"^torchrun (.*) (magcache_generate\.py .*)$", text, flags=re.MULTILINE)
    monkeypatch.setattr("magcache.app.prompts.read_prompts", lambda path, seed: [Line(1, "a", seed)])
    groups = []
    for launch, command in commands:
        nodes, processes = (
            int((re.search(rf"--{f} (\d+)", launch) or [0, 1])[1]) for f in ("nnodes", "nproc_per_node")
        )
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "0")
        monkeypatch.setenv("WORLD_SIZE", str(nodes * processes))
        job = job_of(*shlex.split(command)[1:])
        assert job.schedule.speedup_bound > 1
        assert WAN_CONFIGS[job.sampling.task].num_heads % job.machine.ulysses_size == 0
        groups.append((nodes * processes, nodes * processes // job.machine.shards))
    assert groups == [(8, 1), (16, 1), (8, 4)]


def test_calibration_of_61_frames_is_planned():
    """The reference fails on it."""
    command = (
        "--task i2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-I2V-14B-720P --image examples/wan_i2v.png "
        '--magcache_calibration --offload_model True --t5_cpu --frame_num 61 --base_seed 0 --prompt "..."'
    )
    job = job_of(*shlex.split(command))
    assert video_shape(job.sampling, read_inputs(job)) == (61, 720, 1280)
    assert (job.sampling.sample_steps, job.sampling.sample_shift) == (40, 5.0)


I2V = ("--task", "i2v-14B", "--ckpt_dir", "{i2v}")
FLF2V = ("--task", "flf2v-14B", "--ckpt_dir", "{flf2v}")
VACE = ("--task", "vace-1.3B", "--ckpt_dir", "{vace}")
FRAMES = ("--first_frame", "{pictures}/whole.png", "--last_frame", "{pictures}/whole.png")
VIDEO = ("--src_video", "{pictures}/film.mp4")
RATIOS = ("--use_magcache", "--mag_ratios")
FAST = ("--use_magcache", "--magcache_speedup")
GOOD = ("--use_magcache", "--magcache_quality")
TRIALS = ("--magcache_calibration",)
PROMPTS = ("--prompt_file",)
BAD = [
    ((), "--ckpt_dir is needed"),
    (("--ckpt_dir", "nowhere"), "nowhere is not a folder"),
    (("--ckpt_dir", "{empty}"), "lacks config.json"),
    (("--ckpt_dir", "{no_vae}"), "lacks Wan2.1_VAE.pth"),
    (("--ckpt_dir", "{no_shard}"), "lacks diffusion_pytorch_model-00002-of-00002.safetensors"),
    (("--ckpt_dir", "{no_index}"), "lacks diffusion_pytorch_model.safetensors.index.json"),
    (("--ckpt_dir", "{no_tokenizer}"), "lacks google/umt5-xxl/tokenizer.json"),
    (("--ckpt_dir", "{broken}"), "broken config.json"),
    (("--ckpt_dir", "{i2v}"), "holds a model of type i2v, task t2v-1.3B needs t2v"),
    (("--ckpt_dir", "{vace}"), "holds a model of type vace, task t2v-1.3B needs t2v"),
    (("--ckpt_dir", "{ok}", "--size", "1280*720"), "task t2v-1.3B supports 480*832, 832*480, not 1280*720"),
    (("--ckpt_dir", "{ok}", "--size", "7*7"), "invalid choice"),
    (("--ckpt_dir", "{ok}", "--prompt", "caf\udce9"), "--prompt is no valid UTF-8 text"),
    (("--ckpt_dir", "{ok}", "--frame_num", "80"), "--frame_num must be 4n+1"),
    (("--ckpt_dir", "{ok}", "--frame_num", "-3"), "--frame_num must be 4n+1"),
    (("--ckpt_dir", "{ok}", "--sample_steps", "0"), "--sample_steps must be at least 1"),
    (("--ckpt_dir", "{ok}", "--magcache_K", "-1"), "K must be a whole number >= 0, got -1"),
    (("--ckpt_dir", "{ok}", "--use_magcache", "--magcache_thresh", "-0.1"), "thresh must be a finite number >= 0"),
    (("--ckpt_dir", "{ok}", "--use_magcache", "--magcache_thresh", "nan"), "thresh must be a finite number >= 0"),
    (("--ckpt_dir", "{ok}", "--use_magcache", "--retention_ratio", "1.5"), "retention_ratio must be in [0, 1]"),
    (("--ckpt_dir", "{ok}", "--use_magcache", "--mag_ratios", "nothing"), "with --magcache_calibration in place of"),
    (("--ckpt_dir", "{ok}", "--magcache_calibration", "--sample_steps", "1"), "needs --sample_steps 2"),
    (("--ckpt_dir", "{ok}", "--magcache_calibration", "--sample_guide_scale", "1"), "there is only one"),
    (("--ckpt_dir", "{ok}", "--magcache_calibration", "--save_file", "{ok}/config.json/x.mp4"), "cannot write"),
    (("--ckpt_dir", "{ok}", *RATIOS, "{tables}"), "cannot read the ratio table"),
    (("--ckpt_dir", "{ok}", *RATIOS, "{tables}/empty.json"), "cannot read the ratio table"),
    (("--ckpt_dir", "{ok}", *RATIOS, "{tables}/odd.json"), "pairs of cond and uncond, got 3 numbers"),
    (("--ckpt_dir", "{ok}", *RATIOS, "{tables}/nan.json"), "ratio 1 is nan"),
    (("--ckpt_dir", "{ok}", *RATIOS, "{tables}/absurd.json"), "ratio 0 is 1e+30"),
    (("--ckpt_dir", "{ok}", *FAST, "51"), "--magcache_speedup must be between 1 and 50"),
    (("--ckpt_dir", "{ok}", *GOOD, "0"), "--magcache_quality must be a positive number of dB, got 0.0"),
    (("--ckpt_dir", "{ok}", *GOOD, "40"), "t2v-1.3B holds no trials; measure one by the same command with"),
    (("--ckpt_dir", "{ok}", *GOOD, "40", "--mag_ratios", "nothing"), "--magcache_calibration 2,2.5,3,4 in place of"),
    (("--ckpt_dir", "{ok}", *GOOD, "40", "--mag_ratios", "{tables}/broken.json"), "broken.json cannot be read: "),
    (("--ckpt_dir", "{ok}", *TRIALS, ""), "--magcache_calibration is empty"),
    (("--ckpt_dir", "{ok}", *TRIALS, "1,2"), "above 1 and at most 50, got 1"),
    (("--ckpt_dir", "{ok}", *TRIALS, "2,nan"), "above 1 and at most 50, got nan"),
    (("--ckpt_dir", "{ok}", *TRIALS, "2,51"), "above 1 and at most 50, got 51"),
    (("--ckpt_dir", "{ok}", *TRIALS, "3,3.05"), "compute the same number of 50 steps: [16, 16]"),
    (("--ckpt_dir", "{ok}", *TRIALS, "1.2,1.3,1.4,1.5,1.6,2"), "uncached runs a prompt, more than 2.5: leave out"),
    (("--ckpt_dir", "{ok}", *TRIALS, "1.5,1.75,2,2.5,3,4"), "would cost 2.58 uncached runs"),  # 2.2, and the constants
    (("--ckpt_dir", "{ok}", *PROMPTS, "none.txt"), "--prompt_file: cannot read none.txt"),
    (("--ckpt_dir", "{ok}", *PROMPTS, "{prompts}/ending.jsonl"), "prompt 1: --save_file must end in one of"),
    (("--ckpt_dir", "{ok}", *PROMPTS, "{prompts}/image.jsonl"), "names images, task t2v-1.3B takes none"),
    (("--ckpt_dir", "{ok}", *PROMPTS, "{prompts}/two.txt", "--save_file", "film.mp4"), "must be a folder"),
    ((*I2V, *PROMPTS, "{prompts}/two.txt"), "prompt 1 has no image, and there is no --image"),
    ((*I2V, *PROMPTS, "{prompts}/image.jsonl"), "prompt 2 has no image, and there is no --image"),
    ((*I2V, *PROMPTS, "{prompts}/image.jsonl", "--image", "{pictures}/whole.png"), "cannot read none.png: No such"),
    (("--ckpt_dir", "{ok}", "--base_seed", "99999999999999999999"), "--base_seed must be below"),
    (("--ckpt_dir", "{ok}", "--sample_guide_scale", "nan"), "--sample_guide_scale must be finite"),
    (("--ckpt_dir", "{ok}", "--save_file", "film.png"), "must end in one of .mp4"),
    (("--ckpt_dir", "{ok}", "--save_file", "film.webm"), "must end in one of .mp4"),
    (("--ckpt_dir", "{ok}", "--save_file", "out/"), "is a folder"),
    (("--ckpt_dir", "{ok}", "--save_file", "/"), "is a folder"),
    (("--ckpt_dir", "{ok}", "--offload_model", "maybe"), "expected a truth value"),
    (("--ckpt_dir", "{ok}", "--save_file", "no/such/folder/x.mp4"), "no/such/folder/x.mp4': No such file or directory"),
    (("--ckpt_dir", "{ok}", "--task", "t2i-14B", "--frame_num", "5"), "makes one image: --frame_num must be 1"),
    (("--ckpt_dir", "{ok}", "--task", "flf2v-14B"), "holds a model of type t2v, task flf2v-14B needs flf2v"),
    (("--ckpt_dir", "{ok}", "--task", "i2v-14B"), "holds a model of type t2v, task i2v-14B needs i2v"),
    (("--ckpt_dir", "{ok}", "--task", "vace-1.3B"), "holds a model of type t2v, task vace-1.3B needs vace"),
    ((*I2V, "--ckpt_dir", "{no_clip}"), "lacks models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
    ((*I2V, "--prompt", "a"), "task i2v-14B needs --image"),
    ((*I2V, "--prompt", "a", "--image", "none.png"), "cannot read none.png: No such file"),
    ((*I2V, "--prompt", "a", "--image", "{pictures}/cut.png"), "cut.png: not a complete image"),
    ((*I2V, "--prompt", "a", "--image", "{pictures}/config.json"), "config.json: no image of a format"),
    ((*I2V, "--prompt", "a", "--image", "{pictures}/alpha.png"), "transparent (alpha channel)"),
    ((*I2V, "--prompt", "a", "--image", "{pictures}/line.png"), "1x400 pixels, it needs at least 16"),
    ((*I2V, "--prompt", "a", "--image", "{pictures}/wide.png"), "one side may be 5 times the other"),
    ((*FLF2V, "--prompt", "a", "--first_frame", "{pictures}/whole.png"), "needs --last_frame"),
    ((*FLF2V, "--prompt", "a", "--last_frame", "{pictures}/whole.png"), "needs --first_frame"),
    ((*FLF2V, "--prompt", "a", *FRAMES, "--frame_num", "1"), "needs --frame_num 5 or more"),
    ((*FLF2V, "--prompt", "a", *FRAMES, "--use_magcache"), "no ratio table fits task flf2v-14B"),
    ((*FLF2V, "--prompt", "a", *FRAMES, "--use_magcache"), "or name the table of another model"),
    ((*VACE, "--prompt", "a", "--src_video", "none.mp4"), "cannot read none.mp4: no such file"),
    ((*VACE, "--prompt", "a", "--src_video", "{pictures}/cut.mp4"), "cannot read"),
    ((*VACE, "--prompt", "a", "--src_video", "{pictures}/text.png"), "cannot read"),
    ((*VACE, "--prompt", "a", "--src_video", "{pictures}/thin.mp4"), "2*48 pixels are too few or too narrow"),
    ((*VACE, "--prompt", "a", "--src_mask", "{pictures}/long.mp4"), "needs a source video"),
    ((*VACE, "--prompt", "a", *VIDEO, "--src_mask", "{pictures}/long.mp4"), "has 9 frames, the video"),
    ((*VACE, "--prompt", "a", *VIDEO, "--src_mask", "{pictures}/large.mp4"), "has 80*48 pixels, the video"),
    ((*VACE, "--prompt", "a", "--src_ref_images", "{pictures}/whole.png,no.png"), "cannot read no.png"),
    (("--ckpt_dir", "{ok}", "--use_prompt_extend", "--prompt_extend_model", "{empty}"), "no usable config.json"),
    (("--ckpt_dir", "{ok}", "--use_prompt_extend", "--prompt_extend_model", "no/such"), "neither a folder nor in the"),
    (("--ckpt_dir", "{ok}", "--use_prompt_extend", "--prompt_extend_method", "dashscope"), "set DASH_API_KEY"),
    (("--ckpt_dir", "{ok}", "--dit_fsdp"), "start them with torchrun"),
    (("--ckpt_dir", "{ok}", "--t5_fsdp"), "start them with torchrun"),
    (("--ckpt_dir", "{ok}", "--ulysses_size", "2"), "need 2 processes: start them with torchrun --nproc_per_node 2"),
]


def write_bad_pictures(folder):
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (24, 400, 4), np.uint8)
    Image.fromarray(noise[:, :40, :3]).save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "config.json").write_text("{}")
    Image.fromarray(noise[:, :40]).save(folder / "alpha.png")
    Image.fromarray(noise[:, :, :3]).save(folder / "wide.png")
    Image.fromarray(noise[0, :, None, :3]).save(folder / "line.png")
    for name, frames, width in (("film", 5, 64), ("long", 9, 64), ("large", 5, 80), ("thin", 5, 2)):
        write_video(folder / f"{name}.mp4", np.resize(noise[:, :, :3], (frames, 48, width, 3)), 16)
    content = (folder / "film.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    (root / "empty").mkdir()
    write_checkpoint("t2v", root / "ok")
    shutil.copytree(root / "ok", root / "no_vae")
    (root / "no_vae" / "Wan2.1_VAE.pth").unlink()
    shutil.copytree(root / "ok", root / "no_tokenizer")
    (root / "no_tokenizer" / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    shutil.copytree(root / "ok", root / "broken")
    (root / "broken" / "config.json").write_text("[]")
    shutil.copytree(root / "ok", root / "no_shard")
    first, second = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = {"metadata": {}, "weight_map": {"head.head.bias": first, "head.head.weight": second}}
    (root / "no_shard" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (root / "no_shard" / "diffusion_pytorch_model.safetensors").rename(root / "no_shard" / first)
    shutil.copytree(root / "no_shard", root / "no_index")
    (root / "no_index" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for kind in ("i2v", "flf2v", "vace"):
        write_checkpoint(kind, root / kind)
    shutil.copytree(root / "i2v", root / "no_clip")
    (root / "no_clip" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth").unlink()
    write_bad_pictures(root / "pictures")
    (root / "tables").mkdir()
    other = {"mag_ratio": [0.9, 0.9], "measured_on": {"task": "i2v-14B"}}
    contents = {"empty": "", "odd": "[1, 1, 1]", "nan": "[0.9, NaN]", "absurd": "[1e30, 1]", "flat": "[0.9, 0.9]"}
    contents |= {"other": json.dumps(other), "broken": json.dumps(other | {"trials": {"rows": 3}})}
    for name, content in contents.items():
        (root / "tables" / f"{name}.json").write_text(content)
    (root / "prompts").mkdir()
    contents = {
        "two.txt": "a\nb",
        "bad.jsonl": '{"prompt": "a"}\n{"prompt": "b", "step": 3}',
        "same.jsonl": '{"prompt": "a", "save_file": "x.mp4"}\n{"prompt": "b"}\n{"prompt": "c", "save_file": "./x.mp4"}',
        "ending.jsonl": '{"prompt": "a", "save_file": "x.webm"}',
        "image.jsonl": '{"prompt": "a", "image": "none.png"}\n{"prompt": "b"}',
    }
    for name, content in contents.items():
        (root / "prompts" / name).write_text(content)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if type(value) is tuple else ""
)
def test_bad_input(arguments, message, folders, monkeypatch, capsys):
    """One line and exit code 2, before any weight is read. The flags are checked in this process, to be quick."""
    load = torch.load
    monkeypatch.setattr(
        torch,
        "load",
        lambda *args, **how: load(*args, **how) if how["map_location"] == "meta" else pytest.fail("read weights"),
    )
    arguments = [argument.format_map(folders) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["magcache_generate.py", "--task", "t2v-1.3B", "--size", "832*480", *arguments])
    with pytest.raises(SystemExit) as stopped:
        magcache_generate.main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "missing", "message"),
    [
        (("--ulysses_size", "4"), None, "2 processes are no multiple of --ulysses_size 4 times --ring_size 1"),
        (("--ulysses_size", "2"), "MASTER_PORT", "WORLD_SIZE is set but MASTER_PORT is not"),
    ],
)
@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_processes_that_do_not_fit(flags, missing, message, local_rank, monkeypatch, capsys):
    """Said once a machine."""
    torchrun = {"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": local_rank, "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.delenv(missing)
    monkeypatch.setattr(sys, "argv", ["magcache_generate.py", "--ckpt_dir", "x", "--prompt", "a fox", *flags])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # of which only the first process keeps its own
    with pytest.raises(SystemExit) as stopped:
        magcache_generate.main()
    assert stopped.value.code == 2
    assert (message in capsys.readouterr().err) == (local_rank == "0")


def test_bad_input_in_a_real_process(tmp_path):
    flags = ("--task", "t2v-1.3B", "--size", "832*480", "--ckpt_dir", tmp_path / "nowhere")
    result = run(*flags, python_flags=())
    assert result.returncode == 2
    assert result.stderr == f"magcache_generate.py: error: --ckpt_dir {tmp_path / 'nowhere'} is not a folder\n"


def test_a_damaged_checkpoint(tmp_path):
    """One line, whichever file it is."""
    shutil.copytree(DEMO, tmp_path / "model")
    weights = tmp_path / "model" / "Wan2.1_VAE.pth"
    weights.write_bytes(weights.read_bytes()[:-1000])
    flags = ("--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", tmp_path / "model", "--prompt", PROMPT)
    result = run(*flags, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"magcache_generate.py: error: cannot read {weights}, is it complete? (")
    assert result.stderr.count("\n") == 1


def test_a_renamed_folder():
    """The task decides on the table, whatever the folder is called."""
    assert job_of("--task", "t2v-14B", "--ckpt_dir", "abc", "--use_magcache").made_by == "table t2v-14B"


def test_images_of_a_prompt_file(tmp_path):
    """A line without one has that of --image, whatever the lines before it have."""
    (tmp_path / "list.jsonl").write_text('{"prompt": "a", "image": "own.png"}\n{"prompt": "b"}')
    flags = ["--task", "i2v-14B", "--ckpt_dir", "x", "--image", "all.png", "--prompt_file", tmp_path / "list.jsonl"]
    assert [request.image for request in make_requests(job_of(*flags))] == ["own.png", "all.png"]


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
    result = demo("--n_prompt", unwanted, "--size", "64x64", "--save_file", tmp_path / "film.mp4", steps=2)
    assert f"\nn_prompt  {unwanted}\n" in result.stdout
    film = iio.imread(tmp_path / "film.mp4")
    assert np.array_equal(film, frames_of(generated(2, n_prompt=unwanted), tmp_path / "api.mp4"))
    assert not np.array_equal(film, frames_of(generated(2), tmp_path / "other.mp4"))
    command = json.loads((tmp_path / "film.json").read_text())["command"]
    assert command[command.index("--n_prompt") + 1] == unwanted
    assert command[command.index("--size") + 1] == "64*64"


def test_negative_prompts_of_a_file(tmp_path):
    lines = [{"prompt": "a fox"}, {"prompt": "a hen", "n_prompt": "a farm"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    where = ("--prompt_file", tmp_path / "prompts.jsonl", "--save_file", tmp_path)
    for flags, expected in (((), [None, "a farm"]), (("--n_prompt", "rain"), ["rain", "a farm"])):
        assert [request.n_prompt for request in make_requests(job_of("--ckpt_dir", DEMO, *where, *flags))] == expected


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


def test_a_table_of_another_model_is_used_with_a_notice(folders, capsys):
    flags = f"--task t2v-1.3B --size 832*480 --ckpt_dir x --use_magcache --mag_ratios {folders['tables']}/other.json"
    job_of(*flags.split())
    assert "was measured on task i2v-14B, not t2v-1.3B" in capsys.readouterr().out


def test_text_to_image(tmp_path, folders):
    result = run("--task", "t2i-14B", "--size", "480*832", "--ckpt_dir", folders["ok"], "--sample_steps", 2,
                 "--use_magcache", "--save_file", tmp_path / "fox.png")  # fmt: skip
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
