"""What a video is made of: prompt, images, source video; the examples of each task; the shape that follows."""

import sys
from pathlib import Path

from magcache.app.flags import INPUTS, input_flags, task_kind
from magcache.app.wan_package import is_stock_wan

# what runs without --prompt and input files, which are in examples/ beside the script; by task, or by its first part
EXAMPLES = {
    "t2v": {
        "prompt": "A paper boat sails down a rain-filled street at dusk, neon signs ripple in the water, slow tracking "
        "shot."
    },
    "t2i": {"prompt": "A lighthouse on a basalt cliff under a clear night sky, long exposure, sharp detail."},
    "i2v": {
        "prompt": "A white cat in sunglasses sits coolly on a striped surfboard that rocks on turquoise waves, its "
        "tail swaying and its fur ruffled by the sea breeze. Foam splashes around the board and white clouds drift "
        "over the green hills on a bright summer day.",
        "image": "i2v_input.JPG",
    },
    "flf2v": {
        "prompt": "A small blue bird with an orange breast pushes off from a blossoming branch, spreads its wings and "
        "flies up to the left over misty green hills. The branch springs back as it leaves; animated illustration, "
        "fixed camera.",
        "first_frame": "flf2v_input_first_frame.png",
        "last_frame": "flf2v_input_last_frame.png",
    },
    "vace": {
        "prompt": "A cheerful little girl with two hair buns and a red dress meets a friendly green snake under "
        "glowing festival lanterns. She laughs and strokes its head while the snake sways and coils around her.",
        "src_ref_images": "girl.png,snake.png",
    },
    "t2v-tiny": {"prompt": "a red circle moves right on a white background"},
    "i2v-tiny": {"prompt": "a purple triangle moves right on a yellow background", "image": "i2v_tiny_input.png"},
}


def choose_inputs(args, error) -> None:
    """Takes the task's example if neither prompt nor inputs are given, else wants all that the task needs."""
    kind = task_kind(args)
    for flag in (flag for flags in INPUTS.values() for flag in flags):
        if getattr(args, flag) is not None and flag not in input_flags(args):
            print(f"note: --{flag} is not used by task {args.task}")
    given = [flag for flag in input_flags(args) if getattr(args, flag) is not None]
    example = EXAMPLES.get(args.task, EXAMPLES[kind])
    if args.prompt is None and not given:
        folder = Path(args.script).parent / "examples"
        for flag, names in example.items():
            path = names if flag == "prompt" else ",".join(str(folder / name) for name in names.split(","))
            setattr(args, flag, path)
    elif kind in ("i2v", "flf2v"):
        missing = [flag for flag in INPUTS[kind] if flag not in given]
        if missing:
            error(f"task {args.task} needs --{missing[0]} (without --prompt and --{missing[0]} an example runs)")
    if args.prompt is None:
        args.prompt = example["prompt"]
        print("note: there is no --prompt; the task's example is taken, which knows nothing of your files")


def read_inputs(args, error) -> list:
    """Reads the input files whole, so that a bad one fails now: the images of i2v and flf2v, or the source video, mask
    and references of vace, as lists of one. Empty for tasks without. None for vace with a stock `wan`: its pipeline
    reads them once it is loaded (`prepare_source`), and only what can be told without it is checked."""
    kind = task_kind(args)
    try:
        if kind == "vace" and is_stock_wan():
            return check_sources(args)
        if kind == "vace":
            from wan.configs import SIZE_CONFIGS
            from wan.utils.vace_source import prepare_source

            refs = reference_paths(args)
            sources = prepare_source(args.src_video, args.src_mask, refs, args.frame_num, SIZE_CONFIGS[args.size])
            return [[source] for source in sources]
        if kind in INPUTS:
            from magcache.app.media import read_image

            return [read_image(getattr(args, flag)) for flag in INPUTS[kind]]
    except ValueError as fault:
        error(fault)
    return []


def reference_paths(args) -> list[str]:
    return [path.strip() for path in (args.src_ref_images or "").split(",") if path.strip()]


