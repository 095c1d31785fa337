"""Runs command lines of magcache_generate.py one after the other, as they are, and counts the modules they call.

python run_and_count.py COUNTS.json COMMANDS.json      (a list of lists of flags; a count by class for each)
"""

import collections
import json
import runpy
import sys
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook

counts = []
register_module_forward_hook(
    lambda module, *_: counts[-1].update([f"{type(module).__module__}.{type(module).__name__}"])
)
script = Path(__file__).parent.parent / "magcache_generate.py"
sys.path[0] = str(script.parent)  # as if it were run itself
for flags in json.loads(Path(sys.argv[2]).read_text()):
    counts.append(collections.Counter())
    print(f"$ {flags}", flush=True)
    saved, sys.argv = sys.argv, [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")
    sys.argv = saved
Path(sys.argv[1]).write_text(json.dumps(counts))
