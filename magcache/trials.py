"""Trials: how close runs that spare calls come to the uncached run of the same prompt and noise, measured in the final
latents; and what that says of a speed-up. No torch.

They are part of a calibration, and stand in its table.
"""

import math
import random
import statistics
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile

from magcache.ratios import RatioTable
from magcache.schedule import CALLS_PER_STEP, Schedule
from magcache.speedup import DEFAULT, Constants, plan_speedup
from magcache.threshold import Settings, plan_threshold

MEASURE = {
    "psnr": "dB, of the final latent against the uncached one; peak: that one's largest minus its smallest value",
    "relative_error": "root of the mean squared error over that of the uncached latent's mean square",
}
SETTINGS = {  # of a trial, by its method
    "forecast": ("speedup", "floor", "early", "decay"),
    "fewer steps": ("steps",),
    "thresh": ("thresh", "K", "retention_ratio"),
}
# of the speed-up rule, tried against the ones that hold without a calibration, which come first
CANDIDATES = (
    DEFAULT,
    Constants(floor=0.008, early=0.0, decay=0.25),  # for models that forgive what is wrong early
    *(Constants(early=early) for early in (0.25, 0.4, 0.875)),
    *(Constants(decay=decay) for decay in (0.25, 1.0)),
)
ANOTHER = 30.0  # dB: below it the eye sees another video
CLEAR = 0.84  # share of resampled prompts by which a candidate is clearly ahead: one standard error
EQUAL = 150.0  # dB, of equal latents
ENOUGH = 8  # prompts, to choose constants by; a few agree by chance


@dataclass
class Trial:
    """One way to spare calls, and how close it came. method: "forecast" (the speed-up rule), "fewer steps" (of the
    sampler, without a cache) or "thresh" (the MagCache rule). settings: the method's, by the names in `SETTINGS`.
    calls: computed ones. schedule: of its runs; None for a trial that was read. psnr, relative_error: the `closeness`
    of the prompts that tried it, by their numbers."""

    method: str
    settings: dict[str, float]
    calls: int
    schedule: Schedule | None = None
    psnr: dict[int, float] = field(default_factory=dict)
    relative_error: dict[int, float] = field(default_factory=dict)

    @property
    def known(self) -> tuple[bool, ...]:
        """Says for every call at the start, which the uncached run makes as well, whether its output there is all that
        is needed, so that the call need not compute. Fewer steps share only the noise of the first step; thresh shares
        its retained steps, but the last of these has to leave a residual."""
        schedule = self.schedule
        if self.method == "forecast":
            return tuple(True for _ in takewhile(lambda reused: not reused, schedule.reuse))
        steps = 1 if self.method == "fewer steps" else Settings(**self.settings).first_free_step(schedule.steps)
        return tuple(not used for used in schedule.used_later[: CALLS_PER_STEP * steps])

    @property
    def cost(self) -> int:
        """Calls that a run computes."""
        return self.calls - sum(self.known)

    @property
    def pooled(self) -> float | None:
        """`pooled` PSNR over the prompts that tried it, None where none did."""
        return pooled(self.psnr.values()) if self.psnr else None

    def add(self, prompt: int, close: tuple[float, float]) -> None:
        self.psnr[prompt], self.relative_error[prompt] = round(close[0], 2), float(f"{close[1]:.4g}")


def forecast(speedup: float, sigmas: Sequence[float], constants: Constants) -> Trial:
    """Makes a trial of the speed-up rule. sigmas: noise levels of the steps, see `magcache.noise_levels`."""
    schedule = plan_speedup(len(sigmas), speedup, sigmas=sigmas, constants=constants)
    return Trial("forecast", {"speedup": speedup} | asdict(constants), schedule.computed, schedule)


def fewer_steps(count: int) -> Trial:
    schedule = Schedule((None,) * CALLS_PER_STEP * count, target="output")
    return Trial("fewer steps", {"steps": count}, schedule.computed, schedule)


def by_ratios(ratios: Sequence[float], steps: int, rule: Settings) -> Trial:
    schedule = plan_threshold(ratios, steps, **asdict(rule))
    return Trial("thresh", asdict(rule), schedule.computed, schedule)


