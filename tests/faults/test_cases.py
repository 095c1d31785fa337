"""Every case through the command line, in one warm process: one line, the exit code, and no tensor read."""

import os
import re
import signal
import sys

import pytest
import torch
from commands import SCRIPT, python

import magcache_generate
from faults import cases_files, cases_flags
from faults.case import prepared

CASES = [*cases_files.CASES, *cases_flags.CASES]
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


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_case(case, tmp_path, monkeypatch, capsys, impatient):
    monkeypatch.chdir(tmp_path)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["magcache_generate.py", *prepared(case.args, tmp_path)])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # of which only the first process keeps its own
    load = torch.load

    def without_data(*args, **how):
        assert how["map_location"] == "meta", "weights are read"
        return load(*args, **how)

    monkeypatch.setattr(torch, "load", without_data)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        magcache_generate.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2, err
    assert re.search(case.line, err), err
    assert err.count("\n") == 1
    assert "weights_only" not in err
    assert len(err) < 700 or case.name.startswith(("steps of 5000", "path"))
    assert set(tmp_path.rglob("*")) == before, "something was written"


QUICK = ["world no number", "rank no number", "prompt file a pipe", "frames far", "table nested"]
LATER = ["no attention backend", "result a pipe", "VAE malicious old"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)])
def test_in_a_process_of_its_own(name, tmp_path):
    """Where nothing is imported yet, and warnings are printed."""
    (case,) = (case for case in CASES if case.name == name)
    result = python(SCRIPT, *prepared(case.args, tmp_path), code=2, cwd=tmp_path, env=os.environ | case.env)
    assert re.search(case.line, result.stderr)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "executed").exists()
