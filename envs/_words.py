"""Instructions as word ids: one vocabulary for every env that speaks.

Ids are stable hashes: no download, and adding a sentence changes no other id. They cannot be turned back into text, so
an env that has it offers it beside them: `instructions()`, and, of words known beforehand, `TensorSpec.texts`.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.types import TensorSpec

WORD_IDS = 1024
"""Ids are 1 to WORD_IDS - 1; 0 is padding."""


def word_row(length: int, sentences: Iterable[str] = ()) -> TensorSpec:
    """The entry of an observation that holds the ids of at most `length` words.

    Args:
        length: L.
        sentences: What the env may ask for, as far as it is known beforehand.
    """
    meaning, vocabulary = "ids of the instruction's words, then 0", f"blake2b of a word, {WORD_IDS} ids"
    words = sorted({word for text in sentences for word in split_words(text)})
    return TensorSpec(
        (length,), torch.int64, 0, WORD_IDS - 1, constant=True, meaning=meaning, vocabulary=vocabulary,
        texts=unambiguous((word_id(word), word) for word in words),
    )  # fmt: skip


def unambiguous(texts: Iterable[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """The pairs (id, word) in the order of ids, without the ids that stand for several words."""
    words: dict[int, set[str]] = {}
    for i, word in texts:
        words.setdefault(i, set()).add(word)
    return tuple((i, next(iter(words[i]))) for i in sorted(words) if len(words[i]) == 1)


@lru_cache(maxsize=4096)
def word_id(word: str) -> int:
    """Stable id in [1, WORD_IDS) of a lower-case word."""
    digest = hashlib.blake2b(word.encode(), digest_size=4, person=b"word").digest()
    return 1 + int.from_bytes(digest, "little") % (WORD_IDS - 1)


def split_words(text: str) -> list[str]:
    """The words of a sentence, lower case; see `encode_words`."""
    whole = unicodedata.normalize("NFC", text).lower()
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in whole).split()


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
    words = split_words(text)
    if not 1 <= len(words) <= limit:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise CapabilityError(
            f"instruction {shown!r} has {len(words) or 'no'} words, {reader} reads 1 to {limit}: word it "
            f"{'shorter' if words else 'in letters or digits'}, or {cure}"
        )
    return tuple([word_id(word) for word in words] + [0] * (limit - len(words)))
