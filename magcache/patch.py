"""Runs a schedule on one Wan transformer instance, and takes itself off again without a trace.

A Wan forward embeds its inputs, loops over `self.blocks`, and applies the head. While the patched forward runs, the
instance's own attribute `blocks` hides the block list behind a single step that either calls all blocks or adds a
cached residual. Nothing of the forward is copied, so it may be any: this repo's, upstream's, a sequence-parallel one
that the instance carries, one under FSDP. On reuse no block is called at all, so no weights are gathered for it.
"""

import functools
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from magcache.schedule import Schedule

# methods of a Wan transformer that make what only its blocks take: VACE's hints, text and time in this repo's models
FOR_BLOCKS_ONLY = ("forward_vace", "embed_context", "project_time")


class Runner(Protocol):
    """What stands in for the loop over the blocks; see `ResidualCache` and `magcache.calibrate.Calibration`."""

    calls: int

    def reset(self) -> None:
        """Forgets everything of the current run: a run begins, or has failed."""

    def skips(self, call: int) -> bool:
        """Whether this call runs no block."""

    def step(self, call: int, blocks: torch.nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """Maps the embedded tokens x [B, L, C] to what the head gets; kwargs are the blocks' own."""

    def watched(self, call: int, dit: torch.nn.Module) -> dict[str, Callable]:
        """What else stands in for attributes of the transformer during this call."""

    def done(self, call: int, seconds: float) -> None:
        """The call has returned after so many seconds."""


class ResidualCache:
    """Executes a `Schedule`: keeps at most `schedule.history` residuals per branch (while a computed call is corrected,
    its own besides), none outside a run.

    dtype: of the cached residuals; None keeps them as computed (float32 in Wan).
    device: where they wait, such as "cpu" to spare GPU memory; None leaves them where they are.
    `log` holds (call, whether it was skipped, wall time in seconds) of every call since the cache was applied.
    """

    def __init__(self, schedule: Schedule, dtype: torch.dtype | None = None, device: str | None = None):
        self.schedule, self.dtype, self.device = schedule, dtype, device
        self.calls = len(schedule.weights)
        self.compute_dtype = None  # of the residuals before `dtype`
        self.log: list[tuple[int, bool, float]] = []
        self.reset()

    def reset(self) -> None:
        self.residuals = [[] for _ in range(self.schedule.calls_per_step)]  # per branch, newest first

    def skips(self, call: int) -> bool:
        return call < self.calls and self.schedule.weights[call] is not None

    def step(self, call: int, blocks: torch.nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
        residuals = self.residuals[call % self.schedule.calls_per_step]
        if self.skips(call):
            for weight, residual in zip(self.schedule.weights[call], residuals, strict=False):
                x = torch.add(x, residual.to(x.device, self.compute_dtype), alpha=weight)
            return x
        correction = self.schedule.corrections[call] if call < self.calls else ()
        used_later = call < self.calls and self.schedule.used_later[call]
        history = self.schedule.history if used_later else 0  # older residuals serve only along with this one
        del residuals[max(0, history - 1, len(correction) - 1) :]  # frees the memory before the blocks need it
        out = run_blocks(blocks, x, kwargs)
        if not correction and not used_later:
            return out
        residual = out.detach() - x.detach()
        self.compute_dtype = residual.dtype
        for weight, source in zip(correction, [residual, *residuals], strict=False):
            out = torch.add(out, source.to(out.device, residual.dtype), alpha=weight)
        if used_later:
            residuals.insert(0, residual.to(self.device or residual.device, self.dtype or residual.dtype))
        del residuals[history:]
        return out

    def watched(self, call: int, dit: torch.nn.Module) -> dict[str, Callable]:
        if not self.skips(call):
            return {}
        return {name: lambda *args, **kwargs: None for name in FOR_BLOCKS_ONLY if hasattr(type(dit), name)}

    def done(self, call: int, seconds: float) -> None:
        self.log.append((call, self.skips(call), seconds))
        if call == self.calls - 1:
            self.reset()  # the VAE decodes next and wants the memory
        elif call == self.calls:
            warnings.warn(
                f"the schedule ends after {self.calls} transformer calls but the run goes on; "
                "the calls beyond it are computed in full",
                stacklevel=2,
            )


class CallCounter:
    """Numbers the calls of a run. A run starts when the timestep rises, or when all calls are done and it is back at
    the first one. Steps are told apart by counting, since neighbouring steps may share an integer timestep."""

    def __init__(self, calls: int):
        self.calls = calls
        self.reset()

    def reset(self) -> None:
        self.call = self.first = self.last = None

    def next(self, timestep: float) -> int:
        finished = self.call is not None and self.call + 1 >= self.calls
        if self.call is None or timestep > self.last or (finished and timestep >= self.first):
            self.call, self.first = -1, timestep
        self.call, self.last = self.call + 1, timestep
        return self.call


def run_blocks(blocks: torch.nn.Module, x: torch.Tensor, kwargs: dict) -> torch.Tensor:
    for block in blocks:
        x = block(x, **kwargs)
    return x


def find_dit(model: torch.nn.Module) -> torch.nn.Module:
    """The module that owns `blocks`, below wrappers such as FSDP1 or DDP. Raises TypeError if there is none."""
    module = model
    while isinstance(module, torch.nn.Module):
        if "blocks" in module._modules:
            return module
        module = getattr(module, "module", None)
    raise TypeError(f"{type(model).__name__} is not a Wan transformer: it has no `blocks`")


@contextmanager
def shadowed(obj: object, attributes: dict) -> Iterator[None]:
    """Instance attributes for the time of the block. They hide modules and methods of the same name, which stay."""
    before = {name: obj.__dict__[name] for name in attributes if name in obj.__dict__}
    obj.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del obj.__dict__[name]
        obj.__dict__.update(before)


class Attachment:
    """Ties a runner to an instance; lives in the instance, so that a deep copy of the model has its own."""

    def __init__(self, runner: Runner, own_forward: Callable | None):
        self.runner = runner
        self.own_forward = own_forward  # the instance's own forward, which sequence parallelism sets
        self.counter = CallCounter(runner.calls)

    def forward(self, dit: torch.nn.Module, *args, **kwargs):
        timestep = kwargs["t"] if "t" in kwargs else args[1]
        call = self.counter.next(float(timestep.flatten()[0]))  # waits for the device, so the clock below is right
        if call == 0:
            self.runner.reset()
        start = time.perf_counter()
        attributes = {"blocks": [functools.partial(self.runner.step, call, dit.blocks)]}
        attributes |= self.runner.watched(call, dit)
        try:
            with shadowed(dit, attributes):
                forward = self.own_forward or functools.partial(type(dit).forward, dit)
                out = forward(*args, **kwargs)
            if timestep.is_cuda:
                torch.cuda.synchronize(timestep.device)
        except BaseException:
            self.counter.reset()
            self.runner.reset()
            raise
        self.runner.done(call, time.perf_counter() - start)
        return out


def attach(model: torch.nn.Module, runner: Runner) -> None:
    """Lets `runner` stand in for the block loop of this instance, in place of any runner attached before."""
    dit = find_dit(model)
    remove_magcache(dit)
    dit.__dict__["_magcache"] = Attachment(runner, dit.__dict__.get("forward"))
    dit.__dict__["forward"] = types.MethodType(_attached_forward, dit)


def _attached_forward(self, *args, **kwargs):
    return self._magcache.forward(self, *args, **kwargs)


def apply_magcache(
    model: torch.nn.Module,
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> ResidualCache:
    """Makes this instance (not its class) follow the schedule from its next call on, which starts a run.

    model: a Wan transformer, this repo's or upstream's, bare or wrapped in FSDP.
    dtype, device: of the cached residuals, see `ResidualCache`, which is returned and holds the times of the calls.

    Applying again replaces the schedule and starts afresh. Raises TypeError if the model has no `blocks`, RuntimeError
    if its `forward` was replaced since the last time (see `remove_magcache`).
    """
    cache = ResidualCache(schedule, dtype, device)
    attach(model, cache)
    return cache


def remove_magcache(model: torch.nn.Module) -> None:
    """Restores the instance exactly as it was; does nothing where nothing is attached.

    Raises TypeError if the model has no `blocks`, RuntimeError if its `forward` was replaced since: hooks that do so
    (accelerate's, diffusers' offloading) go on before `apply_magcache` and come off after `remove_magcache`.
    """
    dit = find_dit(model)
    if "_magcache" not in dit.__dict__:
        return
    if getattr(dit.__dict__.get("forward"), "__func__", None) is not _attached_forward:
        raise RuntimeError("the model's forward was replaced after apply_magcache: take that hook off first")
    attachment = dit.__dict__.pop("_magcache")
    del dit.__dict__["forward"]
    if attachment.own_forward is not None:
        dit.__dict__["forward"] = attachment.own_forward
