"""The script, copied into a folder that stands in for a stock Wan2.1 checkout, as users run it there."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from commands import EXAMPLES, REPO, SCRIPT, python, torchrun
from faults import warm
from golden_data import write_checkpoint
from safetensors.torch import load_file, save_file

import magcache
from magcache.app.job import Inputs
from magcache.app.stock_wan import StockWan

pytestmark = pytest.mark.slow
IMAGE = EXAMPLES / "girl.png"
FILM = REPO / "tests" / "golden" / "vace_source" / "video_a.mp4"
STEPS, LAYERS = 8, 2
CACHE = ("--use_magcache", "--magcache_thresh", "0.3", "--magcache_K", "2")


def make_checkout(folder: Path, packages=("magcache",), kinds=("t2v", "i2v", "flf2v", "vace")) -> Path:
    shutil.copytree(REPO / "tests" / "stock_checkout", folder)
    shutil.copy(SCRIPT, folder)
    for name in packages:
        shutil.copytree(REPO / name, folder / name)
    for kind in kinds:
        (write_checkpoint(kind, folder / kind) / "xlm-roberta-large").mkdir()
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("stock") / "Wan2.1")


def run(checkout, *flags, processes=1, env=None, plain=None, code=0):
    """Runs the copied script in its folder; a single process starts warm. plain: all flags, where the usual ones are
    not wanted. code: the expected exit code. Returns what came of it, and what the pipelines recorded, by rank."""
    for record in checkout.glob("record.*.pt"):
        record.unlink()
    flags = plain or ["--sample_steps", STEPS, "--size", "832*480", "--base_seed", 1, *flags]
    if processes == 1 and env is None:
        arrange, script = functools.partial(warm.only_from, checkout), checkout / "magcache_generate.py"
        result = warm.finished(flags, checkout, arrange, script, code)
    else:
        command = [*(torchrun(processes) if processes > 1 else ()), "magcache_generate.py", *flags]
        result = python(*command, code=code, cwd=checkout, env=env)
    return result, [torch.load(path, weights_only=False) for path in sorted(checkout.glob("record.*.pt"))]


def plan(table):
    schedule = magcache.plan(magcache.load_ratios(table), STEPS, 0.3, 2)
    assert any(schedule.reuse)
    return schedule


TEXT = ("--task", "t2v-1.3B", "--ckpt_dir", "t2v", "--frame_num", 5, "--prompt", "a fox", "--save_file", "a.mp4")
SHARED = ("--ulysses_size", 2)
SHARDED = ("--dit_fsdp", "--t5_fsdp")


@pytest.fixture(scope="module")
def in_one_process(checkout):
    """Record of the cached run that all others must repeat."""
    _, (record,) = run(checkout, *TEXT, *CACHE)
    return record


def test_one_process(checkout, in_one_process):
    result, (plain,) = run(checkout, *TEXT)
    assert "off: all 16 transformer calls computed" in result.stdout
    assert "the wan package here is made for one" in result.stdout
    assert plain["calls"] == [LAYERS] * 2 * STEPS
    assert not torch.equal(plain["latent"], in_one_process["latent"])
    assert "Warning" not in result.stderr, "upstream hides its warnings"
    assert in_one_process["calls"] == [0 if reuse else LAYERS for reuse in plan("t2v-1.3B").reuse]
    assert in_one_process["offload_model"] is True
    assert iio.imread(checkout / "a.mp4").shape == (5, 32, 32, 3)
    assert not list(checkout.glob("*.part*"))


def test_without_guidance(checkout):
    """Its pipeline makes two calls a step; at a guidance of 1 the second has no weight, and is not computed."""
    cached = magcache.plan_speedup(STEPS, 2, calls_per_step=1)
    expected = {"--base_seed": [LAYERS] * STEPS, "--use_magcache": [0 if reuse else LAYERS for reuse in cached.reuse]}
    for flag, calls in expected.items():
        more = (flag, "--magcache_speedup", 2) if flag == "--use_magcache" else (flag, 1)
        result, (record,) = run(checkout, *TEXT, "--sample_guide_scale", 1, "--n_prompt", "fog", *more)
        assert record["calls"][::2] == calls
        assert record["calls"][1::2] == [0] * STEPS
        assert record["n_prompt"] == "fog"
        assert f"{calls.count(LAYERS)} of {STEPS}" in result.stdout or flag == "--base_seed"
        assert "did not follow the schedule" not in result.stderr
        if flag == "--base_seed":
            _, (almost,) = run(checkout, *TEXT, "--sample_guide_scale", 1.000001)
            assert almost["calls"] == [LAYERS] * 2 * STEPS
            torch.testing.assert_close(record["latent"], almost["latent"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [SHARED, SHARDED], ids=["own-forward", "fsdp1"])
def test_two_processes(flags, checkout, in_one_process):
    (checkout / "a.mp4").unlink(missing_ok=True)
    result, records = run(checkout, *TEXT, *CACHE, *flags, processes=2)
    schedule = plan("t2v-1.3B")
    for rank, record in enumerate(records):
        assert (record["device_id"], record["rank"], record["use_usp"]) == (rank, rank, "--ulysses_size" in flags)
        assert record["calls"] == in_one_process["calls"]
        assert record["offload_model"] is False
        torch.testing.assert_close(record["latent"], in_one_process["latent"], rtol=1e-4, atol=1e-5)
        if "--ulysses_size" in flags:
            started = [("init_distributed_environment", rank, 2), ("initialize_model_parallel", 2, 1, 2)]
            assert record["xfuser"] == started
    assert len(records) == 2
    assert result.stdout.count("2 processes, ") == 1
    assert result.stdout.count(f"{schedule.computed} of {2 * STEPS} calls computed") == 1
    assert iio.imread(checkout / "a.mp4").shape == (5, 32, 32, 3)


def write_lora(checkout, folder, strength=1.0, part=""):
    """Of one layer, and a checkpoint into which it is merged, or into this part of it."""
    name, weights = "blocks.0.self_attn.v", "diffusion_pytorch_model.safetensors"
    by_hand = shutil.copytree(checkout / folder, checkout / "by_hand") / part / weights
    tensors = load_file(by_hand)
    dim = len(tensors[f"{name}.weight"])
    down, up = torch.linspace(-1, 1, 2 * dim).view(2, dim), torch.linspace(-1, 1, 2 * dim).view(dim, 2)
    halves = {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    save_file(halves, checkout / "a.safetensors")
    tensors[f"{name}.weight"] += strength * up @ down
    save_file(tensors, by_hand)


def test_lora(checkout):
    """It is merged before the weights are sharded, which upstream's pipelines do as they are made."""
    write_lora(checkout, "t2v", 0.5)
    _, (expected,) = run(checkout, *TEXT, "--ckpt_dir", "by_hand")
    for flags, processes in (((), 1), (SHARDED, 2)):
        _, records = run(checkout, *TEXT, "--lora", "a.safetensors:0.5", *flags, processes=processes)
        assert len(records) == processes
        for record in records:
            torch.testing.assert_close(record["latent"], expected["latent"], rtol=1e-4, atol=1e-5)
    _, (record,) = run(checkout, *TEXT, "--lora", "a.safetensors:0.49")
    assert not torch.allclose(record["latent"], expected["latent"], rtol=1e-4, atol=1e-5)


