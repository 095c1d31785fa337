"""Damaged checkpoints and other input files, and values that cannot work."""

import functools
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from golden_data import write_checkpoint
from safetensors.torch import load_file, save_file

from faults.case import Case

REPO = Path(__file__).parents[2]
DEMO = REPO / "examples" / "Wan2.1-T2V-tiny"
TASKS = {"t2v": "t2v-1.3B", "i2v": "i2v-14B", "flf2v": "flf2v-14B", "vace": "vace-1.3B"}
DIT, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
NESTED, HUGE = "[" * 100_000 + "]" * 100_000, "1" + "0" * 400
TINY = ["--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--frame_num", 1, "--sample_steps", 2]
DEMO_I2V = REPO / "examples" / "Wan2.1-I2V-tiny"
TINY_I2V = ["--task", "i2v-tiny", "--size", "64*64", "--prompt", "a", "--ckpt_dir", DEMO_I2V]
PICTURE = REPO / "examples" / "girl.png"


SCRATCH = tempfile.TemporaryDirectory()  # until Python ends


@functools.cache
def original(kind: str) -> Path:
    folder = Path(SCRATCH.name) / kind
    write_checkpoint(kind, folder)
    tensors = load_file(folder / DIT)
    if kind == "i2v":  # in two shards
        (folder / DIT).unlink()
        places = {}
        for number, names in enumerate((sorted(tensors)[:40], sorted(tensors)[40:]), 1):
            file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names}, folder / file)
            places |= dict.fromkeys(names, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


def flags_of(kind: str, folder: Path) -> list:
    flags = ["--task", TASKS[kind], "--size", "832*480", "--ckpt_dir", folder, "--sample_steps", 1, "--prompt", "a"]
    return flags + {"i2v": ["--image", PICTURE], "flf2v": ["--first_frame", PICTURE, "--last_frame", PICTURE]}.get(
        kind, []
    )


def torchrun(**changed: str) -> dict[str, str]:
    """The variables of its first process of two."""
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    return variables | changed


def damaged(change: Callable[[Path], object], kind: str = "t2v", *flags) -> Callable[[Path], list]:
    """A checkpoint folder that the function changes."""

    def prepare(folder: Path) -> list:
        checkpoint = shutil.copytree(original(kind), folder / "model")
        change(checkpoint)
        return [*flags_of(kind, checkpoint), *flags]

    return prepare


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def values(name: str, **changed) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changed
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def cut(name: str, keep: float) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return change


def weights(change: Callable[[dict], object], name: str = DIT) -> Callable[[Path], object]:
    """Rewrites a file of tensors."""

    def rewrite(folder: Path) -> None:
        path = folder / name
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        change(tensors)
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)

    return rewrite


