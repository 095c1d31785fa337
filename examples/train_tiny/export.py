"""Writes a trained demo model as an official Wan2.1 checkpoint folder, in half precision.

python -m examples.train_tiny.export --trained DIR --out examples/Wan2.1-T2V-tiny [--task i2v-tiny]
"""

import argparse
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from examples.train_tiny.train_dit import make_dit, make_text_encoder, make_tokenizer
from examples.train_tiny.train_i2v import make_i2v_dit, make_image_encoder
from examples.train_tiny.train_vae import BASE_DIM
from wan.configs import WAN_CONFIGS
from wan.modules.clip import BLOCK_NAMES as CLIP_BLOCK_NAMES
from wan.modules.t5 import tensor_names

# diffusers' name -> the official one; diffusers' converter goes the other way
VAE_NAMES = [
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"conv_in", "conv1"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"down_blocks", "downsamples"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
    (r"\.conv_shortcut\.", ".shortcut."),
]
RESIDUAL_NAMES = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}


def official_vae_name(name: str) -> str:
    for layer, official in RESIDUAL_NAMES.items():
        name = re.sub(rf"(\.\d+)\.{layer}\.", rf"\1.{official}.", name)
    for pattern, replacement in VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def official_vae(state: dict) -> dict:
    official = {official_vae_name(name): tensor.half() for name, tensor in state.items()}
    if set(convert_wan_vae_to_diffusers(official)) != set(state):
        raise RuntimeError("the VAE's tensor names do not survive diffusers' own converter")
    return official


def official_clip(state: dict, num_layers: int) -> dict:
    """Renames transformers' vision tower to the official layout and adds the last block, which nothing runs."""
    state = {name.removeprefix("vision_model."): tensor.half() for name, tensor in state.items()}
    official = {
        "cls_embedding": state["embeddings.class_embedding"][None, None],
        "pos_embedding": state["embeddings.position_embedding.weight"][None],
        "patch_embedding.weight": state["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        official[f"pre_norm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        for i in range(num_layers + 1):
            ours, theirs = f"transformer.{i}", f"encoder.layers.{min(i, num_layers - 1)}"
            for name, source in CLIP_BLOCK_NAMES.items():
                official[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{source}.{kind}"]
            qkv = [state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            official[f"{ours}.attn.to_qkv.{kind}"] = torch.cat(qkv)
    return {f"visual.{name}": tensor.clone() for name, tensor in official.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", default="t2v-tiny", choices=("t2v-tiny", "i2v-tiny"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = WAN_CONFIGS[args.task]

    vae = AutoencoderKLWan(base_dim=BASE_DIM)
    vae.load_state_dict(torch.load(args.trained / "vae.pt", weights_only=True))
    torch.save(official_vae(vae.state_dict()), args.out / config.vae_checkpoint)

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(args.out / config.t5_tokenizer)
    trained = torch.nn.ModuleDict({"text_encoder": make_text_encoder(len(tokenizer))})
    if args.task == "t2v-tiny":
        trained["dit"], weights = make_dit(), "dit.pt"
    else:
        trained["dit"], trained["image_encoder"], weights = make_i2v_dit(), make_image_encoder(), "i2v.pt"
    trained.load_state_dict(torch.load(args.trained / weights, weights_only=True))
    theirs = trained["text_encoder"].state_dict()
    text = {
        ours: theirs[name].bfloat16() for ours, name in tensor_names(len(trained["text_encoder"].encoder.block)).items()
    }
    torch.save(text, args.out / config.t5_checkpoint)
    if args.task == "i2v-tiny":
        encoder = trained["image_encoder"]
        torch.save(
            official_clip(encoder.state_dict(), encoder.config.num_hidden_layers), args.out / config.clip_checkpoint
        )
    trained["dit"].half().save_pretrained(args.out)

    files = sorted(path for path in args.out.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:>10,} {path.relative_to(args.out)}")
    print(f"{sum(path.stat().st_size for path in files):>10,} bytes in all")


if __name__ == "__main__":
    main()
