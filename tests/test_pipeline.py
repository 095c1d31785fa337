"""Text to video and text to image, every stage against the reference implementation."""

import pytest
import torch
from golden_data import read_json, read_tensors, write_checkpoint

import wan
from wan.configs import WAN_CONFIGS

OUTPUTS = read_tensors("pipelines/outputs.safetensors")
CASES = {case["name"]: case for case in read_json("pipelines/cases.json") if case["task"] == "t2v"}
ARGUMENTS = ("size", "frame_num", "shift", "sample_solver", "sampling_steps", "guide_scale", "n_prompt", "seed")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wan.WanT2V(WAN_CONFIGS["t2v-14B"], write_checkpoint("t2v", tmp_path_factory.mktemp("t2v")))


@pytest.mark.parametrize("name", ["t2v_a", "t2v_b", "t2v_c_image"])
def test_every_stage(pipeline, name):
    case, calls, decoded = CASES[name], [], []
    model_hook = pipeline.model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args[0][0], kwargs, out[0])), with_kwargs=True
    )
    vae_decode = pipeline.vae.decode
    pipeline.vae.decode = lambda zs: decoded.extend(zs) or vae_decode(zs)
    try:
        video = pipeline.generate(case["prompt"], **{key: case[key] for key in ARGUMENTS})
    finally:
        model_hook.remove()
        del pipeline.vae.decode

    meta = next(entry for entry in read_json("pipelines/outputs.json") if entry["name"] == name)
    assert len(calls) == meta["n_model_calls"]
    assert calls[0][1]["seq_len"] == meta["seq_len"]
    assert [int(kwargs["t"]) for _, kwargs, _ in calls[::2]] == meta["timesteps"]
    torch.testing.assert_close(calls[0][0], OUTPUTS[f"{name}.noise"], rtol=0, atol=0)
    stages = {
        "context": (calls[0][1]["context"][0], 1e-4),
        "context_null": (calls[1][1]["context"][0], 1e-4),
        "pred_cond_step0": (calls[0][2], 2e-4),
        "pred_uncond_step0": (calls[1][2], 2e-4),
        "latent_after_step1": (calls[2][0], 1e-3),
        "final_latent": (decoded[0], 1e-3),
    }
    for key, (value, tolerance) in stages.items():
        if (name, key) != ("t2v_c_image", "context_null"):  # the same text as in t2v_a, stored once
            torch.testing.assert_close(value, OUTPUTS[f"{name}.{key}"], rtol=1e-3, atol=tolerance, msg=key)
    assert list(video.shape) == meta["video_shape"]
    torch.testing.assert_close(video[:, meta["video_frames_kept"]], OUTPUTS[f"{name}.video"], rtol=0, atol=3e-3)


def test_sizes_that_cannot_be_tiled_are_refused(pipeline):
    """The reference crashes half way on these."""
    with pytest.raises(ValueError, match="multiples of 16"):
        pipeline.generate("a", size=(40, 24), frame_num=5)
    with pytest.raises(ValueError, match="4n\\+1"):
        pipeline.generate("a", size=(32, 32), frame_num=6)


def test_several_gpus_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="one device"):
        wan.WanT2V(WAN_CONFIGS["t2v-14B"], tmp_path, dit_fsdp=True)


def test_negative_prompts():
    for task, text in read_json("negative_prompts_per_task.json").items():
        assert WAN_CONFIGS[task].sample_neg_prompt == text
