"""The loop that calibrates: renders every prompt, measures its ratios, and tries it in other ways where that is
wanted. The table is written with every prompt, so that nothing that comes later can take it away."""

import sys
from contextlib import nullcontext

from magcache.app.job import Job, Request
from magcache.app.make_videos import told
from magcache.app.processes import Group
from magcache.app.progress import Watch
from magcache.app.render import Renderer
from magcache.app.results import CalibrationFile, save_video
from magcache.app.trials.run import TrialRuns
from magcache.calibrate import Calibration


def calibrate(
    job: Job, renderer: Renderer, group: Group, requests: list[Request], seconds: dict[str, float]
) -> list[Watch]:
    """Returns what was seen of each run. seconds: by phase, of what came before."""
    calibration, table = Calibration(job.schedule.steps, group.sharing), CalibrationFile(job)
    runs, watches = [], []
    trials = TrialRuns(job, renderer.pipeline, renderer.generate, group, len(requests)) if job.output.trials else None

    def write() -> None:
        """The table of those that were measured."""
        done = requests[: len(runs)]
        table.write(runs, done, trials and trials.entry(done))

    try:
        for number, request in told(job, group, requests):
            more = number < len(requests)
            with trials.recording(request) if trials else nullcontext():
                rendered = renderer.render(request, job.schedule, calibration, more or bool(trials))
            watches.append(rendered.watch)
            if group.rank == 0:
                save_video(job, request, rendered, group, renderer.fps, seconds)
            runs.append(calibration.lists())
            rendered.video = None
            if trials:
                trials.try_prompt(rendered.watch.latent, runs[-1]["mag_ratio"])
            rendered.watch.latent = None
            if group.speaks and more:
                write()
    except BaseException:
        if group.speaks:
            print(f"the calibration stopped{reached(renderer, trials, number, len(requests), runs)}", file=sys.stderr)
        raise
    finally:
        if runs and group.speaks:
            write()
            table.finish()
    return watches


def reached(renderer: Renderer, trials: TrialRuns | None, number: int, count: int, runs: list[dict]) -> str:
    """Says how far the number-th of so many prompts came, and what there is of all of them."""
    if trials and trials.recorded == len(runs) > 0:
        return f" in the trials of prompt {number} of {count}; what was measured until then is written"
    kept = "only the earlier prompts count" if runs else "nothing is written"
    return f"{renderer.reached(number, count)}; {kept}"
