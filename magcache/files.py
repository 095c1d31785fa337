"""Files that are written whole or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it takes that one's place at the end, or vanishes with an exception.

    Every attempt at a file has the same one, so that a rerun replaces what a killed run has left; no two files share
    one. Its ending tells writers the format.
    """
    path = Path(path)
    # not of `tempfile`, whose names are others every time and whose files only their owner may read
    part = path.with_name(f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
