"""The pipelines on a pretended card: what they compute there, what they have there when, and what they wait for."""

import collections
import contextlib
import dataclasses
import gc

import pytest
import torch
from easydict import EasyDict
from full_size import make_model
from golden_data import read_json, write_checkpoint
from PIL import Image
from pretended_card import PretendedCard, named_phases
from torch.utils._pytree import tree_map_only

import magcache
import wan
from magcache.app import cost, progress
from magcache.app.checkpoint import architecture_of
from magcache.app.tasks import TASKS
from wan import image2video, pipeline, vace
from wan.configs import WAN_CONFIGS
from wan.utils import samplers
from wan.utils.offload import packed

CLIP_HEADS = read_json("pipelines/common/hparams.json")["clip"]["vision_heads"]
PHASES = {
    pipeline.WanPipeline: ("__init__", "encode_text", "denoise", "decode"),
    image2video.WanI2V: ("condition", "encode_images"),
    vace.WanVace: ("vace_encode_frames",),
}
STEPS = 4
CACHES = {
    "residual": magcache.plan((1.0,) * (2 * STEPS), STEPS, 0.12, 1, sigmas=magcache.noise_levels(STEPS, 5.0)),
    "output": magcache.plan_speedup(STEPS, 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_checkpoint(kind, tmp_path_factory.mktemp(kind)) for kind in ("t2v", "i2v", "flf2v", "vace")}


@pytest.fixture
def phases(monkeypatch):
    return named_phases(monkeypatch, PHASES)


def picture(seed):
    pixels = torch.randint(256, (48, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make(folders, kind, **how):
    config = EasyDict(WAN_CONFIGS[f"{kind}-14B"], clip_num_heads=CLIP_HEADS)
    return getattr(wan, {"t2v": "WanT2V", "i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}[kind])(
        config, folders[kind], **how
    )


def generate(made, **how):
    settings = {"shift": 5.0, "sampling_steps": STEPS, "seed": 1} | how
    if isinstance(made, image2video.WanI2V):
        pictures = [picture(i) for i in range(2 if isinstance(made, wan.WanFLF2V) else 1)]
        return made.generate("a fox", *pictures, max_area=32 * 48, frame_num=5, **settings)
    if isinstance(made, wan.WanVace):
        generator = torch.Generator().manual_seed(0)
        frames, ref = (torch.rand(3, n, 32, 48, generator=generator) * 2 - 1 for n in (5, 1))
        mask = torch.ones(1, 5, 32, 48)
        mask[:, :, :16] = 0
        return made.generate("a fox", [frames], [mask], [[ref]], **settings)
    return made.generate("a fox", (48, 32), 5, **settings)


def size(model):
    return sum(parameter.nbytes for parameter in model.parameters())


# bytes on the card beside the VAE's weights: at the start of a phase, the most within, to a few percent, at its end
TEXT = {"encode_text": (128, 14_574_848, 98_432)}
BYTES = {
    "t2v": TEXT | {"denoise": (101_504, 514_460, 104_576), "decode": (104_576, 1_021_856, 196_736)},
    "i2v": TEXT | {
        "condition": (116_864, 858_272, 120_704), "encode_images": (120_704, 2_039_136, 145_376),
        "denoise": (130_016, 676_476, 133_088), "decode": (133_088, 1_050_368, 225_248),
    },
    "flf2v": TEXT | {
        "condition": (135_296, 895_136, 139_136), "encode_images": (139_136, 2_659_680, 188_480),
        "denoise": (154_688, 847_644, 157_760), "decode": (157_760, 1_075_040, 249_920),
    },
    "vace": TEXT | {
        "vace_encode_frames": (239_744, 1_074_080, 248_960),
        "denoise": (130_688, 671_900, 135_296), "decode": (135_296, 1_052_576, 227_456),
    },
}  # fmt: skip


def check_bytes(card, vae, expected):
    """vae: bytes of its weights. expected: an entry of BYTES."""
    found = {name: (start - vae, most - vae, end - vae) for name, start, most, end in card.phases if name != "__init__"}
    assert found.keys() == expected.keys()
    for name, (start, most, end) in expected.items():
        assert (found[name][0], found[name][2]) == (start, end), (name, found)
        assert found[name][1] == pytest.approx(most, rel=0.03), (name, found)


@pytest.fixture
def exact_steps(monkeypatch):
    """Without autocast in the sampler's steps, one einsum of which CUDA's rounds to bfloat16 and the CPU's does not."""
    step = torch.autocast("cuda", enabled=False)(torch.autocast("cpu", enabled=False)(samplers.UniPC.step))
    monkeypatch.setattr(samplers.UniPC, "step", step)


def on_host(tree):
    """As the CPU computes with them: its autocast leaves the float16 of the image features to a layer norm."""

    def moved(tensor):
        return tensor.cpu().float() if tensor.dtype == torch.float16 else tensor.cpu()

    return tree_map_only(torch.Tensor, moved, tree)


@pytest.mark.parametrize("kind", BYTES)
def test_every_kind(folders, phases, exact_steps, kind):
    """The latent is that of the CPU, and the card holds what it should."""
    with PretendedCard() as card:
        phases.append(card)
        made, seen = make(folders, kind), []
        denoise = made.denoise
        made.denoise = lambda *args: seen.append((args, denoise(*args))) or seen[-1][1]
        video = generate(made)
        assert video.shape == (3, 5, *((48, 32) if kind in ("i2v", "flf2v") else (32, 48)))
        check_bytes(card, size(made.vae.model), BYTES[kind])
        ((*given, how), latent) = on_host(seen.pop())
        phases.clear()
    found = make(folders, kind, dit_dtype=torch.bfloat16).denoise(*given, how)
    torch.testing.assert_close(latent, found, atol=1e-4, rtol=0)


# t2v in other ways: arguments of the class, of `generate` and of the cache; what is otherwise than in BYTES["t2v"]
ONE = BYTES["t2v"] | {"decode": (101_504, 1_018_784, 193_664)}  # there the test itself holds a latent
ALL_TEXT, ALL_DIT = 83_072, 176_096  # weights
WAYS = {
    "kept there": ({}, {"offload_model": False}, None, {
        "encode_text": (128, 14_574_848, 98_432 + ALL_TEXT),
        "denoise": (101_504 + ALL_TEXT, 514_460 + ALL_TEXT, 104_576 + ALL_TEXT + ALL_DIT),
        "decode": tuple(number + ALL_TEXT + ALL_DIT for number in ONE["decode"]),
    }),
    "by blocks": ({"offload_blocks": True}, {}, None, {
        "encode_text": (128, 14_492_032, 98_432), "denoise": (101_504, 442_788, 104_576),
    }),
    "residuals by blocks": ({"offload_blocks": True}, {}, "residual", {  # the last call reuses
        "encode_text": (128, 14_492_032, 98_432), "denoise": (101_504, 442_788, 104_576),
    }),
    "text on the host": ({"t5_cpu": True}, {}, None, {
        "encode_text": (128, 12_224, 12_224), "denoise": (15_296, 428_252, 18_368),
        "decode": (15_296, 932_576, 107_456),
    }),
    "float8": ({"dit_dtype": torch.float8_e4m3fn}, {}, None, {"denoise": (101_504, 476_060, 104_576)}),
    "residuals": ({}, {}, "residual", {}),
    "outputs": ({}, {}, "output", {"denoise": (101_504, 523_676, 104_576)}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way(folders, phases, way):
    how, calls, target, otherwise = WAYS[way]
    with PretendedCard() as card:
        phases.append(card)
        made = make(folders, "t2v", **how)
        assert (size(made.text_encoder.model), size(made.model)) == (ALL_TEXT, ALL_DIT) or way == "float8"
        if target:
            magcache.apply_magcache(made.model, CACHES[target])
        generate(made, **calls)
        check_bytes(card, size(made.vae.model), ONE | otherwise)
        phases.clear()


def test_the_plan_knows_these_bytes(folders):
    """What it says of weights and cache, by formulas, is what was on the card."""
    sizes = dataclasses.replace(architecture_of(TASKS["t2v-14B"], folders["t2v"]), text_dim=48)
    assert cost.weight_bytes(sizes, "bfloat16") == ALL_DIT
    tokens = cost.token_count(5, 32, 48)
    outputs, _ = (cost.cached_bytes(cache, sizes, tokens) for cache in (CACHES["output"], CACHES["residual"]))
    assert cost.cached_bytes(magcache.Schedule((None, None)), sizes, tokens) == 0
    # three of four at once: the older one of a branch goes before the next is computed
    assert WAYS["outputs"][3]["denoise"][1] - BYTES["t2v"]["denoise"][1] == outputs * 3 / 4
    block = cost.weight_bytes(sizes, "bfloat16", "blocks.0.")
    rest = ALL_DIT - sizes.num_layers * block
    assert (
        WAYS["by blocks"][3]["denoise"][1] >= BYTES["t2v"]["denoise"][1] - rest - max(0, sizes.num_layers - 2) * block
    )


def test_a_cache_on_the_host_crosses_the_bus_in_its_dtype(folders):
    """Both ways, of two branches in every second step."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        with PretendedCard() as card:
            model = make(folders, "t2v").model.to("cuda:0")
            magcache.apply_magcache(model, CACHES["residual"], dtype=dtype, device="cpu")
            latent = torch.ones(16, 2, 6, 4).to("cuda:0")
            contexts = torch.ones(2, 5, model.text_embedding[0].weight.shape[1]).to("cuda:0")
            card.moved.clear()
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                for level in magcache.noise_levels(STEPS, 5.0):
                    for context in contexts:
                        model([latent], t=torch.tensor([int(1000 * level)]), context=[context], seq_len=12)
            moved.append(card.moved)
    timesteps, residuals = 2 * STEPS * 8, 4 * 12 * model.dim
    assert moved[0] == {"up": timesteps + 4 * residuals, "down": 4 * residuals}
    assert moved[1] == {"up": timesteps + 2 * residuals, "down": 2 * residuals}


@pytest.mark.parametrize("speedup", [1, 10])
def test_waits_in_a_step(folders, phases, speedup):
    """None beside those for models that come and go; two where the script shows a bar and looks for NaN."""
    steps = 50 if speedup > 1 else 10
    schedule = magcache.plan_speedup(steps, speedup)
    with PretendedCard() as card:
        made = make(folders, "t2v")
        phases.append(card)
        for shown in (False, True):
            card.waits.clear()
            with progress.watched(made, schedule) if shown else contextlib.nullcontext() as watch:
                magcache.apply_magcache(made.model, schedule, on_call=watch and watch.called)
                generate(made, sampling_steps=steps)
            kinds = collections.Counter()
            for (phase, kind, place), count in card.waits.items():
                if phase == "denoise" and not place.endswith((" to", " make_sampler")):
                    kinds[kind] += count
            # a step that only forecasts leaves the look for NaN to the next one that computes
            looks = schedule.computed // 2 - 1
            assert kinds == ({"event": steps + 1, "is_nonzero": looks} if shown else {})
        phases.clear()


def test_moves_are_not_counted_as_calls(folders, monkeypatch):
    """By a clock that a move puts forward by 100 seconds, and a call by one."""
    clock = [0.0]
    monkeypatch.setattr(progress, "moment", lambda: clock[0])
    made, schedule = make(folders, "t2v"), magcache.plan_speedup(STEPS, 2)

    def passed(seconds, result=None):
        clock[0] += seconds
        return result

    made.model.to = lambda device, to=made.model.to: passed(100, to(device))
    made.model.register_forward_hook(lambda *_: passed(1))
    with progress.watched(made, schedule) as watch:
        magcache.apply_magcache(made.model, schedule, on_call=watch.called)
        generate(made)
    spent = {"computed": schedule.computed, "inputs": 200}  # to the device and back
    assert watch.seconds == dict.fromkeys(progress.PHASES, 0) | spent


def test_a_failed_decoding_leaves_nothing_of_its_frames(folders):
    made = make(folders, "t2v")
    hook = made.vae.model.decoder.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.vae.decode([torch.zeros(16, 2, 4, 4)])
    hook.remove()
    assert not any(isinstance(kept, torch.Tensor) for kept in made.vae.model._feat_map)


def test_a_timestep_on_the_card_is_waited_for_once_a_call():
    """And nothing else is, with whatever is reused or told; other pipelines have their timesteps there."""

    class Plain(torch.nn.Module):
        def forward(self, x, t):
            return 2 * x

    for cache in (magcache.plan_speedup(STEPS, 2), magcache.Schedule((None,) * 2 * STEPS, target="output")):
        with PretendedCard() as card:
            model, told = Plain(), []
            magcache.apply_magcache(model, cache, on_call=lambda *call, told=told: told.append(call))
            timesteps = torch.tensor(magcache.noise_levels(STEPS, 5.0), device="cuda:0")
            x = torch.ones(1, 4).to("cuda:0")
            card.waits.clear()
            for timestep in timesteps.unbind():
                model(x, timestep), model(x, timestep)
            assert told == [*enumerate(cache.reuse)]
            assert sum(card.waits.values()) == 2 * STEPS


def test_pinned_memory(folders):
    """Torch's allocator rounds the few buffers up by little; of the models' real sizes and, moved, of a tiny one."""
    for task in ("t2v-1.3B", "t2v-14B", "i2v-14B", "vace-14B"):
        with torch.device("meta"):
            model = make_model(task)
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            sizes = [
                p.numel() * (4 if set(name.split(".")) & set(model._keep_in_fp32_modules) else dtype.itemsize)
                for name, p in model.named_parameters()
            ]
            taken = sum(1 << (buffer - 1).bit_length() for buffer, _ in packed(sizes))
            assert taken <= 1.05 * sum(sizes), (task, dtype)
    with PretendedCard() as card:
        model, plain = (make(folders, "t2v", **how).model for how in ({"offload_blocks": True}, {}))
        assert size(model) <= sum(card.pinned.values()) <= 1.3 * size(model)  # whose tensors are of some kilobytes
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name))
            assert parameter.is_pinned()


def test_three_videos_one_of_which_fails(folders, phases):
    """Each has what it has alone; a failure in the last block leaves nothing but the weights of the VAE."""
    for how in ({}, {"offload_blocks": True}):
        with PretendedCard() as card:
            phases.append(card)
            made = make(folders, "t2v", **how)
            for number, place in enumerate(
                (None, made.model.blocks[-1], made.text_encoder.model.encoder.block[-1], None)
            ):
                card.phases.clear()
                hook = place and place.register_forward_pre_hook(fail)
                if place is None:
                    made.keeps_models = number == 0
                    generate(made, sampling_steps=1)
                    assert card.phases[0][1] == size(made.vae.model) + 128
                else:
                    with pytest.raises(MemoryError):
                        generate(made, sampling_steps=1)
                    hook.remove()
                gc.collect()
                assert card.held == size(made.vae.model) + 128
            phases.clear()


def fail(module, args):
    raise MemoryError("full")
