"""Measures what this machine does with a Wan2.1 model before you download it: real sizes, random weights.

python -m examples.card --task t2v-14B --size 1280x720

Prints a table, and the same as JSON in the last line. `--layers` and `--frame_num` make it small enough for a CPU.
`--only` picks some of these parts:
forward: seconds of a computed call, and the share it reaches of the machine's own matrix multiplication rate, by the
FLOPs of `magcache.app.cost`; in the same rounds diffusers' WanTransformer3DModel with the same weights.
loop: denoising with and without caches, against the bound (all calls / computed calls); reused and forecast calls.
dtypes: weights in float32, bfloat16 and float8, all under bfloat16 autocast; the errors are those of the velocity.
offload: a call with one block on the GPU at a time, and the pinned memory that the other blocks take.
compile: a call with compiled blocks. attention: the model's own attention by every installed backend.
vae: the VAE decodes the video, whole and in tiles.
Times are wall times; on a CPU with a single thread (OMP_NUM_THREADS=1) they are that thread's own time.
Memory is the most that was allocated on the GPU during a part; it is not measured on a CPU.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

import magcache
from magcache.app.architecture import CLIP_TOKENS, CONTROL, LATENT_5B
from magcache.app.cost import call_flops, number_of_bytes, token_count
from magcache.app.errors import first_line
from magcache.app.progress import moment, seconds_between
from magcache.app.tasks import TASKS
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import CHANNELS_48
from wan.utils.attention import attention_backends
from wan.utils.offload import offload_transformer
from wan.utils.samplers import make_sampler

PARTS = ("forward", "loop", "dtypes", "offload", "compile", "attention", "vae")
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HELD = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # default dtype of the weights
TOO_LARGE = ("flex", "_native_math")  # backends that hold all scores


class Subject:
    """The task's model and its inputs. layers: how many blocks it has; None for all."""

    def __init__(self, task: str, size: str, frames: int, layers: int | None):
        width, height = map(int, size.replace("x", "*").split("*"))
        self.task, self.kind, shape = task, TASKS[task].model_type, TASKS[task].architecture
        layers = layers or shape.num_layers
        self.vace_layers = [i for i in range(0, shape.num_layers, 2 if "1.3B" in task else 5) if i < layers]
        hints = len(self.vace_layers) if shape.vace_blocks else 0
        self.shape = replace(shape, num_layers=layers, vace_blocks=hints)
        self.tokens = token_count(frames, height, width, 0, TASKS[task].token_pixels)
        stride = WAN_CONFIGS[task].vae_stride
        self.latent_shape = (shape.out_dim, (frames - 1) // stride[0] + 1, height // stride[1], width // stride[2])

    def model(self, dtype: torch.dtype, place: torch.device | str | None = None) -> WanModel:
        """Makes the model with random weights that are the same for every dtype. place: None for the device."""
        config, shape = WAN_CONFIGS[self.task], self.shape
        names = ("text_len", "dim", "ffn_dim", "freq_dim", "num_layers", "text_dim")
        sizes = {name: getattr(shape, name) for name in names} | {"num_heads": config.num_heads}
        with torch.device("meta"):
            if self.kind == "vace":
                model = VaceWanModel(self.vace_layers, CONTROL, **sizes)
            else:
                sides = {name: getattr(shape, name) for name in ("in_dim", "out_dim", "clip_positions")}
                model = WanModel(self.kind, **sizes, **sides, clip_dim=shape.clip_dim if shape.images else 0)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for name, parameter in list(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator, device=DEVICE)
            values = 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.02 * values
            kept = set(name.split(".")) & set(model._keep_in_fp32_modules)
            owner, _, own_name = name.rpartition(".")
            values = values.to(torch.float32 if kept else dtype).to(place or DEVICE)
            value = torch.nn.Parameter(values, requires_grad=False)
            setattr(model.get_submodule(owner), own_name, value)
        return model.eval()

    def arguments(self) -> dict:
        """Makes the arguments of a call."""
        generator, shape = torch.Generator(DEVICE).manual_seed(1), self.shape

        def noise(*sides):
            return torch.randn(sides, generator=generator, device=DEVICE)

        given = {"x": [noise(*self.latent_shape)], "t": torch.tensor([500], device=DEVICE), "seq_len": self.tokens}
        given["context"] = [noise(shape.text_len, shape.text_dim)]
        if self.kind == "vace":
            given["vace_context"] = [noise(CONTROL, *self.latent_shape[1:])]
        elif shape.in_dim > shape.out_dim:
            given["y"] = [noise(shape.in_dim - shape.out_dim, *self.latent_shape[1:])]
        if shape.images:
            given["clip_fea"] = noise(shape.images, CLIP_TOKENS, shape.clip_dim)
        return given

    def flops(self) -> int:
        return call_flops(self.shape, self.tokens)[0]

    def peer(self, model: WanModel):
        """Makes diffusers' transformer with this model's weights, called with the same arguments; None for VACE."""
        if self.kind == "vace":
            return None
        config, shape = WAN_CONFIGS[self.task], self.shape
        image = {}
        if shape.images:
            image = {"image_dim": shape.clip_dim, "added_kv_proj_dim": shape.dim}
            image |= {"pos_embed_seq_len": shape.clip_positions} if shape.clip_positions else {}
        with torch.device("meta"):
            sizes = {name: getattr(shape, name) for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers")}
            heads = {"num_attention_heads": config.num_heads, "attention_head_dim": shape.dim // config.num_heads}
            channels = {"in_channels": shape.in_dim, "out_channels": shape.out_dim}
            peer = diffusers.WanTransformer3DModel(**channels, **sizes, **heads, **image)
        state = convert_wan_transformer_to_diffusers(dict(model.state_dict()))
        if "img_emb.emb_pos" in state:  # which the converter does not know
            state["condition_embedder.image_embedder.pos_embed"] = state.pop("img_emb.emb_pos")
        peer.load_state_dict(state, assign=True)
        peer.rope = type(peer.rope)(shape.dim // config.num_heads, peer.config.patch_size, 1024).to(DEVICE)

        def call(x, t, seq_len, context, y=None, clip_fea=None):
            latents = torch.cat([x[0], *(y or [])])[None]
            return peer.eval()(latents, t, context[0][None], clip_fea, return_dict=False)[0]

        return call


def computing(dtype: torch.dtype | None = None):
    """Computes as the pipelines do: under bfloat16 autocast on CUDA and where weights are rounded."""
    rounded = dtype not in (None, torch.float32)
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda" or rounded)


def seconds(function, *args, **kwargs) -> float:
    # one thread's own time does not depend on what else the machine does
    clock = time.process_time if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function(*args, **kwargs)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def matmul_rate(dtype: torch.dtype, product: int) -> float:
    """Measures the FLOPs per second of large square matrix products in this dtype, in as many of them as add up to
    `product` FLOPs."""
    side = int(min(8192 if DEVICE.type == "cuda" else 2048, max(256, product ** (1 / 3))))
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    count = 1 + product // (2 * side**3)

    def multiply() -> None:
        for _ in range(count):
            torch.matmul(a, b)

    return count * 2 * side**3 / seconds(multiply)


def measure_forward(subject: Subject, rounds: int) -> list[dict]:
    model, arguments = subject.model(HELD), subject.arguments()
    peer, dtype = subject.peer(model), torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    calls = {"ours": model} | ({"diffusers": peer} if peer else {})
    rows, rates = {name: [] for name in calls}, []
    for number in range(rounds + 1):
        around = []  # rates measured just before and after our call, since other work on the machine slows both
        for name in sorted(calls, reverse=number % 2 == 1):
            if name == "ours":
                around.append(matmul_rate(dtype, subject.flops() // 10))
                forget_peak()
            rows[name].append(seconds(calls[name], **arguments))
            if name == "ours":
                held = memory()
                around.append(matmul_rate(dtype, subject.flops() // 10))
        rates.append(statistics.harmonic_mean(around))
    rates, rows = rates[1:], {name: times[1:] for name, times in rows.items()}  # the first round warms up
    shares = [subject.flops() / time / rate for time, rate in zip(rows["ours"], rates, strict=True)]
    found = [
        {
            "what": "computed call",
            "seconds": statistics.median(rows["ours"]),
            "share_of_matmul": statistics.median(shares),
            "matmul_flops": statistics.median(rates),
            **held,
        }
    ]
    if peer:
        ratios = [ours / theirs for ours, theirs in zip(rows["ours"], rows["diffusers"], strict=True)]
        difference = error(model(**arguments)[0], peer(**arguments)[0])
        peers = {"seconds": statistics.median(rows["diffusers"]), "error": difference}
        peers["ours_over_it_by_round"] = statistics.median(ratios)
        found.append({"what": "diffusers' WanTransformer3DModel", **peers})
    return found


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The relative error in the L2 norm."""
    return float((value - reference).norm() / reference.norm())


def denoise(model: WanModel, arguments: dict, steps: int) -> None:
    sampler, (latent,) = make_sampler("unipc", steps, 5.0, DEVICE), arguments["x"]
    for t in sampler.timesteps:
        cond, uncond = (model(**arguments | {"x": [latent], "t": t[None]})[0] for _ in range(2))
        latent = sampler.step((uncond + 5 * (cond - uncond))[None], t, latent[None], return_dict=False)[0][0]


def measure_loop(subject: Subject, steps: int) -> list[dict]:
    model, arguments = subject.model(HELD), subject.arguments()
    plain, rows = seconds(denoise, model, arguments, steps), []
    rows.append({"what": f"{steps} steps uncached", "seconds": plain})
    ratios = (1.0,) * (2 * steps)  # every second step
    for name, schedule in (
        ("reused residuals", magcache.plan(ratios, steps, 1.0, 1, 0.0)),
        ("forecasts", magcache.plan_speedup(steps, 2)),
    ):
        told = []
        magcache.apply_magcache(model, schedule, on_call=lambda *call, told=told: told.append((*call, moment())))
        cached = seconds(denoise, model, arguments, steps)
        # of uncond calls, each of which follows its cond call at once
        pairs = zip(told[::2], told[1::2], strict=True)
        calls = [seconds_between(start, end) for (*_, start), (_, reused, end) in pairs if reused]
        rows.append(
            {
                "what": f"{steps} steps, {name}",
                "seconds": cached,
                "faster": plain / cached,
                "bound": schedule.speedup_bound,
                "seconds_a_call": statistics.median(calls),
            }
        )
    return rows


def measure_dtypes(subject: Subject, rounds: int) -> list[dict]:
    arguments, first = subject.arguments(), []

    def measure(dtype: torch.dtype) -> dict:
        with computing(torch.bfloat16):
            model = subject.model(dtype)
            out = model(**arguments)[0]
            times = [seconds(model, **arguments) for _ in range(rounds)]
        first.append(out)
        size = sum(parameter.nbytes for parameter in model.parameters())
        row = {"seconds": statistics.median(times), "weight_bytes": size, "error": error(out, first[0])}
        return row | memory()

    return [tried(f"weights in {dtype}".replace("torch.", ""), measure, dtype) for dtype in DTYPES]


def measure_offload(subject: Subject, rounds: int) -> list[dict]:
    model, arguments = subject.model(HELD, "cpu"), subject.arguments()
    clear()
    offload_transformer(model, DEVICE)
    times = [seconds(model, **arguments) for _ in range(rounds + 1)][1:]
    size = sum(parameter.nbytes for parameter in model.parameters())
    row = {"what": "one block at a time", "seconds": statistics.median(times), "weight_bytes": size} | memory()
    if DEVICE.type == "cuda" and hasattr(torch.cuda, "host_memory_stats"):
        row["pinned_bytes"] = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    return [row]


def measure_compile(subject: Subject, rounds: int) -> list[dict]:
    model, arguments = subject.model(HELD), subject.arguments()
    model.compile_repeated_blocks()
    first = seconds(model, **arguments)
    times = [seconds(model, **arguments) for _ in range(rounds)]
    return [{"what": "compiled blocks", "seconds": statistics.median(times), "seconds_of_the_first": first}]


def measure_attention(subject: Subject, rounds: int) -> list[dict]:
    heads = WAN_CONFIGS[subject.task].num_heads
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    q = torch.randn(1, subject.tokens, heads, subject.shape.dim // heads, device=DEVICE, dtype=dtype)

    def measure(name: str) -> dict:
        backend = AttentionBackendName(name)
        times = [seconds(dispatch_attention_fn, q, q, q, backend=backend) for _ in range(rounds + 1)][1:]
        return {"seconds": statistics.median(times)}

    names = [name for name in attention_backends(DEVICE) if name not in TOO_LARGE]
    return [tried(f"attention by {name}", measure, name) for name in names]


def measure_vae(subject: Subject) -> list[dict]:
    large = {"base_dim": 160, "decoder_base_dim": 256} | CHANNELS_48 if subject.shape.out_dim == LATENT_5B else {}
    with DEVICE:
        vae = diffusers.AutoencoderKLWan(**large).eval().requires_grad_(False)
    latent = torch.randn(1, *subject.latent_shape, device=DEVICE)

    def measure() -> dict:
        with torch.autocast(DEVICE.type, enabled=False):  # as the pipelines decode
            return {"seconds": seconds(vae.decode, latent)} | memory()

    whole = tried("VAE decodes", measure)
    vae.clear_cache()
    vae.enable_tiling()
    return [whole, tried("VAE decodes in tiles", measure)]


def tried(what: str, measure: Callable[..., dict], *arguments) -> dict:
    """Returns a row of the table: what was measured, or why it could not be; the rest goes on."""
    clear()
    try:
        return {"what": what} | measure(*arguments)
    except Exception as fault:
        return failed(what, fault)


def failed(what: str, fault: Exception) -> dict:
    return {"what": f"{what}: failed", "error": first_line(fault)}


def clear() -> None:
    gc.collect()
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    forget_peak()


def forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict:
    return {"peak_bytes": torch.cuda.max_memory_allocated()} if DEVICE.type == "cuda" else {}


def shown(name: str, value) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("bytes"):
        value = number_of_bytes(value)
    return f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, '.3g')}"


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2v-1.3B", choices=tuple(TASKS))
    parser.add_argument("--size", default="832x480", help="widthxheight, multiples of 16")
    parser.add_argument("--frame_num", type=int, default=81, help="4n+1")
    parser.add_argument("--layers", type=int, help="number of transformer blocks (default: all)")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps of the loops")
    parser.add_argument("--rounds", type=int, default=3, help="times that a call is repeated")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    args = parser.parse_args(arguments)
    subject = Subject(args.task, args.size, args.frame_num, args.layers)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    sides = f"{args.size}, {args.frame_num} frames, {subject.tokens} tokens, {subject.shape.num_layers} layers"
    print(f"{name}, torch {torch.__version__}; {args.task}, {sides}, {subject.flops():.3g} FLOPs a call", flush=True)
    report = {"device": name, "torch": torch.__version__} | vars(args) | {"tokens": subject.tokens, "rows": []}
    measures = {
        "forward": (measure_forward, args.rounds),
        "loop": (measure_loop, args.steps),
        "dtypes": (measure_dtypes, args.rounds),
        "offload": (measure_offload, args.rounds),
        "compile": (measure_compile, args.rounds),
        "attention": (measure_attention, args.rounds),
        "vae": (measure_vae,),
    }
    for part in PARTS:
        if part not in args.only:
            continue
        clear()
        measure, *settings = measures[part]
        try:
            with computing():
                rows = measure(subject, *settings)
        except Exception as fault:  # the other parts do not need this one
            rows = [failed(part, fault)]
        if part in ("loop", "compile", "attention"):
            rows[0] |= memory()
        for row in rows:
            what, *rest = (shown(key, value) for key, value in row.items())
            print(f"{what:<34} {', '.join(rest)}", flush=True)
        report["rows"] += rows
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
