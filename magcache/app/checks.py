"""Makes the job of the flags, and refuses what makes no sense: with one line, before anything is loaded."""

import math
import os
import random
from argparse import Namespace
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

import magcache
from magcache.app import prompts
from magcache.app.backend import backend, check_release
from magcache.app.checkpoint import architecture_of
from magcache.app.choose_schedule import all_computed, choose_table, make_schedule
from magcache.app.errors import Refused, need_package, refusing
from magcache.app.inputs import choose_inputs
from magcache.app.job import OF_OUR_WAN, CacheSettings, Extension, Inputs, Job, Machine, Output, Sampling
from magcache.app.lora import Lora, check_lora
from magcache.app.processes import Processes
from magcache.app.tasks import TASKS
from magcache.app.trials.quality import note_few_steps, read_speedups, use_trials


def make_job(args: Namespace) -> Job:
    """Makes the job. args: those of `magcache.app.flags.make_parser`. Raises Refused."""
    check_release(TASKS[args.task])
    check_effects(args)
    machine, sampling = make_machine(args), make_sampling(args)
    if machine.lora:
        sizes = architecture_of(sampling.spec, machine.ckpt_dir)
        for lora in machine.lora:
            check_lora(lora, sampling.spec, sizes)
    inputs = Inputs(**{field.name: getattr(args, field.name) for field in fields(Inputs)})
    base_seed = args.base_seed
    if base_seed < 0:
        base_seed = 0 if args.prompt_file else random.randrange(2**32)  # a rerun has to find what is finished
    if base_seed >= 2**63:
        raise Refused(f"--base_seed must be below 2^63, got {base_seed}")
    prompt, lines = args.prompt, ()
    if args.prompt_file:
        lines = read_lines(args, sampling, base_seed)
        prompt, inputs = lines[0].prompt, replace(inputs, image=lines[0].image)
    prompt, n_prompt = text_of(prompt, "prompt"), text_of(args.n_prompt, "n_prompt")
    folder = Path(args.script).parent
    prompt, inputs = choose_inputs(sampling, prompt, inputs, folder, needed=not args.magcache_plan)
    cache, output = make_cache(args, sampling), make_output(args, sampling)
    cache, measured = use_trials(sampling, cache, machine)
    table, made_by = choose_table(sampling, cache, machine) if cache else (None, None)
    extension = Extension(args.prompt_extend_method, args.prompt_extend_model, args.prompt_extend_target_lang)
    job = Job(
        sampling=sampling,
        inputs=inputs,
        machine=machine,
        output=output,
        lines=lines or (prompts.Line(1, prompt, base_seed, n_prompt=n_prompt),),
        base_seed=base_seed,
        prompt_file=args.prompt_file,
        extension=extension if args.use_prompt_extend else None,
        cache=cache,
        schedule=all_computed(sampling.sample_steps) if output.table else make_schedule(sampling, cache, table),
        made_by=made_by,
        table=table,
        measured=measured,
        script=args.script,
        flags={name: value for name, value in vars(args).items() if name not in ("script", "explicit")},
    )
    note_few_steps(job)
    return job


def text_of(argument: str | None, flag: str) -> str | None:
    """Takes the bytes of an argument for UTF-8, whatever the locale says. Raises Refused if they are not."""
    if not argument or prompts.is_text(argument):
        return argument
    try:
        return os.fsencode(argument).decode()
    except ValueError as fault:
        raise Refused(f"--{flag} is not valid UTF-8 text: {argument!r}") from fault


