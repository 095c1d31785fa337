"""Compares a cached with an uncached video of the same prompt and seed: scores, a video of both and their difference,
and a page that shows all of it. Needs scikit-image, matplotlib, imageio-ffmpeg and
Pillow.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from magcache.app import page
from magcache.app.job import Job, Request
from magcache.app.media import write_image, write_video
from magcache.files import written_whole


@dataclass(frozen=True)
class Scores:
    """Of uint8 frames against reference frames. psnr in dB, None for frames that are equal. The PSNR of the whole
    video comes from the mean squared error of all frames, its SSIM is the mean of the frames'."""

    psnr: list[float | None]
    ssim: list[float]
    overall_psnr: float | None
    overall_ssim: float


def score(frames: np.ndarray, reference: np.ndarray) -> Scores:
    """frames, reference: uint8 [F, H, W, 3], at least 11 pixels on either side. SSIM is that of its authors: a Gaussian
    window of 1.5 pixels, over the three channels."""
    from skimage.metrics import mean_squared_error, structural_similarity

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = list(zip(frames, reference, strict=True))
    errors = [float(mean_squared_error(a, b)) for a, b in pairs]
    ssim = [float(structural_similarity(a, b, channel_axis=-1, data_range=255, **settings)) for a, b in pairs]
    return Scores([psnr(e) for e in errors], ssim, psnr(sum(errors) / len(errors)), sum(ssim) / len(ssim))


def psnr(error: float) -> float | None:
    """In dB, of a mean squared error of uint8 pixels."""
    return 10 * math.log10(255**2 / error) if error else None


def difference(frames: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, int]:
    """|frames - reference| times a power of two that leaves all but 0.1 % of it below white, 32 at most; and that
    factor."""
    apart = np.maximum(frames, reference) - np.minimum(frames, reference)
    # frame by frame, as it takes eight bytes a pixel
    counts = sum(np.bincount(frame.ravel(), minlength=256) for frame in apart)
    largest = int(np.searchsorted(np.cumsum(counts), 0.999 * apart.size))
    factor = 2 ** min(5, int(math.log2(255 / max(1, largest))))
    return np.minimum(apart, 255 // factor) * np.uint8(factor), factor


def strip(label: str, width: int) -> np.ndarray:
    """Goes above a frame and says what it is, uint8 [height, width, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(8, min(32, width // 12))
    picture = Image.new("RGB", (width, 2 * size), "black")
    ImageDraw.Draw(picture).text((2, size // 3), label, "white", ImageFont.load_default(size))
    return np.asarray(picture)


def side_by_side(parts: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Frames of all parts beside each other, each under its label."""
    header = np.concatenate([strip(label, part.shape[2]) for label, part in parts.items()], axis=1)
    for row in zip(*parts.values(), strict=True):
        yield np.concatenate([header, np.concatenate(row, axis=1)])


def write_comparison(job: Job, request: Request, fps: int, cached: tuple, uncached: tuple) -> dict:
    """Writes NAME_compare.mp4 (.png for a single frame) and NAME_compare.html beside the video, each of them whole or
    not at all. Returns what a record holds of it, with the paths of both.

    cached, uncached: frames, uint8 [F, H, W, 3], and seconds by phase. Raises OSError where a file cannot be written.
    """
    (frames, _), (reference, seconds) = cached, uncached
    scores = score(frames, reference)
    apart, factor = difference(frames, reference)
    parts = {"MagCache": frames, "uncached": reference, f"difference x{factor}": apart}
    path = request.path
    both = path.with_name(f"{path.stem}_compare{'.png' if len(frames) == 1 else '.mp4'}")
    if len(frames) == 1:
        write_image(both, next(side_by_side(parts)))
    else:
        write_video(both, side_by_side(parts), fps)
    about = path.with_name(f"{path.stem}_compare.html")
    text = page.render(job, request, scores, parts, fps, both.name, (cached[1], seconds))
    with written_whole(about) as part:
        part.write_text(text, encoding="utf-8", errors="replace")
    return {
        "psnr": scores.overall_psnr,
        "ssim": scores.overall_ssim,
        "psnr_by_frame": scores.psnr,
        "ssim_by_frame": scores.ssim,
        "uncached_seconds": {name: round(value, 4) for name, value in seconds.items()},
        "files": [both, about],
    }
