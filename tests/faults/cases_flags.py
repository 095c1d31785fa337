"""Flags that contradict each other, lead nowhere, make no sense or would do nothing, and lines of prompt files."""

from commands import DEMO, DEMO_I2V

from faults.case import Case
from faults.cases_files import PICTURE, TINY, TINY_I2V, damaged, file_of, flags_of, original


def torchrun(**changed: str) -> dict[str, str]:
    """The variables of its first process of two."""
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    return {name: value for name, value in (variables | changed).items() if value is not None}


ONE = ["--task", "t2v-tiny", "--size", "64*64", "--ckpt_dir", DEMO, "--prompt", "a", "--sample_steps", 2]
CACHED = [*ONE, "--use_magcache"]
LONG, TRIALS = ["--sample_steps", 50], [*ONE, "--sample_steps", 50, "--magcache_calibration"]
FAR = ["--task", "t2v-14B", "--ckpt_dir", "x", "--prompt", "a"]
PLAN = ["--task", "t2v-14B", "--magcache_plan"]
FLF2V = ["--task", "flf2v-14B", "--size", "832*480", "--ckpt_dir", "x", "--prompt", "a"]
VACE = flags_of("vace", "x")
EXTEND = [*ONE, "--use_prompt_extend"]

FLAGS = {
    **{
        f"--{flag} without the cache": ([*ONE, f"--{flag}", *value], f"--{flag} needs --use_magcache")
        for flag, value in {"mag_ratios": ["t2v-tiny"], "magcache_speedup": [2], "magcache_quality": [40],
                            "magcache_offload": [], "compare": []}.items()
    },
    **{
        f"--{flag} is empty": ([*CACHED, f"--{flag}", ""], f"--{flag} is empty")
        for flag in ("mag_ratios", "save_file", "prompt_file", "image", "ckpt_dir", "magcache_plan")
    },
    "--overwrite of one video": ([*ONE, "--overwrite"], "--overwrite needs --prompt_file"),
    "a speed-up and the threshold's default": ([*CACHED, "--magcache_speedup", 2, "--magcache_thresh", 0.12],
                                               "in place of --magcache_thresh: give one of them"),
    "a speed-up and a table": ([*CACHED, "--magcache_speedup", 2, "--mag_ratios", "t2v-14B"],
                               "holds no trials, and --magcache_speedup takes nothing else of a table"),
    "a speed-up and a quality": ([*CACHED, "--magcache_speedup", 2, "--magcache_quality", 40],
                                 "--magcache_quality chooses the steps in place of --magcache_speedup: give one"),
    "a quality and a threshold": ([*CACHED, "--magcache_quality", 40, "--magcache_K", 2],
                                  "--magcache_quality chooses the steps in place of --magcache_K"),
    "a quality that is no number": ([*CACHED, "--magcache_quality", "nan"], "must be a positive number of dB, got nan"),
    "a quality without trials": ([*FAR, "--use_magcache", "--magcache_quality", 40],
                                 "t2v-14B holds no trials; measure one with the same command"),
    "a quality by no table": ([*CACHED, "--magcache_quality", 40, "--mag_ratios", "nothing"],
                              "--magcache_calibration 2,2.5,3,4 in place of"),
    "a speed-up beyond the steps": ([*CACHED, "--magcache_speedup", 3], "must be between 1 and 2"),
    "a speed-up below 1": ([*CACHED, "--magcache_speedup", 0.5], "must be between 1 and 2"),
    "K below 0": ([*ONE, "--magcache_K", -1], "K must be a whole number >= 0, got -1"),
    "a threshold that is no number": ([*CACHED, "--magcache_thresh", "nan"], "thresh must be a finite number >= 0"),
    "too much retention": ([*CACHED, "--retention_ratio", 1.5], r"retention_ratio must be in \[0, 1\]"),
    "no such table": ([*CACHED, "--mag_ratios", "nothing"], "but --magcache_calibration in place of"),
    "a model without a table": ([*FLF2V, "--first_frame", PICTURE, "--last_frame", PICTURE, "--use_magcache"],
                                "no ratio table fits task flf2v-14B .*, or name the table of another model"),
    "a plan without a table": (["--task", "flf2v-14B", "--magcache_plan"], "no ratio table fits task flf2v-14B"),
    "no table for 5B": (["--task", "ti2v-5B", "--magcache_plan"], "--magcache_speedup needs none"),
    "ratios of two transformers": (["--task", "t2v-A14B", "--magcache_plan"],
                                   "has two transformers, and there are no ratios for two: give --use_magcache"),
    "a step for two transformers": (["--task", "i2v-A14B", "--magcache_plan", "--magcache_speedup", 21],
                                    "speedup must be between 1 and 20, half of the steps, got 21"),
    "trials of text": ([*TRIALS, "fast"], "takes speed-ups such as"),
    "trials of nothing": ([*TRIALS, ""], "--magcache_calibration is empty"),
    "trials of no speed-up": ([*TRIALS, "1,2"], "above 1 and at most 50, got 1"),
    "trials of no number": ([*TRIALS, "2,nan"], "above 1 and at most 50, got nan"),
    "trials of equal steps": ([*TRIALS, "3,3.05"], r"compute the same number of 50 steps: \[16, 16\]"),
    "trials for too much": ([*TRIALS, "1.2,1.3,1.4,1.5,1.6,2"], "uncached runs per prompt, more than 2.5: leave out"),
    "trials and constants for too much": ([*TRIALS, "1.5,1.75,2,2.5,3,4"], "would cost 2.58 uncached runs"),
    "a calibration of one step": ([*ONE, "--magcache_calibration", "--sample_steps", 1], "needs --sample_steps 2"),
    "a calibration of one call": ([*ONE, "--magcache_calibration", "--sample_guide_scale", 1], "there is only one"),
    "the cache and a calibration": ([*CACHED, "--magcache_calibration"], "exclude each other"),
    "a plan of a calibration": ([*PLAN, "--magcache_calibration"], "exclude each other"),
    "a comparison of a calibration": ([*ONE, "--magcache_calibration", "--compare"], "needs --use_magcache"),
    "an unknown dtype": ([*ONE, "--dit_dtype", "int8"], "invalid choice"),
    "an unknown attention": ([*ONE, "--attn_backend", "quick"], "there is no attention backend 'quick'"),
    "a plan of no processes": ([*PLAN, "--ulysses_size", 0], "must be at least 1, got 0 and 1"),
    "two kinds of prompts": ([*TINY, "--prompt_file", "x", "--prompt", "a"], "exclude each other"),
    **{
        f"shift {shift}": ([*ONE, "--sample_shift", shift], "--sample_s(hift|teps)")
        for shift in ("1e-300", "1e-46", "1e30", "-1", "nan")
    },
    "shift 1e-300 with DPM++": ([*ONE, "--sample_shift", "1e-300", "--sample_solver", "dpm++"], "float32"),
    "a flag cut short": ([*ONE, "--use_magcach"], "unrecognized arguments"),
    "a flag twice with a bad value": ([*ONE, "--sample_steps", 4, "--sample_steps", 0], "must be at least 1"),
    "steps that are no number": ([*ONE, "--sample_steps", "4.5"], "invalid int value"),
    "steps far": ([*FAR, "--sample_steps", 10**9], "at most 10000, got 1000000000"),
    "steps of 5000 digits": ([*FAR, "--sample_steps", "1" * 5000], "invalid int value"),
    "frames far": ([*FAR, "--frame_num", 40001], "at most 4093, as far as the models' positions go, got 40001"),
    "frames of 400 digits": ([*FAR, "--frame_num", 4 * 10**400 + 1], "and at most 4093"),
    "frames even": ([*FAR, "--frame_num", 80], r"--frame_num must be 4n\+1"),
    "frames of an image": ([*FAR, "--task", "t2i-14B", "--frame_num", 5], "makes one image: --frame_num must be 1"),
    "frames between two": ([*FLF2V, "--first_frame", PICTURE, "--last_frame", PICTURE, "--frame_num", 1],
                           "needs --frame_num 5 or more"),
    "a seed far": ([*ONE, "--base_seed", 10**20], "--base_seed must be below"),
    "guidance that is no number": ([*ONE, "--sample_guide_scale", "nan"], "--sample_guide_scale must be finite"),
    "no truth value": ([*ONE, "--offload_model", "maybe"], "expected a truth value"),
    "a size of others": ([*ONE, "--size", "1280*720"], "task t2v-tiny supports .*, not 1280"),
    "a size of none": ([*ONE, "--size", "7*7"], "invalid choice"),
    "a prompt that is no text": ([*ONE, "--prompt", "caf\udce9"], "argument --prompt: not valid UTF-8 text"),
    "no folder named": (["--prompt", "a"], "--ckpt_dir is needed"),
    "no such folder": ([*ONE, "--ckpt_dir", "nowhere"], "nowhere is not a folder"),
    "a model of another task": (lambda folder: flags_of("t2v", original("i2v")),
                                "holds a model of type i2v, but task t2v-1.3B needs t2v"),
    "a demo model for a real one": (["--task", "t2v-1.3B", "--size", "832*480", "--ckpt_dir", DEMO, "--prompt", "a"],
                                    "Wan2.1-T2V-tiny is that of t2v-tiny, not of t2v-1.3B"),
    "a result of another kind": ([*ONE, "--save_file", "film.png"], "must end in one of .mp4"),
    "a result that is a folder": ([*ONE, "--save_file", "out/"], "is a folder"),
    "a result of no name": ([*ONE, "--save_file", "/"], "is a folder"),
    "no image": ([*TINY_I2V, "--task", "i2v-14B", "--size", "832*480"], "task i2v-14B needs --image"),
    "no last frame": ([*FLF2V, "--first_frame", PICTURE], "needs --last_frame"),
    "an image that is missing": ([*TINY_I2V, "--image", "none.png"], "cannot read none.png: No such file"),
    "an image that is none": ([*TINY_I2V, "--image", __file__], "not an image of a known format"),
    "a source that is missing": (damaged(lambda f: None, "vace", "--src_video", "none.mp4"),
                                 "cannot read none.mp4: no such file"),
    "a mask alone": (damaged(lambda f: None, "vace", "--src_mask", PICTURE), "needs a source video"),
    "a reference that is missing": (damaged(lambda f: None, "vace", "--src_ref_images", f"{PICTURE},no.png"),
                                    "cannot read no.png"),
    "an expander that is none": ([*EXTEND, "--prompt_extend_model", DEMO], "is of type t2v, but must be a Qwen2.5"),
    "an expander that is missing": ([*EXTEND, "--prompt_extend_model", "no/such"], "neither a folder nor in the"),
    "a service without a key": ([*EXTEND, "--prompt_extend_method", "dashscope"], "set DASH_API_KEY"),
    "shards of one process": ([*ONE, "--dit_fsdp"], "start them with torchrun"),
    "parts for one process": ([*ONE, "--ulysses_size", 2], "need a multiple of 2 processes, not 1: start"),
}  # fmt: skip