def check_effects(args: Namespace) -> None:
    """Refuses a flag of ours that would do nothing, and prints a note for one of Wan2.1's script or of the released
    MagCache one, whose command lines run unchanged."""
    given, cached = getattr(args, "explicit", ()), args.use_magcache or args.magcache_plan
    for name, value in vars(args).items():
        if value == "" and name != "prompt":
            raise Refused(f"--{name} is empty: leave it out, or give it a value")
    needs = {"prompt_extend_method": (args.use_prompt_extend, "--use_prompt_extend")}
    needs |= dict.fromkeys(("prompt_extend_model", "prompt_extend_target_lang"), needs["prompt_extend_method"])
    needs |= dict.fromkeys(("magcache_thresh", "magcache_K", "retention_ratio"), (cached, "--use_magcache"))
    for name in sorted(given):
        if name in needs and not needs[name][0]:
            print(f"note: --{name} has no effect without {needs[name][1]}")
    for name in backend().not_used:
        if getattr(args, name) is not None:
            print(f"note: --{name} is not used by task {args.task}")
    for name in ("mag_ratios", "magcache_speedup", "magcache_quality", "magcache_offload", "compare"):
        if getattr(args, name) and not cached:
            raise Refused(f"--{name} needs --use_magcache")


def make_machine(args: Namespace) -> Machine:
    """Refuses flags that the `wan` here does not have, and those for several GPUs that the number of processes does not
    fit; a plan is for any machine."""
    for flag in backend().lacks:
        if (value := getattr(args, flag)) is True or value not in (None, False, 1):
            whose = f"the one here is {backend().release}'s own"
            raise Refused(f"--{flag} needs the wan package of magcache_generate.py; {whose}")
    names = ("t5_cpu", "t5_fsdp", "dit_fsdp", "ulysses_size", "ring_size", "convert_model_dtype")
    spread = {name: getattr(args, name) for name in (*names, *OF_OUR_WAN)}
    if args.convert_model_dtype and "dit_dtype" not in backend().lacks:
        spread["dit_dtype"] = args.dit_dtype or "bfloat16"
    if min(args.ulysses_size, args.ring_size) < 1:
        both = f"got {args.ulysses_size} and {args.ring_size}"
        raise Refused(f"--ulysses_size and --ring_size must be at least 1, {both}")
    if args.magcache_plan:
        world = args.ulysses_size * args.ring_size
        if world == 1 and (args.dit_fsdp or args.t5_fsdp):
            print("note: the weights are sharded over all processes, whose number is not known here; 2 are assumed")
            world = 2
    else:
        with refusing(ValueError):
            world = Processes.from_environment().world
        check_processes(args, world)
    offload = world == 1 if args.offload_model is None else args.offload_model
    lora = tuple(map(Lora.from_flag, args.lora or ()))
    return Machine(args.ckpt_dir or args.task, offload, **spread, world=world, lora=lora)


def check_processes(args: Namespace, world: int) -> None:
    """Refuses flags for several GPUs that so many processes do not fit, and a run without a checkpoint folder."""
    size, sharded = args.ulysses_size * args.ring_size, [f for f in ("t5_fsdp", "dit_fsdp") if getattr(args, f)]
    sizes = f"--ulysses_size {args.ulysses_size}", f"--ring_size {args.ring_size}"
    if world == 1 and sharded:
        start = "start them with torchrun --nproc_per_node N"
        raise Refused(f"--{sharded[0]} shards over several processes: {start}")
    if world == 1 and size > 1:
        start = f"start them with torchrun --nproc_per_node {size}"
        raise Refused(f"{' and '.join(sizes)} need {size} processes: {start}")
    if world % size:
        raise Refused(f"{world} processes are not a multiple of {' times '.join(sizes)}")
    if args.offload_model and sharded:
        print("note: --offload_model True does not move what --dit_fsdp and --t5_fsdp have sharded")
    if not args.ckpt_dir:
        raise Refused("--ckpt_dir is needed: the checkpoint folder, such as ./Wan2.1-T2V-1.3B")


def make_sampling(args: Namespace) -> Sampling:
    """Fills in the task's defaults."""
    task, given = TASKS[args.task], "sample_guide_scale" in getattr(args, "explicit", ())
    frames, steps, shift = args.frame_num, args.sample_steps, args.sample_shift
    if frames is not None and task.sources and args.src_video:
        print("note: --frame_num is not used with --src_video, whose own length decides")
        frames = None
    return Sampling(
        args.task,
        args.size,
        task.frames if frames is None else frames,
        args.sample_solver,
        task.steps if steps is None else steps,
        task.shifts.get(args.size, task.shift) if shift is None else shift,
        args.sample_guide_scale if given else task.guidance if task.boundary else task.guidance[0],
    )


