"""The tasks: an entry holds all that sets one apart, so a new model is a new entry. Pure Python."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from magcache import Settings
from magcache.app.architecture import CLIP_TOKENS, IMAGE, LATENT_5B, Architecture

VIDEO_ENDINGS, IMAGE_ENDINGS = (".mp4", ".mkv", ".mov", ".avi"), (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Task:
    """What a task makes, of what, with which model.

    pipeline: its class in the `wan` package. model_type: that of the checkpoint's config.json. sizes: "width*height".
    example: the prompt, and the files in examples/, of a run that names none. images, sources: flags of the input
    files; each image is a frame of the video, and the first one has its shape. needs_images: whether there is no video
    without them. token_pixels: of a token, on either side. shifts: the shift by size, where it is another one.
    guidance: of every step, or of those of low and of high noise. boundary: the noise level from which on, downwards,
    a second transformer makes the steps, None for a single one. tables: names of the ratio tables that were measured
    on its models. published: settings of thresh, K and retention that the method's authors name. release: of the model.
    is_demo: whether the model is one of the small ones in examples/, which what is said of memory is not about.
    """

    name: str
    pipeline: str
    model_type: str
    architecture: Architecture
    sizes: tuple[str, ...]
    example: dict[str, str]
    images: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    needs_images: bool = True
    token_pixels: int = 16
    makes_image: bool = False
    frames: int = 81
    steps: int = 50
    shift: float = 5.0
    shifts: dict[str, float] = field(default_factory=dict)
    guidance: tuple[float, ...] = (5.0,)
    boundary: float | None = None
    tables: tuple[str, ...] = ()
    published: tuple[Settings, ...] = (Settings(),)
    release: str = "Wan2.1"
    is_demo: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The flags of all input files."""
        return self.images + self.sources

    @property
    def repository(self) -> str:
        """The official checkpoint's name on the Hugging Face hub."""
        only = "-720P" if self.architecture.images else ""
        return f"Wan-AI/{self.release}-{self.model_type.upper()}-{self.name.split('-')[1]}{only}"

    @property
    def endings(self) -> tuple[str, ...]:
        """The endings that a result may have. The first one is the default."""
        return IMAGE_ENDINGS if self.makes_image else VIDEO_ENDINGS

    @property
    def transformers(self) -> tuple[str, ...]:
        """The folders of the transformers within that of the checkpoint, in the order of a run."""
        return ("",) if self.boundary is None else ("high_noise_model", "low_noise_model")


_480P = ("480*832", "832*480")
_VIDEO = ("720*1280", "1280*720", *_480P)
_1_3B, _14B = Architecture(1536, 8960, 30), Architecture(5120, 13824, 40)
_TINY = Architecture(192, 768, 8, freq_dim=64, text_len=16, text_dim=64)

_BOAT = "A paper boat sails down a rain-filled street at dusk, neon signs ripple in the water, slow tracking shot."
_LIGHTHOUSE = "A lighthouse on a basalt cliff under a clear night sky, long exposure, sharp detail."
_CAT = (
    "A white cat in sunglasses sits coolly on a striped surfboard that rocks on turquoise waves, its tail swaying and "
    "its fur ruffled by the sea breeze. Foam splashes around the board and white clouds drift over the green hills on "
    "a bright summer day."
)
_BIRD = (
    "A small blue bird with an orange breast pushes off from a blossoming branch, spreads its wings and flies up to "
    "the left over misty green hills. The branch springs back as it leaves; animated illustration, fixed camera."
)
_GIRL = (
    "A cheerful little girl with two hair buns and a red dress meets a friendly green snake under glowing festival "
    "lanterns. She laughs and strokes its head while the snake sways and coils around her."
)

