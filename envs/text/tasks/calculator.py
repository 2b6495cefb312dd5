"""A calculation that is easier with a tool: `<calc>12 * (3 + 4)</calc>` is answered with its result."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from embodied_rl.envs.text.calculation import CalculationError, evaluate, written
from embodied_rl.envs.text.task import Question, Task
from embodied_rl.envs.text.tasks.arithmetic import number
from embodied_rl.section import Section

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)


class Config(Section):
    """How hard the calculations are."""

    terms: int = Field(3, ge=2, le=8)
    """Numbers in a calculation."""
    digits: int = Field(2, ge=1, le=6)
    """Most digits of each number."""


class Calculator(Task):
    """See the module docstring; the reply without a call is the answer, and must be the number and nothing else."""

    speaks = True
    isolated = False

    def __init__(self, config: Config) -> None:
        """Keep the settings."""
        self.config = config

    def question(self, rng: np.random.Generator) -> Question:
        """Draw a calculation of + - * with one pair of parentheses where there are three numbers or more."""
        c = self.config
        terms = [str(number(rng, 1, c.digits)) for _ in range(c.terms)]
        if c.terms > 2:
            first = int(rng.integers(c.terms - 1))
            pair = f"({terms[first]} {'+-'[int(rng.integers(2))]} {terms[first + 1]})"
            terms[first : first + 2] = [pair]
        text = terms[0]
        for term in terms[1:]:
            text += f" {'+-*'[int(rng.integers(3))]} {term}"
        return Question(
            f"What is {text}? You can calculate by writing <calc>expression</calc>. When you know the result, answer "
            "with just the number.",
            written(evaluate(text)),
        )

    def respond(self, question: Question, replies: Sequence[str]) -> str | None:
        """The result of the first call in the last reply; None when it has none."""
        call = CALL.search(replies[-1])
        if call is None:
            return None
        try:
            return written(evaluate(call[1]))
        except CalculationError as error:
            return f"error: {error}"


def build(config: Config) -> Calculator:
    """Make the task."""
    return Calculator(config)
