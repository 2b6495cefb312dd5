"""Sums in words: "What is 12 + 34? Answer with just the number."."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from embodied_rl.envs.text.calculation import evaluate, last_number, written
from embodied_rl.envs.text.task import Question, Task
from embodied_rl.section import Section


class Config(Section):
    """How hard the sums are."""

    digits: tuple[int, int] = (2, 2)
    """Fewest and most digits of each number; a number's length is drawn first, then the number."""
    operators: tuple[Literal["+", "-", "*"], ...] = Field(("+",), min_length=1)
    """Drawn for each place between two numbers; * binds before + and -."""
    terms: int = Field(2, ge=2, le=8)
    """Numbers in a sum."""
    answer: Literal["reply", "last_number"] = "reply"
    """What counts as the answer. reply: the number and nothing else; last_number: the last number of the reply,
    whatever stands before it, for models that say "12 + 34 = 46" whatever they are asked."""

    @model_validator(mode="after")
    def _digits_in_order(self) -> Config:
        low, high = self.digits
        if not 1 <= low <= high <= 9:
            raise ValueError(f"digits ({low}, {high}) must be two numbers from 1 to 9, the smaller first")
        return self


class Arithmetic(Task):
    """See the module docstring; `Config.answer` says where the answer stands in a reply."""

    isolated = False

    def __init__(self, config: Config) -> None:
        """Keep the settings."""
        self.config = config

    def question(self, rng: np.random.Generator) -> Question:
        """Draw numbers and operators."""
        c = self.config
        numbers, operators = [str(number(rng, *c.digits))], []
        for _ in range(c.terms - 1):
            operators.append(c.operators[int(rng.integers(len(c.operators)))])
            numbers.append(str(number(rng, *c.digits)))
        text = numbers[0] + "".join(f" {o} {n}" for o, n in zip(operators, numbers[1:], strict=True))
        order_is_free = set(operators) in ({"+"}, {"*"})
        twins = f" {operators[0]} ".join(sorted(numbers)) if order_is_free else ""
        return Question(f"What is {text}? Answer with just the number.", written(evaluate(text)), twins=twins)

    def score(self, question: Question, reply: str) -> float | None:
        """1 for the right number, else 0."""
        if self.config.answer == "reply":
            return super().score(question, reply)
        return float(self.result(question, reply) == question.answer)

    def result(self, question: Question, reply: str) -> str | None:
        """The whole reply, or the last number in it."""
        if self.config.answer == "reply":
            return super().result(question, reply)
        return last_number(reply)


def number(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number of `low` to `high` digits; one digit begins at 0, more digits at 10, 100, ..."""
    digits = int(rng.integers(low, high + 1))
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def build(config: Config) -> Arithmetic:
    """Make the task."""
    return Arithmetic(config)
