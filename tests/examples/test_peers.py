"""The peers of the benchmark, on tiny random models of both tasks: what they compute, and that nothing stays behind."""

import types

import pytest
import sampling
import torch

import magcache
from examples.benchmarks import peers
from wan.modules.model import WanModel

PEERS = peers.all_peers()
BY_THRESHOLD = [name for name, peer in PEERS.items() if peer.bounds]


def make_pipeline(task="t2v-tiny"):
    torch.manual_seed(0)
    sizes = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8, "text_len": 6, "num_heads": 2, "num_layers": 2}
    if task == "i2v-tiny":
        sizes |= {"model_type": "i2v", "in_dim": 20, "clip_dim": 4}
    return types.SimpleNamespace(model=WanModel(**sizes).eval().requires_grad_(False), image=task == "i2v-tiny")


def denoise(pipeline):
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 2, 4, 4), (5, 8), (3, 8), (1, 3, 4), (4, 2, 4, 4))
    latent, text, no_text, clip_fea, y = (torch.randn(shape, generator=generator) for shape in shapes)
    given = {"seq_len": 8}
    if pipeline.image:
        given |= {"clip_fea": clip_fea, "y": [y]}
    return sampling.denoise(
        pipeline.model, latent, {"context": [text]} | given, {"context": [no_text]} | given, peers.STEPS
    )


@pytest.fixture(scope="module", params=tuple(peers.SETTINGS))
def task(request):
    return request.param


@pytest.fixture(scope="module")
def plain(task):
    return denoise(make_pipeline(task))


def test_diffusers_computes_the_same(task, plain):
    pipeline = make_pipeline(task)
    with peers.Peer("uncached", peers.in_diffusers).running(pipeline, {}) as work:
        torch.testing.assert_close(denoise(pipeline), plain, rtol=1e-3, atol=1e-4)
        assert work.computed == 100


@pytest.mark.parametrize("name", PEERS)
def test_every_run_starts_afresh_and_nothing_stays(name, task, plain):
    peer, pipeline = PEERS[name], make_pipeline(task)
    model = pipeline.model
    setting = peer.setting_for(task, 38) | ({"threshold": 1e6} if peer.bounds else {})
    with peer.running(pipeline, setting) as work:
        first, computed = denoise(pipeline), work.computed
        assert 2 <= computed < 100
        assert torch.equal(denoise(pipeline), first)
        assert work.computed == computed
    assert pipeline.model is model
    assert torch.equal(denoise(pipeline), plain)


@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_the_threshold_decides(name, task, plain, monkeypatch):
    # a random model's modulation changes by more than the polynomials were fitted to
    monkeypatch.setattr(peers, "TEACACHE_POLYNOMIALS", {task: (1.0, 0.0)})
    peer, pipeline = PEERS[name], make_pipeline(task)
    setting = peer.setting_for(task, 38)
    with peer.running(pipeline, setting | {"threshold": 0.0}) as work:
        uncached = denoise(pipeline)
        torch.testing.assert_close(uncached, plain, rtol=1e-3, atol=1e-4)
        assert work.computed == 100
    with peer.running(pipeline, setting | {"threshold": 0.99}) as work:
        assert not torch.equal(denoise(pipeline), uncached)
        assert work.computed < 70


@pytest.mark.parametrize("name", PEERS)
def test_settings(name, task):
    """One for every budget, of a variant that the tuning looks at."""
    for budget in peers.BUDGETS:
        setting = dict(PEERS[name].setting_for(task, budget))
        assert ("threshold" in setting) == (PEERS[name].bounds is not None)
        setting.pop("threshold", None)
        assert setting in PEERS[name].variants(budget)


def test_part_of_the_blocks_is_a_part_of_a_call():
    """The first of 2 blocks runs in all 100 calls, the second in the first of either branch."""
    pipeline = make_pipeline()
    with PEERS["diffusers FirstBlockCache"].running(pipeline, {"threshold": 1e9}) as work:
        denoise(pipeline)
        assert work.computed == 2 + 98 / 2


