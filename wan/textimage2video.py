"""Text to video, or image to video from a first frame, by one transformer (Wan2.2's TI2V-5B)."""

import torch
from PIL import Image

from wan.pipeline import Denoising, WanPipeline


def covered_size(image_size: tuple[int, int], max_area: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Returns (width, height) of a video of at most max_area pixels, in whole tiles, that cuts off little of an image.
    image_size: (width, height). Raises ValueError if not even one tile fits."""
    aspect = image_size[0] / image_size[1]
    width = (max_area * aspect) ** 0.5
    width, height = (int(side // n) * n for side, n in zip((width, max_area / width), tile, strict=True))
    if not width or not height:
        raise ValueError(f"{max_area} pixels in the shape of {image_size[0]}x{image_size[1]} have no room for a token")
    # the largest with this height, and with this width
    sizes = (int(max_area / height // tile[0]) * tile[0], height), (width, int(max_area / width // tile[1]) * tile[1])
    return min(sizes, key=lambda size: max(aspect / (size[0] / size[1]), size[0] / size[1] / aspect))


def covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales the image to cover the size (width, height) and returns the middle of it."""
    scale = max(side / own for side, own in zip(size, image.size, strict=True))
    image = image.resize([round(own * scale) for own in image.size], Image.Resampling.LANCZOS)
    left, top = ((own - side) // 2 for own, side in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


class WanTI2V(WanPipeline):
    def generate(
        self,
        input_prompt: str,
        img: Image.Image | None = None,
        size: tuple[int, int] = (1280, 704),
        max_area: int = 704 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> torch.Tensor | None:
        """Generates one video.

        img: its first frame, of any size; the video then has about its aspect ratio and at most max_area pixels a
        frame. Without one it has `size` (width, height), multiples of 32. The others as in `WanT2V.generate`.

        Returns float32 [3, frame_num, height, width] in [-1, 1]. Raises ValueError for a bad size, frame_num or solver.
        """
        if img is not None:
            rows, columns = (s * p for s, p in zip(self.config.vae_stride[1:], self.config.patch_size[1:], strict=True))
            size = covered_size(img.size, max_area, (columns, rows))
        shape = self.latent_shape(size, frame_num)
        contexts = self.encode_text(input_prompt, n_prompt, offload_model, guide_scale)
        first = None
        if img is not None:
            (first,) = self.vae.encode([self.pixels(covering(img.convert("RGB"), size))[:, None]])
        how = Denoising(sample_solver, sampling_steps, shift, guide_scale, offload_model)
        given = {"seq_len": self.token_count(shape)}
        return self.decode(self.denoise(self.noise(shape, seed), contexts, given, how, first))
