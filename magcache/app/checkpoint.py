"""What can be told of a checkpoint folder in the official layout without reading its tensors: in a fraction of a second
for the largest model, and for whatever `wan` package will load it. All errors are ValueErrors of one line; they are
`Damaged` where another download would help."""

import contextlib
import re
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from magcache.app.architecture import CONTROL, IMAGE, LATENT, LATENT_5B, PATCH, Architecture, Shapes, tensor_shapes
from magcache.app.errors import first_line, reason_in, shortened
from magcache.app.tasks import Task
from magcache.files import read_json

if TYPE_CHECKING:
    from easydict import EasyDict

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # dtypes, as safetensors calls them
# whole numbers of config.json: the value of one that is missing, and the largest that makes sense
NUMBERS = {
    "dim": (2048, 2**16),
    "ffn_dim": (8192, 2**18),
    "freq_dim": (256, 2**16),
    "num_heads": (16, 2**10),
    "num_layers": (32, 2**10),
    "text_len": (512, 2**16),
}
# channels of the latents and of all that the transformer is given, by the type of the model
CHANNELS = {"i2v": (LATENT, IMAGE), "flf2v": (LATENT, IMAGE), "ti2v": (LATENT_5B, LATENT_5B)}
# sizes that official configs do not hold: the tensor and the axis that show them
WIDTHS = {
    "text_dim": ("text_embedding.0.weight", 1),
    "clip_dim": ("img_emb.proj.0.weight", 0),
    "clip_positions": ("img_emb.emb_pos", 1),
}
TEXT, VIDEO, PICTURES = "token_embedding.weight", "encoder.conv1.weight", "visual.patch_embedding.weight"
LATENTS = "conv2.weight"  # of the VAE, whose decoder begins with it

# what there is in other people's folders, by files in them, by words in the names of their tensors
FILES = {
    "model_index.json": "a pipeline of diffusers",
    "high_noise_model": "a model of Wan2.2",
    "adapter_config.json": "LoRA weights",
}
NAMES = {
    "lora_": "LoRA weights",
    "scale": "fp8 weights with scales",
    "diffusion_model.": "weights for ComfyUI",
    "condition_embedder.": "a transformer of diffusers",
}


class Damaged(ValueError):
    """A file is not what was published under its name."""

    def __str__(self) -> str:
        return f"{super().__str__()}: download it again"


def other_content(path: Path, task: Task) -> str | None:
    """Says what a path leads to if it is not a model of the task in the official layout; None if nothing shows that."""
    if path.is_file():
        return other_weights(path)
    if not (path / "config.json").exists():
        signs = (what for name, what in FILES.items() if name not in task.transformers and (path / name).exists())
        files = sorted(file for ending in ("safetensors", "gguf", "pt", "ckpt") for file in path.glob(f"*.{ending}"))
        return next(signs, other_weights(files[0]) if files else None)
    with contextlib.suppress(ValueError, AttributeError):  # of what is damaged, which is said later
        config = read_json(path / "config.json")
        if config.get("model_type") in ("ti2v", "s2v", "animate") and config["model_type"] != task.model_type:
            return "a model of Wan2.2"
        if "Transformer3DModel" in str(config.get("_class_name")):
            return "a transformer of diffusers"
        if "quantization_config" in config:
            return "a quantized model"
        first = path / next(iter(find_weights(path)))
        return other_tensors(read_header(first)) if first.is_file() else None
    return None


def other_weights(file: Path) -> str:
    with contextlib.suppress(ValueError):
        if file.suffix == ".safetensors" and (what := other_tensors(read_header(file))):
            return what
    return f"the single file {file.name}"


def other_tensors(names: Iterable[str]) -> str | None:
    return next((what for word, what in NAMES.items() if any(word in name for name in names)), None)


def read_config(folder: Path) -> dict:
    """Reads the transformer's config.json, checks it, and fills in all NUMBERS."""
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        config = {key: default for key, (default, _) in NUMBERS.items()} | {"eps": 1e-6} | config
        check_config(config)
    except FileNotFoundError:
        raise ValueError(f"{folder} lacks config.json") from None
    except ValueError as fault:
        raise Damaged(f"{folder} has a broken config.json: {fault}") from None
    return config


