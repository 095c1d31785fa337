"""LoRA files in all formats, against the same change made by hand."""

import hashlib
import json
import shutil

import diffusers
import imageio.v3 as iio
import pytest
import torch
from checkpoints_22 import write_checkpoint_22
from commands import DEMO, SCRIPT, TINY, job_of, python, torchrun
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from faults import warm
from golden_data import write_dit_folder, write_sparse_weights
from safetensors.torch import load_file, save_file

import wan
from magcache.app.architecture import tensor_shapes
from magcache.app.errors import Refused
from magcache.app.lora import Lora, check_lora, flat, merging, place_of, spellings
from magcache.app.requests import decisive_settings
from magcache.app.tasks import TASKS
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = (*TINY, "--frame_num", 5, "--sample_steps", 2, "--base_seed", 1)


def powers_of_two(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    exponents = torch.randint(-7, -4, shape, generator=generator).float()
    return torch.randint(0, 2, shape, generator=generator).mul(2).sub(1) * 2**exponents


def factors(shape):
    """Of a change of rank 2, down and up. Their product is exact, of which no element is a sum."""
    kernel = shape[2:]
    down, up = powers_of_two(2, *shape[1:]), powers_of_two(shape[0], 2, *[1 for _ in kernel])
    up[::2, 0], up[1::2, 1] = 0, 0
    return down, up


def changes_of(tensors):
    """Of every tensor: two factors of a matrix or a convolution, else the difference."""
    return {name: factors(t.shape) if t.ndim in (2, 5) else powers_of_two(*t.shape) for name, t in tensors.items()}


def changed(tensors, changes, *strengths):
    for strength in strengths:
        differences = {
            name: change if torch.is_tensor(change) else (change[1].flatten(1) @ change[0].flatten(1))
            for name, change in changes.items()
        }
        tensors = tensors | {
            name: tensors[name] + strength * difference.reshape(tensors[name].shape)
            for name, difference in differences.items()
        }
    return tensors


def low_rank(changes):
    return {name: change for name, change in changes.items() if not torch.is_tensor(change)}


def as_diffusers(changes):
    file = {}
    for half, name in enumerate(("lora_A", "lora_B")):
        renamed = convert_wan_transformer_to_diffusers({name: change[half] for name, change in changes.items()})
        file |= {f"transformer.{key.removesuffix('weight')}{name}.weight": half for key, half in renamed.items()}
    return file


def as_comfy(changes):
    file = {}
    for name, (down, up) in changes.items():
        module = f"diffusion_model.{name.removesuffix('.weight')}"
        file |= {f"{module}.lora_down.weight": 2 * down, f"{module}.lora_up.weight": up}
        file[f"{module}.alpha"] = torch.tensor(1.0)  # of a rank of 2
    return file


def as_kohya(changes):
    file = {}
    for name, (down, up) in changes.items():
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        file |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up / 2}
        file[f"{module}.alpha"] = torch.tensor(4)  # as musubi-tuner converts it
    return file


def as_distilled(changes):
    """As those for few steps are: they change all there is, the head's weight by a difference, and have a matrix for a
    convolution."""
    endings = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    file = {}
    for name, change in changes.items():
        module, _, leaf = name.rpartition(".")
        key = f"diffusion_model.{module}"
        if name == "patch_embedding.weight":
            file |= {f"{key}.lora_down.weight": change[0].flatten(1), f"{key}.lora_up.weight": change[1][..., 0]}
        elif name == "head.head.weight":
            file[f"{key}.diff"] = change[1] @ change[0]
        elif torch.is_tensor(change):
            file[f"{key}.{endings[leaf]}" if leaf in endings else f"diffusion_model.{name}.diff"] = change
        else:
            file |= {f"{key}.lora_A.weight": change[0], f"{key}.lora_B.weight": change[1]}
    return file


FORMATS = {"diffusers": as_diffusers, "comfy": as_comfy, "kohya": as_kohya, "distilled": as_distilled}


