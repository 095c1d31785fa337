"""What a run needs of the card's memory and of the machine's, by formulas. Pure Python.

The weights are counted. The bytes for activations were measured on transformers and VAE at their real sizes, on fake
tensors; see examples/README.md.
"""

from dataclasses import dataclass

from magcache.app import plan
from magcache.app.job import Job
from magcache.app.plan import PATCH, Shape, number_of_bytes

BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
TEXT_ENCODER = 5.68e9  # parameters of umt5-xxl's encoder
VAE_WEIGHTS = 507e6  # bytes, float32
VAE_AT_ONCE = 19_500  # bytes for each pixel of a frame, or of a tile, that is decoded at once
TILE = 256  # pixels a side, of a tiled VAE
CONTEXT = 0.6e9  # bytes, of CUDA and its libraries


def block_parameters(shape: Shape) -> tuple[int, int]:
    """Of one block: of the weights of its linear layers, and all others."""
    dim, image = shape.dim, bool(shape.image_tokens)
    linear = (8 + 2 * image) * dim**2 + 2 * dim * shape.ffn_dim
    biases = (8 + 2 * image) * dim + shape.ffn_dim + dim
    return linear, biases + (6 + 4 + image + 2) * dim  # modulation, norms of q and k, norm3


def parameters(shape: Shape) -> tuple[int, int]:
    """Of a Wan transformer: of the weights of the linear layers in its blocks, and all others, which stay float32."""

    def linear(width_in: int, width_out: int) -> int:
        return (width_in + 1) * width_out

    dim, clip = shape.dim, shape.clip_dim
    large, small = block_parameters(shape)
    rest = linear(PATCH * shape.in_dim, dim) + linear(shape.text_dim, dim) + linear(dim, dim)
    rest += linear(shape.freq_dim, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    rest += linear(dim, PATCH * shape.out_dim) + 2 * dim
    if shape.image_tokens:
        rest += 2 * clip + linear(clip, clip) + linear(clip, dim) + 2 * dim
        rest += shape.image_tokens * clip if shape.image_tokens > plan.CLIP_TOKENS else 0  # positions of two images
    hints = shape.vace_blocks
    if hints:
        rest += linear(PATCH * shape.vace_in_dim, dim) + (hints + 1) * dim
    blocks = shape.num_layers + hints
    return blocks * large + (hints + bool(hints)) * dim**2, blocks * small + rest


def weight_bytes(shape: Shape, dtype: str) -> int:
    large, small = parameters(shape)
    return large * BYTES[dtype] + 4 * small


def call_bytes(shape: Shape, tokens: int, autocast: bool) -> float:
    """Most that a computed call holds beside the weights. autocast: to bfloat16."""
    width = 2 if autocast else 4  # bytes of what linear layers take and give
    attention, feed_forward = 16.2 + 6 * width, 16.6 + 2 * width * shape.ffn_dim / shape.dim
    hints = (shape.vace_blocks + 1.5) * width if shape.vace_blocks else 0
    return tokens * shape.dim * (max(attention, feed_forward) + hints)


def vae_bytes(frames: int, height: int, width: int, tiled: bool) -> float:
    """Most that decoding a video holds beside the weights."""
    at_once = min(height, TILE) * min(width, TILE) if tiled else height * width
    return VAE_AT_ONCE * at_once + 12 * (3 if tiled else 1) * frames * height * width


@dataclass(frozen=True)
class Needs:
    """In bytes. weights, activations, cached: while the transformer runs. card: the most of all phases, on a GPU. host:
    weights in the machine's memory, through which they come and where they wait."""

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
        return f"{number_of_bytes(self.card)} of the GPU: {inside}; {outside}"


def needs_of(job: Job, shape: Shape, tokens: int, pixels: tuple[int, int, int], cuda: bool = True) -> Needs:
    """pixels: (frames, height, width) of the video. cuda: where it runs, which decides on the dtype of the weights."""
    machine, shards = job.machine, job.machine.shards
    dtype = machine.dit_dtype or ("bfloat16" if cuda and not machine.dit_fsdp else "float32")
    all_weights = weights = weight_bytes(shape, dtype)
    large, small = block_parameters(shape)
    if machine.dit_fsdp:  # the linear layers of blocks are; of two blocks, this one and the next, they are gathered
        sharded = large * BYTES[dtype] * (shape.num_layers + shape.vace_blocks)
        weights -= sharded * (1 - 1 / machine.group_size) - 2 * large * (BYTES["bfloat16"] if cuda else BYTES[dtype])
    if machine.offload_blocks:  # with one block at a time the next is copied meanwhile
        block = large * BYTES[dtype] + 4 * small
        at_once = max(2, machine.offload_blocks)
        weights -= block * max(0, shape.num_layers + shape.vace_blocks - at_once)
    activations = call_bytes(shape, tokens, cuda or dtype != "float32") / shards
    cached = 0.0
    if job.cache and not job.cache.offload:
        cached = plan.cached_bytes(job.schedule, shape, tokens, job.cache.dtype)
        cached /= shards if job.schedule.target == "residual" else 1
    text = 2 * TEXT_ENCODER / (machine.group_size if machine.t5_fsdp else 1)
    if (machine.t5_cpu or machine.offload_blocks) and not machine.t5_fsdp:
        text = 0.0
    vae = vae_bytes(*pixels, machine.vae_tiling)
    stays = weights if machine.dit_fsdp or not machine.offload_model else 0.0
    again = job.prompt_file or job.output.compare  # else the text encoder is freed
    kept = text if again and (machine.t5_fsdp or not machine.offload_model) else 0.0
    card = CONTEXT + VAE_WEIGHTS + max(text, weights + kept + activations + cached, stays + kept + vae)
    return Needs(dtype, weights, activations, cached, text, vae, card, all_weights)


def is_real(job: Job) -> bool:
    """Whether it is one of the models that the numbers here are about, not a demo model."""
    return not job.sampling.task.endswith("-tiny")


def needs_of_run(job: Job, pixels: tuple[int, int, int], cuda: bool) -> Needs:
    tokens = plan.token_count(*pixels, len(job.inputs.references) if job.sampling.kind == "vace" else 0)
    return needs_of(job, plan.shape_of(job.sampling.task, job.machine.ckpt_dir), tokens, pixels, cuda)


def warning(needs: Needs, free: int) -> str | None:
    """What to say where the card has less than that; free: bytes."""
    if needs.card <= free:
        return None
    has = f"this run needs about {number_of_bytes(needs.card)} of the GPU's memory, {number_of_bytes(free)} are free"
    return f"warning: {has}; --offload_blocks, --offload_model True, --vae_tiling or a smaller --size need less"
