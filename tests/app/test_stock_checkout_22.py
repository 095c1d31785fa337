"""The script, copied into a folder that stands in for a stock Wan2.2 checkout."""

import json
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import pytest
import test_stock_checkout as of_21
import torch
from checkpoints_22 import write_checkpoint_22
from commands import REPO, python

import magcache
from magcache.app.tasks import TASKS

pytestmark = pytest.mark.slow
IMAGE, LAYERS = of_21.IMAGE, of_21.LAYERS
STEPS = 10
SIZE = {"t2v-A14B": "832*480", "i2v-A14B": "832*480", "ti2v-5B": "1280*704"}
BOUNDARY = {"t2v-A14B": 0.875, "i2v-A14B": 0.9}
SHIFT = {"t2v-A14B": 12.0, "i2v-A14B": 5.0, "ti2v-5B": 5.0}
CACHE = ("--use_magcache", "--magcache_speedup", 2)


def make_checkout(folder: Path) -> Path:
    """With a checkpoint of every task, by its name."""
    of_21.make_checkout(folder, kinds=())
    shutil.rmtree(folder / "xfuser")
    shutil.copytree(REPO / "tests" / "stock_checkout_22", folder, dirs_exist_ok=True)
    for task in SIZE:
        write_checkpoint_22(task, folder / task)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("stock") / "Wan2.2")


def run(checkout, task, *flags, **how):
    """As for Wan2.1; the task's flags come first."""
    flags = ("--task", task, "--ckpt_dir", task, "--frame_num", 5, "--prompt", "a fox", "--save_file", "a.mp4", *flags)
    return of_21.run(checkout, "--sample_steps", STEPS, "--size", SIZE[task], *flags, **how)


def schedule_of(task, **settings):
    given = {"shift": SHIFT[task], "boundary": BOUNDARY.get(task)} | settings
    return magcache.plan_speedup(STEPS, 2, **given)


def experts_of(schedule):
    return [] if schedule.boundary is None else ["high"] * schedule.switch + ["low"] * (STEPS - schedule.switch)


OWN_LOOP = """
import random, sys, torch, wan
from PIL import Image
from wan.configs import WAN_CONFIGS
config, image = WAN_CONFIGS[sys.argv[1]], [Image.open(name).convert("RGB") for name in sys.argv[5:]]
pipeline = getattr(wan, sys.argv[2])(config, sys.argv[1], use_sp=False, convert_model_dtype=False)
shape = {"max_area": eval(sys.argv[3])} if image else {"size": tuple(map(int, sys.argv[3].split("*")))}
pipeline.generate(
    "a fox", *image, **shape, frame_num=5, shift=config.sample_shift, sampling_steps=int(sys.argv[4]),
    guide_scale=config.sample_guide_scale, seed=1,
)
"""


@pytest.mark.parametrize(
    ("task", "image"), [("t2v-A14B", ()), ("i2v-A14B", IMAGE), ("ti2v-5B", ()), ("ti2v-5B", IMAGE)]
)
def test_one_process(task, image, checkout):
    """Uncached it is what the package itself makes; cached it makes the calls that are announced."""
    images = [image] if image else []
    flags = [argument for path in images for argument in ("--image", path)]
    result, (plain,) = run(checkout, task, *flags)
    assert f"off: all {2 * STEPS} transformer calls computed" in result.stdout
    python("-c", OWN_LOOP, task, TASKS[task].pipeline, SIZE[task], STEPS, *images, cwd=checkout)
    own = torch.load(checkout / "record.0.pt", weights_only=False)
    assert plain | {"latent": None} == own | {"latent": None}
    torch.testing.assert_close(plain["latent"], own["latent"], rtol=0, atol=1e-6)
    assert plain["calls"] == [LAYERS] * 2 * STEPS

    result, (cached,) = run(checkout, task, *flags, *CACHE)
    schedule = schedule_of(task)
    assert cached["calls"] == [0 if reuse else LAYERS for reuse in schedule.reuse]
    assert cached["experts"] == plain["experts"] == experts_of(schedule)
    assert f"{schedule.computed} of {2 * STEPS} calls computed" in result.stdout
    assert "did not follow the schedule" not in result.stderr
    assert 0 < (cached["latent"] - plain["latent"]).abs().max() < (plain["latent"]).abs().max()
    assert len(iio.imread(checkout / "a.mp4")) == 5
    assert iio.immeta(checkout / "a.mp4")["fps"] == (24 if task == "ti2v-5B" else 16)


