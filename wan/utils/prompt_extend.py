"""Prompt extension: a language model rewrites a short prompt into the detailed description Wan2.1 was trained on.

Importing this and making an expander loads neither torch nor weights, so that a bad request fails at once.
"""

import base64
import contextlib
import functools
import gc
import importlib.util
import io
import json
import math
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# for the model, by language: one text for every number of pictures that it sees, and what holds for all of them
_INSTRUCTIONS = json.loads(Path(__file__).with_name("instructions.json").read_text(encoding="utf-8"))
_SHORT_NAMES = {f"Qwen2.5_{size}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("3B", "7B", "14B")}
_SHORT_NAMES |= {f"QwenVL2.5_{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B")}
_SEES_PICTURES = {"qwen2": False, "qwen2_vl": True, "qwen2_5_vl": True}  # by model_type
_IMAGE_TOKEN = "<|image_pad|>"

Picture = Image.Image | str | os.PathLike


@dataclass
class PromptOutput:
    """What came of an extension. status: False if it failed; then `prompt` is the original and `message` says why."""

    status: bool
    prompt: str
    seed: int
    system_prompt: str
    message: str


def default_system_prompt(tar_lang: str, pictures: int) -> str:
    """Returns the instructions for a target language ("zh", "en") and a number of pictures (0, 1, or 2: first and last
    frame). Raises ValueError for others."""
    if tar_lang not in _INSTRUCTIONS:
        raise ValueError(f"the target language must be zh or en, got {tar_lang!r}")
    if pictures > 2:
        raise ValueError(f"the pictures must be one, or a first and a last frame, got {pictures}")
    return _INSTRUCTIONS[tar_lang]["tasks"][pictures] + _INSTRUCTIONS[tar_lang]["rules"]


