"""What a video is made of: prompt, images, source video; the examples of each task; the shape that follows."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from magcache.app.backend import backend
from magcache.app.errors import Refused, refusing
from magcache.app.job import Extension, Inputs, Job, Request, Sampling


def choose_inputs(
    sampling: Sampling, prompt: str | None, inputs: Inputs, folder: Path, needed: bool
) -> tuple[str, Inputs]:
    """Takes the task's example if neither prompt nor inputs are given; else, where they are `needed`, refuses a request
    that lacks some. folder: of the script."""
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
    from magcache.app.media import read_image

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
        from magcache.app.media import video_size

        width, height = video_size(inputs[0].size, width * height, sampling.spec)
    return sampling.frame_num, height, width


def planned_video(sampling: Sampling, inputs: Inputs) -> tuple[int, int, int, int]:
    """Returns (frames, height, width, reference images) of a run with these flags, as far as they show without its
    files."""
    frames, height, width = video_shape(sampling, None)
    if sampling.spec.images:
        path = getattr(inputs, sampling.spec.images[0])
        if path and os.path.isfile(path):
            try:
                from magcache.app.media import read_image

                frames, height, width = video_shape(sampling, [read_image(path)])
            except (ImportError, ValueError) as fault:
                print(f"note: {fault}; the shape here is that of --size")
        elif path or sampling.spec.needs_images:
            print(f"note: the image ({path or 'not given'}) decides on the shape; here it is that of --size")
    if sampling.spec.sources and inputs.src_video:
        print("note: the source video decides on shape and length; the largest possible is assumed here")
    return frames, height, width, len(inputs.references)


class Expander(Protocol):
    """What writes a prompt out. is_vl: whether it looks at pictures."""

    model_name: str
    is_vl: bool

    def __call__(self, prompt: str, **settings: Any) -> Any:
        """Returns an object with the `prompt`, whether it worked (`status`), and a `message`."""


def make_expander(task: str, extension: Extension, is_vl: bool) -> Expander:
    """Returns what extends the prompts. Reads no weights, unless the `wan` here does. task: which only Wan2.2's asks
    for."""
    from wan.utils.prompt_extend import DashScopePromptExpander, QwenPromptExpander

    method = {"dashscope": DashScopePromptExpander, "local_qwen": QwenPromptExpander}[extension.method]
    device = {"device": 0} if extension.method == "local_qwen" else {}
    with refusing(ValueError, OSError, ImportError):
        return method(model_name=extension.model, task=task, is_vl=is_vl, **device)


def extend_prompt(job: Job, request: Request, expander: Expander, inputs: list | None) -> str:
    """Returns the extension of a request's prompt, or the prompt itself if that fails."""
    print("extending the prompt", flush=True)
    images = inputs_of(request, inputs) if job.sampling.spec.images else []
    image = None if not images else images[0] if len(images) == 1 else images
    out = expander(request.prompt, tar_lang=job.extension.target_lang, image=image, seed=job.base_seed)
    if not out.status:
        print(f"warning: the prompt was not extended: {out.message}", file=sys.stderr)
        return request.prompt
    if images and not expander.is_vl:
        print(f"note: {expander.model_name} sees no pictures, so only the text was extended")
    print(f"prompt    {out.prompt}")
    return out.prompt


def inputs_of(request: Request, inputs: list | None) -> list:
    """Returns the images of a request: its own, or those that the flags name (`inputs`)."""
    if not request.image:
        return inputs
    from magcache.app.media import read_image

    return [read_image(request.image)]
