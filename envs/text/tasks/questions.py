"""Questions and answers from a file: one JSON object per line, {"question": "...", "answer": "..."}.

A line may also have {"solution": "..."}: the answer with the way to it, for hints and demonstrations.

One file is split by the hash of each question's text (`env.heldout`). A folder has train.jsonl and eval.jsonl instead.
math-verify judges whether a reply is mathematically equal to the answer.

Source: Kydlíček, math-verify (https://github.com/huggingface/Math-Verify).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.envs.text.task import Question, Random, Task, held_out
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError
from embodied_rl.section import Section

FILES = ("train.jsonl", "eval.jsonl")


class Config(Section):
    """Which file."""

    path: str
    """A .jsonl file, or a folder with train.jsonl and eval.jsonl."""


class Questions(Task):
    """See the module docstring."""

    def __init__(self, config: Config) -> None:
        """Read the file or the folder.

        Raises:
            NotFoundError: It is not there.
            ConfigError: A line is not a question with its answer; says which.
        """
        import math_verify

        self._judge, self.path = math_verify, Path(config.path)
        self._latest: tuple[str, list[Any]] = ("", [])
        self.own_split = self.path.is_dir()
        self.splits: list[list[Question]] | None = None
        """For training and for evaluation; made by the first `draw` where one file holds both."""
        self._places: dict[str, str] = {}
        if not self.own_split:
            self.questions = [q for q, _ in self._read_file(self.path).values()]
            return
        train, evaluation = (self._read_file(self.path / name) for name in FILES)
        both = next((text for text in evaluation if text in train), None)
        if both is not None:
            raise ConfigError(
                f"{self.path / FILES[1]}:{evaluation[both][1]}: the same question is in {FILES[0]}:{train[both][1]}, "
                "so evaluation would not be of unseen questions; remove one of the two"
            )
        parts = (train, evaluation)
        self.splits = [[q for q, _ in part.values()] for part in parts]

    def _read_file(self, path: Path) -> dict[str, tuple[Question, int]]:
        lines = read(path)
        self._places |= {text: f"{path}:{number}" for text, (_, number) in lines.items()}
        return lines

    def known(self) -> dict[str, str]:
        """The text of every question of the file or folder -> its line."""
        return self._places

    def draw(self, random: Random, evaluation: bool, heldout: float) -> Question:
        """A random question of the split's own file, or of the file's part.

        Raises:
            CapabilityError: The file has no question for this split.
        """
        if self.splits is None:
            of_evaluation = [held_out(q.text, heldout) for q in self.questions]
            pairs = list(zip(self.questions, of_evaluation, strict=True))
            self.splits = [[q for q, theirs in pairs if theirs == wanted] for wanted in (False, True)]
        part = self.splits[evaluation]
        if not part:
            kind, count = "evaluation" if evaluation else "training", sum(map(len, self.splits))
            raise CapabilityError(
                f"{self.path}: none of its {count} questions is for {kind} (env.heldout is {heldout:g}); add "
                f"questions, or give a folder with {FILES[0]} and {FILES[1]}"
            )
        return part[int(random("question").integers(len(part)))]

    def question(self, rng: np.random.Generator) -> Question:
        """Not used: `draw` chooses."""
        raise NotImplementedError

    def score(self, question: Question, reply: str) -> float:
        """1 when math-verify finds the reply equal to the answer, else 0.

        Its own alarm clocks are off: they turn "took too long" into "wrong". The process has one that ends it.
        """
        gold = self._judge.parse(question.answer, parsing_timeout=None, raise_on_error=True)
        if not gold:
            raise ValueError(f"math-verify finds no answer in '{question.answer}'")
        return float(self._judge.verify(gold, self._read(reply), timeout_seconds=None, raise_on_error=True))

    def result(self, question: Question, reply: str) -> str | None:
        """The answer that math-verify finds in the reply, with decimals as fractions, so that 0.5 is 1/2."""
        import sympy

        said = self._read(reply)
        if not said:
            return None
        return str(sympy.nsimplify(said[0], rational=True) if isinstance(said[0], sympy.Expr) else said[0])

    def _read(self, reply: str) -> list[Any]:
        """What math-verify finds; asked for twice in a row, by the score and by the result."""
        if self._latest[0] != reply:
            self._latest = reply, list(self._judge.parse(reply, parsing_timeout=None))
        return self._latest[1]


def read(path: Path) -> dict[str, tuple[Question, int]]:
    """The questions of a file.

    Returns:
        questions: Text -> (question, line number).

    Raises:
        NotFoundError: There is no such file.
        ConfigError: A line is empty, no JSON, or no question with its answer.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file of questions")
    out: dict[str, tuple[Question, int]] = {}
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8 ({error})") from None
    for number, line in enumerate(lines, start=1):
        question = _parsed(line, f"{path}:{number}")
        text = question.text
        if text in out and out[text][0].answer != question.answer:
            raise ConfigError(
                f"{path}:{number}: the question of line {out[text][1]} again, with another answer; remove one of them"
            )
        out.setdefault(text, (question, number))
    return out


def _parsed(line: str, where: str) -> Question:
    wanted = 'expected {"question": "...", "answer": "..."}'
    if not line.strip():
        raise ConfigError(f"{where}: is empty, {wanted}; remove the line")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON ({error}), {wanted}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is a {type(row).__name__}, {wanted}")
    for key in ("question", "answer"):
        if key not in row:
            raise ConfigError(f"{where}: has no '{key}', {wanted}")
    text, answer, solution = row["question"], row["answer"], row.get("solution", "")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    for key, value in (("question", text), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: '{key}' is {json.dumps(value)}, expected a text that is not empty")
    if not isinstance(solution, str):
        raise ConfigError(f"{where}: 'solution' is {json.dumps(solution)}, expected a text")
    return Question(text, answer, solution=solution)


def build(config: Config) -> Questions:
    """Make the task."""
    return Questions(config)
