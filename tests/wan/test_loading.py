"""Memory of the machine while a checkpoint of 2 GB is loaded, as the operating system counts it."""

import json
import subprocess
import sys

import pytest
import torch
from golden_data import write_checkpoint
from safetensors.torch import save_file

from wan.modules.model import WanModel

LOAD = """
import resource, sys, torch, wan
from magcache.app.lora import Lora, merging
from wan.configs import WAN_CONFIGS
with merging([Lora(path) for path in sys.argv[3:]]):
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-14B"], sys.argv[1], dit_dtype=getattr(torch, sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_loading_takes_at_most_the_file_and_two_gigabytes(tmp_path):
    folder = write_checkpoint("t2v", tmp_path / "model")
    (weights,) = folder.glob("*.safetensors")
    sizes = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 10, "text_dim": 4096, "freq_dim": 256}
    with torch.device("meta"):
        model = WanModel(**sizes)
    save_file({name: torch.full(p.shape, 0.01) for name, p in model.named_parameters()}, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))
    halves = {f"blocks.{i}.ffn.{j}.lora_{half}.weight" for i in range(10) for j in (0, 2) for half in "AB"}
    wide = {"0.lora_A": (4, 1536), "0.lora_B": (8960, 4), "2.lora_A": (4, 8960), "2.lora_B": (1536, 4)}
    save_file({name: torch.ones(wide[name[-15:-7]]) for name in halves}, tmp_path / "lora.safetensors")
    size, peaks = weights.stat().st_size, {}
    assert 1.9e9 < size < 2.2e9
    for dtype, *lora in (("float32",), ("bfloat16",), ("bfloat16", str(tmp_path / "lora.safetensors"))):
        command = [sys.executable, "-c", LOAD, str(folder), dtype, *lora]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        peaks[(dtype, *lora)] = peak = int(result.stdout.splitlines()[-1])
        print(f"{dtype}, {len(lora)} LoRA: {peak / 1e9:.2f} GB for a file of {size / 1e9:.2f} GB")
    weights.unlink()
    assert max(peaks.values()) < size + 2e9
