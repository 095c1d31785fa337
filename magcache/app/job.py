"""What a run is to do, as values that nothing changes; `magcache.app.checks.make_job` makes them from the flags.

Fields that stand for a flag have its name. A request that makes no sense is `Refused` before anything is loaded.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import magcache
from magcache.app.errors import Refused, refusing, shortened
from magcache.app.lora import Lora
from magcache.app.prompts import Request
from magcache.app.tasks import TASKS, Task
from magcache.speedup import DEFAULT

MOST_STEPS = 10_000
MOST_FRAMES = 4093  # of 1024 latent frames
TRIAL_BUDGET = 2.5  # uncached runs that the trials of a prompt may cost, in the mean over the prompts


def shape_in_words(shape: tuple[int, int, int]) -> str:
    """shape: (frames, height, width)."""
    frames, height, width = shape
    return f"{width}x{height}, {frames} frame{'s' if frames > 1 else ''}"


@dataclass(frozen=True)
class Sampling:
    """What is generated, without prompt, seed and input files. size: "width*height". sample_guide_scale: of all steps,
    or of those of low and of high noise. Raises Refused if a value makes no sense."""

    task: str
    size: str
    frame_num: int
    sample_solver: str
    sample_steps: int
    sample_shift: float
    sample_guide_scale: float | tuple[float, float]

    def __post_init__(self):
        frames, steps = self.frame_num, self.sample_steps
        if self.spec.makes_image and frames != 1:
            raise Refused(f"task {self.task} makes one image: --frame_num must be 1, got {frames}")
        if 1 <= frames < (least := 4 * len(self.spec.images) - 3):  # with a latent frame for every given one
            raise Refused(f"task {self.task} needs --frame_num {least} or more, got {frames}")
        if frames % 4 != 1 or not 1 <= frames <= MOST_FRAMES:
            allowed = f"4n+1 (1, 5, 9, ..., 81, ...) and at most {MOST_FRAMES}, as far as the models' positions go"
            raise Refused(f"--frame_num must be {allowed}, got {shortened(frames)}")
        if not 1 <= steps <= MOST_STEPS:
            raise Refused(f"--sample_steps must be at least 1 and at most {MOST_STEPS}, got {shortened(steps)}")
        if not all(map(math.isfinite, self.guidance)):
            raise Refused(f"--sample_guide_scale must be finite, got {self.sample_guide_scale}")
        with refusing(ValueError, about="--sample_steps and --sample_shift: "):
            self.noise_levels  # noqa: B018

    @property
    def spec(self) -> Task:
        return TASKS[self.task]

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height), of the video or of its area."""
        return tuple(map(int, self.size.split("*")))

    @property
    def calls_per_step(self) -> int:
        """How often a step calls the transformer; without guidance (a scale of 1) only for cond."""
        return 1 if {*self.guidance} == {1} else 2

    @property
    def guidance(self) -> tuple[float, ...]:
        scale = self.sample_guide_scale
        return scale if isinstance(scale, tuple) else (scale,)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        return magcache.noise_levels(self.sample_steps, self.sample_shift, self.sample_solver)


@dataclass(frozen=True)
class Inputs:
    """Paths of input files, None where there is none. src_ref_images: separated by commas."""

    image: str | None = None
    first_frame: str | None = None
    last_frame: str | None = None
    src_video: str | None = None
    src_mask: str | None = None
    src_ref_images: str | None = None

    @property
    def references(self) -> list[str]:
        return [path.strip() for path in (self.src_ref_images or "").split(",") if path.strip()]


PATHS = ("ckpt_dir", "image", "first_frame", "last_frame", "src_video", "src_mask")  # flags that name one each
OF_RULE = ("magcache_thresh", "magcache_K", "retention_ratio")  # flags of MagCache as published
OF_EXTENSION = ("use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang")
OF_OUR_WAN = ("dit_dtype", "offload_blocks", "compile", "attn_backend", "vae_tiling")  # flags that upstream's lacks


