"""Which table a run takes, and what is said of one that was measured on something else."""

import json
import re

import pytest
from commands import TINY


@pytest.mark.parametrize(
    ("task", "folder", "size", "name", "said"),
    [
        ("t2v-1.3B", "./renamed", "832*480", "t2v-1.3B", None),
        ("i2v-14B", "x/Wan2.1-I2V-14B-480P/", "1280*720", "i2v-14B-480P", None),
        ("t2i-14B", "./Wan2.1-T2V-14B", "1280*720", "t2v-14B", "t2i-14B uses the table of t2v-14B"),
        ("i2v-14B", "./renamed", "480*832", "i2v-14B-480P", "chosen by the size"),
        ("i2v-14B", "./480P-and-720P", "1280*720", "i2v-14B-720P", "fits several tables"),
    ],
)
def test_the_table_of_a_model(task, folder, size, name, said, plan):
    text = "\n".join(plan("--task", task, "--ckpt_dir", folder, "--size", size))
    assert f"table {name}" in text
    assert said in text if said else not re.search("note: .* (uses|fits|chosen)", text)


@pytest.mark.parametrize(("task", "size"), [("flf2v-14B", "1280*720"), ("i2v-14B", "1024*1024")])
def test_a_model_without_a_table(task, size, command):
    assert "no ratio table fits task" in command("--task", task, "--size", size, "--magcache_plan")


@pytest.mark.parametrize(
    ("measured_on", "said"),
    [
        ({}, None),
        ({"task": "t2v-tiny", "size": "64*64", "sample_shift": 5.0}, None),
        ({"task": "i2v-14B"}, "measured on task i2v-14B, not t2v-tiny"),
        ({"fingerprint": "xyz"}, "measured on a model whose config.json has the fingerprint xyz, not "),
        ({"size": "832*480", "sample_shift": 3.0}, "measured with --size 832*480, --sample_shift 3.0"),
    ],
)
def test_a_table_of_something_else_is_said(measured_on, said, plan, tmp_path):
    table = tmp_path / "mine.json"
    table.write_text(json.dumps({"mag_ratio": [0.9] * 98, "measured_on": measured_on}))
    notes = [line for line in plan(*TINY, "--mag_ratios", table) if "note: " in line]
    assert len(notes) == bool(said)
    assert not said or f"note: ratio table {table} was {said}" in notes[0]
