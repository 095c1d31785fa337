"""LoRA files: what they change in a Wan transformer, told from their headers, and how that is merged into its weights.

diffusers has converters for most formats: private ones, in its later versions. They need the tensors where a header is
enough to check, want every layer of a block changed, and drop what they do not know, such as changes of norms.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from magcache.app.architecture import IMAGE, Architecture, Shapes, tensor_shapes
from magcache.app.checkpoint import find_weights, read_header
from magcache.app.errors import Refused, shortened
from magcache.app.tasks import TASKS, Task
from magcache.files import read_json

if TYPE_CHECKING:
    import torch

# what a tensor is, by the end of its name; before that is the name of a module, after one of the prefixes
ENDINGS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "bias",
    "diff_m": "modulation",
}
PREFIXES = re.compile(r"(base_model\.model\.|diffusion_model\.|transformer\.|pipe\.dit\.|lora_unet_+|lycoris_)*")
DIFFUSERS = {  # parts of Wan's names, and diffusers' for them
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}

# as `flat` has them: what is there for an image encoder, which i2v of Wan2.2 does not have
OF_IMAGE_ENCODER = re.compile(r"[kv]_img_|img_emb_|add_[kv]_proj_|norm_added_k_|image_embedder_")

Change = dict[str, str]  # of a parameter: names of tensors in a file, by what they are: down, up, alpha, diff


@dataclass(frozen=True)
class Lora:
    """A file of low-rank changes, and how strongly they apply. expert: which of two transformers they are for, "high"
    or "low" noise; None for all there are."""

    path: str
    strength: float = 1.0
    expert: str | None = None

    @classmethod
    def from_flag(cls, text: str) -> "Lora":
        """Reads FILE or FILE:STRENGTH, with "high=" or "low=" in front if it is for one of two transformers. Raises
        Refused if the strength is not a finite number."""
        if os.path.isfile(text):
            return cls(text)
        expert, text = re.fullmatch("(?:(high|low)=)?(.*)", text, re.DOTALL).groups()
        path, colon, number = text.rpartition(":")
        if not colon or os.path.isfile(text):
            return cls(text, expert=expert)
        try:
            strength = float(number)
        except ValueError:
            raise Refused(f"--lora: there is no file {text}, and {shortened(number)} is not a strength") from None
        if not math.isfinite(strength):
            raise Refused(f"--lora {path}: the strength must be finite, got {strength}")
        return cls(path, strength, expert)

    def __str__(self) -> str:
        return f"{self.expert}={self.path}:{self.strength}" if self.expert else f"{self.path}:{self.strength}"

    @cached_property
    def sha256(self) -> str:
        """The checksum of the file, as it is when this is first asked for."""
        checksum = hashlib.sha256()
        with open(self.path, "rb") as file:
            while part := file.read(2**24):
                checksum.update(part)
        return checksum.hexdigest()


def check_lora(lora: Lora, task: Task, sizes: Architecture) -> None:
    """Refuses a file that is no LoRA of the task's transformers, which have these sizes, by its header."""
    if not os.path.isfile(lora.path):
        raise Refused(f"--lora: there is no file {lora.path}")
    if lora.expert and not task.boundary:
        raise Refused(f"--lora {lora}: task {task.name} has one transformer, and none for {lora.expert} noise")
    try:
        names = read_header(Path(lora.path))
        read_alpha(Path(lora.path))
    except ValueError as fault:
        raise Refused(f"--lora: {fault}") from None
    if fault := misfit(names, sizes):
        fitting = [task.name for task in TASKS.values() if not misfit(names, task.architecture)]
        hint = f"; it fits the model of {' or '.join(fitting)}" if fitting else ""
        raise Refused(f"--lora {lora.path} does not fit: {fault}{hint}")
    if unused := len(names) - len(usable(names, tensor_shapes(sizes))):
        print(f"note: {unused} of {len(names)} tensors of {lora.path} are for an image encoder, which this model lacks")


def misfit(names: Shapes, sizes: Architecture) -> str | None:
    try:
        find_changes(names, tensor_shapes(sizes))
    except ValueError as fault:
        return str(fault)
    return None


def find_changes(names: Shapes, shapes: Shapes) -> dict[str, Change]:
    """Returns, by parameter, what a file changes in a model. names: of its tensors, and their shapes. shapes: of the
    parameters. Raises ValueError for what has no place there, another shape than its place, or no other half."""
    places, changes = spellings(shapes), {}
    for tensor in usable(names, shapes):
        parameter, kind = place_of(tensor, places, shapes)
        if (other := changes.setdefault(parameter, {}).setdefault(kind, tensor)) != tensor:
            raise ValueError(f"tensors {other[:80]} and {tensor[:80]} stand for the same change")
    if not changes:
        raise ValueError("it holds no tensors")
    for parameter, change in changes.items():
        check_shapes({kind: names[tensor] for kind, tensor in change.items()}, parameter, shapes[parameter])
    return changes


def usable(names: Shapes, shapes: Shapes) -> Shapes:
    """Leaves out tensors for an image encoder if the model sees images without one; some files come with these."""
    if shapes["patch_embedding.weight"][1] != IMAGE or "img_emb.proj.0.weight" in shapes:
        return names
    return {name: shape for name, shape in names.items() if not OF_IMAGE_ENCODER.search(flat(name))}


def place_of(tensor: str, places: dict[str, str], shapes: Shapes) -> tuple[str, str]:
    """Returns the parameter that a tensor changes, and its part in the change. places: those of `spellings`."""
    ending = next((ending for ending in ENDINGS if tensor.endswith(f".{ending}")), "")
    module, kind = places.get(flat(tensor.removesuffix(f".{ending}"))), ENDINGS.get(ending)
    whole = kind in ("bias", "modulation")
    parameter = module if module in shapes else f"{module}.{kind if whole else 'weight'}"
    if kind is None or parameter not in shapes:
        raise ValueError(f"tensor {tensor[:80]} has no place in this model")
    return parameter, "diff" if whole else kind


