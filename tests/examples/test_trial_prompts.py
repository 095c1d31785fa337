"""What the demo models' trials were measured on is none of what they are checked on."""

import json
from pathlib import Path

import pytest

from examples.benchmark_quality import unseen_pairs
from examples.trial_prompts import trial_pairs
from magcache.ratios import TABLES

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [48, 96])
def test_trial_prompts_are_no_unseen_pairs(count):
    pairs = trial_pairs(count)
    captions = {str(caption) for caption, _ in pairs}
    assert len(captions) == len(pairs) == count
    assert [seed for _, seed in pairs] == list(range(77, 77 + count))
    for unseen in (24, 96):
        assert captions.isdisjoint(str(caption) for caption, _ in unseen_pairs(unseen))
    first = (REPO / "examples" / "train_tiny" / "calibration_prompts.txt").read_text().splitlines()
    assert [str(caption) for caption, _ in pairs[:8]] == first


@pytest.mark.parametrize("task", ["t2v-tiny", "i2v-tiny"])
def test_shipped_trials_are_of_them(task):
    trials = json.loads((TABLES / f"{task}.json").read_text())["trials"]
    assert [(prompt, seed) for prompt, seed in zip(trials["prompts"], trials["seeds"], strict=True)] == [
        (str(caption), seed) for caption, seed in trial_pairs(len(trials["prompts"]))
    ]
