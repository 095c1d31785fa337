"""What makes a model fit its card, on tiny models and the CPU: dtypes of weights, blocks that wait elsewhere, compiled
blocks, alone and together, for every kind of model, against the plain run."""

import functools
import gc
import itertools
import weakref

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from golden_data import write_checkpoint, write_dit_folder
from test_dit import KINDS, model_arguments
from torch._dynamo.utils import counters

import magcache
import wan
from magcache.app.choose_schedule import all_computed
from magcache.app.processes import tried
from magcache.app.progress import watched
from wan.configs import WAN_CONFIGS
from wan.utils.attention import attention_backends, choose_attention
from wan.utils.offload import offload_transformer

STEPS = 4
CACHES = {
    "uncached": None,
    "thresh": magcache.plan((1.0,) * (2 * STEPS), STEPS, 0.12, 1),
    "speedup": magcache.plan_speedup(STEPS, 2),
}
# of a float8 run against a float32 one, both under bfloat16 autocast
FLOAT8_ERROR = 0.08


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_dit_folder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def load(folders, kind, dtype=torch.float32, offload=False):
    model = KINDS[kind].from_pretrained(folders[kind], torch_dtype=dtype).requires_grad_(False)
    if offload:
        offload_transformer(model, torch.device("cpu"))
    return model


