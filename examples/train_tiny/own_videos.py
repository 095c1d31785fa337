"""What the model in training draws, and what it should have drawn in that place: `train_dit --own` trains on both."""

import torch

from examples.train_tiny.check_prompts import centers, direction, find_shape, is_whole
from examples.train_tiny.shapes import AREAS, CENTROIDS, DIRECTIONS, Caption, draw


def corrected(caption: Caption, video: torch.Tensor) -> torch.Tensor | None:
    """The drawing [3, F, 64, 64] nearest to a video [3, F, 64, 64] of the caption: its mean area, on the straight line
    through its centres. None where there is not one shape, or it goes elsewhere."""
    mask = find_shape(video)[0]
    path = centers(mask)
    if not is_whole(mask) or direction(path) != caption.direction or caption.direction not in DIRECTIONS:
        return None
    time = torch.linspace(-1, 1, len(mask))
    speed = (path @ time) / time.square().sum() * (torch.tensor(DIRECTIONS[caption.direction]) != 0)
    radius = torch.tensor(mask.sum() / len(mask) / AREAS[caption.shape]).sqrt()
    lower = torch.tensor([0.0, CENTROIDS[caption.shape]]) * radius
    return draw(caption, radius, (path.mean(1) - lower)[:, None] + speed[:, None] * time)
