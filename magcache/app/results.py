"""What a job writes: videos, comparisons, calibrations."""

import contextlib
import json
import os
import secrets
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

import magcache
from magcache.app.choose_schedule import fitting_table, settings_of
from magcache.app.compare import psnr_in_words, score, verdict, write_comparison
from magcache.app.errors import Failed, LostResult, NotFinite, first_line
from magcache.app.job import Job, Request, shape_in_words
from magcache.app.media import to_frames, to_uint8, write_image, write_video
from magcache.app.plot import draw_calibration
from magcache.app.progress import Watch
from magcache.app.prompts import slug
from magcache.app.record import make_record, save_record
from magcache.app.render import Renderer
from magcache.app.requests import IMAGE_ENDINGS, comparison_paths
from magcache.app.trials.quality import expectation
from magcache.files import written_whole
from magcache.trials import closeness

FLAT_LISTS = {key: f"wan2_1_{key}.json" for key in ("mag_ratio", "mag_std", "cos_dis")}  # of a table: file


def save_result(video: torch.Tensor, path: Path, fps: int) -> None:
    """Writes the video [3, F, H, W] in [-1, 1], or the image that it is. If that fails, keeps the pixels as a tensor,
    since an hour of work is in them. Raises LostResult where not even that can be done."""
    frames = to_frames(video)
    try:
        if path.suffix.lower() in IMAGE_ENDINGS:
            write_image(path, frames[0])
        else:
            write_video(path, frames, fps)
    except BaseException as fault:
        if not (rescue := keep_pixels(video, path)):
            raise LostResult(f"could not write {path} ({first_line(fault)}), nor its pixels anywhere else") from fault
        print(f"could not write {path}; its pixels are kept in {rescue} (torch.load)", file=sys.stderr)
        raise


def spare_folders() -> tuple[str, ...]:
    """Returns the folders for results that cannot be written to their own."""
    return tempfile.gettempdir(), ".", os.path.expanduser("~")


def keep_pixels(video: torch.Tensor, path: Path) -> str | None:
    """Writes the pixels, uint8 [3, F, H, W], to a new file in a folder for such, where its name is that of `path` and
    something random. Returns it, None if no folder took all of them."""
    pixels = torch.from_numpy(to_uint8(video))
    for folder in spare_folders():
        rescue = Path(folder) / f"{slug(path.stem)}_{secrets.token_hex(4)}.pt"
        with contextlib.suppress(OSError, RuntimeError):
            with written_whole(rescue) as part, open(part, "wb") as file:
                torch.save(pixels, file)
            return str(rescue)
    return None


def save_video(renderer: Renderer, request: Request, watch: Watch) -> dict:
    """Writes what was rendered and its record, which it returns."""
    video = watch.video
    if not torch.isfinite(video).all():
        raise NotFinite("the VAE decoded NaN or infinite values from a latent that holds none; nothing is saved")
    save_result(video, request.path, renderer.fps)
    watch.lap("save")
    shape = tuple(video.shape[1:])
    print(f"saved     {request.path} ({shape_in_words(shape)})", flush=True)
    seconds = renderer.seconds | watch.seconds
    record = make_record(renderer.job, request, renderer.group, shape, seconds, watch.calls)
    save_record(request.path, record)
    return record