@pytest.mark.parametrize("budget", peers.BUDGETS)
def test_taylorseer_variants_meet_the_budget(budget):
    peer, pipeline = PEERS["diffusers TaylorSeer"], make_pipeline()
    variants = peer.variants(budget)
    assert len(variants) >= 8
    for setting in variants:
        if setting["order"] == 1 and (budget == 20 or setting["lite"]):
            with peer.running(pipeline, setting) as work:
                denoise(pipeline)
                assert work.computed == budget


def test_magcache_follows_the_ratios_of_the_task(task):
    pipeline = make_pipeline(task)
    schedules = {name: magcache.plan(magcache.load_ratios(name), 50, 0.04, 4, 0.2) for name in peers.SETTINGS}
    computed = {name: 2 * schedule.reuse[::2].count(False) for name, schedule in schedules.items()}
    assert len(set(computed.values())) == 2
    setting = {"threshold": 0.04, "K": 4, "retention_ratio": 0.2}
    with PEERS["diffusers MagCache"].running(pipeline, setting) as work:
        denoise(pipeline)
        assert work.computed == computed[task]


def test_teacache_takes_the_polynomial_of_the_task(task, monkeypatch):
    """One that predicts a change of 1 in every step, where that of the other task predicts none."""
    monkeypatch.setattr(peers, "TEACACHE_POLYNOMIALS", dict.fromkeys(peers.SETTINGS, (0.0,)) | {task: (1.0,)})
    pipeline = make_pipeline(task)
    with PEERS["TeaCache rule"].running(pipeline, {"threshold": 0.5, "warmup": 5}) as work:
        denoise(pipeline)
        assert work.computed == 100


@pytest.mark.skipif("diffusers SeaCache" not in PEERS, reason="since diffusers 0.42")
def test_seacache_looks_at_the_latent_alone(task):
    """Not at the channels of the image behind it, which do not change."""
    model = peers.DiffusersModel(make_pipeline(task).model).transformer
    x = torch.randn(1, model.config.in_channels, 2, 4, 4)
    (seen,) = peers.sea_config(0.3, most=4, last=1).raw_vision_callback(model, (x,), {})
    assert torch.equal(seen, x[0, :16])


class Recorder:
    """Stands in for the blocks of a model: the residual is 1, 2, 3, ... by the calls computed."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        self.count += 1
        return iter([lambda x, e: x + self.count])


def test_teacache_rule():
    """The modulation changes by 1 / step; the polynomial doubles that."""
    cache = peers.TeaCache(threshold=1.0, warmup=2, polynomial=(2.0, 0.0), steps=9)
    blocks, x = Recorder(), torch.zeros(1)
    residuals = [cache.step(2 * step, blocks, x, e=torch.tensor([step + 1.0])).item() for step in range(9)]
    # steps 2 to 8 add 1, 2/3, 1/2, 2/5, 1/3, 2/7, 1/4; the last one computes in any case
    assert residuals == [1, 2, 3, 3, 4, 4, 4, 5, 6]


def test_easycache_rule():
    """A model v = c x has the rate c, so the predicted change of v is |x - x'| / |x of the last computed step|."""

    class Twice(torch.nn.Module):
        def forward(self, x, t):
            return [2 * x[0]]

    cache = peers.EasyCache(Twice(), threshold=0.35, warmup=2, steps=7)
    latents = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    outputs = []
    for step, value in enumerate(latents):
        for _ in ("cond", "uncond"):
            outputs.append(cache([torch.tensor([value])], t=torch.tensor([100.0 - step]))[0].item())
    # errors after the step of 9: 1/9, 2/9, 3/9, then 4/9 computes; the last step computes
    expected = [20, 18, 8 + 9, 7 + 9, 6 + 9, 10, 8]
    assert outputs == [value for value in expected for _ in range(2)]
