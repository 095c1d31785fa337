"""Properties of the plan, stated without the loop that makes it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import magcache
from magcache.ratios import split_branches

ratio = st.floats(0.5, 1.5)
tables = st.lists(st.tuples(ratio, ratio), min_size=1, max_size=60).map(lambda pairs: [r for p in pairs for r in p])
settings = {
    "thresh": st.floats(0, 1),
    "K": st.integers(0, 8),
    "retention_ratio": st.floats(0, 1),
}


def stretch_error(ratios):
    """Sum over the stretch of |1 - product of its ratios so far|."""
    return sum(abs(1 - math.prod(ratios[: i + 1])) for i in range(len(ratios)))


@given(table=tables, steps=st.integers(1, 80), **settings)
def test_every_stretch_is_as_long_as_allowed(table, steps, thresh, K, retention_ratio):
    schedule = magcache.plan(table, steps, thresh, K, retention_ratio)
    retained = max(1, math.ceil(int(2 * steps * retention_ratio) / 2))
    branches = split_branches(table)
    for branch in (0, 1):
        reuse = schedule.reuse[branch::2]
        assert len(reuse) == steps
        assert not any(reuse[:retained])
        if len(branches[branch]) != steps:
            continue
        start = retained  # a stretch begins where free steps begin, or after a computed step
        for step in range(retained, steps):
            error = stretch_error(branches[branch][start : step + 1])
            within = error < thresh and step - start < K
            assert reuse[step] == within or math.isclose(error, thresh, rel_tol=1e-9, abs_tol=1e-12)
            if not reuse[step]:
                start = step + 1


@given(table=tables, steps=st.integers(1, 80), **settings)
def test_counts(table, steps, thresh, K, retention_ratio):
    schedule = magcache.plan(table, steps, thresh, K, retention_ratio)
    assert schedule.steps == steps
    assert schedule.computed + sum(schedule.reuse) == 2 * steps
    assert schedule.speedup_bound == 2 * steps / schedule.computed
    assert magcache.plan(table, steps, 0, K, retention_ratio).computed == 2 * steps
    assert magcache.plan(table, steps, thresh, 0, retention_ratio).computed == 2 * steps
    assert magcache.plan(table, steps, thresh, K, 1).computed == 2 * steps


@given(table=tables, steps=st.integers(1, 80), **settings)
def test_without_guidance_the_cond_branch_decides(table, steps, thresh, K, retention_ratio):
    both = magcache.plan(table, steps, thresh, K, retention_ratio)
    one = magcache.plan(table, steps, thresh, K, retention_ratio, calls_per_step=1)
    assert one.reuse == both.reuse[::2]


def test_the_leading_pair_of_ones_is_optional():
    ratios = magcache.load_ratios("t2v-14B")
    assert magcache.plan(ratios[2:], 50, 0.24, 6) == magcache.plan(ratios, 50, 0.24, 6)


@pytest.mark.parametrize(
    "bad",
    [
        {"thresh": -0.1},
        {"thresh": float("nan")},
        {"thresh": float("inf")},
        {"K": -1},
        {"K": 1.5},
        {"retention_ratio": -0.1},
        {"retention_ratio": 1.1},
        {"retention_ratio": float("nan")},
        {"steps": 0},
        {"steps": 2.5},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        magcache.plan(**({"ratios": magcache.load_ratios("t2v-14B"), "steps": 50} | bad))


@pytest.mark.parametrize("table", [[], [1.0, 1.0, 0.9], [1.0, float("nan")], [1.0, 0.0], [1.0, -1.0]])
def test_bad_tables(table):
    with pytest.raises(ValueError, match="ratio"):
        magcache.plan(table, 10)


@pytest.mark.parametrize(
    ("weights", "target", "message"),
    [
        ((None, (1.0,)), "residual", "call 1 combines 1 residuals, but 0 are computed"),  # uncond has none of its own
        ((None, None, (2.0, -1.0), None), "output", "call 2 combines 2 outputs, but 1 are computed"),
        ((None, None, (), None), "output", "call 2 combines 0"),
        ((None, None, None), "residual", "whole steps"),
        ((), "residual", "whole steps"),
        ((None, None, (0.9,), (0.9,)), "residual", "call 2 must not combine"),
        ((None,) * 4 + ((2.0, -1.0),) * 2, "residual", "call 4 must not combine"),
        ((None,) * 6 + ((3.0, -3.0, 1.0),) * 2, "output", "call 6 must not combine"),
        ((None, None), "velocity", "target must be one of residual, output, got 'velocity'"),
    ],
)
def test_what_no_schedule_can_be(weights, target, message):
    with pytest.raises(ValueError, match=message):
        magcache.Schedule(weights, target=target)


def test_what_is_needed_later():
    plain = magcache.Schedule((None, None, None, (1.0,)))
    assert plain.history == 1
    assert plain.used_later == (False, True, False, False)
    linear = magcache.Schedule((None, None, None, (2.0, -1.0), None, (1.0,)), 1, "output")
    assert linear.history == 2
    assert linear.used_later == (False, True, True, False, True, False)


def test_a_measured_pair_of_ones_is_not_taken_for_padding(tmp_path):
    magcache.save_table(tmp_path / "t.json", {"calibrated_steps": 3, "mag_ratio": [1.0, 1.0, 0.9, 0.8]})
    assert magcache.load_ratios(tmp_path / "t.json") == (1.0, 1.0, 1.0, 1.0, 0.9, 0.8)


def test_tables_are_saved_whole_and_never_replaced(tmp_path):
    path = tmp_path / "new" / "mine.json"
    magcache.save_table(path, {"mag_ratio": [0.99, 0.98]})
    assert magcache.load_ratios(path) == (1.0, 1.0, 0.99, 0.98)
    assert [p.name for p in path.parent.iterdir()] == ["mine.json"]
    with pytest.raises(FileExistsError, match=r"mine\.json"):
        magcache.save_table(path, {"mag_ratio": [1.5, 1.5]})


NO_TABLES = ["", "{", "3", "[]", "[[1, 2]]", "[true, true]", "[0.9, 0.9, 0.9]", "[0.9, NaN]", "[0.9, 0]", "[0.9, -1]"]
NO_TABLES += ["[0.9, 1e9]", "[0.9, Infinity]", '{"mag_ratio": "x"}', '{"mag_ratio": [1, null]}', "[" * 100_000]
NO_TABLES += ['{"mag_ratio": [0.9, 0.9], "calibrated_steps": 9}', '{"mag_ratio": [1, 1], "measured_on": "me"}']
NO_TABLES += [f"[1{400 * '0'}, 1]"]


@pytest.mark.parametrize("content", NO_TABLES, ids=lambda content: content[:40])
def test_files_that_are_no_tables(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json") as error:
        magcache.load_ratios(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="ratio table"):
        magcache.load_ratios(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        magcache.load_ratios(tmp_path / "nowhere.json")


def test_flat_lists_of_the_released_script(tmp_path):
    """With or without the two leading ones."""
    for name, values in (("without", [0.9, 0.8, 0.95, 0.85]), ("with", [1.0, 1.0, 0.9, 0.8, 0.95, 0.85])):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        table = magcache.load_table(tmp_path / f"{name}.json")
        assert table.ratios == (1.0, 1.0, 0.9, 0.8, 0.95, 0.85)
        assert table.steps == 3


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@given(steps=st.integers(1, 100), shift=st.floats(0.5, 20))
def test_noise_levels_are_those_of_the_sampler(solver, steps, shift):
    expected = pytest.importorskip("wan.utils.samplers").sampling_sigmas(solver, steps, shift)
    assert magcache.noise_levels(steps, shift, solver) == pytest.approx(expected.tolist(), rel=1e-12)
