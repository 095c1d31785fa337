"""Watches a Wan pipeline while it generates: one progress bar over the steps, and where the time goes.

Works from the outside, by hooks on what this repo's pipelines and upstream's have in common: `model`, `text_encoder`,
`vae`, and a `tqdm` of their own over the steps, which this one stands in for. On a GPU the times are those of events in
its queue, so that it is waited for once a step only, by the bar, and once by the look for NaN.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from tqdm import tqdm

from magcache.app.errors import NotFinite
from magcache.app.step_map import step_map
from magcache.patch import shadowed
from magcache.schedule import Schedule

PHASES = ("text", "inputs", "computed", "reused", "sampler", "decode")
LOG_SECONDS = 30  # between two lines where a bar would flood a log


def moment() -> "float | torch.cuda.Event":
    """Now: an event in the GPU's queue, or where there is none, a time in seconds."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Waits until the GPU has come to the end."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class Watch:
    """What happened in one generation. Every moment counts to one phase: text: text encoder. inputs: encoding of images
    and videos, the transformer's way to the GPU. computed, reused: calls of the transformer. sampler: the rest of the
    steps. decode: VAE, and what comes after it. `reused` holds for every call so far whether it was, `calls` (whether
    it was reused, seconds) of those that are timed: all of the steps before. `latent` is a copy of what was decoded, on
    the CPU; None where this process decodes nothing."""

    def __init__(self, schedule: Schedule, show: bool):
        self.schedule, self.show = schedule, show
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.reused: list[bool] = []
        self.calls: list[tuple[bool, float]] = []
        self.bar = self.latent = None
        self.start = self.clock = moment()
        self.noted: list[tuple[str, float | torch.cuda.Event]] = []  # ends of phases that are not timed yet
        self.sound = 0  # steps after which the latent was finite
        self.logged = -LOG_SECONDS

    def lap(self, phase: str) -> None:
        """The time since what came before belongs to this phase."""
        self.noted.append((phase, moment()))
        for noted, end in self.noted:
            passed, self.clock = seconds_between(self.clock, end), end
            self.seconds[noted] = self.seconds.get(noted, 0.0) + passed
            if noted in ("computed", "reused"):
                self.calls.append((noted == "reused", passed))
        self.noted.clear()

    def called(self, call: int, reused: bool) -> None:
        """The model has been called: what `magcache.apply_magcache` takes as `on_call`."""
        self.reused.append(reused)
        self.noted.append(("reused" if reused else "computed", moment()))

    def steps(self, timesteps: Iterable, *args, **kwargs) -> Iterator:
        """Stands in for the pipeline's `tqdm`."""
        for timestep in timesteps:
            self.after_step()
            yield timestep
        self.after_step()

    def after_step(self) -> None:
        """Or before the first one."""
        self.lap("sampler" if self.reused else "inputs")
        if self.show and self.reused:
            self.tell()

    def after_text(self, *_) -> None:
        self.lap("text")

    def before_call(self, _, args: tuple) -> None:
        """A hook of the model. args: of its call, the first of them the latents of its step."""
        if self.reused and len(self.reused) % self.schedule.calls_per_step == 0:
            self.check(args[0])

    def check(self, latents: list[torch.Tensor]) -> None:
        """Raises NotFinite if a step since the last check has left NaN or infinity in the latents, which no later one
        mends."""
        done = len(self.reused) // self.schedule.calls_per_step
        if all(torch.isfinite(latent).all() for latent in latents):
            self.sound = done
            return
        calls = self.reused[self.sound * self.schedule.calls_per_step :]
        kinds = ", ".join("reused" if reused else "computed" for reused in calls)
        steps = f"step {done}" if done == self.sound + 1 else f"steps {self.sound + 1} to {done}"
        step = f"{steps} of {self.schedule.steps} ({kinds})"
        causes = "check the weights, --sample_guide_scale and --sample_shift"
        raise NotFinite(f"the latent became NaN or infinite in {step}; nothing is saved; {causes}")

    def timed(self, function: Callable, before: str = "", after: str = "") -> Callable:
        """The function, with a lap of these phases before and after it."""

        def run(*args, **kwargs):
            if before:
                self.lap(before)
            out = function(*args, **kwargs)
            if after:
                self.lap(after)
            return out

        return run

    def decoding(self, decode: Callable) -> Callable:
        """The VAE's method, with what is checked, kept and timed of it."""
        timed = self.timed(decode, "sampler")

        def run(latents, *args, **kwargs):
            self.check(latents)
            self.latent = latents[0].to("cpu", copy=True)
            return timed(latents, *args, **kwargs)

        return run

    def tell(self) -> None:
        """One more step is done: moves the bar, or writes a line to a log if it is time for one."""
        per_step, steps = self.schedule.calls_per_step, self.schedule.steps
        done = len(self.calls) // per_step
        kinds = {reused for reused, _ in self.calls[-per_step:]}
        kind = "half reused" if len(kinds) == 2 else "reused" if kinds.pop() else "computed"
        left = seconds_left(self.calls, self.schedule, self.seconds["sampler"])
        text = f"{done}/{steps} {kind}, about {tqdm.format_interval(round(left))} left"
        if done == steps:
            spent = sum(self.seconds[phase] for phase in ("computed", "reused", "sampler"))
            text = f"{done}/{steps} in {tqdm.format_interval(round(spent))}"
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = tqdm(total=steps, bar_format="{desc}", disable=False, dynamic_ncols=True, leave=None)
            room = max(10, (self.bar.ncols or 80) - len(f"denoise [] {steps}/{steps} half reused, about 0:00:00 left "))
            row = [all(r for r, _ in self.calls[i : i + per_step]) for i in range(0, len(self.calls), per_step)]
            steps_so_far = step_map([*row, *[None] * (steps - done)], min(room, steps))
            self.bar.set_description_str(f"denoise [{steps_so_far}] {text}", refresh=done == steps)
            self.bar.update()
        elif time.perf_counter() - self.logged >= LOG_SECONDS or done == steps:
            self.logged = time.perf_counter()
            print(f"denoise {text}", file=sys.stderr, flush=True)