def compare_results(renderer: Renderer, request: Request, frames: np.ndarray, watch: Watch, plain: Watch) -> dict:
    """Writes the video without the cache, and its comparison with the one with it, of which there are the frames, uint8
    [F, H, W, 3], and what was watched. Returns what a record holds of it."""
    job, fps = renderer.job, renderer.fps
    paths = comparison_paths(job, request.path)
    save_result(plain.video, paths[0], fps)
    plain.lap("save")
    close = closeness(watch.latent, plain.latent)
    reference = to_frames(plain.video)
    scores = score(frames, reference) | dict(zip(("latent_psnr", "latent_relative_error"), close, strict=True))
    write_comparison(job, request, fps, (frames, watch.seconds), (reference, plain.seconds), scores)
    latents = f"latent PSNR {close[0]:.2f} dB: {verdict(close[0])}"
    print(f"compared  PSNR {psnr_in_words(scores['psnr'])}, SSIM {scores['ssim']:.4f}, {latents}; {paths[0].name}")
    if expected := expectation(job):
        print(f"          of the latent PSNR {expected}, by trials")
    for path in paths[1:]:
        print(f"          {path}", flush=True)
    seconds = {name: round(value, 4) for name, value in plain.seconds.items()}
    return scores | {"uncached_seconds": seconds, "files": [path.name for path in paths]}


class CalibrationFile:
    """The table of a calibration, which is written again with every prompt that is done."""

    def __init__(self, job: Job):
        self.job, self.path, self.table = job, job.output.table, None

    def write(self, runs: list[dict], done: list[Request], trials: dict | None = None) -> None:
        """runs: the lists of every calibrated one; `done` are their requests. trials: what the table holds of those.
        Into another folder where its own takes it no longer."""
        table = magcache.make_table(self.path.stem, runs, self.measured_on(done))
        table |= {"trials": trials} if trials else {}
        for folder in (self.path.parent, *map(Path, spare_folders())):
            path = folder / self.path.name
            try:
                magcache.save_table(path, table, replace=self.table is not None)
            except OSError as fault:
                reason = f"{self.path.parent} no longer takes files ({first_line(fault)})"
                continue
            if path != self.path:
                print(f"warning: {reason}; the calibration is in {folder}", file=sys.stderr)
            self.path, self.table = path, table
            return
        raise Failed(f"the calibration could be kept nowhere: {reason}")

    def measured_on(self, done: list[Request]) -> dict:
        sampling, sigmas = self.job.sampling, self.job.sampling.noise_levels
        inputs = {flag: getattr(self.job.inputs, flag) for flag in sampling.spec.inputs}
        if done[0].image:
            inputs["image"] = [request.image for request in done]
        return settings_of(sampling, self.job.machine) | {
            "sample_steps": sampling.sample_steps,
            "prompts": [request.prompt for request in done],
            "seeds": [request.seed for request in done],
            "inputs": inputs,
            "dtype": "bfloat16 autocast" if torch.cuda.is_available() else "float32",
            "timesteps": [int(1000 * sigma) for sigma in sigmas],
            "sigmas": sigmas,
            "versions": {module.__name__: module.__version__ for module in (magcache, torch, diffusers, transformers)},
            "date": datetime.now().isoformat("T", "seconds"),
        }

    def finish(self) -> None:
        """Says where it is, with what goes beside it."""
        path, published = self.path, None
        print(f"table     {path} (use it with --use_magcache --mag_ratios {path})")
        with contextlib.suppress(ValueError):
            sampling, ckpt_dir = self.job.sampling, self.job.machine.ckpt_dir
            published = magcache.load_table(fitting_table(sampling.spec, ckpt_dir, sampling.size)[0])
        write_beside(path, self.table, published)


def write_beside(path: Path, table: dict, published: magcache.RatioTable | None = None) -> None:
    """Writes, beside a table of `magcache.make_table` at `path`, a picture of it, and the three flat lists under the
    names that the released script gives them. Each file is written whole or not at all.

    published: a table to draw beside it. The flat lists are of the latest calibration, which is said where they replace
    another's.
    """
    folder = path.parent
    flat = {folder / name: table[key] for key, name in FLAT_LISTS.items()}
    if any(file.exists() for file in flat):
        print(f"note: {', '.join(FLAT_LISTS.values())} in {folder} now hold this calibration, not the one before")
    for file, values in flat.items():
        with written_whole(file) as part:
            part.write_text(json.dumps(values))
    try:
        draw_calibration(table, path.with_suffix(".png"), published)
    except ImportError:
        print("note: there is no picture of it without matplotlib")
