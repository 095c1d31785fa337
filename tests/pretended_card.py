"""A pretended CUDA card: tensors claim to be on cuda:0, and the CPU computes them.

with PretendedCard() as card:
    ...  # what runs on a card, with real numbers

What needs the same device raises if it gets two, and autocast follows CUDA's rules. Counted are the bytes on the card
(`held`, `most`; also by `phases`) and how often the host waited for it (`waits`). A copy that is not blocking counts as
a wait unless the host's memory is pinned; `pinned` are the bytes of every pinned buffer, as torch's allocator takes
them; `moved` are those that crossed the bus, up and down (a blocking copy to another dtype is converted on the host).
"""

import collections
import contextlib
import functools
import sys
import time
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo.trace_rules
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CARD, HOST = torch.device("cuda:0"), torch.device("cpu")
aten = torch.ops.aten
MOVES = {aten._to_copy, aten.to}
ACROSS = {*MOVES, aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
ACROSS |= {aten._has_compatible_shallow_copy_type}
WAITING = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal}
WAITING |= {aten._linalg_check_errors, aten.linalg_solve}  # whether there is a solution
TAKE_A_GUARD = ("getitem", "setitem", "float", "int", "bool", "index", "invert")
TAKE_A_GUARD = (*(f"__{name}__" for name in TAKE_A_GUARD), "contiguous", "item")


def named_phases(monkeypatch, places: dict[type, tuple[str, ...]]) -> list["PretendedCard"]:
    """Makes these methods of classes phases of the card that stands last in the list that it returns."""
    current = []
    for owner, names in places.items():
        for name in names:
            method = getattr(owner, name)

            def run(*args, method=method, name=name, **kwargs):
                with current[-1].phase(name) if current else contextlib.nullcontext():
                    return method(*args, **kwargs)

            monkeypatch.setattr(owner, name, functools.wraps(method)(run))
    return current


class OnCard(torch.Tensor):
    """Stands for the tensor `inner`. Its dispatch keys are CUDA's, so autocast treats it as a CUDA tensor."""

    def __new__(cls, inner: torch.Tensor, card: "PretendedCard"):
        with torch.inference_mode(False):  # views share a version, and inference tensors have none
            like = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
            self = torch.Tensor._make_subclass(cls, like, dispatch_device=True, device_for_backend_keys=CARD)
        self.inner, self.place = inner, Place(inner.untyped_storage(), card)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} of a tensor on the card, without the card")

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def new_tensor(self, data) -> torch.Tensor:
        return torch.tensor(data, dtype=self.dtype, device=CARD)

    def __repr__(self, **kwargs) -> str:
        return f"OnCard({self.inner})"


class Place:
    """One of the tensors that share a storage on the card."""

    def __init__(self, storage: torch.UntypedStorage, card: "PretendedCard"):
        self.storage, self.card = storage, card
        card.users[storage._cdata] += 1
        if card.users[storage._cdata] == 1:
            card.held += storage.nbytes()
            card.most, card.within = max(card.most, card.held), max(card.within, card.held)

    def __del__(self):
        self.card.users[self.storage._cdata] -= 1
        if not self.card.users[self.storage._cdata]:
            self.card.held -= self.storage.nbytes()


class Stream:
    def __init__(self, card: "PretendedCard"):
        self.card, self.device = card, CARD

    def synchronize(self):
        self.card.wait("stream")

    def wait_stream(self, other):
        pass

    wait_event = record_event = wait_stream


class Event:
    """It is reached only when the host has waited for it or for something later."""

    def __init__(self, card: "PretendedCard"):
        self.card = card

    def record(self, stream=None):
        self.card.recorded += 1
        self.number, self.at = self.card.recorded, time.perf_counter()

    def synchronize(self):
        reached = max(self.number, self.card.reached)
        self.card.wait("event")
        self.card.reached = reached

    def elapsed_time(self, other: "Event") -> float:
        if max(self.number, other.number) > self.card.reached:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1000 * (other.at - self.at)


