"""The page of a comparison: one HTML file, with the videos and all else in it. page.html is its template."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from PIL import Image

from magcache.app.media import write_video
from magcache.app.plan import reuse_by_branch
from magcache.schedule import Schedule

if TYPE_CHECKING:
    from magcache.app.compare import Comparison, Scores

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
LEFT, RIGHT = 60, 628  # of what is drawn, in units of an SVG that is 640 wide


def render(
    pair: Comparison, scores: Scores, parts: dict[str, np.ndarray], factor: int, fps: int, name: str, both: str
) -> str:
    """parts: videos uint8 [F, H, W, 3] by label; the difference in them is `factor` times as bright. name: of the
    video, both: of the video of all parts, which is linked to."""
    escape, count = html.escape, len(scores.ssim)
    media = (f"<figure><figcaption>{label}</figcaption>{embedded(part, fps)}</figure>" for label, part in parts.items())
    curves = skip_map(pair.schedule)
    if pair.prediction:
        title = "predicted error, accumulated along a reused stretch by the ratios"
        curves += chart(title, pair.prediction.rows, "sampling step", pair.prediction.bound)
    if count > 1:
        curves += chart("PSNR of every frame, dB", {"": scores.psnr}, "frame")
        curves += chart("SSIM of every frame", {"": scores.ssim}, "frame")
    worst = min((psnr for psnr in scores.psnr if psnr is not None), default=None)
    psnr_row = f"<tr><td>PSNR</td><td>{in_words(scores.overall_psnr)}</td><td>{in_words(worst)}</td></tr>"
    ssim_row = f"<tr><td>SSIM</td><td>{scores.overall_ssim:.4f}</td><td>{min(scores.ssim):.4f}</td></tr>"
    return string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(name),
        prompt=escape(pair.prompt),
        facts="<br>".join(map(escape, (pair.video, f"MagCache: {pair.made_by}", pair.device))),
        tiles=tiles(pair, scores),
        media="".join(media),
        hidden=" hidden" if count == 1 else "",
        factor=factor,
        link=quote(os.fsencode(both)),
        name=escape(both),
        curves=curves,
        times=times_rows(pair.cached, pair.uncached, pair.schedule),
        scores=psnr_row + ssim_row,
        fps=fps,
        count=count,
        last=count - 1,
    )


def in_words(psnr: float | None) -> str:
    return "equal" if psnr is None else f"{psnr:.2f} dB"


def tiles(pair: Comparison, scores: Scores) -> str:
    cached, uncached = (sum(times[phase] for phase in DENOISE) for times in (pair.cached, pair.uncached))
    shown = {
        "PSNR": in_words(scores.overall_psnr),
        "SSIM": f"{scores.overall_ssim:.4f}",
        "denoising": f"{uncached / cached:.2f}x faster",
        "transformer calls computed": f"{pair.schedule.computed} of {len(pair.schedule.weights)}",
    }
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown.items())


def embedded(frames: np.ndarray, fps: int) -> str:
    """A video element, or an image element for a single frame, with all its data."""
    pixelated = ' class="small"' if frames.shape[2] < 256 else ""
    if len(frames) == 1:
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, format="PNG")
        return f'<img{pixelated} alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, frames, fps)
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<video{pixelated} src="data:video/mp4;base64,{data}" autoplay loop muted playsinline></video>'


def figure(title: str, keys: dict[str, str], height: int, elements: Sequence[str]) -> str:
    """A drawing with its title and a legend (texts by class)."""
    legend = "".join(f'<span class="key {kind}">{html.escape(text)}</span>' for kind, text in keys.items() if text)
    return (
        f"<figure><figcaption>{html.escape(title)} {legend}</figcaption>"
        f'<svg viewBox="0 0 640 {height}" data-left="{LEFT}" data-right="{RIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(elements)}</svg></figure>'
    )


def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(content)}</text>'


def across(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most so many."""
    power = 10 ** math.floor(math.log10(max(high - low, 1e-9) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [n * step for n in range(first, last + 1) if not (isinstance(low, int) and n * step % 1)]


def chart(title: str, series: dict[str, Sequence[float | None]], x_label: str, bound: float | None = None) -> str:
    """Curves over 0 ... n - 1, with gaps where a value is None; over frames, with a playhead."""
    values = [v for row in series.values() for v in row if v is not None] + ([bound] if bound else [])
    if not values:
        return f"<figure><figcaption>{html.escape(title)}</figcaption><p>equal in all frames</p></figure>"
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    last = max(len(row) for row in series.values()) - 1

    def x(i: float) -> float:
        return LEFT + (RIGHT - LEFT) * i / max(1, last)

    def y(value: float) -> float:
        return 10 + 156 * (high - value) / (high - low)

    elements = []
    for value in round_ticks(low, high, 5):
        elements += [across("grid", y(value)), text(LEFT - 6, y(value) + 4, f"{value:.6g}", "end")]
    elements += [text(x(i), 182, f"{i:g}") for i in round_ticks(0, last, 8)]
    elements.append(text((LEFT + 640) / 2, 198, x_label))
    if bound:
        elements.append(across("bound", y(bound)))
    for number, row in enumerate(series.values()):
        path, pen = "", "M"
        for i, value in enumerate(row):
            path += f"{pen}{x(i):.1f} {y(value):.1f}" if value is not None else ""
            pen = "M" if value is None else "L"
        elements.append(f'<path class="curve c{number}" d="{path}"/>')
    if x_label == "frame":
        elements.append(f'<line class="playhead" x1="{LEFT}" x2="{LEFT}" y1="10" y2="166"/>')
    return figure(title, {f"c{number}": name for number, name in enumerate(series)}, 200, elements)


def skip_map(schedule: Schedule) -> str:
    """The steps of every branch."""
    cell, elements, y = (RIGHT - LEFT) / schedule.steps, [], 4
    for name, reuse in reuse_by_branch(schedule).items():
        elements.append(text(LEFT - 6, y + 15, name, "end"))
        for step, reused in enumerate(reuse):
            kind = "reused" if reused else "computed"
            elements.append(
                f'<rect class="{kind}" x="{LEFT + step * cell:.2f}" y="{y}" width="{max(0.5, cell - 1):.2f}" '
                f'height="22"><title>step {step}, {name}: {kind}</title></rect>'
            )
        y += 26
    elements += [
        text(LEFT + (step + 0.5) * cell, y + 12, f"{step:g}") for step in round_ticks(0, schedule.steps - 1, 8)
    ]
    elements.append(text((LEFT + 640) / 2, y + 28, "sampling step"))
    return figure("steps", {"computed": "computed", "reused": "reused"}, y + 32, elements)


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
