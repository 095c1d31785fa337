"""From a checked job to its results: extends the prompts, shares them out, loads the pipeline, makes the videos, or
measures and tries them for a table."""

import functools
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from easydict import EasyDict
from tqdm import tqdm

from magcache import patch
from magcache.app.backend import load_pipeline
from magcache.app.choose_schedule import all_computed
from magcache.app.compare import compare_results
from magcache.app.console import Stopped
from magcache.app.errors import Failed, first_line
from magcache.app.inputs import extend_prompt
from magcache.app.job import Job, Request
from magcache.app.media import to_frames
from magcache.app.processes import Group, gathered, tried
from magcache.app.progress import Watch
from magcache.app.record import save_record
from magcache.app.render import Renderer
from magcache.app.results import CalibrationFile, save_video
from magcache.app.tell import summarise
from magcache.app.trials.run import TrialRuns
from magcache.calibrate import Calibration

Failures = list[tuple[str, str]]  # "videos" or "comparisons", and the line to say of it

if TYPE_CHECKING:
    from wan.utils.prompt_extend import PromptExpander


def make_all(
    job: Job,
    config: EasyDict,
    group: Group,
    inputs: list | None,
    expander: "PromptExpander | None",
    requests: list[Request],
) -> Failures:
    """Makes this group's share of the requests, and returns what failed in any group. config: the model's, of the `wan`
    package. inputs: of `read_inputs`. expander: of `make_expander`, None where this process extends no prompts. Raises
    Failed where the user can do something about a failure."""
    seconds, failures = {}, []
    with explained():
        if job.flags["use_prompt_extend"]:
            with timed(seconds, "extend"):
                requests = gathered(extended(job, requests, expander, inputs), group.everyone)[0]
        requests = requests[group.index :: group.count]
        if requests:  # there may be fewer videos than groups
            with timed(seconds, "load"):
                pipeline = load_pipeline(job, config, group)
            renderer = Renderer(job, pipeline, group, inputs, seconds)
            if job.calibration:
                calibrate(renderer, requests)
            else:
                failures = make_videos(renderer, requests)
            summarise(job, renderer.watches, seconds)
        return list(itertools.chain(*gathered(failures if group.rank == 0 else [], group.everyone)))


def extended(
    job: Job, requests: list[Request], expander: "PromptExpander | None", inputs: list | None
) -> list[Request]:
    """Returns the requests with the prompts that the expander writes out. Without one they stay as they are."""
    if not expander:
        return requests
    requests = [replace(request, prompt=extend_prompt(job, request, expander, inputs)) for request in requests]
    if hasattr(expander, "free"):  # of a language model on this machine; Wan2.1's own cannot
        expander.free()
    return requests