def check_config(config: dict) -> None:
    for key, (_, most) in NUMBERS.items():
        if type(config[key]) is not int or not 1 <= config[key] <= most:
            raise ValueError(f"{key} must be a whole number from 1 to {most}, got {shortened(config[key])}")
    for key in WIDTHS:
        if type(config.get(key, 0)) is not int:
            raise ValueError(f"{key} must be a whole number, got {shortened(config[key])}")
    for key in ("_class_name", "_diffusers_version"):  # diffusers looks at them
        if not isinstance(config.get(key, ""), str):
            raise ValueError(f"{key} must be text, got {shortened(config[key])}")
    if config["dim"] % config["num_heads"] or config["dim"] // config["num_heads"] % 2 or config["freq_dim"] % 2:
        raise ValueError("freq_dim must be even, and dim an even multiple of num_heads")
    if type(config["eps"]) is not float or not 0 < config["eps"] < 1:
        raise ValueError(f"eps must be a number between 0 and 1, got {shortened(config['eps'])}")
    check_kind(config)


def check_kind(config: dict) -> None:
    """Checks what depends on the model's type, and the channels that its pipeline gives it."""
    kind, number = str(config.get("model_type")), config["num_layers"]
    latent, given = CHANNELS.get(kind, (LATENT, LATENT))
    channels = {"in_dim": given, "out_dim": latent}
    channels |= {"vace_in_dim": CONTROL} if kind == "vace" else {}
    for key, expected in channels.items():
        if type(config.setdefault(key, LATENT)) is not int or config[key] != expected:
            raise ValueError(f"{key} must be {expected} for a model of type {kind}, got {shortened(config[key])}")
    layers = config.get("vace_layers")
    if kind != "vace" or layers is None:
        return
    if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer < number for layer in layers):
        raise ValueError(f"vace_layers must be a list of layers below {number}, got {shortened(layers)}")
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"vace_layers must be distinct and at least one, got {shortened(layers)}")


def sizes_in(config: dict, usual: Architecture) -> Architecture:
    """Returns the sizes in a checked config. usual: where what official configs do not hold comes from, images and the
    widths of text and image features."""
    layers, hints = config["num_layers"], config.get("vace_layers")
    blocks = 0 if config.get("model_type") != "vace" else (layers + 1) // 2 if hints is None else len(hints)
    known = {name: config[name] for name in vars(usual) if name in config}
    return replace(usual, **known | {"images": usual.images, "vace_blocks": blocks})


def architecture_of(task: Task, ckpt_dir: str | Path) -> Architecture:
    """Returns that of the folder's config.json, or the task's if it cannot be used, which a run refuses."""
    try:
        return sizes_in(read_config(Path(ckpt_dir) / task.transformers[0]), task.architecture)
    except ValueError:
        return task.architecture


def find_weights(folder: Path) -> dict[str, set[str] | None]:
    """Returns the transformer's files, and for each the names of its tensors by the index, None without one."""
    if not (folder / INDEX).exists():
        return {INDEX if any(folder.glob("diffusion_pytorch_model-*.safetensors")) else SINGLE: None}
    try:
        index = read_json(folder / INDEX)
        places, about = (index.get(key) if isinstance(index, dict) else None for key in ("weight_map", "metadata"))
        if not isinstance(places, dict) or not places or not isinstance(about, dict):  # diffusers needs both
            raise ValueError('it needs objects "weight_map" and "metadata"')
        files = {}
        for tensor, file in places.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise ValueError(f"the file of tensor {tensor[:80]} is {shortened(file)}")
            files.setdefault(file, set()).add(tensor)
    except ValueError as fault:
        raise Damaged(f"{folder} has a broken {INDEX}: {fault}") from None
    return files


def check_transformer(folder: Path, config: dict, files: dict[str, set[str] | None], usual: Architecture) -> Shapes:
    """Compares the headers of all files of weights with config.json and the index. config: of `read_config`, files: of
    `find_weights`, usual: the task's. Returns the shapes of all tensors."""
    shapes = {}
    for file, names in files.items():
        held = read_header(folder / file)
        if names is not None and (wrong := names ^ held.keys()):
            name = min(wrong)
            where = f"should be in {file} by {INDEX}, but is not" if name in names else f"is in {file}, not in {INDEX}"
            raise ValueError(f"{folder}: tensor {name[:80]} {where}")
        shapes |= held
    if config["num_layers"] > len(shapes):
        raise ValueError(f"{folder} has {len(shapes)} tensors, but {config['num_layers']} layers by its config.json")
    widths = {name: (*shapes.get(tensor, ()), 0, 0)[axis] for name, (tensor, axis) in WIDTHS.items()}
    compare_shapes(folder, shapes, tensor_shapes(sizes_in(config, replace(usual, **widths))))
    return shapes


