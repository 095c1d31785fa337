"""Does a demo model follow its prompts, and how well does it draw? Measures 48 videos, uncached and cached.

python -m examples.train_tiny.check_prompts [--task i2v-tiny] [--ckpt_dir DIR] [--picture FILE.png]

i2v-tiny is given the first frame of a drawn video, and the distance of its own first frame from that is measured, too.
"""

import argparse
import math
import random
import statistics
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from scipy import ndimage

import magcache
import wan
from examples.train_tiny.shapes import (
    AREAS,
    BACKGROUNDS,
    CENTROIDS,
    COLORS,
    DIRECTIONS,
    FRAMES,
    HELD_OUT,
    SHAPES,
    SIZE,
    TRAINABLE,
    Caption,
    render,
    signed_distance,
)
from magcache.app.media import to_uint8
from magcache.patch import shadowed
from wan.configs import WAN_CONFIGS

HERE = Path(__file__).parent
DEMOS = {  # task -> pipeline, checkpoint folder
    "t2v-tiny": ("WanT2V", HERE.parent / "Wan2.1-T2V-tiny"),
    "i2v-tiny": ("WanI2V", HERE.parent / "Wan2.1-I2V-tiny"),
}
DRAWN = 24  # videos in the picture
SCHEDULES = {"uncached": None, "thresh 0.12, K 2": (0.12, 2), "thresh 0.12, K 4": (0.12, 4)}


def check_pairs() -> list[tuple[Caption, int]]:
    """Returns 48 fixed (caption, seed) pairs: half of them held out of training, all directions equally often, no
    caption twice."""
    chosen = []
    for draw in (24, 48):
        rng = random.Random(draw)
        for pool in (sorted(HELD_OUT, key=str), sorted(TRAINABLE, key=str)):
            left = [caption for caption in pool if caption not in chosen]
            for direction in DIRECTIONS:
                chosen += rng.sample([caption for caption in left if caption.direction == direction], 3)
    return [(caption, 1000 + i) for i, caption in enumerate(chosen)]


def nearest(color: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: (color - torch.tensor(palette[name]).float()).norm().item())


def overlap(shape: str, mask: np.ndarray) -> float:
    """Returns the mean intersection over union of the masks [F, 64, 64] with the shape of equal area and centre."""
    axis, shares = torch.arange(SIZE) + 0.5, []
    for frame in torch.from_numpy(mask):
        area = frame.sum()
        if area == 0:
            shares.append(0.0)
            continue
        cx, cy = (frame.sum(0) * axis).sum() / area, (frame.sum(1) * axis).sum() / area
        radius = (area / AREAS[shape]).sqrt()
        ideal = signed_distance(shape, axis[None] - cx, axis[:, None] - cy + CENTROIDS[shape] * radius, radius) < 0
        shares.append(((ideal & frame).sum() / (ideal | frame).sum()).item())
    return statistics.fmean(shares)


def is_whole(mask: np.ndarray) -> bool:
    """Whether every frame of the masks [F, 64, 64] holds one connected shape without a hole; specks of fewer than 4
    pixels do not count."""

    def parts(frame):
        labels, _ = ndimage.label(frame)
        return (np.bincount(labels.ravel())[1:] >= 4).sum()

    return all(parts(frame) == 1 == parts(~frame) for frame in mask)


