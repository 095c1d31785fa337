"""Wan2.1 inference with upstream's public names. Torch is imported with the first pipeline that is asked for."""

import importlib

_PIPELINES = {"WanT2V": "wan.text2video"}

__all__ = list(_PIPELINES)


def __getattr__(name):
    if name in _PIPELINES:
        return getattr(importlib.import_module(_PIPELINES[name]), name)
    raise AttributeError(f"module 'wan' has no attribute {name!r}")
