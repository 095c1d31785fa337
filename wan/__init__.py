"""Wan2.1 inference with upstream's public names. Torch is imported with the first pipeline that is asked for."""

import importlib

_PIPELINES = {"WanT2V": "text2video", "WanI2V": "image2video", "WanFLF2V": "image2video", "WanVace": "vace"}  # modules
_PACKAGES = ("configs", "modules", "utils")

__all__ = [*_PIPELINES, *_PACKAGES]


def __getattr__(name):
    if name in _PIPELINES:
        return getattr(importlib.import_module(f"wan.{_PIPELINES[name]}"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"wan.{name}")
    raise AttributeError(f"module 'wan' has no attribute {name!r}")
