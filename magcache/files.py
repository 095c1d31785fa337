"""Files that are written whole or not at all, and JSON that may hold anything."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def written_whole(path: str | os.PathLike, replace: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to, which nothing else has; it takes that one's place at the end, or vanishes with
    an exception. Its ending tells writers the format.

    replace: whether it also takes the place of a file that is at `path` by then; else that raises FileExistsError.
    """
    path = Path(path)
    part, lock = own_part(path)
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # some file systems tell only now that they are full
        if not replace:
            open(path, "x").close()
        os.replace(part, path)  # after which the part's name may be another process's
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        lock.close()


def own_part(path: Path) -> tuple[Path, BinaryIO]:
    """A file beside `path` that no other process writes to, and what locks it while it is open. One that a killed
    process has left is taken over, so that a rerun leaves nothing of it."""
    # short, as `path` may have as long a name as there can be; not of `tempfile`, which only their owner may read
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    for number in itertools.count():
        part = path.with_name(f"{digest}{number or ''}.part{path.suffix}")
        lock = open(part, "ab")  # noqa: SIM115
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(part)):
                return part, lock
        except (BlockingIOError, FileNotFoundError):  # another's, which is being written or has just become `path`
            pass
        except OSError:  # a file system without locks
            return part, lock
        lock.close()


def is_special(path: str | os.PathLike) -> bool:
    """Whether a path leads to a pipe, a device or the like, whose reader may wait forever."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, and ValueError with one line for what cannot be read: no
    regular file, no text, no JSON, nested too deep."""
    if is_special(path):
        raise ValueError("it is no regular file")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (OSError, ValueError) as fault:
        raise ValueError(reason_of(fault)) from None


def reason_of(fault: Exception) -> str:
    """Why a file cannot be read, in a line that does not hold its path."""
    if isinstance(fault, UnicodeDecodeError):
        return "it is no text in UTF-8"
    return getattr(fault, "strerror", None) or str(fault).splitlines()[0].split(";")[0]
