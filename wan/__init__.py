"""Inference of Wan2.1 and Wan2.2 with upstream's public names. Importing it imports no torch, a pipeline does."""

import importlib

_PIPELINES = {"WanT2V": "text2video", "WanI2V": "image2video", "WanFLF2V": "image2video", "WanVace": "vace"}  # modules
_PIPELINES["WanTI2V"] = "textimage2video"
_PACKAGES = ("configs", "modules", "utils")

__all__ = [*_PIPELINES, *_PACKAGES]


def __getattr__(name):
    if name in _PIPELINES:
        return getattr(importlib.import_module(f"wan.{_PIPELINES[name]}"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"wan.{name}")
    raise AttributeError(f"module 'wan' has no attribute {name!r}")
