"""Makes the job of the flags, and refuses what makes no sense: with one line, before anything is loaded."""

import math
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
from magcache.app.job import OF_EXTENSION, OF_RULE, CacheSettings, Inputs, Job, Machine, Sampling
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
    if args.prompt_file:
        lines = read_lines(args, sampling, base_seed)
        inputs = replace(inputs, image=lines[0].image)
    else:
        lines = (prompts.Request(1, args.prompt, base_seed, n_prompt=args.n_prompt, save_file=args.save_file),)
    prompt, inputs = choose_inputs(sampling, lines[0].prompt, inputs, Path(args.script).parent, not args.magcache_plan)
    lines = (replace(lines[0], prompt=prompt), *lines[1:])
    cache, table, measured = make_cache(args, sampling), None, None
    if cache:
        table, measured = choose_table(sampling, cache, machine)
        cache = use_trials(cache, measured, sampling.sample_steps)
    calibration, trials = make_calibration(args, sampling)
    job = Job(
        sampling=sampling,
        inputs=inputs,
        machine=machine,
        lines=lines,
        base_seed=base_seed,
        prompt_file=args.prompt_file,
        cache=cache,
        schedule=all_computed(sampling.sample_steps) if calibration else make_schedule(sampling, cache, table),
        table=table,
        measured=measured,
        compare=args.compare,
        calibration=calibration,
        trials=trials,
        script=args.script,
        flags={name: value for name, value in vars(args).items() if name not in ("script", "explicit")},
    )
    note_few_steps(job)
    return job


def check_effects(args: Namespace) -> None:
    """Refuses a flag of ours that would do nothing or cannot do it, and prints a note for one of Wan2.1's script or of
    the released MagCache one, whose command lines run unchanged."""
    for name, value in vars(args).items():
        if value == "" and name != "prompt":
            raise Refused(f"--{name} is empty: leave it out, or give it a value")
    cached = args.use_magcache or args.magcache_plan
    idle = {} if args.use_prompt_extend else dict.fromkeys(OF_EXTENSION, "use_prompt_extend")
    idle |= {} if cached else dict.fromkeys(OF_RULE, "use_magcache")
    for name in sorted(args.explicit & idle.keys()):
        print(f"note: --{name} has no effect without --{idle[name]}")
    for name in backend().not_used:
        if getattr(args, name) is not None:
            print(f"note: --{name} is not used by task {args.task}")
    for name in ("mag_ratios", "magcache_speedup", "magcache_quality", "magcache_offload", "compare"):
        if getattr(args, name) and not cached:
            raise Refused(f"--{name} needs --use_magcache")
    if args.overwrite and not args.prompt_file:
        raise Refused("--overwrite needs --prompt_file: a single video is always made")
    for package in ("skimage", "matplotlib", "imageio_ffmpeg") if args.compare else ():
        need_package(package, "--compare")


def make_machine(args: Namespace) -> Machine:
    """Refuses flags that the `wan` here lacks, or that the number of processes does not fit, where there is no plan."""
    for flag in backend().lacks:
        if (value := getattr(args, flag)) is True or value not in (None, False, 1):
            whose = f"the one here is {backend().release}'s own"
            raise Refused(f"--{flag} needs the wan package of magcache_generate.py; {whose}")
    given = {field.name: getattr(args, field.name) for field in fields(Machine) if hasattr(args, field.name)}
    if args.convert_model_dtype and "dit_dtype" not in backend().lacks:
        given["dit_dtype"] = args.dit_dtype or "bfloat16"
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
    given |= {"ckpt_dir": args.ckpt_dir or args.task, "lora": tuple(map(Lora.from_flag, args.lora or ()))}
    if args.offload_model is None:
        given["offload_model"] = world == 1
    return Machine(**given, world=world)


def check_processes(args: Namespace, world: int) -> None:
    """Refuses flags for several GPUs that so many processes do not fit, and a run without a checkpoint folder."""
    size, sharded = args.ulysses_size * args.ring_size, [f for f in ("t5_fsdp", "dit_fsdp") if getattr(args, f)]
    if world == 1 and sharded:
        start = "start them with torchrun --nproc_per_node N"
        raise Refused(f"--{sharded[0]} shards over several processes: {start}")
    if world % size:
        sizes = f"--ulysses_size {args.ulysses_size} and --ring_size {args.ring_size}"
        start = f"start them with torchrun --nproc_per_node {size}"
        raise Refused(f"{sizes} need a multiple of {size} processes, not {world}: {start}")
    if args.offload_model and sharded:
        print("note: --offload_model True does not move what --dit_fsdp and --t5_fsdp have sharded")
    if not args.ckpt_dir:
        raise Refused("--ckpt_dir is needed: the checkpoint folder, such as ./Wan2.1-T2V-1.3B")