def resolve_model(model_name: str | None, is_vl: bool) -> tuple[Path, bool]:
    """The folder of a local model, and whether that model sees pictures; reads no weights. model_name: a folder, a
    short name such as "Qwen2.5_7B", or a name on the Hugging Face hub, which is looked up in the local cache only;
    None: the default for is_vl. Raises ValueError if nothing there can be used."""
    from huggingface_hub import snapshot_download

    name = model_name or ("QwenVL2.5_7B" if is_vl else "Qwen2.5_14B")
    name = _SHORT_NAMES.get(name, name)
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (ValueError, OSError):
            remedy = "download it first (`hf download NAME`), or give the folder of a Qwen2.5 or Qwen2.5-VL model"
            missing = f"prompt extension model {name} is neither a folder nor in the Hugging Face cache"
            raise ValueError(f"{missing}: {remedy}") from None
    try:
        if not (folder / "config.json").is_file():  # a pipe would never end
            raise FileNotFoundError("config.json")
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        known = kind in _SEES_PICTURES
        index, places = folder / "model.safetensors.index.json", {"": "model.safetensors"}
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = ("tokenizer_config.json", *sorted(set(places.values())))
        missing = [name for name in files if not os.path.isfile(folder / name)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
        raise ValueError(f"prompt extension model {folder} has no usable config.json or index: {fault!r}") from None
    if not known:
        raise ValueError(
            f"prompt extension model {folder} is of type {kind}, but must be a Qwen2.5 or Qwen2.5-VL model"
        )
    if missing:
        raise ValueError(f"prompt extension model {folder} is incomplete: it lacks {missing[0]}; download it again")
    return folder, _SEES_PICTURES[kind]


def _load_picture(picture: Picture, max_area: int) -> Image.Image:
    """As RGB, made smaller where it has more than max_area pixels."""
    image = (picture if isinstance(picture, Image.Image) else Image.open(picture)).convert("RGB")
    scale = min(1, math.sqrt(max_area / (image.width * image.height)))
    return image.resize([max(1, int(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


class PromptExpander:
    def __init__(self, model_name: str, is_vl: bool, max_image_size: int):
        self.model_name, self.is_vl, self.max_image_size = model_name, is_vl, max_image_size

    def _answer(self, prompt: str, system_prompt: str, pictures: list[Image.Image], seed: int) -> str:
        """The model's answer; may raise anything."""

    def __call__(
        self,
        prompt: str,
        system_prompt: str | None = None,
        tar_lang: str = "zh",
        image: Picture | list[Picture] | None = None,
        seed: int = -1,
    ) -> PromptOutput:
        """Extends a prompt; whatever goes wrong, it returns the original one and says why. system_prompt: instructions
        for the model (default: ours, in tar_lang "zh" or "en"). image: one, or the first and the last frame; a model
        that sees no pictures extends the text alone and the message says so. seed: of the model's choices; negative: a
        random one."""
        seed = seed if seed >= 0 else secrets.randbelow(2**31)  # leaves the state of `random` alone
        images = image if isinstance(image, list | tuple) else [] if image is None else [image]
        message = ""
        if images and not self.is_vl:
            images, message = [], f"{self.model_name} sees no pictures, so only the text was extended"
        try:
            if system_prompt is None:
                system_prompt = default_system_prompt(tar_lang, len(images))
            pictures = [_load_picture(item, self.max_image_size) for item in images]
            answer = " ".join(self._answer(prompt, system_prompt, pictures, seed).split())
            if not answer:
                raise ValueError(f"{self.model_name} gave an empty answer")
        except Exception as fault:
            reason = " ".join(f"{type(fault).__name__}: {fault}".split())
            return PromptOutput(False, prompt, seed, system_prompt or "", reason)
        return PromptOutput(True, answer, seed, system_prompt, message)


class DashScopePromptExpander(PromptExpander):
    """Extends prompts with a model of Alibaba's DashScope service; pictures are sent along if is_vl.

    api_key: default: the environment's DASH_API_KEY. DASH_API_URL there: another base address of the service.
    model_name: default: qwen-plus, or qwen-vl-max if is_vl. max_image_size: pixels of a picture that is sent.
    retry_times: how often to try while the service is out of reach or busy. Other arguments, those of
    QwenPromptExpander, are ignored. Raises ValueError without a key or without the package dashscope.
    """

    def __init__(
        self,
        api_key: str | None = None,
        model_name: str | None = None,
        max_image_size: int = 512 * 512,
        retry_times: int = 4,
        is_vl: bool = False,
        **kwargs,
    ):
        super().__init__(model_name or ("qwen-vl-max" if is_vl else "qwen-plus"), is_vl, max_image_size)
        self.api_key = api_key or os.environ.get("DASH_API_KEY")
        self.retry_times = max(1, retry_times)
        if importlib.util.find_spec("dashscope") is None:
            raise ValueError("prompt extension with DashScope needs its package: pip install dashscope")
        if not self.api_key:
            raise ValueError("prompt extension with DashScope needs an API key: set DASH_API_KEY in the environment")

    def _answer(self, prompt, system_prompt, pictures, seed):
        for _ in range(self.retry_times - 1):
            with contextlib.suppress(OSError):  # all network errors are
                return self._request(prompt, system_prompt, pictures, seed)
            time.sleep(1)
        return self._request(prompt, system_prompt, pictures, seed)

    def _request(self, prompt: str, system_prompt: str, pictures: list[Image.Image], seed: int) -> str:
        """Asks once. Raises OSError where trying again may help, ValueError if the service refuses the request."""
        import dashscope

        call = dashscope.Generation.call
        contents = {"system": system_prompt, "user": prompt}
        if self.is_vl:
            call = dashscope.MultiModalConversation.call
            images = [{"image": _data_url(picture)} for picture in pictures]
            contents = {"system": [{"text": system_prompt}], "user": [*images, {"text": prompt}]}
        response = call(
            model=self.model_name,
            messages=[{"role": role, "content": content} for role, content in contents.items()],
            result_format="message",
            seed=seed % 2**31,  # the service takes no larger ones
            api_key=self.api_key,
            base_address=os.environ.get("DASH_API_URL"),
        )
        if response.status_code != 200:
            final = 400 <= response.status_code < 500 and response.status_code != 429
            reason = f"{self.model_name}: {response.status_code} {response.code}: {response.message}"
            raise ValueError(reason) if final else OSError(reason)
        content = response.output["choices"][0]["message"]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class QwenPromptExpander(PromptExpander):
    """Extends prompts with a Qwen2.5 or Qwen2.5-VL model on this machine; nothing is ever downloaded.

    model_name: see resolve_model; what the folder holds decides whether pictures are looked at, is_vl only which model
    is the default. device: index of a GPU, or a torch device; without CUDA an index means the CPU. max_image_size:
    pixels of a picture that the model sees. Other arguments, those of DashScopePromptExpander, are ignored.
    The weights are read in the first call and stay until `free`, as the video model needs the memory.
    Raises ValueError if there is no such model.
    """

    def __init__(
        self,
        model_name: str | None = None,
        device: int | str = 0,
        is_vl: bool = False,
        max_image_size: int = 512 * 512,
        **kwargs,
    ):
        self.folder, sees = resolve_model(model_name, is_vl)
        super().__init__(model_name or str(self.folder), sees, max_image_size)
        self.device = device

    def free(self) -> None:
        """Drops the weights; another call reads them again."""
        import torch

        vars(self).pop("_model", None)
        gc.collect()
        torch.cuda.empty_cache()

    @functools.cached_property
    def _model(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        device = self.device
        if isinstance(device, int):
            device = f"cuda:{device}" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        model_class = AutoModelForImageTextToText if self.is_vl else AutoModelForCausalLM
        settings = {"device_map": {"": device}, "local_files_only": True}
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return model_class.from_pretrained(self.folder, dtype=dtype, **settings)

    def _answer(self, prompt, system_prompt, pictures, seed):
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        inputs = self._inputs(tokenizer, prompt, system_prompt, pictures)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            model = self._model
            torch.manual_seed(seed)
            tokens = model.generate(**inputs.to(model.device), max_new_tokens=512)
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _inputs(self, tokenizer, prompt: str, system_prompt: str, pictures: list[Image.Image]):
        """The model's inputs. Put together here since the ready-made processor needs torchvision, for videos."""
        from transformers import AutoImageProcessor

        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}] if pictures else prompt
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not pictures:
            return tokenizer([text], return_tensors="pt")
        processor = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
        pixels = processor(images=pictures, return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist()
        before, *rest = text.split(_IMAGE_TOKEN)  # the template has one such token for a picture
        text = before + "".join(_IMAGE_TOKEN * count + part for count, part in zip(counts, rest, strict=True))
        inputs = tokenizer([text], return_tensors="pt")
        of_picture = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        inputs.update({**pixels, "mm_token_type_ids": of_picture.long()})
        return inputs
