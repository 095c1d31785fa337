"""Flags that make a model fit its card, from the command line, and what is said of the memory that a run cost."""

import contextlib
import dataclasses
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from commands import SCRIPT, TINY, job_of, python
from full_size import make_model
from peak import Peak
from pretended_card import PretendedCard
from torch._subclasses.fake_tensor import FakeTensorMode

from examples.card import Subject
from magcache.app import cost, tell
from magcache.app.errors import Refused
from magcache.app.our_wan import check_machine
from magcache.app.processes import Processes
from magcache.app.requests import make_requests
from magcache.app.tasks import TASKS

TASK = (*TINY, "--sample_steps", 5, "--base_seed", 3)
CACHE = ("--use_magcache", "--magcache_thresh", 0.3, "--magcache_K", 2)
RUNS = {
    "plain": (),
    "bfloat16": ("--dit_dtype", "bfloat16"),
    "float8": ("--dit_dtype", "float8_e4m3fn"),
    "offload": ("--offload_blocks",),
    "offload_t5_cpu": ("--offload_blocks", "--t5_cpu"),
    "tiling": ("--vae_tiling",),
    "compiled": ("--compile",),
    "attention": ("--attn_backend", "_native_math"),
    "cached": CACHE,
    "all": (
        *("--dit_dtype", "bfloat16", "--offload_blocks", "--vae_tiling", "--compile"),
        *("--attn_backend", "native", *CACHE),
    ),
}
# PSNR in dB of the files against the plain run, which is under no autocast
CLOSE = {"offload": 45, "offload_t5_cpu": 45, "tiling": 45, "compiled": 45, "attention": 45, "bfloat16": 35}


def psnr(frames, reference):
    error = np.square(frames.astype(float) - reference).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


@pytest.mark.slow
def test_every_flag(tmp_path):
    prompt = ("--prompt", "a green square moves up on a gray background")
    commands = [[*TASK, *prompt, *flags, "--save_file", tmp_path / f"{name}.mp4"] for name, flags in RUNS.items()]
    runs = json.dumps([[str(SCRIPT), *map(str, command)] for command in commands])
    code = "import json, runpy, sys\n"
    code += "for sys.argv in json.loads(sys.argv[1]): runpy.run_path(sys.argv[0], run_name='__main__')"
    result = python("-c", code, runs)
    assert "device    CPU, float8_e4m3fn" in result.stdout
    films = {path.stem: iio.imread(path) for path in tmp_path.glob("*.mp4")}
    for name, least in CLOSE.items():
        assert psnr(films[name], films["plain"]) >= least, name
    assert 20 < psnr(films["float8"], films["bfloat16"]) < 60
    assert psnr(films["all"], films["cached"]) > 30
    assert not np.array_equal(films["cached"], films["plain"])
    record = json.loads((tmp_path / "all.json").read_text())
    assert {"--compile", "--vae_tiling", "--offload_blocks", "--dit_dtype"} <= set(record["command"])


REAL = [name for name, task in TASKS.items() if not task.is_demo and not task.makes_image]


@pytest.mark.parametrize("task", REAL)
def test_the_weights_are_counted(task):
    with torch.device("meta"):
        model = make_model(task)
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        held = sum(
            4 * p.numel()
            if set(name.split(".")) & set(model._keep_in_fp32_modules)
            else p.numel() * getattr(torch, dtype).itemsize
            for name, p in model.named_parameters()
        )
        assert cost.weight_bytes(TASKS[task].architecture, dtype) == held


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B", "vace-1.3B", "ti2v-5B"])
def test_activations_are_those_that_are_allocated(task, autocast, monkeypatch):
    """With a timestep for every token where the task may have a picture."""
    subject, by_token = Subject(task, "832*480", 81, layers=3), task == "ti2v-5B"
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model, given = subject.model(torch.float32), subject.arguments()
        if by_token:
            given["t"] = torch.zeros(1, subject.tokens)
            two = torch.zeros(2), torch.zeros(1, subject.tokens, dtype=torch.int64)
            monkeypatch.setattr(torch.Tensor, "unique", lambda *_, **__: two)  # fake tensors know no values
        with Peak() as peak:
            model(**given)
    assert cost.call_bytes(subject.shape, subject.tokens, autocast, by_token) == pytest.approx(peak.bytes, rel=0.1)


