"""Files that are written whole or not at all, and JSON that may hold anything."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes that one's place at the end, or vanishes with an exception. Its
    ending tells writers the format."""
    part = new_part(Path(path))
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # some file systems tell only now that they are full
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def new_part(path: Path) -> Path:
    """An empty file beside `path` whose name nothing else has. Raises OSError where there can be none."""
    # short, as `path` may have as long a name as there can be; not of `tempfile`, which only their owner may read
    part = path.with_name(f"{secrets.token_hex(8)}.part{path.suffix}")
    open(part, "xb").close()
    return part


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
