"""Compares every stage of a pipeline run with the reference implementation's."""

import torch
from golden_data import read_json, read_tensors

INPUTS, OUTPUTS = read_tensors("pipelines/inputs.safetensors"), read_tensors("pipelines/outputs.safetensors")
CASES = {case["name"]: case for case in read_json("pipelines/cases.json")}
_ARGUMENTS = ("shift", "sample_solver", "sampling_steps", "guide_scale", "n_prompt", "seed")


def check_stages(pipeline, name: str, *inputs, keys: tuple[str, ...], extra: dict | None = None) -> None:
    """Runs `pipeline.generate(prompt, *inputs, ...)` with the arguments of the golden case `name` and compares.

    keys: the arguments that only this task has. extra: golden name -> (function of the first call's arguments to the
    model, absolute tolerance) for stages that only this task has.
    """
    case, calls, decoded = CASES[name], [], []
    hook = pipeline.model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args[0][0], kwargs, out[0])), with_kwargs=True
    )
    vae_decode = pipeline.vae.decode
    pipeline.vae.decode = lambda zs: decoded.extend(zs) or vae_decode(zs)
    try:
        video = pipeline.generate(case["prompt"], *inputs, **{key: case[key] for key in (*keys, *_ARGUMENTS)})
    finally:
        hook.remove()
        del pipeline.vae.decode

    meta = next(entry for entry in read_json("pipelines/outputs.json") if entry["name"] == name)
    assert len(calls) == meta["n_model_calls"]
    assert calls[0][1]["seq_len"] == meta["seq_len"]
    assert [int(kwargs["t"]) for _, kwargs, _ in calls[::2]] == meta["timesteps"]
    stages = {
        "noise": (calls[0][0], 0),
        "context": (calls[0][1]["context"][0], 1e-4),
        "context_null": (calls[1][1]["context"][0], 1e-4),
        "pred_cond_step0": (calls[0][2], 2e-4),
        "pred_uncond_step0": (calls[1][2], 2e-4),
        "final_latent": (decoded[0], 1e-3),
    }
    if len(calls) > 2:
        stages["latent_after_step1"] = (calls[2][0], 1e-3)
    stages |= {key: (read(calls[0][1]), tolerance) for key, (read, tolerance) in (extra or {}).items()}
    for key, (value, tolerance) in stages.items():
        # the negative prompt's features are stored once for all cases that share it
        if (expected := OUTPUTS.get(f"{name}.{key}")) is None and key == "context_null":
            continue
        torch.testing.assert_close(value, expected, rtol=1e-3 if tolerance else 0, atol=tolerance, msg=key)
    assert list(video.shape) == meta["video_shape"]
    torch.testing.assert_close(video[:, meta["video_frames_kept"]], OUTPUTS[f"{name}.video"], rtol=0, atol=3e-3)
