"""--magcache_plan: what a run with these flags would do, by the same code, without the wan package or any weights."""

import contextlib
import io
from argparse import Namespace
from pathlib import Path

from magcache.app.checkpoint import architecture_of
from magcache.app.checks import make_job
from magcache.app.cost import cached_bytes, needs_of, number_of_bytes, run_flops, token_count
from magcache.app.errors import need_package
from magcache.app.inputs import planned_video
from magcache.app.job import Job, shape_in_words
from magcache.app.requests import check_target
from magcache.app.step_map import digits, predict, reuse_by_branch, ruler, step_map
from magcache.app.trials.quality import quality_lines
from magcache.ratios import RatioTable


def show_plan(args: Namespace) -> None:
    picture = Path(args.magcache_plan) if args.magcache_plan is not True else None
    if picture:
        need_package("matplotlib", "--magcache_plan with a picture")
        check_target(picture)
    with contextlib.redirect_stdout(io.StringIO()) as notes:
        job = make_job(args)
        task, size, sizes = job.sampling.task, job.sampling.size, job.sampling.spec.sizes
        pixels = planned_video(job.sampling, job.inputs)
        if size not in sizes:
            print(f"note: task {task} does not run at {size}, only at {', '.join(sizes)}")
    schedule = job.schedule
    bound = f"at most {schedule.speedup_bound:.2f}x"
    headline = f"{schedule.computed} of {len(schedule.weights)} DiT calls computed, {bound}"
    chosen = f"{job.made_by}, {job.cache}"
    video = f"{task}, {shape_in_words(pixels)}, {schedule.steps} steps"
    if picture:  # before anything is printed, which may end it
        from magcache.app.plot import plan_figure, save_figure

        save_figure(plan_figure(job, f"{headline}\n{chosen}; {video}"), picture)
    lines = [
        headline,
        f"schedule  {chosen}",
        *([f"origin    {table_origin(job.table)}"] if job.table else []),
        *run_lines(job, video, pixels),
        *(["", *quality_lines(job)] if job.measured else []),
    ]
    print(*(line.rstrip() for line in lines), sep="\n")
    print(notes.getvalue(), end="")
    if picture:
        print(f"picture   {picture}")


def table_origin(table: RatioTable) -> str:
    """Says where a table comes from."""
    date = table.measured_on.get("date")
    if isinstance(date, str):
        return f"measured on {date[:10]} with {table.steps} steps ({table.path})"
    return f"{'published' if table.named else 'origin unknown'}, {table.steps} steps ({table.path})"


def run_lines(job: Job, video: str, pixels: tuple[int, int, int]) -> list[str]:
    """Describes the run. video: in words. pixels: (frames, height, width)."""
    tokens = token_count(*pixels, len(job.inputs.references), job.sampling.spec.token_pixels)
    schedule, sizes = job.schedule, architecture_of(job.sampling.spec, job.machine.ckpt_dir)
    cached, full = run_flops(schedule, sizes, tokens)
    return [
        f"video     {video}; {tokens} tokens a call",
        *(f"{flag:<9} {path}" for flag in job.sampling.spec.inputs if (path := getattr(job.inputs, flag))),
        *(f"LoRA      {lora}" for lora in job.machine.lora),
        "",
        *map_lines(job),
        "",
        f"calls     {schedule.computed} computed, {sum(schedule.reuse)} reused, {len(schedule.weights)} in all; "
        f"bound on the speed-up of the DiT {schedule.speedup_bound:.2f}x",
        f"FLOPs     {100 * (1 - cached / full):.1f} % of the DiT's saved: {cached:.3g} of {full:.3g} are left",
        f"memory    {memory(job, cached_bytes(schedule, sizes, tokens, job.machine.shards))}",
        *([f"needs     about {needs_of(job, pixels)}"] if not job.sampling.spec.is_demo else []),
    ]


def memory(job: Job, size: float) -> str:
    """Says what is cached and where. size: of all that is cached in a process, in bytes."""
    schedule, shards = job.schedule, job.machine.shards
    kept = schedule.history * schedule.calls_per_step
    if not kept:
        return "nothing is cached"
    where = "in CPU memory" if job.cache.offload else "on the GPU" if shards == 1 else f"on each of {shards} GPUs"
    return f"{number_of_bytes(size)} {where} for {kept} cached {schedule.target}s"


def map_lines(job: Job) -> list[str]:
    """Draws the steps of every branch, and below them the predicted errors."""
    steps, branches, prediction = job.schedule.steps, reuse_by_branch(job.schedule), predict(job.schedule, job.table)
    lines = [f"step      {ruler(steps)}"]
    for name, reuse in branches.items():
        lines.append(f"{name:<9} {step_map(reuse)}  {steps - sum(reuse)} computed, {sum(reuse)} reused")
    if not prediction:
        return [*lines, "          # computed, . reused"]
    for name, errors in prediction.items():
        shown = f"{digits(errors, branches[name], job.cache.rule.thresh):<{steps}}"
        lines.append(f"error     {shown}  {name}, {max(errors):.3g} at most")
    legend = "# computed, . reused; error: accumulated along a reused stretch by the ratios, in tenths of thresh"
    return [*lines, f"          {legend} {job.cache.rule.thresh:g}"]
