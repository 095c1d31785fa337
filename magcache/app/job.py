"""What a run is to do, as values that nothing changes; `magcache.app.checks.make_job` makes them from the flags.

Fields that stand for a flag have its name. A request that makes no sense is `Refused` before anything is loaded.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import magcache
from magcache.app.errors import Refused, shortened
from magcache.app.lora import Lora
from magcache.app.prompts import Line
from magcache.app.tasks import TASKS, Task

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
        frames, steps, shift = self.frame_num, self.sample_steps, self.sample_shift
        if self.spec.makes_image and frames != 1:
            raise Refused(f"task {self.task} makes one image: --frame_num must be 1, got {frames}")
        if 1 <= frames < self.spec.least_frames:
            raise Refused(f"task {self.task} needs --frame_num {self.spec.least_frames} or more, got {frames}")
        if frames > MOST_FRAMES:
            most = f"--frame_num must be at most {MOST_FRAMES}, as far as the models' positions go"
            raise Refused(f"{most}, got {shortened(frames)}")
        if frames < 1 or frames % 4 != 1:
            raise Refused(f"--frame_num must be 4n+1 (1, 5, 9, ..., 81, ...), got {frames}")
        if not 1 <= steps <= MOST_STEPS:
            raise Refused(f"--sample_steps must be at least 1 and at most {MOST_STEPS}, got {shortened(steps)}")
        if not 0 < shift < math.inf:
            raise Refused(f"--sample_shift must be positive, got {shift}")
        if not all(map(math.isfinite, self.guidance)):
            raise Refused(f"--sample_guide_scale must be finite, got {self.sample_guide_scale}")
        try:
            self.noise_levels  # noqa: B018
        except ValueError as fault:
            raise Refused(f"--sample_steps and --sample_shift: {fault}") from fault

    @property
    def spec(self) -> Task:
        return TASKS[self.task]

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height), of the video or of its area."""
        width, height = map(int, self.size.split("*"))
        return width, height

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
    promised; the speed-up is then the fastest for which it is. constants: those of the speed-up rule, None for the
    defaults."""

    rule: magcache.Settings
    speedup: float | None = None
    table: str | None = None
    offload: bool = False
    quality: float | None = None
    constants: "magcache.Constants | None" = None

    def __str__(self) -> str:
        if self.speedup is not None:
            asked = f", the fastest for {self.quality:g} dB" if self.quality is not None else ""
            return f"speed-up {self.speedup:g}{asked}"
        return f"thresh {self.rule.thresh:g}, K {self.rule.K}, retention {self.rule.retention_ratio:g}"


@dataclass(frozen=True)
class Extension:
    """Which model writes the prompts out, in which language."""

    method: str
    model: str | None
    target_lang: str


@dataclass(frozen=True)
class Output:
    """What is written, and where. table: file of the ratios, None unless the run measures them. trials: the speed-ups
    that it then tries, rising."""

    save_file: str | None
    overwrite: bool
    compare: bool
    table: Path | None = None
    trials: tuple[float, ...] = ()


@dataclass(frozen=True)
class Job:
    """A run, complete and checked, as far as that is possible without the `wan` package and the input files. lines:
    what is to be made, one entry per video. prompt_file: where they come from, None for a single prompt. extension,
    cache: None if they are not wanted. schedule: that of every video; made_by: says what chose it; table: the ratios
    that did, if any; measured: trials that say what to expect of a speed-up and have chosen its constants, if any.
    script: path of the command. flags: all flags as they were given."""

    sampling: Sampling
    inputs: Inputs
    machine: Machine
    output: Output
    lines: tuple[Line, ...]
    base_seed: int
    prompt_file: str | None
    extension: Extension | None
    cache: CacheSettings | None
    schedule: magcache.Schedule
    made_by: str | None
    table: magcache.RatioTable | None
    measured: "magcache.trials.Measured | None"
    script: str
    flags: dict

    @property
    def calibrates(self) -> bool:
        return self.output.table is not None

    @property
    def goes_on(self) -> bool:
        """Whether a video that fails does not stop the others."""
        return self.prompt_file is not None and not self.calibrates

    @property
    def values(self) -> dict:
        """The values of all flags, defaults filled in."""
        return self.flags | asdict(self.sampling) | asdict(self.inputs) | asdict(self.machine)

    def describe_video(self, shape: tuple[int, int, int], seed: int | str) -> str:
        """Describes the video in a line. shape: (frames, height, width)."""
        how = self.sampling
        guidance = " and ".join(f"{scale:g}" for scale in how.guidance)
        guidance += " (low and high noise)" if len(how.guidance) == 2 else ""
        sampled = f"{how.sample_solver}, shift {how.sample_shift:g}, guidance {guidance}"
        return f"{how.task}, {shape_in_words(shape)}, {how.sample_steps} steps, {sampled}, seed {seed}"


@dataclass(frozen=True)
class Request:
    """One video. path: of the result. image: path of its own image; None if the flags name the inputs of all videos.
    n_prompt: its negative prompt, None for the model's."""

    prompt: str
    seed: int
    path: Path
    image: str | None = None
    n_prompt: str | None = None
