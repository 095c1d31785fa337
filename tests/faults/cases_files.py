"""Damaged checkpoints and other input files."""

import functools
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints_22 import KINDS, write_checkpoint_22
from commands import DEMO_I2V, EXAMPLES, REPO, TINY
from golden_data import write_checkpoint
from safetensors.torch import load_file, save_file

from faults.case import Case, later

TASKS = {"t2v": "t2v-1.3B", "i2v": "i2v-14B", "flf2v": "flf2v-14B", "vace": "vace-1.3B"}
DIT, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
T5, VAE, VAE_5B = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"
HIGH, LOW = "high_noise_model", "low_noise_model"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
NESTED, HUGE = "[" * 100_000 + "]" * 100_000, "1" + "0" * 400
TINY = [*TINY, "--frame_num", 1, "--sample_steps", 2]
TINY_I2V = ["--task", "i2v-tiny", "--size", "64*64", "--prompt", "a", "--ckpt_dir", DEMO_I2V]
PICTURE = EXAMPLES / "girl.png"


SCRATCH = tempfile.TemporaryDirectory()  # until Python ends


@functools.cache
def original(kind: str) -> Path:
    folder = Path(SCRATCH.name) / kind
    if kind in KINDS:
        return write_checkpoint_22(kind, folder)
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
    size = "1280*704" if kind == "ti2v-5B" else "832*480"
    flags = ["--task", TASKS.get(kind, kind), "--size", size, "--ckpt_dir", folder, "--sample_steps", 1]
    flags += ["--prompt", "a"]
    pictures = {"i2v": ("--image",), "i2v-A14B": ("--image",), "flf2v": ("--first_frame", "--last_frame")}.get(kind, ())
    return flags + [part for flag in pictures for part in (flag, PICTURE)]


@later
def damaged(folder: Path, change: Callable[[Path], object], kind: str = "t2v", *flags) -> list:
    """A checkpoint folder that the function changes."""
    checkpoint = shutil.copytree(original(kind), folder / "model")
    change(checkpoint)
    return [*flags_of(kind, checkpoint), *flags]


@later
def text(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


@later
def values(folder: Path, name: str, **changed) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))


@later
def cut(folder: Path, name: str, keep: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content))])


@later
def weights(folder: Path, change: Callable[[dict], object], name: str = DIT) -> None:
    """Rewrites a file of tensors."""
    path = folder / name
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    change(tensors)
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


