"""What is said: before the models are loaded, after the videos are made, and by --magcache_plan, which makes none."""

import contextlib
import io
import os
import statistics
import sys
from pathlib import Path

import magcache
from magcache.app import plan as report
from magcache.app import record
from magcache.app.checks import check_request, check_writable, need_package
from magcache.app.choose_schedule import (
    make_neighbours,
    make_schedule,
    predict,
    settings_words,
    table_of,
)
from magcache.app.flags import input_flags
from magcache.app.inputs import describe_video, planned_video
from magcache.app.results import Job, Request


def announce(job: Job, shape: tuple[int, int, int], requests: list[Request]) -> None:
    """Says before the models are loaded what is going to happen. shape: (frames, height, width)."""
    args, schedule = job.args, job.schedule
    calls = 2 * args.sample_steps
    if not args.prompt_file:
        print(f"prompt    {args.prompt}")
    for flag in input_flags(args):
        if getattr(args, flag) and not requests[0].image:
            print(f"{flag:<9} {getattr(args, flag)}")
    seed = args.base_seed if len(requests) == 1 else f"{args.base_seed} and up"
    print(f"video     {describe_video(args, shape, seed)}")
    if schedule:
        print(
            f"MagCache  {schedule.computed} of {calls} transformer calls computed, at most "
            f"{schedule.speedup_bound:.2f}x faster; {job.made_by}"
        )
        if schedule.computed == calls:
            print("note: these settings reuse nothing; a larger --magcache_thresh or --magcache_K would")
    else:
        print(f"MagCache  off: all {calls} transformer calls computed")
    if args.magcache_calibration:
        print(f"          their ratios are measured and written to {args.calibration_dir}/")
    if len(requests) > 1:
        folders = sorted({str(request.path.parent) for request in requests})
        print(f"results   {len(requests)} files in {', '.join(folders)}")
    else:
        print(f"result    {requests[0].path}", flush=True)


def summarise(job: Job, watches: list, seconds: dict[str, float]) -> None:
    """Says what happened, from what was seen of the calls and not from the plan. seconds: of what came before."""
    schedule = job.schedule
    for watch in watches:
        for phase, value in watch.seconds.items():
            phase = "denoise" if phase in ("computed", "reused", "sampler") else phase
            seconds[phase] = seconds.get(phase, 0.0) + value
    print("time      " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    calls = [call for watch in watches for call in watch.calls]
    if schedule and calls:
        times = {kind: [duration for reused, duration in calls if reused == kind] for kind in (False, True)}
        cond, uncond = (sum(reused for w in watches for reused, _ in w.calls[branch::2]) for branch in (0, 1))
        steps = schedule.steps * len(watches)
        print(
            f"MagCache  {len(times[False])} of {len(calls)} calls computed, reused {cond} of {steps} cond and "
            f"{uncond} of {steps} uncond (bound {schedule.speedup_bound:.2f}x, {job.made_by})"
        )
        typical = statistics.fmean(times[False])
        line = f"          computed {1000 * typical:.1f} ms a call"
        if times[True]:
            line += f", reused {1000 * statistics.fmean(times[True]):.1f} ms a call"
        speedup = len(calls) * typical / sum(times[False] + times[True])
        print(f"{line}; {speedup:.2f}x faster than computing every call")
    if memory := record.peak_memory():
        print(f"memory    at most {report.number_of_bytes(memory['bytes'])} of {memory['of']}")
    if schedule and any(tuple(reused for reused, _ in watch.calls) != schedule.reuse for watch in watches):
        print("warning: the calls of the model did not follow the schedule; please report this", file=sys.stderr)


def show_plan(args, error) -> None:
    """Says what a run with these flags would do, by the same code, without the wan package or any weights."""
    try:
        print_plan(args, error)
        sys.stdout.flush()
    except BrokenPipeError:  # by `| head`, which has seen enough; Python flushes once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_plan(args, error) -> None:
    args.use_magcache, args.ckpt_dir = True, args.ckpt_dir or args.task
    picture = Path(args.magcache_plan) if args.magcache_plan is not True else None
    if picture:
        need_package("matplotlib", "--magcache_plan with a picture", error)
        check_writable(picture.parent, error)
    with contextlib.redirect_stdout(io.StringIO()) as notes:
        check_request(args, error)
        schedule, made_by = make_schedule(args, error)
        frames, height, width, references = planned_video(args)
        if args.size not in report.SIZES[args.task]:
            print(f"note: task {args.task} does not run at {args.size}, only at {', '.join(report.SIZES[args.task])}")
    table, shards = table_of(args), args.ulysses_size * args.ring_size
    where = "in CPU memory" if args.magcache_offload else "on the GPU" if shards == 1 else f"on each of {shards} GPUs"
    with contextlib.redirect_stdout(io.StringIO()):  # it says again what the asked one has said
        neighbours = make_neighbours(args, error)
    plan = report.Plan(
        schedule,
        f"{made_by}, {settings_words(args)}",
        report.table_origin(table) if table else None,
        f"{args.task}, {width}x{height}, {frames} frames, {args.sample_steps} steps",
        report.token_count(frames, height, width, references),
        report.shape_of(args.task, args.ckpt_dir),
        predict(args, schedule),
        neighbours,
        args.magcache_dtype,
        where,
        shards,
    )
    if picture:  # before anything is printed, which may end it
        from magcache.app.plot import draw_plan

        sigmas = magcache.noise_levels(args.sample_steps, args.sample_shift, args.sample_solver)
        draw_plan(plan, table and table.ratios, sigmas, picture)
    print("\n".join(plan.lines()))
    print(notes.getvalue(), end="")
    if picture:
        print(f"picture   {picture}")
