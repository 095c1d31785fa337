"""Makes the videos of a job, one after the other."""

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import magcache
from magcache import patch
from magcache.app import prompts
from magcache.app.backend import backend, load_pipeline
from magcache.app.choose_schedule import all_computed
from magcache.app.console import Stopped
from magcache.app.errors import Failed, LostResult, NotFinite, first_line
from magcache.app.inputs import extend_prompt, inputs_of
from magcache.app.job import Job, Request
from magcache.app.media import to_frames
from magcache.app.processes import Group, Processes, agreed, gathered
from magcache.app.progress import Watch, watched
from magcache.app.record import make_record, save_record
from magcache.app.results import CalibrationFile, compare_results, save_result
from magcache.app.run_trials import TrialRuns
from magcache.app.tell import summarise

Failures = list[tuple[str, str]]  # "videos" or "comparisons", and the line to say of it


def make_all(
    job: Job,
    config: Any,
    processes: Processes,
    group: Group,
    inputs: list | None,
    expander: Any,
    requests: list[Request],
) -> Failures:
    """Makes this group's share of the requests, and returns what failed in any group. config: the model's, of the `wan`
    package. group: of processes, of `start_processes`. inputs: of `read_inputs`. expander: of `make_expander`, None
    where this process extends no prompts. Raises Failed where the user can do something about a failure."""
    everyone, own = processes.patient_group(processes.world), processes.patient_group(group.size)
    seconds = {}
    with explained():
        if job.extension:
            with timed(seconds, "extend"):
                if expander:
                    requests = [replace(r, prompt=extend_prompt(job, r, expander, inputs)) for r in requests]
                    if hasattr(expander, "free"):  # of a language model on this machine; Wan2.1's own cannot
                        expander.free()
                requests = gathered(requests, everyone)[0]  # the others wait as long as it takes
        requests = prompts.share(requests, group.index, group.count)
        failures = []
        if requests:  # there may be fewer videos than groups
            with timed(seconds, "load"):
                pipeline = load_pipeline(job, config, processes, group)
            making = Making(job, pipeline, processes, group, own, inputs, seconds)
            making.make(requests)
            summarise(job, making.watches, seconds)
            failures = making.failures if group.rank == 0 else []
        return list(itertools.chain(*gathered(failures, everyone)))


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


def tried(goes_on: bool, function: Callable, group=None) -> tuple:
    """What the function returns, and None; or None, and what went wrong, if its failure stops nothing else (`goes_on`).
    group: processes, of `Processes.patient_group`, that call it together."""
    result = fault = None
    try:
        result = function()
    except LostResult:
        raise
    except Exception as raised:
        if not goes_on:
            raise
        # not the exception, whose traceback holds all that the failed video has on the GPU
        fault = type(raised).__name__, first_line(raised)
    return result, agreed(fault, group) if goes_on else None


