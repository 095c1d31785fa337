"""Draws ratio tables; needs matplotlib.

python -m calibration.draw_tables TABLE.json --out PICTURE.png      (all that a calibration measured)
python -m calibration.draw_tables NAME_OR_PATH NAME_OR_PATH ... --out PICTURE.png      (the ratios of several tables)
"""

import argparse
import json
import os
from pathlib import Path

from magcache.app.plot import draw_calibration, new_figure, save_figure
from magcache.ratios import RatioTable, load_table, split_branches


def draw_tables(tables: list[RatioTable], path: str | os.PathLike) -> None:
    """Draws the ratios of several tables over the share of their steps: cond solid, uncond dotted."""
    figure, (axes,) = new_figure(1, "magnitude ratios |r_t| / |r_(t-1)|")
    figure.set_size_inches(9, 5)
    for i, table in enumerate(tables):
        for values, style in zip(split_branches(table.ratios), ("-", ":"), strict=True):
            at = [step / table.steps for step in range(1, table.steps)]
            label = f"{table.name}, {table.steps} steps" if style == "-" else None
            axes.plot(at, values[1:], style, color=f"C{i}", label=label)
    axes.axhline(1, color="gray", linewidth=0.5)
    axes.set_xlabel("share of the sampling steps (cond solid, uncond dotted)")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="TABLE")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    try:
        tables = [load_table(name) for name in args.tables]
    except ValueError as fault:
        parser.error(str(fault))
    content = {} if len(tables) > 1 or tables[0].named else json.loads(Path(args.tables[0]).read_text())
    if isinstance(content, dict) and "cos_dis" in content:
        draw_calibration(content, args.out)
    else:
        draw_tables(tables, args.out)


if __name__ == "__main__":
    main()