SHARED, SHARDED = ("--ulysses_size", 2), ("--dit_fsdp", "--t5_fsdp")


@pytest.mark.parametrize(
    ("task", "more"),
    [("t2v-A14B", SHARED), ("t2v-A14B", SHARDED), ("ti2v-5B", (*SHARED, "--image", IMAGE))],
    ids=["sequence", "fsdp1", "times"],
)
def test_two_processes(task, more, checkout):
    flags = [*CACHE, "--convert_model_dtype"]
    result, (alone,) = run(checkout, task, *flags, *more[2 if "--image" in more else len(more) :])
    result, records = run(checkout, task, *flags, *more, processes=2)
    assert len(records) == 2
    for rank, record in enumerate(records):
        assert (record["device_id"], record["rank"], record["use_sp"]) == (rank, rank, "--ulysses_size" in more)
        assert record["convert_model_dtype"]
        assert record["calls"] == alone["calls"] == [0 if reuse else LAYERS for reuse in schedule_of(task).reuse]
        torch.testing.assert_close(record["latent"], alone["latent"], rtol=1e-4, atol=1e-5)
    assert result.stdout.count("2 processes, ") == 1


def test_the_command_of_upstream(checkout):
    """Task, settings, prompt and picture are those of the checkout, whose files may have been edited."""
    root = shutil.copytree(checkout, checkout.with_name("edited"))
    edits = {"wan_t2v_A14B": ("t2v_A14B.sample_steps = 10", "t2v_A14B.boundary = 0.95")}
    edits |= {"wan_i2v_A14B": ("i2v_A14B.sample_steps = 9", "i2v_A14B.sample_shift = 4.0")}
    for name, lines in (edits | {"shared_config": ("wan_shared_cfg.frame_num = 9",)}).items():
        with (root / "wan" / "configs" / f"{name}.py").open("a") as config:
            config.writelines(f"{line}\n" for line in lines)
    (root / "examples").mkdir()
    shutil.copy(IMAGE, root / "examples" / "cat.png")
    example = {"t2v-A14B": {"prompt": "two cats"}, "i2v-A14B": {"prompt": "a cat", "image": "examples/cat.png"}}
    (root / "generate.py").write_text(f"import nothing_of_the_kind\n\nEXAMPLE_PROMPT = {example!r}\n")

    result, (record,) = of_21.run(root, plain=("--ckpt_dir", "t2v-A14B", *CACHE))
    schedule = schedule_of("t2v-A14B", boundary=0.95)
    assert record["calls"] == [0 if reuse else LAYERS for reuse in schedule.reuse]
    assert record["experts"] == experts_of(schedule) != experts_of(schedule_of("t2v-A14B"))
    assert (record["prompt"], record["size"], record["frame_num"]) == ("two cats", (1280, 720), 9)
    assert (record["guide_scale"], record["shift"]) == ((3.0, 4.0), 12.0)

    upstream = ("--task", "i2v-A14B", "--ckpt_dir", "i2v-A14B", "--offload_model", True, "--sample_guide_scale", 4.5)
    result, (record,) = of_21.run(root, plain=(*upstream, "--infer_frames", 80, "--replace_flag", "--t5_cpu"))
    assert record["calls"] == [LAYERS] * 2 * 9
    assert (record["prompt"], record["guide_scale"], record["shift"]) == ("a cat", 4.5, 4.0)
    assert "note: --infer_frames is not used by task i2v-A14B" in result.stdout
    assert "note: --replace_flag is not used by task i2v-A14B" in result.stdout