# environment; flags beside those of the demo model
ENVIRONMENTS = {
    "world no number": (torchrun(WORLD_SIZE="abc"), "WORLD_SIZE=abc is not a whole number: start the processes with"),
    "rank no number": (torchrun(RANK="abc", LOCAL_RANK="abc"), "RANK=abc is not a whole number"),
    "port no number": (torchrun(MASTER_PORT="http"), "MASTER_PORT=http is not a whole number"),
    "port missing": (torchrun(MASTER_PORT=None), "WORLD_SIZE is set but MASTER_PORT is not"),
    "rank beyond": (torchrun(RANK="2"), "RANK=2 must be below WORLD_SIZE=2"),
    "too few processes": (torchrun(), "--ulysses_size 4 and --ring_size 1 need a multiple of 4 processes, not 2",
                          "--ulysses_size", 4),
    "address of nobody": (torchrun(MASTER_ADDR="nobody.invalid"), "MASTER_ADDR=nobody.invalid leads nowhere"),
    "no attention backend": ({"DIFFUSERS_ATTN_BACKEND": "quick"},
                             "there is no attention backend 'quick'; those that run here .*native"),
    "attention not installed": ({"DIFFUSERS_ATTN_BACKEND": "xformers"}, "attention backend xformers does not run here: "
                                "Xformers Attention backend 'xformers' is not usable"),
}  # fmt: skip

