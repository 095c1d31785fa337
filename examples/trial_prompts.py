"""Writes the prompts that the demo models' trials were measured on, with seeds and, for i2v-tiny, first frames.

python -m examples.trial_prompts i2v-tiny FOLDER     (then calibrate with --prompt_file FOLDER/prompts.jsonl)

For t2v-tiny every second prompt leaves a part of the caption open, as prompts of real models do.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from examples.benchmarks.pairs import KINDS_OF, Pair, pairs_of
from examples.train_tiny.check_prompts import first_frame
from magcache.app.media import to_uint8

SEED = 77  # of the first prompt


def trial_pairs(task: str, count: int) -> list[Pair]:
    """Returns that many pairs; all kinds of the task take turns. Captions without words are left out, since a prompt
    file cannot hold them."""
    kinds = [[pair for pair in pairs_of(kind, 2 * count, SEED) if str(pair[0])] for kind in KINDS_OF[task]]
    return [kinds[i % len(kinds)][i] for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(KINDS_OF))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=48)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for caption, seed in trial_pairs(args.task, args.count):
        line = {"prompt": str(caption), "seed": seed}
        if args.task == "i2v-tiny":
            image = args.folder / f"{seed}.png"
            Image.fromarray(to_uint8(first_frame(caption, seed).permute(1, 2, 0))).save(image)
            line["image"] = str(image)
        lines.append(json.dumps(line))
    (args.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
