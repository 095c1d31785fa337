"""The page of a comparison: one HTML file, with the videos and all else in it. page.html is its template."""

from __future__ import annotations

import base64
import html
import io
import os
import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from PIL import Image

from magcache.app.job import Job, Request
from magcache.app.media import write_video
from magcache.app.wan_package import device_name
from magcache.schedule import Schedule

if TYPE_CHECKING:
    from magcache.app.compare import Scores

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


def render(
    job: Job,
    request: Request,
    scores: Scores,
    parts: dict[str, np.ndarray],
    fps: int,
    both: str,
    seconds: tuple[dict[str, float], dict[str, float]],
) -> str:
    """parts: videos uint8 [F, H, W, 3] by label. both: name of the video of all of them, which is linked to. seconds:
    by phase, with the cache and without."""
    escape, count, schedule = html.escape, len(scores.ssim), job.schedule
    media = (f"<figure><figcaption>{label}</figcaption>{embedded(part, fps)}</figure>" for label, part in parts.items())
    video = job.describe_video(parts["MagCache"].shape[:3], request.seed)
    worst = min((psnr for psnr in scores.psnr if psnr is not None), default=None)
    psnr_row = f"<tr><td>PSNR</td><td>{in_words(scores.overall_psnr)}</td><td>{in_words(worst)}</td></tr>"
    ssim_row = f"<tr><td>SSIM</td><td>{scores.overall_ssim:.4f}</td><td>{min(scores.ssim):.4f}</td></tr>"
    return string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(request.path.name),
        prompt=escape(request.prompt),
        facts="<br>".join(map(escape, (video, f"MagCache: {job.made_by}, {job.cache}", device_name()))),
        tiles=tiles(schedule, scores, *seconds),
        media="".join(media),
        hidden=" hidden" if count == 1 else "",
        difference=list(parts)[-1],
        link=quote(os.fsencode(both)),
        name=escape(both),
        curves=curves(job, scores),
        times=times_rows(*seconds, schedule),
        scores=psnr_row + ssim_row,
        fps=fps,
        count=count,
        last=count - 1,
    )


def in_words(psnr: float | None) -> str:
    return "equal" if psnr is None else f"{psnr:.2f} dB"


def tiles(schedule: Schedule, scores: Scores, *seconds: dict[str, float]) -> str:
    cached, uncached = (sum(times[phase] for phase in DENOISE) for times in seconds)
    shown = {
        "PSNR": in_words(scores.overall_psnr),
        "SSIM": f"{scores.overall_ssim:.4f}",
        "denoising": f"{uncached / cached:.2f}x faster",
        "transformer calls computed": f"{schedule.computed} of {len(schedule.weights)}",
    }
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown.items())


def embedded(frames: np.ndarray, fps: int) -> str:
    """A video element, or an image element for a single frame, with all its data."""
    pixelated = ' class="small"' if frames.shape[2] < 256 else ""
    if len(frames) == 1:
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, format="PNG")
        return f'<img{pixelated} alt="" src="{data_url("image/png", buffer.getvalue())}">'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, frames, fps)
        data = data_url("video/mp4", path.read_bytes())
    return f'<video{pixelated} src="{data}" autoplay loop muted playsinline></video>'


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def curves(job: Job, scores: Scores) -> str:
    """What decided on the steps; the scores of all frames, with a playhead."""
    import matplotlib as mpl

    from magcache.app.plot import plan_figure, score_figure

    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(colors | {"svg.fonttype": "none", "legend.framealpha": 0}):
        drawings = [drawing("steps", plan_figure(job, None))]
        if len(scores.ssim) > 1:
            figure = score_figure({"PSNR, dB": scores.psnr, "SSIM": scores.ssim})
            drawings.append(drawing("scores", figure, playhead=True))
    return "".join(drawings)


def drawing(name: str, figure, playhead: bool = False) -> str:
    """A matplotlib figure as an image, with a line that the page moves over its axes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    box = figure.axes[0].get_position()
    head = f'<i class="playhead" data-left="{box.x0:.4f}" data-right="{box.x1:.4f}"></i>' if playhead else ""
    return f'<div class="drawing"><img alt="{name}" src="{data_url("image/svg+xml", buffer.getvalue())}">{head}</div>'


def times_rows(cached: dict[str, float], uncached: dict[str, float], schedule: Schedule) -> str:
    """Seconds by phase, as rows of a table."""
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
