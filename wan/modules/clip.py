"""The image encoder of i2v and flf2v: transformers' CLIP vision tower with weights from an official Wan2.1 folder."""

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from wan.utils.checkpoints import load_pth, reading

# official tensor name (inside a block, without .weight or .bias) -> transformers name
BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def config_from(tensors: dict[str, torch.Tensor], num_heads: int) -> CLIPVisionConfig:
    """Reads all sizes from the tensors (official names without "visual.") except the number of heads, which no tensor
    shows. The tower ends before its last block, since Wan uses the input of that block."""
    width, _, patch_size, _ = tensors["patch_embedding.weight"].shape
    patches = tensors["pos_embedding"].shape[1] - 1
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["transformer.0.mlp.0.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("transformer.")}) - 1,
        num_attention_heads=num_heads,
        image_size=patch_size * round(patches**0.5),
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def renamed(tensors: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Renames official tensors for transformers' tower of `num_layers` blocks. Raises KeyError if one is missing."""
    state = {
        "embeddings.class_embedding": tensors["cls_embedding"].flatten(),
        "embeddings.position_embedding.weight": tensors["pos_embedding"][0],
        "embeddings.patch_embedding.weight": tensors["patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"pre_layrnorm.{kind}"] = tensors[f"pre_norm.{kind}"]  # transformers' own spelling
        for i in range(num_layers):
            ours, theirs = f"transformer.{i}", f"encoder.layers.{i}"
            for name, target in BLOCK_NAMES.items():
                state[f"{theirs}.{target}.{kind}"] = tensors[f"{ours}.{name}.{kind}"]
            for part, tensor in zip("qkv", tensors[f"{ours}.attn.to_qkv.{kind}"].chunk(3), strict=True):
                state[f"{theirs}.self_attn.{part}_proj.{kind}"] = tensor
    return state


def load_tower(checkpoint_path: str, num_heads: int, dtype: torch.dtype, device: torch.device | str) -> CLIPVisionModel:
    """Loads the vision half of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`; the text half is not used.
    Raises DamagedFile if the file is damaged, or tensors are missing or of another shape."""
    tensors = load_pth(checkpoint_path, device)
    with reading(checkpoint_path):
        tensors = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
        config = config_from(tensors, num_heads)
        state = renamed(tensors, config.num_hidden_layers)
        with torch.device("meta"):
            model = CLIPVisionModel(config)
        tower = getattr(model, "vision_model", model)  # some versions of transformers wrap it once more
        tower.post_layernorm = torch.nn.Identity()  # only for the pooled output, which is not used
        tower.load_state_dict(state, assign=True)
    # a buffer that is in no file
    tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions)[None]
    return model.to(device, dtype).eval().requires_grad_(False)


def preprocess(images: torch.Tensor, size: int) -> torch.Tensor:
    """Turns images [N, 3, H, W] in [-1, 1] into the tower's pixels [N, 3, size, size]: resized bicubically, without
    antialiasing or clamping, as when the model was trained, then normalised."""
    images = F.interpolate(images, [size] * 2, mode="bicubic")
    mean, std = (images.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((images * 0.5 + 0.5) - mean) / std


class CLIPModel:
    """Turns images into features. tokenizer_path, which upstream takes, is ignored: no text is encoded."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        checkpoint_path: str,
        tokenizer_path: str | None = None,
        num_heads: int = 16,
    ):
        self.dtype, self.device = dtype, device
        self.model = load_tower(checkpoint_path, num_heads, dtype, device)

    @torch.no_grad()
    def visual(self, videos: list[torch.Tensor]) -> torch.Tensor:
        """Encodes every frame, squeezed to the encoder's square. videos: [3, frames, H, W] in [-1, 1], of any sizes.
        Returns features [all frames, 1 + patches, width] on the encoder's device, in its dtype."""
        weight, size = next(self.model.parameters()), self.model.config.image_size
        pixels = torch.cat([preprocess(video.transpose(0, 1).to(weight.device).float(), size) for video in videos])
        with torch.autocast(weight.device.type, enabled=False):
            return self.model(pixels.to(weight.dtype)).last_hidden_state
