"""Turns the source video, its mask and the reference images of a VACE run into tensors, before any model is loaded."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from wan.utils.video_file import VideoInfo, probe_video, read_frames

TOKEN_PIXELS = 16  # on either side
FRAME_STRIDE = 4  # video frames to a latent frame
MAX_LATENT_FRAMES = 21  # at the full area; smaller videos may be longer, for as many tokens


def plan_video(info: VideoInfo, size: tuple[int, int]) -> tuple[list[int], tuple[int, int]]:
    """Chooses frames and output size of a video; `size` (width, height) gives only the area. The video is never
    enlarged, except to multiples of 16 as it keeps its shape. 4 n + 1 frames are spread evenly over its time, as many
    as it has unless there would be more tokens than in 81 frames of the full area. Returns the frame ids, which rise
    and may repeat, and (height, width). Raises ValueError for videos of which no token would be left."""
    full_area = size[0] * size[1] // TOKEN_PIXELS**2  # areas and sides are in tokens
    area = min(full_area, (info.height // TOKEN_PIXELS) * (info.width // TOKEN_PIXELS))
    rows = round((area * info.height / info.width) ** 0.5)
    columns = area // rows if rows else 0
    if rows == 0 or columns == 0:
        raise ValueError(f"{info.width}*{info.height} pixels are too few or too narrow")
    latent_frames = min((info.frames - 1) // FRAME_STRIDE + 1, full_area * MAX_LATENT_FRAMES // area)
    count = (latent_frames - 1) * FRAME_STRIDE + 1
    # float32 times, because upstream has them and now and then they decide between two frames
    edges = np.array(info.edges, np.float32)
    times = np.linspace(0, edges[-2:].mean(), count)
    frame_ids = np.searchsorted(edges[1:], times, side="right").tolist()
    return frame_ids, (rows * TOKEN_PIXELS, columns * TOKEN_PIXELS)


def cover(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes uint8 [3, H, W] with its shape kept to cover height * width, and cuts off evenly what sticks out."""
    scale = max(height / frame.shape[1], width / frame.shape[2])
    resized = [round(side * scale) for side in frame.shape[1:]]
    frame = F.interpolate(frame[None], resized, mode="bicubic", antialias=True)[0]
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    return frame[:, top : top + height, left : left + width]


def read_video(path: str, info: VideoInfo, frame_ids: list[int], height: int, width: int) -> torch.Tensor:
    """Returns uint8 [3, len(frame_ids), height, width]."""
    chosen, places = np.unique(frame_ids, return_inverse=True)
    frames = (torch.from_numpy(frame).permute(2, 0, 1) for frame in read_frames(path, info, set(chosen.tolist())))
    return torch.stack([cover(frame, height, width) for frame in frames], dim=1)[:, places]


def read_reference(image: str | Image.Image, height: int, width: int) -> torch.Tensor:
    """Fits an image, or the one in a file, into the middle of a white canvas, float32 [3, 1, height, width] in [-1, 1].
    Raises ValueError for a file that cannot be read."""
    if isinstance(image, str):
        try:
            image = ImageOps.exif_transpose(Image.open(image)).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"cannot read {image}: {error}") from error
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    scale = min(height / image.shape[1], width / image.shape[2])
    fitted = [max(1, int(side * scale)) for side in image.shape[1:]]
    canvas = torch.ones(3, 1, height, width)
    top, left = (height - fitted[0]) // 2, (width - fitted[1]) // 2
    fitted_image = F.interpolate(image[None], fitted, mode="bilinear")[0]
    canvas[:, 0, top : top + fitted[0], left : left + fitted[1]] = fitted_image
    return canvas


def prepare_source(
    video: str | None,
    mask: str | None,
    refs: list[str | Image.Image] | None,
    frame_num: int,
    size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
    """Reads what a VACE run starts from; needs no model. video: path of the video to edit; None to generate frame_num
    (4 n + 1) frames of `size` (width, height). With a video, `size` gives the largest area only and frame_num is not
    used: see `plan_video`. mask: path of a video of the same size and length, or of a picture of that size for all
    frames, white where to generate; None for everywhere. refs: reference images, RGB, or their paths. Returns the video
    float32 [3, F, H, W] in [-1, 1], the mask float32 [1 or 3, F, H, W] in [0, 1] (1 where to generate), and one float32
    [3, 1, H, W] in [-1, 1] per reference, None if there are none, all on the device. Raises ValueError for a file that
    cannot be read, a mask without a video or that does not fit it, a size that is no multiple of 16, a wrong
    frame_num."""
    width, height = size
    if min(size) < TOKEN_PIXELS or width % TOKEN_PIXELS or height % TOKEN_PIXELS:
        raise ValueError(f"width and height must be multiples of {TOKEN_PIXELS}, got {width}*{height}")
    if video is None:
        if mask is not None:
            raise ValueError(f"the mask {mask} needs a source video")
        if frame_num < 1 or frame_num % FRAME_STRIDE != 1:
            raise ValueError(f"frame_num must be {FRAME_STRIDE}n+1, got {frame_num}")
        frames = torch.zeros(3, frame_num, height, width, device=device)
        weights = torch.ones_like(frames)
    else:
        info = probe_video(video)
        if mask is not None:
            mask_info = probe_video(mask)
            check_mask(mask, mask_info, video, info)
        try:
            frame_ids, (height, width) = plan_video(info, size)
        except ValueError as error:
            raise ValueError(f"cannot use {video}: {error}") from None
        frames = read_video(video, info, frame_ids, height, width).to(device).float() / 127.5 - 1
        if mask is None:
            weights = torch.ones_like(frames)
        else:
            mask_ids = frame_ids if mask_info.frames > 1 else [0] * len(frame_ids)
            weights = read_video(mask, mask_info, mask_ids, height, width)[:1].to(device).float() / 255
    references = [read_reference(ref, height, width).to(device) for ref in refs or []]
    return frames, weights, references or None


def check_mask(mask: str, mask_info: VideoInfo, video: str, info: VideoInfo) -> None:
    """Raises ValueError unless the mask has the size of the video, and its length or a single frame."""
    for what, of_mask, of_video in (
        ("pixels", (mask_info.width, mask_info.height), (info.width, info.height)),
        ("frames", (mask_info.frames,), (info.frames if mask_info.frames > 1 else 1,)),
    ):
        if of_mask != of_video:
            found, expected = ("*".join(map(str, sides)) for sides in (of_mask, of_video))
            raise ValueError(f"the mask {mask} has {found} {what}, but the video {video} has {expected}")
