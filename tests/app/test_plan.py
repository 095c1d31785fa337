"""What is said before a run: against independent formulas, torch's FLOP counter, and the wan package's own numbers."""

import itertools
import json
import re

import pytest
import torch
from commands import REPO, SCRIPT, TINY, python
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import magcache
from magcache.app import cost
from magcache.app.architecture import Architecture
from magcache.app.checkpoint import architecture_of
from magcache.app.step_map import predict, step_map
from magcache.app.tasks import TASKS, all_sizes
from magcache.ratios import table_of
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel

CALIBRATION = (REPO / "calibration" / "README.md").read_text()
# task, folder, size, steps, thresh, K; calls computed
PUBLISHED = [
    ("t2v-14B", "Wan2.1-T2V-14B", "1280*720", 50, 0.24, 6, 36),
    ("t2v-1.3B", "Wan2.1-T2V-1.3B", "832*480", 50, 0.12, 2, 50),
    ("t2v-1.3B", "Wan2.1-T2V-1.3B", "832*480", 50, 0.12, 4, 42),
    ("i2v-14B", "Wan2.1-I2V-14B-720P", "1280*720", 40, 0.12, 4, 34),
    ("i2v-14B", "Wan2.1-I2V-14B-720P", "1280*720", 40, 0.24, 6, 28),
    ("i2v-14B", "Wan2.1-I2V-14B-480P", "832*480", 40, 0.12, 4, 34),
    ("i2v-14B", "Wan2.1-I2V-14B-480P", "832*480", 40, 0.24, 6, 30),
]


@pytest.mark.parametrize(("task", "folder", "size", "steps", "thresh", "K", "computed"), PUBLISHED)
def test_published_settings(plan, task, folder, size, steps, thresh, K, computed):
    flags = ("--task", task, "--ckpt_dir", folder, "--size", size, "--magcache_thresh", thresh, "--magcache_K", K)
    lines, bound = plan(*flags), 2 * steps / computed
    assert lines[0] == f"{computed} of {2 * steps} DiT calls computed, at most {bound:.2f}x"
    maps = [line.split()[1] for line in lines if line.startswith(("cond", "uncond"))]
    assert [len(row) for row in maps] == [steps, steps]
    assert "".join(maps).count("#") == computed


def test_the_plan_of_a_speedup(plan):
    """Which needs no table."""
    lines = plan("--task", "flf2v-14B", "--magcache_speedup", 2.5)
    assert lines[0] == "40 of 100 DiT calls computed, at most 2.50x"
    assert not any(line.startswith(("origin", "error")) for line in lines)
    assert "memory    77.4 MB on the GPU for 4 cached outputs" in lines
    assert "FLOPs     60.0 % of the DiT's saved" in "\n".join(lines)


def test_documentation_has_the_plans_of_the_published_settings():
    rows = re.findall(r"^\| ([\w.-]+), (\d+), ([\d.]+), (\d) \|[^|]*\| (\d+)/\d+, ", CALIBRATION, re.MULTILINE)
    names = {"i2v-14B": {"Wan2.1-I2V-14B-720P": "i2v-720P", "Wan2.1-I2V-14B-480P": "i2v-480P"}}
    expected = [
        (names.get(task, {}).get(folder, task), *map(str, (steps, thresh, K, computed)))
        for task, folder, _, steps, thresh, K, computed in PUBLISHED
    ]
    assert rows == expected


PLAN = ("--task", "t2v-1.3B", "--size", "832*480", "--ckpt_dir", "nowhere", "--magcache_K", "4", "--magcache_plan")


