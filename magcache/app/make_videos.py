"""The loop that makes videos, and compares each with its uncached one where that is wanted."""

import functools
import sys
from collections.abc import Iterator

from tqdm import tqdm

from magcache import patch
from magcache.app.choose_schedule import all_computed
from magcache.app.console import Stopped
from magcache.app.job import Request
from magcache.app.media import to_frames
from magcache.app.processes import gathered, tried
from magcache.app.progress import Watch
from magcache.app.record import save_record
from magcache.app.render import Renderer
from magcache.app.results import compare_results, save_video

Failures = list[tuple[str, str]]  # "videos" or "comparisons", and the line to say of it


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
    job, group, compare = renderer.job, renderer.group, renderer.job.output.compare
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
    """Renders the same video without the cache, and writes the comparison, also into the record. frames, watch: of that
    with the cache, uint8 [F, H, W, 3]; None, as the record, where this process got no video. Returns what went
    wrong."""
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
