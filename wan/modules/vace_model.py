"""The VACE transformer: the Wan2.1 DiT with a side branch that turns a control video into hints for the main blocks."""

from typing import ClassVar

import torch
import torch.nn as nn
from diffusers.configuration_utils import register_to_config

from wan.modules.model import PATCH_SIZE, WanAttentionBlock, WanModel, stack_padded


class VaceWanAttentionBlock(WanAttentionBlock):
    """A block of the side branch; the first one (block_id 0) also takes in the main branch's tokens."""

    def __init__(self, *args, block_id: int):
        super().__init__(*args)
        dim = self.modulation.shape[-1]
        if block_id == 0:
            self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.Linear(dim, dim)

    def forward(self, c: torch.Tensor, x: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """c: the side branch's tokens [B, L, dim]; x: the main branch's before its first block. Returns the next c and
        the hint, both [B, L, dim]."""
        if hasattr(self, "before_proj"):
            c = self.before_proj(c) + x
        c = super().forward(c, **kwargs)
        return c, self.after_proj(c)


class BaseWanAttentionBlock(WanAttentionBlock):
    """A main block; block_id is the position of its hint, None if it gets none."""

    def __init__(self, *args, block_id: int | None):
        super().__init__(*args)
        self.block_id = block_id

    @torch.compiler.disable(recursive=False)  # else every block_id is compiled anew
    def forward(self, x: torch.Tensor, hints: list[torch.Tensor], context_scale: float, **kwargs) -> torch.Tensor:
        x = super().forward(x, **kwargs)
        return x if self.block_id is None else x + hints[self.block_id] * context_scale


class VaceWanModel(WanModel):
    """The DiT of the VACE models; see `forward`.

    vace_layers: the main blocks that get a hint, in the order of the side branch's blocks (default: every second
    one). vace_in_dim: channels of the control video (default: in_dim). The other arguments are those of `WanModel`.

    Raises ValueError for another model_type, or vace_layers that are not distinct main blocks.
    """

    _keep_in_fp32_modules: ClassVar = [*WanModel._keep_in_fp32_modules, "vace_patch_embedding"]
    _repeated_blocks: ClassVar = ["BaseWanAttentionBlock", "VaceWanAttentionBlock"]

    @register_to_config
    def __init__(
        self,
        vace_layers: list[int] | None = None,
        vace_in_dim: int | None = None,
        model_type: str = "vace",
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        eps: float = 1e-6,
    ):
        if model_type != "vace":
            raise ValueError(f'VaceWanModel is for checkpoints of model_type "vace", not "{model_type}"')
        self.vace_layers = list(range(0, num_layers, 2)) if vace_layers is None else list(vace_layers)
        if len(set(self.vace_layers) & set(range(num_layers))) != len(self.vace_layers):
            raise ValueError(f"vace_layers must be distinct layers below {num_layers}, got {self.vace_layers}")
        # without its decorator, which would register its arguments over these; the main blocks are made below
        sizes = (text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim, num_heads)
        WanModel.__init__.__wrapped__(self, model_type, *sizes, num_layers=0, eps=eps)
        arguments = (dim, ffn_dim, num_heads, text_len, False, eps)
        hint_ids = {layer: i for i, layer in enumerate(self.vace_layers)}
        self.blocks = nn.ModuleList(
            BaseWanAttentionBlock(*arguments, block_id=hint_ids.get(layer)) for layer in range(num_layers)
        )
        self.vace_blocks = nn.ModuleList(
            VaceWanAttentionBlock(*arguments, block_id=i) for i in range(len(self.vace_layers))
        )
        self.vace_patch_embedding = nn.Conv3d(vace_in_dim or in_dim, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)

    def forward(
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        vace_context: list[torch.Tensor],
        context: list[torch.Tensor],
        seq_len: int,
        vace_context_scale: float = 1.0,
        clip_fea: torch.Tensor | None = None,
        y: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Predicts the velocity of every sample.

        x, t, context, seq_len and the returned list are as in `WanModel.forward`. vace_context: the control video, one
        [vace_in_dim, F, H, W] per sample with F, H, W of its latent. vace_context_scale: weight of the hints. clip_fea
        and y are ignored; they are there because every Wan model takes them.

        Raises the errors of `WanModel.forward`, and ValueError for a control video of another size.
        """
        sizes, control_sizes = ([tuple(u.shape[1:]) for u in samples] for samples in (x, vace_context))
        if control_sizes != sizes:
            raise ValueError(f"vace_context must have the latents' sizes {sizes}, got {control_sizes}")

        def hints(tokens: torch.Tensor, kwargs: dict) -> dict:
            found = self.forward_vace(tokens, vace_context, seq_len, kwargs)
            return {"hints": found, "context_scale": vace_context_scale}

        return self.predict(x, t, seq_len, self.embed_context(context, None), hints)

    def forward_vace(
        self, x: torch.Tensor, vace_context: list[torch.Tensor], seq_len: int, kwargs: dict
    ) -> list[torch.Tensor]:
        """Runs the side branch. x: the embedded tokens [B, seq_len, dim]; kwargs: the blocks' other arguments. Returns
        one hint [B, seq_len, dim] per entry of vace_layers."""
        embedded = [self.vace_patch_embedding(u[None])[0].flatten(1).T for u in vace_context]
        c = self.part(stack_padded(embedded, embedded[0].shape[0] if self.sequence else seq_len))
        hints = []
        for block in self.vace_blocks:
            c, hint = block(c, x, **kwargs)
            hints.append(hint)
        return hints
