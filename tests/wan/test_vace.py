"""VACE: preparing sources, encoding them, and the pipeline, against the reference implementation."""

import math
import shutil
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from golden_data import GOLDEN, read_json, read_tensors, write_checkpoint
from PIL import Image
from pipeline_stages import CASES, INPUTS, check_stages

import wan
from magcache.app import media
from wan.configs import WAN_CONFIGS
from wan.modules.vace_model import VaceWanModel
from wan.utils.vace_source import plan_video, prepare_source
from wan.utils.video_file import VideoInfo, probe_video, read_frames

SOURCES = GOLDEN / "vace_source"
VIDEO, MASK = str(SOURCES / "video_a.mp4"), str(SOURCES / "mask_a.mp4")  # 10 frames of 70*50
REFS = [str(SOURCES / "ref_0.png"), str(SOURCES / "ref_1.png")]
PREPARED = read_tensors("vace_source/outputs.safetensors")
FAST = {"sampling_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wan.WanVace(WAN_CONFIGS["vace-1.3B"], write_checkpoint("vace", tmp_path_factory.mktemp("vace")))


# ---- sources


def even(frames, fps, height, width):
    return VideoInfo(tuple(i / fps for i in range(frames + 1)), height, width)


@pytest.mark.parametrize("case", read_json("vace_source/size_rule.json"), ids=lambda c: f"{c['n_frames']}x{c['w']}")
def test_size_and_frames_of_larger_videos(case):
    size = {1280 * 720: (1280, 720), 832 * 480: (480, 832)}[case["area"]]
    frame_ids, out_hw = plan_video(even(case["n_frames"], case["fps"], case["h"], case["w"]), size)
    assert frame_ids == case["frame_ids"]
    assert list(out_hw) == case["out_hw"]


@pytest.mark.parametrize("case", read_json("vace_source/cases.json")[:3], ids=lambda c: c["name"])
def test_prepared_sources(case, pipeline):
    name = case["name"]
    paths = [case[key] and str(SOURCES / case[key]) for key in ("src_video", "src_mask")]
    refs = REFS if case["refs"] else None
    videos, masks, references = pipeline.prepare_source(
        *([path] for path in paths), [refs], case["num_frames_arg"], tuple(case["image_size_arg_wh"]), "cpu"
    )
    for tensor, key in ((videos[0], "video"), (masks[0], "mask")):
        assert tensor.dtype == torch.float32
        assert list(tensor.shape) == case[key]["shape"]
        assert float(tensor.mean()) == pytest.approx(case[key]["mean"], abs=1e-4)
        assert float(tensor.std()) == pytest.approx(case[key]["std"], abs=1e-4)
    if kept := case.get("frames_kept"):
        codes = (videos[0][:, kept] * 127.5 + 127.5, masks[0][:1, kept] * 255)
        for code, key in zip(codes, ("video_u8", "mask_x255_u8"), strict=True):
            torch.testing.assert_close(code, PREPARED[f"{name}.{key}"].float(), rtol=0, atol=1.001)
    if not refs:
        assert references == [None]
        return
    for i, ref in enumerate(references[0]):
        expected = PREPARED[f"{name}.ref.{i}"]
        assert list(ref.shape) == case["ref_shapes"][i]
        assert float(ref.mean()) == pytest.approx(case["ref_stats"][i]["mean"], abs=1e-5)
        step = math.ceil(ref.shape[-1] / expected.shape[-1])  # the larger ones are stored coarsely
        torch.testing.assert_close(ref[..., ::step, ::step], expected, rtol=0, atol=1e-5)


def test_a_mask_without_a_video_is_refused():
    """The reference ignores it silently."""
    with pytest.raises(ValueError, match=r"mask_a\.mp4 needs a source video"):
        prepare_source(None, MASK, None, 5, (832, 480))


@pytest.mark.parametrize("size", [(512, 512), (64, 48), (48, 160)])
def test_any_size_will_do(size):
    """The reference knows two areas only."""
    width, height = size
    video, mask, refs = prepare_source(None, None, None, 5, size)
    assert video.shape == mask.shape == (3, 5, height, width)
    assert refs is None
    video, mask, refs = prepare_source(VIDEO, MASK, REFS[:1], 81, size)
    _, frames, height, width = video.shape
    assert frames == 9  # frame_num is for runs without a video
    assert height * width <= min(size[0] * size[1], 50 * 70)
    assert mask.shape == (1, frames, height, width)
    assert refs[0].shape == (3, 1, height, width)


@pytest.mark.parametrize(
    ("frames", "height", "width", "size"),
    [(500, 1080, 1920, (1280, 720)), (3, 17, 400, (64, 48)), (2000, 64, 48, (64, 64)), (1, 480, 832, (832, 480))],
)
def test_videos_are_shrunk_to_the_tokens_of_81_frames(frames, height, width, size):
    frame_ids, out_hw = plan_video(even(frames, 30.0, height, width), size)
    assert len(frame_ids) % 4 == 1
    assert frame_ids == sorted(set(frame_ids))
    assert frame_ids[0] == 0
    assert frame_ids[-1] == (frames - 1 if len(frame_ids) > 1 else 0)
    assert math.prod(out_hw) <= min(math.prod(size), height * width)
    assert ((len(frame_ids) - 1) // 4 + 1) * math.prod(out_hw) <= 21 * math.prod(size)


def write_video(path, frames=5, height=48, width=64, seed=0):
    pixels = torch.randint(0, 256, (frames, height, width, 3), generator=torch.Generator().manual_seed(seed))
    media.write_video(path, pixels.to(torch.uint8).numpy(), fps=16)
    return str(path)


def test_a_mask_that_does_not_fit_is_refused(tmp_path):
    video = write_video(tmp_path / "video.mp4")
    for name, arguments, message in (
        ("short.mp4", {"frames": 4}, r"short\.mp4 has 4 frames, but the video .*video\.mp4 has 5"),
        ("wide.mp4", {"width": 80}, r"wide\.mp4 has 80\*48 pixels, but the video .*video\.mp4 has 64\*48"),
    ):
        mask = write_video(tmp_path / name, **arguments)
        with pytest.raises(ValueError, match=message):
            prepare_source(video, mask, None, 5, (64, 48))


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_picture_is_the_mask_of_all_frames(ending, tmp_path):
    video, mask = write_video(tmp_path / "video.mp4"), Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / f"mask.{ending}")
    _, weights, _ = prepare_source(video, str(tmp_path / f"mask.{ending}"), None, 5, (64, 48))
    assert weights.shape == (1, 5, 48, 64)
    assert weights[..., :28].max() < 0.05
    assert weights[..., 36:].min() > 0.95
    mask.resize((80, 48)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png has 80\*48 pixels, but the video .*video\.mp4 has 64\*48"):
        prepare_source(video, str(tmp_path / "wide.png"), None, 5, (64, 48))


def cut_in_half(source, target):
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 2])


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments], check=True)


