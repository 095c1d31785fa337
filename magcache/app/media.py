"""Pictures and videos as files, and the size of the video that is made from a picture. No torch.

The one file that our `wan` takes from here: the script does the same beside Wan2.1's own `wan`, which has none of it.
"""

import contextlib
import itertools
import math
import os
import re
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from magcache.files import is_special, written_whole

MIN_SIDE = 16  # pixels
MAX_ASPECT = 5.0  # longer side over shorter side; the models know nothing like it

TRANSPARENT = "parts of it are transparent (alpha channel), flatten it first"
# players take a video without tags for one in BT.601 or in BT.709, by its size
BT709 = "scale=out_color_matrix=bt709:out_range=tv,"
BT709 += "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"

TICKS = 360_000  # a second, for whole numbers of them between the frames of any usual rate

TOKEN_PIXELS = 16  # on either side: 8 to a latent pixel, 2 of these to a token


def read_image(path: str) -> Image.Image:
    """Returns an upright RGB image. Raises ValueError with one line for a file that is missing, damaged or no image,
    for transparency, 32 bits a channel, and for sides that are too small or too unequal."""
    if is_special(path):
        raise ValueError(f"cannot read {path}: it is no regular file")
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")  # of what can be read all the same
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read {path}: no image of a format that is known here, such as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise ValueError(f"cannot use {path}: it has more than {most} million pixels, make it smaller") from error
    except Exception as error:  # decoders of damaged files raise anything
        reason = getattr(error, "strerror", None) or f"not a complete image ({error})"
        raise ValueError(f"cannot read {path}: {reason}") from error
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"cannot use {path}: {width}x{height} pixels, it needs at least {MIN_SIDE} on either side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"cannot use {path}: {width}x{height} pixels, one side may be {MAX_ASPECT:g} times the other")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"cannot use {path}: it has 32 bits a channel, convert it first")
    if image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError(f"cannot use {path}: {TRANSPARENT}")
    return image.convert("RGB")


