"""Makes one transformer instance follow a schedule, and restores it exactly afterwards.

The instance gets a class of its own, which hands every call to what is attached (`Attachment`) before anything of the
model runs, hooks and FSDP's gathering included. No code of a forward is copied, so any will do: this repository's,
upstream's, diffusers', a sequence-parallel one that the instance carries, one under FSDP.

Outputs: a call that does not compute returns a combination of earlier outputs, and the model does not run.
Residuals: a Wan forward embeds its inputs, loops over `self.blocks`, and applies the head. While it runs, the
instance's own attribute `blocks` hides the block list: a first step either calls all blocks or adds the cached
residual, and the other steps only check that the loop does nothing else. On reuse no block is called at all, so no
weights are gathered for it.
"""

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from magcache.schedule import CALLS_PER_STEP, Schedule

FORECAST_INSTEAD = "use output forecasts (magcache.plan_speedup)"


OnCall = Callable[[int, bool], None]


class Runner(Protocol):
    """Executes the calls of a model; see `Cache` and `magcache.calibrate.Calibration`."""

    calls: int  # of a run
    calls_per_step: int
    sigmas: Sequence[float] | None  # noise levels of the steps, see `CallCounter`
    switch: int | None  # first step of a second transformer, None where any may be called

    def reset(self) -> None:
        """Forgets everything about the current run, because a run begins or has failed."""

    def skips(self, call: int) -> bool:
        """Whether the call does not compute."""

    def run(self, call: int, model: torch.nn.Module, forward: functools.partial) -> Any:
        """Returns what the call returns. `forward()` runs the model as it is; `forward.args[1:]` are the positional
        arguments of the call."""


class Cache:
    """Executes a `Schedule`: keeps at most `schedule.history` residuals or outputs per branch, none outside a run.

    dtype: of what is cached; None keeps that of the computation (float32 in Wan).
    device: where it is kept, such as "cpu" to save GPU memory; None leaves it where it is.
    """

    def __init__(self, schedule: Schedule, dtype: torch.dtype | None = None, device: str | None = None):
        self.schedule, self.dtype, self.device = schedule, dtype, device
        self.calls, self.calls_per_step = len(schedule.weights), schedule.calls_per_step
        self.sigmas, self.switch = schedule.sigmas, schedule.switch
        self.reset()

    def reset(self) -> None:
        self.kept = [[] for _ in range(self.calls_per_step)]  # per branch, newest first

    def skips(self, call: int) -> bool:
        return call < self.calls and self.schedule.weights[call] is not None

    def run(self, call: int, model: torch.nn.Module, forward: Callable[[], Any]) -> Any:
        out = self.answer(call, model, forward)
        if call == self.calls - 1:
            self.reset()  # the VAE decodes next and wants the memory
        return out

    def branch(self, call: int) -> list:
        return self.kept[call % self.calls_per_step]

    def make_room(self, call: int) -> bool:
        """Frees, before a call computes, what no later call needs. Returns whether a later call needs its result."""
        wanted = call < self.calls and self.schedule.used_later[call]
        # what is older serves only along with this one
        del self.branch(call)[self.schedule.history - 1 if wanted else 0 :]
        return wanted

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor in the form in which it is kept."""
        small = tensor.detach().to(self.dtype or tensor.dtype)  # before the move, so that less is moved
        return small.to(self.device or tensor.device)


class ResidualCache(Cache):
    """Executes a schedule with the target "residual" on a Wan transformer."""

    compute_dtype = None  # of the residuals before `dtype`

    def answer(self, call: int, model: torch.nn.Module, forward: Callable[[], Any]) -> Any:
        dit = find_dit(model)
        hints = self.skips(call) and hasattr(dit, "forward_vace")  # which only the blocks use
        with (
            shadowed(dit, {"forward_vace": lambda *args, **kwargs: None} if hints else {}),
            blocks_hidden(dit, functools.partial(self.step, call)),
        ):
            return forward()

    def step(self, call: int, blocks: torch.nn.Module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.skips(call):
            (residual,) = self.branch(call)
            return x + residual.to(x.device).to(self.compute_dtype)
        wanted = self.make_room(call)
        out = run_blocks(blocks, x, *args, **kwargs)
        if wanted:
            residual = out.detach() - x.detach()
            self.compute_dtype = residual.dtype
            self.branch(call).insert(0, self.stored(residual))
        return out


class OutputCache(Cache):
    """Executes a schedule with the target "output" on any module that returns tensors, alone or in a list, a tuple, a
    dictionary or an output class of diffusers."""

    def answer(self, call: int, model: torch.nn.Module, forward: Callable[[], Any]) -> Any:
        if self.skips(call):
            return self.combined(call)
        wanted = self.make_room(call)
        out = forward()
        if wanted:
            tensors, self.structure = tree_flatten(out)
            self.like = [(tensor.device, tensor.dtype) for tensor in tensors]
            # copies, as the caller may change what it got in place
            self.branch(call).insert(0, [self.stored(tensor.clone()) for tensor in tensors])
        return out

    def reset(self) -> None:
        super().reset()
        self.structure = self.like = None  # of what the model returns

    def combined(self, call: int) -> Any:
        """Combines earlier outputs, summed in float32 (or wider) and returned in the model's output dtype."""
        tensors = []
        for (device, dtype), *sources in zip(self.like, *self.branch(call), strict=True):
            wide = torch.promote_types(dtype, torch.float32)
            terms = zip(self.schedule.weights[call], sources, strict=False)
            tensors.append(sum(weight * source.to(device).to(wide) for weight, source in terms).to(dtype))
        return tree_unflatten(tensors, self.structure)


