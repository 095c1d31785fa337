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
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from magcache.schedule import Schedule

FORECAST_INSTEAD = "use output forecasts (magcache.plan_speedup)"


OnCall = Callable[[int, bool], None]


class Runner:
    """Executes the calls of a model. This one computes all of them. schedule: what runs are compared with."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.reset()

    def reset(self) -> None:
        """Forgets everything about the current run, because a run begins or has failed."""

    def skips(self, call: int) -> bool:
        """Whether the call does not compute. Those beyond the schedule do."""
        return call < len(self.schedule.weights) and self.schedule.weights[call] is not None

    def run(self, call: int, model: torch.nn.Module, forward: Callable[[], Any]) -> Any:
        """Returns what the call returns. `forward()` runs the model as it is."""
        return forward()


class Cache(Runner):
    """Executes a `Schedule`: keeps at most `schedule.history` residuals or outputs per branch, none outside a run.

    dtype: of what is cached; None keeps that of the computation (float32 in Wan).
    device: where it is kept, such as "cpu" to save GPU memory; None leaves it where it is.
    """

    def __init__(self, schedule: Schedule, dtype: torch.dtype | None = None, device: str | None = None):
        self.dtype, self.device = dtype, device
        super().__init__(schedule)

    def reset(self) -> None:
        self.kept = [[] for _ in range(self.schedule.calls_per_step)]  # per branch, newest first

    def run(self, call: int, model: torch.nn.Module, forward: Callable[[], Any]) -> Any:
        out = self.answer(call, model, forward)
        if call == len(self.schedule.weights) - 1:
            self.reset()  # the VAE decodes next and wants the memory
        return out

    def branch(self, call: int) -> list:
        return self.kept[call % self.schedule.calls_per_step]

    def make_room(self, call: int) -> bool:
        """Frees, before a call computes, what no later call needs. Returns whether a later call needs its result."""
        wanted = call < len(self.schedule.weights) and self.schedule.used_later[call]
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
            residual = residual_of(out, x)
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


@dataclass(frozen=True)
class Seen:
    """What shows of a call. resolution: neighbouring steps can share a timestep only if they are less than this apart;
    then so are the steps before them, since the steps of a run grow. shapes: those of the latents. expert: 0 for the
    first transformer, 1 for the second."""

    timestep: float
    resolution: float
    shapes: list[torch.Size]
    expert: int


def look(args: Sequence, kwargs: dict, expert: int) -> Seen:
    """Looks at the latents, the first argument, and at the timestep: `t`, `timestep` or the second argument. Raises
    TypeError if there is none."""
    found = [*(kwargs[name] for name in ("t", "timestep") if name in kwargs), *args[1:2]]
    if not found:
        raise TypeError("the call has no timestep: pass it as `t`, as `timestep` or as second argument")
    timestep = torch.as_tensor(found[0]).max()
    value = float(timestep)  # waits for the device, unless the timestep is on the CPU
    rounding = value * torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
    resolution = max(rounding, 1.0 if value.is_integer() and value > 1 else 0.0)
    latents = tree_leaves(next(iter((*args, *kwargs.values()))))
    return Seen(value, resolution, [leaf.shape for leaf in latents if isinstance(leaf, torch.Tensor)], expert)


def misfit(schedule: Schedule, step: int, seen: Seen, scale: float) -> str | None:
    """Says how a call of the step differs from the schedule's noise levels and boundary; None if it does not. scale: of
    the timesteps, 1000 or 1; by 1 in 1000 they may be off, as whole numbers are."""
    if schedule.sigmas is None or step >= schedule.steps:
        return None
    this, level = f"step {step + 1} of this run", schedule.sigmas[step] * scale
    if abs(seen.timestep - level) > max(seen.resolution, 0.001 * scale):
        found = f"{this} is at timestep {seen.timestep:g}, in the schedule at {level:.5g}"
        return f"{found} (plan for the noise levels of the run: its steps, shift and solver, see noise_levels_of)"
    if schedule.switch is None or seen.expert == (step >= schedule.switch):
        return None
    called, planned = ("second", "first") if seen.expert else ("first", "second")
    found = f"{this} calls the {called} transformer, in the schedule the {planned}"
    return f"{found} (plan for the boundary of the run)"


class Run:
    """Counts the calls of a run. The first one that shows that the run does not fit the schedule sets `fits` to False.

    A run starts when the timestep rises, when the latents have other shapes than before, or when all calls are done and
    the timestep is back at the first one. Steps are told apart by counting, as neighbouring ones may share an integer
    timestep. If the schedule has noise levels, a run also starts where the timestep is that of the first level and not
    of the next, and every timestep has to be that of its level.

    `doubtful`: the run began at the timestep of the call before it. Either the run before ended in its first step, or
    it goes on with more calls per step than planned, which the second step shows.
    """

    def __init__(self, schedule: Schedule, seen: Seen, before: "Run | None"):
        """seen: of its first call, which is not counted yet. before: the run before this one, if there was any."""
        self.schedule, self.calls, self.per_step = schedule, len(schedule.weights), schedule.calls_per_step
        self.call, self.first, self.last, self.fall, self.fits = -1, seen.timestep, seen, 0.0, True
        self.doubtful = before is not None and before.last.timestep == self.first
        self.scale = 1000 if self.first > 1 else 1

    @property
    def left(self) -> bool:
        """Whether calls are left to come."""
        return self.call + 1 < self.calls

    def goes_on(self, seen: Seen) -> bool:
        """Whether the next call still is of this run, and does not start another."""
        if seen.timestep > self.last.timestep or seen.shapes != self.last.shapes:
            return False
        if self.schedule.sigmas is None:
            return self.left or seen.timestep < self.first
        following = (self.call + 1) // self.per_step
        fits = self.fits and self.left and not misfit(self.schedule, following, seen, self.scale)
        return fits or misfit(self.schedule, 0, seen, self.scale) is not None

    def add(self, seen: Seen, cut: bool) -> str | None:
        """Counts a call. Says what is to be said of it, if anything. cut: whether another run has begun since."""
        fall, fall_before = self.last.timestep - seen.timestep, self.fall
        self.call, self.last, self.fall = self.call + 1, seen, fall
        if not self.fits:
            return None
        step, branch = divmod(self.call, self.per_step)
        again = fall == 0 and fall_before > seen.resolution
        if cut:
            fault = "another thread has called the model within this run"
        elif again if self.per_step == 1 else fall > 0 and branch:
            planned = f"this run does not make {self.per_step} transformer calls a step, as planned"
            fault = f"{planned} (calls_per_step of a plan is 2 with guidance, 1 without)"
        else:
            fault = misfit(self.schedule, step, seen, self.scale)
        if fault:
            self.fits = False
            return f"{fault}; the run is computed in full from here"
        if self.call == self.calls:
            return f"the schedule ends after {self.calls} transformer calls; those beyond it are computed"
        return None

    def unfinished(self) -> str | None:
        """Says, as another run starts, that this one is not complete; None if it is, or if it is known why not."""
        if not self.left or self.schedule.sigmas is not None or not self.fits:
            return None
        return (
            f"the run before this one ended after {self.call + 1} of {self.calls} transformer calls; if it was not "
            "stopped, plan for as many steps as a run has: what is cached waits for the others"
        )


def run_blocks(blocks: torch.nn.Module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Runs x [B, L, C] through all blocks. Raises RuntimeError if the result has another shape: it has no residual."""
    out = x
    for block in blocks:
        out = block(out, *args, **kwargs)
    if out.shape != x.shape:  # diffusers' context parallelism splits the tokens inside the first block
        raise RuntimeError(f"no residual of blocks that turn {[*x.shape]} into {[*out.shape]}: {FORECAST_INSTEAD}")
    return out


