"""The trials of a calibration: after the uncached run of a prompt the same prompt and noise again, in other ways.

Only the denoise loop runs. What a trial has in common with the uncached run at its start is taken from that one.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from magcache import Settings, patch, trials
from magcache.app.backend import backend
from magcache.app.errors import Failed
from magcache.app.job import TRIAL_BUDGET, Job, Request
from magcache.app.processes import Group, gathered
from magcache.app.progress import LOG_SECONDS, bars_replaced
from magcache.schedule import CALLS_PER_STEP
from magcache.speedup import DEFAULT, Constants, computed_steps


@dataclass
class Recorded:
    """What is kept of one prompt's uncached run: the outputs of its first calls, and the final latent, on the CPU; None
    in processes that get none. inputs: what texts, images and videos were encoded to, since the first trial."""

    number: int
    request: Request
    outputs: list = field(default_factory=list)
    latent: torch.Tensor | None = None
    inputs: dict = field(default_factory=dict)


def remembered(encoder: Callable, results: list) -> Callable:
    """Stands in for an encoder that all trials of a prompt call alike: it works for the first, and fills `results`."""
    numbers = itertools.count()

    def encode(*args, **kwargs):
        number = next(numbers)
        if number == len(results):
            results.append(encoder(*args, **kwargs))
        return results[number]

    # where there is nothing to encode, no model is moved for it
    encode.model = torch.nn.Module() if results else getattr(encoder, "model", None)
    return encode


def copied(out, device: torch.device | str):
    """Copies what a transformer returned."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, copy=True), out)


class Continued(patch.Runner):
    """Runs a cache, whose first calls return what the uncached run has returned there, without the model. known: that,
    None for calls that compute all the same. device: for it."""

    def __init__(self, cache: patch.Cache, known: list, device: torch.device):
        self.cache, self.known, self.device = cache, known, device
        super().__init__(cache.schedule)

    def reset(self) -> None:
        self.cache.reset()

    def knows(self, call: int) -> bool:
        return call < len(self.known) and self.known[call] is not None

    def run(self, call: int, model: torch.nn.Module, forward: Callable):
        if self.knows(call):
            forward = functools.partial(copied, self.known[call], self.device)
        return self.cache.run(call, model, forward)