def check_sources(args) -> None:
    """Raises ValueError for source files of vace that are missing, references that are no image, a mask alone."""
    from magcache.app.media import read_image

    for path in (args.src_video, args.src_mask):
        if path and not Path(path).is_file():
            raise ValueError(f"cannot read {path}: no such file")
    if args.src_mask and not args.src_video:
        raise ValueError(f"the mask {args.src_mask} needs a source video")
    for path in reference_paths(args):
        read_image(path)
    if args.src_video:
        print("note: this wan package reads the source video after loading; its size and length are the video's")


def video_shape(args, inputs: list | None) -> tuple[int, int, int]:
    """(frames, height, width) of the result."""
    from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS

    if args.task.startswith("vace") and inputs:
        return tuple(inputs[0][0].shape[1:])
    if inputs:
        from magcache.app.media import video_size

        return args.frame_num, *reversed(video_size(inputs[0].size, MAX_AREA_CONFIGS[args.size]))
    return args.frame_num, *reversed(SIZE_CONFIGS[args.size])


def describe_video(args, shape: tuple[int, int, int], seed: int | str) -> str:
    """shape: (frames, height, width)."""
    frames, height, width = shape
    return (
        f"{args.task}, {width}x{height}, {frames} frames, {args.sample_steps} steps, {args.sample_solver}, shift "
        f"{args.sample_shift:g}, guidance {args.sample_guide_scale:g}, seed {seed}"
    )


def planned_video(args) -> tuple[int, int, int, int]:
    """(frames, height, width, reference images) of a run with these flags, as far as they tell without its files."""
    width, height = map(int, args.size.split("*"))
    kind = task_kind(args)
    if kind in ("i2v", "flf2v"):
        path = getattr(args, INPUTS[kind][0])
        if path and Path(path).is_file():
            from magcache.app.media import read_image, video_size

            try:
                width, height = video_size(read_image(path).size, width * height)
            except ValueError as fault:
                print(f"note: {fault}; here its shape is that of --size")
        else:
            print(f"note: the image, {path or 'which is not given'}, decides on the shape; here it is that of --size")
    references = len(reference_paths(args)) if kind == "vace" else 0
    if kind == "vace" and args.src_video:
        print("note: the source video decides on shape and length; the largest that it may have is taken")
    return args.frame_num, height, width, references


def make_expander(args, error):
    """Returns what extends the prompt, or None. Reads no weights, unless the `wan` here does."""
    if not args.use_prompt_extend:
        return None
    from wan.utils.prompt_extend import DashScopePromptExpander, QwenPromptExpander

    method = {"dashscope": DashScopePromptExpander, "local_qwen": QwenPromptExpander}[args.prompt_extend_method]
    device = {"device": 0} if args.prompt_extend_method == "local_qwen" else {}
    try:
        return method(model_name=args.prompt_extend_model, is_vl=args.task.startswith(("i2v", "flf2v")), **device)
    except (ValueError, OSError, ImportError) as fault:
        error(str(fault).splitlines()[0])


def extend_prompt(args, request, expander, inputs: list | None) -> str:
    """The extension of a request's prompt, or the prompt itself if that fails."""
    print("extending the prompt", flush=True)
    images = [] if task_kind(args) == "vace" else inputs_of(request, inputs)
    image = None if not images else images[0] if len(images) == 1 else images
    out = expander(request.prompt, tar_lang=args.prompt_extend_target_lang, image=image, seed=args.base_seed)
    if not out.status:
        print(f"warning: the prompt was not extended: {out.message}", file=sys.stderr)
        return request.prompt
    if images and not expander.is_vl:
        print(f"note: {expander.model_name} sees no pictures, so only the text was extended")
    print(f"prompt    {out.prompt}")
    return out.prompt


def inputs_of(request, inputs: list | None) -> list:
    """The images of a request: its own, or those that the flags name (`inputs`)."""
    if not request.image:
        return inputs
    from magcache.app.media import read_image

    return [read_image(request.image)]
