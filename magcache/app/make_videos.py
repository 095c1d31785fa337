"""The loop that makes videos, and compares each with its uncached one where that is wanted."""

import functools
import sys
from collections.abc import Iterator

from tqdm import tqdm

from magcache import patch
from magcache.app.choose_schedule import all_computed
from magcache.app.console import Stopped
from magcache.app.job import Job, Request
from magcache.app.media import to_frames
from magcache.app.processes import Group, gathered, tried
from magcache.app.progress import Watch
from magcache.app.record import save_record
from magcache.app.render import Rendered, Renderer
from magcache.app.results import compare_results, save_video

Failures = list[tuple[str, str]]  # "videos" or "comparisons", and the line to say of it


def make_videos(
    job: Job, renderer: Renderer, group: Group, requests: list[Request], seconds: dict[str, float]
) -> tuple[list[Watch], Failures]:
    """Returns what was seen of each that was rendered, and what failed. seconds: by phase, of what came before."""
    cache = None
    if job.cache:
        cache = patch.CACHES[job.schedule.target](job.schedule, device="cpu" if job.cache.offload else None)
    watches, failures, saved = [], [], 0
    for number, request in told(job, group, requests):
        more = number < len(requests)
        try:
            failed = make_video(job, renderer, group, request, cache, more, seconds, watches)
        except Stopped as stop:
            reached = f"{renderer.reached(number, len(requests))}; videos saved: {saved}"
            raise Stopped(stop.number, reached) from stop
        saved += "videos" not in failed
        for what, fault in failed.items():
            failures.append((what, f"{request.path}: {fault}"))
            if group.rank == 0:
                print(f"failed    {request.path}: {fault}", flush=True)
    return watches, failures


def told(job: Job, group: Group, requests: list[Request]) -> Iterator[tuple[int, Request]]:
    """Yields the requests with their numbers, and announces each before it is made."""
    hidden = not (job.goes_on and group.speaks)
    for number, request in enumerate(tqdm(requests, "videos", unit="video", disable=hidden or None), 1):
        if job.prompt_file:
            among = f", those of group 1 of {group.count}" if group.count > 1 else ""
            video = f"{number} of {len(requests)}{among}"
            print(f"video     {video}, seed {request.seed}: {request.prompt}", flush=True)
        yield number, request


def make_video(
    job: Job,
    renderer: Renderer,
    group: Group,
    request: Request,
    cache: patch.Cache | None,
    more: bool,
    seconds: dict[str, float],
    watches: list[Watch],
) -> dict[str, str]:
    """Renders, saves and compares one video. Returns what failed, and why. more: whether another one follows."""
    compare = job.output.compare
    render = functools.partial(renderer.render, request, job.schedule, cache, more or compare)
    rendered, fault = tried(job.goes_on, render, group.own)
    if fault:
        return {"videos": fault}
    watches.append(rendered.watch)
    record = frames = None
    if group.rank == 0:  # the others get no video
        save = functools.partial(save_video, job, request, rendered, group, renderer.fps, seconds)
        record, fault = tried(job.goes_on, save)
        frames = to_frames(rendered.video) if compare else None
    if fault := gathered(fault, group.own)[0]:
        return {"videos": fault}
    rendered.video = None  # the next one needs the memory
    try:
        fault = compare_video(job, renderer, group, request, more, record, frames, rendered) if compare else None
    except BaseException:
        print(f"the comparison failed; the video with the cache is in {request.path}", file=sys.stderr)
        raise
    rendered.watch.latent = None
    return {"comparisons": fault} if fault else {}


def compare_video(
    job: Job, renderer: Renderer, group: Group, request: Request, more: bool, record, frames, cached: Rendered
) -> str | None:
    """Renders the same video without the cache, and writes the comparison, also into the record. frames: with the
    cache, uint8 [F, H, W, 3]; None, as the record, where this process got no video. Returns what went wrong."""
    print("now the same without the cache, to compare", flush=True)
    schedule = all_computed(job.schedule.steps, job.schedule.calls_per_step)
    render = functools.partial(renderer.render, request, schedule, None, more)
    plain, fault = tried(job.goes_on, render, group.own)
    if fault or frames is None:
        return fault
    write = functools.partial(compare_results, job, request, renderer.fps, frames, cached.watch, plain)
    scores, fault = tried(job.goes_on, write)
    if scores:
        cached.watch.latent_psnr = scores.get("latent_psnr")
        save_record(request.path, record | {"comparison": scores})
    return fault
