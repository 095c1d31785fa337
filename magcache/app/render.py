"""The way of one video: from a request to its pixels."""

import math

import torch

from magcache import patch
from magcache.app.backend import backend
from magcache.app.inputs import inputs_of
from magcache.app.job import Job, Request
from magcache.app.processes import Group
from magcache.app.progress import Watch, watched


class Renderer:
    """Makes videos with a loaded pipeline, by the settings of a job, together with the processes of a group. inputs: of
    `read_inputs`. seconds: by phase, of what came before. `watch` is that of the latest video, however far that came,
    `watches` are those of finished ones."""

    def __init__(self, job: Job, pipeline, group: Group, inputs: list | None, seconds: dict[str, float]):
        self.job, self.pipeline, self.group, self.seconds = job, pipeline, group, seconds
        if inputs is None:
            given = job.inputs
            paths = [given.src_video], [given.src_mask], [given.references or None]
            inputs = pipeline.prepare_source(*paths, job.sampling.frame_num, job.sampling.pixels, pipeline.device)
        self.inputs, self.decoding, self.watch, self.watches = inputs, None, None, []

    @property
    def fps(self) -> int:
        return self.pipeline.config.sample_fps

    def render(self, request: Request, runner: patch.Runner, more: bool = True) -> Watch:
        """Renders one video. runner: for the model's calls; it starts afresh. more: whether another video follows, for
        which the models are kept."""
        self.watch, self.pipeline.keeps_models = None, more
        with watched(self.pipeline, runner.schedule, self.group.speaks, self.decoding) as watch:
            self.watch = watch
            backend().attach(self.pipeline, runner, watch.called)
            watch.video = self.generate(request, self.job.sampling.sample_steps)
        self.decoding = watch.seconds["decode"]
        return watch

    def generate(self, request: Request, steps: int) -> torch.Tensor | None:
        """Lets the pipeline generate the request."""
        sampling, inputs = self.job.sampling, inputs_of(request, self.inputs)
        shape = {"size": sampling.pixels}
        if sampling.spec.images and inputs:
            shape = {"max_area": math.prod(sampling.pixels)}
        with backend().apart(self.group):
            return self.pipeline.generate(
                request.prompt,
                *inputs,
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

    def reached(self, number: int, count: int) -> str:
        """Says how far the latest video came, the number-th of so many requests."""
        calls = f"after {len(self.watch.reused) if self.watch else 0} of {len(self.job.schedule.weights)} calls"
        return f" in prompt {number} of {count}, {calls}"
