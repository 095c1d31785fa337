"""The ten-line program runs as it stands."""

import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio

REPO = Path(__file__).parents[2]


def test_ten_lines_make_a_video(tmp_path):
    (tmp_path / "examples").symlink_to(REPO / "examples")
    program = [sys.executable, str(REPO / "examples" / "generate.py")]
    subprocess.run(program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}, check=True, timeout=300)
    frames = iio.imread(tmp_path / "circle.mp4")
    assert frames.shape == (17, 64, 64, 3)
    assert frames[0, 2, 2, 2] > 150 > frames[0, 2, 2, 0]  # blue
