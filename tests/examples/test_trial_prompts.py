"""What the demo models' trials were measured on is none of what they are checked on."""

import json

import pytest

from examples.benchmarks import peers, promises, quality
from examples.benchmarks.pairs import KINDS_OF, pairs_of
from examples.trial_prompts import trial_pairs
from magcache.ratios import TABLES


@pytest.mark.parametrize("task", KINDS_OF)
def test_no_seed_serves_twice(task):
    trials = {seed for _, seed in trial_pairs(task, 96)}
    draws = [quality.UNSEEN, quality.DEVELOPMENT, promises.UNSEEN, peers.TUNING]
    seeds = [{seed for _, seed in pairs_of("told", 288, first)} for first in draws]
    assert len(set.union(*seeds)) == 288 * len(draws)
    assert trials.isdisjoint(set.union(*seeds))


def test_open_pairs_leave_something_open():
    pairs = pairs_of("open", 200, 1)
    assert all(None in vars(caption).values() for caption, _ in pairs)
    texts = [str(caption) for caption, _ in pairs]
    assert "" in texts
    assert any(text.startswith("something ") for text in texts)
    assert all(None not in vars(caption).values() for caption, _ in pairs_of("told", 200, 1))


@pytest.mark.parametrize("task", KINDS_OF)
def test_shipped_trials_are_of_them(task):
    trials = json.loads((TABLES / f"{task}.json").read_text())["trials"]
    assert [(prompt, seed) for prompt, seed in zip(trials["prompts"], trials["seeds"], strict=True)] == [
        (str(caption), seed) for caption, seed in trial_pairs(task, len(trials["prompts"]))
    ]