class Making:
    """A loaded pipeline with the job's cache or calibration on it, and what came of the requests so far. own: the
    processes of this group, of `Processes.patient_group`. seconds: of what came before."""

    def __init__(self, job: Job, pipeline, processes: Processes, group, own, inputs: list | None, seconds: dict):
        self.job, self.pipeline, self.group, self.own, self.seconds = job, pipeline, group, own, seconds
        self.speaks = processes.rank == 0
        self.cache = self.calibration = None
        if job.cache:
            device = "cpu" if job.cache.offload else None
            self.cache = magcache.apply_magcache(pipeline.model, job.schedule, device=device)
        elif job.calibrates:
            self.calibration = magcache.apply_calibration(pipeline.model, job.schedule.steps, group.sharing)
        if inputs is None:
            given = job.inputs
            paths = [given.src_video], [given.src_mask], [given.references or None]
            inputs = pipeline.prepare_source(*paths, job.sampling.frame_num, job.sampling.pixels, pipeline.device)
        self.inputs = inputs
        self.runs, self.watches, self.failures = [], [], []
        self.watch, self.saved = None, 0  # the latest one; how many videos
        self.trials = self.table = None
        if job.calibrates:
            self.table = CalibrationFile(job)

    def make(self, requests: list[Request]) -> None:
        """Makes all of them; a calibration is written with each, of the runs that are complete."""
        if self.job.output.trials:
            self.trials = TrialRuns(self.job, self.pipeline, self.generate, self.own, self.speaks, len(requests))
        bar = None if self.job.goes_on and self.speaks else True  # True: there is none
        self.runs_left = len(requests) * (2 if self.job.output.compare else 1)
        try:
            for number, request in enumerate(tqdm(requests, "videos", unit="video", disable=bar), 1):
                if self.job.prompt_file:
                    among = f", those of group 1 of {self.group.count}" if self.group.count > 1 else ""
                    video = f"{number} of {len(requests)}{among}"
                    print(f"video     {video}, seed {request.seed}: {request.prompt}", flush=True)
                self.watch = None
                self.make_one(request)
                if self.runs and self.speaks and number < len(requests):
                    self.save_table(requests)  # nothing that comes later can take it away
        except BaseException as fault:
            reached = self.reached(number, len(requests))
            if self.calibration and self.speaks and (len(self.runs) < len(requests) or self.trials):
                print(f"the calibration stopped{reached}", file=sys.stderr)
            elif isinstance(fault, Stopped):
                fault.args = (reached,)  # the script says it
            raise
        finally:
            if self.runs and self.speaks:
                self.save_table(requests)
                self.table.finish()

    def save_table(self, requests: list[Request]) -> None:
        """The calibration of those that were measured."""
        done = requests[: len(self.runs)]
        self.table.write(self.runs, done, self.trials and self.trials.entry(done))

    def reached(self, number: int, count: int) -> str:
        """How far the number-th of so many requests came, and what there is of all of them."""
        if self.trials and self.trials.recorded == len(self.runs) > 0:
            return f" in the trials of prompt {number} of {count}; what was measured until then is written"
        calls = f"after {len(self.watch.reused) if self.watch else 0} of {len(self.job.schedule.weights)} calls"
        kept = f"videos saved: {self.saved}"
        if self.calibration:
            kept = "only the prompts before count" if self.runs else "nothing is written"
        return f" in prompt {number} of {count}, {calls}; {kept}"

    def make_one(self, request: Request) -> None:
        run = functools.partial(self.run, request, self.job.schedule, self.cache or self.calibration)
        with self.trials.recording(request) if self.trials else nullcontext():
            made, fault = tried(self.job.goes_on, run, self.own)
        if fault:
            self.fail("videos", request, fault)
            return
        (video, watch), frames, saved = made, None, None
        self.watches.append(watch)
        if self.group.rank == 0:  # the others get no video
            saved, fault = tried(self.job.goes_on, functools.partial(self.save, request, video, watch))
            frames = to_frames(video) if self.job.output.compare else None
        if gathered(fault, self.own)[0]:
            self.fail("videos", request, fault)
            return
        if self.calibration:
            self.runs.append(self.calibration.lists())
        del made, video  # the next one needs the memory
        if self.trials:
            self.trials.try_prompt(watch.latent, self.runs[-1]["mag_ratio"])
        if self.job.output.compare:
            self.compare(request, saved or {}, frames, watch)
        watch.latent = None

    def fail(self, what: str, request: Request, fault: str) -> None:
        """The others go on; what failed is said now and, in `failures`, at the end."""
        self.failures.append((what, f"{request.path}: {fault}"))
        if self.group.rank == 0:
            print(f"failed    {request.path}: {fault}", flush=True)

    def run(self, request: Request, schedule: magcache.Schedule, runner: patch.Runner | None) -> tuple[Any, Watch]:
        """The video, and what was watched. runner: of the model's calls, None to compute all of them; it starts afresh,
        whatever was before."""
        self.runs_left -= 1
        self.pipeline.keeps_models = self.runs_left > 0 or bool(self.trials)  # of our `wan`
        before = self.watches[-1].seconds["decode"] if self.watches else None
        with watched(self.pipeline, schedule, self.speaks, before) as watch:
            self.watch = watch
            backend().attach(self.pipeline.model, runner or patch.OutputCache(schedule), watch.called)
            video = self.generate(request, self.job.sampling.sample_steps)
        return video, watch

    def generate(self, request: Request, steps: int) -> Any:
        """What the pipeline makes of the request."""
        sampling = self.job.sampling
        shape = {"size": sampling.pixels}
        if sampling.spec.images:
            shape = {"max_area": math.prod(sampling.pixels)}
        with backend().apart(self.group):
            return self.pipeline.generate(
                request.prompt,
                *inputs_of(request, self.inputs),
                **shape,
                frame_num=sampling.frame_num,
                shift=sampling.sample_shift,
                sample_solver=sampling.sample_solver,
                sampling_steps=steps,
                guide_scale=sampling.sample_guide_scale,
                n_prompt=request.n_prompt or "",
                seed=request.seed,
                offload_model=self.job.machine.offload_model,
            )

    def save(self, request: Request, video: torch.Tensor, watch: Watch) -> dict:
        """Writes the video [3, F, H, W] in [-1, 1] and its record, which it returns."""
        if not torch.isfinite(video).all():
            raise NotFinite("the VAE decoded NaN or infinite values from a latent that holds none; nothing is saved")
        save_result(video, request.path, self.pipeline.config.sample_fps)
        self.saved += 1
        watch.lap("save")
        frames, height, width = video.shape[1:]
        print(f"saved     {request.path} ({width}x{height}, {frames} frames)", flush=True)
        seconds = self.seconds | watch.seconds
        record = make_record(self.job, request, self.group, (frames, height, width), seconds, watch.calls)
        save_record(request.path, record)
        return record

    def compare(self, request: Request, record: dict, frames: np.ndarray | None, watch: Watch) -> None:
        """Generates the same video without the cache, and writes the comparison, also into the record. frames: with the
        cache, uint8 [F, H, W, 3], None where this process got no video."""
        print("now the same without the cache, to compare", flush=True)
        goes_on, fps, scores = self.job.goes_on, self.pipeline.config.sample_fps, None
        try:
            plain, fault = tried(
                goes_on,
                functools.partial(
                    self.run, request, all_computed(self.job.schedule.steps, self.job.schedule.calls_per_step), None
                ),
                self.own,
            )
            if not fault and frames is not None:
                write = functools.partial(compare_results, self.job, request, fps, (frames, watch), plain)
                scores, fault = tried(goes_on, write)
        except BaseException:
            print(f"the comparison failed; the video with the cache is in {request.path}", file=sys.stderr)
            raise
        if scores:
            save_record(request.path, record | {"comparison": scores})
        if fault:
            self.fail("comparisons", request, fault)
