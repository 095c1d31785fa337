from . import configs, distributed, modules
from .pipelines import WanFLF2V, WanI2V, WanT2V, WanVace

__all__ = ["WanFLF2V", "WanI2V", "WanT2V", "WanVace", "configs", "distributed", "modules"]
