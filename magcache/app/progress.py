"""Watches a Wan pipeline while it generates: one progress bar over the steps, and where the time goes.

Works from the outside, by hooks on what this repo's pipelines and upstream's have in common: `model`, `text_encoder`,
`vae`, and a `tqdm` of their own over the steps, which this one stands in for. On a GPU the times are those of events in
its queue, so that it is waited for once a step only, by the bar, and once by the look for NaN; and once for every
latent frame that is decoded.
"""

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from tqdm import tqdm

from magcache.app.backend import backend
from magcache.app.errors import NotFinite
from magcache.app.step_map import step_map
from magcache.patch import shadowed
from magcache.schedule import Schedule

PHASES = ("text", "inputs", "computed", "reused", "sampler", "decode")
LOG_SECONDS = 30  # between two lines where a bar would flood a log


def moment() -> "float | torch.cuda.Event":
    """Marks now: an event in the GPU's queue, or without a GPU a time in seconds."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def reached() -> "float | torch.cuda.Event":
    """Marks now, and waits until the GPU is there."""
    now = moment()
    if not isinstance(now, float):
        now.synchronize()
    return now


def seconds_between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Returns the seconds between two moments, both of which the GPU has reached."""
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000


class Watch:
    """What happened in one generation. Every moment counts to one phase: text: text encoder. inputs: encoding of images
    and videos, the transformer's way to the GPU and back. computed, reused: calls of the transformer. sampler: the rest
    of the steps. decode: VAE, and what comes after it. `reused` holds for every call so far whether it was, `calls`
    (whether it was reused, seconds) of those that are timed: all of the steps before. `latent` is a copy of what was
    decoded, on the CPU, `video` what it was decoded to, [3, F, H, W] in [-1, 1]; None where this process decodes
    nothing. `latent_psnr`: of the latent against the uncached one, if compared."""

    def __init__(self, schedule: Schedule, show: bool, decoding: float | None = None):
        """decoding: the expected seconds of decoding, None if unknown."""
        self.schedule, self.show, self.expected = schedule, show, decoding
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.reused: list[bool] = []
        self.calls: list[tuple[bool, float]] = []
        self.bar = self.latent = self.video = self.latent_psnr = None
        self.start = self.clock = moment()
        self.noted: list[tuple[str, float | torch.cuda.Event]] = []  # ends of phases that are not timed yet
        self.sound = 0  # steps after which the latent was finite
        self.logged = -LOG_SECONDS

    def lap(self, phase: str) -> None:
        """Counts the time since the last lap to this phase."""
        for noted, end in [*self.noted, (phase, reached())]:
            passed, self.clock = seconds_between(self.clock, end), end
            self.seconds[noted] = self.seconds.get(noted, 0.0) + passed
            if noted in ("computed", "reused"):
                self.calls.append((noted == "reused", passed))
        self.noted.clear()

    def called(self, call: int, reused: bool) -> None:
        """Notes a call of the model; `magcache.apply_magcache` takes this as `on_call`."""
        self.reused.append(reused)
        self.noted.append(("reused" if reused else "computed", moment()))

    def steps(self, timesteps: Iterable, *args, **kwargs) -> Iterator:
        """Stands in for the pipeline's `tqdm`."""
        for timestep in itertools.chain(timesteps, [None]):
            self.lap("sampler" if self.reused else "inputs")
            if self.show and self.reused:
                self.tell()
            if timestep is not None:
                yield timestep

    def calling(self, module: torch.nn.Module, args: tuple) -> None:
        """Is called before the transformer, which may just have been moved."""
        self.check(args[0])
        if not self.noted:
            self.noted.append(("inputs", moment()))

    def check(self, latents: list[torch.Tensor]) -> None:
        """Raises NotFinite if a step since the last check has left NaN or infinity in the latents, which no later one
        mends."""
        done, within = divmod(len(self.reused), self.schedule.calls_per_step)
        if not done or within:
            return
        if all(torch.isfinite(latent).all() for latent in latents):
            self.sound = done
            return
        calls = self.reused[self.sound * self.schedule.calls_per_step :]
        kinds = ", ".join("reused" if reused else "computed" for reused in calls)
        steps = f"step {done}" if done == self.sound + 1 else f"steps {self.sound + 1} to {done}"
        step = f"{steps} of {self.schedule.steps} ({kinds})"
        causes = "check the weights, --sample_guide_scale and --sample_shift"
        raise NotFinite(f"the latent became NaN or infinite in {step}; nothing is saved; {causes}")

    def decoding(self, vae) -> Callable:
        """Wraps the VAE's decode, to check and keep the latent and to show the progress."""
        decode, model = vae.decode, getattr(vae, "model", None)

        def run(latents, *args, **kwargs):
            self.check(latents)
            self.latent = latents[0].to("cpu", copy=True)
            self.lap("inputs")
            with contextlib.ExitStack() as stack:
                if self.show:
                    say = self.decoded(latents[0].shape[1])
                    say()
                    # the decoder takes one frame of the latent after another, or of each tile
                    if isinstance(model, torch.nn.Module) and not getattr(model, "use_tiling", False):
                        stack.callback(model.decoder.register_forward_hook(say).remove)
                return decode(latents, *args, **kwargs)

        return run

    def decoded(self, frames: int) -> Callable:
        """Returns a function that says how many of the latent frames are decoded, one more with every call."""
        start, numbers = reached(), itertools.count()

        def say(*_) -> None:
            done = next(numbers)
            spent = seconds_between(start, reached())
            left = f", about {tqdm.format_interval(round(spent / done * (frames - done)))} left" if done else ""
            self.say(f"decode {done}/{frames} latent frames{left}", done == 0)

        return say

    def tell(self) -> None:
        """Shows that one more step is done: moves the bar, or writes a line to a log if it is time for one."""
        per_step, steps = self.schedule.calls_per_step, self.schedule.steps
        done = len(self.calls) // per_step
        kinds = {reused for reused, _ in self.calls[-per_step:]}
        kind = "half reused" if len(kinds) == 2 else "reused" if kinds.pop() else "computed"
        left = seconds_left(self.calls, self.schedule, self.seconds["sampler"])
        left = tqdm.format_interval(round(left + (self.expected or 0.0)))
        text = f"{done}/{steps} {kind}, about {left} left" + (", then decoding" if self.expected is None else "")
        if done == steps:
            spent = sum(self.seconds[phase] for phase in ("computed", "reused", "sampler"))
            text = f"{done}/{steps} in {tqdm.format_interval(round(spent))}"
        if (bar := self.terminal()) is not None:
            longest = f"denoise [] {steps}/{steps} half reused, about 0:00:00 left, then decoding "
            room = max(10, (bar.ncols or 80) - len(longest))
            row = [all(r for r, _ in self.calls[i : i + per_step]) for i in range(0, len(self.calls), per_step)]
            text = f"[{step_map([*row, *[None] * (steps - done)], min(room, steps))}] {text}"
        self.say(f"denoise {text}", done == steps)
        if done == steps:
            self.close()

    def terminal(self) -> tqdm | None:
        """Returns the bar, if stderr is a terminal."""
        if self.bar is None and sys.stderr.isatty():
            self.bar = tqdm(bar_format="{desc}", disable=False, dynamic_ncols=True, leave=None)
        return self.bar

    def say(self, line: str, always: bool) -> None:
        """Replaces the line on a terminal; writes it to a log if it is time for a line there, or `always`."""
        if (bar := self.terminal()) is not None:
            bar.set_description_str(line)
        elif always or time.perf_counter() - self.logged >= LOG_SECONDS:
            self.logged = time.perf_counter()
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the line that the terminal shows."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


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
def watched(pipeline, schedule: Schedule, show: bool = True, decoding: float | None = None) -> Iterator[Watch]:
    """Watches `pipeline` while it generates one video in this block, if the calls of its model are told to
    `Watch.called`. schedule: of the calls. show: whether this process has the bar, on stderr; where that is no
    terminal, a line every 30 seconds. decoding: the seconds that it will take, where they are known."""
    watch = Watch(schedule, show, decoding)
    with contextlib.ExitStack() as stack:
        for model in backend().transformers(pipeline):
            stack.callback(model.register_forward_pre_hook(watch.calling).remove)
        # without these the time only counts elsewhere
        encoder, vae = getattr(getattr(pipeline, "text_encoder", None), "model", None), getattr(pipeline, "vae", None)
        if isinstance(encoder, torch.nn.Module):
            stack.callback(encoder.register_forward_hook(lambda *_: watch.lap("text")).remove)
        del encoder  # the pipeline frees it when it is done
        if hasattr(vae, "decode"):
            stack.enter_context(shadowed(vae, {"decode": watch.decoding(vae)}))
        stack.enter_context(bars_replaced(pipeline, watch.steps))
        try:
            yield watch
            watch.lap("decode")
        finally:
            watch.close()
