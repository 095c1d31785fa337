"""The CLIP image encoder against the reference implementation."""

import pytest
import torch
from golden_data import read_json, read_tensors

from wan.modules.clip import CLIPModel

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
NAME = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
INPUTS, OUTPUTS = read_tensors("clip/inputs.safetensors"), read_tensors("clip/outputs.safetensors")
IMAGES = [INPUTS[f"image.{i}"].float()[:, None] / 127.5 - 1 for i in (0, 1)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / f"{NAME}.pth"
    torch.save(read_tensors(f"clip/{NAME}.safetensors"), path)
    return CLIPModel(torch.float32, "cpu", path, num_heads=read_json("clip/hparams.json")["vision_heads"])


def test_tower_without_its_last_block(clip):
    features = clip.model(INPUTS["pixels"]).last_hidden_state
    torch.testing.assert_close(features, OUTPUTS["out_use31block"], **TOLERANCE)


def test_images_of_different_sizes(clip):
    torch.testing.assert_close(clip.visual(IMAGES[:1]), OUTPUTS["clipmodel_visual_image0"], **TOLERANCE)
    torch.testing.assert_close(clip.visual(IMAGES), OUTPUTS["clipmodel_visual_two_images"], **TOLERANCE)


def test_preprocessing(clip):
    seen = []
    hook = clip.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clip.visual(IMAGES)
    hook.remove()
    torch.testing.assert_close(seen[0], OUTPUTS["preprocessed_two_images"], rtol=0, atol=2e-5)