def test_a_late_start_is_not_filled_with_copies(tmp_path):
    video, late = write_video(tmp_path / "video.mp4"), str(tmp_path / "late.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-itsoffset", "0.5", "-i", video, "-c:v", "copy", late)
    assert probe_video(late) == even(5, 16, 48, 64)
    assert torch.equal(
        prepare_source(late, None, None, 5, (64, 48))[0], prepare_source(video, None, None, 5, (64, 48))[0]
    )


@pytest.mark.parametrize("fps", ["16", "25", "60", "24000/1001", "30000/1001"])
def test_times_of_frames(fps, tmp_path):
    """Of usual rates they are exact, so that they decide as the reference's."""
    numerator, denominator = map(int, (fps + "/1").split("/")[:2])
    ffmpeg("-f", "lavfi", "-i", f"testsrc=s=64x48:r={fps}", "-frames:v", "50", tmp_path / "video.mp4")
    assert probe_video(str(tmp_path / "video.mp4")).edges == tuple(i * denominator / numerator for i in range(51))


def test_a_variable_rate_is_taken_by_its_times(tmp_path):
    """Of 4 s at 30 frames a second and 4 s at 5, half of the chosen frames are of either half."""
    halves = (f"color=c={color}:s=64x48:r={rate}:d=4" for color, rate in (("red", 30), ("blue", 5)))
    inputs = [argument for half in halves for argument in ("-f", "lavfi", "-i", half)]
    joined = "[0]settb=1/90000[a];[1]settb=1/90000[b];[a][b]concat"
    path = str(tmp_path / "variable.mp4")
    ffmpeg(*inputs, "-filter_complex", joined, "-fps_mode", "vfr", "-enc_time_base", "1/90000", path)
    info = probe_video(path)
    assert info.frames == 140
    assert info.edges[120] == pytest.approx(4)
    assert info.edges[-1] == pytest.approx(8)
    frames = prepare_source(path, None, None, 5, (832, 480))[0]
    red, blue = frames[0].mean((1, 2)) > 0, frames[2].mean((1, 2)) > 0
    assert (int(red.sum()), int(blue.sum())) == (69, 68)
    assert not (red & blue).any()
    assert not blue[:69].any()


