"""The examples in the library's docstrings."""

import doctest
import importlib

import pytest
import torch

import magcache


@pytest.mark.parametrize("name", ["noise_levels", "patch", "ratios", "speedup", "threshold"])
def test_examples(name):
    module = importlib.import_module(f"magcache.{name}")
    result = doctest.testmod(module, extraglobs={"magcache": magcache, "torch": torch})
    assert result.attempted
    assert not result.failed
