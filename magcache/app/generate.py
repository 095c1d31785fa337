"""From a checked job to its results: extends the prompts, shares them out, loads the pipeline, makes the videos."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from easydict import EasyDict

from magcache.app.backend import backend, load_pipeline
from magcache.app.errors import Failed, first_line
from magcache.app.inputs import Expander, extend_prompt
from magcache.app.job import Job, Request
from magcache.app.make_videos import Failures, make_videos
from magcache.app.measure import calibrate
from magcache.app.processes import Group, gathered
from magcache.app.render import Renderer
from magcache.app.tell import summarise


def make_all(
    job: Job,
    config: EasyDict,
    group: Group,
    inputs: list | None,
    expander: Expander | None,
    requests: list[Request],
) -> Failures:
    """Makes this group's share of the requests, and returns what failed in any group. config: the model's, of the `wan`
    package. inputs: of `read_inputs`. expander: of `make_expander`, None where this process extends no prompts. Raises
    Failed where the user can do something about a failure."""
    seconds, failures = {}, []
    with explained():
        if job.extension:
            with timed(seconds, "extend"):
                requests = gathered(extended(job, requests, expander, inputs), group.everyone)[0]
        requests = requests[group.index :: group.count]
        if requests:  # there may be fewer videos than groups
            with timed(seconds, "load"):
                pipeline = load_pipeline(job, config, group)
            renderer = Renderer(job, pipeline, group, inputs, seconds)
            if job.calibrates:
                calibrate(renderer, requests)
            else:
                failures = make_videos(renderer, requests)
            summarise(job, renderer.watches, seconds)
        return list(itertools.chain(*gathered(failures if group.rank == 0 else [], group.everyone)))


def extended(job: Job, requests: list[Request], expander: Expander | None, inputs: list | None) -> list[Request]:
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
    except (OSError, *backend().damaged) as fault:
        raise Failed(first_line(fault)) from fault


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
