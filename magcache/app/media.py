"""Pictures and videos as files, and the size of the video that is made from a picture. Importing it is quick."""

import contextlib
import itertools
import math
import os
import subprocess
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from magcache.app.tasks import IMAGE_ENDINGS, Task
from magcache.files import is_special, written_whole

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MIN_SIDE = 16  # pixels
MAX_ASPECT = 5.0  # longer side over shorter side; the models know nothing like it

# players take a video without tags for one in BT.601 or in BT.709, by its size
BT709 = "scale=out_color_matrix=bt709:out_range=tv,"
BT709 += "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"


def read_image(path: str) -> "Image.Image":
    """Returns an upright RGB image. Raises ValueError with one line for a file that is missing, damaged or no image,
    for transparency, 32 bits a channel, and for sides that are too small or too unequal."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if is_special(path):
        raise ValueError(f"cannot read {path}: it is not a regular file")
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")  # of what can be read all the same
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read {path}: not an image of a known format such as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise ValueError(f"cannot use {path}: it has more than {most} million pixels; make it smaller") from error
    except Exception as error:  # decoders of damaged files raise anything
        reason = getattr(error, "strerror", None) or f"not a complete image ({error})"
        raise ValueError(f"cannot read {path}: {reason}") from error
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"cannot use {path}: {width}x{height} pixels; each side needs at least {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"cannot use {path}: {width}x{height} pixels; a side may be up to {MAX_ASPECT:g} times the other"
        )
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"cannot use {path}: it has 32 bits per channel; convert it first")
    if image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError(f"cannot use {path}: parts of it are transparent (alpha channel); flatten it first")
    return image.convert("RGB")


def video_size(image_size: tuple[int, int], max_area: int, task: Task) -> tuple[int, int]:
    """Returns (width, height) of the video that any `wan` package makes from a readable image of that size."""
    token = task.token_pixels

    def whole(pixels: float) -> int:
        return int(pixels // token) * token

    # the quotients in this form and order: the last bit may decide
    if task.needs_images:
        aspect = image_size[1] / image_size[0]
        return whole(math.sqrt(max_area / aspect)), whole(math.sqrt(max_area * aspect))
    aspect = image_size[0] / image_size[1]
    width = (max_area * aspect) ** 0.5
    height = max(token, whole(max_area / width))
    # of the largest with this height, and with this width, the one that cuts off less of the image
    sizes = (whole(max_area / height), height), (whole(width), whole(max_area / whole(width)))
    return min(sizes, key=lambda size: max(aspect / (size[0] / size[1]), size[0] / size[1] / aspect))


def frames_at_most(most: int, path: str) -> int:
    """Counts the frames of a video, up to this many. Raises ValueError if it is missing or not a video."""
    import imageio_ffmpeg

    if not os.path.isfile(path):  # a pipe might never end
        reason = "it is not a regular file" if os.path.exists(path) else "no such file"
        raise ValueError(f"cannot read {path}: {reason}")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", f"file:{path}", "-map", "0:v:0"]
    command += ["-fps_mode", "passthrough", "-frames:v", str(most), "-f", "framecrc", "-"]
    frames = subprocess.run(command, capture_output=True, text=True).stdout
    count = sum(not line.startswith("#") for line in frames.splitlines())
    if not count:
        raise ValueError(f"cannot read {path}: it is not a video")
    return count


def to_uint8(tensor) -> "np.ndarray":
    """Maps -1 ... 1 of a tensor to 0 ... 255, clamped and rounded; any shape."""
    import torch

    return ((tensor.float().clamp(-1, 1) + 1) / 2 * 255 + 0.5).to(torch.uint8).cpu().numpy()


def to_frames(video) -> "np.ndarray":
    """Turns a tensor [3, F, H, W] in [-1, 1] into uint8 [F, H, W, 3]."""
    return to_uint8(video).transpose(1, 2, 3, 0)


def write_frames(path: Path, frames: Iterable["np.ndarray"], fps: int) -> None:
    """Writes uint8 frames [H, W, 3], or the first of them if the ending is that of a picture, as `write_image` and
    `write_video` do."""
    if path.suffix.lower() in IMAGE_ENDINGS:
        write_image(path, next(iter(frames)))
    else:
        write_video(path, frames, fps)


def write_image(path: str | os.PathLike, picture: "np.ndarray") -> None:
    """Writes uint8 [H, W, 3] in the format of the ending, as `magcache.files.written_whole` does."""
    import PIL.Image

    with written_whole(path) as part:
        PIL.Image.fromarray(picture).save(part)


def write_video(path: str | os.PathLike, frames: Iterable["np.ndarray"], fps: int) -> None:
    """Writes uint8 frames [H, W, 3] with even sides as H.264 (quality 8) in the colours of BT.709, which browsers play,
    as `magcache.files.written_whole` does. Raises OSError if frames are missing from the file."""
    import imageio_ffmpeg

    frames = iter(frames)
    first, count = next(frames), 0
    early_index = ["-movflags", "+faststart"] if Path(path).suffix.lower() in (".mp4", ".mov") else []
    settings = {"codec": "libx264", "quality": 8, "macro_block_size": 1}
    settings |= {"output_params": ["-vf", BT709, *early_index]}
    settings |= {"ffmpeg_log_level": "quiet"}  # of its failures, dozens of lines
    with written_whole(path) as part:
        writer = imageio_ffmpeg.write_frames(str(part), first.shape[1::-1], fps=fps, **settings)
        writer.send(None)
        written = None
        with contextlib.suppress(OSError, RuntimeError):  # it ended early; there is no video in the file, or no file
            for frame in itertools.chain([first], frames):
                writer.send(frame.tobytes())
                count += 1
            writer.close()
            written, _ = imageio_ffmpeg.count_frames_and_secs(str(part))  # ffmpeg's failures raise nothing
        if written != count:
            reason = "is the folder gone, the disk full, or the size of files limited?"
            raise OSError(f"ffmpeg could not write all of {path}: {reason}")
