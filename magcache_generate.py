#!/usr/bin/env python
"""Generates videos with Wan2.1; with --use_magcache, in a part of its transformer calls only.

Accepts every flag of Wan2.1's generate.py. Runs with the `wan` package beside it: this repository's or Wan2.1's own.
"""

import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable

try:
    import magcache  # without torch until something runs
    from magcache.app import prompts
    from magcache.app.checks import check_request
    from magcache.app.choose_schedule import all_computed, make_schedule
    from magcache.app.flags import flag_values, is_first, make_parser, task_kind
    from magcache.app.inputs import (
        extend_prompt,
        inputs_of,
        make_expander,
        read_inputs,
        reference_paths,
        video_shape,
    )
    from magcache.app.processes import Processes, agreed, gathered, leaving_at_once
    from magcache.app.results import (
        Job,
        Request,
        check_records,
        choose_requests,
        make_record,
        make_requests,
        save_calibration,
        save_result,
        write_comparison,
        write_record,
    )
    from magcache.app.tell import announce, show_plan, summarise
    from magcache.app.wan_package import (
        PIPELINES,
        check_wan,
        device_name,
        is_stock_wan,
        sharing_group,
        start_processes,
    )
except ImportError as fault:
    remedies = "`pip install .` in its repository, or copy its folder magcache/ beside magcache_generate.py"
    print(f"magcache_generate.py: error: package magcache cannot be imported ({fault}): {remedies}", file=sys.stderr)
    sys.exit(2)


def load(job: Job):
    """Returns the task's pipeline."""
    import torch

    import wan

    args, processes = job.args, job.processes
    device = device_name()
    if processes.world > 1:
        device = f"{processes.world} processes, {device}"
    print(f"device    {device}; loading {args.ckpt_dir}", flush=True)
    if not torch.cuda.is_available() and not args.task.endswith("-tiny"):
        slow = "the wan package here is made for one" if is_stock_wan() else "a full-size model takes hours for a video"
        print(f"note: there is no CUDA device; {slow}", flush=True)
    return getattr(wan, PIPELINES[task_kind(args)])(
        config=job.config,
        checkpoint_dir=args.ckpt_dir,
        device_id=processes.local_rank,
        rank=job.group.rank,
        t5_fsdp=args.t5_fsdp,
        dit_fsdp=args.dit_fsdp,
        use_usp=args.ulysses_size * args.ring_size > 1,
        t5_cpu=args.t5_cpu,
    )


def attach(job: Job, model):
    """Returns the cache and the calibration of the model, None for what is not asked for."""
    import torch

    args = job.args
    if job.schedule:
        dtype = getattr(torch, args.magcache_dtype) if args.magcache_dtype else None
        device = "cpu" if args.magcache_offload else None
        return magcache.apply_magcache(model, job.schedule, dtype=dtype, device=device), None
    if args.magcache_calibration:
        return None, magcache.apply_calibration(model, args.sample_steps, sharing_group(args, job.group))
    return None, None


def tried(goes_on: bool, function: Callable, group=None) -> tuple:
    """What the function returns, and None; or None, and what went wrong, if its failure stops nothing else (`goes_on`).

    group: processes, of `Processes.patient_group`, that call it together.
    """
    result = fault = None
    try:
        result = function()
    except Exception as raised:
        if not goes_on:
            raise
        fault = f"{type(raised).__name__}: {raised}".splitlines()[0]
    return result, agreed(fault, group) if goes_on else None


def compare(job: Job, pipeline, cache, request: Request, run: Callable, made: tuple, own) -> tuple:
    """Generates the same video without the cache and writes the comparison.

    run: of `generate`. made: frames of the video with the cache, uint8, None where this process got no video; and what
    was watched. own: the processes of the group. Returns what a record holds of it, and what went wrong.
    """
    from magcache import patch

    def run_plain():
        magcache.remove_magcache(pipeline.model)
        try:
            return run(request, all_computed(job.args))
        finally:
            patch.attach(pipeline.model, cache)  # for the next video

    print("now the same without the cache, to compare", flush=True)
    try:
        plain, fault = tried(job.goes_on, run_plain, own)
        if fault or made[0] is None:
            return None, fault
        return tried(job.goes_on, lambda: write_comparison(job, request, made, plain))
    except BaseException:
        print(f"the comparison failed; the video with the cache is in {request.path}", file=sys.stderr)
        raise


