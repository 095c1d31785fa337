"""Where things are, and how the script is run."""

import subprocess
import sys
from pathlib import Path

from magcache.app.checks import make_job
from magcache.app.flags import make_parser

REPO = Path(__file__).parents[1]
SCRIPT, EXAMPLES = REPO / "magcache_generate.py", REPO / "examples"
DEMO, DEMO_I2V = EXAMPLES / "Wan2.1-T2V-tiny", EXAMPLES / "Wan2.1-I2V-tiny"
TINY = ("--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO)


def python(*arguments, code=0, cwd=REPO, **how) -> subprocess.CompletedProcess:
    """Runs a process of its own, which starts cold. code: the expected exit code."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, **how)
    assert result.returncode == code, result.stderr[-4000:]
    return result


def torchrun(processes: int) -> list[str]:
    """The arguments of Python in front of a script that runs in so many processes."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def job_of(*flags):
    return make_job(make_parser(SCRIPT).parse_args(list(map(str, flags))))
