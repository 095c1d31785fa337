"""What a job writes: videos, comparisons, calibrations."""

import contextlib
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import diffusers
import torch
import transformers

import magcache
from magcache.app.choose_schedule import settings_of
from magcache.app.compare import in_words, write_comparison
from magcache.app.job import Job, Request
from magcache.app.media import to_frames, to_uint8, write_image, write_video
from magcache.app.plot import draw_calibration
from magcache.app.quality import expected_in_words
from magcache.app.requests import IMAGE_ENDINGS
from magcache.files import written_whole
from magcache.trials import closeness

FLAT_LISTS = {key: f"wan2_1_{key}.json" for key in ("mag_ratio", "mag_std", "cos_dis")}  # of a table: file


def save_result(video: torch.Tensor, path: Path, fps: int) -> None:
    """Writes the video [3, F, H, W] in [-1, 1], or the image that it is; if that fails, keeps the pixels as a tensor,
    since an hour of work is in them."""
    try:
        if path.suffix.lower() in IMAGE_ENDINGS:
            write_image(path, to_frames(video)[0])
        else:
            write_video(path, to_frames(video), fps)
    except BaseException:
        pixels = torch.from_numpy(to_uint8(video))
        for folder in (tempfile.gettempdir(), "."):
            rescue = Path(folder) / f"{path.stem[:100]}.pt"
            with contextlib.suppress(OSError, RuntimeError):
                torch.save(pixels, rescue)
                print(f"could not write {path}; its pixels are kept in {rescue} (torch.load)", file=sys.stderr)
                break
        raise


def compare_results(job: Job, request: Request, fps: int, cached: tuple, uncached: tuple) -> dict:
    """Writes the video without the cache, and its comparison with the one with it. Returns what a record holds of it.
    cached: frames, uint8 [F, H, W, 3], and what was watched. uncached: video, [3, F, H, W] in [-1, 1], and the same."""
    (frames, watch), (video, plain) = cached, uncached
    path = request.path.with_stem(f"{request.path.stem}_uncached")
    save_result(video, path, fps)
    plain.lap("save")
    scores = write_comparison(job, request, fps, (frames, watch.seconds), (to_frames(video), plain.seconds))
    latents = ""
    if watch.latent is not None and plain.latent is not None:
        latent_psnr, relative_error = closeness(watch.latent, plain.latent)
        latents = f", latent PSNR {latent_psnr:.2f} dB"
        scores |= {"latent_psnr": latent_psnr, "latent_relative_error": relative_error}
    print(f"compared  PSNR {in_words(scores['psnr'])}, SSIM {scores['ssim']:.4f}{latents}; {path.name}")
    if latents and (expected := expected_in_words(job)):
        print(f"          of the latent PSNR {expected}, by trials")
    for file in scores["files"]:
        print(f"          {file}", flush=True)
    return scores | {"files": [file.name for file in (path, *scores["files"])]}


def save_calibration(job: Job, runs: list[dict], done: list[Request], trials: dict | None = None) -> None:
    """Writes one table of the calibrated runs; `done` are their requests. trials: what the table holds of those."""
    sampling, ckpt_dir, sigmas = job.sampling, job.machine.ckpt_dir, job.sampling.noise_levels
    inputs = {flag: getattr(job.inputs, flag) for flag in sampling.input_flags}
    if done[0].image:
        inputs["image"] = [request.image for request in done]
    measured_on = settings_of(sampling, ckpt_dir) | {
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
    video = f"{sampling.size.replace('*', 'x')}_{sampling.frame_num}f_{sampling.sample_steps}steps"
    name = f"{sampling.task}_{video}_{datetime.now():%Y%m%d_%H%M%S}"
    published = None
    with contextlib.suppress(ValueError):
        published = magcache.load_table(magcache.choose_table(sampling.task, ckpt_dir, sampling.size)[0])
    folder = Path(job.output.calibration_dir)
    table = magcache.make_table(name, runs, measured_on) | ({"trials": trials} if trials else {})
    path = write_calibration(folder, table, published)
    print(f"table     {path} (use it with --use_magcache --mag_ratios {path})")


def write_calibration(folder: Path, table: dict, published: magcache.RatioTable | None = None) -> Path:
    """Writes a table of `magcache.make_table` into a folder as NAME.json, with a picture of it, NAME.png, and the three
    flat lists under the names that the released script gives them. Each file is written whole or not at all.

    published: a table to draw beside it. Returns the path of the JSON. Raises FileExistsError rather than replace one;
    the flat lists are of the latest calibration, which is said where they replace another's.
    """
    path = folder / f"{table['name']}.json"
    magcache.save_table(path, table)
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
    return path
