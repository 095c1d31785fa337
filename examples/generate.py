"""Makes a video with the cache in ten lines of Python: `python -m examples.generate` writes circle.mp4."""

import imageio.v3 as iio

import magcache
import wan
from wan.configs import WAN_CONFIGS

pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], "examples/Wan2.1-T2V-tiny")
schedule = magcache.plan_speedup(steps=50, speedup=2.5, shift=5.0)
magcache.apply_magcache(pipeline.model, schedule)
video = pipeline.generate("a red circle moves left on a blue background", size=(64, 64), frame_num=17, seed=0)
frames = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0)  # [-1, 1] to 0 ... 255, channels last
iio.imwrite("circle.mp4", frames.numpy(), fps=16)
