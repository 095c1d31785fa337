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
    """Yields a new file beside `path` to write to. It takes the place of `path` at the end and is deleted after an
    exception. Its suffix is that of `path`, which tells writers the format."""
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
    """Makes an empty file beside `path` with a name that nothing else has. Raises OSError if that is impossible."""
    # short, as `path` may have the longest name allowed; not by `tempfile`, whose files only their owner may read
    part = path.with_name(f"{secrets.token_hex(8)}.part{path.suffix}")
    open(part, "xb").close()
    return part


def is_special(path: str | os.PathLike) -> bool:
    """Whether a path leads to a pipe, a device or the like, where reading may wait forever."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def read_json(path: str | os.PathLike) -> Any:
    """Returns the content of a JSON file. Raises FileNotFoundError, and ValueError with one line if it is not a regular
    file, not text, not JSON, or nested too deeply."""
    if is_special(path):
        raise ValueError("it is not a regular file")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (OSError, ValueError) as fault:
        raise ValueError(reason_of(fault)) from None


def reason_of(fault: Exception) -> str:
    """Says why a file cannot be read, in one line without its path."""
    if isinstance(fault, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return getattr(fault, "strerror", None) or str(fault).splitlines()[0].split(";")[0]