def video_size(image_size: tuple[int, int], max_area: int) -> tuple[int, int]:
    """(width, height) of a video that has about the image's aspect ratio and at most max_area pixels, in whole tokens.
    image_size: (width, height) in pixels. Raises ValueError if not even one token fits."""
    aspect = image_size[1] / image_size[0]
    areas = (max_area / aspect, max_area * aspect)  # in this order and form: the last bit may decide
    size = tuple(int(math.sqrt(area) // TOKEN_PIXELS) * TOKEN_PIXELS for area in areas)
    if not all(size):
        raise ValueError(f"{max_area} pixels in the shape of {image_size[0]}x{image_size[1]} have no room for a token")
    return size


@dataclass(frozen=True)
class VideoInfo:
    """edges: the seconds at which each frame begins, and at which the last one ends. height, width: in square
    pixels."""

    edges: tuple[float, ...]
    height: int
    width: int

    @property
    def frames(self) -> int:
        return len(self.edges) - 1


def decoder(path: str, *options: str) -> list[str]:
    """A command that writes the frames of a video as they are in the file: gaps in a variable rate are not filled with
    copies."""
    import imageio_ffmpeg

    frames = ["-i", f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough"]
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-nostats", "-v", "level+info", *frames, *options, "-"]


def probe_video(path: str) -> VideoInfo:
    """Decodes a whole video. Raises ValueError if it is missing, damaged, incomplete, transparent or no video."""
    if not os.path.isfile(path):  # a pipe might never end
        reason = "it is no regular file" if os.path.exists(path) else "no such file"
        raise ValueError(f"cannot read {path}: {reason}")
    command = decoder(path, "-xerror", "-enc_time_base", f"1/{TICKS}", "-f", "framecrc")
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        faults = re.findall(r"^(?:\[[^]]*] )?\[(?:error|fatal)] (.*)", result.stderr, re.MULTILINE)
        raise ValueError(f"cannot read {path}: not a complete video ({[*faults, 'ffmpeg failed'][0]})")
    if re.search(r"^\[info] +alpha_mode +: 1$", result.stderr, re.MULTILINE):  # which the decoder leaves out
        raise ValueError(f"cannot use {path}: {TRANSPARENT}")
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    if not lines:
        raise ValueError(f"cannot read {path}: no frame can be decoded")
    starts, durations = np.array([[int(cell) for cell in line.split(",")[2:4]] for line in lines]).T
    if (np.diff(starts) <= 0).any():  # no times in the file
        starts, durations = np.arange(len(starts)), np.ones_like(starts)
    edges = (np.append(starts, starts[-1] + max(1, durations[-1])) - starts[0]) / TICKS
    width, height = (int(side) for side in re.search(r"^#dimensions 0: (\d+)x(\d+)$", result.stdout, re.M).groups())
    shape = re.search(r"^#sar 0: ([1-9]\d*)/([1-9]\d*)$", result.stdout, re.M)  # of a pixel
    aspect = int(shape[1]) / int(shape[2]) if shape else 1
    height, width = (max(1, round(side)) for side in (height / max(1, aspect), width * min(1, aspect)))
    return VideoInfo(tuple(edges.tolist()), height, width)


def read_frames(path: str, info: VideoInfo, frame_ids: set[int]) -> Iterator[np.ndarray]:
    """Yields the chosen frames, in the video's order, as uint8 [height, width, 3]. Raises ValueError for one that is
    transparent."""
    options = ["-vf", f"scale={info.width}:{info.height}", "-pix_fmt", "rgba", "-f", "rawvideo"]
    with subprocess.Popen(decoder(path, *options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            for frame_id in range(max(frame_ids) + 1):
                pixels = np.frombuffer(process.stdout.read(4 * info.height * info.width), np.uint8)
                if frame_id not in frame_ids:
                    continue
                frame = pixels.reshape(info.height, info.width, 4)
                if frame[..., 3].min() < 255:
                    raise ValueError(f"cannot use {path}: {TRANSPARENT}")
                yield np.ascontiguousarray(frame[..., :3])
        finally:
            process.kill()


def to_uint8(tensor, value_range: tuple[float, float] = (-1, 1)) -> np.ndarray:
    """Maps value_range of a tensor to 0..255, clamped and rounded; any shape."""
    import torch

    low, high = value_range
    return ((tensor.float().clamp(low, high) - low) / (high - low) * 255 + 0.5).to(torch.uint8).cpu().numpy()


def to_frames(video) -> np.ndarray:
    """Tensor [3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return to_uint8(video).transpose(1, 2, 3, 0)


def write_image(path: str | os.PathLike, picture: np.ndarray, replace: bool = True) -> None:
    """Writes uint8 [H, W, 3] in the format of the ending, as `magcache.files.written_whole` does."""
    with written_whole(path, replace) as part:
        Image.fromarray(picture).save(part)


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: int, replace: bool = True) -> None:
    """Writes uint8 frames [H, W, 3] with even sides as H.264 (quality 8) in the colours of BT.709, which browsers play,
    as `magcache.files.written_whole` does. Raises OSError if frames are missing from the file."""
    import imageio_ffmpeg

    frames = iter(frames)
    first, count = next(frames), 0
    early_index = ["-movflags", "+faststart"] if Path(path).suffix.lower() in (".mp4", ".mov") else []
    settings = {"codec": "libx264", "quality": 8, "macro_block_size": 1}
    settings |= {"output_params": ["-vf", BT709, *early_index]}
    settings |= {"ffmpeg_log_level": "quiet"}  # of its failures, dozens of lines
    with written_whole(path, replace) as part:
        writer = imageio_ffmpeg.write_frames(str(part), first.shape[1::-1], fps=fps, **settings)
        writer.send(None)
        written = None
        with contextlib.suppress(OSError, RuntimeError):  # it ended early; there is no video in the file, or no file
            for frame in itertools.chain([first], frames):
                writer.send(np.ascontiguousarray(frame))
                count += 1
            writer.close()
            written, _ = imageio_ffmpeg.count_frames_and_secs(str(part))  # ffmpeg's failures raise nothing
        if written != count:
            reason = "is the folder gone, the disk full, or the size of files limited?"
            raise OSError(f"ffmpeg could not write all of {path}: {reason}")