class PretendedCard(TorchDispatchMode):
    """The card. memory: how many bytes it claims to have."""

    def __init__(self, memory: float = 80e9):
        super().__init__()
        self.memory, self.pinned = int(memory), {}
        self.held = self.most = self.within = 0  # the last one: the most in the phase
        self.users, self.moved, self.hidden = collections.Counter(), collections.Counter(), False
        self.phases: list[tuple[str, int, int, int]] = []  # name; bytes at the start, the most within, at the end
        self.waits: collections.Counter[tuple[str, str, str]] = collections.Counter()  # by phase, kind and line
        self.current = ["outside"]
        self.recorded = self.reached = 0  # events

    # what is counted

    @contextlib.contextmanager
    def phase(self, name: str):
        before = self.within = self.held
        self.current.append(name)
        try:
            yield
        finally:
            self.current.pop()
            self.phases.append((name, before, self.within, self.held))

    def wait(self, kind: str) -> None:
        frame = sys._getframe(1)
        while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        file = "/".join(frame.f_code.co_filename.split("/")[-2:])
        self.waits[self.current[-1], kind, f"{file} {frame.f_code.co_name}"] += 1
        self.reached = self.recorded

    # what runs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return HOST if self.hidden else CARD
        flat, spec = pytree.tree_flatten((args, kwargs or {}))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        known = {id(x.inner): x for x in tensors if isinstance(x, OnCard)}
        there, packet = bool(known), function._overloadpacket
        if there and packet not in ACROSS:
            strays = [x for x in tensors if not isinstance(x, OnCard)]
            if any(x.dim() for x in strays) or (strays and not any(x.dim() for x in known.values())):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({function})"
                )
        device = torch.device((kwargs or {}).get("device") or (CARD if there else HOST))
        to = device.type == "cuda"
        if there and packet in WAITING:
            self.wait(packet.__name__)
        if packet in MOVES and there != to and device.type != "meta":
            self.crosses(args[0], to, (kwargs or {}).get("non_blocking"), (kwargs or {}).get("dtype"))
        elif packet is aten.copy_ and isinstance(args[0], OnCard) != isinstance(args[1], OnCard):
            to = isinstance(args[0], OnCard)
            self.crosses(args[1], to, len(args) > 2 and args[2], args[0].dtype)
        elif packet in ACROSS - MOVES:
            to = isinstance(args[0], OnCard)
        plain = [
            x.inner if isinstance(x, OnCard) else HOST if isinstance(x, torch.device) and x.type == "cuda" else x
            for x in flat
        ]
        args, kwargs = pytree.tree_unflatten(plain, spec)
        if kwargs.pop("pin_memory", False):
            return self.pin(function(*args, **kwargs))
        out = function(*args, **kwargs)
        moved = packet in MOVES and to != there and device.type != "meta"
        if moved and out.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
            out = out.clone()

        def wrapped(x):
            if not isinstance(x, torch.Tensor):
                return x
            return known.get(id(x)) if id(x) in known else OnCard(x, self) if to else x

        return pytree.tree_map(wrapped, out)

    def crosses(self, source: torch.Tensor, up: bool, non_blocking: bool, dtype: torch.dtype | None) -> None:
        width = (dtype or source.dtype).itemsize if up and not non_blocking else source.itemsize
        self.moved["up" if up else "down"] += source.numel() * width
        if not (non_blocking and (not up or source.is_pinned())):
            self.wait("to the card" if up else "from the card")

    # what torch is told

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for owner, name, value in self.replaced():
                stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))
            super().__enter__()
            self.undo = stack.pop_all()
        return self

    def __exit__(self, *fault):
        super().__exit__(*fault)
        self.undo.close()

    def replaced(self):
        """Lists what is replaced as (owner, name, replacement)."""
        stream, true = Stream(self), lambda *args, **kwargs: True
        properties = SimpleNamespace(
            name="pretended", total_memory=self.memory, major=8, minor=0, multi_processor_count=1
        )
        for name, value in {
            "is_available": true,
            "is_initialized": true,
            "is_bf16_supported": true,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda *args: "pretended",
            "get_device_capability": lambda *args: (8, 0),
            "get_device_properties": lambda *args: properties,
            "mem_get_info": lambda *args: (self.memory - self.held, self.memory),
            "memory_allocated": lambda *args: self.held,
            "max_memory_allocated": lambda *args: self.most,
            "host_memory_stats": lambda: {"allocated_bytes.current": sum(self.pinned.values())},
            "synchronize": lambda *args: self.wait("synchronize"),
            "Stream": lambda *args, **kwargs: Stream(self),
            "Event": lambda *args, **kwargs: Event(self),
            "current_stream": lambda *args: stream,
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            yield torch.cuda, name, value
        for name in ("_lazy_init", "init", "set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
            yield torch.cuda, name, lambda *args, **kwargs: None
        yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
        yield torch, "Generator", type("Generator", (torch.Generator,), {"__new__": lambda cls, *device: _Generator()})
        for name in ("tensor", "as_tensor"):
            yield torch, name, self.made_on_the_host(getattr(torch, name))
        yield torch.Tensor, "pin_memory", lambda tensor, *args: self.pin(tensor.detach().clone())
        yield torch.Tensor, "is_pinned", lambda tensor, *args: tensor.untyped_storage().data_ptr() in self.pinned
        data = functools.partial(self.set_data, torch.Tensor.data)
        yield torch.Tensor, "data", property(torch.Tensor.data.__get__, data)
        attend = torch.nn.functional.scaled_dot_product_attention
        yield torch.nn.functional, "scaled_dot_product_attention", functools.partial(self.attend, attend)
        for name in TAKE_A_GUARD:  # there is none for cuda in a build without it
            yield OnCard, name, self.without_guard(getattr(torch.Tensor, name))

    def without_guard(self, method):
        def run(tensor, *args, **kwargs):
            before, self.hidden = self.hidden, True
            try:
                return method(tensor, *args, **kwargs)
            finally:
                self.hidden = before

        return run

    @staticmethod
    def made_on_the_host(make):
        def made(*args, device=None, **kwargs):
            out = make(*args, **kwargs)
            return out if device is None else out.to(device)

        return made

    def attend(self, plain, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **how):
        """Computes in one kernel, as a card does."""
        tensors = query, key, value, attn_mask
        if not isinstance(query, OnCard):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **how)
        if not all(x is None or isinstance(x, OnCard) for x in tensors):
            raise RuntimeError("Expected all tensors to be on the same device (attention)")
        inner = [None if x is None else x.inner for x in tensors]
        if torch.is_autocast_enabled("cuda"):
            to = torch.get_autocast_dtype("cuda")
            inner = [x.to(to) if x is not None and x.is_floating_point() else x for x in inner]
        return OnCard(plain(*inner, dropout_p, is_causal, **how), self)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = 1 << max(0, storage.nbytes() - 1).bit_length()
        return tensor

    def set_data(self, plain: property, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Moves a tensor, mostly a parameter, to the card in place, or back to the host."""
        if isinstance(value, OnCard) or isinstance(tensor, OnCard):
            parameter = isinstance(tensor, torch.nn.Parameter)
            other = OnCard(value.inner, self) if isinstance(value, OnCard) else value.detach()
            torch.utils.swap_tensors(tensor, torch.nn.Parameter(other, requires_grad=False) if parameter else other)
        else:
            plain.__set__(tensor, value)


_Generator = torch.Generator
