"""Pictures and videos as files, read back by other means than they are written."""

import base64
import re
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from magcache.app.compare import embedded
from magcache.app.media import read_image, to_uint8, write_image, write_video

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
MATRICES = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722)}  # weights of red and blue in the luma


def color_of(path, size, matrix):
    """Of the first pixel of a video, as a player sees it that takes the file for this matrix."""
    command = [FFMPEG, "-v", "error", "-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
    planes, pixels = subprocess.run(command, check=True, capture_output=True).stdout, size[0] * size[1]
    luma, blue, red = ((planes[i] - zero) / span for i, zero, span in (
        (0, 16, 219), (pixels, 128, 224), (pixels * 5 // 4, 128, 224)
    ))  # fmt: skip
    of_red, of_blue = MATRICES[matrix]
    r, b = luma + 2 * (1 - of_red) * red, luma + 2 * (1 - of_blue) * blue
    return 255 * np.array([r, (luma - of_red * r - of_blue * b) / (1 - of_red - of_blue), b])


@pytest.mark.parametrize("size", [(64, 48), (832, 480), (1280, 720)])
def test_colors_are_those_of_bt709_and_the_file_says_so(size, tmp_path):
    color, path = (220, 30, 30), tmp_path / "red.mp4"
    write_video(path, [np.full((*size[::-1], 3), color, np.uint8)] * 3, 16)
    assert color_of(path, size, "BT.709") == pytest.approx(color, abs=2)
    assert color_of(path, size, "BT.601") != pytest.approx(color, abs=10)
    said = subprocess.run([FFMPEG, "-i", path], capture_output=True, text=True).stderr
    assert re.search(r"Video: h264 .*, yuv420p\(tv, bt709, progressive\), ", said)  # range; matrix, primaries, transfer


def test_the_videos_of_a_comparison_have_the_same_colors(tmp_path):
    frames = np.full((3, 48, 64, 3), (220, 30, 30), np.uint8)
    data = re.search(r"base64,([^\"]*)", embedded(frames, 16))[1]
    (tmp_path / "red.mp4").write_bytes(base64.b64decode(data))
    assert color_of(tmp_path / "red.mp4", (64, 48), "BT.709") == pytest.approx((220, 30, 30), abs=2)


def test_pixels_are_rounded(tmp_path):
    """To the nearest, half of them upwards, as torchvision does; values beyond the range are clamped."""
    levels = torch.linspace(-1.1, 1.1, 48 * 64 * 3).view(1, 3, 48, 64)
    expected = np.floor((levels[0].double().clamp(-1, 1).numpy() + 1) / 2 * 255 + 0.5).transpose(1, 2, 0)
    write_image(tmp_path / "levels.png", to_uint8(levels[0].permute(1, 2, 0)))
    with Image.open(tmp_path / "levels.png") as image:
        apart = np.array(image) - expected
    assert (apart == 0).mean() > 0.999  # float32 may round a half the other way
    assert abs(apart).max() <= 1
    assert to_uint8(torch.arange(256) / 127.5 - 1).tolist() == list(range(256))


def noise_image(width, height, mode="RGB"):
    count = height * width * len(mode)
    noise = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.frombytes(mode, (width, height), noise.numpy().tobytes())


def test_readable_images(tmp_path):
    picture = noise_image(40, 24)
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tobytes() == picture.tobytes()
    opaque = picture.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "opaque.png")
    assert read_image(tmp_path / "opaque.png").tobytes() == picture.tobytes()
    noise_image(40, 24, "L").save(tmp_path / "gray.jpg")
    assert read_image(tmp_path / "gray.jpg").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (24, 40)


def test_unusable_images(tmp_path):
    picture = noise_image(40, 24)
    picture.save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("hello")
    noise_image(1, 400).save(tmp_path / "line.png")
    noise_image(400, 24).save(tmp_path / "wide.png")
    noise_image(40, 24, "RGBA").save(tmp_path / "alpha.png")
    Image.new("F", (40, 24), 0.5).save(tmp_path / "deep.tif")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with (tmp_path / "huge.png").open("wb") as file:  # which says so in its header
        header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
        file.write(content[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    for name, message in (
        ("none.png", "No such file"),
        (".", "Is a directory"),
        ("cut.png", "not a complete image"),
        ("text.png", "not an image of a known format"),
        ("line.png", "1x400 pixels; each side needs at least 16"),
        ("wide.png", "a side may be up to 5 times the other"),
        ("alpha.png", "transparent"),
        ("deep.tif", "32 bits per channel"),
        ("photo.heic", "not an image of a known format such as PNG or JPEG"),
        ("huge.png", "it has more than 178 million pixels; make it smaller"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
        assert str(error.value).count(str(tmp_path / name)) == 1


def test_sixteen_bits_of_gray(tmp_path):
    """Their upper eight, as of the channels of a colour."""
    Image.fromarray(np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert np.array(image)[..., 1].flatten().tolist() == [value // 256 for value in range(0, 2**16, 64)]
