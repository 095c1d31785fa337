"""Tiny Qwen models with random weights."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large, so that an answer depends on all that was asked
}


def save_model(folder, kind: str, mute: bool = False) -> None:
    """Saves a random model in the layout of the official folders. Its answer is a short jumble, or empty if mute."""
    bytes_to_ids = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(bytes_to_ids, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL),
        chat_template=TEMPLATE,
    )
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    end = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|im_end|>"]}
    text = SIZES | end | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**text))
    else:
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"fullatt_block_indexes": [0], "initializer_range": 0.3}
        config = Qwen2_5_VLConfig(
            text_config=text | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            **end,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
        processor |= {"temporal_patch_size": 2, "min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
        folder.mkdir()
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    shown = tokenizer("" if mute else "abcdefghijklmnop  \n").input_ids
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        min_new_tokens=0 if mute else 24,
        eos_token_id=[ids["<|im_end|>"], *tokenizer("abcdefgh").input_ids],
        pad_token_id=ids["<|im_end|>"],
        suppress_tokens=[i for i in range(len(tokenizer)) if i not in {ids["<|im_end|>"], *shown}],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
