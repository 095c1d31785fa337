"""What a schedule means for a run, before anything is loaded: its map over the steps, the error that is predicted along
the way, memory and FLOPs. Pure Python.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

from magcache.files import read_json
from magcache.ratios import RatioTable, resample_nearest, split_branches
from magcache.schedule import Schedule

BRANCHES = ("cond", "uncond")
CLIP_TOKENS = 257  # of an image
PATCH = 1 * 2 * 2  # latent pixels to a token
BYTES = {None: 4, "float32": 4, "bfloat16": 2, "float16": 2}  # of a cached number; Wan's are float32


@dataclass(frozen=True)
class Shape:
    """What of a Wan transformer decides on FLOPs and memory. The names are those of its config.json. image_tokens: of
    the image encoder, 0 without. vace_blocks: of the side branch, 0 without."""

    dim: int
    ffn_dim: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    clip_dim: int = 1280
    image_tokens: int = 0
    vace_blocks: int = 0
    vace_in_dim: int = 96


_1_3B, _14B = Shape(1536, 8960, 30), Shape(5120, 13824, 40)
_TINY = Shape(192, 768, 8, freq_dim=64, text_len=16, text_dim=64, clip_dim=64)
SHAPES = {
    "t2v-1.3B": _1_3B,
    "t2v-14B": _14B,
    "t2i-14B": _14B,
    "i2v-14B": replace(_14B, in_dim=36, image_tokens=CLIP_TOKENS),
    "flf2v-14B": replace(_14B, in_dim=36, image_tokens=2 * CLIP_TOKENS),
    "vace-1.3B": replace(_1_3B, vace_blocks=15),
    "vace-14B": replace(_14B, vace_blocks=8),
    "t2v-tiny": _TINY,
    "i2v-tiny": replace(_TINY, num_layers=7, in_dim=36, image_tokens=CLIP_TOKENS),
}
_ALL_480P = ("480*832", "832*480")
_ALL_VIDEO = ("720*1280", "1280*720", *_ALL_480P)
SIZES = {  # that a task runs at
    "t2v-1.3B": _ALL_480P,
    "vace-1.3B": _ALL_480P,
    "t2i-14B": (*_ALL_VIDEO, "1024*1024"),
    "t2v-tiny": ("64*64",),
    "i2v-tiny": ("64*64",),
} | dict.fromkeys(("t2v-14B", "i2v-14B", "flf2v-14B", "vace-14B"), _ALL_VIDEO)


def shape_of(task: str, ckpt_dir: str | Path) -> Shape:
    """The task's transformer, or the one that the folder's config.json describes, if there is one that can be read."""
    shape = SHAPES[task]
    try:
        config = read_json(Path(ckpt_dir) / "config.json")
        known = {field.name: config[field.name] for field in fields(Shape) if type(config.get(field.name)) is int}
        known = {name: number for name, number in known.items() if 0 <= number < 2**31}
        if shape.vace_blocks and "vace_layers" in config:
            layers = config["vace_layers"]
            known["vace_blocks"] = math.ceil(known["num_layers"] / 2) if layers is None else len(layers)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return shape  # refused, if a run is started with it
    return replace(shape, **known)


def token_count(frames: int, height: int, width: int, references: int = 0) -> int:
    """Tokens of a call: frames (4 n + 1) and sides (multiples of 16) of the video in pixels, and VACE's references."""
    return ((frames - 1) // 4 + 1 + references) * (height // 8) * (width // 8) // PATCH


def call_flops(shape: Shape, tokens: int) -> tuple[int, int]:
    """FLOPs of a computed and of a reused call, as torch's FlopCounterMode counts them: two for every multiplication of
    a matrix product, a convolution or an attention, none for the rest. One sample."""
    dim, text, image = shape.dim, shape.text_len, shape.image_tokens

    def linear(rows: int, width_in: int, width_out: int) -> int:
        return 2 * rows * width_in * width_out

    def attention(keys: int) -> int:
        return 2 * linear(tokens, keys, dim)

    block = (
        6 * linear(tokens, dim, dim)  # q, k, v, o; q and o of the cross-attention
        + 2 * linear(text + image, dim, dim)  # its k and v
        + attention(tokens)
        + attention(text)
        + attention(image)
        + 2 * linear(tokens, dim, shape.ffn_dim)
    )
    time = linear(1, shape.freq_dim, dim) + linear(1, dim, dim)
    ends = linear(tokens, PATCH * shape.in_dim, dim) + linear(tokens, dim, PATCH * shape.out_dim)
    context = linear(text, shape.text_dim, dim) + linear(text, dim, dim)
    context += linear(image, shape.clip_dim, shape.clip_dim) + linear(image, shape.clip_dim, dim)
    computed = shape.num_layers * block + context + linear(1, dim, 6 * dim)  # what only the blocks take
    if shape.vace_blocks:
        computed += linear(tokens, PATCH * shape.vace_in_dim, dim)
        computed += shape.vace_blocks * (block + linear(tokens, dim, dim)) + linear(tokens, dim, dim)
    return computed + time + ends, time + ends


def cached_bytes(schedule: Schedule, shape: Shape, tokens: int, dtype: str | None = None) -> int:
    """Memory of the cached residuals or outputs of all branches."""
    numbers = tokens * {"residual": shape.dim, "output": PATCH * shape.out_dim}[schedule.target]
    return schedule.calls_per_step * schedule.history * numbers * BYTES[dtype]


def run_flops(schedule: Schedule, shape: Shape, tokens: int) -> tuple[int, int]:
    """Of the whole run: with this schedule, and with every call computed."""
    computed, reused = call_flops(shape, tokens)
    if schedule.target == "output":
        reused = 0  # the model does not run
    return schedule.computed * computed + sum(schedule.reuse) * reused, len(schedule.weights) * computed


def rule_errors(ratios: Sequence[float], reuse: Sequence[bool]) -> tuple[float, ...]:
    """The accumulated error of the MagCache rule along one branch, for any choice of steps: over every stretch of
    reused steps the sum of the distances from 1 of the product of its ratios; 0 where a step computes."""
    errors, product, error = [], 1.0, 0.0
    for ratio, reused in zip(ratios, reuse, strict=True):
        product = product * ratio if reused else 1.0
        error = error + abs(1.0 - product) if reused else 0.0
        errors.append(error)
    return tuple(errors)


def predict_by_ratios(schedule: Schedule, ratios: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """The `rule_errors` of every branch, by a ratio table in call order; one of another number of steps is resampled by
    nearest index, as by `plan`."""
    branches = zip(split_branches(ratios), reuse_by_branch(schedule).items(), strict=False)
    return {name: rule_errors(resample_nearest(values, schedule.steps), reuse) for values, (name, reuse) in branches}


def step_map(reuse: Sequence[bool | None], width: int | None = None) -> str:
    """One character a step: # computed, . reused, blank for None. A smaller width puts neighbouring steps together,
    as + where they differ."""
    marks = [" " if r is None else "." if r else "#" for r in reuse]
    if width is None or width >= len(marks):
        return "".join(marks)
    edges = [round(i * len(marks) / width) for i in range(width + 1)]
    cells = [set(marks[a:b]) for a, b in pairwise(edges)]
    return "".join(cell.pop() if len(cell) == 1 else "+" for cell in cells)


def ruler(steps: int) -> str:
    return "".join(f"{step:<10}" for step in range(0, steps, 10))[: max(steps, 10)].rstrip()


def digits(errors: Sequence[float], reuse: Sequence[bool], unit: float) -> str:
    """Errors as tenths of `unit`, one character a step, blank where it computes."""
    tenths = (min(9, int(10 * error / unit)) if unit else 0 for error in errors)
    return "".join(str(tenth) if reused else " " for tenth, reused in zip(tenths, reuse, strict=True)).rstrip()


def table_origin(table: RatioTable) -> str:
    """Where a table comes from, in words."""
    date = table.measured_on.get("date")
    if isinstance(date, str):
        return f"measured on {date[:10]} with {table.steps} steps ({table.path})"
    return f"{'published' if table.named else 'not told'}, {table.steps} steps ({table.path})"


def number_of_bytes(count: float) -> str:
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
    unit, size = next((u, s) for u, s in units if count >= s or s == 1)
    return f"{count / size:.3g} {unit}"


def reuse_by_branch(schedule: Schedule) -> dict[str, tuple[bool, ...]]:
    """For every step: True where it does not compute."""
    count = schedule.calls_per_step
    return {BRANCHES[branch]: schedule.reuse[branch::count] for branch in range(count)}
