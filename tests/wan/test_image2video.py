"""Image to video and first-last-frame to video, every stage against the reference implementation."""

import pytest
import torch
from easydict import EasyDict
from golden_data import read_json, write_checkpoint
from PIL import Image
from pipeline_stages import INPUTS, check_stages

import wan
from magcache.app import media
from magcache.app.tasks import TASKS
from wan.configs import WAN_CONFIGS
from wan.image2video import video_size

GEOMETRY = read_json("i2v_geometry/geometry.json")
CLIP_HEADS = read_json("pipelines/common/hparams.json")["clip"]["vision_heads"]
STAGES = {
    "y": (lambda kwargs: kwargs["y"][0], 1e-4),
    "clip_fea_every16th_token": (lambda kwargs: kwargs["clip_fea"][:, ::16], 1e-4),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    def load(pipeline_class, kind):
        folder = write_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return pipeline_class(EasyDict(WAN_CONFIGS[f"{kind}-14B"], clip_num_heads=CLIP_HEADS), folder)

    return {"i2v": load(wan.WanI2V, "i2v"), "flf2v": load(wan.WanFLF2V, "flf2v")}


def image(key: str) -> Image.Image:
    return Image.fromarray(INPUTS[key].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["i2v_a", "i2v_b"])
def test_every_stage_of_i2v(pipelines, name):
    check_stages(pipelines["i2v"], name, image(f"{name}.image"), keys=("max_area", "frame_num"), extra=STAGES)


def test_every_stage_of_flf2v(pipelines):
    images = (image("flf2v_a.first"), image("flf2v_a.last"))
    check_stages(pipelines["flf2v"], "flf2v_a", *images, keys=("max_area", "frame_num"), extra=STAGES)


def flf2v_inputs(pipeline, first, last, frame_num):
    """What the transformer gets, and the video."""
    calls = []
    hook = pipeline.model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    video = pipeline.generate("a bird", first, last, max_area=512, frame_num=frame_num, sampling_steps=1, seed=6)
    hook.remove()
    return calls[0], video


@pytest.mark.parametrize("frame_num", [5, 9, 61])
def test_flf2v_of_any_length(pipelines, frame_num):
    """The reference knows 81 frames only."""
    pipeline, first, last = pipelines["flf2v"], image("flf2v_a.first"), image("flf2v_a.last")
    inputs, video = flf2v_inputs(pipeline, first, last, frame_num)
    assert video.shape == (3, frame_num, 16, 16)
    given = inputs["y"][0][:4]
    expected = torch.zeros_like(given)
    expected[:, 0], expected[3, -1] = 1, 1
    assert torch.equal(given, expected)


def test_flf2v_last_frame_of_another_size(pipelines):
    """The reference crops it to a transposed size. Here it covers the first frame: what is seen is its middle."""
    first = Image.new("RGB", (48, 32), "white")
    last = Image.new("RGB", (60, 90), "red")
    last.paste(Image.new("RGB", (60, 60), "blue"), (0, 15))
    blue = Image.new("RGB", (48, 32), "blue")
    seen, video = flf2v_inputs(pipelines["flf2v"], first, last, 5)
    expected, _ = flf2v_inputs(pipelines["flf2v"], first, blue, 5)
    assert video.shape == (3, 5, 16, 16)
    torch.testing.assert_close(seen["y"][0], expected["y"][0])
    torch.testing.assert_close(seen["clip_fea"], expected["clip_fea"])


def test_bad_frame_counts(pipelines):
    first = image("flf2v_a.first")
    with pytest.raises(ValueError, match="frame_num 5 or more"):
        pipelines["flf2v"].generate("a", first, first, max_area=256, frame_num=1)
    with pytest.raises(ValueError, match=r"4n\+1"):
        pipelines["i2v"].generate("a", first, max_area=256, frame_num=80)


@pytest.mark.parametrize("case", GEOMETRY["i2v"] + GEOMETRY["flf2v"], ids=lambda c: f"{c['image_hw']}{c['max_area']}")
def test_geometry(case, pipelines):
    height, width = case["image_hw"]
    size = video_size((width, height), case["max_area"])
    assert list(size) == case["video_hw"][::-1]
    assert size == media.video_size((width, height), case["max_area"], TASKS["i2v-14B"])
    shape = pipelines["i2v"].latent_shape(size, case["frame_num"])
    assert list(shape) == case["noise_shape"]
    assert pipelines["i2v"].token_count(shape) == case["max_seq_len"]


def test_shapes_without_room_are_refused():
    with pytest.raises(ValueError, match="no room"):
        video_size((1000, 1), 64 * 64)
