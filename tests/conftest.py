"""Settings of all tests."""

import sys

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # on a busy machine, and where an import comes first
settings.load_profile("no deadline")


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*flags) runs the script in this process and returns what it said, or the line by which it refused."""
    import magcache_generate  # here, so that tests of magcache alone can be collected without it

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["magcache_generate.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # of which only the first process keeps its own
        try:
            magcache_generate.main()
        except SystemExit as stop:
            assert stop.code == 2
            err = capsys.readouterr().err
            assert err.count("\n") <= 1
            return err
        return capsys.readouterr().out

    return run


@pytest.fixture
def plan(command):
    """The lines of a plan by the flags."""
    return lambda *flags: command(*flags, "--magcache_plan").splitlines()
