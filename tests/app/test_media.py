"""Pictures and videos as files, read back by other means than they are written."""

import base64
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from magcache.app.compare import embedded
from magcache.app.media import to_uint8, write_video
from wan.utils.utils import cache_image

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
    cache_image(levels, str(tmp_path / "levels.png"))
    with Image.open(tmp_path / "levels.png") as image:
        apart = np.array(image) - expected
    assert (apart == 0).mean() > 0.999  # float32 may round a half the other way
    assert abs(apart).max() <= 1
    assert to_uint8(torch.arange(256) / 127.5 - 1).tolist() == list(range(256))
