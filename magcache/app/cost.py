"""What a transformer, a call and a run cost: parameters, FLOPs, memory. Pure Python.

The weights and the FLOPs are counted over the tensors. The bytes for activations were measured on transformers and VAE
at their real sizes, on fake tensors; see examples/README.md.
"""

from dataclasses import dataclass
from math import prod

from magcache.app.architecture import CLIP_TOKENS, LATENT, LATENT_5B, PATCH, Architecture, tensor_shapes
from magcache.app.backend import backend
from magcache.app.checkpoint import architecture_of
from magcache.app.job import Job
from magcache.schedule import CALLS_PER_STEP, Schedule

BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
TEXT_ENCODER = 5.68e9  # parameters of umt5-xxl's encoder
VAE_WEIGHTS = {LATENT: 507e6, LATENT_5B: 2.82e9}  # bytes, float32, by the channels of the latents
VAE_AT_ONCE = {LATENT: 19_500, LATENT_5B: 21_600}  # bytes for each pixel of a frame, or of a tile, decoded at once
TILE = 256  # pixels a side, of a tiled VAE
PINNED = 1.05  # most that a model takes whose tensors are pinned together, over its own size
TEXT_PINNED = 2**31  # bytes, the text encoder's largest layer on its way
CONTEXT = 0.6e9  # bytes, of CUDA and its libraries
NOT_ON_REUSE = ("blocks.", "vace_")  # what a call that reuses a residual does not compute


def parameters(sizes: Architecture, part: str = "") -> tuple[int, int]:
    """Counts the weights of the linear layers in the blocks, and all other parameters, which stay float32. part: how
    the names begin that count."""
    counts = {name: prod(shape) for name, shape in tensor_shapes(sizes).items() if name.startswith(part)}
    large = sum(count for name, count in counts.items() if is_large(name))
    return large, sum(counts.values()) - large


