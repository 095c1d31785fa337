"""What a video is made of: prompt, images, source video; the examples of each task; the shape that follows."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from magcache.app.backend import backend
from magcache.app.errors import Refused, refusing
from magcache.app.job import Inputs, Job, Sampling
from magcache.app.media import read_image, video_size
from magcache.app.prompts import Request

if TYPE_CHECKING:
    from wan.utils.prompt_extend import PromptExpander


def choose_inputs(
    sampling: Sampling, prompt: str | None, inputs: Inputs, folder: Path, needed: bool
) -> tuple[str, Inputs]:
    """Takes the task's example if neither prompt nor inputs are given; else refuses a request that lacks some that are
    `needed`. folder: of the script."""
    spec = sampling.spec
    for flag, path in asdict(inputs).items():
        if path is not None and flag not in spec.inputs:
            print(f"note: --{flag} is not used by task {sampling.task}")
            inputs = replace(inputs, **{flag: None})
    given = [flag for flag in spec.inputs if getattr(inputs, flag) is not None]
    lacking = [flag for flag in spec.images if flag not in given]
    if lacking and needed and spec.needs_images and (given or prompt is not None):
        raise Refused(f"task {sampling.task} needs --{lacking[0]} (without it and without --prompt an example runs)")
    if prompt is not None:
        return prompt, inputs
    example = dict(backend().example(sampling, folder))
    if needed and not example["prompt"]:
        none = "there is no generate.py with an example for this task beside the wan package here"
        raise Refused(f"--prompt is needed: {none}")
    prompt = example.pop("prompt")
    if given:
        print("note: there is no --prompt, so that of the task's example is used, which knows nothing of your files")
        return prompt, inputs
    return prompt, replace(inputs, **example)


def read_inputs(job: Job) -> list | None:
    """Reads the input files whole, so that a bad one fails now: the images of i2v and flf2v, or the sources of vace as
    `Backend.read_sources` has them. Empty for tasks without."""
    sampling, inputs, spec = job.sampling, job.inputs, job.sampling.spec
    if not spec.inputs:
        return []
    with refusing(ValueError):
        if spec.images:
            return [read_image(path) for flag in spec.images if (path := getattr(inputs, flag))]
        return backend().read_sources(sampling, inputs)


def video_shape(sampling: Sampling, inputs: list | None) -> tuple[int, int, int]:
    """Returns (frames, height, width) of the result. inputs: those of `read_inputs`."""
    if sampling.spec.sources and inputs:
        return tuple(inputs[0][0].shape[1:])
    width, height = sampling.pixels
    if inputs:
        width, height = video_size(inputs[0].size, width * height, sampling.spec)
    return sampling.frame_num, height, width


def planned_video(sampling: Sampling, inputs: Inputs) -> tuple[int, int, int]:
    """Returns (frames, height, width) of a run with these flags, as far as they show without its files."""
    images = []
    for path in [getattr(inputs, flag) for flag in sampling.spec.images[:1]]:
        if path and os.path.isfile(path):
            try:
                images.append(read_image(path))
            except ValueError as fault:
                print(f"note: {fault}; the shape here is that of --size")
        elif path or sampling.spec.needs_images:
            print(f"note: the image ({path or 'not given'}) decides on the shape; here it is that of --size")
    if inputs.src_video:
        print("note: the source video decides on shape and length; the largest possible is assumed here")
    return video_shape(sampling, images)


def make_expander(job: Job, inputs: list | None) -> "PromptExpander":
    """Returns what extends the prompts. Reads no weights, unless the `wan` here does. inputs: of `read_inputs`."""
    from wan.utils.prompt_extend import DashScopePromptExpander, QwenPromptExpander

    given = {"model_name": job.flags["prompt_extend_model"], "is_vl": bool(job.sampling.spec.images and inputs)}
    given |= {"task": job.sampling.task}  # which only Wan2.2's asks for
    with refusing(ValueError, OSError, ImportError):
        if job.flags["prompt_extend_method"] == "dashscope":
            return DashScopePromptExpander(**given)
        return QwenPromptExpander(**given, device=0)


def extend_prompt(job: Job, request: Request, expander: "PromptExpander", inputs: list | None) -> str:
    """Returns the extension of a request's prompt, or the prompt itself if that fails."""
    print("extending the prompt", flush=True)
    images = inputs_of(request, inputs) if job.sampling.spec.images else []
    image = None if not images else images[0] if len(images) == 1 else images
    language = job.flags["prompt_extend_target_lang"]
    out = expander(request.prompt, tar_lang=language, image=image, seed=job.base_seed)
    if not out.status:
        print(f"warning: the prompt was not extended: {out.message}", file=sys.stderr)
        return request.prompt
    if images and not expander.is_vl:
        print(f"note: {expander.model_name} sees no pictures, so only the text was extended")
    print(f"prompt    {out.prompt}")
    return out.prompt


def inputs_of(request: Request, inputs: list | None) -> list:
    """Returns the images of a request: its own, or those that the flags name (`inputs`)."""
    return [read_image(request.image)] if request.image else inputs
