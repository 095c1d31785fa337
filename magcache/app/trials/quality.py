"""Which trials a calibration is asked for, and what those of a model's table say of a run: which speed-up a quality
takes, and what to expect of it."""

from dataclasses import asdict, replace

import magcache
from magcache import trials
from magcache.app.errors import Refused
from magcache.app.job import TRIAL_BUDGET, CacheSettings, Job, Sampling
from magcache.schedule import CALLS_PER_STEP
from magcache.speedup import DEFAULT, FEWEST, computed_steps
from magcache.trials import ANOTHER


def read_speedups(text: str, sampling: Sampling) -> tuple[float, ...]:
    """Reads the value of --magcache_calibration: speed-ups, in rising order. Raises Refused."""
    steps = sampling.sample_steps
    try:
        speedups = sorted(float(part) for part in text.split(","))
    except ValueError as fault:
        raise Refused(f"--magcache_calibration takes speed-ups such as 2,2.5,3,4, got {text!r}") from fault
    for speedup in speedups:
        if not 1 < speedup <= steps:
            raise Refused(f"--magcache_calibration takes speed-ups above 1 and at most {steps}, got {speedup:g}")
    counts = [computed_steps(steps, speedup) for speedup in speedups]
    if len(set(counts)) < len(counts):
        same = f"speed-ups that compute the same number of {steps} steps: {counts}"
        raise Refused(f"--magcache_calibration {text} names {same}")
    cost = sum(trials.forecast(speedup, sampling.noise_levels, DEFAULT).cost for speedup in speedups)
    others = trials.candidates(speedups, sampling.noise_levels)[1:]
    cost += sum(way.cost for way in others) / 2  # at most half of the prompts try them
    runs = cost / (CALLS_PER_STEP * steps)
    if runs > TRIAL_BUDGET:
        dear = f"{runs:.2f} uncached runs per prompt, more than {TRIAL_BUDGET}"
        raise Refused(f"--magcache_calibration {text} would cost {dear}: leave out the smallest speed-ups")
    return tuple(speedups)


def use_trials(cache: CacheSettings, measured: "magcache.trials.Measured | None", steps: int) -> CacheSettings:
    """Takes from trials what a speed-up or a quality needs: the constants of the rule, and for a quality the speed-up.
    Raises Refused if they promise the quality at no speed-up."""
    if not measured:
        return cache
    if cache.quality is not None:
        speedup = measured.fastest(cache.quality, steps)
        if speedup is None:
            best = max(measured.speedups, key=lambda speedup: measured.expect(speedup).promised)
            raise Refused(
                f"--magcache_quality {cache.quality:g} is promised at no speed-up that table {measured.table.name} has "
                f"tried: {measured.expect(best).promised:.1f} dB at {best:.3g}x is the most"
            )
        cache = replace(cache, speedup=speedup)
    return replace(cache, constants=measured.constants)


def expectation(job: Job) -> "magcache.trials.Expectation | None":
    """Returns what to expect of the run; None without trials, for other steps, shift or solver than theirs, and beyond
    the speed-ups that they tried."""
    if not job.measured:
        return None
    measured_on, run = job.measured.table.measured_on, asdict(job.sampling)
    if any(measured_on.get(key, run[key]) != run[key] for key in ("sample_steps", "sample_shift", "sample_solver")):
        return None
    return job.measured.expect(job.schedule.speedup_bound)


def note_few_steps(job: Job) -> None:
    """Says where the run, by a LoRA for few steps, or a speed-up leaves so few computed steps that fewer sampler steps
    come closer, unless trials tell."""
    steps, computed = job.schedule.steps, job.schedule.computed // job.schedule.calls_per_step
    if not job.cache or computed >= FEWEST or expectation(job):
        return
    worth = f"a cache is worth it from {FEWEST} computed steps on"
    if job.machine.lora and steps < FEWEST:
        print(f"note: {steps} steps leave a cache nothing to spare; leave it out ({worth})")
    elif job.cache.speedup is not None:
        print(
            f"note: {computed} computed steps are too few for forecasts between; --sample_steps {computed} without "
            f"a cache takes as long and should come closer ({worth})"
        )


def quality_lines(job: Job) -> list[str]:
    """Lays out the whole curve that the job's trials have measured, for the plan."""
    measured, steps = job.measured, job.sampling.sample_steps
    name, prompts = measured.table.name, len(measured.prompts)
    fewer = {row.calls: row for row in measured.others if row.method == "fewer steps"}
    rows = [("speed-up", "calls", "pooled", "nine of ten", "others", "mean", "ahead of fewer steps")]
    rows += [curve_row(measured, forecast, fewer.get(forecast.calls)) for forecast in measured.forecasts]
    said, chosen = expectation(job) or "not tried at these settings", measured.constants
    lines = [
        f"quality   {said}",
        f"trials    latent PSNR in dB by table {name}, of {prompts_in_words(prompts)} at {measured.steps} steps; "
        f"pooled: of all videos' mean squared error; others: share below {ANOTHER:.0f} dB; the last column: pooled, "
        "at as many calls, on the prompts that tried both",
        *(" " * 10 + "".join(f"{cell:<13}" for cell in row) for row in rows),
    ]
    if prompts >= trials.ENOUGH:
        values = f"floor {chosen.floor:g}, early {chosen.early:g}, decay {chosen.decay:g}"
        kept = " (the defaults)" if chosen == DEFAULT else ""
        lines.append(f"          the trials chose these constants of the speed-up rule: {values}{kept}")
    for row in measured.others:
        if row.method == "thresh":
            thresh, K, share = (f"{row.settings[key]:g}" for key in ("thresh", "K", "retention_ratio"))
            found = f"{row.pooled:.1f} dB on {prompts_in_words(len(row.psnr))}"
            if ahead := measured.ahead(row):
                found = f"forecasts are ahead by {lead_in_words(ahead)}"
            setting = f"MagCache as published, thresh {thresh}, K {K}, retention {share}"
            lines.append(f"          {setting}, {row.calls} calls: {found}")
    for row in measured.better_without_cache():
        speedup, count = measured.speedup_of(row), int(row.settings["steps"])
        share = f"{count} of {measured.steps}" if steps == measured.steps else f"{count / measured.steps:.0%} of the"
        line = f"at {speedup:.3g}x fewer sampler steps come closer than any cache: leave it out and take {share} steps"
        lines.append(f"          {line}")
    return lines


def lead_in_words(ahead: tuple[float, int]) -> str:
    lead, prompts = ahead
    return f"{lead:.1f} on {prompts_in_words(prompts)}"


def prompts_in_words(count: int) -> str:
    return f"{count} prompt{'s' if count > 1 else ''}"


def curve_row(measured, forecast, fewer) -> tuple[str, ...]:
    """Cells of a speed-up that was tried; fewer: the same calls by fewer sampler steps, if these were tried."""
    speedup = measured.speedup_of(forecast)
    expected, ahead = measured.expect(speedup), fewer and measured.ahead(fewer)
    cells = (f"{speedup:.2f}x", str(forecast.calls), f"{expected.pooled:.1f}", f"{expected.promised:.1f}")
    cells = (*cells, f"{expected.others:.0%}", f"{expected.mean:.1f}")
    return (*cells, lead_in_words(ahead) if ahead else "not tried")
