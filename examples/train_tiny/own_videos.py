"""What the model in training draws, and what it should have drawn in that place: `train_dit --own` trains on both."""

import torch

from examples.train_tiny.check_prompts import find_shape, is_whole, see
from examples.train_tiny.shapes import AREAS, CENTROIDS, DIRECTIONS, SIZE, Caption, draw


def corrected(caption: Caption, video: torch.Tensor) -> torch.Tensor | None:
    """The drawing [3, F, 64, 64] nearest to a video [3, F, 64, 64] of the caption: its mean area, on the straight line
    through its centres. None where there is not one shape, or it goes elsewhere."""
    mask = find_shape(video)[0]
    if not is_whole(mask) or see(video).direction != caption.direction:
        return None
    frames, axis = torch.from_numpy(mask).float(), torch.arange(SIZE) + 0.5
    area = frames.sum((1, 2))
    centers = torch.stack([frames.sum(1) @ axis, frames.sum(2) @ axis]) / area
    time = torch.linspace(-1, 1, len(frames))
    speed = (centers @ time) / time.square().sum() * (torch.tensor(DIRECTIONS[caption.direction]) != 0)
    radius = (area.mean() / AREAS[caption.shape]).sqrt()
    lower = torch.tensor([0.0, CENTROIDS[caption.shape]]) * radius
    return draw(caption, radius, (centers.mean(1) - lower)[:, None] + speed[:, None] * time)
