"""Two processes share a transformer's tokens by diffusers' context parallelism; each writes what it saw.

PYTHONPATH=.:tests python tests/magcache/context_parallel.py FOLDER
"""

import sys
from pathlib import Path

import diffusers
import torch
from test_diffusers import ATTACHMENTS, denoise, make_model, make_schedule

import magcache


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers numbers them, and the CPU is none
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model, seen = make_model(), {}
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    seen["uncached"] = denoise(model)
    told = []
    magcache.apply_magcache(model, make_schedule("output"), on_call=lambda *call: told.append(call))
    seen["forecasts"] = denoise(model), tuple(reused for _, reused in told)
    for name, attach in ATTACHMENTS.items():
        attach(model)
        try:
            denoise(model)
        except RuntimeError as error:
            seen[name] = str(error)
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # forked, as importing costs more than all they do
    torch.multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
