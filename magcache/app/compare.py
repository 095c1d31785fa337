"""Compares a cached with an uncached video of the same prompt and seed: scores, a video of both and their difference,
and one HTML file that shows all of it, made of page.html. Needs scikit-image, matplotlib, imageio-ffmpeg and Pillow.
"""

import base64
import html
import io
import math
import os
import statistics
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from magcache.app.backend import device_name
from magcache.app.job import Job, Request
from magcache.app.media import to_frames, write_frames
from magcache.app.progress import Watch
from magcache.app.render import Renderer
from magcache.app.requests import comparison_paths
from magcache.app.results import save_result
from magcache.app.trials.quality import expectation
from magcache.files import written_whole
from magcache.schedule import Schedule
from magcache.trials import ANOTHER, closeness

PHASES = {  # of magcache.app.progress, in words
    "text": "text encoder",
    "inputs": "inputs",
    "computed": "transformer, computed (calls)",
    "reused": "transformer, reused (calls)",
    "sampler": "sampler and rest of the steps",
    "decode": "VAE decoding",
    "save": "saving",
}
DENOISE = ("computed", "reused", "sampler")
INK = "#7d8793"  # of the drawings, on a page that is light or dark


def score(frames: np.ndarray, reference: np.ndarray) -> dict:
    """Returns what a record holds of the scores of frames against reference frames, uint8 [F, H, W, 3], at least 11
    pixels on either side: "psnr" in dB, of the mean squared error of all frames, None for equal ones, "ssim", the mean
    of the frames', and both of every frame. SSIM is that of its authors: a Gaussian window of 1.5 pixels, over three
    channels."""
    from skimage.metrics import mean_squared_error, structural_similarity

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = list(zip(frames, reference, strict=True))
    errors = [float(mean_squared_error(a, b)) for a, b in pairs]
    ssim = [float(structural_similarity(a, b, channel_axis=-1, data_range=255, **settings)) for a, b in pairs]
    by_frame = {"psnr_by_frame": [psnr(error) for error in errors], "ssim_by_frame": ssim}
    return {"psnr": psnr(statistics.fmean(errors)), "ssim": statistics.fmean(ssim)} | by_frame


def psnr(error: float) -> float | None:
    """Returns the PSNR in dB for a mean squared error of uint8 pixels; None for equal ones."""
    return 10 * math.log10(255**2 / error) if error else None


def difference(frames: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns |frames - reference| times a power of two, at most 32, that leaves all but 0.1 % of it below white; and
    that factor."""
    apart = np.maximum(frames, reference) - np.minimum(frames, reference)
    # by counting, frame by frame: sorting all pixels takes five times as long, and a copy of them
    counts = sum(np.bincount(frame.ravel(), minlength=256) for frame in apart)
    largest = int(np.searchsorted(np.cumsum(counts), 0.999 * apart.size))
    factor = 2 ** min(5, int(math.log2(255 / max(1, largest))))
    return np.minimum(apart, 255 // factor) * np.uint8(factor), factor


def strip(label: str, width: int) -> np.ndarray:
    """Draws the label that goes above a frame, uint8 [height, width, 3]."""
    size = max(8, min(32, width // 12))
    picture = Image.new("RGB", (width, 2 * size), "black")
    ImageDraw.Draw(picture).text((2, size // 3), label, "white", ImageFont.load_default(size))
    return np.asarray(picture)


def side_by_side(parts: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yields frames of all parts beside each other, each under its label."""
    header = np.concatenate([strip(label, part.shape[2]) for label, part in parts.items()], axis=1)
    for row in zip(*parts.values(), strict=True):
        yield np.concatenate([header, np.concatenate(row, axis=1)])


def compare_results(renderer: Renderer, request: Request, frames: np.ndarray, watch: Watch, plain: Watch) -> dict:
    """Writes the video without the cache, and beside it its comparison with the one with it, of which there are the
    frames, uint8 [F, H, W, 3], and what was watched: as a video (a picture for a single frame) and as a page. Returns
    what a record holds of it."""
    job, fps = renderer.job, renderer.fps
    path, both, about = paths = comparison_paths(job, request.path)
    save_result(plain.video, path, fps)
    plain.lap("save")
    close, reference = closeness(watch.latent, plain.latent), to_frames(plain.video)
    scores = score(frames, reference) | dict(zip(("latent_psnr", "latent_relative_error"), close, strict=True))
    apart, factor = difference(frames, reference)
    parts = {"MagCache": frames, "uncached": reference, f"difference x{factor}": apart}
    write_frames(both, side_by_side(parts), fps)
    text = make_page(job, request, scores, parts, fps, both.name, (watch.seconds, plain.seconds))
    with written_whole(about) as part:
        part.write_text(text, encoding="utf-8", errors="replace")
    latents = f"latent PSNR {close[0]:.2f} dB: {verdict(close[0])}"
    print(f"compared  PSNR {psnr_in_words(scores['psnr'])}, SSIM {scores['ssim']:.4f}, {latents}; {path.name}")
    if expected := expectation(job):
        print(f"          expected from trials: {expected}")
    print(f"          {both}\n          {about}", flush=True)
    seconds = {name: round(value, 4) for name, value in plain.seconds.items()}
    return scores | {"uncached_seconds": seconds, "files": [path.name for path in paths]}


def make_page(
    job: Job, request: Request, scores: dict, parts: dict[str, np.ndarray], fps: int, both: str, seconds: tuple
) -> str:
    """Makes the page. parts: videos uint8 [F, H, W, 3] by label. both: name of the video of all of them, to link to.
    seconds: by phase, with the cache and without."""
    escape, count, schedule = html.escape, len(parts["MagCache"]), job.schedule
    media = (f"<figure><figcaption>{label}</figcaption>{embedded(part, fps)}</figure>" for label, part in parts.items())
    video = job.describe_video(parts["MagCache"].shape[:3], request.seed)
    worst = min((psnr for psnr in scores["psnr_by_frame"] if psnr is not None), default=None)
    psnr_row = f"<tr><td>PSNR</td><td>{psnr_in_words(scores['psnr'])}</td><td>{psnr_in_words(worst)}</td></tr>"
    ssim_row = f"<tr><td>SSIM</td><td>{scores['ssim']:.4f}</td><td>{min(scores['ssim_by_frame']):.4f}</td></tr>"
    return string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(request.path.name),
        prompt=escape(request.prompt),
        facts="<br>".join(map(escape, (video, f"MagCache: {job.made_by}, {job.cache}", device_name(job.machine)))),
        tiles=tiles(schedule, scores, *seconds),
        media="".join(media),
        hidden=" hidden" if count == 1 else "",
        link=quote(os.fsencode(both)),
        name=escape(both),
        curves=curves(job, scores),
        times=times_rows(*seconds, schedule),
        scores=psnr_row + ssim_row,
        fps=fps,
        count=count,
        last=count - 1,
    )