def test_pixels_that_are_not_square_become_so(tmp_path, capfd):
    """A circle that is stored as an ellipse is a circle again; the same of a video that is stored on its side, of which
    nobody prints anything."""
    ellipse = "geq=lum='255*lt(hypot((X-56)/0.75,Y-64),30)':cb=128:cr=128,setsar=4/3"
    ffmpeg("-f", "lavfi", "-i", f"color=black:s=112x128:d=0.2,{ellipse}", tmp_path / "narrow.mp4")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "narrow.mp4", "-c", "copy", tmp_path / "turned.mp4")
    for name in ("narrow.mp4", "turned.mp4"):
        path = str(tmp_path / name)
        info = probe_video(path)
        (frame,) = read_frames(path, info, {0})
        assert sorted(frame.shape) == [3, 96, 112]
        rows, columns = (np.flatnonzero((frame[..., 0] > 128).any(axis)) for axis in (1, 0))
        assert len(rows) == pytest.approx(len(columns), abs=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("codec", [("-c:v", "png"), ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p")], ids=["png", "vp9"])
def test_a_transparent_video_is_refused(codec, tmp_path):
    for opacity in (0.5, 1):
        path = str(tmp_path / f"{opacity}.mkv")
        ffmpeg("-f", "lavfi", "-i", f"color=red@{opacity}:s=64x48:d=0.4,format=rgba", *codec, path)
        if opacity == 1 and "png" in codec:  # an alpha channel that hides nothing
            assert prepare_source(path, None, None, 5, (64, 48))[0][0].mean() > 0.9
        else:
            with pytest.raises(ValueError, match=r"cannot use .*\.mkv: parts of it are transparent"):
                prepare_source(path, None, None, 5, (64, 48))


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_an_hdr_video_is_refused_until_it_is_converted(transfer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    colours = f"format=yuv420p10le,setparams=color_trc={transfer}:color_primaries=bt2020:colorspace=bt2020nc"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x48:r=16", "-frames:v", "5", "-vf", colours, "-c:v", "ffv1", "hdr.mkv")
    with pytest.raises(ValueError, match=r"^cannot use hdr\.mkv: it is HDR; convert it first: ffmpeg (.*)$") as refused:
        probe_video("hdr.mkv")
    ffmpeg(*str(refused.value).partition(": ffmpeg ")[2].split())
    assert probe_video("sdr.mp4") == even(5, 16, 48, 64)


def test_bad_videos_are_refused(tmp_path):
    video = tmp_path / "video.mp4"
    write_video(video, frames=40)
    # its index in front, so that a cut file still opens
    ffmpeg("-i", video, "-c", "copy", "-movflags", "+faststart", tmp_path / "streamable.mp4")
    cut_in_half(video, tmp_path / "cut.mp4")
    cut_in_half(tmp_path / "streamable.mp4", tmp_path / "cut_streamable.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.txt").write_text("no video")
    write_video(tmp_path / "thin.mp4", width=2)
    assert prepare_source(str(tmp_path / "streamable.mp4"), None, None, 5, (64, 48))[0].shape[1] == 37
    for name in ("cut.mp4", "cut_streamable.mp4", "empty.mp4", "text.txt", "missing.mp4"):
        for pair in ((str(tmp_path / name), None), (str(video), str(tmp_path / name))):
            with pytest.raises(ValueError, match=f"^cannot read .*{name}: .*$") as error:
                prepare_source(*pair, None, 5, (64, 48))
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot use .*thin\.mp4: 2\*48 pixels"):
        prepare_source(str(tmp_path / "thin.mp4"), None, None, 5, (64, 48))


def test_bad_images_are_refused(tmp_path):
    cut_in_half(SOURCES / "ref_0.png", tmp_path / "cut.png")
    (tmp_path / "text.png").write_text("no picture")
    shutil.copy(VIDEO, tmp_path / "video.png")
    for name in ("cut.png", "text.png", "video.png", "missing.png"):
        with pytest.raises(ValueError, match=f"^cannot read .*{name}: .*$") as error:
            prepare_source(None, None, [REFS[0], str(tmp_path / name)], 5, (64, 48))
        assert "\n" not in str(error.value)


def test_sizes_and_frame_counts_that_cannot_be_are_refused():
    for size in ((60, 48), (64, 40), (0, 0)):
        for video in (None, VIDEO):
            with pytest.raises(ValueError, match="multiples of 16"):
                prepare_source(video, None, None, 5, size)
    with pytest.raises(ValueError, match=r"frame_num must be 4n\+1, got 6"):
        prepare_source(None, None, None, 6, (64, 48))


# ---- the pipeline


@pytest.mark.parametrize("name", ["m1", "m5", "m8", "m81"])
@pytest.mark.parametrize("refs", [0, 2])
def test_mask_encoding(pipeline, name, refs):
    mask = read_tensors("numerics/inputs.safetensors")[f"mask.{name}"]
    (encoded,) = pipeline.vace_encode_masks([mask], [[torch.zeros(1)] * refs])
    expected = read_tensors("numerics/outputs.safetensors")[f"vace_mask.{name}.refs{refs}"].float()
    frames = (mask.shape[1] + 3) // 4
    assert torch.equal(encoded[:, refs:], expected[:, -frames:])
    assert encoded.shape[1] == refs + frames
    assert not encoded[:, :refs].any()
    if refs <= frames:  # else the reference has too few frames for the references, and crashes later
        assert torch.equal(encoded, expected)


def test_the_mask_covers_only_over_a_half(pipeline):
    frames = INPUTS["vace_a.frames_u8"] / 127.5 - 1
    masks = [torch.full((1, *frames.shape[1:]), value) for value in (0.0, 0.5, 0.51, 1.0)]
    kept, half, over, covered = pipeline.vace_encode_frames([frames] * 4, [None] * 4, masks)
    assert torch.equal(half, kept)
    assert torch.equal(over, covered)
    assert torch.equal(kept, covered.roll(16, dims=0))


def golden_sources(case):
    name = case["name"]
    if case["mask"] == "frac":
        frames, mask = INPUTS[f"{name}.frames_u8"] / 127.5 - 1, INPUTS[f"{name}.mask_x4_u8"] / 4
    else:
        frames = torch.zeros(3, case["frames"], *case["hw"])
        mask = torch.ones_like(frames)
    refs = [INPUTS[f"{name}.ref_u8.{i}"] / 127.5 - 1 for i in range(case["refs"])]
    return [frames], [mask], [refs or None]


@pytest.mark.parametrize("name", ["vace_a", "vace_b"])
def test_every_stage(pipeline, name):
    check_stages(
        pipeline,
        name,
        *golden_sources(CASES[name]),
        keys=("size", "frame_num", "context_scale"),
        extra={"vace_context": (lambda kwargs: kwargs["vace_context"][0], 1e-4)},
    )


def test_without_mask_or_video_everything_is_generated(pipeline):
    """The reference crashes without a mask."""
    frames = torch.zeros(3, 5, 32, 48)
    expected = pipeline.generate("a", [frames], [torch.ones_like(frames)], [None], **FAST)
    assert torch.equal(pipeline.generate("a", [frames], None, None, **FAST), expected)
    assert torch.equal(pipeline.generate("a", None, None, None, size=(48, 32), frame_num=5, **FAST), expected)


def test_more_references_than_latent_frames(pipeline):
    """The reference crashes."""
    sources = [torch.zeros(3, 1, 32, 48)], [torch.ones(1, 1, 32, 48)], [[torch.zeros(3, 1, 32, 48)] * 2]
    assert pipeline.generate("a", *sources, **FAST).shape == (3, 1, 32, 48)


def test_shapes_that_do_not_fit_are_refused(pipeline):
    frames, mask, ref = torch.zeros(3, 5, 32, 48), torch.ones(1, 5, 32, 48), torch.zeros(3, 1, 32, 48)
    for arguments, message in (
        (([frames[..., :40]], None, None), "multiples of 16"),
        (([frames[:, :, :24]], None, None), "multiples of 16"),
        (([frames[:1]], None, None), r"input_frames must be \[3, F, H, W\], got \[1, 5, 32, 48\]"),
        (([frames], [mask[:, :4]], None), r"fit frames of \[3, 5, 32, 48\], got \[1, 4, 32, 48\]"),
        (([frames], [mask[0]], None), r"got \[5, 32, 48\]"),
        (([frames], [mask], [[ref[..., :32]]]), r"a reference must be \[3, 1, 32, 48\], got \[3, 1, 32, 32\]"),
        (([frames, frames], [mask, mask], None), "input_frames must hold one video's, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.generate("a", *arguments, **FAST)
    with pytest.raises(ValueError, match=r"4n\+1"):
        pipeline.generate("a", None, None, None, size=(48, 32), frame_num=6, **FAST)


# ---- the model


def test_config_round_trips(tmp_path):
    """The reference writes wrong numbers into config.json."""
    declared = read_json("dit_vace/config.json")
    sizes = {key: value for key, value in declared.items() if not key.startswith("_")}
    model = VaceWanModel(**sizes, text_dim=48)
    assert {key: model.config[key] for key in sizes} == sizes
    model.save_pretrained(tmp_path)
    loaded = VaceWanModel.from_pretrained(tmp_path)
    assert {key: loaded.config[key] for key in sizes} == sizes
    assert loaded.config.text_dim == 48
    assert loaded.vace_layers == declared["vace_layers"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_default_layers_and_bad_arguments():
    tiny = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8, "num_heads": 2, "num_layers": 5}
    model = VaceWanModel(**tiny)
    assert model.vace_layers == [0, 2, 4]
    assert model.vace_patch_embedding.in_channels == 16
    for layers in ([0, 5], [0, 0]):
        with pytest.raises(ValueError, match="distinct layers below 5"):
            VaceWanModel(vace_layers=layers, **tiny)
    with pytest.raises(ValueError, match='not "t2v"'):
        VaceWanModel(model_type="t2v", **tiny)


def test_context_of_another_size_is_refused(pipeline):
    x, vace_context = torch.zeros(16, 2, 4, 4), torch.zeros(96, 2, 4, 6)
    with pytest.raises(ValueError, match=r"sizes \[\(2, 4, 4\)\], got \[\(2, 4, 6\)\]"):
        pipeline.model([x], torch.tensor([1]), [vace_context], [torch.zeros(3, 48)], 8)
