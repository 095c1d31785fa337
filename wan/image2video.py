"""Image to video: from a first frame (`WanI2V`), or from a first and a last frame (`WanFLF2V`)."""

import math
import os

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from wan.modules.clip import CLIPModel
from wan.pipeline import Denoising, WanPipeline
from wan.utils.offload import on_device

TOKEN_PIXELS = 16  # on either side


def video_size(image_size: tuple[int, int], max_area: int) -> tuple[int, int]:
    """Returns (width, height) of a video that has about the image's aspect ratio and at most max_area pixels, in whole
    tokens. image_size: (width, height) in pixels. Raises ValueError if not even one token fits."""
    aspect = image_size[1] / image_size[0]
    areas = (max_area / aspect, max_area * aspect)  # in this order and form: the last bit may decide
    size = tuple(int(math.sqrt(area) // TOKEN_PIXELS) * TOKEN_PIXELS for area in areas)
    if not all(size):
        raise ValueError(f"{max_area} pixels in the shape of {image_size[0]}x{image_size[1]} have no room for a token")
    return size


class WanI2V(WanPipeline):
    def load_image_encoder(self, checkpoint_dir: str) -> None:
        """Does nothing for transformers that take no features of images, as those of Wan2.2."""
        config = self.config
        if "clip_checkpoint" not in config:
            return
        # waits on the CPU as the text encoder does
        dtype = config.clip_dtype if self.device.type == "cuda" else torch.float32
        paths = [os.path.join(checkpoint_dir, name) for name in (config.clip_checkpoint, config.clip_tokenizer)]
        self.clip = CLIPModel(dtype, "cpu", *paths, num_heads=config.clip_num_heads)

    def encode_images(self, images: list[torch.Tensor], offload_model: bool) -> torch.Tensor:
        """Images [3, H, W] in [-1, 1] -> features [len(images), tokens, width] on the device."""
        with on_device(self.clip.model, self.device, self.afterwards(offload_model)):
            features = self.clip.visual([image[:, None] for image in images])
        if not self.keeps_models:
            self.clip = None
        return features

    def condition(self, images: list[torch.Tensor], shape: tuple[int, int, int, int], frame_num: int) -> torch.Tensor:
        """Returns the transformer's `y`, [4 + 16, f, h, w]: which frames are given, and the latent of a video of these
        frames with gray between them. images: the first frame, or the first and the last, [3, H, W] in [-1, 1]."""
        _, frames, rows, columns = shape
        height, width = (n * stride for n, stride in zip((rows, columns), self.config.vae_stride[1:], strict=True))
        # bicubic without antialias, as the models were trained
        resized = [F.interpolate(image[None], (height, width), mode="bicubic")[0] for image in images]
        video = resized[0].new_zeros(3, frame_num, height, width)
        given = video.new_zeros(4, frames, rows, columns)  # channel: frame within the four of a latent frame
        video[:, 0], given[:, 0] = resized[0], 1  # the first latent frame stands for one frame only
        if len(images) == 2:
            video[:, -1], given[-1, -1] = resized[1], 1
        return torch.cat([given, self.vae.encode([video])[0]])

    def generate(
        self,
        input_prompt: str,
        img: Image.Image | list[Image.Image],
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> torch.Tensor | None:
        """Generates one video that starts with the image.

        img: of any size; the video has about its aspect ratio and at most max_area pixels a frame. Or the first frame
        and the last one, of the same size, see `WanFLF2V`. The others as in `WanT2V.generate`.

        Returns float32 [3, frame_num, height, width] in [-1, 1]. Raises ValueError for a bad frame count or solver.
        """
        images = img if isinstance(img, list) else [img]
        shape = self.latent_shape(video_size(images[0].size, max_area), frame_num)
        if frame_num < 4 * len(images) - 3:
            raise ValueError(f"a first and a last frame need frame_num 5 or more, got {frame_num}")
        contexts = self.encode_text(input_prompt, n_prompt, offload_model, guide_scale)
        pixels = [self.pixels(image) for image in images]
        given = {"y": [self.condition(pixels, shape, frame_num)], "seq_len": self.token_count(shape)}
        if "clip_checkpoint" in self.config:
            given["clip_fea"] = self.encode_images(pixels, offload_model)
        del pixels  # as large as the photo, on the GPU
        how = Denoising(sample_solver, sampling_steps, shift, guide_scale, offload_model)
        return self.decode(self.denoise(self.noise(shape, seed), contexts, given, how))


class WanFLF2V(WanI2V):
    def generate(
        self,
        input_prompt: str,
        first_frame: Image.Image,
        last_frame: Image.Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 16.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.5,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> torch.Tensor | None:
        """Generates one video that starts with first_frame and ends with last_frame.

        first_frame: of any size; the video has about its aspect ratio and at most max_area pixels a frame. last_frame:
        if its size differs it is scaled to cover the first one, and cropped. frame_num: 5 or more. The others as in
        `WanT2V.generate`.

        Returns float32 [3, frame_num, height, width] in [-1, 1]. Raises ValueError for a bad frame count or solver.
        """
        if last_frame.size != first_frame.size:
            last_frame = ImageOps.fit(last_frame, first_frame.size, Image.Resampling.BICUBIC)
        how = (shift, sample_solver, sampling_steps, guide_scale, n_prompt, seed, offload_model)
        return super().generate(input_prompt, [first_frame, last_frame], max_area, frame_num, *how)
