"""Which table a run takes, and what is said of one that was measured on something else."""

import pytest

import magcache
from magcache.app.choose_schedule import compare_settings, fitting_table
from magcache.app.tasks import TASKS


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
def test_the_table_of_a_model(task, folder, size, name, said):
    chosen, notice = fitting_table(TASKS[task], folder, size)
    assert chosen == name
    assert said in notice if said else notice is None


def test_a_model_without_a_table():
    for task, size in (("flf2v-14B", "1280*720"), ("i2v-14B", "64*64")):
        with pytest.raises(magcache.UnknownTableError, match="no ratio table fits task"):
            fitting_table(TASKS[task], "./renamed", size)


def table_of(named=False, **measured_on):
    return magcache.RatioTable("mine", (1.0, 1.0, 0.9, 0.9), measured_on, named)


def test_a_table_of_another_model_is_said():
    run = {"task": "t2v-14B", "fingerprint": "abc", "size": "832*480", "sample_shift": 5.0}
    assert compare_settings(table_of(**run), run) == []
    assert compare_settings(table_of(), run) == []
    for other in ({"task": "t2v-1.3B"}, {"fingerprint": "xyz"}):
        (notice,) = compare_settings(table_of(**other), run)
        assert "mine was measured on" in notice
    (notice,) = compare_settings(table_of(**run | {"size": "64*64", "sample_shift": 3.0}), run)
    assert notice == "ratio table mine was measured with --size 64*64, --sample_shift 3.0"
