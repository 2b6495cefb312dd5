"""A language model small enough for tests: a character tokenizer with a chat template, and random Llama weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*/=()<>., ?:\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'"
SPECIAL = ("<pad>", "<unk>", "<|start|>", "<|end|>")
"""Ids 0 to 3; a turn is <|start|> role \\n text <|end|> \\n."""
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_lm(
    folder: Path, *, characters: str = CHARACTERS, hidden: int = 64, layers: int = 2, seed: int = 0, template: str | None = TEMPLATE
) -> Path:
    """Write config, weights, tokenizer.json and tokenizer_config.json with the chat template into a folder.

    Args:
        folder: Made if it is not there.
        characters: One token each, after the special ones; any other character becomes <unk>.
        hidden: Width of the model.
        layers: Of the model.
        seed: Of the weights.
        template: Chat template; None for none.

    Returns:
        folder: The same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL, *dict.fromkeys(characters)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>",
        additional_special_tokens=["<|start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=3, pad_token_id=0,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