# content of a prompt file of the demo model, flags
PROMPTS = {
    "a JSON list": ('[{"prompt": "a dog"}]', "is a JSON list: write its objects without the brackets"),
    "a JSON list on many lines": ('[\n  {\n    "prompt": "a dog"\n  }\n]\n', "is a JSON list"),
    "plain text, then JSON": ('a cat\n{"prompt": "a dog"}', "line 2: this is JSON, but the first line"),
    "JSON, then plain text": ('{"prompt": "a dog"}\n\na cat', "p.txt, line 3: not JSON"),
    "JSON, then a list": ('{"prompt": "a dog"}\n[1]', "line 2: must be an object"),
    "a prompt file of empty lines": ("\n \n\n", "p.txt holds no prompt"),
    "a prompt file that is no text": (b"K\xe4se", "--prompt_file: cannot read p.txt: it is not UTF-8 text"),
    "a line without a prompt": ('{"seed": 3}', 'there is no "prompt"'),
    "a prompt that is a list": ('{"prompt": ["a"]}', '"prompt" must be text, got'),
    "a prompt that is empty": ('{"prompt": "  "}', '"prompt" is empty'),
    "prompts nested": (f'{{"prompt": {"[" * 100_000}', "line 1: not JSON"),
    "half a character in JSON": ('{"prompt": "\\ud800"}', '"prompt" is not valid text'),
    "an unknown key": ('{"prompt": "a", "steps": 3}', '"steps" is not one of prompt, seed, image, save_file, n_prompt'),
    "a seed that is text": ('{"prompt": "a", "seed": "3"}', '"seed" must be a whole number'),
    "a seed that is true": ('{"prompt": "a", "seed": true}', '"seed" must be a whole number, got True'),
    "a seed that is a list": (f'{{"prompt": "a", "seed": {"[" * 500 + "]" * 500}}}', '"seed" must be a whole number'),
    "a seed below 0": ('{"prompt": "a", "seed": -1}', "between 0 and"),
    "a seed of 400 digits": (f'{{"prompt": "a", "seed": {10**400}}}', "seed must be between"),
    "NUL in a result": (r'{"prompt": "a", "save_file": "a\u0000.mp4"}', 'line 1: "save_file" is not valid text'),
    "the same result twice": ('{"prompt": "a", "save_file": "x.mp4"}\n{"prompt": "b", "save_file": "./x.mp4"}',
                              "prompts 1 and 2 of p.txt would both write x.mp4"),
    "a result where another's comparison goes":
        ('{"prompt": "a", "save_file": "x_uncached.mp4"}\n{"prompt": "b", "save_file": "x.mp4"}',
         "prompts 1 and 2 of p.txt would both write x_uncached.mp4", "--use_magcache", "--compare"),
    "a result in a line of another kind": ('{"prompt": "a", "save_file": "x.webm"}',
                                           "prompt 1: --save_file must end in one of"),
    "a file for many results": ("a\nb", "must be a folder", "--save_file", "film.mp4"),
    "an image in a line of text to video": ('{"prompt": "a", "image": "none.png"}', "but task t2v-tiny takes none"),
}  # fmt: skip


def image_lines(content: str, *flags) -> object:
    """A prompt file for a model that takes images."""
    i2v = ["--task", "i2v-tiny", "--ckpt_dir", DEMO_I2V]
    return file_of("p.jsonl", content, *i2v, "--prompt_file", "p.jsonl", *flags)


SECOND = '{"prompt": "a", "image": "none.png"}\n{"prompt": "b"}'
CASES = [
    *(Case(name, args, line) for name, (args, line) in FLAGS.items()),
    *(Case(name, [*TINY, *flags], line, env) for name, (env, line, *flags) in ENVIRONMENTS.items()),
    *(
        Case(name, file_of("p.txt", held, "--prompt_file", "p.txt", *f), line)
        for name, (held, line, *f) in PROMPTS.items()
    ),
    Case("no prompt file", [*TINY, "--prompt_file", "none.txt"], "--prompt_file: cannot read none.txt: No such file"),
    Case("a line without an image", image_lines(SECOND), "prompt 2 has no image, and there is no --image"),
    Case("a line whose image is missing", image_lines(SECOND, "--image", PICTURE), "cannot read none.png: No such"),
]
