"""The VAE against the reference implementation, and its file."""

import pytest
import torch
from golden_data import read_inputs, read_json, read_tensors

from wan.modules.vae import WanVAE

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    torch.save(read_tensors("vae/Wan2.1_VAE.safetensors"), path)
    return WanVAE(vae_pth=path)


@pytest.mark.parametrize("frames", [1, 5, 6, 17])
def test_encode(vae, frames):
    video = read_inputs("vae")[f"video.f{frames}"]
    (latent,) = vae.encode([video])
    torch.testing.assert_close(latent, read_tensors("vae/outputs.safetensors")[f"encode.f{frames}"], **TOLERANCE)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_decode(vae, length):
    latent = read_inputs("vae")[f"latent.z{length}"]
    (video,) = vae.decode([latent])
    torch.testing.assert_close(video, read_tensors("vae/outputs.safetensors")[f"decode.z{length}"], **TOLERANCE)
    assert video.abs().max() <= 1


def test_round_trip_of_a_list(vae):
    inputs, golden = read_inputs("vae"), read_tensors("vae/outputs.safetensors")
    videos = vae.decode(vae.encode([inputs["video.f5"], inputs["video.f6"]]))
    for video, name in zip(videos, ("f5", "f6"), strict=True):
        torch.testing.assert_close(video, golden[f"decode_of_encode.{name}"], **TOLERANCE)


def test_latent_statistics(vae):
    constants = read_json("vae/constants.json")
    assert vae.mean.flatten().tolist() == pytest.approx(constants["latent_mean"])
    assert vae.std.flatten().tolist() == pytest.approx(constants["latent_std"])
