"""The one interface that replies are written through, and the decoder of this package behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.policies.causal_lm.config import Config
from embodied_rl.policies.causal_lm.decode import Narrowing, Written, generate
from embodied_rl.policies.causal_lm.pack import distinct, pack
from embodied_rl.policies.causal_lm.product import arranged, out_of_memory, product
from embodied_rl.types import PAD

log = logging.getLogger(__name__)
Columns = TypeVar("Columns", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Request:
    """What is to be written: one reply per context."""

    contexts: Tensor
    """[B, P] int64 with PAD."""
    uniform: Tensor | None
    """[B, A] float64 in [0, 1), which decide what is drawn; None takes the likeliest tokens."""
    temperature: Tensor
    """[A] float32, divides the logits of each token."""
    end: Tensor
    """[E] int64, ids that end a reply."""
    narrow: Narrowing | None = None
    """How each row is sampled beside that; None for all tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply as soon as one of them stands in it; its tokens belong to the reply."""
    states: bool = False
    """The hidden states are wanted as well, where the generator has them."""

    @property
    def length(self) -> int:
        """A, tokens after which a reply is cut."""
        return len(self.temperature)


class Speaker(Protocol):
    """What a generator reads of the policy whose replies it writes."""

    config: Config
    model: Any

    def autocast(self) -> torch.autocast:
        """The precision of its arithmetic."""
        ...

    def hidden(self, ids: Tensor, positions: Tensor, packing: Any) -> Tensor:
        """Last hidden states [T, D] of ids [T] at positions [T] under an attention."""
        ...

    def head(self) -> Tensor:
        """[V, D] float32, what makes logits of them."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Names of transformers -> the model's weights."""
        ...


class Generator(Protocol):
    """Who writes the replies."""

    def write(self, request: Request, speaker: Speaker) -> Written:
        """Continue the contexts by the policy's weights of now.

        Raises:
            UserError: It cannot; says what to do.
        """
        ...


class Decoder:
    """The decoder of this package, on the policy's own weights."""

    def __init__(self, tokenizer: Any) -> None:
        """Keep what turns ids into text, for stop texts."""
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        """The tokenizer is never changed."""
        return Decoder(self.tokenizer)

    def write(self, request: Request, speaker: Speaker) -> Written:
        """See `Generator`; in batches that fit into memory. One number of `uniform` decides one token."""
        context, config = request.contexts, speaker.config
        most = min(len(context), config.rows or len(context))
        head = product(speaker.head(), None, most)
        stop = Stops(self.tokenizer, request.stop) if request.stop else None

        def logits(h: Tensor, t: int) -> Tensor:
            with torch.autocast(h.device.type, enabled=False):
                return head(h.float() / request.temperature[t])

        def some(rows: slice) -> Written:
            contexts, group = distinct(context[rows])
            packed = pack(contexts, group[:0], contexts.new_zeros(0, 0), config.attention)
            drawn = None if request.uniform is None else request.uniform[rows]
            here = None if request.narrow is None else Narrowing(*(x[rows] for x in request.narrow))
            # One cast of every weight for all tokens: autocast forgets its casts when its outermost block ends.
            with speaker.autocast():
                return generate(
                    speaker.hidden, logits, packed, contexts, group, request.length, request.end, drawn,
                    states=request.states, narrow=here, stop=stop,
                )  # fmt: skip

        # Autocast multiplies by copies of its own.
        with nullcontext() if config.dtype == "bfloat16" else arranged(speaker.model.base_model, most):
            return in_batches(some, len(context), config.rows)


class Stops:
    """Which rows of token ids have one of some texts in them."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        """Keep both."""
        self.tokenizer, self.texts = tokenizer, texts

    def __call__(self, units: Tensor) -> Tensor:
        """[n] bool of rows [n, t], PAD left out."""
        rows = [[i for i in row if i != PAD] for row in units.tolist()]
        told = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.texts) for text in told], device=units.device)


SHORTER = "lower the env's max_context or length, or take a smaller policy.model"


def in_batches(
    some: Callable[[slice], Columns],
    rows: int,
    most: int | None,
    what: str = "write",
    setting: str = "policy.rows",
    advice: str = SHORTER,
) -> Columns:
    """Work on rows in batches; where memory runs out, in batches of half the size.

    Args:
        some: Works on some rows; columns [n, ...], or None.
        rows: B.
        most: Rows at once; None for all.
        what: It does with replies, for messages.
        setting: Of the recipe that gives `most`, for messages.
        advice: What to do where there is not enough memory for one row.

    Returns:
        columns: Of all rows.

    Raises:
        UserError: There is not enough memory for one row.
    """
    size, start = min(most or rows, rows), 0
    parts: list[Columns] = []
    while start < rows:
        try:
            parts.append(some(slice(start, min(start + size, rows))))
            start += size
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise UserError(f"not enough memory to {what} a single reply: {advice}") from error
        else:
            continue
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "not enough memory to %s %d replies at once: going on with %d; set %s: %d to begin with that",
            what, size * 2, size, setting, size,
        )  # fmt: skip
    columns: list[Any] = [None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)]
    return type(parts[0])(*columns)
