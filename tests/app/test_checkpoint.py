"""The check of a checkpoint folder: what it expects is what the models have; it reads little; no content escapes it."""

import json
import re
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from full_size import make_model
from golden_data import GOLDEN, write_checkpoint, write_sparse_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import UMT5Config, UMT5EncoderModel

from magcache.app import checkpoint
from magcache.app.architecture import Architecture, tensor_shapes
from magcache.app.backend import backend, check_checkpoint
from magcache.app.errors import Refused
from magcache.app.job import Inputs, Machine, Sampling
from magcache.app.tasks import TASKS
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.t5 import load_encoder, tensor_names
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import load_vae
from wan.utils.checkpoints import DamagedFile

REAL = [name for name, task in TASKS.items() if not task.is_demo and not task.makes_image]
SHARDS = 7
T5, VAE, CLIP = (WAN_CONFIGS["i2v-14B"][f"{part}_checkpoint"] for part in ("t5", "vae", "clip"))
DIT = "diffusion_pytorch_model.safetensors"


def full_size(task: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The entries of a model's config.json, and the shapes of its tensors."""
    with torch.device("meta"):
        model = make_model(task)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("task", "change"), [*((task, {}) for task in REAL), ("vace-1.3B", {"vace_layers": None})])
def test_expected_tensors_are_those_of_the_models(task, change, tmp_path):
    """Which the registry of tasks has, too."""
    (config, shapes), sizes = full_size(task), TASKS[task].architecture
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    found = checkpoint.read_config(tmp_path)
    assert tensor_shapes(checkpoint.sizes_in(found, Architecture(0, 0, 0, images=sizes.images))) == shapes
    assert tensor_shapes(sizes) == shapes


def write_sparse_pth(path: Path, shapes: dict, dtype: torch.dtype) -> None:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data():
        torch.save(tensors, path)


def clip_shapes(width: int, layers: int) -> dict:
    shapes = {"visual.cls_embedding": (1, 1, width), "visual.pos_embedding": (1, 257, width)}
    shapes |= {"visual.patch_embedding.weight": (width, 3, 14, 14), "textual.token_embedding.weight": (250002, 1024)}
    for name, rows, columns in (("attn.to_qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.0", 4, 1), ("mlp.2", 1, 4)):
        for layer in range(layers):
            shapes[f"visual.transformer.{layer}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"visual.transformer.{layer}.{name}.bias"] = (rows * width,)
    norms = ["pre_norm", *(f"transformer.{layer}.norm{i}" for layer in range(layers) for i in (1, 2))]
    return shapes | {f"visual.{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}


def write_official_folder(folder: Path) -> None:
    """I2V 14B with real headers and without data: 76 GB that take no room."""
    (config, shapes), places = full_size("i2v-14B"), {}
    (folder / "config.json").write_text(json.dumps(config))
    for number in range(SHARDS):
        file = f"diffusion_pytorch_model-0000{number + 1}-of-0000{SHARDS}.safetensors"
        part = {name: shapes[name] for name in list(shapes)[number::SHARDS]}
        write_sparse_weights(folder / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    with torch.device("meta"):
        text = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        ).state_dict()
        video = AutoencoderKLWan(base_dim=96).state_dict()
    write_sparse_pth(
        folder / T5, {ours: text[theirs].shape for ours, theirs in tensor_names(24).items()}, torch.bfloat16
    )
    with safe_open(GOLDEN / "vae" / "Wan2.1_VAE.safetensors", "pt") as file:
        names = convert_wan_vae_to_diffusers({name: name for name in file.keys()})  # noqa: SIM118
    write_sparse_pth(folder / VAE, {ours: video[theirs].shape for theirs, ours in names.items()}, torch.float32)
    write_sparse_pth(folder / CLIP, clip_shapes(1280, 32), torch.float16)
    shutil.copytree(GOLDEN / "pipelines" / "common" / "tokenizer", folder / "google" / "umt5-xxl")
    tokenizer = folder / "google" / "umt5-xxl" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"] += [
        [f"token{number}", -10.0] for number in range(256300 - len(content["model"]["vocab"]))
    ]
    tokenizer.write_text(json.dumps(content))


def check(folder: Path, task: str) -> None:
    sampling = Sampling(task, "832*480", 81, "unipc", 50, 5.0, 5.0)
    machine = Machine(str(folder), True, False, False, False, 1, 1)
    check_checkpoint(sampling, machine, WAN_CONFIGS[task])
    backend().check(sampling, Inputs(), machine, WAN_CONFIGS[task])


def bytes_seen() -> int:
    """Of files, by this process until now: what it has read, and the pages of memory that it was given."""
    read = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    return read + resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()


def test_a_folder_of_official_size_is_checked_by_its_headers(tmp_path, capsys):
    write_official_folder(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 76e9
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 20e6
    before = bytes_seen()
    check(tmp_path, "i2v-14B")
    assert bytes_seen() - before < 76e9 / 100
    assert capsys.readouterr().out == ""
    shard = tmp_path / f"diffusion_pytorch_model-00004-of-0000{SHARDS}.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(Refused, match=f"{shard.name}, is it complete"):
        check(tmp_path, "i2v-14B")


def test_the_oldest_format_is_accepted(copied):
    folder = copied("t2v")
    for name in (VAE, T5):
        torch.save(torch.load(folder / name), folder / name, _use_new_zipfile_serialization=False)
    check(folder, "t2v-1.3B")
    load_vae(folder / VAE, torch.float32, "cpu")
    load_encoder(folder / T5, torch.float32, "cpu")


# what follows may refuse in one line, or succeed, and then the models must load
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
FUZZ = settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return {kind: write_checkpoint(kind, tmp_path_factory.mktemp("originals") / kind) for kind in ("t2v", "vace")}


@pytest.fixture
def copied(originals, tmp_path):
    """Folders to spoil, whose files take the place of the last example's."""

    def copy(kind: str) -> Path:
        return shutil.copytree(originals[kind], tmp_path / kind, dirs_exist_ok=True)

    return copy


def refused_or_loaded(folder: Path, kind: str, load) -> None:
    try:
        check(folder, {"t2v": "t2v-1.3B", "vace": "vace-1.3B"}[kind])
    except Refused as refusal:
        line = str(refusal)
        assert "\n" not in line
        assert len(line) < 600
        assert "weights_only" not in line
    else:
        load(folder)


def load_transformer(folder: Path) -> None:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    (VaceWanModel if kind == "vace" else WanModel).from_pretrained(folder)


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["t2v", "vace"]))
def test_any_config(data, kind, copied):
    folder = copied(kind)
    config = json.loads((folder / "config.json").read_text())
    keys = [*config, "text_dim", "clip_dim", "clip_positions", "_class_name", "x"]
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=2)):
        near = [config.get(key), str(config.get(key)), [config.get(key)]]
        config[key] = data.draw(VALUES | st.sampled_from(near))
    for key in data.draw(st.lists(st.sampled_from(list(config)), max_size=1)):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    refused_or_loaded(folder, kind, load_transformer)