def candidates(speedups: Sequence[float], sigmas: Sequence[float]) -> list[Trial]:
    """Returns what constants are chosen by: all of `CANDIDATES`, at the middle one of the speed-ups."""
    return [forecast(speedups[len(speedups) // 2], sigmas, constants) for constants in CANDIDATES]


def closeness(latent, truth) -> tuple[float, float]:
    """Returns (PSNR in dB, relative error) of a latent against the uncached one, tensors of equal shape: see `MEASURE`.
    Equal latents have `EQUAL`. Raises ValueError if a number is not finite."""
    latent, truth = latent.double(), truth.double()
    error, power = float((latent - truth).square().mean()), float(truth.square().mean())
    if not math.isfinite(error + power):
        raise ValueError("a latent holds numbers that are not finite")
    peak = float(truth.max() - truth.min())
    psnr = 10 * math.log10(peak**2 / error) if error and peak else EQUAL
    return min(psnr, EQUAL), math.sqrt(error / power) if power else 0.0


def relative_power(psnr: float) -> float:
    """Returns the mean squared error over the squared peak."""
    return 10 ** (-psnr / 10)


def pooled(psnrs: Collection[float]) -> float:
    """Returns the PSNR, in dB, of the mean of the videos' squared errors, each over its squared peak. It is dominated
    by the videos that became others, while a mean of PSNRs is dominated by those that nobody can tell apart."""
    return -10 * math.log10(statistics.fmean(map(relative_power, psnrs)))


def share_of_others(psnrs: Sequence[float]) -> float:
    """Returns the share of the videos below `ANOTHER`."""
    return sum(psnr < ANOTHER for psnr in psnrs) / len(psnrs)


def choose(forecasts: Sequence[Trial]) -> Constants:
    """Returns the one of `CANDIDATES`, by their forecasts, with the least pooled error over the prompts that tried all
    of them, if it is clearly ahead of the first, else the first."""
    errors = [[relative_power(row.psnr[prompt]) for prompt in tried_by_all(forecasts)] for row in forecasts]
    best = min(range(len(forecasts)), key=lambda i: sum(errors[i]))
    return CANDIDATES[best if is_clear([a - b for a, b in zip(errors[0], errors[best], strict=True)]) else 0]


def is_clear(leads: Sequence[float]) -> bool:
    """Whether the sum of these, one for each prompt, is positive in at least `CLEAR` of 1,000 resamples of them."""
    rng = random.Random(0)
    return bool(leads) and sum(sum(rng.choices(leads, k=len(leads))) > 0 for _ in range(1000)) >= 1000 * CLEAR


def tried_by_all(rows: Sequence[Trial]) -> tuple[int, ...]:
    """Returns the numbers of the prompts that tried all of these ways."""
    return tuple(sorted(set.intersection(*(set(row.psnr) for row in rows))))


def entry(rows: Sequence[Trial], prompts: Sequence[str], seeds: Sequence[int], constants: Constants) -> dict:
    """What a table holds. prompts, seeds: by number; the lists have an entry for each, None where it was not tried."""
    written = []
    for row in rows:
        found = {"psnr": row.psnr, "relative_error": row.relative_error}
        lists = {name: [values.get(prompt) for prompt in range(len(prompts))] for name, values in found.items()}
        written.append({"method": row.method} | row.settings | {"calls": row.calls} | lists)
    return {"measure": MEASURE, "prompts": prompts, "seeds": seeds, "constants": asdict(constants), "rows": written}


@dataclass(frozen=True)
class Expectation:
    """Latent PSNR in dB, see `MEASURE`. pooled: see `pooled`. promised: what nine of ten videos reach. others: the
    share of videos below `ANOTHER`. mean: over the prompts. prompts: how many tell."""

    pooled: float
    promised: float
    others: float
    mean: float
    prompts: int

    def __str__(self) -> str:
        guess = f" (a guess from {self.prompts})" if self.prompts < 9 else ""
        return (
            f"{self.promised:.1f} dB or more in nine of ten videos{guess}, {self.others:.0%} below {ANOTHER:.0f} dB "
            f"(another video), {self.pooled:.1f} dB pooled (of the mean squared error of all)"
        )


@dataclass(frozen=True)
class Measured:
    """What a table's trials say. steps: sampling steps of its runs. constants: chosen for the speed-up rule. forecasts:
    those with them, the slowest first; others: fewer steps and thresh. prompts: numbers of those with all forecasts."""

    table: RatioTable
    steps: int
    constants: Constants
    forecasts: tuple[Trial, ...]
    others: tuple[Trial, ...]
    prompts: tuple[int, ...]

    def speedup_of(self, row: Trial) -> float:
        """Returns all calls over the row's computed calls."""
        return CALLS_PER_STEP * self.steps / row.calls

    @property
    def speedups(self) -> list[float]:
        """The speed-ups of the forecasts, rising."""
        return [self.speedup_of(row) for row in self.forecasts]

    def psnr_at(self, speedup: float, prompt: int) -> float:
        """Returns a prompt's PSNR at a speed-up within those that were tried, on straight lines between them."""
        at, rows = self.speedups, self.forecasts
        right = min(bisect_right(at, speedup), len(at) - 1)
        left = max(right - 1, 0)
        share = (speedup - at[left]) / (at[right] - at[left]) if left < right else 0.0
        return rows[left].psnr[prompt] * (1 - share) + rows[right].psnr[prompt] * share

    def expect(self, speedup: float) -> Expectation | None:
        """Returns what to expect at a speed-up; None beyond the slowest and the fastest that were tried.

        The promise is the lower tenth of the prompts' PSNRs, the quantile at (prompts + 1) / 10 in their order: another
        video is above the k-th lowest of n with chance 1 - k / (n + 1), however PSNRs are distributed. With less than
        nine prompts the line through the two lowest is followed beyond them; one alone is its own promise. No speed-up
        is promised more than a slower one.
        """
        at = self.speedups
        if not at or not at[0] - 1e-6 <= speedup <= at[-1] + 1e-6:
            return None
        until = (speedup, *(slower for slower in at if slower < speedup))
        return expectation_of(*([self.psnr_at(each, prompt) for prompt in self.prompts] for each in until))

    def fastest(self, psnr: float, steps: int) -> float | None:
        """Returns the largest speed-up of a run of so many steps for which a PSNR is promised, None without one."""
        for count in range(1, steps + 1):
            expected = self.expect(steps / count)
            if expected and expected.promised >= psnr:
                return steps / count
        return None

    def ahead(self, row: Trial) -> tuple[float, int] | None:
        """Returns by how many dB of pooled PSNR forecasts at equal calls were ahead of another way, over the prompts
        that tried both, and how many prompts these are; None if there are none, or nothing was tried on both sides of
        its speed-up."""
        if not (pairs := self.pairs(row)):
            return None
        forecast, other = (pooled(psnrs) for psnrs in zip(*pairs, strict=True))
        return forecast - other, len(pairs)

    def pairs(self, row: Trial) -> list[tuple[float, float]]:
        """Returns the PSNRs of forecasts at equal calls and of another way, of the prompts that tried both; none where
        nothing was tried on both sides of its speed-up."""
        speedup = self.speedup_of(row)
        common = [prompt for prompt in self.prompts if prompt in row.psnr] if self.expect(speedup) else []
        return [(self.psnr_at(speedup, prompt), row.psnr[prompt]) for prompt in common]

    def better_without_cache(self) -> list[Trial]:
        """Returns the rows of fewer sampler steps that clearly come closer than forecasts at equal calls, and closer
        than any other cache with no more computed calls."""
        found = []
        for row in (row for row in self.others if row.method == "fewer steps"):
            thresh = [o.pooled for o in self.others if o.method == "thresh" and o.calls <= row.calls and o.pooled]
            leads = [relative_power(forecast) - relative_power(plain) for forecast, plain in self.pairs(row)]
            if is_clear(leads) and row.pooled > max(thresh, default=-math.inf):
                found.append(row)
        return found


def expectation_of(psnrs: Sequence[float], *slower: Sequence[float]) -> Expectation:
    """Returns what to expect. slower: PSNRs at smaller speed-ups, none of which promises less."""
    promised = min(map(lower_tenth, (psnrs, *slower)))
    return Expectation(pooled(psnrs), promised, share_of_others(psnrs), statistics.fmean(psnrs), len(psnrs))


def lower_tenth(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10)[0] if len(values) > 1 else values[0]


def read_trials(table: RatioTable) -> Measured | None:
    """Reads the trials of a table; None if it holds none, or if no prompt went through all of them. Raises ValueError
    with one line if they cannot be read."""
    if table.trials is None:
        return None
    try:
        constants = Constants(**table.trials["constants"])
        rows = [read_trial(row) for row in table.trials["rows"]]
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise ValueError(f"the trials of the ratio table {table.path} cannot be read: {fault!r}") from None
    chosen = asdict(constants).items()
    forecasts = [row for row in rows if row.method == "forecast" and row.settings.items() >= chosen]
    forecasts.sort(key=lambda row: -row.calls)
    if not (forecasts and (prompts := tried_by_all(forecasts))):
        return None
    others = tuple(row for row in rows if row.method != "forecast")
    return Measured(table, table.steps, constants, tuple(forecasts), others, prompts)


def read_trial(row: dict) -> Trial:
    settings = {name: float(row[name]) for name in SETTINGS[row["method"]]}
    psnr = {prompt: float(value) for prompt, value in enumerate(row["psnr"]) if value is not None}
    if not all(map(math.isfinite, psnr.values())) or not row["calls"] > 0:
        raise ValueError(f"a row of {row['method']} holds no measurements")
    return Trial(row["method"], settings, int(row["calls"]), psnr=psnr)