def seconds_left(calls: Sequence[tuple[bool, float]], schedule: Schedule, between: float) -> float:
    """Estimate for the rest of the steps: calls to compute and calls to reuse at the mean time of each kind so far, and
    what was spent `between` the calls so far in proportion. The first step counts only while there is no other, since
    it warms up."""
    total = 0.0
    rest = schedule.reuse[len(calls) :]
    for kind in (False, True):
        later = [seconds for reused, seconds in calls[schedule.calls_per_step :] if reused == kind]
        seen = later or [seconds for reused, seconds in calls if reused == kind]
        total += rest.count(kind) * statistics.fmean(seen) if seen else 0.0
    return total + between * len(rest) / max(1, len(calls))


@contextlib.contextmanager
def bars_replaced(pipeline, bar: Callable = lambda timesteps, *args, **kwargs: timesteps) -> Iterator[None]:
    """Has another one stand in for the pipeline's own bar over its steps; none, by default."""
    with contextlib.ExitStack() as stack:
        for module in {sys.modules[cls.__module__] for cls in type(pipeline).__mro__}:
            if "tqdm" in vars(module):
                stack.enter_context(shadowed(module, {"tqdm": bar}))
        yield


@contextlib.contextmanager
def watched(pipeline, schedule: Schedule, show: bool = True) -> Iterator[Watch]:
    """Watches `pipeline` while it generates one video in this block, if the calls of its model are told to
    `Watch.called`. schedule: of the calls. show: whether this process has the bar, on stderr; where that is no
    terminal, a line every 30 seconds."""
    watch = Watch(schedule, show)
    with contextlib.ExitStack() as stack:
        stack.callback(pipeline.model.register_forward_pre_hook(watch.before_call).remove)
        # without these the time only counts elsewhere
        encoder, vae = getattr(getattr(pipeline, "text_encoder", None), "model", None), getattr(pipeline, "vae", None)
        if isinstance(encoder, torch.nn.Module):
            stack.callback(encoder.register_forward_hook(watch.after_text).remove)
        del encoder  # the pipeline frees it when it is done
        if hasattr(vae, "encode") and hasattr(vae, "decode"):
            timed = {"encode": watch.timed(vae.encode, after="inputs"), "decode": watch.decoding(vae.decode)}
            stack.enter_context(shadowed(vae, timed))
        stack.enter_context(bars_replaced(pipeline, watch.steps))
        try:
            yield watch
            watch.lap("decode")
        finally:
            if watch.bar is not None:
                watch.bar.close()