CACHES = {"residual": ResidualCache, "output": OutputCache}  # by the target of a schedule


class CallCounter:
    """Numbers the calls of a run. The first call that shows that the run does not fit the plan sets `fits` to False, up
    to the end of the run, and `notice` to the reason.

    A run starts when the timestep rises, when the latents have other shapes than before, when another thread calls, or
    when all calls are done and the timestep is back at the first one. The rest of a run that another thread's call has
    cut in two does not fit. Steps are told apart by counting, as neighbouring ones may share an integer timestep. With
    `sigmas`, the noise levels of the steps, a run also starts where the timestep is that of the first level and not of
    the next, and every timestep has to be that of its level, on a scale of 1000 or of 1. With `switch`, the steps
    from that one on are the second transformer's, and those before the first's.

    `doubtful`: the run began at the timestep of the call before it. Either the run before ended in its first step, or
    it goes on with more calls per step than planned.
    """

    def __init__(
        self,
        calls: int,
        calls_per_step: int = CALLS_PER_STEP,
        sigmas: Sequence[float] | None = None,
        switch: int | None = None,
    ):
        self.calls, self.calls_per_step, self.sigmas, self.switch = calls, calls_per_step, sigmas, switch
        self.reset()

    def reset(self) -> None:
        self.call = self.first = self.last = self.shapes = self.notice = None
        self.fall, self.fits, self.doubtful = 0.0, True, False
        self.thread, self.interrupted = threading.get_ident(), False

    def next(self, timestep: float, resolution: float = 1.0, shapes: Sequence = (), expert: int = 0) -> int:
        """Returns the number of the call. resolution: neighbouring steps can share a timestep only if they are less
        than this apart; then so are the steps before them, since the steps of a run grow. shapes: those of the latents.
        expert: 0 for the first transformer, 1 for the second."""
        self.notice = None
        if self.call is None or self.starts(timestep, resolution, shapes, expert):
            self.start(timestep, shapes)
        self.call, fall = self.call + 1, self.last - timestep
        if self.fits and (misfit := self.misfit(timestep, fall, resolution, expert)):
            self.notice, self.fits = f"{misfit}; the run is computed in full from here", False
        elif self.fits and self.call == self.calls:
            self.notice = f"the schedule ends after {self.calls} transformer calls; those beyond it are computed"
        self.last, self.fall = timestep, fall
        return self.call

    def starts(self, timestep: float, resolution: float, shapes: Sequence, expert: int) -> bool:
        """Whether this is the first call of another run."""
        if timestep > self.last or shapes != self.shapes or self.thread != threading.get_ident():
            return True
        following = self.call + 1
        if self.sigmas is None:
            return following >= self.calls and timestep >= self.first
        goes_on = self.fits and following < self.calls
        goes_on = goes_on and self.is_level(following // self.calls_per_step, timestep, resolution)
        return not goes_on and self.is_level(0, timestep, resolution) and not self.other_expert(0, expert)

    def start(self, timestep: float, shapes: Sequence) -> None:
        ended, known, doubtful = self.call, self.sigmas is not None or not self.fits, timestep == self.last
        unfinished = ended is not None and ended + 1 < self.calls
        interrupted = unfinished and self.thread != threading.get_ident() and timestep < self.first
        first = self.first if interrupted else timestep  # so that what is left of more runs is recognised, too
        self.reset()
        self.call, self.first, self.last, self.shapes = -1, first, timestep, shapes
        self.doubtful, self.interrupted = doubtful, interrupted
        if unfinished and not known:
            self.notice = (
                f"the run before this one ended after {ended + 1} of {self.calls} transformer calls; if it was not "
                "stopped, plan for as many steps as a run has: what is cached waits for the others"
            )

    def misfit(self, timestep: float, fall: float, resolution: float, expert: int) -> str | None:
        """Says what does not fit in this call, or None."""
        if self.interrupted:
            return "another thread has called the model within this run"
        step, branch = divmod(self.call, self.calls_per_step)
        again = fall == 0 and self.fall > resolution
        if again if self.calls_per_step == 1 else fall > 0 and branch:
            planned = f"this run does not make {self.calls_per_step} transformer calls a step, as planned"
            return f"{planned} (calls_per_step of a plan is 2 with guidance, 1 without)"
        if self.sigmas is None or step >= len(self.sigmas):
            return None
        if self.is_level(step, timestep, resolution):
            return self.other_expert(step, expert)
        found = (
            f"step {step + 1} of this run is at timestep {timestep:g}, in the schedule at {self.timestep_at(step):.5g}"
        )
        return f"{found} (plan for the noise levels of the run: its steps, shift and solver, see noise_levels_of)"

    def other_expert(self, step: int, expert: int) -> str | None:
        """Says that the other transformer is planned for the step, or None."""
        if self.switch is None or expert == (step >= self.switch):
            return None
        called, planned = ("second", "first") if expert else ("first", "second")
        found = f"step {step + 1} of this run calls the {called} transformer, in the schedule the {planned}"
        return f"{found} (plan for the boundary of the run)"

    def timestep_at(self, step: int) -> float:
        return self.sigmas[step] * (1000 if self.first > 1 else 1)

    def is_level(self, step: int, timestep: float, resolution: float) -> bool:
        """Whether the timestep is that of the step's level, up to what a timestep may lose as a whole number."""
        lost = max(resolution, 1.0 if self.first > 1 else 0.001)
        return abs(timestep - self.timestep_at(step)) <= lost


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def timestep_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """Returns a call's argument `t` or `timestep`, or its second one. Raises TypeError if there is none."""
    found = [*(kwargs[name] for name in ("t", "timestep") if name in kwargs), *args[1:2]]
    if not found:
        raise TypeError("the call has no timestep: pass it as `t`, as `timestep` or as second argument")
    return torch.as_tensor(found[0])


def run_blocks(blocks: torch.nn.Module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Runs x [B, L, C] through all blocks. Raises RuntimeError if the result has another shape: it has no residual."""
    out = x
    for block in blocks:
        out = block(out, *args, **kwargs)
    if out.shape != x.shape:  # diffusers' context parallelism splits the tokens inside the first block
        raise RuntimeError(f"no residual of blocks that turn {[*x.shape]} into {[*out.shape]}: {FORECAST_INSTEAD}")
    return out


def find_dit(model: torch.nn.Module) -> torch.nn.Module:
    """Finds the module that owns `blocks`, below wrappers such as FSDP1 or DDP. Raises TypeError if there is none, or
    if it is compiled, as it would be compiled anew for every call of a run."""
    module = model
    while isinstance(module, torch.nn.Module):
        if "blocks" in module._modules and module._compiled_call_impl is None:
            return module
        module = getattr(module, "module", None)
    raise TypeError(f"{type(model).__name__} has no `blocks` with a residual, or is compiled: {FORECAST_INSTEAD}")


@contextmanager
def shadowed(obj: object, attributes: dict) -> Iterator[None]:
    """Sets instance attributes within this block. They hide modules and methods of the same name."""
    before = {name: obj.__dict__[name] for name in attributes if name in obj.__dict__}
    obj.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del obj.__dict__[name]
        obj.__dict__.update(before)


def blocks_hidden(dit: torch.nn.Module, step: Callable) -> AbstractContextManager:
    """Lets `step(blocks, x, *args, **kwargs)`, which maps the embedded tokens x [B, L, C] to what the head gets, stand
    in for the transformer's loop over its blocks; args and kwargs are the blocks' own. A loop that does more than hand
    every block what the one before returned, untouched, and all the same arguments, raises RuntimeError."""
    blocks, expected = dit.blocks, []

    def version(x: torch.Tensor) -> int | None:  # None: an inference tensor does not count its changes
        return None if x.is_inference() else x._version

    def first(x: torch.Tensor | None = None, /, *args, **kwargs) -> torch.Tensor:
        if x is None:
            raise RuntimeError(f"{type(dit).__name__} hands its blocks no tokens by position: {FORECAST_INSTEAD}")
        out = step(blocks, x, *args, **kwargs)
        expected[:] = version(out), out, *args, *kwargs.values()
        return out

    def other(x: torch.Tensor, /, *args, **kwargs) -> torch.Tensor:
        then, *objects = expected
        if then != version(x) or [*map(id, objects)] != [*map(id, (x, *args, *kwargs.values()))]:
            raise RuntimeError(f"{type(dit).__name__} does not only chain its blocks: {FORECAST_INSTEAD}")
        return x

    return shadowed(dit, {"blocks": [first, *[other] * (len(blocks) - 1)]})


class Attachment:
    """Ties a runner to one instance, or to two that share a run. It is stored in them, so a deep copy has its own."""

    def __init__(self, runner: Runner, on_call: OnCall | None):
        self.runner, self.on_call = runner, on_call
        self.counter = CallCounter(runner.calls, runner.calls_per_step, runner.sigmas, runner.switch)
        self.conditions = {}  # by branch
        self.lock = threading.RLock()  # held during a call, which changes the model and what is kept

    def __getstate__(self) -> dict:  # for a deep copy, which gets a lock of its own
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def call(self, expert: int, forward: functools.partial) -> Any:
        (model, *args), kwargs = forward.args, forward.keywords
        call, counter = self.count(args, kwargs, expert), self.counter
        if counter.notice:
            warnings.warn(counter.notice, stacklevel=3)
        if call == 0 or not counter.fits:
            self.runner.reset()
        follows = counter.fits and not (counter.doubtful and self.other_conditions(call, args, kwargs))
        try:
            out = self.runner.run(call, model, forward) if follows else forward()
            if self.on_call:
                self.on_call(call, follows and self.runner.skips(call))
        except BaseException:
            counter.reset()
            self.runner.reset()
            raise
        return out

    def count(self, args: Sequence, kwargs: dict, expert: int) -> int:
        """Counts the call and returns its number."""
        timestep = timestep_of(args, kwargs).max()
        value = float(timestep)  # waits for the device, unless the timestep is on the CPU
        rounding = value * torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
        resolution = max(rounding, 1.0 if value.is_integer() and value > 1 else 0.0)
        latents = next(iter((*args, *kwargs.values())))
        return self.counter.next(value, resolution, [tensor.shape for tensor in tensors_in(latents)], expert)

    def other_conditions(self, call: int, args: Sequence, kwargs: dict) -> bool:
        """Whether a call of the second step that would be skipped has other tensors, beside latents and timestep, than
        its branch had in the first step. If so, the two may belong to different videos."""
        step, branch = divmod(call, self.counter.calls_per_step)
        _, *others = (*args, *kwargs.values())
        timestep = timestep_of(args, kwargs)
        found = [id(tensor) for tensor in tensors_in(others) if tensor is not timestep]
        if step == 0:
            self.conditions[branch] = found
        return step == 1 and self.runner.skips(call) and found != self.conditions[branch]


ATTACHED = weakref.WeakSet()  # instances


@functools.cache
def attached_class(own_class: type, expert: int) -> type:
    """Makes the class of a model of `own_class` with something attached. It differs in its calls only, and refuses to
    be pickled, since no other process has such a class. expert: see `CallCounter.next`."""

    def __call__(self, *args, **kwargs):
        with self._magcache.lock:
            return self._magcache.call(expert, functools.partial(own_class.__call__, self, *args, **kwargs))

    def __reduce_ex__(self, protocol):  # of a deep copy, too
        make, arguments, *rest = super(attached, self).__reduce_ex__(protocol)
        return made_again, (NotPickled(), make, arguments), *rest

    own = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "_own_class": own_class}
    same = {name: getattr(own_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    attached = type(own_class.__name__, (own_class,), same | own)
    return attached


class NotPickled:
    def __deepcopy__(self, memo: dict) -> "NotPickled":
        return self

    def __reduce_ex__(self, protocol: int):
        raise TypeError("a model with a cache cannot be pickled: remove it first, by magcache.remove_magcache(model)")


def made_again(guard: NotPickled, make: Callable, arguments: tuple) -> Any:
    copied = make(*arguments)
    ATTACHED.add(copied)
    return copied


Models = torch.nn.Module | Sequence[torch.nn.Module]  # one, or two experts that share a run


def instances(models: Models) -> list[torch.nn.Module]:
    """Returns the models as a list. Raises ValueError for more than two, or for the same one twice."""
    found = list(models) if isinstance(models, list | tuple) else [models]
    if not 1 <= len({*map(id, found)}) == len(found) <= 2:
        raise ValueError(f"a cache is for one transformer, or for two instances that share a run, not for {len(found)}")
    return found


def attach(models: Models, runner: Runner, on_call: OnCall | None = None) -> None:
    """Hands the calls of these instances to `runner`, which replaces any that is attached. on_call: see
    `apply_magcache`."""
    remove_magcache(models)
    attachment = Attachment(runner, on_call)
    for expert, model in enumerate(instances(models)):
        model.__dict__["_magcache"] = attachment
        model.__class__ = attached_class(type(model), expert)
        ATTACHED.add(model)


def apply_magcache(
    model: Models,
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    on_call: OnCall | None = None,
) -> Cache:
    """Makes this instance (not its class) follow the schedule from its next call on, which starts a run.

    model: what the pipeline calls once per branch and step: a Wan transformer, this repository's, upstream's or
    diffusers', bare or wrapped in FSDP. With the target "output" it may be any module that is called that way, with a
    timestep as `t`, as `timestep` or as second argument. Or a list of the two transformers that share a run, for high
    and for low noise (Wan2.2); the schedule then needs their `boundary`.
    dtype, device: those of what is cached, see `Cache`. The cache is returned.
    on_call: is called after every call with its number in the run and whether it was reused. A GPU may still be at work
    on the call then: the only thing that waits for the device here is reading the timestep, if that is not on the CPU.

    Applying again replaces the schedule and starts afresh. A run that does not fit the schedule is computed in full
    from the first call that shows it, with a warning. With a schedule without noise levels, apply it again after a run
    that was stopped in its first step from outside the model: no later call can tell. Several threads may call the
    model: one waits for the other, and runs that take turns are computed.

    Raises TypeError if the model has no `blocks` and the target is "residual"; ValueError for two models and a schedule
    without a boundary, or one model and a schedule with one; RuntimeError if its class was changed since the last time
    (see `remove_magcache`). The first call raises RuntimeError if the target is "residual" and the model does not
    simply hand x [B, L, C] from block to block.

    >>> class Velocity(torch.nn.Module):
    ...     def forward(self, x, t):
    ...         return x * t
    >>> model, seen = Velocity(), []
    >>> schedule = magcache.Schedule((None, (1.0,)), calls_per_step=1, target="output")
    >>> _ = magcache.apply_magcache(model, schedule, on_call=lambda call, reused: seen.append(reused))
    >>> [model(torch.ones(1), t=torch.tensor(t)).item() for t in (5, 3)], seen
    ([5.0, 5.0], [False, True])
    """
    models = instances(model)
    if schedule.history and len(models) != 1 + (schedule.boundary is not None):
        both = "a schedule with a boundary is for the two transformers of high and of low noise, one without for one"
        raise ValueError(f"{both}; there {'are 2' if len(models) == 2 else 'is 1'}")
    for one in models if schedule.target == "residual" else ():
        find_dit(one)
    cache = CACHES[schedule.target](schedule, dtype, device)
    attach(models, cache, on_call)
    return cache


def remove_magcache(model: Models) -> None:
    """Restores the instance, and one that shares its cache, exactly as it was; does nothing if nothing is attached.

    Raises RuntimeError if its class was changed since: shard a model (`fully_shard`) before `apply_magcache`.
    """
    caches = [one.__dict__["_magcache"] for one in instances(model) if "_magcache" in one.__dict__]
    attached = [one for one in ATTACHED if one.__dict__.get("_magcache") in caches]
    if not all("_own_class" in vars(type(one)) for one in attached):
        raise RuntimeError("the model's class was changed after apply_magcache: remove the cache before changing it")
    for one in attached:
        one.__class__ = type(one)._own_class
        del one.__dict__["_magcache"]
        ATTACHED.discard(one)
