"""Countdown: reach a target with given numbers, each used exactly once."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from fractions import Fraction

import numpy as np
from pydantic import Field, model_validator

from embodied_rl.envs.text.calculation import CalculationError, constants, evaluate
from embodied_rl.envs.text.task import Question, Task
from embodied_rl.section import Section


class Config(Section):
    """How hard the games are."""

    numbers: int = Field(3, ge=2, le=6)
    """Numbers of one game."""
    largest: int = Field(20, ge=2)
    """Numbers are 1 to this."""
    target: int = Field(100, ge=2)
    """Targets are 1 to this."""

    @model_validator(mode="after")
    def _reachable(self) -> Config:
        if self.target < self.numbers:
            raise ValueError(
                f"target ({self.target}) leaves hardly a game with {self.numbers} numbers: raise it to {self.numbers} "
                "or more"
            )
        return self


class Countdown(Task):
    """See the module docstring; any expression counts that uses the numbers once each and comes to the target."""

    isolated = False

    def __init__(self, config: Config) -> None:
        """Keep the settings."""
        self.config = config

    def question(self, rng: np.random.Generator) -> Question:
        """Join random numbers by random operators until what comes out is a target; the way there is one solution."""
        c, text, target = self.config, "", Fraction(0)
        while target.denominator != 1 or not 1 <= target <= c.target:
            numbers = [int(x) for x in rng.integers(1, c.largest + 1, size=c.numbers)]
            terms = [str(x) for x in numbers]
            while len(terms) > 1:
                a, b = (terms.pop(int(rng.integers(len(terms)))) for _ in range(2))
                terms.append(f"({a} {'+-*/'[int(rng.integers(4))]} {b})")
            text = terms[0][1:-1]
            with suppress(CalculationError):  # a division by zero: the target stays what it was, and is none
                target = evaluate(text)
        listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
        return Question(
            f"Use the numbers {listed}, each exactly once, with + - * / and parentheses to make {target}. Answer with "
            "just the expression.",
            text,
            {"numbers": numbers, "target": int(target)},
            twins=f"{sorted(numbers)} {target}",
        )

    def score(self, question: Question, reply: str) -> float:
        """1 for an expression of exactly the numbers that comes to the target, "= target" behind it or not; else 0."""
        target, numbers = question.facts["target"], question.facts["numbers"]
        text, *rest = reply.strip().removesuffix(".").split("=")
        try:
            right = evaluate(text) == target and all(r.strip() == str(target) for r in rest)
            return float(right and Counter(constants(text)) == Counter(numbers))
        except CalculationError:
            return 0.0


def build(config: Config) -> Countdown:
    """Make the task."""
    return Countdown(config)
