"""The files of a calibration."""

import json

import magcache
from magcache.app.results import write_beside


def test_files_of_a_calibration(tmp_path):
    lists = {"mag_ratio": [0.9, 0.8, 0.95, 0.85], "mag_std": [0.1] * 4, "cos_dis": [0.01] * 4}
    table, path = magcache.make_table("mine", [lists], {"task": "t2v-1.3B"}), tmp_path / "mine.json"
    magcache.save_table(path, table)
    write_beside(path, table)
    for key, values in lists.items():
        assert json.loads((tmp_path / f"wan2_1_{key}.json").read_text()) == values
    assert magcache.load_ratios(path) == (1.0, 1.0, *lists["mag_ratio"])
    assert magcache.load_table(path).steps == 3
    assert (tmp_path / "mine.png").stat().st_size > 1000