def psnr_in_words(psnr: float | None) -> str:
    return "equal" if psnr is None else f"{psnr:.2f} dB"


def verdict(latent_psnr: float) -> str:
    if latent_psnr < ANOTHER:
        return "another video"
    return "the same video" if latent_psnr >= ANOTHER + 5 else "close to another video"


def tiles(schedule: Schedule, scores: dict, *seconds: dict[str, float]) -> str:
    cached, uncached = (sum(times[phase] for phase in DENOISE) for times in seconds)
    shown = {
        f"latent PSNR {scores['latent_psnr']:.1f} dB": verdict(scores["latent_psnr"]),
        "PSNR": psnr_in_words(scores["psnr"]),
        "SSIM": f"{scores['ssim']:.4f}",
        "denoising": f"{uncached / cached:.2f}x faster",
        "transformer calls computed": f"{schedule.computed} of {len(schedule.weights)}",
    }
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown.items())


def embedded(frames: np.ndarray, fps: int) -> str:
    """Returns a video element, or an image element for a single frame, with all its data."""
    pixelated = ' class="small"' if frames.shape[2] < 256 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("frame.png" if len(frames) == 1 else "video.mp4")
        write_frames(path, frames, fps)
        content = path.read_bytes()
    if len(frames) == 1:
        return f'<img{pixelated} alt="" src="{data_url("image/png", content)}">'
    return f'<video{pixelated} src="{data_url("video/mp4", content)}" autoplay loop muted playsinline></video>'


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def curves(job: Job, scores: dict) -> str:
    """Draws what decided on the steps, and the scores of all frames with a playhead."""
    import matplotlib as mpl

    from magcache.app.plot import plan_figure, score_figure

    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(colors | {"svg.fonttype": "none", "legend.framealpha": 0}):
        drawings = [drawing("steps", plan_figure(job, None))]
        if len(scores["ssim_by_frame"]) > 1:
            figure = score_figure({"PSNR, dB": scores["psnr_by_frame"], "SSIM": scores["ssim_by_frame"]})
            drawings.append(drawing("scores", figure, playhead=True))
    return "".join(drawings)


def drawing(name: str, figure, playhead: bool = False) -> str:
    """Turns a matplotlib figure into an image, with a line that the page moves over its axes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    box = figure.axes[0].get_position()
    head = f'<i class="playhead" data-left="{box.x0:.4f}" data-right="{box.x1:.4f}"></i>' if playhead else ""
    return f'<div class="drawing"><img alt="{name}" src="{data_url("image/svg+xml", buffer.getvalue())}">{head}</div>'


def times_rows(cached: dict[str, float], uncached: dict[str, float], schedule: Schedule) -> str:
    """Lays out the seconds by phase as rows of a table."""
    calls = {"computed": (schedule.computed, len(schedule.weights)), "reused": (sum(schedule.reuse), 0)}
    rows = []
    for phase, name in PHASES.items():
        texts = [f"{times.get(phase, 0.0):.2f}" for times in (cached, uncached)]
        if counts := calls.get(phase):
            texts = [f"{text} ({count})" for text, count in zip(texts, counts, strict=True)]
        rows.append(("", name, *texts, ""))
    for name, phases in (("denoising", DENOISE), ("in all, after loading", tuple(PHASES))):
        a, b = (sum(times.get(phase, 0.0) for phase in phases) for times in (cached, uncached))
        rows.append((' class="sum"', name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}x" if a else ""))
    return "".join(f"<tr{style}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for style, *cells in rows)
