"""Compares a cached with an uncached video of the same prompt and seed: scores, a video of both and their difference,
and a page that shows all of it. Needs scikit-image, imageio-ffmpeg and Pillow.
"""

import base64
import html
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from magcache.app.media import write_image, write_video
from magcache.app.plan import Prediction, reuse_by_branch
from magcache.files import written_whole
from magcache.schedule import Schedule

PHASES = {  # of magcache.progress, in words
    "text": "text encoder",
    "inputs": "inputs",
    "computed": "transformer, computed (calls)",
    "reused": "transformer, reused (calls)",
    "sampler": "sampler and rest of the steps",
    "decode": "VAE decoding",
    "save": "saving",
}
DENOISE = ("computed", "reused", "sampler")


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


def embedded(frames: np.ndarray, fps: int, page: Path) -> str:
    """A video element, or an image element for a single frame, with all its data; encoded in a file beside the page."""
    pixelated = ' class="small"' if frames.shape[2] < 256 else ""
    if len(frames) == 1:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, format="PNG")
        return f'<img{pixelated} alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    scratch = page.with_suffix(".scratch.mp4")
    try:
        write_video(scratch, frames, fps)
        data = base64.b64encode(scratch.read_bytes()).decode()
    finally:
        scratch.unlink(missing_ok=True)
    return f'<video{pixelated} src="data:video/mp4;base64,{data}" autoplay loop muted playsinline></video>'


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most so many."""
    power = 10 ** math.floor(math.log10(max(high - low, 1e-9) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [n * step for n in range(first, last + 1) if not (isinstance(low, int) and n * step % 1)]


def chart(title: str, series: dict[str, Sequence[float | None]], x_label: str, bound: float | None = None) -> str:
    """Curves over 0 ... n - 1 as an SVG element; gaps where a value is None."""
    values = [v for row in series.values() for v in row if v is not None] + ([bound] if bound else [])
    if not values:
        return f"<figure><figcaption>{html.escape(title)}</figcaption><p>equal in all frames</p></figure>"
    width, height, left, bottom, top = 640, 200, 60, 34, 10
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    count = max(len(row) for row in series.values())

    def x(i):
        return left + (width - left - 12) * i / max(1, count - 1)

    def y(value):
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = []
    for value in round_ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for i in round_ticks(0, count - 1, 8):
        parts.append(f'<text x="{x(i):.1f}" y="{height - bottom + 16}" text-anchor="middle">{i:g}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 2}" text-anchor="middle">{html.escape(x_label)}</text>')
    if bound:
        parts.append(f'<line class="bound" x1="{left}" x2="{width - 12}" y1="{y(bound):.1f}" y2="{y(bound):.1f}"/>')
    for number, row in enumerate(series.values()):
        pen = "M"
        path = []
        for i, value in enumerate(row):
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{x(i):.1f} {y(value):.1f}")
            pen = "L"
        parts.append(f'<path class="curve c{number}" d="{"".join(path)}"/>')
    if x_label == "frame":
        parts.append(f'<line class="playhead" x1="{left}" x2="{left}" y1="{top}" y2="{height - bottom}"/>')
    keys = "".join(f'<span class="key c{n}">{html.escape(name)}</span>' for n, name in enumerate(series) if name)
    return (
        f"<figure><figcaption>{html.escape(title)} {keys}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" data-left="{left}" data-right="{width - 12}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>'
    )


def skip_map(schedule: Schedule) -> str:
    """The steps of every branch as an SVG element."""
    left, width, height = 60, 640, 22
    cell = (width - left - 12) / schedule.steps
    parts = []
    for row, (name, reuse) in enumerate(reuse_by_branch(schedule).items()):
        y = 4 + row * (height + 4)
        parts.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{name}</text>')
        for step, reused in enumerate(reuse):
            kind = "reused" if reused else "computed"
            parts.append(
                f'<rect class="{kind}" x="{left + step * cell:.2f}" y="{y}" width="{max(0.5, cell - 1):.2f}" '
                f'height="{height}"><title>step {step}, {name}: {kind}</title></rect>'
            )
    y = 4 + schedule.calls_per_step * (height + 4) + 12
    for step in round_ticks(0, schedule.steps - 1, 8):
        parts.append(f'<text x="{left + (step + 0.5) * cell:.1f}" y="{y}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{y + 16}" text-anchor="middle">sampling step</text>')
    return (
        '<figure><figcaption>steps <span class="key computed">computed</span><span class="key reused">reused'
        f'</span></figcaption><svg viewBox="0 0 {width} {y + 20}" role="img" aria-label="skip map">{"".join(parts)}'
        "</svg></figure>"
    )


def in_words(psnr: float | None) -> str:
    return "equal" if psnr is None else f"{psnr:.2f} dB"


def times_table(cached: dict[str, float], uncached: dict[str, float], schedule: Schedule) -> str:
    """Seconds by phase."""
    calls = {"computed": (schedule.computed, len(schedule.weights)), "reused": (sum(schedule.reuse), 0)}
    cells = []
    for phase, name in PHASES.items():
        counts = calls.get(phase)
        texts = [f"{times.get(phase, 0.0):.2f}" for times in (cached, uncached)]
        if counts:
            texts = [f"{text} ({count})" for text, count in zip(texts, counts, strict=True)]
        cells.append(("", name, *texts, ""))
    for name, phases in (("denoising", DENOISE), ("in all, after loading", tuple(PHASES))):
        a, b = (sum(times.get(phase, 0.0) for phase in phases) for times in (cached, uncached))
        cells.append((' class="sum"', name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}x" if a else ""))
    body = "".join(
        f"<tr{style}><td>{name}</td><td>{a}</td><td>{b}</td><td>{faster}</td></tr>"
        for style, name, a, b, faster in cells
    )
    return (
        "<table><thead><tr><th>seconds</th><th>MagCache</th><th>uncached</th><th>faster</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


@dataclass(frozen=True)
class Comparison:
    """A pair of runs, and the page about it.

    video, device, made_by (of the schedule): in words. cached, uncached: seconds by phase.
    """

    prompt: str
    made_by: str
    video: str
    device: str
    schedule: Schedule
    prediction: Prediction | None
    cached: dict[str, float]
    uncached: dict[str, float]

    def write(self, path: Path, frames: np.ndarray, reference: np.ndarray, fps: int) -> tuple[Scores, list[Path]]:
        """Writes NAME_compare.mp4 (.png for a single frame) and NAME_compare.html beside the video `path`, each of them
        whole or not at all. frames: cached, reference: uncached, uint8 [F, H, W, 3].

        Returns the scores and the paths. Raises OSError where a file cannot be written.
        """
        scores = score(frames, reference)
        apart, factor = difference(frames, reference)
        parts = {"MagCache": frames, "uncached": reference, f"difference x{factor}": apart}
        both = path.with_name(f"{path.stem}_compare{'.png' if len(frames) == 1 else '.mp4'}")
        if len(frames) == 1:
            write_image(both, next(side_by_side(parts)))
        else:
            write_video(both, side_by_side(parts), fps)
        page = path.with_name(f"{path.stem}_compare.html")
        media = "".join(
            f"<figure><figcaption>{label}</figcaption>{embedded(part, fps, page)}</figure>"
            for label, part in parts.items()
        )
        with written_whole(page) as part:
            part.write_text(self.page(path, both, media, factor, fps, scores), encoding="utf-8", errors="replace")
        return scores, [both, page]

    def page(self, path: Path, both: Path, media: str, factor: int, fps: int, scores: Scores) -> str:
        """HTML with everything in it; media: the elements of the videos."""
        cached, uncached = (sum(times[phase] for phase in DENOISE) for times in (self.cached, self.uncached))
        tiles = {
            "PSNR": in_words(scores.overall_psnr),
            "SSIM": f"{scores.overall_ssim:.4f}",
            "denoising": f"{uncached / cached:.2f}x faster",
            "transformer calls computed": f"{self.schedule.computed} of {len(self.schedule.weights)}",
        }
        tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
        count = len(scores.ssim)
        curves, controls = skip_map(self.schedule), ""
        if self.prediction:
            title = "predicted error, accumulated along a reused stretch by the ratios"
            curves += chart(title, self.prediction.rows, "sampling step", self.prediction.bound)
        if count > 1:
            curves += chart("PSNR of every frame, dB", {"": scores.psnr}, "frame")
            curves += chart("SSIM of every frame", {"": scores.ssim}, "frame")
            controls = CONTROLS.format(last=count - 1, count=count)
        worst = min((psnr for psnr in scores.psnr if psnr is not None), default=None)
        rows = {
            "PSNR": (in_words(scores.overall_psnr), in_words(worst)),
            "SSIM": (f"{scores.overall_ssim:.4f}", f"{min(scores.ssim):.4f}"),
        }
        score_rows = "".join(f"<tr><td>{name}</td><td>{a}</td><td>{b}</td></tr>" for name, (a, b) in rows.items())
        return PAGE.format(
            title=html.escape(path.name),
            style=STYLE,
            prompt=html.escape(self.prompt),
            facts="<br>".join(map(html.escape, (self.video, f"MagCache: {self.made_by}", self.device))),
            tiles=tiles,
            media=media,
            controls=controls,
            factor=factor,
            link=quote(os.fsencode(both.name)),
            name=html.escape(both.name),
            curves=curves,
            times=times_table(self.cached, self.uncached, self.schedule),
            scores=score_rows,
            fps=fps,
            count=count,
            script=SCRIPT,
        )


CONTROLS = """
<div class="controls"><button id="play">Pause</button>
<input id="seek" type="range" min="0" max="{last}" value="0" aria-label="frame">
<output id="frame">frame 0 of {count}</output></div>"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: MagCache and uncached</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{prompt}</h1>
<p>{facts}</p>
</header>
<section class="tiles">{tiles}</section>
<section class="media">{media}</section>{controls}
<p class="note">The same prompt and seed with MagCache and without. The difference is the absolute one of the pixels,
{factor} times as bright. The scores compare the pixels before compression. The run
with MagCache came first, so its times bear the warm-up. Side by side: <a href="{link}">{name}</a>.</p>
<section class="curves">{curves}</section>
<section class="tables">
<div><h2>Times</h2>{times}</div>
<div><h2>Scores against the uncached one</h2>
<table><thead><tr><th></th><th>overall</th><th>worst frame</th></tr></thead><tbody>{scores}</tbody></table></div>
</section>
</main>
<script>const FPS = {fps}, COUNT = {count};{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #5b6470; --line: #d6dae0; --box: #f4f6f8;
  --c0: #1f6fb2; --c1: #c55a11; --reused: #b9d4ea; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e8eb; --soft: #9aa4b0; --line: #333a43;
  --box: #1e2329; --c0: #6db3ee; --c1: #f0a35e; --reused: #2b4a63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 8px; }
header p, .note { color: var(--soft); margin: 0 0 16px; font-size: .9rem; overflow-wrap: anywhere; }
a { color: var(--c0); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin-bottom: 16px; }
.tiles div { background: var(--box); border-radius: 8px; padding: 10px 12px; }
.tiles b { display: block; font-size: 1.15rem; }
.tiles span { color: var(--soft); font-size: .85rem; }
.media { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; }
@media (max-width: 700px) { .tiles, .media { grid-template-columns: repeat(2, 1fr); }
  .media figure:last-child { grid-column: 1 / -1; } }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .9rem; color: var(--soft); margin-bottom: 4px; }
