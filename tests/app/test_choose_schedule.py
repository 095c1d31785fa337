"""What is said of a table that was measured on something else."""

import magcache
from magcache.app.choose_schedule import compare_settings


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