def read_header(path: Path) -> Shapes:
    """Shapes of the tensors of a safetensors file, which must all lie within the file and be of floating point, but for
    the alpha of a LoRA."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    try:
        with safe_open(path, framework="np") as file:  # reads and checks the header only
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                tensor = file.get_slice(name)
                shapes[name] = tuple(tensor.get_shape())
                if tensor.get_dtype() not in FLOATS and not name.endswith(".alpha"):
                    raise ValueError(f"{path}: tensor {name[:80]} is of type {tensor.get_dtype()}, not floating point")
    except (SafetensorError, OSError, RuntimeError) as fault:
        raise Damaged(f"cannot read {path}, is it complete? ({first_line(fault)})") from None
    return shapes


def compare_shapes(where: Path, found: Shapes, expected: Shapes) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        verb, does = ("lacks", "calls for") if name in expected else ("holds", "does not call for")
        raise ValueError(f"{where} {verb} tensor {name[:80]}, which its config.json {does}")
    for name, shape in expected.items():
        if found[name] != shape:
            sizes = f"has the shape {list(found[name])[:6]}, but config.json makes it {list(shape)}"
            raise ValueError(f"{where}: tensor {name} {sizes}")


def check_encoders(folder: Path, names: "EasyDict", transformers: Sequence[Shapes]) -> None:
    """Checks that the text encoder, its tokenizer, the VAE and, if the transformers take its features, the image
    encoder can be read and belong to each of them. names: the task's config, which has their file names. transformers:
    the shapes of their tensors."""
    text = read_structure(folder / names.t5_checkpoint, TEXT)[TEXT]
    latent = read_structure(folder / names.vae_checkpoint, VIDEO, LATENTS)[LATENTS][0]
    widths = []
    for shapes in transformers:
        made = shapes["head.head.bias"][0] // prod(PATCH)
        if latent != made:
            vae = folder / names.vae_checkpoint
            raise ValueError(f"{vae} has {latent} latent channels, but the transformer {made}")
        widths.append((names.t5_checkpoint, text[-1], shapes["text_embedding.0.weight"][1]))
    if features := transformers[0].get("img_emb.proj.0.weight"):
        pictures = read_structure(folder / names.clip_checkpoint, PICTURES)[PICTURES]
        widths.append((names.clip_checkpoint, pictures[0], features[0]))
    for name, width, needed in widths:
        if width != needed:
            raise ValueError(f"{folder / name} has features {width} wide, but the transformer takes {needed}")
    check_tokenizer(folder / names.t5_tokenizer, text[0])


def read_structure(path: Path, *needed: str) -> Shapes:
    """Shapes of the tensors of a `.pth` file, among which the needed ones must be. Torch unpickles nothing but tensors
    for it, and reads none of their data, but for its oldest format."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual version of the format
            tensors = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as fault:  # damaged files raise anything
        raise Damaged(f"cannot read {path}, is it complete? ({reason_in(fault)})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"cannot use {path}: it is not a dict of tensors")
    shapes = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: tensor {str(name)[:80]} is of type {tensor.dtype}, not floating point")
        shapes[name] = tuple(tensor.shape)
    if lacking := [name for name in needed if not shapes.get(name)]:
        raise ValueError(f"{path} lacks tensor {lacking[0]}: is it the file that its name says?")
    return shapes


def check_tokenizer(folder: Path, rows: int) -> None:
    """Loads it. rows: of the text encoder's table, more than which no token may be."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokens = len(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
    except Exception as fault:  # damaged files raise anything
        reason = f"{type(fault).__name__}: {first_line(fault)[:200]}"
        raise Damaged(f"cannot read the tokenizer in {folder}, is it complete? ({reason})") from None
    if tokens > rows:
        raise ValueError(f"the tokenizer in {folder} has {tokens} tokens, but the text encoder knows {rows}")