video, img { display: block; width: 100%; background: #000; border-radius: 6px; }
.small { image-rendering: pixelated; }
.controls { display: flex; gap: 12px; align-items: center; margin: 12px 0; }
.controls input { flex: 1; min-width: 0; accent-color: var(--c0); }
.controls output { color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
button { font: inherit; padding: 4px 14px; border: 1px solid var(--line); border-radius: 6px; background: var(--box);
  color: var(--ink); min-width: 5.5em; cursor: pointer; }
.note { margin-top: 12px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px 24px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
.bound { stroke: var(--soft); stroke-dasharray: 5 4; }
.playhead { stroke: var(--soft); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
path.c0 { stroke: var(--c0); }
path.c1 { stroke: var(--c1); stroke-dasharray: 6 3; }
rect.computed { fill: var(--c0); }
rect.reused { fill: var(--reused); }
.key { margin-left: 10px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }
.key.c0::before, .key.computed::before { background: var(--c0); }
.key.c1::before { background: var(--c1); }
.key.reused::before { background: var(--reused); }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 24px;
  margin: 28px 0 20px; }
td:not(:first-child), .key { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.sum td { font-weight: 600; }
"""

SCRIPT = """
const videos = [...document.querySelectorAll('video')], seek = document.getElementById('seek');
const play = document.getElementById('play'), label = document.getElementById('frame');
const heads = [...document.querySelectorAll('.playhead')];
function show(frame) {
  seek.value = frame;
  label.textContent = `frame ${frame} of ${COUNT}`;
  for (const head of heads) {
    const box = head.ownerSVGElement.dataset;
    const x = +box.left + (box.right - box.left) * frame / (COUNT - 1);
    head.setAttribute('x1', x);
    head.setAttribute('x2', x);
  }
}
function follow() {
  const time = videos[0].currentTime;
  for (const video of videos.slice(1)) if (Math.abs(video.currentTime - time) > 0.6 / FPS) video.currentTime = time;
  show(Math.min(COUNT - 1, Math.floor(time * FPS + 0.01)));
  if (!videos[0].paused) requestAnimationFrame(follow);
}
if (videos.length) {
  play.onclick = () => toggle(videos[0].paused);
  seek.oninput = () => {
    toggle(false);
    videos.forEach(video => { video.currentTime = (+seek.value + 0.5) / FPS; });
    show(+seek.value);
  };
  toggle(!matchMedia('(prefers-reduced-motion: reduce)').matches);
}
function toggle(on) {
  videos.forEach(video => on ? video.play() : video.pause());
  play.textContent = on ? 'Pause' : 'Play';
  if (on) requestAnimationFrame(follow);
}
"""
