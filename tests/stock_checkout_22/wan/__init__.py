from . import configs, distributed, modules
from .textimage2video import WanI2V, WanT2V, WanTI2V

__all__ = ["WanI2V", "WanT2V", "WanTI2V", "configs", "distributed", "modules"]