def read_lines(args: Namespace, sampling: Sampling, base_seed: int) -> tuple[prompts.Line, ...]:
    """Returns the lines of --prompt_file, each with its own image and negative prompt, or those of the flags."""
    if args.prompt is not None:
        raise Refused("--prompt and --prompt_file exclude each other")
    try:
        lines = prompts.read_prompts(args.prompt_file, base_seed)
    except ValueError as fault:
        raise Refused(f"--prompt_file: {fault}") from fault
    file, takes_image = f"--prompt_file {args.prompt_file}", "image" in sampling.spec.inputs
    if not takes_image and any(line.image for line in lines):
        raise Refused(f"{file} names images, but task {args.task} takes none")
    given = {"image": args.image, "n_prompt": text_of(args.n_prompt, "n_prompt")}
    lines = tuple(replace(line, **{name: getattr(line, name) or given[name] for name in given}) for line in lines)
    for line in lines:
        if takes_image and line.image is None and (sampling.spec.needs_images or any(line.image for line in lines)):
            raise Refused(f"{file}: prompt {line.number} has no image, and there is no --image")
    return lines


def make_cache(args: Namespace, sampling: Sampling) -> CacheSettings | None:
    with refusing(ValueError):
        rule = magcache.Settings(args.magcache_thresh, args.magcache_K, args.retention_ratio)
    wanted = args.use_magcache or args.magcache_plan
    if wanted and args.magcache_calibration:
        first = "calibrate first, then use the table"
        raise Refused(f"--use_magcache and --magcache_calibration exclude each other: {first}")
    speedup, quality, most = args.magcache_speedup, args.magcache_quality, sampling.sample_steps
    given = {"magcache_thresh", "magcache_K", "retention_ratio"}.intersection(getattr(args, "explicit", ()))
    for flag, value in (("magcache_speedup", speedup), ("magcache_quality", quality)):
        if value is not None and given:
            raise Refused(f"--{flag} chooses the steps in place of --{min(given)}: give one of them")
    if quality is not None and speedup is not None:
        raise Refused("--magcache_quality chooses the speed-up in place of --magcache_speedup")
    if quality is not None and not 0 < quality < math.inf:
        raise Refused(f"--magcache_quality must be a positive number of dB, got {quality}")
    if sampling.spec.boundary and speedup is None and (wanted or args.magcache_calibration):
        none = "has two transformers, and there are no ratios for two"
        raise Refused(f"task {args.task} {none}: give --use_magcache --magcache_speedup X")
    if speedup is not None and not 1 <= speedup <= most:
        raise Refused(f"--magcache_speedup must be between 1 and {most}, at which one step is computed")
    return CacheSettings(rule, speedup, args.mag_ratios, args.magcache_offload, quality) if wanted else None


def make_output(args: Namespace, sampling: Sampling) -> Output:
    if args.overwrite and not args.prompt_file:
        raise Refused("--overwrite needs --prompt_file: a single video is always made")
    for package in ("skimage", "matplotlib", "imageio_ffmpeg", "PIL") if args.compare else ():
        need_package(package, "--compare")
    if not args.magcache_calibration:
        return Output(args.save_file, args.overwrite, args.compare)
    if sampling.sample_steps < 2:
        raise Refused("--magcache_calibration compares steps, so it needs --sample_steps 2 or more")
    if sampling.calls_per_step == 1 and backend().frugal:
        one = "with --sample_guide_scale 1 there is only one"
        raise Refused(f"--magcache_calibration measures both calls of a step, and {one}")
    trials = ()
    if args.magcache_calibration is not True:
        trials = read_speedups(args.magcache_calibration, sampling)
    folder = Path("calibration")
    if args.save_file:
        folder = Path(args.save_file) if args.prompt_file else Path(args.save_file).parent
    video = f"{sampling.size.replace('*', 'x')}_{sampling.frame_num}f_{sampling.sample_steps}steps"
    table = folder / f"{sampling.task}_{video}_{datetime.now():%Y%m%d_%H%M%S}.json"
    return Output(args.save_file, args.overwrite, args.compare, table, trials)
