"""Pictures of calibrations, plans and comparisons; needs matplotlib."""

import os
from collections.abc import Sequence

from magcache.app.job import Job
from magcache.app.step_map import BRANCHES, predict, reuse_by_branch
from magcache.files import written_whole
from magcache.noise_levels import log_snr
from magcache.ratios import RatioTable, resample_nearest, split_branches, table_of
from magcache.trials import ANOTHER, Measured, read_trials


def new_figure(rows: int, title: str | None, heights: Sequence[float] | None = None, sharex: bool = True):
    from matplotlib.figure import Figure  # without pyplot, so that no window system is looked for

    figure = Figure(figsize=(9, 1.5 + 2.2 * rows), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(rows, 1, sharex=sharex, squeeze=False, height_ratios=heights)[:, 0]


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a figure whole or not at all."""
    with written_whole(path) as part:
        figure.savefig(part, dpi=110, format="png")


def draw_calibration(table: dict, path: str | os.PathLike, published: RatioTable | None = None) -> None:
    """Draws ratio, its spread and the cosine distance over the steps of a calibration, as `make_table` makes it, and
    its trials, if there are some. published: a table to draw beside it, stretched to as many steps."""
    steps, measured_on = table["calibrated_steps"], table["measured_on"]
    at = range(1, steps)
    measured = read_trials(table_of(table))
    figure, (ratio, spread, distance, *more) = new_figure(4 if measured else 3, table["name"], sharex=False)
    for axes in (spread, distance):
        axes.sharex(ratio)
        axes.set_yscale("log")
    if measured:
        draw_trials(more[0], measured)
    for branch, label in enumerate(BRANCHES):
        color = f"C{branch}"
        values = table["mag_ratio"][branch::2]
        ratio.plot(at, values, marker=".", color=color, label=label)
        spread.plot(at, table["mag_std"][branch::2], marker=".", color=color, label=f"{label}, over tokens")
        if "mag_ratio_spread" in table:
            over_prompts = table["mag_ratio_spread"][branch::2]
            low, high = ([v + sign * s for v, s in zip(values, over_prompts, strict=True)] for sign in (-1, 1))
            ratio.fill_between(at, low, high, color=color, alpha=0.25, linewidth=0)
            spread.plot(at, over_prompts, linestyle=":", color=color, label=f"{label}, over prompts")
        distance.plot(at, table["cos_dis"][branch::2], marker=".", color=color, label=label)
        if published:
            theirs = split_branches(published.ratios)[branch][1:]
            stretched = [1 + i * (steps - 2) / max(1, len(theirs) - 1) for i in range(len(theirs))]
            whose = f"{label}, {published.name} ({published.steps} steps)"
            ratio.plot(stretched, theirs, linestyle="--", color=color, alpha=0.6, label=whose)
    ratio.axhline(1, color="gray", linewidth=0.5)
    ratio.set_ylabel("magnitude ratio")
    spread.set_ylabel("standard deviation")
    distance.set_ylabel("cosine distance")
    for axes in (ratio, spread):
        axes.legend(fontsize=8)
    keys = ("sample_solver", "sample_shift", "sample_guide_scale", "size")
    settings = ", ".join(f"{key.removeprefix('sample_')} {measured_on[key]}" for key in keys if key in measured_on)
    distance.set_xlabel(f"sampling step ({settings})")
    save_figure(figure, path)


def draw_trials(axes, measured: Measured) -> None:
    """Draws latent PSNR over the speed-up: that of every prompt, the pooled one and what is promised. Others than
    forecasts are left out, since not all prompts tried them: beside these they would show the wrong lead."""
    at = measured.speedups
    psnrs = [[row.psnr[prompt] for prompt in measured.prompts] for row in measured.forecasts]
    first, *_ = axes.plot(at, psnrs, color="tab:red", marker=".", alpha=0.2, linewidth=0.8)
    first.set_label("forecasts, every prompt")
    expected = [measured.expect(speedup) for speedup in at]
    axes.plot(at, [e.pooled for e in expected], color="tab:red", marker="o", label="forecasts, pooled")
    axes.axhline(ANOTHER, color="gray", linewidth=0.8, label="below: another video")
    promised = [e.promised for e in expected]
    axes.plot(at, promised, color="tab:red", marker="v", linestyle="--", label="reached by nine of ten")
    constants = measured.constants
    axes.set_xlabel(f"speed-up bound (floor {constants.floor:g}, early {constants.early:g}, decay {constants.decay:g})")
    axes.set_ylabel("latent PSNR, dB")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def plan_figure(job: Job, title: str):
    """Draws what decided on the steps of a run, and its skip map: the ratios of the job's table with the predicted
    error, or, if no table made the schedule, the noise levels (as log-SNR)."""
    schedule, steps, prediction = job.schedule, job.schedule.steps, predict(job.schedule, job.table)
    branches = reuse_by_branch(schedule)
    if prediction is None:
        figure, (levels, skips) = new_figure(2, title, (4, 1))
        snr = [log_snr(sigma) for sigma in job.sampling.noise_levels]
        computed = [step for step, reused in enumerate(branches["cond"]) if not reused]
        levels.plot(range(steps), snr, color="gray", linewidth=0.8)
        levels.plot(computed, [snr[step] for step in computed], "o", color="tab:blue", label="computed")
        levels.set_ylabel("log-SNR")
        levels.legend(fontsize=8)
    else:
        figure, (ratio, error, skips) = new_figure(3, title, (3, 3, 1))
        for label, values in zip(branches, split_branches(job.table.ratios), strict=False):
            ratio.plot(range(1, steps), resample_nearest(values, steps)[1:], marker=".", label=label)
            error.step(range(steps), prediction[label], where="mid", label=label)
        ratio.axhline(1, color="gray", linewidth=0.5)
        ratio.set_ylabel("magnitude ratio")
        error.axhline(job.cache.rule.thresh, color="gray", linestyle="--", linewidth=0.8, label="thresh")
        error.set_ylabel("predicted error")
        for axes in (ratio, error):
            axes.legend(fontsize=8)
    skips.imshow(list(branches.values()), aspect="auto", cmap="Blues_r", vmin=-0.3, vmax=1.3)
    skips.set_yticks(range(len(branches)), list(branches))
    skips.set_xlabel("sampling step (dark: computed, light: reused)")
    return figure


def score_figure(rows: dict[str, Sequence[float | None]]):
    """Draws the scores of every frame, one row of the figure per name, with gaps where a score is None."""
    figure, all_axes = new_figure(len(rows), None)
    for axes, (name, values) in zip(all_axes, rows.items(), strict=True):
        axes.plot([float("nan") if value is None else value for value in values], marker=".")
        axes.set_ylabel(name)
        axes.set_xlim(0, len(values) - 1)
        axes.ticklabel_format(useOffset=False)
    all_axes[-1].set_xlabel("frame")
    return figure
