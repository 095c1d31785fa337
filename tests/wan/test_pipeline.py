"""Text to video and text to image, every stage against the reference implementation."""

import pytest
import torch
from golden_data import read_json, write_checkpoint
from pipeline_stages import check_stages

import wan
from wan.configs import WAN_CONFIGS


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wan.WanT2V(WAN_CONFIGS["t2v-14B"], write_checkpoint("t2v", tmp_path_factory.mktemp("t2v")))


@pytest.mark.parametrize("name", ["t2v_a", "t2v_b", "t2v_c_image"])
def test_every_stage(pipeline, name):
    check_stages(pipeline, name, keys=("size", "frame_num"))


def test_at_a_guidance_of_1_only_cond_is_computed(pipeline):
    """The other call would have no weight, and the negative prompt no use."""
    videos, calls = [], []
    models = (pipeline.text_encoder.model, pipeline.model)
    hooks = [model.register_forward_hook(lambda model, *_: calls.append(model)) for model in models]
    for guide_scale, expected in ((1, [1, 3]), (1.000001, [2, 6])):
        calls.clear()
        videos.append(pipeline.generate("a", (32, 32), 5, sampling_steps=3, guide_scale=guide_scale, seed=1))
        assert [calls.count(model) for model in models] == expected
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(*videos, rtol=1e-4, atol=1e-4)


def test_sizes_that_cannot_be_tiled_are_refused(pipeline):
    """The reference crashes half way on these."""
    with pytest.raises(ValueError, match="multiples of 16"):
        pipeline.generate("a", size=(40, 24), frame_num=5)
    with pytest.raises(ValueError, match="4n\\+1"):
        pipeline.generate("a", size=(32, 32), frame_num=6)


@pytest.mark.parametrize("flag", ["use_usp", "dit_fsdp", "t5_fsdp"])
def test_sharing_needs_groups(tmp_path, flag):
    with pytest.raises(RuntimeError, match="start_groups"):
        wan.WanT2V(WAN_CONFIGS["t2v-14B"], tmp_path, **{flag: True})


def test_negative_prompts():
    for task, text in read_json("negative_prompts_per_task.json").items():
        assert WAN_CONFIGS[task].sample_neg_prompt == text
