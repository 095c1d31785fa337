"""Text to video, and text to image with one frame."""

import torch

from wan.pipeline import Denoising, WanPipeline


class WanT2V(WanPipeline):
    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> torch.Tensor | None:
        """Generates one video.

        size: (width, height), multiples of 16. frame_num: 4 n + 1. shift: of the noise levels towards noise.
        guide_scale: of all steps, or of those of low and of high noise, where each has a transformer (Wan2.2).
        n_prompt: empty for the config's negative prompt. seed: negative for a random one. offload_model: keeps
        transformer and text encoder on the GPU only while they work.

        Returns float32 [3, frame_num, height, width] in [-1, 1]. Raises ValueError for a bad size, frame_num or solver.
        """
        shape = self.latent_shape(size, frame_num)
        contexts = self.encode_text(input_prompt, n_prompt, offload_model, guide_scale)
        how = Denoising(sample_solver, sampling_steps, shift, guide_scale, offload_model)
        return self.decode(self.denoise(self.noise(shape, seed), contexts, {"seq_len": self.token_count(shape)}, how))
