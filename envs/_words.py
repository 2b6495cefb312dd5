"""Instructions as word ids: one vocabulary for every env that speaks.

Ids are stable hashes: no download, and adding a sentence changes no other id. They cannot be turned back into text;
an env that has it offers it beside them (`instructions()`).
"""

from __future__ import annotations

import hashlib
import unicodedata
from functools import lru_cache

import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.types import TensorSpec

WORD_IDS = 1024
"""Ids are 1 to WORD_IDS - 1; 0 is padding."""


def word_row(length: int) -> TensorSpec:
    """The entry of an observation that holds the ids of at most `length` words."""
    meaning, vocabulary = "ids of the instruction's words, then 0", f"blake2b of a word, {WORD_IDS} ids"
    return TensorSpec((length,), torch.int64, 0, WORD_IDS - 1, constant=True, meaning=meaning, vocabulary=vocabulary)


@lru_cache(maxsize=4096)
def word_id(word: str) -> int:
    """Stable id in [1, WORD_IDS) of a lower-case word."""
    digest = hashlib.blake2b(word.encode(), digest_size=4, person=b"word").digest()
    return 1 + int.from_bytes(digest, "little") % (WORD_IDS - 1)


def encode_words(text: str, limit: int, reader: str, cure: str) -> tuple[int, ...]:
    """Word ids of a sentence, padded with 0.

    Args:
        text: A sentence in any language; case and punctuation do not matter. A word is a run of letters, marks and
            digits, so in a script without spaces it reaches to the next punctuation.
        limit: L, most words.
        reader: Who reads it, for the message.
        cure: What allows more words, for the message.

    Returns:
        ids: L ints.

    Raises:
        CapabilityError: It has no word, or more than L: a sentence that is cut may mean something else.
    """
    whole = unicodedata.normalize("NFC", text).lower()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in whole).split()
    if not 1 <= len(words) <= limit:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise CapabilityError(
            f"instruction {shown!r} has {len(words) or 'no'} words, {reader} reads 1 to {limit}: word it "
            f"{'shorter' if words else 'in letters or digits'}, or {cure}"
        )
    return tuple([word_id(word) for word in words] + [0] * (limit - len(words)))
