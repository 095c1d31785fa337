"""Every case through the command line, in one warm process: one line, the exit code, and no tensor read."""

import re
import signal
import sys

import pytest

import magcache_generate
from faults.cases_files import CASES

PATIENCE = 60  # seconds, after which something waits for a pipe


@pytest.fixture
def impatient():
    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c.slow else []) for c in CASES],
                         ids=[case.name for case in CASES])  # fmt: skip
def test_case(case, tmp_path, monkeypatch, capsys, impatient):
    monkeypatch.chdir(tmp_path)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["magcache_generate.py", *case.prepare(tmp_path)])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # of which only the first process keeps its own
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        magcache_generate.main()
    err = capsys.readouterr().err
    assert stopped.value.code == case.code, err
    assert re.search(case.line, err), err
    assert err.count("\n") == 1
    assert "weights_only" not in err
    assert len(err) < 700 or case.name.startswith(("steps of 5000", "path"))
    assert set(tmp_path.rglob("*")) == before, "something was written"