def make_sampling(args: Namespace) -> Sampling:
    """Fills in the task's defaults."""
    task, frames = TASKS[args.task], args.frame_num
    if frames is not None and task.sources and args.src_video:
        print("note: --frame_num is not used with --src_video, whose own length decides")
        frames = None
    guidance = task.guidance if task.boundary else task.guidance[0]
    return Sampling(
        args.task,
        args.size,
        task.frames if frames is None else frames,
        args.sample_solver,
        task.steps if args.sample_steps is None else args.sample_steps,
        task.shifts.get(args.size, task.shift) if args.sample_shift is None else args.sample_shift,
        args.sample_guide_scale if "sample_guide_scale" in args.explicit else guidance,
    )


def read_lines(args: Namespace, sampling: Sampling, base_seed: int) -> tuple[prompts.Request, ...]:
    """Returns the lines of --prompt_file, each with its own image and negative prompt, or those of the flags."""
    if args.prompt is not None:
        raise Refused("--prompt and --prompt_file exclude each other")
    with refusing(ValueError, about="--prompt_file: "):
        lines = prompts.read_prompts(args.prompt_file, base_seed)
    file, takes_image = f"--prompt_file {args.prompt_file}", "image" in sampling.spec.inputs
    if not takes_image and any(line.image for line in lines):
        raise Refused(f"{file} names images, but task {args.task} takes none")
    image = args.image if takes_image else None
    lines = tuple(replace(r, image=r.image or image, n_prompt=r.n_prompt or args.n_prompt) for r in lines)
    lacking = [line.number for line in lines if not line.image]
    if takes_image and lacking and (sampling.spec.needs_images or len(lacking) < len(lines)):
        raise Refused(f"{file}: prompt {lacking[0]} has no image, and there is no --image")
    return lines


def make_cache(args: Namespace, sampling: Sampling) -> CacheSettings | None:
    with refusing(ValueError):
        rule = magcache.Settings(args.magcache_thresh, args.magcache_K, args.retention_ratio)
    wanted = args.use_magcache or args.magcache_plan
    if wanted and args.magcache_calibration:
        flag = "use_magcache" if args.use_magcache else "magcache_plan"
        first = "calibrate first, then use the table"
        raise Refused(f"--{flag} and --magcache_calibration exclude each other: {first}")
    speedup, quality, of_rule = args.magcache_speedup, args.magcache_quality, args.explicit.intersection(OF_RULE)
    ways = [f for f in ("magcache_quality", "magcache_speedup") if getattr(args, f) is not None] + sorted(of_rule)[:1]
    if ways[1:]:
        raise Refused(f"--{ways[0]} chooses the steps in place of --{ways[1]}: give one of them")
    if quality is not None and not 0 < quality < math.inf:
        raise Refused(f"--magcache_quality must be a positive number of dB, got {quality}")
    if sampling.spec.boundary and speedup is None and (wanted or args.magcache_calibration):
        none = "has two transformers, and there are no ratios for two"
        raise Refused(f"task {args.task} {none}: give --use_magcache --magcache_speedup X")
    return CacheSettings(rule, speedup, args.mag_ratios, args.magcache_offload, quality) if wanted else None


def make_calibration(args: Namespace, sampling: Sampling) -> tuple[Path | None, tuple[float, ...]]:
    """Returns the file of the ratios that the run measures, None if it does not, and the speed-ups that it tries."""
    if not args.magcache_calibration:
        return None, ()
    if sampling.sample_steps < 2:
        raise Refused("--magcache_calibration compares steps, so it needs --sample_steps 2 or more")
    if sampling.calls_per_step == 1 and backend().frugal:
        one = "with --sample_guide_scale 1 there is only one"
        raise Refused(f"--magcache_calibration measures both calls of a step, and {one}")
    trials = () if args.magcache_calibration is True else read_speedups(args.magcache_calibration, sampling)
    folder = Path("calibration")
    if args.save_file:
        folder = Path(args.save_file) if args.prompt_file else Path(args.save_file).parent
    video = f"{sampling.size.replace('*', 'x')}_{sampling.frame_num}f_{sampling.sample_steps}steps"
    return folder / f"{sampling.task}_{video}_{datetime.now():%Y%m%d_%H%M%S}.json", trials
