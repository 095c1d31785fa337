"""The flags: Wan2.1's, MagCache's, and ours."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from magcache.app.tasks import TASKS, all_sizes


class Explicit(argparse.Action):
    """Stores a value, and that it was given although it may be the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.explicit = {*getattr(namespace, "explicit", ()), self.dest}


def is_first(rank: str) -> bool:
    """Whether this is the first of all processes ("RANK"), or of those on this machine ("LOCAL_RANK")."""
    number = os.environ.get(rank, "0")
    return os.environ.get("WORLD_SIZE", "1") == "1" or number == "0" or not number.isdigit()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, once a machine where several processes find it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if is_first("LOCAL_RANK") else None)


def truth_value(text: str) -> bool:
    """Yes, true, t, y, 1 or no, false, f, n, 0, in any case, as upstream's flags take it."""
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected a truth value (True or False), got {text!r}")
    return text.lower() in ("yes", "true", "t", "y", "1")


def make_parser(script: str | Path, description: str | None = None) -> Parser:
    """script: path of the command, whose folder holds the examples; args.script is where it is."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.set_defaults(script=os.path.abspath(script))
    add_contents(parser.add_argument_group("what to generate").add_argument)
    add_sampling(parser.add_argument_group("sampling").add_argument)
    add_machine(parser.add_argument_group("model and machine").add_argument)
    add_extension(parser.add_argument_group("prompt extension").add_argument)
    add_magcache(parser.add_argument_group("MagCache").add_argument)
    return parser


def add_contents(add: Callable) -> None:
    add("--task", default="t2v-14B", choices=tuple(TASKS))
    size = "width*height, or widthxheight; the area where an input file has the shape"
    add("--size", default="1280*720", type=lambda text: text.replace("x", "*"), choices=all_sizes(), help=size)
    add("--frame_num", type=int, help="frames, 4n+1 (default: 81; t2i 1, demo models 17)")
    add("--prompt", help="what to show (default: an example)")
    add("--n_prompt", metavar="TEXT", help="what not to show (default: the model's own negative prompt)")
    add("--prompt_file", metavar="FILE", help="a video of every line: a prompt, or JSON (README: Many prompts)")
    add("--overwrite", action="store_true", help="with --prompt_file: make finished videos again")
    add("--base_seed", type=int, default=-1, help="of the noise; negative (default): random, with a prompt file 0")
    add("--save_file", help="file of the result (with --prompt_file: folder; default: a name of settings or file)")
    add("--image", help="input image (i2v)")
    add("--first_frame", help="first frame (flf2v)")
    add("--last_frame", help="last frame (flf2v)")
    add("--src_video", help="source video (vace)")
    add("--src_mask", help="source mask, white where to generate: a video, or a picture for all frames (vace)")
    add("--src_ref_images", help="reference images, comma separated (vace)")


def add_sampling(add: Callable) -> None:
    add("--sample_solver", default="unipc", choices=("unipc", "dpm++"))
    add("--sample_steps", type=int, help="sampling steps (default: 50; i2v 40)")
    add("--sample_shift", type=float, help="shift of the noise levels (default: 5; i2v at 480p 3; flf2v, vace 16)")
    add("--sample_guide_scale", type=float, default=5.0, help="classifier-free guidance (default: 5.0)")


def add_machine(add: Callable) -> None:
    add("--ckpt_dir", help="checkpoint folder in the official layout")
    offload = "models on the GPU only while they work (default: True; False on several GPUs)"
    add("--offload_model", type=truth_value, help=offload)
    add("--t5_cpu", action="store_true", help="text encoder on the CPU")
    add("--t5_fsdp", action="store_true", help="shard the text encoder over GPUs")
    add("--dit_fsdp", action="store_true", help="shard the DiT over GPUs")
    add("--ulysses_size", type=int, default=1, help="GPUs that share the attention heads")
    add("--ring_size", type=int, default=1, help="GPUs that share the sequence in a ring")
    dtype = (
        "of the DiT's large weights (default: bfloat16 on CUDA, the same to the bit; float32 on CPU, with --dit_fsdp)"
    )
    add("--dit_dtype", choices=("float32", "bfloat16", "float8_e4m3fn"), help=dtype)
    blocks = "one block of the DiT on the GPU at a time, of the text encoder one layer; the others in pinned memory"
    add("--offload_blocks", action="store_true", help=blocks)
    add("--compile", action="store_true", help="compile the DiT's blocks with torch.compile")
    add("--attn_backend", metavar="NAME", help="attention, by diffusers' name: flash, sage, ... (default: torch's own)")
    add("--vae_tiling", action="store_true", help="VAE in tiles, for large videos on small cards")


def add_extension(add: Callable) -> None:
    add("--use_prompt_extend", action="store_true", help="a language model writes the prompt out first")
    methods = "a model on this machine (default), or Alibaba's service with the key in DASH_API_KEY"
    known = {"choices": ("dashscope", "local_qwen"), "action": Explicit, "help": methods}
    add("--prompt_extend_method", default="local_qwen", **known)
    model = "folder or cached hub name of a Qwen2.5 (VL) model; or the service's"
    add("--prompt_extend_model", action=Explicit, help=model)
    known = {"choices": ("zh", "en"), "action": Explicit, "help": "language of the prompt (default: zh)"}
    add("--prompt_extend_target_lang", default="zh", **known)


def add_magcache(add: Callable) -> None:
    add("--use_magcache", action="store_true", help="skip transformer calls where the schedule says so")
    thresh = "bound on the error of reused steps in a row (default: 0.12)"
    add("--magcache_thresh", type=float, default=0.12, action=Explicit, help=thresh)
    add("--magcache_K", type=int, default=2, action=Explicit, help="most reused steps in a row (default: 2)")
    retention = "share of the steps, from the start, that always compute (default: 0.2)"
    add("--retention_ratio", type=float, default=0.2, action=Explicit, help=retention)
    speedup = "compute the steps that this speed-up leaves, spread by their noise levels, and forecast the output of "
    speedup += "the others; in place of thresh, K and retention, needs no ratio table"
    add("--magcache_speedup", type=float, metavar="X", help=speedup)
    quality = "the largest speed-up that is promised this latent PSNR by the trials of the model's ratio table"
    add("--magcache_quality", type=float, metavar="DB", help=quality)
    calibration = "measure this model's ratio table in a run without skips, and write it beside the video, or into the "
    calibration += "folder of all, by default calibration; with speed-ups also try these on every prompt"
    add("--magcache_calibration", nargs="?", const=True, default=False, metavar="X,X,...", help=calibration)
    add("--mag_ratios", metavar="NAME_OR_PATH", help="ratio table (default: by task and name of the checkpoint folder)")
    add("--magcache_offload", action="store_true", help="what is cached waits in CPU memory")
    plan = "only say (and draw) what MagCache would do: no weights, no GPU; takes the flags of the run as they are"
    add("--magcache_plan", nargs="?", const=True, metavar="PNG", help=plan)
    compare = "also generate without the cache; both and their difference as a video and a page, with scores"
    add("--compare", action="store_true", help=compare)
