"""The flags: Wan2.1's, MagCache's, and ours."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from magcache.app.backend import backend
from magcache.app.prompts import is_text
from magcache.app.tasks import TASKS, all_sizes


class Explicit(argparse.Action):
    """Stores a value, and also that it was given, even if it is the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.explicit |= {self.dest}


def is_first(rank: str) -> bool:
    """Whether this is the first of all processes ("RANK"), or of those on this machine ("LOCAL_RANK")."""
    number = os.environ.get(rank, "0")
    return os.environ.get("WORLD_SIZE", "1") == "1" or number == "0" or not number.isdigit()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, once per machine where several processes find it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if is_first("LOCAL_RANK") else None)


def truth_value(text: str) -> bool:
    """Reads yes, true, t, y, 1 or no, false, f, n, 0, in upper or lower case, as upstream's flags do."""
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected a truth value (True or False), got {text!r}")
    return text.lower() in ("yes", "true", "t", "y", "1")


def utf8(argument: str) -> str:
    """Takes the bytes of an argument for UTF-8, whatever the locale says."""
    try:
        return argument if is_text(argument) else os.fsencode(argument).decode()
    except ValueError:
        raise argparse.ArgumentTypeError(f"not valid UTF-8 text: {argument!r}") from None


def make_parser(script: str | Path, description: str | None = None) -> Parser:
    """Makes the parser. script: path of the command, whose folder holds the examples; it becomes args.script."""
    usage = "%(prog)s --task TASK --ckpt_dir DIR --prompt TEXT --use_magcache --magcache_speedup X [any flag below]"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(usage=usage, description=description, formatter_class=formatter, allow_abbrev=False)
    parser.set_defaults(script=os.path.abspath(script), explicit=frozenset())
    add_first(parser.add_argument_group("the flags that matter first").add_argument)
    add_contents(parser.add_argument_group("what to generate").add_argument)
    add_sampling(parser.add_argument_group("sampling").add_argument)
    add_machine(parser.add_argument_group("model and machine").add_argument)
    add_extension(parser.add_argument_group("prompt extension").add_argument)
    add_magcache(parser.add_argument_group("MagCache").add_argument)
    for name in backend().not_used:
        parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def add_first(add: Callable) -> None:
    what = "what to generate, from what, with which model"
    add("--task", default=backend().task, choices=tuple(TASKS), help=what)
    add("--ckpt_dir", metavar="DIR", help="checkpoint folder in the official layout")
    add("--prompt", metavar="TEXT", type=utf8, help="what to show (default: an example)")
    add("--use_magcache", action="store_true", help="compute only the transformer calls that the schedule names")
    speedup = "compute at most one step in X, chosen by noise level, and forecast the others; needs no calibration"
    add("--magcache_speedup", type=float, metavar="X", help=f"{speedup} (without it: MagCache as published)")


def add_contents(add: Callable) -> None:
    size = "width*height or widthxheight; only its area counts where an input file decides on the shape"
    add("--size", default="1280*720", type=lambda text: text.lower().replace("x", "*"), choices=all_sizes(), help=size)
    add("--frame_num", type=int, help="frames, 4n+1 (default: by task, mostly 81)")
    unwanted = "what not to show (default: the model's own negative prompt)"
    add("--n_prompt", metavar="TEXT", type=utf8, help=unwanted)
    add("--prompt_file", metavar="FILE", help="make a video of each line: a prompt, or JSON")
    add("--overwrite", action="store_true", help="with --prompt_file: make finished videos again")
    seed = "seed of the noise; negative (default): random, or 0 with --prompt_file"
    add("--base_seed", type=int, default=-1, help=seed)
    result = "file of the result, or with --prompt_file its folder (default: named after settings or prompt file)"
    add("--save_file", help=result)
    add("--image", help="input image (i2v)")
    add("--first_frame", help="first frame (flf2v)")
    add("--last_frame", help="last frame (flf2v)")
    add("--src_video", help="source video (vace)")
    add("--src_mask", help="source mask, white where to generate: a video, or a picture for all frames (vace)")
    add("--src_ref_images", help="reference images, comma separated (vace)")


