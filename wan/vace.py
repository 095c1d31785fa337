"""Video creation and editing with VACE: from a source video, a mask and reference images, each of them optional."""

import torch
import torch.nn.functional as F
from einops import rearrange

from wan.modules.vace_model import VaceWanModel
from wan.pipeline import Denoising, WanPipeline
from wan.utils.vace_source import prepare_source


class WanVace(WanPipeline):
    model_class = VaceWanModel

    def prepare_source(
        self,
        src_video: list[str | None],
        src_mask: list[str | None],
        src_ref_images: list[list[str] | None],
        num_frames: int,
        image_size: tuple[int, int],
        device: torch.device | str,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[torch.Tensor] | None]]:
        """Calls `wan.utils.vace_source.prepare_source` for every entry of the lists: videos, masks and references."""
        sources = [
            prepare_source(video, mask, refs, num_frames, image_size, device)
            for video, mask, refs in zip(src_video, src_mask, src_ref_images, strict=True)
        ]
        return tuple(list(column) for column in zip(*sources, strict=True))

    def vace_encode_frames(
        self, frames: list[torch.Tensor], ref_images: list[list[torch.Tensor] | None] | None, masks: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Latents of what the mask keeps and of what it covers, one [32, references + f, H / 8, W / 8] per video.
        frames [3, F, H, W] in [-1, 1]; ref_images [3, 1, H, W] each, which the mask never covers; masks [1 or 3, F, H,
        W], covering where they are over 0.5."""
        latents = []
        for video, refs, mask in zip(frames, ref_images or [None] * len(frames), masks, strict=True):
            covered = mask > 0.5
            parts = [F.pad(z, (0, 0) * 3 + (0, z.shape[0])) for z in self.vae.encode(refs or [])]
            parts.append(torch.cat(self.vae.encode([video * ~covered, video * covered])))
            latents.append(torch.cat(parts, dim=1))
        return latents

    def vace_encode_masks(
        self, masks: list[torch.Tensor], ref_images: list[list[torch.Tensor] | None] | None = None
    ) -> list[torch.Tensor]:
        """Masks [1 or 3, F, H, W] of the latents' size, one [64, references + (F + 3) // 4, H / 8, W / 8] per video. A
        channel holds one pixel of every 8 x 8 block; the mask's first channel counts. It is 0 for the references."""
        time, rows, columns = self.config.vae_stride
        encoded = []
        for mask, refs in zip(masks, ref_images or [None] * len(masks), strict=True):
            blocks = rearrange(mask[0].float(), "f (h p) (w q) -> (p q) f h w", p=rows, q=columns)
            size = ((mask.shape[1] + time - 1) // time, *blocks.shape[2:])
            blocks = F.interpolate(blocks[None], size, mode="nearest-exact")[0]
            encoded.append(F.pad(blocks, (0, 0, 0, 0, len(refs or []), 0)))
        return encoded

    def generate(
        self,
        input_prompt: str,
        input_frames: list[torch.Tensor] | None,
        input_masks: list[torch.Tensor] | None,
        input_ref_images: list[list[torch.Tensor] | None] | None,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        context_scale: float = 1.0,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> torch.Tensor | None:
        """Generates one video.

        input_frames, input_masks, input_ref_images: as `prepare_source` returns them, lists of one: the video
        [3, F, H, W] in [-1, 1], the mask [1 or 3, F, H, W] (1 where to generate), the references [3, 1, H, W]. Without
        a mask everything is generated. Without a video the result has `size` (width, height) and frame_num (4 n + 1)
        frames; with one, its own. context_scale: weight of the control video. The others as in `WanT2V.generate`.

        Returns float32 [3, F, H, W] in [-1, 1]; frames beyond 4 n + 1 are dropped. Raises ValueError for shapes that
        do not fit, a bad size, frame count or solver.
        """
        given = {"input_frames": input_frames, "input_masks": input_masks, "input_ref_images": input_ref_images}
        for name, entries in given.items():
            if entries is not None and len(entries) != 1:
                raise ValueError(f"{name} must hold one video's, got {len(entries)} entries")
        frames, mask, refs = (entries and entries[0] for entries in given.values())
        if frames is None:
            self.latent_shape(size, frame_num)  # raises for what cannot be tiled
            frames = torch.zeros(3, frame_num, size[1], size[0])
        mask = torch.ones_like(frames[:1]) if mask is None else mask
        refs = refs or []
        self.check_shapes(frames, mask, refs)
        contexts = self.encode_text(input_prompt, n_prompt, offload_model, guide_scale)
        frames, mask, *refs = (u.to(self.device) for u in (frames, mask, *refs))
        parts = self.vace_encode_frames([frames], [refs], [mask]) + self.vace_encode_masks([mask], [refs])
        vace_context, skipped = torch.cat(parts), len(refs)
        del frames, mask, refs, parts  # gigabytes that the transformer has better use for
        shape = (self.config.z_dim, *vace_context.shape[1:])
        control = {"vace_context": [vace_context], "vace_context_scale": context_scale}
        control["seq_len"] = self.token_count(shape)
        how = Denoising(sample_solver, sampling_steps, shift, guide_scale, offload_model)
        return self.decode(self.denoise(self.noise(shape, seed), contexts, control, how)[:, skipped:])

    def check_shapes(self, frames: torch.Tensor, mask: torch.Tensor, refs: list[torch.Tensor]) -> None:
        """Raises ValueError unless they are as `generate` needs them."""
        if frames.ndim != 4 or len(frames) != 3 or frames.shape[1] == 0:
            raise ValueError(f"input_frames must be [3, F, H, W], got {list(frames.shape)}")
        height, width = frames.shape[2:]
        self.latent_shape((width, height), 1)  # raises for what cannot be tiled
        if mask.ndim != 4 or len(mask) not in (1, 3) or mask.shape[1:] != frames.shape[1:]:
            raise ValueError(f"input_masks must fit frames of {list(frames.shape)}, got {list(mask.shape)}")
        for ref in refs:
            if ref.shape != (3, 1, height, width):
                raise ValueError(f"a reference must be {[3, 1, height, width]}, got {list(ref.shape)}")
