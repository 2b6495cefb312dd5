"""What a task is: where questions come from, what is answered, what a reply is worth."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embodied_rl.errors import CapabilityError

DRAWS = 2000
"""Questions drawn before a task is taken to have none for one of the two splits."""

Random = Callable[[str], np.random.Generator]
"""From a purpose to a generator that depends on the start seed and on it."""


@dataclass(frozen=True)
class Question:
    """One question.

    Example: `Question("What is 12 + 34? Answer with just the number.", "46")`.
    """

    text: str
    """What the user says."""
    answer: str
    """The right answer, for the checker and the reader; "" when nobody knows one, only how to check it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the checker needs; plain data (numbers, texts, lists, dicts)."""
    solution: str = ""
    """A worked answer, for hints and as a demonstration; "" when only the answer is known."""
    twins: str = ""
    """What questions that are the same but for their order have in common, "12 + 34" for 34 + 12: all of them are for
    training, or all for evaluation; "" when only the text itself decides."""

    @property
    def worked(self) -> str:
        """The solution, or else the answer."""
        return self.solution or self.answer

    def beginning(self, share: float) -> str:
        """The first `share` in (0, 1] of the worked answer: of its words, or of its characters when it is one word."""
        pieces = re.findall(r"\s*\S+", self.worked)
        pieces = pieces if len(pieces) > 1 else list(self.worked)
        return "".join(pieces[: math.ceil(share * len(pieces))]).strip()


class Task:
    """One kind of question; subclass it, and give the module a `Config` and `build(config) -> Task`.

    Everything is a pure function of its arguments: a conversation that is restored from a checkpoint draws its question
    again.
    """

    speaks: bool = False
    """Whether `respond` may answer; the conversation then has up to `max_turns` replies."""
    isolated: bool = True
    """Respond and judge in a process of their own with a time limit. False is for code that cannot hang."""
    own_split: bool = False
    """Whether `draw` knows by itself which questions are for evaluation."""

    def known(self) -> Mapping[str, str]:
        """Texts of all questions that there are -> where each stands; empty for a task that makes them up."""
        return {}

    def question(self, rng: np.random.Generator) -> Question:
        """Draw a question; equal generators give equal questions."""
        raise NotImplementedError

    def respond(self, question: Question, replies: Sequence[str]) -> str | None:
        """What the user (or a tool) says to the last reply; None ends the conversation, and it is judged."""
        return None

    def score(self, question: Question, reply: str) -> float | None:
        """What the last reply is worth, 1 for a right answer; None when it cannot be judged.

        Returns:
            score: Paid as the reward; success is a score of at least 1. None, an exception, a number that is not finite
                or no answer in time make the episode void, never wrong.
        """
        return float(exact(reply, question.answer))

    def result(self, question: Question, reply: str) -> str | None:
        """What the reply comes to, written so that equal answers are equal texts; None when it gives none.

        It says nothing on whether that is right; a vote among replies (reward `majority`) goes by it. An exception here
        means None and leaves the score as it is; the time that it takes counts for `env.judge_seconds`.
        """
        return reply.strip().removesuffix(".").rstrip() or None

    def draw(self, random: Random, evaluation: bool, heldout: float) -> Question:
        """Draw until the question belongs to the wanted split.

        Args:
            random: Of the start.
            evaluation: Which split.
            heldout: Share of the questions that belong to evaluation.

        Raises:
            CapabilityError: There seems to be none.
        """
        for attempt in range(DRAWS):
            question = self.question(random(f"question/{attempt}"))
            if held_out(question.twins or question.text, heldout) == evaluation:
                return question
        kind = "evaluation" if evaluation else "training"
        raise CapabilityError(
            f"of {DRAWS} questions drawn not one was for {kind} (env.heldout is {heldout:g}): the task has too few "
            "different questions; widen its settings, or change env.heldout"
        )


def held_out(text: str, share: float) -> bool:
    """Whether a question is for evaluation: a hash of its text, as a number in [0, 1), is below the share."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < share


def exact(reply: str, answer: str) -> bool:
    """Whether a reply is the answer and nothing else, but for white space around it and a final full stop."""
    return reply.strip().removesuffix(".").rstrip() == answer