def residual_of(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns out - x, on the device of the last block, if diffusers' device_map has spread them."""
    return out.detach() - x.detach().to(out.device)


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
        self.__setstate__((runner, on_call))

    def __getstate__(self) -> tuple:
        return self.runner, self.on_call

    def __setstate__(self, state: tuple) -> None:
        self.runner, self.on_call = state
        self.lock = threading.RLock()  # held during a call, which changes the model and what is kept
        self.thread = threading.local()  # `run`: the latest one of every thread
        self.served = None  # the run that the runner is at, which began last

    def call(self, expert: int, forward: functools.partial) -> Any:
        """forward: the call itself, of the model and with its arguments."""
        model, *args = forward.args
        seen, run, notice = look(args, forward.keywords, expert), getattr(self.thread, "run", None), None
        if run is None or not run.goes_on(seen):
            notice = run and run.unfinished()
            run = self.thread.run = self.served = Run(self.runner.schedule, seen, run)
            self.runner.reset()
        notice = run.add(seen, run is not self.served) or notice
        if notice:
            warnings.warn(notice, stacklevel=3)
        if run is self.served and not run.fits:
            self.runner.reset()
        step, skips = run.call // run.per_step, self.runner.skips(run.call)
        follows = run.fits and not (skips and step == 1 and run.doubtful)
        try:
            out = self.runner.run(run.call, model, forward) if follows else forward()
            if self.on_call:
                self.on_call(run.call, follows and skips)
        except BaseException:
            self.thread.run = None
            if run is self.served:
                self.runner.reset()
            raise
        return out


ATTACHED = weakref.WeakSet()  # instances


@functools.cache
def attached_class(own_class: type, expert: int) -> type:
    """Makes the class of a model of `own_class` with something attached. It differs in its calls only, and refuses to
    be pickled, since no other process has such a class. expert: see `Seen`."""

    def __call__(self, *args, **kwargs):
        with self._magcache.lock:
            return self._magcache.call(expert, functools.partial(own_class.__call__, self, *args, **kwargs))

    def __reduce_ex__(self, protocol):  # of a deep copy, too
        make, arguments, *rest = super(attached, self).__reduce_ex__(protocol)
        return DeepCopy(), (make, arguments), *rest

    own = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "_own_class": own_class}
    same = {name: getattr(own_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    attached = type(own_class.__name__, (own_class,), same | own)
    return attached


class DeepCopy:
    """Makes a deep copy of an instance as its class would. It cannot be pickled, and so neither can the model."""

    def __call__(self, make: Callable, arguments: tuple) -> Any:
        copied = make(*arguments)
        ATTACHED.add(copied)
        return copied

    def __reduce_ex__(self, protocol: int):
        raise TypeError("a model with a cache cannot be pickled: remove it first, by magcache.remove_magcache(model)")


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
    model: one waits for the other, and of runs that take turns only the one that began last is cached.

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