def test_vace(checkout):
    flags = ("--task", "vace-1.3B", "--ckpt_dir", "vace", "--prompt", "a fox", "--save_file", "v.mp4")
    result, (record,) = run(checkout, *flags, "--src_video", FILM, "--src_ref_images", f"{IMAGE}, {IMAGE}", *CACHE)
    # one block more than the main ones, for the hints, and none at all on reuse
    assert record["calls"] == [0 if reuse else LAYERS + 1 for reuse in plan("vace-1.3B").reuse]
    assert record["sources"] == ([str(FILM)], [None], [[str(IMAGE)] * 2], 81, (832, 480))
    assert record["size"] == (832, 480)
    assert "note: this wan package reads the source video after loading" in result.stdout


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"src_mask": IMAGE}, "needs a source video"),
        ({"src_video": "no.mp4"}, "cannot read no.mp4: no such file"),
        ({"src_video": FILM, "src_mask": REPO / "README.md"}, "cannot read .*README.md: it is not a video"),
        ({"src_video": FILM, "src_mask": IMAGE}, "cannot use .*girl.png: the wan package here takes no picture as a m"),
        ({"src_ref_images": f"{IMAGE},no.png"}, "cannot read no.png"),
    ],
)
def test_vace_sources_are_checked(sources, message):
    with pytest.raises(ValueError, match=message):
        StockWan().read_sources(None, Inputs(**sources))


@pytest.mark.parametrize(("kind", "inputs"), [("i2v", ("image",)), ("flf2v", ("first_frame", "last_frame"))])
def test_images(kind, inputs, checkout):
    images = (argument for flag in inputs for argument in (f"--{flag}", IMAGE))
    flags = ("--task", f"{kind}-14B", "--ckpt_dir", kind, "--prompt", "a fox", *images)
    extension = ("--use_prompt_extend", "--prompt_extend_model", "qwen", "--prompt_extend_target_lang", "en")
    table = "i2v-14B-480P"
    result, (record,) = run(checkout, *flags, "--save_file", "i.mp4", *extension, *CACHE, "--mag_ratios", table)
    assert record["calls"] == [0 if reuse else LAYERS for reuse in plan(table).reuse]
    assert record["max_area"] == 832 * 480
    assert record["prompt"] == f"a fox in en, at length, for {kind}-14B, of picture"
    assert "note: {" not in result.stdout