def velocities(model, kind, cache=None):
    """What the calls of a run return, whose steps differ in their timesteps and branches in their texts."""
    arguments = model_arguments(kind, "c0")
    if cache:
        magcache.apply_magcache(model, cache)
    texts = arguments["context"], [-u for u in arguments["context"]]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return torch.stack([
            model(**arguments | {"t": torch.full_like(arguments["t"], int(1000 * level)), "context": text})[0]
            for level, text in itertools.product(magcache.noise_levels(STEPS, 5.0), texts)
        ])  # fmt: skip


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_give_the_same_to_the_bit(folders, kind):
    plain, rounded = (load(folders, kind, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(velocities(rounded, kind), velocities(plain, kind))
    rounded_weights = {name for name, p in rounded.named_parameters() if p.dtype == torch.bfloat16}
    linear = {
        f"{name}.weight" for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in name
    }
    assert rounded_weights == linear


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination(folders, kind, dtype):
    """Against the plain run with the same cache: equal, or within the error of float8."""
    plain = load(folders, kind)
    expected = {name: velocities(plain, kind, cache=cache) for name, cache in CACHES.items()}
    for offload, compiled in itertools.product((False, True), repeat=2):
        model = load(folders, kind, dtype)
        if compiled:  # traced and guarded as for the real compiler, which would take minutes for all of them
            model.compile_repeated_blocks(backend="eager")
        if offload:
            offload_transformer(model, torch.device("cpu"))
        for name, cache in CACHES.items():
            error = relative_error(velocities(model, kind, cache=cache), expected[name])
            assert 0 < error < FLOAT8_ERROR if dtype == torch.float8_e4m3fn else error == 0, (offload, compiled, name)
            magcache.remove_magcache(model)


@pytest.mark.parametrize("kind", ["dit_t2v", "dit_vace"])
def test_one_compilation_serves_all_blocks_and_calls(folders, kind):
    torch.compiler.reset()
    counters.clear()
    model, arguments = load(folders, kind), model_arguments(kind, "c0")
    model.compile_repeated_blocks(backend="eager")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(**arguments)
    graphs = counters["stats"]["unique_graphs"]
    # the first main block, whose tokens are bfloat16, and the others; the same of the side branch
    assert graphs == {"dit_t2v": 2, "dit_vace": 4}[kind]
    for cache in (CACHES["thresh"], CACHES["speedup"]):
        assert any(cache.reuse)
        velocities(model, kind, cache=cache)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", ["dit_i2v", "dit_vace"])
def test_a_reused_call_moves_no_block(folders, kind, monkeypatch):
    model = load(folders, kind, offload=True)
    stacks = model.blocks, getattr(model, "vace_blocks", [])
    moved = []
    owned, onload = {id(block) for stack in stacks for block in stack}, ModuleGroup.onload_

    def counted(group):
        moved.append(any(id(module) in owned for module in group.modules))
        onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", counted)
    for cache in CACHES.values():
        moved.clear()
        velocities(model, kind, cache=cache)
        computed = cache.computed if cache else 2 * STEPS
        assert sum(moved) == computed * sum(map(len, stacks))
        if cache and cache.target == "output":  # nothing at all
            assert len(moved) == len(moved) // computed * computed
        magcache.remove_magcache(model)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {kind: write_checkpoint(kind, tmp_path_factory.mktemp(kind)) for kind in ("t2v", "i2v")}


def make_t2v(checkpoints, **how):
    return wan.WanT2V(WAN_CONFIGS["t2v-14B"], checkpoints["t2v"], **how)


def generate(pipeline, size=(32, 32), **how):
    return pipeline.generate("a fox", size, 5, sampling_steps=2, seed=1, **how)


def test_tiles(checkpoints):
    """Tiles of 256 pixels that overlap by 64: the first is what the library makes of its part of the latent alone."""
    plain, tiled = (make_t2v(checkpoints, vae_tiling=tiling).vae for tiling in (False, True))
    latent = torch.randn(16, 1, 8, 36, generator=torch.Generator().manual_seed(0))
    (parts,), (first,) = tiled.decode([latent]), plain.decode([latent[..., :32]])
    assert parts.shape == (3, 1, 64, 288)
    torch.testing.assert_close(parts[..., :192], first[..., :192], rtol=0, atol=1e-5)
    assert relative_error(parts, plain.decode([latent])[0]) < 0.3  # at the edges of tiles, of noise


def test_models_are_freed_when_they_are_done(checkpoints):
    pipeline = make_t2v(checkpoints)
    plain = generate(pipeline)
    encoder = weakref.ref(pipeline.text_encoder.model)
    pipeline.keeps_models = False
    seen = []
    hook = pipeline.model.register_forward_pre_hook(lambda *_: seen.append(encoder()))
    with watched(pipeline, all_computed(2), show=False):  # as the script does
        assert torch.equal(generate(pipeline), plain)
    hook.remove()
    assert set(seen) == {None}  # gone before the first call of the transformer
    assert {parameter.device.type for parameter in pipeline.model.parameters()} == {"meta"}


def test_what_failed_leaves_the_card(checkpoints, monkeypatch):
    """The transformer and the text encoder go back, and nothing holds the tensors of the video that failed."""
    pipeline, moved, left = make_t2v(checkpoints), [], []
    for model in (pipeline.model, pipeline.text_encoder.model):
        monkeypatch.setattr(model, "to", lambda place, model=model: moved.append((model, place)))

    def fail(module, args):
        left.append(weakref.ref(args[0][0]))
        raise MemoryError("full")

    for model in (pipeline.model, pipeline.text_encoder.model.encoder.block[0]):
        hook = model.register_forward_pre_hook(fail)
        gc.disable()
        try:
            assert tried(True, functools.partial(generate, pipeline)) == (None, "MemoryError: full")
            assert left.pop()() is None
        finally:
            gc.enable()
        hook.remove()
    here, text, dit = pipeline.device, pipeline.text_encoder.model, pipeline.model
    expected = [(text, here), (text, "cpu"), (dit, here), (dit, "cpu"), (text, here), (text, "cpu")]
    assert [(id(model), place) for model, place in moved] == [(id(model), place) for model, place in expected]


def test_attention_backends():
    before, _ = _AttentionBackendRegistry.get_active_backend()
    assert {"native", "_native_math"} <= set(attention_backends("cpu"))
    for name, reason in (
        ("flash_hub", "would be downloaded"),
        ("_native_cudnn", "does not run here"),
        ("nonsense", "those that run here are flex, native"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose_attention(name, "cpu")
        assert _AttentionBackendRegistry.get_active_backend()[0] == before
    try:
        choose_attention("_native_math", "cpu")
        assert _AttentionBackendRegistry.get_active_backend()[0] == "_native_math"
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
