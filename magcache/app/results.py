"""What a job writes: videos, comparisons, calibrations."""

import contextlib
import json
import os
import secrets
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import torch

import magcache
from magcache.app.choose_schedule import fitting_table, settings_of
from magcache.app.errors import Failed, LostResult, NotFinite, first_line
from magcache.app.job import Job, Request, shape_in_words
from magcache.app.media import to_frames, to_uint8, write_frames
from magcache.app.plot import draw_calibration
from magcache.app.progress import Watch
from magcache.app.prompts import slug
from magcache.app.record import make_record, save_record, versions
from magcache.app.render import Renderer
from magcache.files import written_whole

VERSIONS = ("magcache", "torch", "diffusers", "transformers")  # those that a table names
FLAT_LISTS = {key: f"wan2_1_{key}.json" for key in ("mag_ratio", "mag_std", "cos_dis")}  # of a table: file


def save_result(video: torch.Tensor, path: Path, fps: int) -> None:
    """Writes the video [3, F, H, W] in [-1, 1], or the image that it is. If that fails, keeps the pixels as a tensor,
    since an hour of work is in them. Raises LostResult where not even that can be done."""
    try:
        write_frames(path, to_frames(video), fps)
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


class CalibrationFile:
    """The table of a calibration, which is written again with every prompt that is done."""

    def __init__(self, job: Job):
        self.job, self.path, self.table = job, job.calibration, None

    def write(self, runs: list[dict], done: list[Request], trials: dict | None = None) -> None:
        """runs: the lists of every calibrated one; `done` are their requests. trials: what the table holds of those.
        Into another folder where its own takes it no longer."""
        table = magcache.make_table(self.path.stem, runs, self.measured_on(done))
        table |= {"trials": trials} if trials else {}
        for folder in (self.path.parent, *map(Path, spare_folders())):
            try:
                magcache.save_table(folder / self.path.name, table, replace=self.table is not None)
            except OSError as fault:
                reason = f"{self.path.parent} no longer takes files ({first_line(fault)})"
                continue
            if folder != self.path.parent:
                print(f"warning: {reason}; the calibration is in {folder}", file=sys.stderr)
            self.path, self.table = folder / self.path.name, table
            return
        raise Failed(f"the calibration could be kept nowhere: {reason}")

    def measured_on(self, done: list[Request]) -> dict:
        sampling, sigmas = self.job.sampling, self.job.sampling.noise_levels
        inputs = {flag: getattr(self.job.inputs, flag) for flag in sampling.spec.inputs}
        if done[0].image:
            inputs["image"] = [request.image for request in done]
        return settings_of(sampling, self.job.machine) | {
            "prompts": [request.prompt for request in done],
            "seeds": [request.seed for request in done],
            "inputs": inputs,
            "dtype": "bfloat16 autocast" if torch.cuda.is_available() else "float32",
            "timesteps": [int(1000 * sigma) for sigma in sigmas],
            "sigmas": sigmas,
            "versions": {name: version for name, version in versions().items() if name in VERSIONS},
            "date": datetime.now().isoformat("T", "seconds"),
        }

    def finish(self) -> None:
        """Says where the table is, and writes beside it a picture, and the three flat lists under the names that the
        released script gives them. Each file is written whole or not at all."""
        path, folder, published = self.path, self.path.parent, None
        print(f"table     {path} (use it with --use_magcache --mag_ratios {path})")
        flat = {folder / name: self.table[key] for key, name in FLAT_LISTS.items()}
        if any(file.exists() for file in flat):
            print(f"note: {', '.join(FLAT_LISTS.values())} in {folder} now hold this calibration, not the one before")
        for file, values in flat.items():
            with written_whole(file) as part:
                part.write_text(json.dumps(values))
        with contextlib.suppress(ValueError):
            sampling, ckpt_dir = self.job.sampling, self.job.machine.ckpt_dir
            published = magcache.load_table(fitting_table(sampling.spec, ckpt_dir, sampling.size)[0])
        try:
            draw_calibration(self.table, path.with_suffix(".png"), published)
            print(f"picture   {path.with_suffix('.png')}")
        except ImportError:
            print("note: there is no picture of it without matplotlib")
