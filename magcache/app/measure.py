"""The loop that calibrates: renders every prompt, measures its ratios, and tries it in other ways where that is
wanted. The table is written with every prompt, so that nothing that comes later can take it away."""

import sys
from contextlib import nullcontext

from magcache.app.job import Request
from magcache.app.make_videos import told
from magcache.app.render import Renderer
from magcache.app.results import CalibrationFile, save_video
from magcache.app.trials.run import TrialRuns
from magcache.calibrate import Calibration


def calibrate(renderer: Renderer, requests: list[Request]) -> None:
    job, group, runs = renderer.job, renderer.group, []
    calibration, table = Calibration(job.schedule.steps, group.sharing), CalibrationFile(job)
    trials = TrialRuns(job, renderer.pipeline, renderer.generate, group, len(requests)) if job.output.trials else None

    def write() -> None:
        """The table of those that were measured."""
        done = requests[: len(runs)]
        table.write(runs, done, trials and trials.entry(done))

    try:
        for number, request in told(renderer, requests):
            more = number < len(requests)
            with trials.recording(request) if trials else nullcontext():
                watch = renderer.render(request, calibration, more or bool(trials))
            renderer.watches.append(watch)
            if group.rank == 0:
                save_video(renderer, request, watch)
            runs.append(calibration.lists())
            watch.video = None
            if trials:
                trials.try_prompt(watch.latent, runs[-1]["mag_ratio"])
            watch.latent = None
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


def reached(renderer: Renderer, trials: TrialRuns | None, number: int, count: int, runs: list[dict]) -> str:
    """Says how far the number-th of so many prompts came, and what there is of all of them."""
    if trials and trials.recorded == len(runs) > 0:
        return f" in the trials of prompt {number} of {count}; what was measured until then is written"
    kept = "only the earlier prompts count" if runs else "nothing is written"
    return f"{renderer.reached(number, count)}; {kept}"
