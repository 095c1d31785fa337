"""Reads the golden data: numbers produced by the reference implementation on the CPU in float32."""

import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"


def read_json(name: str):
    return json.loads((GOLDEN / name).read_text())


def read_tensors(name: str) -> dict[str, torch.Tensor]:
    """Stored as float16 or bfloat16 to be small; the reference upcast them before use."""
    tensors = load_file(GOLDEN / name)
    return {k: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for k, v in tensors.items()}


def multiply_factors(tensors: dict, factors: dict) -> dict[str, torch.Tensor]:
    """Large tensors are stored as int8 factors: T = (A @ B) * 2^-exp, exact in float32."""
    return {
        name: (tensors[f["A"]].float() @ tensors[f["B"]].float() * 2.0 ** -f["exp"]).reshape(f["shape"])
        for name, f in factors.items()
    }


def read_inputs(folder: str) -> dict[str, torch.Tensor]:
    tensors = read_tensors(f"{folder}/inputs.safetensors")
    if (GOLDEN / folder / "inputs_factors.json").exists():
        tensors |= multiply_factors(tensors, read_json(f"{folder}/inputs_factors.json"))
    return tensors


def write_dit_folder(folder: str, target: Path) -> Path:
    """A complete checkpoint folder (config and float32 weights) from a golden one, factored tensors included."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text((GOLDEN / folder / "config.json").read_text())
    tensors = {}
    for file in sorted((GOLDEN / folder).glob("diffusion_pytorch_model*.safetensors")):
        tensors |= read_tensors(file.relative_to(GOLDEN))
    if (GOLDEN / folder / "factors.json").exists():
        tensors |= multiply_factors(
            load_file(GOLDEN / folder / "factors.safetensors"), read_json(f"{folder}/factors.json")
        )
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "diffusion_pytorch_model.safetensors")
    return target


def write_checkpoint(kind: str, target: Path) -> Path:
    """A complete official checkpoint folder of a tiny random model: DiT `kind`, encoders, tokenizer, VAE."""
    write_dit_folder(f"pipelines/{kind}", target)
    encoders = ["models_t5_umt5-xxl-enc-bf16"]
    if kind in ("i2v", "flf2v"):
        encoders.append("models_clip_open-clip-xlm-roberta-large-vit-huge-14")
    for name in encoders:
        torch.save(read_tensors(f"pipelines/common/{name}.safetensors"), target / f"{name}.pth")
    torch.save(read_tensors("vae/Wan2.1_VAE.safetensors"), target / "Wan2.1_VAE.pth")
    shutil.copytree(GOLDEN / "pipelines/common/tokenizer", target / "google" / "umt5-xxl")
    return target


def write_sparse_weights(path: Path, shapes: dict) -> None:
    """Float32 tensors of which only the header is there."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)