def add_sampling(add: Callable) -> None:
    add("--sample_solver", default="unipc", choices=("unipc", "dpm++"))
    add("--sample_steps", type=int, help="sampling steps (default: by task, 40 or 50)")
    add("--sample_shift", type=float, help="shift of the noise levels (default: by task and size, 3 to 16)")
    guidance = "classifier-free guidance (default: 5.0; of two experts, low and high noise: t2v-A14B 3 and 4, "
    guidance += "i2v-A14B 3.5)"
    add("--sample_guide_scale", type=float, default=5.0, action=Explicit, help=guidance)


def add_machine(add: Callable) -> None:
    lora = "merge a LoRA of diffusers, peft, kohya or ComfyUI into the weights (strength: 1); may be repeated; "
    lora += "of Wan2.2's two transformers both are changed, or only one by high=FILE or low=FILE"
    add("--lora", action="append", metavar="FILE[:STRENGTH]", help=lora)
    offload = "keep models on the GPU only while they work (default: True; False on several GPUs)"
    add("--offload_model", type=truth_value, help=offload)
    add("--t5_cpu", action="store_true", help="keep the text encoder on the CPU")
    add("--t5_fsdp", action="store_true", help="shard the text encoder over GPUs")
    add("--dit_fsdp", action="store_true", help="shard the DiT over GPUs")
    add("--ulysses_size", type=int, default=1, help="GPUs that share the attention heads")
    add("--ring_size", type=int, default=1, help="GPUs that share the sequence in a ring")
    convert = "hold the DiT in bfloat16, like --dit_dtype bfloat16 (Wan2.2's flag)"
    add("--convert_model_dtype", action="store_true", help=convert)
    dtype = "dtype of the DiT's large weights (default: bfloat16 on CUDA, which changes no bit of the result; float32 "
    dtype += "on the CPU and with --dit_fsdp)"
    add("--dit_dtype", choices=("float32", "bfloat16", "float8_e4m3fn"), help=dtype)
    blocks = "two blocks of the DiT, or one layer of the text encoder, on the GPU at a time; the rest in pinned memory"
    add("--offload_blocks", action="store_true", help=blocks)
    add("--compile", action="store_true", help="compile the DiT's blocks with torch.compile")
    attention = "attention backend as diffusers calls it: flash, sage, ... (default: torch's own)"
    add("--attn_backend", metavar="NAME", help=attention)
    add("--vae_tiling", action="store_true", help="decode in tiles, for large videos on small GPUs")


def add_extension(add: Callable) -> None:
    add("--use_prompt_extend", action="store_true", help="let a language model write the prompt out first")
    methods = "a model on this machine (default), or Alibaba's service with the key in DASH_API_KEY"
    known = {"choices": ("dashscope", "local_qwen"), "action": Explicit, "help": methods}
    add("--prompt_extend_method", default="local_qwen", **known)
    model = "folder or cached hub name of a Qwen2.5 (VL) model, or the name of a model of the service"
    add("--prompt_extend_model", action=Explicit, help=model)
    known = {"choices": ("zh", "en"), "action": Explicit, "help": "language of the prompt (default: zh)"}
    add("--prompt_extend_target_lang", default="zh", **known)


def add_magcache(add: Callable) -> None:
    thresh = "MagCache as published: bound on the error over reused steps in a row (default: 0.12)"
    add("--magcache_thresh", type=float, default=0.12, action=Explicit, help=thresh)
    most = "MagCache as published: most steps reused in a row (default: 2)"
    add("--magcache_K", type=int, default=2, action=Explicit, help=most)
    retention = "MagCache as published: share of the steps, at the start, that always compute (default: 0.2)"
    add("--retention_ratio", type=float, default=0.2, action=Explicit, help=retention)
    quality = "choose the largest speed-up for which trials of the model promise this latent PSNR"
    add("--magcache_quality", type=float, metavar="DB", help=quality)
    calibration = "measure the model's ratio table in a run that computes every call, and write it into calibration/, "
    calibration += "beside --save_file or into its folder; with speed-ups, also try these on every prompt"
    add("--magcache_calibration", nargs="?", const=True, default=False, metavar="X,X,...", help=calibration)
    add("--mag_ratios", metavar="NAME_OR_PATH", help="ratio table (default: chosen by task and checkpoint folder)")
    add("--magcache_offload", action="store_true", help="keep what is cached in CPU memory")
    plan = "only print, or also draw, what the run would do; needs no weights and no GPU"
    add("--magcache_plan", nargs="?", const=True, metavar="PNG", help=plan)
    compare = "also generate without the cache, and show both, their difference and scores as a video and a page"
    add("--compare", action="store_true", help=compare)