@later
def replaced(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Another thing in a file's place."""
    (folder / name).unlink()
    make(folder / name)


def move(index: dict) -> None:
    places = index["weight_map"]
    name = next(name for name, file in places.items() if file == SHARD)
    places[name] = SHARD.replace("00001", "00002", 1)


@later
def index(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def old_format_cut(folder: Path) -> None:
    torch.save(torch.load(folder / VAE), folder / VAE, _use_new_zipfile_serialization=False)
    cut(VAE, 0.9)(folder)


def pickled(folder: Path) -> None:
    with (folder / VAE).open("wb") as file:
        pickle.dump({"encoder.conv1.weight": Malicious()}, file)


@later
def zeros(tensors: dict, name: str, shape: tuple[int, ...]) -> None:
    tensors[name] = torch.zeros(shape)


def large_tokenizer(folder: Path) -> None:
    content = json.loads((folder / TOKENIZER).read_text())
    content["model"]["vocab"] += [[f"token{number}", -10.0] for number in range(1000)]
    (folder / TOKENIZER).write_text(json.dumps(content))


@later
def integers(tensors: dict, name: str) -> None:
    tensors[name] = tensors[name].to(torch.int8)


@later
def file_of(folder: Path, name: str, content: str | bytes, *flags) -> list:
    """The demo model with one more file, which the flags name."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [*TINY, *flags]


@later
def pipe(folder: Path, name: str, *flags) -> list:
    os.mkfifo(folder / name)
    return list(flags)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@later
def with_file(folder: Path, name: str, tensors: tuple[str, ...] = ("a",)) -> None:
    """Nothing but this file, which holds tensors of these names where it is of safetensors."""
    emptied(folder)
    (folder / name).write_text("{}")
    if name.endswith(".safetensors"):
        save_file({tensor: torch.zeros(1) for tensor in tensors}, folder / name)


def zipped(folder: Path) -> None:
    shutil.make_archive(folder / "a", "zip", folder / "google")
    (folder / "a.zip").rename(folder / VAE)


def with_two_experts(folder: Path) -> None:
    emptied(folder)
    (folder / "high_noise_model").mkdir()
    (folder / "low_noise_model").mkdir()


def within_experts(folder: Path) -> list:
    return flags_of("t2v-A14B", original("t2v-A14B") / "high_noise_model")


@later
def with_transformer_of(folder: Path, kind: str) -> None:
    """In place of that for low noise."""
    for name in (DIT, "config.json"):
        shutil.copy(original(kind) / name, folder / LOW / name)


@later
def renamed(tensors: dict, prefix: str, *more: str) -> None:
    """With a prefix for every name, and more tensors."""
    old = dict(tensors)
    tensors.clear()
    tensors.update({prefix + name: tensor for name, tensor in old.items()})
    tensors.update({name: torch.ones(1) for name in more})


def single_file(folder: Path) -> list:
    save_file({"patch_embedding.weight": torch.zeros(1)}, folder / "wan.safetensors")
    return flags_of("t2v", folder / "wan.safetensors")


NEEDED = "task t2v-1.3B needs the folder of Wan-AI/Wan2.1-T2V-1.3B as it is"
LORA, SCALED = "lora_unet_blocks_0_ffn_0.lora_up.weight", "blocks.0.ffn.0.scale_weight"
# changes of a checkpoint of t2v, unless another kind is named
CHANGES = {
    "config nested": (text("config.json", NESTED), "broken config.json: .*nested too deeply"),
    "config of 400 digits": (text("config.json", f'{{"dim": {HUGE}}}'), "dim must be a whole number"),
    "config of 5000 digits": (text("config.json", f'{{"dim": {"1" * 5000}}}'), "broken config.json"),
    "config list": (text("config.json", "[1]"), "broken config.json: it is not a JSON object"),
    "config no JSON": (text("config.json", "dim = 3"), "broken config.json: Expecting value"),
    "config no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "broken config.json"),
    "config a pipe": (replaced("config.json", os.mkfifo), "config.json: it is not a regular file"),
    "config a folder": (replaced("config.json", os.mkdir), "config.json: .*Is a directory"),
    "an empty folder": (emptied, "lacks config.json"),
    "dim true": (values("config.json", dim=True), "dim must be a whole number from 1 to 65536, got True"),
    "dim other": (values("config.json", dim=48), r"tensor .* has the shape .*, but config.json makes it"),
    "layers too many": (values("config.json", num_layers=3), r"lacks tensor blocks\.2"),
    "layers far too many": (values("config.json", num_layers=1000), "but 1000 layers by its config.json"),
    "layers too few": (values("config.json", num_layers=1), r"holds tensor blocks\.1.* does not call for"),
    "heads uneven": (values("config.json", num_heads=3), "dim an even multiple of num_heads"),
    "eps NaN": (values("config.json", eps=float("nan")), "eps must be a number between 0 and 1"),
    "text_dim text": (values("config.json", text_dim="wide"), "text_dim must be a whole number"),
    "in_dim 17": (values("config.json", in_dim=17), "in_dim must be 16 for a model of type t2v"),
    "type a list": (values("config.json", model_type=["t2v"]), "task t2v-1.3B needs t2v"),
    "vace_layers far": (values("config.json", vace_layers=[9]), "must be a list of layers below 2", "vace"),
    "vace_layers twice": (values("config.json", vace_layers=[0, 0]), "must be distinct", "vace"),
    "weights cut": (cut(DIT, 0.9), f"cannot read .*{DIT}, is it complete"),
    "weights empty": (cut(DIT, 0), f"cannot read .*{DIT}, is it complete"),
    "weights longer": (lambda f: (f / DIT).open("ab").write(b"more"), "cannot read .*, is it complete"),
    "weights no tensors": (text(DIT, "<html>not found</html>"), "cannot read .*, is it complete"),
    "weights a pipe": (replaced(DIT, os.mkfifo), f"lacks {DIT}"),
    "weights int8": (weights(integers("blocks.0.ffn.0.weight")), "of type I8, not floating point"),
    "header length": (lambda f: (f / DIT).write_bytes(b"\xff" * 8 + b"{}"), "is it complete"),
    "index nested": (text(INDEX, NESTED), f"broken {INDEX}: it is nested too deeply", "i2v"),
    "index without map": (text(INDEX, '{"metadata": {}}'), f"broken {INDEX}: it needs objects", "i2v"),
    "index of numbers": (index(lambda i: i["weight_map"].update(a=5)), "the file of tensor a is 5", "i2v"),
    "index elsewhere": (index(lambda i: i["weight_map"].update(a="../x.safetensors")), "file of t", "i2v"),
    "index no such shard": (index(lambda i: i["weight_map"].update(a="b.safetensors")), "lacks b.s", "i2v"),
    "index other shard": (index(move), "should be in|is in .*, not in", "i2v"),
    "index more": (index(lambda i: i["weight_map"].update(extra=SHARD)), "extra should be in", "i2v"),
    "index less": (index(lambda i: i["weight_map"].popitem()), f"is in .*, not in {INDEX}", "i2v"),
    "index missing": (lambda f: (f / INDEX).unlink(), f"lacks {INDEX}", "i2v"),
    "a pipeline of diffusers": (with_file("model_index.json"), f"holds a pipeline of diff.*{NEEDED}\n"),
    "a transformer of diffusers": (values("config.json", _class_name="WanTransformer3DModel"),
                                   f"holds a transformer of diffusers: {NEEDED}\n"),
    "two experts of Wan2.2": (with_two_experts, f"holds a model of Wan2.2: {NEEDED}\n"),
    "TI2V of Wan2.2": (values("config.json", model_type="ti2v", in_dim=48, out_dim=48),
                       f"holds a model of Wan2.2: {NEEDED}\n"),
    "weights for ComfyUI": (weights(renamed("model.diffusion_model.")), "holds weights for ComfyUI: task"),
    "weights in fp8 with scales": (weights(renamed("", SCALED)), "holds fp8 weights with scales: task"),
    "a file of fp8 with scales": (with_file("wan.safetensors", ("a", SCALED)), "holds fp8 weights with"),
    "a folder of a LoRA": (with_file("wan_lora.safetensors", (LORA,)), f"holds LoRA weights: {NEEDED}\n"),
    "a LoRA in place of the weights": (weights(renamed("", LORA)), "holds LoRA weights: task"),
    "a folder of one file": (with_file("wan.gguf"), f"holds the single file wan.gguf: {NEEDED}\n"),
    "a quantized model": (values("config.json", quantization_config={}), "holds a quantized model: task"),
    "VAE cut": (cut(VAE, 0.99), f"cannot read .*{VAE}, is it complete"),
    "VAE in the old format cut": (old_format_cut, f"cannot read .*{VAE}, is it complete"),
    "VAE a zip": (zipped, f"cannot read .*{VAE}, is it complete"),
    "VAE a list": (lambda f: torch.save([1], f / VAE), "it is not a dict of tensors"),
    "VAE of numbers": (lambda f: torch.save({"encoder.conv1.weight": 1}, f / VAE), "not a dict of tensors"),
    "VAE malicious": (lambda f: torch.save({"a": Malicious()}, f / VAE), r"posix\.system|system"),
    "VAE malicious old": (pickled, f"cannot read .*{VAE}"),
    "VAE int8": (weights(integers("encoder.conv1.weight"), VAE), "of type torch.int8, not floating point"),
    "VAE without conv2.bias": (weights(lambda t: t.pop("conv2.bias"), VAE), "Missing key.*post_quant_conv"),
    "VAE is T5": (lambda f: shutil.copy(f / T5, f / VAE), "lacks tensor encoder.conv1.weight: is it the"),
    "VAE a pipe": (replaced(VAE, os.mkfifo), f"lacks {VAE}"),
    "T5 without norm": (weights(lambda t: t.pop("norm.weight"), T5), "Missing key.*final_layer_norm"),
    "T5 with a far block": (weights(zeros("blocks.999999999.norm1.weight", (8,)), T5), "is it complete"),
    "T5 wide": (weights(zeros("token_embedding.weight", (9, 9)), T5), "has features 9 wide"),
    "T5 flat": (weights(zeros("blocks.0.attn.q.weight", (9,)), T5), f"cannot read .*{T5}"),
    "CLIP missing": (lambda f: (f / CLIP).unlink(), f"lacks {CLIP}", "i2v"),
    "CLIP without": (weights(lambda t: t.pop("visual.pos_embedding"), CLIP), "pos_embedding", "flf2v"),
    "CLIP wide": (weights(zeros("visual.patch_embedding.weight", (9, 3, 2, 2)), CLIP), "9 wide", "i2v"),
    "tokenizer nested": (text(TOKENIZER, NESTED), "tokenizer in .*umt5-xxl, is it complete"),
    "tokenizer list": (text(TOKENIZER, "[]"), "tokenizer in .*umt5-xxl, is it complete"),
    "tokenizer of a large model": (large_tokenizer, "has 1151 tokens, but the text encoder knows 151"),
    "tokenizer a pipe": (replaced(TOKENIZER, os.mkfifo), f"lacks {TOKENIZER}"),
}  # fmt: skip

_LOW_DIT = f"{LOW}/{DIT}"
CHANGES |= {  # of Wan2.2's models
    "no expert": (emptied, f"/{HIGH} lacks config.json", "t2v-A14B"),
    "an expert missing": (lambda f: shutil.rmtree(f / LOW), f"/{LOW} lacks config.json", "t2v-A14B"),
    "an expert without weights": (lambda f: (f / _LOW_DIT).unlink(), f"lacks {_LOW_DIT}", "i2v-A14B"),
    "an expert cut": (cut(_LOW_DIT, 0.9), f"cannot read .*{_LOW_DIT}, is it complete", "t2v-A14B"),
    "an expert of another dim": (values(f"{LOW}/config.json", dim=40), f"{LOW}: tensor .* has the shape", "t2v-A14B"),
    "an expert with a tensor less": (weights(lambda t: t.pop("head.modulation"), _LOW_DIT),
                                     f"{LOW} lacks tensor head.modulation", "t2v-A14B"),
    "an expert in fp8": (weights(renamed("", SCALED), _LOW_DIT), f"{LOW} holds fp8 weights with", "t2v-A14B"),
    "an expert that sees pictures": (with_transformer_of("flf2v"), f"{LOW} holds a model of type flf2v", "i2v-A14B"),
    "an expert of Wan2.1": (with_transformer_of("t2v"), f"{LOW} holds a model of type t2v, but task", "i2v-A14B"),
    "the VAE of the 5B": (lambda f: shutil.copy(original("ti2v-5B") / VAE_5B, f / VAE),
                          f"{VAE} has 48 latent channels, but the transformer 16", "t2v-A14B"),
    "the VAE of Wan2.1": (lambda f: shutil.copy(original("t2v") / VAE, f / VAE_5B),
                          f"{VAE_5B} has 16 latent channels, but the transformer 48", "ti2v-5B"),
    "the 5B's VAE without a layer": (weights(lambda t: t.pop("decoder.upsamples.1.upsamples.3.time_conv.bias"), VAE_5B),
                                     "Missing key.*upsampler.time_conv", "ti2v-5B"),
    "the 5B's VAE missing": (lambda f: (f / VAE_5B).unlink(), f"lacks {VAE_5B}", "ti2v-5B"),
    "the 5B with 16 channels": (values("config.json", in_dim=16), "in_dim must be 48 for a model of", "ti2v-5B"),
    "speech of Wan2.2": (values("config.json", model_type="s2v"), "holds a model of Wan2.2: task ti2v-5B", "ti2v-5B"),
    "a T5 of another width": (weights(zeros("token_embedding.weight", (9, 9)), T5), "has features 9 wide", "t2v-A14B"),
}  # fmt: skip

TABLE = ["--use_magcache", "--mag_ratios", "t.json"]
# names of a file beside the demo model, its content, flags
FILES = {
    "table nested": ("t.json", NESTED, TABLE, "table t.json: it is nested too deeply"),
    "table of broken trials": ("t.json", '{"mag_ratio": [1, 1], "trials": {"rows": 3}}',
                               [*TABLE, "--magcache_quality", 40], "t.json cannot be read: "),
    "a picture for one of two prompts": ("a.jsonl", f'{{"prompt": "a", "image": "{PICTURE}"}}\n{{"prompt": "b"}}',
                                         ["--task", "ti2v-5B", "--prompt_file", "a.jsonl"], "prompt 2 has no image"),
    "folder name long": ("a.txt", "a", ["--prompt_file", "a.txt", "--save_file", "x" * 300], "too long"),
    "record nested": ("film.json", NESTED, ["--save_file", "film.mp4"], "film.json exists and is not the record"),
    "record of numbers": ("film.json", '{"made_by": 5}', ["--save_file", "film.mp4"], "is not the record"),
}  # fmt: skip

# flags of the demo model
NAMES = {
    "name long": (["--save_file", "x" * 300], "File name too long"),
    "name long with the record": (["--save_file", "x" * 251 + ".mp4"], "x.json': File name too long"),
    "name long with the comparison": (["--use_magcache", "--compare", "--save_file", "x" * 243 + ".mp4"],
                                      "_uncached.mp4': File name too long"),
    "path long": (["--save_file", "x/" * 2200 + "a.mp4"], "File name too long"),
    "table name long": (["--use_magcache", "--mag_ratios", "x" * 300], "cannot read the ratio table"),
    "calibration folder long": (["--magcache_calibration", "--save_file", "x" * 300 + "/film.mp4"],
                                "File name too long"),
    "NUL in a name": (["--save_file", "a\0.mp4"], r"cannot write 'a\\x00.mp4': embedded null byte"),
    "NUL in the checkpoint": (["--ckpt_dir", "a\0"], "is not a folder"),
    "result folder takes nothing": (["--save_file", "/proc/a.mp4"], "cannot write ./proc/a.mp4.: "),
    "result folder a device": (["--save_file", "/dev/null/a.mp4"], "cannot write|does not exist"),
    "result folder missing": (["--save_file", "no/such/folder/x.mp4"], "x.mp4': No such file or directory"),
    "table a folder": (["--use_magcache", "--mag_ratios", REPO], "cannot read the ratio table"),
}  # fmt: skip

PIPES = [
    Case("prompt file a pipe", pipe("p", *TINY, "--prompt_file", "p"), "cannot read p: it is not a regular file"),
    Case("table a pipe", pipe("p", *TINY, "--use_magcache", "--mag_ratios", "p"), "table p: it is not a regular file"),
    Case("result a pipe", pipe("p.mp4", *TINY, "--save_file", "p.mp4"), "p.mp4 exists and is not a regular file"),
    Case("calibration a pipe", pipe("calibration", *TINY, "--magcache_calibration"), "json.: Not a directory"),
    Case("checkpoint a pipe", pipe("p", *TINY, "--ckpt_dir", "p"), "is not a folder"),
    Case("image a pipe", pipe("p.png", *TINY_I2V, "--image", "p.png"), "cannot read p.png: it is not a regular file"),
    Case("image name long", [*TINY_I2V, "--image", "x" * 300], "cannot read x+: File name too long"),
    Case("source a pipe",
         lambda folder: [*damaged(lambda f: os.mkfifo(folder / "p.mp4"), "vace")(folder), "--src_video", "p.mp4"],
         "cannot read p.mp4: it is not a regular file"),
    Case("picture of a plan a pipe", pipe("p.png", *TINY, "--magcache_plan", "p.png"), "exists and is not a regular"),
    Case("extension model of pipes",
         lambda folder: [*pipe("config.json", *TINY, "--use_prompt_extend")(folder), "--prompt_extend_model", folder],
         "has no usable config.json"),
    Case("one file", single_file, f"holds the single file wan.safetensors: {NEEDED}\n"),
]  # fmt: skip

Q = "blocks.0.self_attn.q"


@later
def lora(folder: Path, shapes: dict[str, tuple[int, ...]], *strength: str, dtype=torch.float32, **metadata) -> list:
    """A file of zeros of these shapes."""
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "a.safetensors", metadata)
    return [*TINY, "--lora", ":".join(("a.safetensors", *strength))]


def pair(module: str, rows: int = 192, columns: int = 192, halves: str = "AB") -> dict[str, tuple[int, int]]:
    shapes = {"A": (4, columns), "B": (rows, 4)}
    return {f"{module}.lora_{half}.weight": shapes[half] for half in halves}


LORAS = [
    Case("LoRA missing", [*TINY, "--lora", "a.safetensors"], "--lora: there is no file a.safetensors$"),
    Case("LoRA missing for an expert", [*TINY, "--lora", "high=a.safetensors:2"], "there is no file a.safetensors$"),
    Case("LoRA for an expert that is not there",
         lambda folder: [*lora(pair(Q))(folder)[:-1], "low=a.safetensors"],
         "--lora low=a.safetensors:1.0: task t2v-tiny has one transformer, and none for low noise$"),
    Case("LoRA missing, with a strength", [*TINY, "--lora", "a.safetensors:0.8"], "there is no file a.safetensors$"),
    Case("LoRA a folder", [*TINY, "--lora", "."], r"there is no file \.$"),
    Case("LoRA a pipe", pipe("p", *TINY, "--lora", "p"), "there is no file p$"),
    Case("LoRA empty", [*TINY, "--lora", ""], "there is no file $"),
    Case("LoRA strength text", lora(pair(Q), "strong"), "a.safetensors:strong, and 'strong' is not a strength"),
    Case("LoRA strength missing", lora(pair(Q), ""), "a.safetensors:, and '' is not a strength"),
    Case("LoRA strength NaN", lora(pair(Q), "nan"), "a.safetensors: the strength must be finite, got nan"),
    Case("LoRA strength infinite", lora(pair(Q), "1e999"), "the strength must be finite, got inf"),
    Case("LoRA no tensors", file_of("a.pt", "<html>not found</html>", "--lora", "a.pt"),
         "--lora: cannot read a.pt, is it complete"),
    Case("LoRA of nothing", lora({}, of="nothing"), "does not fit: it holds no tensors"),
    Case("LoRA of a larger model", lora(pair(f"diffusion_model.{Q}", 5120, 5120)),
         rf"the change of {Q}.weight is \[5120, 4\] times \[4, 5120\], but the model's is \[192, 192\]; it fits the "
         "model of t2v-14B or i2v-14B"),
    Case("LoRA of more layers", lora(pair("lora_unet_blocks_8_ffn_0", 768)),
         "tensor lora_unet_blocks_8_ffn_0.lora_A.weight has no place in this model$"),
    Case("LoRA of an i2v model", lora(pair("transformer.blocks.0.attn2.add_k_proj")),
         "add_k_proj.lora_A.weight has no place in this model; it fits the model of i2v-tiny$"),
    Case("LoRA of another model", lora(pair("transformer.transformer_blocks.0.attn.to_q")), "has no place"),
    Case("LoRA of another kind", lora(pair(Q) | {f"{Q}.lora_magnitude_vector": (192,)}), "vector has no place"),
    Case("LoRA down without up", lora(pair(Q, halves="A")), f"{Q}.weight is incomplete: it has only down$"),
    Case("LoRA up without down", lora(pair(Q, halves="B")), f"the change of {Q}.weight is incomplete: it has only up$"),
    Case("LoRA alpha alone", lora({f"{Q}.alpha": ()}), "it has only alpha"),
    Case("LoRA of whole numbers",
         lora(pair(Q), dtype=torch.int8), "q.lora_A.weight is of type I8, not floating point"),
    Case("LoRA alpha a list", lora(pair(Q) | {f"{Q}.alpha": (2,)}), "alpha .* is not a single number"),
    Case("LoRA difference of another shape", lora({f"{Q}.diff_b": (193,)}), r"bias is \[193\], but .* \[192\]"),
    Case("LoRA halves apart", lora({**pair(Q, halves="A"), f"{Q}.lora_B.weight": (192, 5)}), r"\[192, 5\] times"),
    Case("LoRA of numbers", lora({f"{Q}.lora_A.weight": (), f"{Q}.lora_B.weight": ()}), r"is \[\] times \[\]"),
    Case("LoRA twice the same", lora(pair(Q) | pair(f"diffusion_model.{Q}")), "stand for the same change"),
    Case("LoRA metadata nested", lora(pair(Q), lora_adapter_metadata=NESTED), "cannot read the configuration"),
    Case("LoRA with DoRA", lora(pair(Q), lora_adapter_metadata='{"transformer.use_dora": true}'),
         "is a LoRA with use_dora, which is not supported"),
    Case("LoRA alpha text", lora(pair(Q), lora_adapter_metadata='{"transformer.lora_alpha": "4"}'),
         "lora_alpha of a.safetensors must be a number, got '4'"),
]  # fmt: skip

CASES = [
    *(Case(name, damaged(change, *kind), line) for name, (change, line, *kind) in CHANGES.items()),
    *(Case(name, file_of(file, held, *flags), line) for name, (file, held, flags, line) in FILES.items()),
    *(Case(name, [*TINY, *flags], line) for name, (flags, line) in NAMES.items()),
    *PIPES,
    *LORAS,
    Case("an expert's folder", within_experts, f"/{HIGH}/{HIGH} lacks config.json"),
]
