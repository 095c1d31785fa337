"""The DiT against the reference implementation: outputs, inner activations, and the numerics that are easy to miss."""

import pytest
import torch
from golden_data import read_inputs, read_json, read_tensors, write_dit_folder
from safetensors.torch import load, save_file

from wan.modules.model import WanModel, rope_apply, rope_rotations, sinusoidal_embedding_1d
from wan.modules.vace_model import VaceWanModel

TOLERANCE = {"rtol": 1e-4, "atol": 5e-5}
KINDS = {"dit_t2v": WanModel, "dit_i2v": WanModel, "dit_flf2v": WanModel, "dit_vace": VaceWanModel}
CASES = [(kind, case["name"]) for kind in KINDS for case in read_json(f"{kind}/cases.json")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        kind: model_class.from_pretrained(write_dit_folder(kind, tmp_path_factory.mktemp(kind))).eval()
        for kind, model_class in KINDS.items()
    }


def model_arguments(kind: str, name: str) -> dict:
    case = next(c for c in read_json(f"{kind}/cases.json") if c["name"] == name)
    inputs = read_inputs(kind)

    def per_sample(key):
        return [inputs[f"{name}.{key}.{i}"] for i in range(case["batch"])]

    arguments = {
        "x": per_sample("x"),
        "t": inputs[f"{name}.t"],
        "context": per_sample("context"),
        "seq_len": case["seq_len"],
    }
    if kind == "dit_vace":
        arguments |= {"vace_context": per_sample("vace_context"), "vace_context_scale": case["vace_context_scale"]}
    elif kind != "dit_t2v":
        arguments |= {"y": per_sample("y"), "clip_fea": inputs[f"{name}.clip_fea"]}
    return arguments


@pytest.mark.parametrize(("kind", "name"), CASES)
@torch.no_grad()
def test_outputs(models, kind, name):
    golden = read_tensors(f"{kind}/outputs.safetensors")
    out = models[kind](**model_arguments(kind, name))
    for i, u in enumerate(out):
        torch.testing.assert_close(u, golden[f"{name}.out.{i}"], **TOLERANCE)
        assert u.dtype == torch.float32


NUMERICS_IN, NUMERICS = read_tensors("numerics/inputs.safetensors"), read_tensors("numerics/outputs.safetensors")
META = read_json("numerics/meta.json")


@pytest.mark.parametrize("dim", [64, 256])
def test_time_embedding(dim):
    timesteps = torch.tensor(META["timesteps"])
    torch.testing.assert_close(
        sinusoidal_embedding_1d(dim, timesteps), NUMERICS[f"sinusoid.dim{dim}"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("head_dim", META["head_dims"])
@pytest.mark.parametrize("grid", META["grids"][:3], ids=str)
def test_rotations_far_out(head_dim, grid):
    """All channels 1 at every 50th position of an axis of 600: float32 angles would be off by 3e-5."""
    freqs = rope_rotations(grid, head_dim)[None]
    rotated = rope_apply(torch.ones(1, 600, 1, head_dim), freqs)[:, ::50]
    expected = NUMERICS[f"rope_ones.hd{head_dim}.grid{'x'.join(map(str, grid))}.every50th"]
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_dim", [20, 32])
def test_rotation_leaves_padding_alone(head_dim):
    x = NUMERICS_IN[f"rope_in.hd{head_dim}"]
    freqs = rope_rotations((2, 3, 5), head_dim)
    freqs = torch.cat([freqs, freqs.new_ones(3, head_dim // 2)])[None]
    torch.testing.assert_close(rope_apply(x, freqs), NUMERICS[f"rope_out.hd{head_dim}.grid2x3x5"], rtol=0, atol=1e-6)


@torch.no_grad()
def test_too_many_tokens_are_refused(models):
    arguments = model_arguments("dit_t2v", "c0") | {"seq_len": 44}
    with pytest.raises(ValueError, match="45 tokens, but seq_len is 44"):
        models["dit_t2v"](**arguments)


def test_half_precision_files_load_as_float32(tmp_path, models):
    models["dit_t2v"].half().save_pretrained(tmp_path)
    models["dit_t2v"].float()
    loaded = WanModel.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.config.text_dim == 4096


def test_incomplete_and_damaged_checkpoints_are_refused(tmp_path):
    folder = write_dit_folder("pipelines/t2v", tmp_path)
    path = folder / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    tensors = load(content)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=f"cannot read .*{path.name}, is it complete"):
        WanModel.from_pretrained(folder)
    save_file({k: v for k, v in tensors.items() if k != "blocks.1.ffn.0.bias"}, path)
    with pytest.raises(OSError, match=r"such as blocks\.1\.ffn\.0\.bias"):
        WanModel.from_pretrained(folder)
    save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(OSError, match="such as extra"):
        WanModel.from_pretrained(folder)
