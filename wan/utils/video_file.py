"""Videos as files: how long and how large they are, and their frames as they are in the file."""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import imageio_ffmpeg
import numpy as np

TICKS = 360_000  # a second, for whole numbers of them between the frames of any usual rate
TRANSPARENT = "parts of it are transparent (alpha channel); flatten it first"
HDR = r"^\[info] +Stream #.*: Video: .*/(?:arib-std-b67|smpte2084)\b"  # the transfer of HLG, and that of PQ
TO_SDR = "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709,format=yuv420p"


@dataclass(frozen=True)
class VideoInfo:
    """edges: the seconds at which each frame begins, and the last one ends. height, width: in square pixels."""

    edges: tuple[float, ...]
    height: int
    width: int

    @property
    def frames(self) -> int:
        return len(self.edges) - 1


def decoder(path: str, *options: str) -> list[str]:
    """Returns a command that writes the frames as they are in the file, filling no gaps of a variable rate."""
    frames = ["-i", f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough"]
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-nostats", "-v", "level+info", *frames, *options, "-"]


def probe_video(path: str) -> VideoInfo:
    """Decodes a whole video. Raises ValueError if it is missing, damaged, incomplete, transparent, HDR or no video."""
    if not os.path.isfile(path):  # a pipe might never end
        reason = "it is not a regular file" if os.path.exists(path) else "no such file"
        raise ValueError(f"cannot read {path}: {reason}")
    command = decoder(path, "-xerror", "-enc_time_base", f"1/{TICKS}", "-f", "framecrc")
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        faults = re.findall(r"^(?:\[[^]]*] )?\[(?:error|fatal)] (.*)", result.stderr, re.MULTILINE)
        raise ValueError(f"cannot read {path}: not a complete video ({[*faults, 'ffmpeg failed'][0]})")
    if re.search(r"^\[info] +alpha_mode +: 1$", result.stderr, re.MULTILINE):  # which the decoder leaves out
        raise ValueError(f"cannot use {path}: {TRANSPARENT}")
    if re.search(HDR, result.stderr, re.MULTILINE):
        raise ValueError(f"cannot use {path}: it is HDR; convert it first: ffmpeg -i {path} -vf {TO_SDR} sdr.mp4")
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    if not lines:
        raise ValueError(f"cannot read {path}: no frame can be decoded")
    starts, durations = np.array([[int(cell) for cell in line.split(",")[2:4]] for line in lines]).T
    if (np.diff(starts) <= 0).any():  # no times in the file
        starts, durations = np.arange(len(starts)), np.ones_like(starts)
    edges = (np.append(starts, starts[-1] + max(1, durations[-1])) - starts[0]) / TICKS
    width, height = (int(side) for side in re.search(r"^#dimensions 0: (\d+)x(\d+)$", result.stdout, re.M).groups())
    shape = re.search(r"^#sar 0: ([1-9]\d*)/([1-9]\d*)$", result.stdout, re.M)  # of a pixel
    aspect = int(shape[1]) / int(shape[2]) if shape else 1
    height, width = (max(1, round(side)) for side in (height / max(1, aspect), width * min(1, aspect)))
    return VideoInfo(tuple(edges.tolist()), height, width)


def read_frames(path: str, info: VideoInfo, frame_ids: set[int]) -> Iterator[np.ndarray]:
    """Yields the chosen frames, in order, as uint8 [height, width, 3]. Raises ValueError for a transparent one."""
    options = ["-vf", f"scale={info.width}:{info.height}", "-pix_fmt", "rgba", "-f", "rawvideo"]
    with subprocess.Popen(decoder(path, *options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            for frame_id in range(max(frame_ids) + 1):
                pixels = np.frombuffer(process.stdout.read(4 * info.height * info.width), np.uint8)
                if frame_id not in frame_ids:
                    continue
                frame = pixels.reshape(info.height, info.width, 4)
                if frame[..., 3].min() < 255:
                    raise ValueError(f"cannot use {path}: {TRANSPARENT}")
                yield np.ascontiguousarray(frame[..., :3])
        finally:
            process.kill()