def test_calibration_of_a_sharded_model_with_its_own_forward(checkout):
    _, records = run(checkout, *TEXT, "--magcache_calibration", *SHARED, *SHARDED, processes=2)
    assert [record["calls"] for record in records] == [[LAYERS] * 2 * STEPS] * 2
    (path,) = checkout.glob("t2v-1.3B_*.json")
    ratios = json.loads(path.read_text())["mag_ratio"]
    assert json.loads((checkout / "wan2_1_mag_ratio.json").read_text()) == ratios
    assert magcache.load_ratios(path) == (1.0, 1.0, *ratios)
    assert len(set(ratios)) > STEPS


def test_calibration_without_guidance(checkout):
    """Measures both calls that its pipeline makes, and serves a run that makes one."""
    flags = (*TEXT, "--save_file", "one/a.mp4", "--sample_guide_scale", 1)
    _, (record,) = run(checkout, *flags, "--magcache_calibration")
    (path,) = (checkout / "one").glob("t2v-1.3B_*.json")
    table = magcache.load_table(path)
    assert record["calls"] == [LAYERS] * 2 * STEPS
    assert len(table.ratios) == 2 * STEPS
    assert table.ratios[2::2] != table.ratios[3::2]
    _, (cached,) = run(checkout, *flags, *CACHE, "--mag_ratios", path)
    schedule = magcache.plan(table.ratios, STEPS, 0.3, 2, calls_per_step=1)
    assert cached["calls"][::2] == [0 if reuse else LAYERS for reuse in schedule.reuse]


def test_the_plan(checkout):
    """Tells of upstream's weights, and takes no flag that the run refuses."""
    flags = ("--task", "t2v-14B", "--ckpt_dir", "none", "--magcache_plan")
    result, _ = run(checkout, *flags)
    assert "weights (float32) 57.2 GB" in result.stdout
    result, _ = run(checkout, *flags, "--dit_dtype", "bfloat16", code=2)
    assert "--dit_dtype needs the wan package of magcache_generate.py" in result.stderr


@pytest.mark.parametrize(
    ("task", "pictures"),
    [("t2v-1.3B", {}), ("i2v-14B", {"image": "cat.png"}), ("vace-1.3B", {"src_ref_images": "a.png,b.png"})],
)
def test_the_example_is_upstreams(task, pictures, checkout, tmp_path):
    """Of its script, which is read and not run, with the pictures that it names."""
    root = shutil.copytree(checkout, tmp_path / "Wan2.1")
    (root / "examples").mkdir()
    for name in ("cat.png", "a.png", "b.png"):
        shutil.copy(IMAGE, root / "examples" / name)
    paths = {flag: ",".join(f"examples/{name}" for name in names.split(",")) for flag, names in pictures.items()}
    example = {task: {"prompt": "a cat that sings"} | paths}
    (root / "generate.py").write_text(f"import nothing_of_the_kind\n\nEXAMPLE_PROMPT = {example!r}\n")
    kind = task.split("-")[0]
    flags = ("--task", task, "--ckpt_dir", kind, "--frame_num", 5, "--save_file", "a.mp4")
    result, (record,) = run(root, *flags)
    assert record["prompt"] == "a cat that sings"
    for flag, names in pictures.items():
        shown = ",".join(str(root / "examples" / name) for name in names.split(","))
        assert re.search(rf"^{flag:<9} {re.escape(shown)}$", result.stdout, re.MULTILINE)
    if kind == "vace":
        assert record["sources"][2] == [[str(root / "examples" / name) for name in ("a.png", "b.png")]]


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_without_an_example_a_prompt_is_needed(kind, checkout):
    result, records = run(checkout, "--task", f"{kind}-14B", "--ckpt_dir", kind, code=2)
    assert not records
    assert re.fullmatch(r"magcache_generate.py: error: --prompt is needed: there is no .*\n", result.stderr)


WITHOUT_FLASH = "FLASH_ATTN_2_AVAILABLE = FLASH_ATTN_3_AVAILABLE = False\n\ndef flash_attention():\n    assert False\n"
NO_CUDA = "raise AssertionError('Torch not compiled with CUDA enabled')\n"
UNCHANGED = ("", None)


def edited(checkout, folder, file, content):
    """A checkout with this behind the file, or without it."""
    if not file:
        return checkout
    root = shutil.copytree(checkout, folder / "Wan")
    if content is None:
        shutil.rmtree(root / file)
    else:
        with (root / file).open("a") as module:
            module.write(content)
    return root


