"""Faults while the script runs, in processes of their own."""

import re

import pytest

from faults import warm
from faults.case import prepared
from faults.cases_runs import CASES


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_run(case, tmp_path):
    process = warm.start(prepared(case.args, tmp_path), tmp_path, case.env, case.arrange)
    try:
        if case.disturb:
            case.disturb(process, tmp_path)
        process.join(120)
    finally:
        process.kill()
    err = (tmp_path / "err").read_text()
    assert process.exitcode == case.code, err
    assert re.search(case.line, err), err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.part.*")) or case.name.startswith("a file of another")
    if case.check:
        case.check(tmp_path)