@FUZZ
@given(data=st.data())
def test_any_index(data, copied):
    folder = copied("t2v")
    with safe_open(folder / DIT, "pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), DIT)}
    inner = data.draw(st.sampled_from([index, index["metadata"], index["weight_map"]]))
    for key in data.draw(st.lists(st.sampled_from([*inner, "x", "\0"]), max_size=2)):
        inner[key] = data.draw(VALUES | st.just(DIT))
    content = data.draw(st.sampled_from([json.dumps(index), json.dumps(index)[:-9]]) | st.text(max_size=9))
    (folder / checkpoint.INDEX).write_text(content, encoding="utf-8", errors="surrogatepass")
    refused_or_loaded(folder, "t2v", load_transformer)


@st.composite
def spoiled(draw, content: bytes, most: int) -> bytes:
    """Cut off, with other bytes among the first ones, with some more or some less."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, most - 1))] = draw(st.integers(0, 255))
    place = draw(st.integers(0, most))
    match draw(st.sampled_from(["nothing", "cut", "more", "less"])):
        case "cut":
            del content[draw(st.integers(0, len(content))) :]
        case "more":
            content[place:place] = draw(st.binary(max_size=20))
        case "less":
            del content[place : place + draw(st.integers(1, 20))]
    return bytes(content)


@FUZZ
@given(data=st.data())
def test_any_header(data, copied):
    folder = copied("t2v")
    content = (folder / DIT).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + size])
    for name in data.draw(st.lists(st.sampled_from(sorted(entries)[:9]), max_size=2)):
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        near = ["F16", "I32", "BOOL", "C64", [], [40], [5, 8], [0, 10**12], [-1, 2]]
        entries[name] = entries[name] | {key: data.draw(VALUES | st.sampled_from(near))}
    header = json.dumps(entries).encode()
    content = struct.pack("<Q", len(header)) + header + content[8 + size :]
    (folder / DIT).write_bytes(data.draw(spoiled(content, 3000)))
    refused_or_loaded(folder, "t2v", load_transformer)


@FUZZ
@given(data=st.data(), old=st.booleans(), name=st.sampled_from([VAE, T5]))
def test_any_pth(data, old, name, copied):
    folder = copied("t2v")
    path = folder / name
    if old:
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
        content = data.draw(spoiled(path.read_bytes(), 5000))
    else:  # the pickle within the archive, which checksums would not let through
        with zipfile.ZipFile(path) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist()}
        pickled = next(file for file in files if file.endswith("data.pkl"))
        files[pickled] = data.draw(spoiled(files[pickled], len(files[pickled])))
        with zipfile.ZipFile(path, "w") as archive:
            for file, held in files.items():
                archive.writestr(file, held)
        content = path.read_bytes()
        content = content[: data.draw(st.integers(len(content) - 50, len(content)))]
    path.write_bytes(content)

    def load(folder):
        try:
            load_vae(folder / VAE, torch.float32, "cpu")
        except DamagedFile as fault:
            assert "\n" not in str(fault)

    refused_or_loaded(folder, "t2v", load)