def write_lora(path, tensors, **metadata):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return Lora(str(path))


@pytest.fixture(scope="module", params=["flf2v", "vace"])
def model(request, tmp_path_factory):
    """A tiny model: its class, folder, tensors and a change of all of them."""
    folder = write_dit_folder(f"pipelines/{request.param}", tmp_path_factory.mktemp("model") / request.param)
    tensors = load_file(folder / WEIGHTS)
    return {"flf2v": WanModel, "vace": VaceWanModel}[request.param], folder, tensors, changes_of(tensors)


def loaded(model_class, folder, loras, dtype=torch.float32):
    with merging(loras):
        model = model_class.from_pretrained(str(folder), torch_dtype=dtype)
    return {name: parameter.data for name, parameter in model.named_parameters()}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name].to(tensor.dtype).float()), name


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, model, tmp_path):
    model_class, folder, tensors, changes = model
    changes = changes if name == "distilled" else low_rank(changes)
    lora = write_lora(tmp_path / "a.safetensors", FORMATS[name](changes))
    before = (folder / WEIGHTS).read_bytes()
    check_equal(loaded(model_class, folder, [lora]), changed(tensors, changes, 1))
    assert (folder / WEIGHTS).read_bytes() == before
    check_equal(loaded(model_class, folder, []), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_sum_is_rounded(dtype, model, tmp_path):
    """And not a sum of what was rounded when it was loaded."""
    model_class, folder, tensors, changes = model
    lora = write_lora(tmp_path / "a.safetensors", as_distilled(changes))
    found = loaded(model_class, folder, [lora], dtype)
    rounded = [name for name, tensor in found.items() if tensor.dtype == dtype]
    assert len(rounded) >= 20
    check_equal(found, changed(tensors, changes, 1))
    naive = {name: tensor.to(dtype).float() if name in rounded else tensor for name, tensor in tensors.items()}
    with pytest.raises(AssertionError):
        check_equal(found, changed(naive, changes, 1))


def test_several(model, tmp_path):
    model_class, folder, tensors, changes = model
    first = write_lora(tmp_path / "a.safetensors", as_comfy(low_rank(changes)))
    second = write_lora(tmp_path / "b.safetensors", as_distilled(changes))
    both = [Lora(first.path, 0.5), Lora(second.path, -2.0)]
    check_equal(loaded(model_class, folder, both), changed(changed(tensors, low_rank(changes), 0.5), changes, -2))
    check_equal(loaded(model_class, folder, [Lora(first.path, 0.0)]), tensors)


def test_alpha_beside_the_tensors(tmp_path):
    """Where diffusers and peft write it."""
    folder = write_dit_folder("pipelines/t2v", tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    changes = {name: factors(tensors[name].shape) for name in ("blocks.0.ffn.0.weight", "blocks.1.self_attn.q.weight")}
    metadata = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})
    diffusers_file = write_lora(tmp_path / "a.safetensors", as_diffusers(changes), lora_adapter_metadata=metadata)
    names = {
        f"base_model.model.{name.removeprefix('diffusion_model.')}": t for name, t in as_distilled(changes).items()
    }
    peft_file = write_lora(tmp_path / "adapter_model.safetensors", names)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "use_dora": False}))
    for lora in (diffusers_file, peft_file):
        check_equal(loaded(WanModel, folder, [lora]), changed(tensors, changes, 2))


def test_experts(tmp_path):
    """Without a name a file is for both."""
    folder = write_checkpoint_22("t2v-A14B", tmp_path / "model")
    tensors = {name: load_file(folder / f"{name}_noise_model" / WEIGHTS) for name in ("high", "low")}
    changes = low_rank(changes_of(tensors["low"]))
    path = write_lora(tmp_path / "a.safetensors", as_comfy(changes)).path
    loras = [Lora.from_flag(text) for text in (f"high={path}:0.5", f"low={path}:-1", f"{path}:2")]
    assert [str(lora) for lora in loras] == [f"high={path}:0.5", f"low={path}:-1.0", f"{path}:2.0"]
    with merging(loras):
        pipeline = wan.WanT2V(WAN_CONFIGS["t2v-A14B"], str(folder))
    for name, strength in (("high", 0.5), ("low", -1)):
        found = dict(getattr(pipeline, f"{name}_noise_model").named_parameters())
        check_equal(found, changed(changed(tensors[name], changes, strength), changes, 2))