def find_shape(video: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Returns the mask [F, 64, 64] of the pixels of a video [3, F, 64, 64] in [-1, 1] that are not background, and the
    colours of shape and background, 0 to 255."""
    pixels = (video.clamp(-1, 1) + 1) * 127.5
    border = torch.cat([pixels[..., :2, :].flatten(1), pixels[..., -2:, :].flatten(1)], dim=1)
    background = border.median(dim=1).values
    distance = (pixels - background[:, None, None, None]).norm(dim=0)
    mask = distance > 0.5 * distance.quantile(0.97)
    return mask.numpy(), pixels[:, mask].median(dim=1).values, background


def centers(mask: np.ndarray) -> torch.Tensor:
    """Returns the centres of the masks [F, 64, 64] in pixels, [2 (x, y), F]; 0 where there is nothing."""
    axis, frames = torch.arange(SIZE) + 0.5, torch.from_numpy(mask).float()
    return torch.stack([frames.sum(1) @ axis, frames.sum(2) @ axis]) / frames.sum((1, 2)).clamp(min=1)


def direction(path: torch.Tensor) -> str:
    """Names the direction of a path of centers [2 (x, y), F]; "none" if it is shorter than 5 pixels."""
    moved = path[:, -3:].mean(1) - path[:, :3].mean(1)
    nearest_one = max(DIRECTIONS, key=lambda name: (torch.tensor(DIRECTIONS[name]).float() @ moved).item())
    return nearest_one if moved.abs().max() >= 5 else "none"


def see(video: torch.Tensor) -> Caption:
    """Reads a caption off a video [3, F, 64, 64] in [-1, 1]."""
    mask, color, background = find_shape(video)
    return Caption(
        nearest(color, COLORS),
        max(SHAPES, key=lambda shape: overlap(shape, mask[::4])),
        direction(centers(mask)),
        nearest(background, BACKGROUNDS),
    )


def load_demo(task: str, folder: Path | None = None):
    """Loads the pipeline of a demo model, by default the one in the repository, on the CPU: all figures are of one."""
    name, own = DEMOS[task]
    with shadowed(torch.cuda, {"is_available": lambda: False}):
        return getattr(wan, name)(WAN_CONFIGS[task], str(folder or own))


def generate(pipeline, caption: Caption, seed: int, **sampling) -> torch.Tensor:
    """Generates a video [3, 17, 64, 64] of the caption; image-to-video starts with `first_frame(caption, seed)`."""
    if isinstance(pipeline, wan.WanT2V):
        return pipeline.generate(str(caption), (SIZE, SIZE), FRAMES, seed=seed, **sampling)
    image = Image.fromarray(to_uint8(first_frame(caption, seed).permute(1, 2, 0)))
    return pipeline.generate(str(caption), image, SIZE * SIZE, FRAMES, seed=seed, **sampling)


def first_frame(caption: Caption, seed: int) -> torch.Tensor:
    """Draws the first frame [3, 64, 64] in [-1, 1]."""
    return render([caption], torch.Generator().manual_seed(seed))[0, :, 0]


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the PSNR in dB of values in [-1, 1]; 100 for equal videos."""
    mse = (video - reference).square().mean().item()
    return min(100.0, 10 * math.log10(4 / mse)) if mse else 100.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2v-tiny", choices=tuple(DEMOS))
    parser.add_argument("--ckpt_dir", type=Path, help="checkpoint folder (default: the demo model of the task)")
    parser.add_argument("--picture", type=Path, help=f"draw frames of the first {DRAWN} videos, one column each")
    args = parser.parse_args()

    pipeline = load_demo(args.task, args.ckpt_dir)
    pairs = check_pairs()
    print(f"{len(pairs)} videos, {sum(caption in HELD_OUT for caption, _ in pairs)} of captions held out of training")
    rows = []
    for name, settings in SCHEDULES.items():
        magcache.remove_magcache(pipeline.model)
        if settings:
            schedule = magcache.plan(magcache.load_ratios(args.task), 50, *settings)
            magcache.apply_magcache(pipeline.model, schedule)
        videos = [generate(pipeline, c, seed, sampling_steps=50) for c, seed in pairs]
        rows += [torch.stack(videos[:DRAWN])[:, :, [frame]] for frame in (0, 8, 16)]
        seen = [see(video) for video in videos]
        counts = {
            part: sum(getattr(c, part) == getattr(s, part) for (c, _), s in zip(pairs, seen, strict=True))
            for part in ("color", "background", "direction", "shape")
        }
        line = f"{name}: " + ", ".join(f"{part} {count}" for part, count in counts.items())
        masks = [find_shape(video)[0] for video in videos]
        shares = sorted(overlap(caption.shape, mask) for (caption, _), mask in zip(pairs, masks, strict=True))
        line += f"; whole {sum(map(is_whole, masks))}; outline {statistics.fmean(shares):.3f}, least {shares[0]:.3f}"
        line += f", {sum(share >= 0.85 for share in shares)} of at least 0.85"
        if args.task == "i2v-tiny":
            start = [psnr(video[:, 0], first_frame(c, seed)) for video, (c, seed) in zip(videos, pairs, strict=True)]
            line += f"; first frame against the image {statistics.mean(start):.1f} dB, least {min(start):.1f}"
        print(line, flush=True)
    if args.picture:
        grid = rearrange(torch.cat(rows)[:, :, 0], "(row column) c h w -> (row h) (column w) c", column=DRAWN)
        Image.fromarray(to_uint8(grid)).save(args.picture)


if __name__ == "__main__":
    main()