def is_large(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer in a block."""
    return name.startswith(("blocks.", "vace_blocks.")) and name.endswith(".weight") and "norm" not in name


def weight_bytes(sizes: Architecture, dtype: str, part: str = "") -> int:
    large, small = parameters(sizes, part)
    return large * BYTES[dtype] + 4 * small


def token_count(frames: int, height: int, width: int, references: int = 0, token_pixels: int = 16) -> int:
    """Returns the tokens of a call. frames: 4 n + 1. height, width: in pixels. references: VACE's."""
    return ((frames - 1) // 4 + 1 + references) * (height // token_pixels) * (width // token_pixels)


def call_flops(sizes: Architecture, tokens: int) -> tuple[int, int]:
    """Returns the FLOPs of a computed and of a reused call of one sample, as torch's FlopCounterMode counts them: two
    for every multiplication of a matrix product, a convolution or an attention, none for the rest."""
    text, image = sizes.text_len, sizes.images * CLIP_TOKENS
    rows = {"time_": 1, "text_embedding": text, "cross_attn.k.": text, "cross_attn.v.": text}
    rows |= dict.fromkeys(("img_emb", "k_img", "v_img"), image)
    computed = reused = 0
    for name, shape in tensor_shapes(sizes).items():
        if name.endswith(".weight") and len(shape) > 1:
            times = next((count for part, count in rows.items() if part in name), tokens)
            flops = 2 * times * prod(shape)
            computed += flops
            reused += 0 if name.startswith(NOT_ON_REUSE) else flops
    blocks = sizes.num_layers + sizes.vace_blocks
    return computed + blocks * 4 * tokens * (tokens + text + image) * sizes.dim, reused


def run_flops(schedule: Schedule, sizes: Architecture, tokens: int) -> tuple[int, int]:
    """Returns the FLOPs of a whole run with this schedule, and with every call computed."""
    computed, reused = call_flops(sizes, tokens)
    if schedule.target == "output":
        reused = 0  # the model does not run
    return schedule.computed * computed + sum(schedule.reuse) * reused, len(schedule.weights) * computed


def cached_bytes(schedule: Schedule, sizes: Architecture, tokens: int, shards: int = 1) -> float:
    """Returns the memory of the cached residuals or outputs of all branches, see `kept_bytes`."""
    return kept_bytes(schedule.target, schedule.calls_per_step * schedule.history, sizes, tokens, shards)


def kept_bytes(target: str, count: int, sizes: Architecture, tokens: int, shards: int) -> float:
    """Returns the memory of so many residuals or outputs, in float32, as Wan computes them. shards: processes that
    share the tokens of a residual; outputs are whole."""
    numbers = tokens * {"residual": sizes.dim / shards, "output": prod(PATCH) * sizes.out_dim}[target]
    return count * numbers * BYTES["float32"]


def call_bytes(
    sizes: Architecture, tokens: int, autocast: bool, by_token: bool = False, held: float | None = None
) -> float:
    """Returns the most that a computed call holds beside the weights. autocast: to bfloat16. by_token: whether every
    token has a timestep, and so a modulation, of its own. held: bytes that a block holds for each channel of a token;
    None for our `wan`."""
    width = 2 if autocast else 4  # bytes of what linear layers take and give
    attention, feed_forward = 16.2 + 6 * width, 12.6 + 4 * by_token + 2 * width * sizes.ffn_dim / sizes.dim
    hints = (sizes.vace_blocks + 1.5) * width if sizes.vace_blocks else 0
    return tokens * sizes.dim * ((held or max(attention, feed_forward)) + hints)


def vae_bytes(frames: int, height: int, width: int, tiled: bool, latent: int = LATENT) -> float:
    """Returns the most that decoding a video holds beside the weights. latent: channels."""
    at_once = min(height, TILE) * min(width, TILE) if tiled else height * width
    return VAE_AT_ONCE[latent] * at_once + 12 * (3 if tiled else 1) * frames * height * width


@dataclass(frozen=True)
class Needs:
    """In bytes. weights, activations, cached: while the transformer runs. card: the most of all phases, on a GPU. host:
    weights in the machine's memory, through which they come and where they wait, for every process."""

    dtype: str
    weights: float
    activations: float
    cached: float
    text: float
    vae: float
    card: float
    host: float

    def __str__(self) -> str:
        parts = {f"weights ({self.dtype})": self.weights, "activations": self.activations, "cached": self.cached}
        inside = ", ".join(f"{name} {number_of_bytes(size)}" for name, size in parts.items() if size)
        others = {"text encoder": self.text, "VAE": self.vae}
        outside = ", ".join(f"{name} {number_of_bytes(size)}" for name, size in others.items() if size)
        return f"{number_of_bytes(self.card)} of the GPU: {inside}; {outside}; {number_of_bytes(self.host)} of the host"


def needs_of(job: Job, pixels: tuple[int, int, int], cuda: bool = True) -> Needs:
    """pixels: (frames, height, width) of the video. cuda: where it runs, which decides on the dtype of the weights."""
    machine, spec, chosen = job.machine, job.sampling.spec, backend()
    sizes, experts = architecture_of(spec, machine.ckpt_dir), len(spec.transformers)
    shards, blocks = machine.shards, sizes.num_layers + sizes.vace_blocks
    tokens = token_count(*pixels, len(job.inputs.references), spec.token_pixels)
    dtype = chosen.weights_dtype(machine, cuda)
    all_weights = weights = weight_bytes(sizes, dtype)
    if machine.dit_fsdp:  # the linear layers of blocks are; of two blocks, this one and the next, they are gathered
        large, _ = parameters(sizes, "blocks.0.")
        sharded = large * BYTES[dtype] * blocks
        weights -= sharded * (1 - 1 / machine.group_size) - 2 * large * (BYTES["bfloat16"] if cuda else BYTES[dtype])
    if machine.offload_blocks:  # all but one, and the next, which is copied meanwhile
        weights -= weight_bytes(sizes, dtype, "blocks.0.") * max(0, blocks - 2)
    by_token = bool(job.inputs.image) and not spec.needs_images
    whole, shared = chosen.held or (0.0, None)
    activations = call_bytes(sizes, tokens, cuda or dtype != "float32", by_token, shared) / shards
    activations += tokens * sizes.dim * whole
    cached = 0.0
    if job.cache and not job.cache.offload:
        cached = cached_bytes(job.schedule, sizes, tokens, shards)
    if job.calibration:  # the last residual of each branch
        cached = kept_bytes("residual", CALLS_PER_STEP, sizes, tokens, shards)
    text = 2 * TEXT_ENCODER / (machine.group_size if machine.t5_fsdp else 1)
    if (machine.t5_cpu or machine.offload_blocks) and not machine.t5_fsdp:
        text = 0.0
    vae = vae_bytes(*pixels, machine.vae_tiling, sizes.out_dim)
    again = job.prompt_file or job.compare or job.trials or not chosen.frugal
    if chosen.holds_both(machine, again):
        weights *= experts
    all_weights *= experts
    stays = weights if machine.dit_fsdp or (again and not machine.offload_model) else 0.0
    kept = text if again and (machine.t5_fsdp or not machine.offload_model) else 0.0
    card = CONTEXT + VAE_WEIGHTS[sizes.out_dim] + max(text, weights + kept + activations + cached, stays + kept + vae)
    host = all_weights * PINNED + TEXT_PINNED if machine.offload_blocks and cuda else all_weights
    if cuda and again and machine.offload_model and not machine.offload_blocks:
        host += 2 * TEXT_ENCODER  # until it has been on the card, it is the mapped file
    return Needs(dtype, weights, activations, cached, text, vae, card, host)


def number_of_bytes(count: float) -> str:
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
    unit, size = next((u, s) for u, s in units if count >= s or s == 1)
    return f"{count / size:.3g} {unit}"