@pytest.mark.parametrize(
    ("flags", "said"), [(("--help",), "usage: "), (PLAN, "42 of 100 DiT calls computed, at most 2.38x\n")]
)
def test_help_and_plans_need_no_torch(flags, said, tmp_path):
    """No wan package either: in an upstream checkout importing it would take seconds."""
    result = python("-X", "importtime", SCRIPT, *flags, cwd=tmp_path)
    assert result.stdout.startswith(said)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "diffusers", "numpy", "wan"}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_size_length_and_step_count(task, plan, tmp_path):
    spec, ratios = TASKS[task], ()
    if len(spec.tables) != 1:
        ratios = ("--magcache_speedup", 1) if spec.release == "Wan2.2" else ("--mag_ratios", "i2v-14B-720P")
    lengths = (1,) if task == "t2i-14B" else (5, 81, 121)
    for size, frames, steps in itertools.product(all_sizes(), lengths, (1, 7, 120)):
        flags = ("--task", task, "--size", size, "--frame_num", frames, "--sample_steps", steps, *ratios)
        lines = plan(*flags, "--ckpt_dir", tmp_path / "none", "--prompt", "a", "--ulysses_size", 2)
        assert re.fullmatch(rf"\d+ of {2 * steps} DiT calls computed, at most [\d.]+x", lines[0])
        width, height = map(int, size.split("*"))
        tokens = ((frames - 1) // 4 + 1) * (width // spec.token_pixels) * (height // spec.token_pixels)
        assert any(line.endswith(f"; {tokens} tokens a call") for line in lines[2:4])
        assert any(f"does not run at {size}" in line for line in lines) == (size not in spec.sizes)


def test_input_files_decide_on_the_shape_where_they_are_there(plan, tmp_path):
    Image.new("RGB", (400, 800)).save(tmp_path / "tall.png")
    flags = ("--task", "i2v-14B", "--size", "832*480", "--prompt", "a", "--image")
    assert "i2v-14B, 432x880, 81 frames" in plan(*flags, tmp_path / "tall.png")[3]
    lines = plan(*flags, tmp_path / "missing.png")
    assert "i2v-14B, 832x480, 81 frames" in lines[3]
    assert "missing.png) decides on the shape" in lines[-1]
    two = plan("--task", "vace-14B", "--prompt", "a", "--src_ref_images", "a.png,b.png")
    assert two[3].endswith(f"; {75600 // 21 * 23} tokens a call")


def test_picture(command, tmp_path):
    for name, flags in (
        ("ratios", ("--magcache_K", "4")),
        ("speedup", ("--magcache_speedup", "2.5")),
        ("cond", ("--magcache_K", "4", "--sample_guide_scale", "1")),
    ):
        picture = tmp_path / f"{name}.png"
        assert command(*TINY, *flags, "--magcache_plan", picture).endswith(f"picture   {picture}\n")
        with Image.open(picture) as image:
            assert image.format == "PNG"
            assert image.width > 500


def test_a_config_file_comes_first(tmp_path):
    task = TASKS["vace-1.3B"]
    config = {"model_type": "vace", "vace_in_dim": 96, "dim": 64, "num_heads": 2, "num_layers": 6}
    config |= {"vace_layers": [0, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = architecture_of(task, tmp_path)
    assert (sizes.dim, sizes.num_layers, sizes.vace_blocks, sizes.text_dim) == (64, 6, 2, 4096)
    (tmp_path / "config.json").write_text("[")
    assert architecture_of(task, tmp_path) == task.architecture


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "vace"])
def test_flops(kind):
    """Of our own forward, a reused call included, which computes no block. torch does not count the CPU's fused
    attention, so it is kept from it."""
    sizes = {"dim": 48, "ffn_dim": 80, "num_layers": 3, "freq_dim": 32, "text_dim": 24, "text_len": 7}
    latent, tokens, given_ = torch.zeros(16, 3, 6, 8), 36, {}
    if kind == "vace":
        model, extra = VaceWanModel([0, 2], 96, num_heads=2, **sizes), {"vace_blocks": 2}
        given_ = {"vace_context": [torch.zeros(96, 3, 6, 8)]}
    elif kind == "t2v":
        model, extra = WanModel("t2v", num_heads=2, **sizes), {}
    else:
        images = 1 if kind == "i2v" else 2
        positions = 514 if images == 2 else 0
        model = WanModel(kind, num_heads=2, in_dim=36, clip_dim=20, clip_positions=positions, **sizes)
        extra = {"in_dim": 36, "clip_dim": 20, "images": images}
        given_ = {"y": [torch.zeros(20, 3, 6, 8)], "clip_fea": torch.zeros(images, 257, 20)}
    magcache.apply_magcache(model, magcache.Schedule((None, None, (1.0,), (1.0,))))
    counted = []
    for call in range(4):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            t, context = torch.tensor([999 - call // 2]), [torch.zeros(5, 24)]
            model([latent], t=t, context=context, seq_len=tokens, **given_)
        counted.append(counter.get_total_flops())
    computed, reused = cost.call_flops(Architecture(**sizes, **extra), tokens)
    assert counted == [computed, computed, reused, reused]


RATIO = st.floats(0.5, 1.5)


@given(st.lists(RATIO, min_size=2, max_size=30), st.floats(0, 1), st.integers(0, 6), st.floats(0, 1))
def test_errors_of_the_rule(values, thresh, K, retention):
    """Reused steps stay below thresh and within K."""
    steps = len(values)
    ratios = [v for value in (1.0, *values[1:]) for v in (value, value)]
    schedule = magcache.plan(ratios, steps, thresh, K, retention)
    errors = predict(schedule, table_of(ratios))["cond"]
    for step, reused in enumerate(schedule.reuse[::2]):
        start = max((s for s in range(step) if not schedule.reuse[2 * s]), default=0)
        products = list(itertools.accumulate(ratios[::2][start + 1 : step + 1], lambda a, b: a * b))
        error = sum(abs(1 - product) for product in products)
        assert errors[step] == (pytest.approx(error) if reused else 0)
        assert not reused or (error < thresh and step - start <= K)


def test_step_map():
    reuse = (False, False, True, True, True, False)
    assert step_map(reuse) == "##...#"
    assert step_map(reuse, 3) == "#.+"
    assert step_map((False, None, None)) == "#  "