@contextmanager
def explained() -> Iterator[None]:
    """Failures of the block that the user can do something about become `Failed`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as fault:
        less = "--offload_blocks, --offload_model True, --vae_tiling, a smaller --size or fewer frames need less"
        raise Failed(f"out of GPU memory ({first_line(fault)}); {less}") from fault
    except OSError as fault:
        raise Failed(first_line(fault)) from fault


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def make_videos(renderer: Renderer, requests: list[Request]) -> Failures:
    """Returns what failed."""
    job, failures, saved = renderer.job, [], 0
    runner = patch.Runner(job.schedule)
    if job.cache:
        runner = patch.CACHES[job.schedule.target](job.schedule, device="cpu" if job.cache.offload else None)
    for number, request in told(renderer, requests):
        try:
            failed = make_video(renderer, request, runner, number < len(requests))
        except Stopped as stop:
            reached = f"{renderer.reached(number, len(requests))}; videos saved: {saved}"
            raise Stopped(stop.number, reached) from stop
        saved += "videos" not in failed
        for what, fault in failed.items():
            failures.append((what, f"{request.path}: {fault}"))
            if renderer.group.rank == 0:
                print(f"failed    {request.path}: {fault}", flush=True)
    return failures


def told(renderer: Renderer, requests: list[Request]) -> Iterator[tuple[int, Request]]:
    """Yields the requests with their numbers, and announces each before it is made."""
    job, group = renderer.job, renderer.group
    hidden = not (job.goes_on and group.speaks)
    for number, request in enumerate(tqdm(requests, "videos", unit="video", disable=hidden or None), 1):
        if job.prompt_file:
            among = f", those of group 1 of {group.count}" if group.count > 1 else ""
            video = f"{number} of {len(requests)}{among}"
            print(f"video     {video}, seed {request.seed}: {request.prompt}", flush=True)
        yield number, request


def make_video(renderer: Renderer, request: Request, runner: patch.Runner, more: bool) -> dict[str, str]:
    """Renders, saves and compares one video. Returns what failed, and why. more: whether another one follows."""
    job, group, compare = renderer.job, renderer.group, renderer.job.compare
    watch, fault = tried(job.goes_on, functools.partial(renderer.render, request, runner, more or compare), group.own)
    if fault:
        return {"videos": fault}
    renderer.watches.append(watch)
    record = frames = None
    if group.rank == 0:  # the others get no video
        record, fault = tried(job.goes_on, functools.partial(save_video, renderer, request, watch))
        frames = to_frames(watch.video) if compare else None
    watch.video = None  # the next one needs the memory
    if fault := gathered(fault, group.own)[0]:
        return {"videos": fault}
    try:
        fault = compare_video(renderer, request, more, record, frames, watch) if compare else None
    except BaseException:
        print(f"the comparison failed; the video with the cache is in {request.path}", file=sys.stderr)
        raise
    watch.latent = None
    return {"comparisons": fault} if fault else {}


def compare_video(renderer: Renderer, request: Request, more: bool, record, frames, watch: Watch) -> str | None:
    """Renders the same video without the cache, and writes the comparison, also into the record. Returns what went
    wrong. frames, watch: of that with the cache, uint8 [F, H, W, 3]; None, as the record, where there is no video."""
    print("now the same without the cache, to compare", flush=True)
    job = renderer.job
    uncached = patch.Runner(all_computed(job.schedule.steps, job.schedule.calls_per_step))
    render = functools.partial(renderer.render, request, uncached, more)
    plain, fault = tried(job.goes_on, render, renderer.group.own)
    if fault or frames is None:
        return fault
    scores, fault = tried(job.goes_on, functools.partial(compare_results, renderer, request, frames, watch, plain))
    if scores:
        watch.latent_psnr = scores.get("latent_psnr")
        save_record(request.path, record | {"comparison": scores})
    return fault


def calibrate(renderer: Renderer, requests: list[Request]) -> None:
    """Renders every prompt, measures its ratios, and tries it in other ways where that is wanted. The table is written
    with every prompt, so that nothing that comes later can take it away."""
    job, group, runs = renderer.job, renderer.group, []
    calibration, table = Calibration(job.schedule.steps, group.sharing), CalibrationFile(job)
    trials = TrialRuns(job, renderer.pipeline, renderer.generate, group, len(requests)) if job.trials else None

    def write() -> None:
        """The table of those that were measured."""
        done = requests[: len(runs)]
        table.write(runs, done, trials and trials.entry(done))

    try:
        for number, request in told(renderer, requests):
            more = number < len(requests)
            with trials.recording(request) if trials else nullcontext():
                watch = renderer.render(request, calibration, more or bool(trials))
            renderer.watches.append(watch)
            if group.rank == 0:
                save_video(renderer, request, watch)
            runs.append(calibration.lists())
            watch.video = None
            if trials:
                with timed(renderer.seconds, "trials"):
                    trials.try_prompt(watch.latent, runs[-1]["mag_ratio"])
            watch.latent = None
            if group.speaks and more:
                write()
    except BaseException:
        if group.speaks:
            print(f"the calibration stopped{reached(renderer, trials, number, len(requests), runs)}", file=sys.stderr)
        raise
    finally:
        if runs and group.speaks:
            write()
            table.finish()


def reached(renderer: Renderer, trials: TrialRuns | None, number: int, count: int, runs: list[dict]) -> str:
    """Says how far the number-th of so many prompts came, and what there is of all of them."""
    if trials and trials.recorded == len(runs) > 0:
        return f" in the trials of prompt {number} of {count}; what was measured until then is written"
    kept = "only the earlier prompts count" if runs else "nothing is written"
    return f"{renderer.reached(number, count)}; {kept}"
