"""Draws a ratio table and the skip map that the settings make of it.

python -m examples.plot_schedule [--table t2v-tiny] [--thresh 0.12] [--K 4] [--out examples/schedule.png]
"""

import argparse

import matplotlib.pyplot as plt

import magcache
from magcache.ratios import split_branches


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="t2v-tiny", help="name of a table or path of a calibration")
    parser.add_argument("--thresh", type=float, default=0.12)
    parser.add_argument("--K", type=int, default=4)
    parser.add_argument("--retention_ratio", type=float, default=0.2)
    parser.add_argument("--out", default="examples/schedule.png")
    args = parser.parse_args()

    ratios = magcache.load_ratios(args.table)
    steps = len(ratios) // 2
    schedule = magcache.plan(ratios, steps, args.thresh, args.K, args.retention_ratio)
    figure, (curve, skips) = plt.subplots(2, 1, figsize=(9, 4), sharex=True, height_ratios=(3, 1), layout="constrained")
    for label, values in zip(("cond", "uncond"), split_branches(ratios), strict=True):
        curve.plot(range(1, steps), values[1:], marker=".", label=label)
    curve.axhline(1, color="gray", linewidth=0.5)
    curve.set_ylabel("magnitude ratio")
    curve.legend()
    curve.set_title(
        f"{args.table}, thresh {args.thresh}, K {args.K}: {schedule.computed} of {2 * steps} calls computed, "
        f"at most {schedule.speedup_bound:.2f}x"
    )
    skips.imshow([schedule.reuse[0::2], schedule.reuse[1::2]], aspect="auto", cmap="Blues", vmin=-0.3, vmax=1.3)
    skips.set_yticks([0, 1], ["cond", "uncond"])
    skips.set_xlabel("sampling step (dark: residual reused, light: blocks computed)")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
