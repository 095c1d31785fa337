"""Files of many prompts: what they ask for, how the results are called, which are missing, who makes them."""

import codecs
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from magcache.app.errors import shortened
from magcache.files import is_special, reason_of

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One video. number: of the prompt in its file, from 1. image: path of its own; None if the flags name the inputs.
    save_file: as its line or the flags have it. n_prompt: its negative prompt, None for the model's. path: of the
    result, once that is known."""

    number: int
    prompt: str
    seed: int
    image: str | None = None
    save_file: str | None = None
    n_prompt: str | None = None
    path: Path | None = None


def read_prompts(path: str | os.PathLike, base_seed: int) -> list[Request]:
    """Reads a text file with a prompt on every line, or JSON Lines: objects with "prompt" and, where wanted, "seed",
    "image", "save_file", "n_prompt". It is JSON Lines if its name ends in .jsonl or its first line begins with a brace.
    Empty lines do not count.

    The seed of prompt i (from 0) is base_seed + i where the line gives none. Raises ValueError with one line for what
    cannot be read, with the number of the line in the file.
    """
    if is_special(path):
        raise ValueError(f"cannot read {path}: it is not a regular file")
    try:
        with open(path, "rb") as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as PowerShell writes it
        lines = Path(path).read_text(encoding="utf-16" if is_utf16 else "utf-8-sig").split("\n")
    except (OSError, ValueError) as fault:
        raise ValueError(f"cannot read {path}: {reason_of(fault)}") from fault
    lines = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    if holds("\n".join(line for _, line in lines), list):
        raise ValueError(f"{path} is a JSON list: write its objects without the brackets, one on each line")
    is_json = Path(path).suffix.lower() == ".jsonl" or lines[0][1].startswith("{")
    wanted = []
    for number, line in lines:
        try:
            if not is_json and holds(line, dict):
                raise ValueError("this is JSON, but the first line is not: write all lines as JSON, or none")
            values = read_object(line) if is_json else {"prompt": line}
            seed = values.pop("seed", base_seed + len(wanted))
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seed must be between 0 and 2^63 - 1, got {shortened(seed)}")
        except ValueError as fault:
            raise ValueError(f"{path}, line {number}: {fault}") from fault
        wanted.append(Request(len(wanted) + 1, seed=seed, **values))
    return wanted


def holds(text: str, kind: type) -> bool:
    """Whether the text is JSON of that kind."""
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def read_object(line: str) -> dict:
    """Reads and checks one line of JSON Lines. Raises ValueError."""
    types = {"prompt": str, "seed": int, "image": str, "save_file": str, "n_prompt": str}
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"not JSON ({fault})") from fault
    if not isinstance(values, dict):
        raise ValueError(f'must be an object such as {{"prompt": "..."}}, got {line[:40]}')
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"{json.dumps(key[:80])} is not one of {', '.join(types)}")
        if type(value) is not types[key]:  # a bool is an int, too
            wanted = "a whole number" if types[key] is int else "text"
            raise ValueError(f'"{key}" must be {wanted}, got {shortened(value)}')
        if types[key] is str and not value.strip():
            raise ValueError(f'"{key}" is empty')
        if types[key] is str and (not is_text(value) or ("\0" in value and key in ("image", "save_file"))):
            raise ValueError(f'"{key}" is not valid text: {shortened(value)}')
    if "prompt" not in values:
        raise ValueError('there is no "prompt"')
    return values


def is_text(value: str) -> bool:
    """Whether there are only whole characters: JSON may hold halves, as which bytes that are not UTF-8 arrive, too."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def slug(prompt: str) -> str:
    """Returns the beginning of a prompt in characters that are safe in any file name, at most 120 bytes."""
    encoding = sys.getfilesystemencoding()
    known = (c.isalnum() and c.encode(encoding, "ignore") for c in prompt[:50])
    safe = "".join(c if is_known or c == "-" else "_" for c, is_known in zip(prompt, known, strict=False))
    return safe.encode()[:120].decode(errors="ignore")


def result_name(request: Request, settings: dict, ending: str) -> str:
    """Makes a file name that changes with everything the video depends on: prompts, seed, image and the settings
    (anything that JSON can hold). A rerun thus finds what it would make again, and nothing else."""
    more = [request.n_prompt] if request.n_prompt else []  # without one names are as ever
    decisive = json.dumps([request.prompt, request.seed, request.image, settings, *more], sort_keys=True)
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:8]
    return f"{request.number:05d}_{slug(request.prompt)}_{request.seed}_{digest}{ending}"
