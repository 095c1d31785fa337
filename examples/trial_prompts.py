"""Writes what the demo models' trials were measured on: prompts with seeds, for i2v-tiny with first frames.

python -m examples.trial_prompts i2v-tiny FOLDER     (then calibrate with --prompt_file FOLDER/prompts.jsonl)

The first eight are those of train_tiny/calibration_prompts.txt; none is among the unseen pairs of the benchmarks.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from examples.benchmark_quality import unseen_pairs
from examples.train_tiny.check_prompts import DEMOS, first_frame
from examples.train_tiny.shapes import CAPTIONS, Caption
from magcache.app.media import to_uint8

UNSEEN = (24, 48, 96)  # pairs that are for validation; none of these draws holds another
SEED = 77  # of the first


def trial_pairs(count: int) -> list[tuple[Caption, int]]:
    captions = {str(caption): caption for caption in CAPTIONS}
    file = Path(__file__).parent / "train_tiny" / "calibration_prompts.txt"
    chosen = file.read_text(encoding="utf-8").splitlines()
    unseen = {str(caption) for pairs in UNSEEN for caption, _ in unseen_pairs(pairs)}
    rest = [caption for caption in captions if caption not in unseen and caption not in chosen]
    chosen += random.Random(SEED).sample(rest, count - len(chosen))
    return [(captions[caption], SEED + i) for i, caption in enumerate(chosen)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(DEMOS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=48)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for caption, seed in trial_pairs(args.count):
        line = {"prompt": str(caption), "seed": seed}
        if args.task == "i2v-tiny":
            image = args.folder / f"{seed}.png"
            Image.fromarray(to_uint8(first_frame(caption, seed).permute(1, 2, 0))).save(image)
            line["image"] = str(image)
        lines.append(json.dumps(line))
    (args.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
