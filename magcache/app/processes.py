"""The processes that torchrun starts for one run: which of them this is, and what they tell each other."""

import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from magcache.app.errors import LostResult, first_line

if TYPE_CHECKING:
    import torch

# for a process that never comes, or hangs; where one fails, torchrun ends the others at once
TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(days=7)  # for processes that wait while others make videos


@dataclass(frozen=True)
class Group:
    """The processes that make a video together. This one is the `rank`-th of `size`, the group the `index`-th of
    `count`. sharing: what they share the tokens by, a group of torch.distributed; None if each has all of them. own:
    those of the group, everyone: those of all groups, both for `gathered`; None for one alone."""

    rank: int = 0
    size: int = 1
    index: int = 0
    count: int = 1
    sharing: "torch.distributed.ProcessGroup | None" = None
    own: "torch.distributed.ProcessGroup | None" = None
    everyone: "torch.distributed.ProcessGroup | None" = None

    @property
    def speaks(self) -> bool:
        """Whether this process prints for all."""
        return self.rank == self.index == 0


@dataclass(frozen=True)
class Processes:
    """rank: of this process among all `world` of them. local_rank: among those on its machine, which picks the GPU."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Processes":
        """Reads torchrun's variables; a single process without them. Raises ValueError if they are incomplete."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        variables = {"LOCAL_RANK": "0"} | os.environ  # not set where every process has a machine of its own
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        if missing := [name for name in (*names, "MASTER_ADDR") if name not in variables]:
            raise ValueError(f"WORLD_SIZE is set but {missing[0]} is not: start the processes with torchrun")
        for name in names:
            if not re.fullmatch("[0-9]{1,5}", variables[name]):
                wrong = f"{name}={variables[name][:40]} is not a whole number"
                raise ValueError(f"{wrong}: start the processes with torchrun")
        return cls(*(int(variables[name]) for name in names[:3]))

    def check_gpus(self) -> None:
        """Raises ValueError if this machine has GPUs but fewer than processes."""
        if self.world == 1:
            return
        import torch

        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1)), torch.cuda.device_count()
        if torch.cuda.is_available() and here > gpus:
            raise ValueError(f"there are {here} processes on this machine, but only {gpus} GPUs")

    def connect(self) -> None:
        """Sets up torch.distributed: NCCL with a GPU for each process, else gloo. Nothing for a single process. Raises
        ValueError if they cannot find each other."""
        if self.world == 1:
            return
        import torch

        if self.rank >= self.world:
            wrong = f"RANK={self.rank} must be below WORLD_SIZE={self.world}"
            raise ValueError(f"{wrong}: start the processes with torchrun")
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        try:
            socket.getaddrinfo(address, port)  # torch would go on asking
        except (OSError, ValueError) as fault:
            raise ValueError(f"MASTER_ADDR={address[:80]} leads nowhere ({first_line(fault)})") from fault
        try:
            torch.distributed.init_process_group(backend, timeout=TIMEOUT)
        except RuntimeError as fault:  # nobody is at the address, or does not come
            raise ValueError(f"the processes cannot connect at {address}:{port} ({first_line(fault)})") from fault

    def patient_group(self, size: int):
        """Makes a group of `size` neighbours for `gathered`, which all must call; None for one alone."""
        if size == 1:
            return None
        import torch

        return torch.distributed.new_subgroups(size, backend="gloo", timeout=PATIENCE)[0]


def gathered(value, group) -> list:
    """Returns the value (anything that can be pickled) of every process of a `Processes.patient_group`, in order,
    however long one of them takes; all must call it."""
    if group is None:
        return [value]
    import torch

    values = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def agreed(fault: tuple[str, str] | None, group) -> str | None:
    """Returns in one line what went wrong with a video, in the words of its first process; None if nothing did. fault:
    kind and line. Raises RuntimeError if the processes disagree on the kind: then they are no longer at the same point
    and could not go on together. Only the first may fail alone where the others are done, since it decodes."""
    everyone = gathered(fault, group)
    kinds = [theirs and theirs[0] for theirs in everyone]
    if len(set(kinds)) > 1 and any(kinds[1:]):
        lines = [theirs and ": ".join(theirs) for theirs in everyone]
        raise RuntimeError(f"not all processes of a group made the video: {lines}")
    return everyone[0] and ": ".join(everyone[0])


def tried(goes_on: bool, function: Callable, group=None) -> tuple:
    """Returns the function's result and None; or None and what went wrong, if its failure stops nothing else
    (`goes_on`). group: the processes, of `Processes.patient_group`, that call it together."""
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


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends one of several processes with this block: with the messages and the exit code that Python would give it, but
    without torch's clean-up, in which gloo sometimes hangs or aborts when processes leave together."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    code = 0
    try:
        yield
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
