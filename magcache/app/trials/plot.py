"""The panel of a calibration's picture that shows its trials."""

from magcache.trials import ANOTHER, Measured


def draw_trials(axes, measured: Measured) -> None:
    """Latent PSNR over the speed-up: every prompt, their mean and what is promised; fewer steps and thresh, which not
    all prompts have tried."""
    at = measured.speedups
    for number, prompt in enumerate(measured.prompts):
        psnrs = [row.psnr[prompt] for row in measured.forecasts]
        label = "forecasts, every prompt" if number == 0 else None
        axes.plot(at, psnrs, color="tab:red", alpha=0.2, linewidth=0.8, label=label)
    expected = [measured.expect(speedup) for speedup in at]
    axes.plot(at, [e.pooled for e in expected], color="tab:red", marker="o", label="of all videos' mean squared error")
    axes.axhline(ANOTHER, color="gray", linewidth=0.8, label="below: another video")
    axes.plot(at, [e.promised for e in expected], color="tab:red", linestyle="--", label="promised to nine of ten")
    for method, color in (("fewer steps", "black"), ("thresh", "tab:blue")):
        points = [(measured.speedup_of(row), row.pooled) for row in measured.others if row.method == method]
        if points:
            line, label = "-" if method == "fewer steps" else "", f"{method}, of the prompts that tried it"
            axes.plot(*zip(*points, strict=True), color=color, marker="s", linestyle=line, markersize=4, label=label)
    constants = measured.constants
    axes.set_xlabel(f"speed-up bound (floor {constants.floor:g}, early {constants.early:g}, decay {constants.decay:g})")
    axes.set_ylabel("latent PSNR, dB")
    axes.legend(fontsize=8)