def check_shapes(change: Shapes, parameter: str, shape: tuple[int, ...]) -> None:
    """Checks the change of one parameter. change: the shapes of its tensors, by their part in it."""
    if ("down" in change) != ("up" in change) or ("alpha" in change and "down" not in change):
        raise ValueError(f"the change of {parameter} is incomplete: it has only {' and '.join(change)}")
    if "down" in change:  # of a convolution with its kernel, or as a matrix
        down, up = change["down"], change["up"]
        paired = len(down) > 1 and len(up) > 1 and up[1] == down[0] and math.prod(up[2:]) == 1
        if not paired or (up[0], math.prod(down[1:])) != (shape[0], math.prod(shape[1:])):
            pair = f"{list(up)[:6]} times {list(down)[:6]}"
            raise ValueError(f"the change of {parameter} is {pair}, but the model's is {list(shape)}")
    if change.get("diff", shape) != shape:
        raise ValueError(f"the change of {parameter} is {list(change['diff'])[:6]}, but the model's is {list(shape)}")
    if math.prod(change.get("alpha", ())) != 1:
        raise ValueError(f"alpha of {parameter} is not a single number")


def spellings(shapes: Shapes) -> dict[str, str]:
    """Returns modules, and parameters named like one, by all their names as `flat` writes them."""
    places = {}
    for name in [*shapes, *(name.rpartition(".")[0] for name in shapes)]:
        theirs = f".{name}."
        for part, other in DIFFUSERS.items():
            theirs = theirs.replace(f".{part}.", f".{other}.")
        places |= {flat(name): name, flat(theirs.strip(".")): name}
    return places


def flat(name: str) -> str:
    """Writes a name as kohya does, with underscores for dots and without a prefix."""
    return PREFIXES.sub("", name, count=1).replace(".", "_")


def read_alpha(path: Path) -> float | None:
    """Returns the number that diffusers and peft scale all changes of a file by (over the rank); None if the tensors
    hold it or nothing does. Raises ValueError for a kind of LoRA that cannot be merged as one product."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if not text and not (path.name == "adapter_model.safetensors" and beside.is_file()):
        return None
    config = None
    with contextlib.suppress(ValueError, RecursionError):
        config = json.loads(text) if text else read_json(beside)
    if not isinstance(config, dict):
        raise ValueError(f"cannot read the configuration of {path}")
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if other := [key for key in ("use_dora", "use_rslora", "alpha_pattern") if config.get(key)]:
        raise ValueError(f"{path} is a LoRA with {other[0]}, which is not supported")
    alpha = config.get("lora_alpha")
    if alpha is not None and (type(alpha) not in (int, float) or not math.isfinite(alpha)):
        raise ValueError(f"lora_alpha of {path} must be a number, got {shortened(alpha)}")
    return alpha


@contextlib.contextmanager
def merging(loras: Sequence[Lora]) -> Iterator[None]:
    """Merges the LoRAs into every transformer that any `wan` package loads in this block, as soon as it is read."""
    from wan.modules.model import WanModel

    original = WanModel.from_pretrained.__func__

    def from_pretrained(cls, folder, *args, **kwargs):
        model = original(cls, folder, *args, **kwargs)
        merge(model, Path(folder, kwargs.get("subfolder") or ""), loras)
        return model

    before = WanModel.__dict__.get("from_pretrained")
    WanModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        if before:
            WanModel.from_pretrained = before
        else:
            del WanModel.from_pretrained


def merge(model: "torch.nn.Module", folder: Path, loras: Sequence[Lora]) -> None:
    """Adds strength * (alpha / rank * up @ down + diff), in float32, to the weights that were loaded from this folder.
    What loading has rounded is read again, so that only the sum is rounded."""
    import torch
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    files = {name: folder / file for file in find_weights(folder) for name in read_header(folder / file)}
    changes = {}
    with contextlib.ExitStack() as stack:
        for lora in (lora for lora in loras if lora.expert in (None, folder.name.partition("_")[0])):
            path = Path(lora.path)
            tensors, alpha = stack.enter_context(safe_open(path, framework="pt")), read_alpha(path)
            for name, change in find_changes(read_header(path), shapes).items():
                changes.setdefault(name, []).append((change, tensors, alpha, lora.strength))
        for name in [name for name in parameters if name in changes]:  # in the order of the files, about
            parameter = weight = parameters[name].data
            if weight.dtype != torch.float32:
                with safe_open(files[name], framework="pt") as file:  # as long as it is open all that was read stays
                    weight = file.get_tensor(name).to(torch.float32, copy=True)
            for change in changes[name]:
                add(weight, *change)
            if weight is not parameter:
                parameter.copy_(weight)


def add(weight: "torch.Tensor", change: Change, tensors, alpha: float | None, strength: float) -> None:
    """Adds one change to a weight. tensors: the open file. alpha: used if the file holds none."""
    if "down" in change:
        down, up = (tensors.get_tensor(change[kind]).float().flatten(1) for kind in ("down", "up"))
        if "alpha" in change:
            alpha = tensors.get_tensor(change["alpha"]).item()
        scale = strength if alpha is None else strength * alpha / len(down)
        weight.view(len(up), -1).addmm_(up, down, alpha=scale)
    if "diff" in change:
        weight.add_(tensors.get_tensor(change["diff"]).float(), alpha=strength)
