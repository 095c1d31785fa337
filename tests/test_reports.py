"""The table of public reports names tests that are there."""

import re
from pathlib import Path

REPO = Path(__file__).parents[1]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^]]+)])?`")
REPORT = re.compile(r"none found|[\w.-]+/[\w.-]+#\d+(, [\w.-]+/[\w.-]+#\d+)*")


def test_every_report_has_its_test():
    lines = (REPO / "tests" / "reports" / "README.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if "::" in line]
    assert len(rows) > 50
    for _, reports, tests in rows:
        assert REPORT.fullmatch(reports), reports
        assert TEST.sub("", tests).strip(" ,") == "", tests
        for file, name, case in TEST.findall(tests):
            assert f"def {name}(" in (REPO / file).read_text(), (file, name)
            texts = [path.read_text() for path in (REPO / file).parent.glob("*.py")]
            assert any(f'"{case}"' in text or f"def {case}(" in text for text in texts) or not case, case
