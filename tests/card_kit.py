"""Ten minutes on a card, in one command: are the results right there, and how do the models' real sizes run?

PYTHONPATH=.:tests python tests/card_kit.py [--minutes 10]

First come the pipelines of the golden data under autocast: how far the transformer's first output and the final latent
are from those of the reference implementation in float32. Then `examples.card` for t2v-1.3B at 832*480 and t2v-14B at
1280*720, the most telling parts first; no part is begun when time is up. The peak memory of a call is printed beside
what the plan expects. The exit code is 1 if a golden case is too far off.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from easydict import EasyDict
from golden_data import read_json, read_tensors, write_checkpoint

import wan
from examples import card
from magcache.app import cost
from wan.configs import WAN_CONFIGS

CLOSE = 0.03  # bound on the relative L2 error of what the transformer returns under bfloat16 autocast
GOLDEN = {"t2v_a": ("t2v", "WanT2V", ("size", "frame_num"))}
LARGE = [  # task, size, steps of the loops, parts
    ("t2v-1.3B", "832*480", 10, ("forward", "loop", "dtypes", "offload", "compile", "vae")),
    ("t2v-14B", "1280*720", 2, ("forward", "offload", "loop", "dtypes", "vae", "compile")),
]


def golden(name: str) -> dict[str, float]:
    """Returns the relative errors of a case of the golden pipelines."""
    kind, pipeline, keys = GOLDEN[name]
    case = next(case for case in read_json("pipelines/cases.json") if case["name"] == name)
    expected, found = read_tensors("pipelines/outputs.safetensors"), {}
    with tempfile.TemporaryDirectory() as folder:
        made = getattr(wan, pipeline)(EasyDict(WAN_CONFIGS[f"{kind}-14B"]), write_checkpoint(kind, Path(folder) / kind))
        made.model.register_forward_hook(lambda module, args, out: found.setdefault("pred_cond_step0", out[0]))
        # the noise of the reference is the CPU's
        made.noise = lambda shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
            made.device
        )
        decode = made.decode
        made.decode = lambda latent: decode(found.setdefault("final_latent", latent))
        sampling = ("shift", "sample_solver", "sampling_steps", "guide_scale", "n_prompt", "seed")
        made.generate(case["prompt"], **{key: case[key] for key in (*keys, *sampling)})
    return {key: card.error(value.cpu(), expected[f"{name}.{key}"]) for key, value in found.items()}


def said_of(row: dict, subject: "card.Subject") -> str:
    """Compares the measured bytes of a part with those that the plan expects."""
    weights = cost.weight_bytes(subject.shape, str(card.HELD).removeprefix("torch."))
    planned = weights + cost.call_bytes(subject.shape, subject.tokens, autocast=True)
    return f"{row['what']}: {cost.number_of_bytes(row['peak_bytes'])}, by the plan {cost.number_of_bytes(planned)}"


def main(minutes: float = 10, large: list = LARGE, *small: str) -> int:
    """Runs everything. small: more flags of `examples.card`, which make it small."""
    end, failed = time.monotonic() + 60 * minutes, False
    for name in GOLDEN:
        errors = golden(name)
        failed |= errors["pred_cond_step0"] > CLOSE
        print(name, ", ".join(f"{key} {value:.2g}" for key, value in errors.items()), flush=True)
    for task, size, steps, parts in large:
        for part in parts:
            if time.monotonic() > end:
                print(f"no time for {part} of {task}")
                continue
            flags = ["--task", task, "--size", size, "--steps", str(steps), "--rounds", "1", *small]
            report = card.main([*flags, "--only", part])
            if part == "forward" and "peak_bytes" in report["rows"][0]:
                subject = card.Subject(task, size, report["frame_num"], report["layers"])
                print(said_of(report["rows"][0], subject), flush=True)
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    sys.exit(main(parser.parse_args().minutes))
