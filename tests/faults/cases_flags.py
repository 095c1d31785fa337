"""Flags that contradict each other, lead nowhere or would do nothing, and prompt files that mix two formats."""

from collections.abc import Callable
from pathlib import Path

from faults.case import Case

DEMO = Path(__file__).parents[2] / "examples" / "Wan2.1-T2V-tiny"
ONE = ["--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--prompt", "a", "--sample_steps", 2]
BATCH = [*ONE[:6], "--sample_steps", 2, "--prompt_file", "prompts.txt"]
CACHED = [*ONE, "--use_magcache"]
PLAN = ["--task", "t2v-14B", "--magcache_plan"]


def prompts(content: str | bytes, *flags: str) -> Callable[[Path], list]:
    def prepare(folder: Path) -> list:
        (folder / "prompts.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
        return [*BATCH, *flags]

    return prepare


CASES = [
    *(
        Case(f"--{flag} without the cache", [*ONE, f"--{flag}", *value], 2, f"--{flag} needs --use_magcache")
        for flag, value in {
            "mag_ratios": ["t2v-tiny"],
            "magcache_speedup": [2],
            "magcache_quality": [40],
            "magcache_offload": [],
            "compare": [],
        }.items()
    ),
    Case("--overwrite of one video", [*ONE, "--overwrite"], 2, "--overwrite needs --prompt_file"),
    *(
        Case(f"--{flag} is empty", [*CACHED, f"--{flag}", ""], 2, f"--{flag} is empty")
        for flag in ("mag_ratios", "save_file", "prompt_file", "image", "src_video", "ckpt_dir", "magcache_plan")
    ),
    Case("a speed-up and a threshold", [*CACHED, "--magcache_speedup", 2, "--magcache_thresh", 0.1], 2,
         "in place of --magcache_thresh: give one of them"),
    Case("a speed-up and the threshold's default", [*CACHED, "--magcache_speedup", 2, "--magcache_thresh", 0.12], 2,
         "in place of --magcache_thresh: give one of them"),
    Case("a speed-up and a table", [*CACHED, "--magcache_speedup", 2, "--mag_ratios", "t2v-14B"], 2,
         "holds no trials, and --magcache_speedup takes nothing else of a table"),
    Case("a speed-up and a quality", [*CACHED, "--magcache_speedup", 2, "--magcache_quality", 40], 2,
         "--magcache_quality chooses the speed-up in place of --magcache_speedup"),
    Case("a quality and a threshold", [*CACHED, "--magcache_quality", 40, "--magcache_K", 2], 2,
         "--magcache_quality chooses the steps in place of --magcache_K"),
    Case("a quality that is no number", [*CACHED, "--magcache_quality", "nan"], 2, "must be a positive number of dB"),
    Case("trials of text", [*ONE, "--magcache_calibration", "fast"], 2, "takes speed-ups such as"),
    Case("an unknown dtype", [*ONE, "--dit_dtype", "int8"], 2, "invalid choice"),
    Case("an unknown attention", [*ONE, "--attn_backend", "quick"], 2, "there is no attention backend 'quick'"),
    Case("the cache and a calibration", [*CACHED, "--magcache_calibration"], 2, "exclude each other"),
    Case("a comparison of a calibration", [*ONE, "--magcache_calibration", "--compare"], 2, "needs --use_magcache"),
    Case("a plan of no processes", [*PLAN, "--ulysses_size", 0], 2, "must be at least 1, got 0 and 1"),
    Case("a plan of less than no processes", [*PLAN, "--ring_size", -3], 2, "must be at least 1, got 1 and -3"),
    Case("two kinds of prompts", [*BATCH, "--prompt", "a"], 2, "exclude each other"),
    *(
        Case(f"shift {shift}", [*ONE, "--sample_shift", shift], 2, "--sample_s(hift|teps)")
        for shift in ("1e-300", "1e-46", "1e30", "0", "-1", "inf", "nan")
    ),
    Case("shift 1e-300 with DPM++", [*ONE, "--sample_shift", "1e-300", "--sample_solver", "dpm++"], 2, "float32"),
    Case("a JSON list", prompts('[{"prompt": "a dog"}]'), 2, "is a JSON list: write its objects without the brackets"),
    Case("a JSON list on many lines", prompts('[\n  {\n    "prompt": "a dog"\n  }\n]\n'), 2, "is a JSON list"),
    Case("plain text, then JSON", prompts('a cat\n{"prompt": "a dog"}'), 2, "line 2: this is JSON, and the first line"),
    Case("JSON, then plain text", prompts('{"prompt": "a dog"}\na cat'), 2, "line 2: no JSON"),
    Case("a prompt file of empty lines", prompts("\n \n\n"), 2, "holds no prompt"),
    Case("a prompt file that is no text", prompts(b"\xff\xfe\xff"), 2, "--prompt_file: cannot read prompts.txt"),
    Case("a seed that is text", prompts('{"prompt": "a", "seed": "3"}'), 2, '"seed" must be a whole number'),
    Case("a seed that is true", prompts('{"prompt": "a", "seed": true}'), 2, '"seed" must be a whole number'),
    Case("a seed below 0", prompts('{"prompt": "a", "seed": -1}'), 2, "between 0 and"),
    Case("a prompt that is a list", prompts('{"prompt": ["a"]}'), 2, '"prompt" must be text'),
    Case("a prompt file without prompts", prompts('{"seed": 3}'), 2, 'there is no "prompt"'),
    Case("half a character in JSON", prompts('{"prompt": "\\ud800"}'), 2, "no valid text"),
    Case("the same result twice", prompts('{"prompt": "a", "save_file": "x.mp4"}\n{"prompt": "b", "save_file": '
         '"./x.mp4"}'), 2, "prompts 1 and 2 of prompts.txt would both write x.mp4"),
    Case("a result where another's comparison goes", prompts('{"prompt": "a", "save_file": "x_uncached.mp4"}\n'
         '{"prompt": "b", "save_file": "x.mp4"}', "--use_magcache", "--compare"), 2,
         "prompts 1 and 2 of prompts.txt would both write x_uncached.mp4"),
    Case("a flag cut short", [*ONE, "--use_magcach"], 2, "unrecognized arguments"),
    Case("a flag twice with a bad value", [*ONE, "--sample_steps", 4, "--sample_steps", 0], 2, "must be at least 1"),
    Case("steps that are no number", [*ONE, "--sample_steps", "4.5"], 2, "invalid int value"),
    Case("a speed-up beyond the steps", [*CACHED, "--magcache_speedup", 3], 2, "must be between 1 and 2"),
    Case("a speed-up below 1", [*CACHED, "--magcache_speedup", 0.5], 2, "must be between 1 and 2"),
]  # fmt: skip