def generate(job: Job, inputs: list | None, expander, requests: list[Request]) -> list[tuple[str, str]]:
    """Makes this group's share of the requests. Returns what failed in any group: "videos" or "comparisons", and the
    line to say of it."""
    from tqdm import tqdm

    from magcache.app.media import to_frames
    from magcache.app.progress import watched
    from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS

    args, processes, group = job.args, job.processes, job.group
    seconds, clock = {}, time.perf_counter()

    def lap(name):
        nonlocal clock
        seconds[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    everyone, own = processes.patient_group(processes.world), processes.patient_group(group.size)
    if expander:
        requests = [
            dataclasses.replace(request, prompt=extend_prompt(args, request, expander, inputs)) for request in requests
        ]
    if args.use_prompt_extend:
        requests = gathered(requests, everyone)[0]  # the others wait as long as it takes
        lap("extend")
    requests = prompts.share(requests, group.index, group.count)
    if not requests:  # fewer videos than groups
        return list(itertools.chain(*gathered([], everyone)))
    if group.rank == 0:
        for request in requests:
            request.path.parent.mkdir(parents=True, exist_ok=True)
    pipeline = load(job)
    lap("load")
    cache, calibration = attach(job, pipeline.model)
    if inputs is None:
        paths = ([args.src_video], [args.src_mask], [reference_paths(args) or None])
        inputs = pipeline.prepare_source(*paths, args.frame_num, SIZE_CONFIGS[args.size], pipeline.device)
    given = {"size": SIZE_CONFIGS[args.size]}
    if task_kind(args) in ("i2v", "flf2v"):
        given = {"max_area": MAX_AREA_CONFIGS[args.size]}

    def run(request, schedule, cache=None):
        """The video, and what was watched."""
        with watched(pipeline, schedule, cache, processes.rank == 0) as watch:
            video = pipeline.generate(
                request.prompt,
                *inputs_of(request, inputs),
                **given,
                frame_num=args.frame_num,
                shift=args.sample_shift,
                sample_solver=args.sample_solver,
                sampling_steps=args.sample_steps,
                guide_scale=args.sample_guide_scale,
                seed=request.seed,
                offload_model=args.offload_model,
            )
        return video, watch

    runs, watches, failures = [], [], []  # what was measured and seen of the requests so far
    shows = job.goes_on and processes.rank == 0
    try:
        for number, request in enumerate(tqdm(requests, "videos", unit="video", disable=None if shows else True), 1):
            if args.prompt_file:
                share = f"{len(requests)}, those of group 1 of {group.count}" if group.count > 1 else len(requests)
                print(f"video     {number} of {share}, seed {request.seed}: {request.prompt}", flush=True)
            run_cached = functools.partial(run, request, job.schedule or all_computed(args), cache)
            made, fault = tried(job.goes_on, run_cached, own)
            if fault:
                failures.append(("videos", f"{request.path}: {fault}"))
                continue
            video, watch = made
            watches.append(watch)
            if calibration:
                runs.append(calibration.lists())
            if group.rank == 0:  # the others get no video
                save_result(video, request.path, job.config.sample_fps)
                watch.lap("save")
                frames, height, width = video.shape[1:]
                print(f"saved     {request.path} ({width}x{height}, {frames} frames)", flush=True)
                record = make_record(job, request, (frames, height, width), watch, seconds)
                if write_record(args, request.path, record):
                    print(f"record    {request.path.with_suffix('.json')}", flush=True)
            pixels = to_frames(video) if args.compare and group.rank == 0 else None
            del video, made  # the next one needs the memory
            if args.compare:
                scores, fault = compare(job, pipeline, cache, request, run, (pixels, watch), own)
                if scores:
                    write_record(args, request.path, record | {"comparison": scores})
                if fault:
                    failures.append(("comparisons", f"{request.path}: {fault}"))
    except BaseException:
        if calibration and len(runs) < len(requests):
            print(
                f"the calibration stopped in prompt {len(runs) + 1} of {len(requests)}, after {calibration.reached} of "
                f"{calibration.calls} calls; {'only the prompts before count' if runs else 'nothing is written'}",
                file=sys.stderr,
            )
        raise
    finally:
        if runs and processes.rank == 0:
            save_calibration(args, runs, requests[: len(runs)])
    summarise(job, watches, seconds)
    return list(itertools.chain(*gathered(failures if group.rank == 0 else [], everyone)))


def main() -> None:
    parser = make_parser(__file__, __doc__)
    args = parser.parse_args()
    given = flag_values(parser, args)
    if not is_first("RANK"):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all)
    if args.magcache_plan:
        return show_plan(args, parser.error)
    check_request(args, parser.error)
    schedule, made_by = make_schedule(args, parser.error)
    config = check_wan(args, parser.error)
    inputs = read_inputs(args, parser.error)
    processes = Processes.from_environment()
    group = start_processes(processes, args, given, schedule, parser.error)
    requests = processes.from_first(make_requests(args, schedule, parser.error))
    requests = processes.from_first(choose_requests(args, requests, parser.error))
    if not requests:
        print("all of them are finished; --overwrite makes them again")
        return
    check_records(args, requests, parser.error)
    expander = make_expander(args, parser.error) if processes.rank == 0 else None
    job = Job(args, schedule, made_by, config, processes, group)
    announce(job, video_shape(args, inputs), requests)
    if group.count > len(requests):
        print(f"note: {len(requests)} videos for {group.count} groups of processes; the others have nothing to do")
    failures = generate(job, inputs, expander, requests)
    remedies = {
        "videos": "a rerun tries them again",
        "comparisons": "their videos are finished, --overwrite makes both again",
    }
    for what, remedy in remedies.items():
        lines = [line for failed, line in failures if failed == what]
        if lines and processes.rank == 0:
            print(f"{len(lines)} of {len(requests)} {what} failed, {remedy}:", *lines, sep="\n", file=sys.stderr)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    with leaving_at_once():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
        except RuntimeError as fault:
            reason = (str(fault) or "?").splitlines()[0]
            if type(fault).__name__ == "OutOfMemoryError":  # torch's, without importing torch to name it
                sys.exit(
                    f"magcache_generate.py: error: out of GPU memory ({reason}); --offload_model True, --t5_cpu, "
                    "--magcache_offload, a smaller --size or fewer frames need less"
                )
            if reason.startswith("cannot read "):
                sys.exit(f"magcache_generate.py: error: {reason}")
            raise