class TrialRuns:
    """Tries the prompts of a calibration. generate(request, steps): makes a video with the pipeline. count: of the
    prompts.

    Where there are prompts enough, the first ones choose the constants of the speed-up rule, and wait for the rest of
    their trials until then. Every prompt tries all speed-ups; fewer steps and the published settings take turns, as far
    as the trials of the prompts so far stay within `TRIAL_BUDGET`.
    """

    def __init__(self, job: Job, pipeline, generate: Callable, group: Group, count: int):
        self.sampling, self.speedups = job.sampling, job.trials
        self.pipeline, self.generate, self.group, self.count = pipeline, generate, group, count
        self.choosing = min(count // 2, 8) if count >= trials.ENOUGH else 0
        self.candidates = trials.candidates(self.speedups, self.sampling.noise_levels)
        self.constants = None if self.choosing else DEFAULT
        self.forecasts = [] if self.choosing else self.forecasts_by(DEFAULT)
        self.others: list[trials.Trial] = []
        self.waiting: list[Recorded] = []
        self.recorded = self.allowed = self.spent = self.turn = 0
        possible = (way for constants in trials.CANDIDATES for way in self.forecasts_by(constants))
        first_free = Settings().first_free_step(job.sampling.sample_steps)
        self.wanted = max(CALLS_PER_STEP * first_free, *(len(way.known) for way in possible))  # outputs of a run

    def forecasts_by(self, constants: Constants) -> list[trials.Trial]:
        return [trials.forecast(speedup, self.sampling.noise_levels, constants) for speedup in self.speedups]

    def compared(self, ratios: Sequence[float]) -> list[trials.Trial]:
        """Returns what forecasts are compared with: fewer sampler steps at equal calls, and the task's published
        settings by this model's ratios, where they reuse anything."""
        steps = self.sampling.sample_steps
        fewer = [trials.fewer_steps(computed_steps(steps, speedup)) for speedup in self.speedups]
        rows = [trials.by_ratios(ratios, steps, rule) for rule in self.sampling.spec.published]
        return fewer + [row for row in rows if any(row.schedule.reuse)]

    @contextmanager
    def recording(self, request: Request) -> Iterator[None]:
        """Keeps what the trials need of the uncached run in this block."""
        kept = Recorded(self.recorded, request)

        def keep_output(module, args, out):
            if len(kept.outputs) < self.wanted:
                kept.outputs.append(copied(out, "cpu"))

        with ExitStack() as stack:
            for model in backend().transformers(self.pipeline):
                stack.callback(model.register_forward_hook(keep_output).remove)
            yield
        self.waiting.append(kept)
        self.recorded += 1

    def try_prompt(self, latent: torch.Tensor | None, ratios: Sequence[float]) -> None:
        """Makes the trials that are due now, after the uncached run that was recorded last. latent, ratios: its
        results. Those of the first prompt make the schedules of the published settings, as in published tables."""
        self.waiting[-1].latent = latent
        if not self.others:
            self.others = self.compared(ratios)
        if self.constants is None:
            self.try_ways(self.waiting[-1], self.candidates, "constants of the rule, ")
            if len(self.waiting) < self.choosing:
                return
            self.constants = trials.choose(self.candidates)
            tried = {tuple(way.settings.values()): way for way in self.candidates}
            chosen = self.forecasts_by(self.constants)
            self.forecasts = [tried.get(tuple(way.settings.values()), way) for way in chosen]
        for recorded in self.waiting:
            self.allowed += round(TRIAL_BUDGET * CALLS_PER_STEP * self.sampling.sample_steps)
            ways = [way for way in self.forecasts if recorded.number not in way.psnr]
            self.try_ways(recorded, ways + self.affordable(sum(way.cost for way in ways)))
        self.waiting.clear()

    def affordable(self, due: int) -> list[trials.Trial]:
        """Returns as many of the others, from the one whose turn it is, as the budget allows beside the calls due."""
        ways, left = [], self.allowed - self.spent - due
        while len(ways) < len(self.others) and self.others[self.turn].cost <= left:
            ways.append(self.others[self.turn])
            left -= ways[-1].cost
            self.turn = (self.turn + 1) % len(self.others)
        return ways

    def try_ways(self, recorded: Recorded, ways: Sequence[trials.Trial], of: str = "") -> None:
        with tqdm(
            total=sum(way.cost for way in ways),
            desc=f"trials of {of}prompt {recorded.number + 1} of {self.count}",
            unit="call",
            disable=not self.group.speaks,
            mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS,
        ) as bar:
            for number, way in enumerate(ways, 1):
                latent, close = self.latent(recorded, way, bar, number < len(ways)), None
                try:
                    if latent is not None:
                        close = trials.closeness(latent, recorded.latent)
                except ValueError as fault:
                    raise Failed(f"the trial by {way.method} {way.settings} cannot be measured: {fault}") from fault
                way.add(recorded.number, gathered(close, self.group.own)[0])
                self.spent += way.cost

    def latent(self, recorded: Recorded, way: trials.Trial, bar: tqdm, more: bool) -> torch.Tensor | None:
        """Returns the final latent on the CPU, or None where this process gets none. more: whether another trial of the
        prompt follows; the transformer then stays on the GPU once the text encoder no longer needs the room."""
        pipeline, schedule, models = self.pipeline, way.schedule, backend().transformers(self.pipeline)
        known = [out if spared else None for out, spared in zip(recorded.outputs, way.known, strict=False)]
        runner = Continued(patch.CACHES[schedule.target](schedule), known, pipeline.device)
        patch.attach(models, runner, lambda call, reused: bar.update(not (reused or runner.knows(call))))
        with ExitStack() as stack:
            if more and recorded.inputs.get("text_encoder"):  # of the `wan` here
                stack.enter_context(patch.shadowed(pipeline, {"afterwards": lambda offload_model: None}))
            stack.enter_context(self.only_denoising(recorded))
            stack.enter_context(bars_replaced(pipeline))
            latent = self.generate(recorded.request, schedule.steps)
        return None if latent is None else latent.cpu()

    @contextmanager
    def only_denoising(self, recorded: Recorded) -> Iterator[None]:
        """Lets the pipeline return latents, and encode the prompt's inputs only once."""
        pipeline = self.pipeline
        encoders = ((pipeline, "text_encoder"), (pipeline.vae, "encode"), (getattr(pipeline, "clip", None), "visual"))
        with ExitStack() as stack:
            stack.enter_context(patch.shadowed(pipeline.vae, {"decode": lambda latents, *args, **kwargs: latents}))
            for owner, name in encoders:
                if hasattr(owner, name):
                    encode = remembered(getattr(owner, name), recorded.inputs.setdefault(name, []))
                    model = {"model": encode.model} if name == "visual" and recorded.inputs[name] else {}
                    stack.enter_context(patch.shadowed(owner, {name: encode} | model))
            yield

    def entry(self, requests: Sequence[Request]) -> dict:
        """Returns what the table holds of the trials of these requests, the first ones."""
        rows = [*self.candidates, *(way for way in self.forecasts if way not in self.candidates), *self.others]
        prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
        return trials.entry([row for row in rows if row.psnr], prompts, seeds, self.constants or DEFAULT)