def test_what_is_for_an_image_encoder(tmp_path, capsys):
    """Is left out, and said to be, where an i2v model has none, as those of Wan2.2 do."""
    names = ("diffusion_model.img_emb.proj.1.diff_b", "diffusion_model.blocks.0.cross_attn.norm_k_img.diff")
    tensors = {name: torch.zeros(7) for name in names} | {"transformer.blocks.0.attn1.to_q.diff_b": torch.zeros(5120)}
    lora = write_lora(tmp_path / "a.safetensors", tensors)
    check_lora(lora, TASKS["i2v-A14B"], TASKS["i2v-A14B"].architecture)
    note = f"note: 2 of 3 tensors of {lora.path} are for an image encoder, which this model lacks\n"
    assert capsys.readouterr().out == note
    for task in ("t2v-A14B", "i2v-14B"):
        with pytest.raises(Refused, match="it fits the model of i2v-A14B"):
            check_lora(lora, TASKS[task], TASKS[task].architecture)


@pytest.mark.parametrize("task", ["t2v-14B", "i2v-14B", "flf2v-14B", "vace-14B"])
def test_names_of_diffusers(task):
    """Every parameter of its models has its place, and they are all."""
    sizes = TASKS[task].architecture
    images = {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36} if sizes.images else {}
    images |= {"pos_embed_seq_len": 514} if sizes.clip_positions else {}
    with torch.device("meta"):
        if sizes.vace_blocks:
            model = diffusers.WanVACETransformer3DModel(vace_layers=list(range(0, 40, 5)), vace_in_channels=96)
        else:
            model = diffusers.WanTransformer3DModel(**images)
    shapes = tensor_shapes(sizes)
    places = spellings(shapes)
    assert {places[flat(name)]: tuple(p.shape) for name, p in model.named_parameters()} == shapes