@dataclass(frozen=True)
class Machine:
    """The model's folder and what is merged into its weights, how it is spread over the GPUs, and how it fits them.
    None is the `wan` package's default. world: processes in all. Raises Refused where flags do not go together."""

    ckpt_dir: str
    offload_model: bool
    t5_cpu: bool
    t5_fsdp: bool
    dit_fsdp: bool
    ulysses_size: int
    ring_size: int
    convert_model_dtype: bool = False
    dit_dtype: str | None = None
    offload_blocks: bool = False
    compile: bool = False
    attn_backend: str | None = None
    vae_tiling: bool = False
    world: int = 1
    lora: tuple[Lora, ...] = ()

    def __post_init__(self):
        for flag in ("offload_blocks", "compile"):
            if getattr(self, flag) and self.dit_fsdp:
                raise Refused(f"--{flag} and --dit_fsdp exclude each other")

    @property
    def shards(self) -> int:
        """Processes that share the tokens of a video."""
        return self.ulysses_size * self.ring_size

    @property
    def group_size(self) -> int:
        """Processes that make a video together; without tokens to share, all share the weights, if any do."""
        return self.world if self.shards == 1 and (self.dit_fsdp or self.t5_fsdp) else self.shards


@dataclass(frozen=True)
class CacheSettings:
    """What the cache is to do: follow the MagCache rule, or make a `speedup` if there is one. table: a name or a path,
    None to choose it. offload: whether what is cached is kept in CPU memory. quality: latent PSNR in dB that must be
    promised; the speed-up is then the fastest for which it is. constants: those of the speed-up rule."""

    rule: magcache.Settings
    speedup: float | None = None
    table: str | None = None
    offload: bool = False
    quality: float | None = None
    constants: magcache.Constants = DEFAULT

    def __str__(self) -> str:
        if self.speedup is not None:
            asked = f", the fastest for {self.quality:g} dB" if self.quality is not None else ""
            return f"speed-up {self.speedup:g}{asked}"
        return f"thresh {self.rule.thresh:g}, K {self.rule.K}, retention {self.rule.retention_ratio:g}"


@dataclass(frozen=True)
class Job:
    """A run, complete and checked, as far as that is possible without the `wan` package and the input files. lines:
    what is to be made, one entry per video. prompt_file: where they come from, None for a single prompt. cache: None if
    it is not wanted. schedule: that of every video; table: the ratios that made it, if any; measured: trials that say
    what to expect of a speed-up and have chosen its constants, if any. calibration: the file of the ratios that the run
    measures, None if it measures none; trials: the speed-ups that it then tries, rising. script: path of the command.
    flags: all flags as they were given."""

    sampling: Sampling
    inputs: Inputs
    machine: Machine
    lines: tuple[Request, ...]
    base_seed: int
    prompt_file: str | None
    cache: CacheSettings | None
    schedule: magcache.Schedule
    table: magcache.RatioTable | None
    measured: "magcache.trials.Measured | None"
    compare: bool
    calibration: Path | None
    trials: tuple[float, ...]
    script: str
    flags: dict

    @property
    def made_by(self) -> str | None:
        """What the schedule was made by, None without the cache."""
        if self.table:
            return f"table {self.table.name}"
        return "outputs forecast along the noise level" if self.cache else None

    @property
    def goes_on(self) -> bool:
        """Whether a video that fails does not stop the others."""
        return self.prompt_file is not None and not self.calibration

    def describe_video(self, shape: tuple[int, int, int], seed: int | str) -> str:
        """Describes the video in a line. shape: (frames, height, width)."""
        how = self.sampling
        guidance = " and ".join(f"{scale:g}" for scale in how.guidance)
        guidance += " (low and high noise)" if len(how.guidance) == 2 else ""
        sampled = f"{how.sample_solver}, shift {how.sample_shift:g}, guidance {guidance}"
        return f"{how.task}, {shape_in_words(shape)}, {how.sample_steps} steps, {sampled}, seed {seed}"
