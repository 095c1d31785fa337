"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike, replace: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to, which nothing else has; it takes that one's place at the end, or vanishes with
    an exception. Its ending tells writers the format.

    replace: whether it also takes the place of a file that is at `path` by then; else that raises FileExistsError.
    """
    path = Path(path)
    # not of `tempfile`, whose files only their owner may read; short, as `path` may have as long a name as there can be
    part = path.with_name(f"{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # some file systems tell only now that they are full
        if not replace:
            open(path, "x").close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