_T2V = Task(
    name="t2v-14B", pipeline="WanT2V", model_type="t2v", architecture=_14B, sizes=_VIDEO, example={"prompt": _BOAT}
)
_I2V = Task(
    name="i2v-14B",
    pipeline="WanI2V",
    model_type="i2v",
    architecture=replace(_14B, in_dim=IMAGE, images=1),
    sizes=_VIDEO,
    example={"prompt": _CAT, "image": "i2v_input.JPG"},
    images=("image",),
    steps=40,
)
_FLF2V = Task(
    name="flf2v-14B",
    pipeline="WanFLF2V",
    model_type="flf2v",
    architecture=replace(_14B, in_dim=IMAGE, images=2, clip_positions=2 * CLIP_TOKENS),
    sizes=_VIDEO,
    example={"prompt": _BIRD, "first_frame": "flf2v_input_first_frame.png", "last_frame": "flf2v_input_last_frame.png"},
    images=("first_frame", "last_frame"),
    shift=16.0,
    published=(Settings(0.12, 4),),
)
_VACE = Task(
    name="vace-14B",
    pipeline="WanVace",
    model_type="vace",
    architecture=replace(_14B, vace_blocks=8),
    sizes=_VIDEO,
    example={"prompt": _GIRL, "src_ref_images": "girl.png,snake.png"},
    sources=("src_video", "src_mask", "src_ref_images"),
    shift=16.0,
    tables=("vace-14B",),
    published=(Settings(0.02, 3),),
)
_OF_1_3B = (Settings(0.12, 2), Settings(0.12, 4))
_OF_I2V = (Settings(0.12, 4), Settings(0.24, 6))
_DEMO = {"sizes": ("64*64",), "frames": 17, "steps": 50, "is_demo": True}

_ALL = (
    replace(_T2V, tables=("t2v-14B",), published=(Settings(0.24, 6),)),
    replace(_T2V, name="t2v-1.3B", architecture=_1_3B, sizes=_480P, tables=("t2v-1.3B",), published=_OF_1_3B),
    replace(_I2V, shifts=dict.fromkeys(_480P, 3.0), tables=("i2v-14B-480P", "i2v-14B-720P"), published=_OF_I2V),
    replace(
        _T2V,
        name="t2i-14B",
        sizes=(*_VIDEO, "1024*1024"),
        example={"prompt": _LIGHTHOUSE},
        makes_image=True,
        frames=1,
        tables=("t2v-14B",),
    ),
    _FLF2V,
    replace(_VACE, name="vace-1.3B", architecture=replace(_1_3B, vace_blocks=15), sizes=_480P, tables=("vace-1.3B",)),
    _VACE,
    replace(_T2V, release="Wan2.2", name="t2v-A14B", steps=40, shift=12.0, guidance=(3.0, 4.0), boundary=0.875),
    replace(
        _I2V,
        release="Wan2.2",
        name="i2v-A14B",
        architecture=replace(_14B, in_dim=IMAGE),
        guidance=(3.5, 3.5),
        boundary=0.9,
    ),
    replace(
        _T2V,
        release="Wan2.2",
        name="ti2v-5B",
        pipeline="WanTI2V",
        model_type="ti2v",
        architecture=Architecture(3072, 14336, 30, in_dim=LATENT_5B, out_dim=LATENT_5B),
        sizes=("704*1280", "1280*704"),
        images=("image",),
        needs_images=False,
        token_pixels=32,
        frames=121,
    ),
    replace(
        _T2V,
        **_DEMO,
        name="t2v-tiny",
        architecture=_TINY,
        example={"prompt": "a red circle moves right on a white background"},
        tables=("t2v-tiny",),
        published=_OF_1_3B,
    ),
    replace(
        _I2V,
        **_DEMO,
        name="i2v-tiny",
        architecture=replace(_TINY, num_layers=7, in_dim=IMAGE, clip_dim=64, images=1),
        example={"prompt": "a purple triangle moves right on a yellow background", "image": "i2v_tiny_input.png"},
        tables=("i2v-tiny",),
        published=_OF_I2V,
    ),
)
TASKS = {task.name: task for task in _ALL}


def all_sizes() -> tuple[str, ...]:
    """Lists the sizes of all tasks, each once."""
    return tuple(dict.fromkeys(size for task in TASKS.values() for size in task.sizes))


def located(example: dict[str, str], folder: Path) -> dict[str, str]:
    """Returns an example with its files, which are separated by commas, in this folder."""
    files = {flag: names.split(",") for flag, names in example.items() if flag != "prompt"}
    return example | {flag: ",".join(str(folder / name) for name in names) for flag, names in files.items()}