def test_many_prompts_compared_and_recorded(checkout):
    """The command in a record makes its video again."""
    (checkout / "prompts.jsonl").write_text('{"prompt": "a fox", "seed": 1}\n{"prompt": "a hen", "n_prompt": "fog"}')
    flags = ("--task", "t2v-A14B", "--ckpt_dir", "t2v-A14B", "--size", "832*480", "--frame_num", 5, *CACHE)
    many = ("--prompt_file", "prompts.jsonl", "--save_file", "films", "--compare", "--convert_model_dtype")
    result, _ = of_21.run(checkout, plain=(*flags, "--sample_steps", STEPS, *many))
    assert result.stdout.count("compared  PSNR") == 2
    first, _ = sorted(checkout.glob("films/*.json"))
    record = json.loads(first.read_text())
    assert record["schedule"]["computed_calls"] == schedule_of("t2v-A14B").computed
    assert record["arguments"]["convert_model_dtype"] is True
    result, (again,) = of_21.run(checkout, plain=record["command"][2:])
    assert (again["guide_scale"], again["prompt"], again["convert_model_dtype"]) == ((3.0, 4.0), "a fox", True)


@pytest.mark.parametrize(("image", "kind"), [((), "text"), (("--image", IMAGE), "picture")])
def test_prompt_extension(image, kind, checkout):
    extension = ("--use_prompt_extend", "--prompt_extend_model", "qwen", "--prompt_extend_target_lang", "en")
    _, (record,) = run(checkout, "ti2v-5B", *image, *extension)
    assert record["prompt"] == f"a fox in en, at length, for ti2v-5B, of {kind}"


def test_lora_of_an_expert(checkout):
    of_21.write_lora(checkout, "t2v-A14B", part="low_noise_model")
    latents = []
    for flags in (("--ckpt_dir", "by_hand"), ("--lora", "low=a.safetensors"), ("--lora", "high=a.safetensors")):
        _, (record,) = run(checkout, "t2v-A14B", *flags)
        latents.append(record["latent"])
    expected, low, high = latents
    torch.testing.assert_close(low, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(high, expected, rtol=1e-4, atol=1e-5)


def test_the_plan(checkout):
    """Both experts wait in the machine's memory, as upstream holds them."""
    full = ("--size", "1280*720", "--frame_num", 81, "--magcache_plan", "--magcache_speedup", 2, "--ckpt_dir", "none")
    result, _ = run(checkout, "t2v-A14B", *full)
    assert "weights (float32) 57.2 GB" in result.stdout
    assert "activations 36.6 GB" in result.stdout, "with a modulation in float32 for every token"
    assert "126 GB of the host" in result.stdout
    result, _ = run(checkout, "t2v-A14B", *full, "--convert_model_dtype")
    assert "weights (bfloat16)" in result.stdout


LACKS = "raise ModuleNotFoundError(\"No module named 'librosa'\", name='librosa')\n"
UNCHANGED = of_21.UNCHANGED


@pytest.mark.parametrize(
    ("file", "content", "flags", "message"),
    [
        (*UNCHANGED, ("--task", "t2v-1.3B"), r"task t2v-1\.3B is of Wan2\.1, but the wan package here is Wan2\.2's"),
        (*UNCHANGED, ("--task", "s2v-14B", "--audio", "a.wav"), r"--task: invalid choice: 's2v-14B' \(choose"),
        (*UNCHANGED, ("--ring_size", 2), "--ring_size needs the wan package"),
        (*UNCHANGED, ("--offload_blocks",), r"--offload_blocks needs the wan package of .*; the one here is Wan2\.2's"),
        (*UNCHANGED, ("--use_magcache",), "--magcache_speedup"),
        (*UNCHANGED, ("--magcache_calibration",), "--magcache_speedup"),
        ("wan/__init__.py", LACKS, (), r"\(No module named 'librosa'\): .*pip install -r requirements_s2v\.txt -r req"),
        ("wan/modules/model.py", of_21.WITHOUT_FLASH, (), "needs the package flash_attn: pip install flash-attn"),
    ],
)
def test_what_is_refused(file, content, flags, message, checkout, tmp_path):
    result, records = run(of_21.edited(checkout, tmp_path, file, content), "t2v-A14B", *flags, code=2)
    assert not records
    assert re.search(rf"^magcache_generate.py: error: .*{message}.*\n\Z", result.stderr, re.MULTILINE)
