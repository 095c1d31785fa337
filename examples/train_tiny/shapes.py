"""The world of the demo models: one flat shape glides over a flat background, with a caption that says all of this or
leaves parts open.

Every video is drawn from signed distances, so edges are anti-aliased and no asset is needed. Seven in eight of the
captions are trainable; the others are held out of training (`HELD_OUT`).
"""

import itertools
import math
import random
from dataclasses import asdict, dataclass, replace

import torch

COLORS = {
    "red": (220, 30, 40),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 40, 170),
    "orange": (250, 130, 20),
}
BACKGROUNDS = {"black": (10, 10, 10), "white": (245, 245, 245), "gray": (128, 128, 128)} | COLORS
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y points down

SIZE = 64
FRAMES = 17
RADIUS, TRAVEL = (10, 13), (16, 24)  # pixels; travel: the way in 16 frame steps
WIDE = {"radius": (8, 14), "travel": (10, 28)}  # the world of open captions


@dataclass(frozen=True)
class Caption:
    """What a video shows. A part that is None is open, and the text does not mention it; if all are open it is ""."""

    color: str | None
    shape: str | None
    direction: str | None
    background: str | None

    def __str__(self) -> str:
        if self.shape:
            noun = f"a {self.color} {self.shape}" if self.color else f"a {self.shape}"
        else:
            noun = f"something {self.color}" if self.color else "something"
        moves = f" moves {self.direction}" if self.direction else ""
        where = f" on a {self.background} background" if self.background else ""
        return noun + moves + where if any(asdict(self).values()) else ""

    def filled(self, other: "Caption") -> "Caption":
        """Returns the caption with its open parts taken from the other one."""
        return replace(self, **{part: getattr(other, part) for part, value in asdict(self).items() if value is None})


def opened(caption: Caption, rng: random.Random) -> Caption:
    """Returns the caption with one to four of its parts left open, each set of parts equally often."""
    parts = ("color", "shape", "direction", "background")
    sets = [left_out for count in range(1, 5) for left_out in itertools.combinations(parts, count)]
    return replace(caption, **dict.fromkeys(rng.choice(sets)))


CAPTIONS = tuple(
    Caption(c, s, d, b) for c, s, d, b in itertools.product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS) if c != b
)
HELD_OUT = frozenset(random.Random(0).sample(CAPTIONS, len(CAPTIONS) // 8))
TRAINABLE = tuple(c for c in CAPTIONS if c not in HELD_OUT)


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Returns the distance in pixels from (x, y), relative to the centre, to the outline; negative inside. At the same
    radius the areas of the shapes are within 20 % of each other."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        half = radius * 0.9
        return torch.maximum(x.abs(), y.abs()) - half
    if shape == "triangle":  # equilateral, apex up; inradius r, so the corners are at 2 r
        r = radius * 0.72
        y = y - r * 0.25
        side = 3**0.5 / 2 * x.abs() - 0.5 * y
        return torch.maximum(side, y) - r
    raise ValueError(f"unknown shape {shape!r}")


# for the shapes of `signed_distance` with radius 1: area, and how far below the centre the centre of mass lies
AREAS = {"circle": math.pi, "square": 1.8**2, "triangle": 3 * 3**0.5 * 0.72**2}
CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 0.18}


def render(
    captions: list[Caption],
    generator: torch.Generator,
    frames: int = FRAMES,
    radius: tuple[float, float] = RADIUS,
    travel: tuple[float, float] = TRAVEL,
) -> torch.Tensor:
    """Draws one clip per caption. Returns float32 [len(captions), 3, frames, 64, 64] in [-1, 1].

    Size, speed and path are random. radius, travel: least and most of the shape's radius and of its way in 16 frame
    steps, in pixels.
    """
    n = len(captions)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    radius, travel = uniform(*radius), uniform(*travel) * (frames - 1) / (FRAMES - 1)
    margin = radius + 2
    # along the motion the path is centred anywhere that keeps both ends inside; across it, the shape is anywhere
    along = margin + travel / 2 + torch.rand(n, generator=generator) * (SIZE - 2 * margin - travel)
    across = margin + torch.rand(n, generator=generator) * (SIZE - 2 * margin)
    offset = torch.linspace(-0.5, 0.5, frames)[None] * travel[:, None]
    steps = torch.tensor([DIRECTIONS[caption.direction] for caption in captions])[:, :, None]  # [n, 2 (x, y), 1]
    centers = torch.where(steps != 0, along[:, None, None] + steps * offset[:, None], across[:, None, None])
    return torch.stack([draw(*clip) for clip in zip(captions, radius, centers, strict=True)])


def draw(caption: Caption, radius: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Draws one clip [3, F, 64, 64] in [-1, 1]: a shape of that radius at the centers [2 (x, y), F], in pixels."""
    axis, (x, y) = torch.arange(SIZE) + 0.5, centers[..., None, None]
    distance = signed_distance(caption.shape, axis[None, None, :] - x, axis[None, :, None] - y, radius)
    alpha = (0.5 - distance).clamp(0, 1)  # coverage of a pixel that the outline crosses
    fg = torch.tensor(COLORS[caption.color])[:, None, None, None] / 127.5 - 1
    bg = torch.tensor(BACKGROUNDS[caption.background])[:, None, None, None] / 127.5 - 1
    return bg + (fg - bg) * alpha
