"""The text encoder: transformers' UMT5 with weights and tokenizer from an official Wan2.1 folder."""

import html
import re
import warnings

import ftfy
import torch
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan.utils.checkpoints import load_pth, reading

# official tensor name (inside a block) -> transformers name (inside a block)
_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_OUTER_NAMES = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def tensor_names(num_layers: int) -> dict[str, str]:
    """Maps official names to transformers' names, for all tensors of an encoder."""
    names = {
        f"blocks.{i}.{ours}.weight": f"encoder.block.{i}.{theirs}.weight"
        for i in range(num_layers)
        for ours, theirs in _BLOCK_NAMES.items()
    }
    return names | {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _OUTER_NAMES.items()}


def config_from(tensors: dict[str, torch.Tensor]) -> UMT5Config:
    """Reads all sizes of an encoder from its tensors (official names)."""
    vocab_size, d_model = tensors["token_embedding.weight"].shape
    num_buckets, num_heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=tensors["blocks.0.attn.q.weight"].shape[0] // num_heads,
        d_ff=tensors["blocks.0.ffn.fc1.weight"].shape[0],
        num_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
    )


def load_encoder(checkpoint_path: str, dtype: torch.dtype, device: torch.device | str) -> UMT5EncoderModel:
    """Loads `models_t5_umt5-xxl-enc-bf16.pth`. Raises DamagedFile if it is damaged, or tensors are missing, left over
    or of another shape."""
    tensors = load_pth(checkpoint_path, device)
    with reading(checkpoint_path):
        config = config_from(tensors)
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
        names = tensor_names(config.num_layers)
        state = {names.get(name, name): tensor for name, tensor in tensors.items()}
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        model.load_state_dict(state, assign=True)
    model.encoder.embed_tokens = model.shared  # one parameter again, or a move to the GPU would copy it twice
    return model.to(device, dtype).eval().requires_grad_(False)


def whitespace_clean(text: str) -> str:
    """Repairs broken unicode and full-width characters, resolves HTML entities, collapses whitespace."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class T5EncoderModel:
    """Turns prompts into text features. text_len: longest text in tokens, </s> included. checkpoint_path: the official
    `.pth`. tokenizer_path: a folder."""

    def __init__(
        self,
        text_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        checkpoint_path: str | None = None,
        tokenizer_path: str | None = None,
    ):
        self.text_len = text_len
        # as tokenizer.json says; AutoTokenizer would build a T5 tokenizer anew from parts of it
        with reading(tokenizer_path):
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path, local_files_only=True)
        self.model = load_encoder(checkpoint_path, dtype, device)

    @torch.no_grad()
    def __call__(self, texts: list[str] | str, device: torch.device | str) -> list[torch.Tensor]:
        """Encodes every text on `device`. Returns one [tokens of the text incl. </s>, dim] each. Warns if the model
        does not read a text to its end."""
        texts = [whitespace_clean(text) for text in ([texts] if isinstance(texts, str) else texts)]
        settings = {"padding": "max_length", "truncation": True, "max_length": self.text_len, "return_tensors": "pt"}
        batch = self.tokenizer(texts, **settings).to(device)
        for text, encoding in zip(texts, batch.encodings, strict=True):
            if encoding.overflowing:
                count = len(self.tokenizer(text, verbose=False).input_ids)
                known = f"the text has {count} tokens, of which the model reads the first {self.text_len}"
                warnings.warn(f"{known}: {text[:60]}...", stacklevel=3)
        features = self.model(batch.input_ids, batch.attention_mask).last_hidden_state
        lengths = batch.attention_mask.sum(dim=1).tolist()
        return [u[:length] for u, length in zip(features, lengths, strict=True)]