@pytest.mark.parametrize(
    "name",
    [
        "blocks.12.self_attn.k.lora_A.default.weight",  # DiffSynth
        "pipe.dit.blocks.12.self_attn.k.lora_A.default.weight",
        "base_model.model.blocks.12.self_attn.k.lora_A.weight",  # peft
        "lora_unet_blocks_12.self_attn.k.lora_down.weight",
        "lora_unet__blocks_12_self_attn_k.lora_down.weight",
        "lycoris_blocks_12_attn1_to_k.lora_down.weight",
        "diffusion_model.blocks.12.attn1.to_k.lora_down.weight",
    ],
)
def test_names_of_all_kinds(name):
    shapes = tensor_shapes(TASKS["t2v-14B"].architecture)
    assert place_of(name, spellings(shapes), shapes) == ("blocks.12.self_attn.k.weight", "down")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two files for the demo model, and a folder where a half of the first and a whole of the second are in it."""
    folder = tmp_path_factory.mktemp("demo")
    tensors = load_file(DEMO / WEIGHTS)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    names = [name for name in tensors if name.startswith("blocks.") and name.endswith((".q.weight", "ffn.0.weight"))]
    changes = {name: tuple(32 * half for half in factors(tensors[name].shape)) for name in names}
    write_lora(folder / "style:1.safetensors", as_kohya(changes))
    write_lora(folder / "few.safetensors", as_diffusers(changes))
    shutil.copytree(DEMO, folder / "changed")
    save_file(changed(tensors, changes, 0.5, 1), folder / "changed" / WEIGHTS)
    return folder


FLAGS = ("--lora", "style:1.safetensors:0.5", "--lora", "few.safetensors")


def made(folder, name, *flags, ckpt_dir=DEMO):
    result = warm.finished([*SHORT, "--ckpt_dir", ckpt_dir, "--save_file", name, *flags], folder)
    return result.stdout, iio.imread(folder / name)


@pytest.fixture(scope="module")
def by_hand(demo):
    """The video of the changed weights."""
    return made(demo, "by_hand.mp4", ckpt_dir="changed")[1]


def test_command_line(demo, by_hand):
    _, plain = made(demo, "plain.mp4")
    said, video = made(demo, "lora.mp4", *FLAGS)
    assert "LoRA      style:1.safetensors:0.5\nLoRA      few.safetensors:1.0\n" in said
    assert (video == by_hand).all()
    assert (video != plain).mean() > 0.5
    assert (made(demo, "none.mp4", "--lora", "few.safetensors:0")[1] == plain).all()
    record = json.loads((demo / "lora.json").read_text())
    for entry, name, strength in zip(record["lora"], ("style:1.safetensors", "few.safetensors"), (0.5, 1), strict=True):
        content = (demo / name).read_bytes()
        expected = {"path": str(demo / name), "strength": strength, "sha256": hashlib.sha256(content).hexdigest()}
        assert entry == expected | {"expert": None}
    again = job_of(*record["command"][2:])
    assert [(lora.path, lora.strength) for lora in again.machine.lora] == [
        (str(demo / "style:1.safetensors"), 0.5),
        (str(demo / "few.safetensors"), 1.0),
    ]


@pytest.mark.slow
def test_sharded_over_two_processes(demo, by_hand):
    python(*torchrun(2), SCRIPT, *SHORT, *FLAGS, "--dit_fsdp", "--save_file", "sharded.mp4", cwd=demo)
    assert abs(iio.imread(demo / "sharded.mp4").astype(int) - by_hand).max() <= 2


def test_names_of_a_batch(demo, monkeypatch):
    """Tell the content and the strength of a file, whatever its name."""
    monkeypatch.chdir(demo)
    (demo / "prompts.txt").write_text("a fox")
    shutil.copy("few.safetensors", "same.safetensors")
    batch = (*SHORT, "--prompt_file", "prompts.txt")
    files = ("few.safetensors", "same.safetensors", "few.safetensors:0.5", "style:1.safetensors")
    first, *others, none = (
        json.dumps(decisive_settings(job_of(*batch, *flags))) for flags in (*(("--lora", f) for f in files), ())
    )
    assert [first == other for other in others] == [True, False, False]
    assert "lora" not in none


def test_few_steps(demo, monkeypatch, plan):
    monkeypatch.chdir(demo)
    cached = (*SHORT, "--lora", "few.safetensors", "--magcache_thresh", 0.5)
    few, many = ("\n".join(plan(*cached, "--sample_steps", steps)) for steps in (4, 20))
    assert "4 steps leave a cache nothing" in few
    assert "leave a cache nothing" not in many
    assert "measured with LoRA none, not few.safetensors:1.0" in many


def test_plan(tmp_path, monkeypatch, command):
    """A LoRA of everything in a 14B model, of which the file holds no data, takes no more memory than none."""
    shapes = {}
    for name, shape in tensor_shapes(TASKS["t2v-14B"].architecture).items():
        if len(shape) == 2:
            module = f"diffusion_model.{name.removesuffix('weight')}lora"
            shapes |= {f"{module}_A.weight": (64, shape[1]), f"{module}_B.weight": (shape[0], 64)}
    write_sparse_weights(tmp_path / "a.safetensors", shapes)
    monkeypatch.chdir(tmp_path)
    flags, lora = ("--task", "t2v-14B", "--magcache_speedup", 2, "--magcache_plan"), ("--lora", "a.safetensors:0.8")
    plain = command(*flags)
    assert command(*flags, *lora) == plain.replace("\n\nstep", "\nLoRA      a.safetensors:0.8\n\nstep", 1)
    assert "needs     about" in plain
    assert "it fits the model of t2v-14B or" in command(*flags, "--task", "t2v-1.3B", *lora)