def test_the_warning_before_loading(monkeypatch, capsys):
    """On a machine that says it has a card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags, gigabytes, warned in (
        (("--task", "t2v-14B"), 24, True),
        (("--task", "t2v-14B"), 80, False),
        (("--task", "t2v-14B", "--offload_blocks"), 24, False),
        (("--task", "t2v-1.3B", "--size", "832*480"), 12, True),
        (("--task", "t2v-1.3B", "--size", "832*480", "--t5_cpu"), 12, False),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda size=gigabytes: (size * 10**9, size * 10**9))
        job = job_of("--ckpt_dir", "x", *flags)
        width, height = job.sampling.pixels
        tell.tell_needs(job, (81, height, width))
        said = capsys.readouterr()
        assert said.out.startswith("needs     about ")
        assert ("warning: this run needs about" in said.err) == warned, flags


def planned(*flags):
    """What a plan of t2v-14B at 720p cost."""
    job = job_of("--task", "t2v-14B", "--use_magcache", "--magcache_speedup", 2, "--magcache_plan", *flags)
    return job, cost.needs_of(job, (81, 720, 1280), cuda=True)


def test_the_plan_knows_what_stays_on_the_card():
    """Where another video follows, or the same one without the cache, and models are not brought back in between; the
    last video leaves nothing there."""
    stays = ("--offload_model", "False")
    (_, one), (_, compared), (_, kept), (_, kept_once) = (
        planned(*flags) for flags in ((), ("--compare",), ("--compare", *stays), stays)
    )
    assert kept.card == pytest.approx(kept.weights + kept.text + cost.CONTEXT + cost.VAE_WEIGHTS[16] + kept.vae)
    assert one.card == compared.card == kept_once.card < kept.card
    job, shared = planned("--ulysses_size", 8, "--compare")  # several processes keep them by default
    assert not job.machine.offload_model and shared.card == pytest.approx(kept.card)


def test_the_plan_knows_what_waits_in_the_machine():
    (_, one), (_, compared), (_, blocks) = (planned(*flags) for flags in ((), ("--compare",), ("--offload_blocks",)))
    assert one.host == cost.weight_bytes(TASKS["t2v-14B"].architecture, "bfloat16")
    assert compared.host == one.host + compared.text  # the text encoder comes back from the card
    assert one.host < blocks.host < 1.05 * one.host + 2.2e9
    assert str(blocks).endswith(" GB of the host")


def test_the_needs_of_sharded_weights(monkeypatch):
    (job, two), (_, eight) = planned("--dit_fsdp", "--t5_fsdp"), planned("--dit_fsdp", "--t5_fsdp", "--ulysses_size", 8)
    assert job.machine.group_size == 2  # of a number that the plan does not know
    plain = planned("--dit_dtype", "float32")[1]
    assert two.text == plain.text / 2 and eight.text == plain.text / 8
    block = (
        2 * cost.parameters(TASKS["t2v-14B"].architecture, "blocks.0.")[0] * cost.BYTES["bfloat16"]
    )  # this and the next
    assert plain.weights / 2 < two.weights - block < 0.51 * plain.weights
    assert plain.weights / 8 < eight.weights - block < 0.14 * plain.weights
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    assert job_of("--ckpt_dir", "x", "--task", "t2v-14B", "--dit_fsdp").machine.group_size == 4
    assert job_of("--ckpt_dir", "x", "--task", "t2v-14B", "--dit_fsdp", "--ulysses_size", 2).machine.group_size == 2
    assert job_of("--ckpt_dir", "x", "--task", "t2v-14B").machine.group_size == 1


def test_what_an_old_torch_cannot_do_is_refused(monkeypatch):
    """Sharding weights of two dtypes; compiling a cast of float8 for a card as old as an A800."""
    job = job_of("--ckpt_dir", "x", "--task", "t2v-14B")
    sharded = dataclasses.replace(job.machine, dit_fsdp=True, dit_dtype="bfloat16")
    compiled = dataclasses.replace(job.machine, compile=True, dit_dtype="float8_e4m3fn")
    check_machine(sharded)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0+cu128"))
    with pytest.raises(Refused, match=r"--dit_fsdp with --dit_dtype bfloat16 needs torch 2\.9 or newer"):
        check_machine(sharded)
    check_machine(dataclasses.replace(sharded, dit_dtype=None))
    check_machine(compiled)
    for capability in ((9, 0), (8, 0)):
        with PretendedCard(), monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
            refused = pytest.raises(Refused, match=r"--compile with --dit_dtype float8_e4m3fn needs torch 2\.13")
            with refused if capability < (8, 9) else contextlib.nullcontext():
                check_machine(compiled)


def test_a_calibration_keeps_two_residuals():
    job, _ = planned()
    plain = dataclasses.replace(job, cache=None)
    measured = dataclasses.replace(plain, calibration=Path("table.json"))
    more = cost.needs_of(measured, (81, 720, 1280)).cached - cost.needs_of(plain, (81, 720, 1280)).cached
    assert more == 2 * 4 * 5120 * 21 * 45 * 80  # branches, bytes, width, tokens


def test_more_processes_than_cards(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="there are 8 processes on this machine, but only 4 GPUs"):
        Processes.from_environment().check_gpus()


def test_names_in_a_folder_tell_what_changes_the_video(tmp_path):
    """A rerun without the flag makes another file."""
    (tmp_path / "prompts.txt").write_text("a fox")
    flags = [(), ("--dit_dtype", "float8_e4m3fn"), ("--vae_tiling",), ("--compile",), ("--attn_backend", "flash")]
    batch = ("--ckpt_dir", "x", "--prompt_file", tmp_path / "prompts.txt")
    names = [make_requests(job_of(*batch, *more))[0].path for more in (("--offload_blocks",), *flags)]
    assert names[0] == names[1]
    assert len(set(names)) == len(flags)


def test_needs_of_a_run_without_a_card(capsys):
    tell.tell_needs(job_of("--ckpt_dir", "x", "--task", "t2v-14B"), (81, 720, 1280))
    assert capsys.readouterr().out == "needs     57.2 GB for the weights of the transformer (float32)\n"
