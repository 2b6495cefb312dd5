"""Any data set of reasoning-gym: endless questions, each with the data set's own checker.

An item there depends on seed + index alone, so data sets of neighbouring seeds share almost all of their items. Here
every question is item 0 of a seed of its own, and which of them are for evaluation is decided by their text.

Source: Stojanovski et al. 2025, "Reasoning Gym" (arXiv:2505.24760).
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np

from embodied_rl.envs.text.calculation import last_number
from embodied_rl.envs.text.task import Question, Task
from embodied_rl.errors import ConfigError, NotFoundError, nearest
from embodied_rl.section import Section


class Config(Section):
    """Which data set."""

    dataset: str
    """Its name, for example chain_sum."""
    settings: dict[str, Any] = {}
    """Of the data set itself, for example {min_terms: 2, max_terms: 3}."""
    hint: str = "Give only the final answer."
    """Put after the question in a line of its own; "" for nothing."""
    answer: Literal["reply", "last_number"] = "reply"
    """What the data set is given to score. reply: all of it; last_number: its last number, whatever comes before."""
    partial: bool = True
    """Pay what the data set pays, also for nearly right answers; False pays full scores alone. "12" is paid half
    by the usual checker where "1" is right, because the right answer stands in it, and a policy may find that out."""


class ReasoningGym(Task):
    """See the module docstring; the score is the data set's, which may pay a part for a nearly right answer."""

    def __init__(self, config: Config) -> None:
        """Find the data set.

        Raises:
            NotFoundError: There is none of that name.
            ConfigError: It refuses its settings.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages it brings, which compile with warnings
            import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if config.dataset not in DATASETS:
            raise NotFoundError(f"reasoning_gym has no data set '{config.dataset}'{nearest(config.dataset, DATASETS)}")
        self.config, self._create = config, reasoning_gym.create_dataset
        try:
            self._entry(0)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"reasoning_gym/{config.dataset}: refuses its settings {config.settings} ({error}); see its config"
            ) from error

    def _entry(self, seed: int) -> Any:
        return self._create(self.config.dataset, seed=seed, size=1, **self.config.settings)[0]

    def question(self, rng: np.random.Generator) -> Question:
        """Item 0 of a random seed."""
        seed = int(rng.integers(2**32))
        entry = self._entry(seed)
        text = "\n".join(filter(None, (entry["question"], self.config.hint)))
        return Question(text, str(entry["answer"] if entry["answer"] is not None else ""), {"seed": seed})

    def score(self, question: Question, reply: str) -> float:
        """The data set's own score in [0, 1]; 0 where its checker fails on the reply, but not on its own answer."""
        seed = question.facts["seed"]
        data = self._create(self.config.dataset, seed=seed, size=1, **self.config.settings)
        told = reply.strip() if self.config.answer == "reply" else last_number(reply)
        try:
            score = float(data.score_answer(told, data[0]))
        except Exception:
            data.score_answer(data[0]["answer"], data[0])
            return 0.0
        return score if self.config.partial else float(score >= 1.0)

    def result(self, question: Question, reply: str) -> str | None:
        """The whole reply, or the last number in it."""
        return super().result(question, reply) if self.config.answer == "reply" else last_number(reply)


def build(config: Config) -> ReasoningGym:
    """Make the task."""
    return ReasoningGym(config)
