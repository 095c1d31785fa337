"""What is said before the models are loaded, and after the videos are made."""

import statistics
import sys

from magcache.app import record
from magcache.app.backend import backend
from magcache.app.cost import needs_of, number_of_bytes
from magcache.app.job import TRIAL_BUDGET, Job, Request
from magcache.app.step_map import BRANCHES
from magcache.app.trials.quality import expectation
from magcache.trials import expectation_of


def announce(job: Job, shape: tuple[int, int, int], requests: list[Request], groups: int) -> None:
    """Says what is going to happen. shape: (frames, height, width). groups: of processes that share the requests."""
    schedule, calls, first = job.schedule, len(job.schedule.weights), requests[0]
    shown = {} if job.prompt_file else {"prompt": first.prompt, "n_prompt": first.n_prompt}
    shown |= {} if first.image else {flag: getattr(job.inputs, flag) for flag in job.sampling.spec.inputs}
    for name, value in shown.items():
        if value:
            print(f"{name:<9} {value}")
    seed = first.seed if len(requests) == 1 else f"{job.base_seed} and up"
    print(f"video     {job.describe_video(shape, seed)}")
    for lora in job.machine.lora:
        print(f"LoRA      {lora}")
    if job.cache:
        bound = f"at most {schedule.speedup_bound:.2f}x faster"
        print(f"MagCache  {schedule.computed} of {calls} transformer calls computed, {bound}; {job.made_by}")
        if expected := expectation(job):
            print(f"quality   latent PSNR {expected} (trials of table {job.measured.table.name})")
        if schedule.computed == calls:
            larger = "--magcache_thresh or --magcache_K" if job.cache.speedup is None else "--magcache_speedup"
            print(f"note: these settings reuse nothing; a larger {larger} would")
    else:
        print(f"MagCache  off: all {calls} transformer calls computed")
    if not job.sampling.spec.is_demo and not backend().lacks:
        tell_needs(job, shape)
    if job.calibration:
        print(f"          the model's magnitude ratios are measured and written to {job.calibration.parent}/")
        if job.trials:
            named = ", ".join(f"{speedup:g}" for speedup in job.trials)
            others = "fewer steps and MagCache as published for comparison"
            print(f"trials    speed-ups {named}, and {others}; at most {TRIAL_BUDGET} uncached runs per prompt")
    if len(requests) > 1:
        folders = sorted({str(request.path.parent) for request in requests})
        print(f"results   {len(requests)} files in {', '.join(folders)}")
    else:
        print(f"result    {first.path}", flush=True)
    if groups > len(requests):
        print(f"note: {len(requests)} videos for {groups} groups of processes; the others have nothing to do")


def tell_needs(job: Job, pixels: tuple[int, int, int]) -> None:
    """Says how much of the GPU's memory the run takes, with a warning if that is more than is free there."""
    import torch

    cuda = torch.cuda.is_available()
    needs = needs_of(job, pixels, cuda)
    if not cuda:
        print(f"needs     {number_of_bytes(needs.host)} for the weights of the transformer ({needs.dtype})")
        return
    print(f"needs     about {needs}")
    free, _ = torch.cuda.mem_get_info()
    if needs.card > free:
        needed = f"{number_of_bytes(needs.card)} of the GPU's memory, but {number_of_bytes(free)} are free"
        less = "--offload_blocks, --offload_model True, --vae_tiling or a smaller --size need less"
        print(f"warning: this run needs about {needed}; {less}", file=sys.stderr)


def summarise(job: Job, watches: list, seconds: dict[str, float]) -> None:
    """Says what happened, from what was seen of the calls and not from the plan. seconds: of what came before."""
    seconds = dict(seconds)
    for watch in watches:
        for phase, value in watch.seconds.items():
            phase = "denoise" if phase in ("computed", "reused", "sampler") else phase
            seconds[phase] = seconds.get(phase, 0.0) + value
    print("time      " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    if job.cache and any(watch.calls for watch in watches):
        tell_calls(job, watches)
    psnrs = [watch.latent_psnr for watch in watches if watch.latent_psnr is not None]
    if len(psnrs) > 1:
        print(f"compared  {len(psnrs)} videos: latent PSNR {expectation_of(psnrs)}")
    if memory := record.peak_memory():
        print(f"memory    at most {number_of_bytes(memory['bytes'])} of {memory['of']}")
    schedule = job.schedule
    if job.cache and any(tuple(reused for reused, _ in watch.calls) != schedule.reuse for watch in watches):
        print("warning: the calls of the model did not follow the schedule; please report this", file=sys.stderr)


def tell_calls(job: Job, watches: list) -> None:
    calls = [call for watch in watches for call in watch.calls]
    times = {kind: [duration for reused, duration in calls if reused == kind] for kind in (False, True)}
    branches, steps = BRANCHES[: job.schedule.calls_per_step], job.schedule.steps * len(watches)
    counts = [sum(reused for reused, _ in calls[i :: len(branches)]) for i in range(len(branches))]
    reused = " and ".join(f"{count} of {steps} {name}" for count, name in zip(counts, branches, strict=True))
    bound = f"bound {job.schedule.speedup_bound:.2f}x, {job.made_by}"
    print(f"MagCache  {len(times[False])} of {len(calls)} calls computed, reused {reused} ({bound})")
    typical = statistics.median(times[False])  # the first one may warm up or compile
    reused = f", reused {1000 * statistics.median(times[True]):.2g} ms a call" if times[True] else ""
    spent = sum(times[False])
    speedup = (spent + len(times[True]) * typical) / (spent + sum(times[True]))
    print(f"          computed {1000 * typical:.1f} ms a call{reused}: {speedup:.2f}x faster than computing every call")


def tell_failures(failures: list[tuple[str, str]], count: int) -> None:
    """Lists what failed. failures: those of `magcache.app.generate.make_all`, for `count` requests."""
    remedies = {
        "videos": "a rerun tries them again",
        "comparisons": "their videos are finished; --overwrite makes both again",
    }
    for what, remedy in remedies.items():
        if lines := [line for failed, line in failures if failed == what]:
            print(f"{len(lines)} of {count} {what} failed; {remedy}:", *lines, sep="\n", file=sys.stderr)