def header(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Changes the header of the weights, and leaves their data."""

    def rewrite(folder: Path) -> None:
        content = (folder / DIT).read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        change(entries)
        new = json.dumps(entries).encode()
        (folder / DIT).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])

    return rewrite


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Another thing in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def move(index: dict) -> None:
    places = index["weight_map"]
    name = next(name for name, file in places.items() if file == SHARD)
    places[name] = SHARD.replace("00001", "00002", 1)


def index(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content)
        (folder / INDEX).write_text(json.dumps(content))

    return rewrite


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def old_format_cut(folder: Path) -> None:
    torch.save(torch.load(folder / VAE), folder / VAE, _use_new_zipfile_serialization=False)
    cut(VAE, 0.9)(folder)


def pickled(folder: Path) -> None:
    with (folder / VAE).open("wb") as file:
        pickle.dump({"encoder.conv1.weight": Malicious()}, file)


def zeros(name: str, shape: tuple[int, ...]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def large_tokenizer(folder: Path) -> None:
    content = json.loads((folder / TOKENIZER).read_text())
    content["model"]["vocab"] += [[f"token{number}", -10.0] for number in range(1000)]
    (folder / TOKENIZER).write_text(json.dumps(content))


def integers(name: str) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})


def file_of(name: str, content: str, *flags) -> Callable[[Path], list]:
    """The demo model with one more file, which the flags name."""

    def prepare(folder: Path) -> list:
        (folder / name).write_text(content)
        return [*TINY, *flags]

    return prepare


def pipe(name: str, *flags) -> Callable[[Path], list]:
    def prepare(folder: Path) -> list:
        os.mkfifo(folder / name)
        return list(flags)

    return prepare


CONFIG = [
    Case("config nested", damaged(text("config.json", NESTED)), 2, "broken config.json: .*nested too deeply"),
    Case("config nested in a key", damaged(text("config.json", f'{{"dim": {NESTED}}}')), 2, "nested too deeply"),
    Case("config of 400 digits", damaged(text("config.json", f'{{"dim": {HUGE}}}')), 2, "dim must be a whole number"),
    Case("config of 5000 digits", damaged(text("config.json", f'{{"dim": {"1" * 5000}}}')), 2, "broken config.json"),
    Case("config list", damaged(text("config.json", "[1]")), 2, "broken config.json: it holds no object"),
    Case("config no JSON", damaged(text("config.json", "dim = 3")), 2, "broken config.json: Expecting value"),
    Case("config empty", damaged(text("config.json", "")), 2, "broken config.json: Expecting value"),
    Case("config no text", damaged(lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00")), 2,
         "broken config.json"),
    Case("config a pipe", damaged(replaced("config.json", os.mkfifo)), 2, "config.json: it is not a regular file"),
    Case("config a folder", damaged(replaced("config.json", os.mkdir)), 2, "config.json: .*Is a directory"),
    Case("dim text", damaged(values("config.json", dim="40")), 2,
         "dim must be a whole number from 1 to 65536, it is '4"),
    Case("dim null", damaged(values("config.json", dim=None)), 2, "dim must be a whole number"),
    Case("dim true", damaged(values("config.json", dim=True)), 2, "dim must be a whole number"),
    Case("dim float", damaged(values("config.json", dim=40.0)), 2, "dim must be a whole number"),
    Case("dim other", damaged(values("config.json", dim=48)), 2, r"tensor .* has the shape .*, config.json makes it"),
    Case("dim missing", damaged(values("config.json", dim=...)), 2, "config.json makes it"),
    Case("layers 0", damaged(values("config.json", num_layers=0)), 2, "num_layers must be a whole number from 1"),
    Case("layers too many", damaged(values("config.json", num_layers=3)), 2, r"lacks tensor blocks\.2"),
    Case("layers far too many", damaged(values("config.json", num_layers=1000)), 2,
         "by its config.json it has 1000 layers"),
    Case("layers too few", damaged(values("config.json", num_layers=1)), 2, r"holds tensor blocks\.1.* is no part"),
    Case("heads uneven", damaged(values("config.json", num_heads=3)), 2, "dim an even multiple of num_heads"),
    Case("eps text", damaged(values("config.json", eps="small")), 2, "eps must be a number between 0 and 1"),
    Case("eps NaN", damaged(values("config.json", eps=float("nan"))), 2, "eps must be a number between 0 and 1"),
    Case("text_len -1", damaged(values("config.json", text_len=-1)), 2, "text_len must be a whole number from 1"),
    Case("text_dim text", damaged(values("config.json", text_dim="wide")), 2, "text_dim must be a whole number"),
    Case("in_dim 17", damaged(values("config.json", in_dim=17)), 2, "in_dim must be 16 for a model of type t2v"),
    Case("type a list", damaged(values("config.json", model_type=["t2v"])), 2, "task t2v-1.3B needs t2v"),
    Case("vace_layers 5", damaged(values("config.json", vace_layers=5), "vace"), 2, "vace_layers must be a list"),
    Case("vace_layers far", damaged(values("config.json", vace_layers=[9]), "vace"), 2,
         "must be a list of layers below 2"),
    Case("vace_layers twice", damaged(values("config.json", vace_layers=[0, 0]), "vace"), 2, "must be distinct"),
    Case("vace_layers more", damaged(values("config.json", vace_layers=[0, 1]), "vace"), 2,
         r"lacks tensor vace_blocks\.1"),
]  # fmt: skip

WEIGHTS = [
    Case("weights cut", damaged(cut(DIT, 0.9)), 2, f"cannot read .*{DIT}, is it complete"),
    Case("weights cut in the header", damaged(cut(DIT, 0.01)), 2, f"cannot read .*{DIT}, is it complete"),
    Case("weights empty", damaged(cut(DIT, 0)), 2, f"cannot read .*{DIT}, is it complete"),
    Case("weights longer", damaged(lambda f: (f / DIT).open("ab").write(b"more")), 2, "cannot read .*, is it complete"),
    Case("weights no tensors", damaged(text(DIT, "<html>not found</html>")), 2, "cannot read .*, is it complete"),
    Case("weights an LFS pointer", damaged(text(DIT, "version https://git-lfs")), 2, "cannot read .*, is it complete"),
    Case("weights a pipe", damaged(replaced(DIT, os.mkfifo)), 2, f"lacks {DIT}"),
    Case("weights int8", damaged(weights(integers("blocks.0.ffn.0.weight"))), 2, "of type I8, no floating point"),
    Case("weights without head", damaged(weights(lambda t: t.pop("head.head.bias"))), 2, "lacks tensor head.head.bias"),
    Case("weights with more", damaged(weights(zeros("lora.up", (3, 3)))), 2, "holds tensor lora.up, which is no part"),
    Case("weights of another shape", damaged(weights(zeros("head.head.bias", (7,)))), 2, r"has the shape \[7\]"),
    Case("header length", damaged(lambda f: (f / DIT).write_bytes(b"\xff" * 8 + b"{}")), 2, "is it complete"),
    Case("header offsets", damaged(header(lambda h: h["head.head.bias"].update(data_offsets=[0, 10**15]))), 2,
         "complete"),
    Case("header shape", damaged(header(lambda h: h["head.head.bias"].update(shape=[5]))), 2, "is it complete"),
    Case("header shape text", damaged(header(lambda h: h["head.head.bias"].update(shape="5"))), 2, "is it complete"),
    Case("header dtype", damaged(header(lambda h: h["head.head.bias"].update(dtype="F31"))), 2, "is it complete"),
    Case("index nested", damaged(text(INDEX, NESTED), "i2v"), 2, f"broken {INDEX}: it is nested too deeply"),
    Case("index list", damaged(text(INDEX, "[]"), "i2v"), 2, f"broken {INDEX}: it needs objects"),
    Case("index without map", damaged(text(INDEX, '{"metadata": {}}'), "i2v"), 2, f"broken {INDEX}: it needs objects"),
    Case("index of numbers", damaged(index(lambda i: i["weight_map"].update(a=5)), "i2v"), 2,
         "the file of tensor a is 5"),
    Case("index elsewhere", damaged(index(lambda i: i["weight_map"].update(a="../x.safetensors")), "i2v"), 2,
         "file of t"),
    Case("index NUL", damaged(index(lambda i: i["weight_map"].update(a="\0.safetensors")), "i2v"), 2,
         "the file of tensor"),
    Case("index no such shard", damaged(index(lambda i: i["weight_map"].update(a="b.safetensors")), "i2v"), 2,
         "lacks b.s"),
    Case("index other shard", damaged(index(move), "i2v"), 2, "should be in|is in .*, not in"),
    Case("index more", damaged(index(lambda i: i["weight_map"].update(extra=SHARD)), "i2v"), 2, "extra should be in"),
    Case("index less", damaged(index(lambda i: i["weight_map"].popitem()), "i2v"), 2, f"is in .*, not in {INDEX}"),
    Case("shard cut", damaged(cut(SHARD, 0.5), "i2v"), 2, f"cannot read .*{SHARD}, is it complete"),
    Case("shard missing", damaged(lambda f: (f / SHARD).unlink(), "i2v"), 2, f"lacks {SHARD}"),
]  # fmt: skip


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def with_file(name: str, tensors: tuple[str, ...] = ("a",)) -> Callable[[Path], object]:
    """Nothing but this file, which holds tensors of these names where it is of safetensors."""

    def change(folder: Path) -> None:
        emptied(folder)
        (folder / name).write_text("{}")
        if name.endswith(".safetensors"):
            save_file({tensor: torch.zeros(1) for tensor in tensors}, folder / name)

    return change


def with_two_experts(folder: Path) -> None:
    emptied(folder)
    (folder / "high_noise_model").mkdir()
    (folder / "low_noise_model").mkdir()


def renamed(prefix: str, *more: str) -> Callable[[dict], object]:
    """With a prefix for every name, and more tensors."""

    def change(tensors: dict) -> None:
        old = dict(tensors)
        tensors.clear()
        tensors.update({prefix + name: tensor for name, tensor in old.items()})
        tensors.update({name: torch.ones(1) for name in more})

    return change


def single_file(folder: Path) -> list:
    save_file({"patch_embedding.weight": torch.zeros(1)}, folder / "wan.safetensors")
    return flags_of("t2v", folder / "wan.safetensors")


NEEDED = "task t2v-1.3B needs the folder of Wan-AI/Wan2.1-T2V-1.3B as it is"
LORA, SCALED = "lora_unet_blocks_0_ffn_0.lora_up.weight", "blocks.0.ffn.0.scale_weight"
OTHERS = [
    Case("a pipeline of diffusers", damaged(with_file("model_index.json")), 2, f"holds a pipeline of diff.*{NEEDED}\n"),
    Case("a transformer of diffusers", damaged(values("config.json", _class_name="WanTransformer3DModel")), 2,
         f"holds a transformer of diffusers: {NEEDED}\n"),
    Case("two experts of Wan2.2", damaged(with_two_experts), 2, f"holds a model of Wan2.2: {NEEDED}\n"),
    Case("TI2V of Wan2.2", damaged(values("config.json", model_type="ti2v", in_dim=48, out_dim=48)), 2,
         f"holds a model of Wan2.2: {NEEDED}\n"),
    Case("weights for ComfyUI", damaged(weights(renamed("model.diffusion_model."))), 2,
         "holds weights for ComfyUI: task"),
    Case("weights in fp8 with scales", damaged(weights(renamed("", SCALED))), 2, "holds fp8 weights with scales: task"),
    Case("a file of fp8 with scales", damaged(with_file("wan.safetensors", ("a", SCALED))), 2,
         "holds fp8 weights with"),
    Case(
        "a folder of a LoRA", damaged(with_file("wan_lora.safetensors", (LORA,))), 2, f"holds LoRA weights: {NEEDED}\n"
    ),
    Case("a LoRA in place of the weights", damaged(weights(renamed("", LORA))), 2, "holds LoRA weights: task"),
    Case("a folder of one file", damaged(with_file("wan.gguf")), 2, f"holds the single file wan.gguf: {NEEDED}\n"),
    Case("one file", single_file, 2, f"holds the single file wan.safetensors: {NEEDED}\n"),
    Case("a quantized model", damaged(values("config.json", quantization_config={})), 2,
         "holds a quantized model: task"),
]  # fmt: skip

ENCODERS = [
    Case("VAE cut", damaged(cut(VAE, 0.99)), 2, f"cannot read .*{VAE}, is it complete"),
    Case("VAE in the old format cut", damaged(old_format_cut), 2, f"cannot read .*{VAE}, is it complete"),
    Case("VAE empty", damaged(cut(VAE, 0)), 2, f"cannot read .*{VAE}, is it complete"),
    Case("VAE text", damaged(text(VAE, "not found")), 2, f"cannot read .*{VAE}, is it complete"),
    Case("VAE a zip",
         damaged(lambda f: shutil.make_archive(f / "a", "zip", f / "google") and (f / "a.zip").rename(f / VAE)), 2,
         f"cannot read .*{VAE}, is it complete"),
    Case("VAE a list", damaged(lambda f: torch.save([1], f / VAE)), 2, "it is no dict of tensors"),
    Case("VAE of numbers", damaged(lambda f: torch.save({"encoder.conv1.weight": 1}, f / VAE)), 2,
         "no dict of tensors"),
    Case("VAE malicious", damaged(lambda f: torch.save({"a": Malicious()}, f / VAE)), 2, r"posix\.system|system"),
    Case("VAE malicious old", damaged(pickled), 2, f"cannot read .*{VAE}"),
    Case("VAE int8", damaged(weights(integers("encoder.conv1.weight"), VAE)), 2,
         "of type torch.int8, no floating point"),
    Case("VAE without conv2", damaged(weights(lambda t: t.pop("conv2.weight"), VAE)), 2,
         "Missing key.*post_quant_conv"),
    Case("VAE with more", damaged(weights(zeros("extra", (1,)), VAE)), 2, "Unexpected key.*extra"),
    Case("VAE of another shape", damaged(weights(zeros("conv1.bias", (64,)), VAE)), 2, "size mismatch for quant_conv"),
    Case("VAE is T5", damaged(lambda f: shutil.copy(f / T5, f / VAE)), 2,
         "lacks tensor encoder.conv1.weight: is it the"),
    Case("VAE a pipe", damaged(replaced(VAE, os.mkfifo)), 2, f"lacks {VAE}"),
    Case("T5 cut", damaged(cut(T5, 0.5)), 2, f"cannot read .*{T5}, is it complete"),
    Case("T5 is VAE", damaged(lambda f: shutil.copy(f / VAE, f / T5)), 2, "lacks tensor token_embedding.weight"),
    Case("T5 without norm", damaged(weights(lambda t: t.pop("norm.weight"), T5)), 2, "Missing key.*final_layer_norm"),
    Case(
        "T5 with a far block", damaged(weights(zeros("blocks.999999999.norm1.weight", (8,)), T5)), 2, "is it complete"
    ),
    Case("T5 wide", damaged(weights(zeros("token_embedding.weight", (9, 9)), T5)), 2, "has features 9 wide"),
    Case("T5 flat", damaged(weights(zeros("blocks.0.attn.q.weight", (9,)), T5)), 2, f"cannot read .*{T5}"),
    Case("CLIP cut", damaged(cut(CLIP, 0.5), "i2v"), 2, f"cannot read .*{CLIP}, is it complete"),
    Case("CLIP without", damaged(weights(lambda t: t.pop("visual.pos_embedding"), CLIP), "flf2v"), 2, "pos_embedding"),
    Case("CLIP wide", damaged(weights(zeros("visual.patch_embedding.weight", (9, 3, 2, 2)), CLIP), "i2v"), 2, "9 wide"),
    Case("tokenizer nested", damaged(text(TOKENIZER, NESTED)), 2, "tokenizer in .*umt5-xxl, is it complete"),
    Case("tokenizer list", damaged(text(TOKENIZER, "[]")), 2, "tokenizer in .*umt5-xxl, is it complete"),
    Case("tokenizer of a large model", damaged(large_tokenizer), 2, "has 1151 tokens, the text encoder knows 151"),
    Case("tokenizer a pipe", damaged(replaced(TOKENIZER, os.mkfifo)), 2, f"lacks {TOKENIZER}"),
]  # fmt: skip

FAR = ["--task", "t2v-14B", "--ckpt_dir", "x", "--prompt", "a"]
VALUES = [
    Case("frames far", [*FAR, "--frame_num", 40001], 2, "at most 4093, where the models' positions end, got 40001"),
    Case("frames of 400 digits", [*FAR, "--frame_num", 4 * 10**400 + 1], 2, "--frame_num must be at most 4093"),
    Case("steps far", [*FAR, "--sample_steps", 10**9], 2, "at most 10000, got 1000000000"),
    Case("steps of 400 digits", [*FAR, "--sample_steps", 10**400], 2, "at most 10000"),
    Case("steps of 5000 digits", [*FAR, "--sample_steps", "1" * 5000], 2, "invalid int value"),
    Case("world no number", TINY, 2, "WORLD_SIZE=abc is no whole number: start the processes with torchrun",
         torchrun(WORLD_SIZE="abc")),
    Case("world empty", TINY, 2, "WORLD_SIZE= is no whole number", torchrun(WORLD_SIZE="")),
    Case("rank no number", TINY, 2, "RANK=abc is no whole number", torchrun(RANK="abc", LOCAL_RANK="abc")),
    Case("rank negative", TINY, 2, "RANK=-1 is no whole number", torchrun(RANK="-1")),
    Case("port no number", TINY, 2, "MASTER_PORT=http is no whole number", torchrun(MASTER_PORT="http")),
    Case("rank beyond", TINY, 2, "RANK=2 must be below WORLD_SIZE=2", torchrun(RANK="2")),
    Case("address of nobody", TINY, 2, "MASTER_ADDR=nobody.invalid leads nowhere",
         torchrun(MASTER_ADDR="nobody.invalid")),
    Case("no attention backend", TINY, 2, "there is no attention backend 'quick'; here run .*native",
         {"DIFFUSERS_ATTN_BACKEND": "quick"}),
    Case("empty attention backend", TINY, 2, "there is no attention backend ''", {"DIFFUSERS_ATTN_BACKEND": ""}),
    Case("attention not installed", TINY, 2,
         "attention backend xformers does not run here: Xformers Attention backend 'xformers' is not usable",
         {"DIFFUSERS_ATTN_BACKEND": "xformers"}),
    Case("attention of GPUs", TINY, 2, "attention backend _native_cudnn does not run here",
         {"DIFFUSERS_ATTN_BACKEND": "_native_cudnn"}),
]  # fmt: skip

NAMES = [
    Case("name long", [*TINY, "--save_file", "x" * 300], 2, "File name too long"),
    Case("name long with the record", [*TINY, "--save_file", "x" * 251 + ".mp4"], 2, "x.json': File name too long"),
    Case("name long with the comparison", [*TINY, "--use_magcache", "--compare", "--save_file", "x" * 243 + ".mp4"], 2,
         "_uncached.mp4': File name too long"),
    Case("name long in UTF-8", [*TINY, "--save_file", "猫" * 84 + ".mp4"], 2, "File name too long"),
    Case("path long", [*TINY, "--save_file", "x/" * 2200 + "a.mp4"], 2, "File name too long"),
    Case("checkpoint name long", [*TINY, "--ckpt_dir", "x" * 300], 2, "is not a folder"),
    Case("prompt file name long", [*TINY, "--prompt_file", "x" * 300], 2, "--prompt_file: cannot read"),
    Case("table name long", [*TINY, "--use_magcache", "--mag_ratios", "x" * 300], 2, "cannot read the ratio table"),
    Case("folder name long", file_of("a.txt", "a", "--prompt_file", "a.txt", "--save_file", "x" * 300), 2, "too long"),
    Case("image name long",
         [*TINY_I2V, "--image", "x" * 300],
         2, "cannot read x+: File name too long"),
    Case("calibration folder long", [*TINY, "--magcache_calibration", "--save_file", "x" * 300 + "/film.mp4"], 2,
         "File name too long"),
    Case("NUL in a result",
         file_of("a.jsonl", r'{"prompt": "a", "save_file": "a\u0000.mp4"}', "--prompt_file", "a.jsonl"), 2,
         'line 1: "save_file" is no valid text'),
    Case("NUL in a name", [*TINY, "--save_file", "a\0.mp4"], 2, r"cannot write 'a\\x00.mp4': embedded null byte"),
    Case("NUL in the checkpoint", [*TINY, "--ckpt_dir", "a\0"], 2, "is not a folder"),
    Case("name in a prompt file long",
         file_of("a.jsonl", f'{{"prompt": "a", "save_file": "{"x" * 300}.mp4"}}', "--prompt_file", "a.jsonl"), 2,
         "File name too long"),
]  # fmt: skip

PIPES = [
    Case("prompt file a pipe", pipe("p", *TINY, "--prompt_file", "p"), 2, "cannot read p: it is not a regular file"),
    Case("prompt file a device", [*TINY, "--prompt_file", "/dev/zero"], 2, "read /dev/zero: it is not a regular"),
    Case("table a pipe", pipe("p", *TINY, "--use_magcache", "--mag_ratios", "p"), 2, "table p: it is not a regular"),
    Case("table a device", [*TINY, "--use_magcache", "--mag_ratios", "/dev/zero"], 2,
         "/dev/zero: it is not a regular file"),
    Case("result a pipe", pipe("p.mp4", *TINY, "--save_file", "p.mp4"), 2, "p.mp4 exists and is not a regular file"),
    Case("record a pipe", pipe("p.json", *TINY, "--save_file", "p.mp4"), 2, "p.json exists and is not a regular file"),
    Case("result folder takes nothing", [*TINY, "--save_file", "/proc/a.mp4"], 2, "cannot write ./proc/a.mp4.: "),
    Case("result folder a device", [*TINY, "--save_file", "/dev/null/a.mp4"], 2, "cannot write|does not exist"),
    Case("calibration a pipe", pipe("calibration", *TINY, "--magcache_calibration"), 2, "cannot write to"),
    Case("checkpoint a pipe", pipe("p", *TINY, "--ckpt_dir", "p"), 2, "is not a folder"),
    Case("image a pipe",
         pipe("p.png", *TINY_I2V, "--image", "p.png"),
         2, "cannot read p.png: it is not a regular file"),
    Case("source a pipe",
         lambda folder: [*damaged(lambda f: os.mkfifo(folder / "p.mp4"), "vace")(folder), "--src_video", "p.mp4"], 2,
         "cannot read p.mp4: it is not a regular file"),
    Case("reference a device",
         lambda folder: [*damaged(lambda f: None, "vace")(folder), "--src_ref_images", "/dev/zero"], 2,
         "cannot read /dev/zero: it is not a regular file"),
    Case("picture of a plan a pipe", pipe("p.png", *FAR, "--magcache_plan", "p.png"), 2,
         "exists and is not a regular file"),
    Case("extension model of pipes",
         lambda folder: [*pipe("config.json", *TINY, "--use_prompt_extend")(folder), "--prompt_extend_model", folder],
         2, "has no usable config.json"),
]  # fmt: skip

LISTS = ["--use_magcache", "--mag_ratios", "t.json"]
TABLES = [
    Case("table nested", file_of("t.json", NESTED, *LISTS), 2, "table t.json: it is nested too deeply"),
    Case("table of 400 digits", file_of("t.json", f"[{HUGE}, 1]", *LISTS), 2, "ratio 0 is 1000"),
    Case("table of infinities", file_of("t.json", "[1e999, 1]", *LISTS), 2, "ratio 0 is inf"),
    Case("table of text", file_of("t.json", '["1", "1"]', *LISTS), 2, "it must be a list of numbers"),
    Case("table of lists", file_of("t.json", "[[1, 1]]", *LISTS), 2, "it must be a list of numbers"),
    Case("table of truth", file_of("t.json", "[true, true]", *LISTS), 2, "it must be a list of numbers"),
    Case("table a number", file_of("t.json", "5", *LISTS), 2, "it must be a list of numbers"),
    Case("table measured on a list", file_of("t.json", '{"mag_ratio": [1, 1], "measured_on": []}', *LISTS), 2,
         "settings"),
    Case("table steps of 400 digits", file_of("t.json", f'{{"mag_ratio": [1, 1], "calibrated_steps": {HUGE}}}', *LISTS),
         2, "2 ratios do not fit 1000"),
    Case("prompts nested", file_of("p.jsonl", f'{{"prompt": {NESTED}}}', "--prompt_file", "p.jsonl"), 2,
         "line 1: no JSON"),
    Case("prompts seed of 400 digits",
         file_of("p.jsonl", f'{{"prompt": "a", "seed": {HUGE}}}', "--prompt_file", "p.jsonl"), 2,
         "seed must be between"),
    Case("prompts seed text", file_of("p.jsonl", '{"prompt": "a", "seed": "1"}', "--prompt_file", "p.jsonl"), 2,
         '"seed" must be a whole number'),
    Case("prompts seed nested",
         file_of("p.jsonl", f'{{"prompt": "a", "seed": {"[" * 500 + "]" * 500}}}', "--prompt_file", "p.jsonl"), 2,
         '"seed" must be a whole number'),
    Case("prompts no text",
         lambda folder: ((folder / "p.txt").write_bytes(b"\xff\xff"), [*TINY, "--prompt_file", "p.txt"])[1], 2,
         "cannot read p.txt"),
    Case("record nested", file_of("film.json", NESTED, "--save_file", "film.mp4"), 2,
         "film.json exists and is no record"),
    Case("record of numbers", file_of("film.json", '{"made_by": 5}', "--save_file", "film.mp4"), 2, "is no record"),
    Case("record of lists", file_of("film.json", '["made_by"]', "--save_file", "film.mp4"), 2, "is no record"),
]  # fmt: skip

Q = "blocks.0.self_attn.q"


def lora(tensors: dict[str, tuple[int, ...]], *strength: str, **metadata: str) -> Callable[[Path], list]:
    """A file of zeros of these shapes."""

    def prepare(folder: Path) -> list:
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / "a.safetensors", metadata)
        return [*TINY, "--lora", ":".join(("a.safetensors", *strength))]

    return prepare


def pair(module: str, rows: int = 192, columns: int = 192, halves: str = "AB") -> dict[str, tuple[int, int]]:
    shapes = {"A": (4, columns), "B": (rows, 4)}
    return {f"{module}.lora_{half}.weight": shapes[half] for half in halves}


LORAS = [
    Case("LoRA missing", [*TINY, "--lora", "a.safetensors"], 2, "--lora: there is no file a.safetensors$"),
    Case("LoRA missing, with a strength", [*TINY, "--lora", "a.safetensors:0.8"], 2, "there is no file a.safetensors$"),
    Case("LoRA a folder", [*TINY, "--lora", "."], 2, r"there is no file \.$"),
    Case("LoRA a pipe", pipe("p", *TINY, "--lora", "p"), 2, "there is no file p$"),
    Case("LoRA empty", [*TINY, "--lora", ""], 2, "there is no file $"),
    Case("LoRA strength text", lora(pair(Q), "strong"), 2, "a.safetensors:strong, and 'strong' is no strength"),
    Case("LoRA strength missing", lora(pair(Q), ""), 2, "a.safetensors:, and '' is no strength"),
    Case("LoRA strength NaN", lora(pair(Q), "nan"), 2, "a.safetensors: the strength must be finite, it is nan"),
    Case("LoRA strength infinite", lora(pair(Q), "1e999"), 2, "the strength must be finite, it is inf"),
    Case("LoRA no tensors", file_of("a.pt", "<html>not found</html>", "--lora", "a.pt"), 2,
         "--lora: cannot read a.pt, is it complete"),
    Case("LoRA of nothing", lora({}, of="nothing"), 2, "does not fit: it holds no tensors"),
    Case("LoRA of a larger model", lora(pair(f"diffusion_model.{Q}", 5120, 5120)), 2,
         rf"the change of {Q}.weight is \[5120, 4\] times \[4, 5120\], and the model's is \[192, 192\]; it fits the "
         "model of t2v-14B or i2v-14B"),
    Case("LoRA of more layers", lora(pair("lora_unet_blocks_8_ffn_0", 768)), 2,
         "tensor lora_unet_blocks_8_ffn_0.lora_A.weight has no place in this model$"),
    Case("LoRA of an i2v model", lora(pair("transformer.blocks.0.attn2.add_k_proj")), 2,
         "add_k_proj.lora_A.weight has no place in this model; it fits the model of i2v-tiny$"),
    Case("LoRA of another model", lora(pair("transformer.transformer_blocks.0.attn.to_q")), 2, "has no place"),
    Case("LoRA of another kind", lora(pair(Q) | {f"{Q}.lora_magnitude_vector": (192,)}), 2, "vector has no place"),
    Case("LoRA down without up", lora(pair(Q, halves="A")), 2, f"of the change of {Q}.weight there is only down$"),
    Case("LoRA up without down", lora(pair(Q, halves="B")), 2, f"of the change of {Q}.weight there is only up$"),
    Case("LoRA alpha alone", lora({f"{Q}.alpha": ()}), 2, "there is only alpha"),
    Case("LoRA alpha a list", lora(pair(Q) | {f"{Q}.alpha": (2,)}), 2, "alpha .* is no single number"),
    Case("LoRA difference of another shape", lora({f"{Q}.diff_b": (193,)}), 2, r"bias is \[193\], and .* \[192\]"),
    Case("LoRA halves apart", lora({**pair(Q, halves="A"), f"{Q}.lora_B.weight": (192, 5)}), 2, r"\[192, 5\] times"),
    Case("LoRA of numbers", lora({f"{Q}.lora_A.weight": (), f"{Q}.lora_B.weight": ()}), 2, r"is \[\] times \[\]"),
    Case("LoRA twice the same", lora(pair(Q) | pair(f"diffusion_model.{Q}")), 2, "stand for the same"),
    Case("LoRA metadata nested", lora(pair(Q), lora_adapter_metadata=NESTED), 2, "cannot read the configuration"),
    Case("LoRA with DoRA", lora(pair(Q), lora_adapter_metadata='{"transformer.use_dora": true}'), 2,
         "is a LoRA with use_dora, which is not known here"),
    Case("LoRA alpha text", lora(pair(Q), lora_adapter_metadata='{"transformer.lora_alpha": "4"}'), 2,
         "lora_alpha of a.safetensors must be a number, it is '4'"),
]  # fmt: skip

CASES = [
    *CONFIG,
    *WEIGHTS,
    *OTHERS,
    *ENCODERS,
    *VALUES,
    *NAMES,
    *PIPES,
    *TABLES,
    *LORAS,
]  # fmt: skip