FLF2V = ("--task", "flf2v-14B", "--ckpt_dir", "flf2v", "--first_frame", IMAGE, "--last_frame", IMAGE)
VACE = ("--task", "vace-1.3B", "--ckpt_dir", "vace", "--src_video", FILM)
DECORD = "--src_video with the wan package here needs the package decord: pip install decord"


@pytest.mark.parametrize(
    ("file", "content", "flags", "message"),
    [
        (*UNCHANGED, ("--task", "t2v-tiny", "--size", "64*64"), "the wan package here has no task t2v-tiny"),
        (*UNCHANGED, FLF2V, "81 frames only, but --frame_num is 5"),
        (*UNCHANGED, ("--vae_tiling", "--attn_backend", "flash"), "--attn_backend needs the wan package"),
        ("i2v/xlm-roberta-large", None, ("--task", "i2v-14B", "--ckpt_dir", "i2v", "--image", IMAGE), "lacks xlm-rob"),
        ("wan/__init__.py", NO_CUDA, ("--ckpt_dir", "none"), "--ckpt_dir none is not a folder"),
        ("wan/__init__.py", "import no_such\n", (), r"be imported \(No module named 'no_such'\): run this beside one"),
        ("wan/__init__.py", NO_CUDA, (), r"needs a CUDA device and a torch that sees it \(Torch not compiled with"),
        ("wan/modules/model.py", WITHOUT_FLASH, (), "needs the package flash_attn: pip install flash-attn"),
        ("wan/utils/vace_processor.py", "", VACE, DECORD),
    ],
)
def test_what_is_refused(file, content, flags, message, checkout, tmp_path):
    result, records = run(edited(checkout, tmp_path, file, content), *TEXT, *flags, code=2)
    assert not records
    assert re.fullmatch(f"magcache_generate.py: error: .*{message}.*\n", result.stderr)


def test_processes_share_prompts_out(checkout):
    """Of three, one makes two and the other one, whatever barriers upstream has."""
    (checkout / "prompts.txt").write_text("a fox\na hen\na cow")
    flags = ("--task", "t2v-1.3B", "--ckpt_dir", "t2v", "--frame_num", 5, *CACHE)
    _, records = run(checkout, *flags, "--prompt_file", "prompts.txt", "--save_file", "films", processes=2)
    assert sorted(path.name[:11] for path in (checkout / "films").glob("*.mp4")) == [
        "00001_a_fox",
        "00002_a_hen",
        "00003_a_cow",
    ]
    assert [record["prompt"] for record in records] == ["a cow", "a hen"]
    assert [record["rank"] for record in records] == [0, 0]


def test_processes_that_were_started_differently(checkout):
    """As on two machines where someone typed two commands, and which have different files under one name."""
    shapes = (("A", (2, 40)), ("B", (40, 2)))
    for rank in ("0", "1"):
        (checkout / rank).mkdir()
        (checkout / rank / "t2v").symlink_to(checkout / "t2v")  # another folder of the same name
        halves = {f"blocks.0.self_attn.q.lora_{half}.weight": torch.full(shape, float(rank)) for half, shape in shapes}
        save_file(halves, checkout / rank / "a.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "../magcache_generate.py", *map(str, TEXT), "--size", "832*480", *CACHE]
    command += ["--lora", "a.safetensors"]
    processes = [
        subprocess.Popen(
            [*command, "--retention_ratio", ratio, "--ckpt_dir", str(checkout / place / "t2v")],
            cwd=checkout / rank,
            env=shared | {"RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, ratio, place in (("0", "0.2", "."), ("1", "0.4", "1"))
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "process 1 differs from process 0 in --retention_ratio, the plan, the files of --lora" in err


def test_without_magcache(tmp_path):
    checkout = make_checkout(tmp_path / "Wan2.1", packages=())
    result = python("-S", "magcache_generate.py", code=2, cwd=checkout)  # -S: without what is installed
    assert result.stderr.count("\n") == 1
    assert "`pip install .`" in result.stderr
    assert "copy its folder magcache/ beside magcache_generate.py" in result.stderr


def test_installed(tmp_path):
    """What the wheel holds; then the script alone is enough."""
    shutil.copytree(REPO / "magcache", tmp_path / "source" / "magcache", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path / "source")
    (tmp_path / "source" / "wan").mkdir()
    (tmp_path / "source" / "wan" / "__init__.py").touch()
    python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path / "source")
    (wheel,) = tmp_path.glob("magcache-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "installed")
    files = {str(p.relative_to(REPO)) for p in (REPO / "magcache").rglob("*") if p.suffix in (".py", ".json", ".html")}
    assert {name for name in names if ".dist-info/" not in name} == files

    checkout = make_checkout(tmp_path / "Wan2.1", packages=())
    _, (record,) = run(checkout, *TEXT, *CACHE, env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")})
    assert record["calls"] == [0 if reuse else LAYERS for reuse in plan("t2v-1.3B").reuse]
