"""The text encoder against the reference implementation: features, cleaning, tokens."""

import json
import shutil

import pytest
import torch
from golden_data import GOLDEN, read_json, read_tensors

from wan.modules.t5 import T5EncoderModel, load_encoder, whitespace_clean


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(read_tensors("t5/models_t5_umt5-xxl-enc-bf16.safetensors"), path)
    return path


def test_features(checkpoint):
    model = load_encoder(checkpoint, torch.float32, "cpu")
    inputs, golden = read_tensors("t5/inputs.safetensors"), read_tensors("t5/outputs.safetensors")
    out = model(inputs["ids"], inputs["mask"]).last_hidden_state
    for row, expected, mask in zip(out, golden["out_masked"], inputs["mask"].bool(), strict=True):
        torch.testing.assert_close(row[mask], expected[mask], rtol=1e-4, atol=2e-5)
    unmasked = model(inputs["ids"][:1, :40]).last_hidden_state
    torch.testing.assert_close(unmasked, golden["out_nomask"], rtol=1e-4, atol=2e-5)


def test_sizes_come_from_the_tensors(checkpoint):
    hparams, config = read_json("t5/hparams.json"), load_encoder(checkpoint, torch.float32, "cpu").config
    assert config.vocab_size == hparams["vocab"]
    assert (config.d_model, config.d_kv * config.num_heads, config.d_ff) == (48, 64, 96)
    assert (config.num_layers, config.num_heads) == (hparams["num_layers"], hparams["num_heads"])


@pytest.mark.parametrize("case", read_json("numerics/clean.json"), ids=lambda case: ascii(case["in"][:12]))
def test_prompt_cleaning(case):
    assert whitespace_clean(case["in"]) == case["out"]


def test_the_embedding_is_one_parameter(checkpoint):
    model = load_encoder(checkpoint, torch.float32, "cpu")
    assert model.encoder.embed_tokens.weight is model.shared.weight


@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "T5Tokenizer"])
def test_token_ids(tmp_path, tokenizer_class):
    """As tokenizer.json says, whatever class the folder names (the official one names T5's)."""
    torch.save(read_tensors("pipelines/common/models_t5_umt5-xxl-enc-bf16.safetensors"), tmp_path / "t5.pth")
    shutil.copytree(GOLDEN / "pipelines/common/tokenizer", tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": tokenizer_class}))
    encoder = T5EncoderModel(512, torch.float32, "cpu", tmp_path / "t5.pth", tmp_path / "tokenizer")
    for case in read_json("pipelines/outputs.json"):
        for kind in ("prompt", "n_prompt"):
            text = whitespace_clean(case[f"{kind}_text_passed"])
            assert encoder.tokenizer(text).input_ids == case[f"{kind}_token_ids"]


def test_tokens_are_cut_to_the_text(tmp_path):
    torch.save(read_tensors("pipelines/common/models_t5_umt5-xxl-enc-bf16.safetensors"), tmp_path / "t5.pth")
    encoder = T5EncoderModel(8, torch.float32, "cpu", tmp_path / "t5.pth", GOLDEN / "pipelines/common/tokenizer")
    with pytest.warns(UserWarning, match=r"has 61 tokens, of which the model reads the first 8: dog dog .*\.\.\.$"):
        one, short, long = encoder(["", "dog", "dog " * 20], "cpu")
    assert len(one) == 1  # </s> alone
    assert len(one) < len(short) < len(long) == 8
