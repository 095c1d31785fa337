"""Corrects what the model in training draws to what it should have drawn; `train_dit --own` trains on both."""

import torch

from examples.train_tiny.check_prompts import centers, direction, find_shape, is_whole
from examples.train_tiny.shapes import AREAS, CENTROIDS, DIRECTIONS, Caption, draw


def corrected(caption: Caption, video: torch.Tensor) -> torch.Tensor | None:
    """Returns the drawing [3, F, 64, 64] nearest to a video [3, F, 64, 64] of the caption: of its mean area, on the
    straight line through its centres. None if the video does not show one shape, or that moves in another direction."""
    mask = find_shape(video)[0]
    path = centers(mask)
    if not is_whole(mask) or direction(path) != caption.direction or caption.direction not in DIRECTIONS:
        return None
    time = torch.linspace(-1, 1, len(mask))
    speed = (path @ time) / time.square().sum() * (torch.tensor(DIRECTIONS[caption.direction]) != 0)
    radius = torch.tensor(mask.sum() / len(mask) / AREAS[caption.shape]).sqrt()
    lower = torch.tensor([0.0, CENTROIDS[caption.shape]]) * radius
    return draw(caption, radius, (path.mean(1) - lower)[:, None] + speed[:, None] * time)
