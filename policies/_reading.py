"""Instructions for a language model: each word as the model's own tokens, or with a learned embedding.

An env gives word ids. Where it tells which words they are (`TensorSpec.texts`) and the model's folder has a tokenizer,
a table made once maps an id to the tokens of its word, as they follow another word; a sentence is then the model's own
embeddings of its tokens, one behind the other. Any other id, and padding, has an embedding learned from nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError, NotFoundError
from embodied_rl.types import TensorSpec
from embodied_rl.vocabulary import fingerprint

log = logging.getLogger(__name__)

FILES = ("tokenizer.json", "tokenizer.model")
"""What holds a tokenizer."""
MOST = 8
"""Tokens of a word at most; a word with more is learned."""
NOTHING, LEARNED = -1, -2
"""Entries of the table that are no token: none here, and the learned embedding."""


class Words(nn.Embedding):
    """Learned embeddings of V word ids, and a table [V, MOST] of those that are tokens of the model.

    Example: with "cube" of id 3 in two tokens, 17 and 9, the row of 3 is [17, 9, -1, ...]; that of an id without a
    word is [-2, -1, ...], and that of padding (0) [-1, ...].
    """

    pieces: Tensor | None
    """Part of a checkpoint where the folder has a tokenizer; None where words are learned."""
    longest: int
    """Tokens of a word at most, of those that the table has."""

    def __init__(self, entry: TensorSpec, own: nn.Embedding, folder: str, kind: Literal["tokens", "learned"]) -> None:
        """Draw the learned ones and make the table.

        Args:
            entry: Of the ids.
            own: The model's embeddings of tokens.
            folder: Of the model.
            kind: See `Pretrained.words`.

        Raises:
            UserError: A tokenizer that cannot be read or is of another model, or `learned` where there is none.
        """
        size, width = own.weight.shape
        super().__init__(int(entry.high or 0) + 1, width)
        with torch.no_grad():  # new words as large as those that the language model knows
            std = float(own(torch.arange(min(1000, size))).float().std())
        nn.init.normal_(self.weight, std=std)
        path = Path(folder).expanduser()
        files = [path / name for name in FILES if (path / name).is_file()]
        if kind == "learned" and not files:
            raise CapabilityError(
                f"policy.words (learned) does nothing with policy.model '{folder}', which has no tokenizer: remove it"
            )
        use = bool(files) and kind == "tokens"
        self.register_buffer("pieces", self._table(entry, path, size) if use else None)
        self.tongue = fingerprint([file.read_bytes() for file in files]) if use else ""
        """Which tokenizer; "" for none."""
        self._measure()
        why = "" if use else f", because {'policy.words says so' if files else 'the model has no tokenizer'}"
        log.info("policy.model '%s': %s%s", folder, self.told(), why)

    def _table(self, entry: TensorSpec, path: Path, size: int) -> Tensor:
        """[V, MOST] of the words that the env tells."""
        where, tokenizer = f"policy.model '{path}'", _open(path)
        table = torch.full((self.num_embeddings, MOST), NOTHING)
        table[:, 0] = LEARNED
        if entry.texts:
            table[0] = NOTHING
        for i, word in entry.texts:
            found = tokens_of(tokenizer, word)
            if max(found, default=0) >= size:
                raise CapabilityError(
                    f"{where}: its tokenizer has a token {max(found)} and the model knows {size}: give the tokenizer "
                    "of this model, or set policy.words: learned"
                )
            if 1 <= len(found) <= MOST:
                table[i] = torch.tensor(found + [NOTHING] * (MOST - len(found)))
        return table

    def _measure(self) -> None:
        self.longest = 1 if self.pieces is None else max(1, int((self.pieces != NOTHING).sum(1).max()))

    def told(self) -> str:
        """How words are read, for the log."""
        known = 0 if self.pieces is None else int((self.pieces[:, 0] >= 0).sum())
        if not known:
            silent = " (the env does not tell its words beforehand)" if self.pieces is not None else ""
            return f"all words have learned embeddings{silent}"
        return f"{known} words are read as the model's own tokens, at most {self.longest} each; others are learned"

    def read(self, ids: Tensor, own: nn.Module) -> Tensor:
        """Embeddings of sentences.

        Args:
            ids: [N, L]
            own: The model's embeddings of tokens.

        Returns:
            tokens: [N, L x longest, width]; the words one behind the other, then padding.
        """
        if self.pieces is None:
            return cast(Tensor, self(ids))
        pieces = self.pieces[:, : self.longest][ids].flatten(1)
        words = ids.repeat_interleave(self.longest, dim=1)
        order = (pieces == NOTHING).long().argsort(dim=1, stable=True)
        pieces, words = pieces.gather(1, order), words.gather(1, order)
        learned = self(words.masked_fill(pieces == NOTHING, 0))
        return torch.where((pieces >= 0).unsqueeze(-1), own(pieces.clamp(min=0)), learned)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *more: Any) -> None:
        """Keep what the env tells, and take over what only the checkpoint's env told."""
        theirs = state.get(f"{prefix}pieces")
        if theirs is not None and self.pieces is not None:
            mine = self.pieces.to(theirs.device)
            state = {**state, f"{prefix}pieces": torch.where(mine[:, :1] == LEARNED, theirs, mine)}
        super()._load_from_state_dict(state, prefix, *more)
        self._measure()


def _open(path: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        first = str(error).strip().splitlines()[0]
        raise NotFoundError(
            f"policy.model '{path}': transformers cannot read its tokenizer ({first}); mend it, or set policy.words: "
            "learned"
        ) from error


def tokens_of(tokenizer: Any, word: str) -> list[int]:
    """Ids of a word's tokens behind another word and a space; none where the tokenizer does not know it."""
    before, both = (tokenizer.encode(text, add_special_tokens=False) for text in ("the", f"the {word}"))
    found: list[int] = both[len(before) :]
    return [] if both[: len(before)] != before or tokenizer.unk_token_id in found else found
