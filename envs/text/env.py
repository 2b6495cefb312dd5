"""B conversations side by side; see the package's docstring."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embodied_rl.envs.text.judge import Case, Judges
from embodied_rl.envs.text.speech import Speech
from embodied_rl.envs.text.task import Question, Task
from embodied_rl.envs.text.tasks import build_task, read_entry
from embodied_rl.errors import CapabilityError, CheckpointError, NotFoundError
from embodied_rl.runfolder import installed
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import PAD, ActionSpec, EnvSpec, Obs, State, Step, TensorSpec

if TYPE_CHECKING:
    from embodied_rl.envs.text import Config


HINT = "\n\nThe solution begins like this: "


@dataclass
class Conversation:
    """One copy's episode.

    Example: task 0, question "What is 12 + 34? ...", context [1, 9690, ...], replies ["46"], said [], over.
    """

    task: int
    seed: int
    question: Question
    context: list[int]
    """What the policy sees."""
    replies: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """What was said to each reply but the last."""
    ending: str = ""
    """How it ended, for the reader; "" while it goes on."""
    share: float = 0.0
    """Of the worked answer, shown with the question."""


def overlong_cost(tokens: int, finished: bool, longest: int, margin: int) -> float:
    """What the length of a reply costs.

    cost = 0                              for tokens <= longest - margin
         = (tokens - longest + margin) / margin  beyond that
         = 1                              for a reply that was cut at `longest`

    Args:
        tokens: Of the reply, its end included.
        finished: It ended by itself.
        longest: Most tokens of a reply.
        margin: Tokens before `longest` from which on length costs; 0 for no cost.

    Returns:
        cost: In [0, 1], to be subtracted from the reward.

    Source: Yu et al. 2025, eq. 13 (DAPO, arXiv:2503.14476); there a reply may be longer than `longest` and costs 1,
        here it is cut.
    """
    if not margin:
        return 0.0
    return max(0.0, (tokens - longest + margin) / margin) if finished else 1.0


def _asked(question: Question, share: float) -> str:
    """What the user says: the question, with a part of the worked answer as a hint where there is one."""
    beginning = question.beginning(share) if share else ""
    return question.text + (HINT + beginning if beginning else "")


def number_of(result: str | None) -> int:
    """A number >= 0 that stands for a text, or -1 for none."""
    if result is None:
        return -1
    return int.from_bytes(hashlib.blake2b(result.encode(), digest_size=8).digest(), "little") >> 1


class TextEnv:
    """See `embodied_rl.types.Env`; the last reply is paid with the judge's score, those before it with 0.

    A conversation whose next context would not fit, or which has had all its replies, is over and judged as it is.
    """

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        """Build tasks and tokenizer; every copy waits for `reset`.

        Raises:
            UserError: A task or the model's tokenizer is missing or unusable.
        """
        self.config, self.device = config, device
        self.tasks = [build_task(entry) for entry in config.tasks]
        asked = [read_entry(entry) for entry in config.tasks]
        names, weights = tuple(a.name for a in asked), tuple(a.weight for a in asked)
        self._examples = [a.examples for a in asked]
        self._check_use(config)
        self.speech = Speech(config.model, config.system)
        for task, name, examples in zip(self.tasks, names, self._examples, strict=True):
            self._check_lengths(task, name, examples)
        vocabulary, speaks = self.speech.vocabulary, any(task.speaks for task in self.tasks)
        context = TensorSpec(
            (config.max_context,), torch.int64, low=PAD, high=vocabulary.size - 1, constant=not speaks,
            meaning=f"token ids of the conversation so far, then {PAD}",
        )  # fmt: skip
        self.spec = EnvSpec(
            observation={"context": context},
            action=ActionSpec("tokens", vocabulary.size, length=config.max_reply),
            num_envs=num_envs,
            max_steps=config.max_turns if speaks else 1,
            tasks=names,
            task_weights=None if len(set(weights)) == 1 else weights,
            seedable=True,
            has_state=True,
            has_success=True,
            has_results=True,
            vocabulary=vocabulary,
        )
        seconds, processes = config.judge_seconds, config.judges
        self.judges = Judges(self.tasks, config.tasks, names, seconds=seconds, processes=processes)
        self._copies: list[Conversation | None] = [None] * num_envs
        self._context = torch.full((num_envs, config.max_context), PAD)
        self._share = 0.0

    def _check_use(self, config: Config) -> None:
        """Refuse settings that none of the tasks uses."""
        together = "no task is judged in a process of its own", not any(t.isolated for t in self.tasks)
        idle = {
            "max_turns": ("no task answers a reply", not any(t.speaks for t in self.tasks)),
            "heldout": ("every task has evaluation questions of its own", all(t.own_split for t in self.tasks)),
            "judge_seconds": together,
            "judges": together,
        }
        for name, (why, so) in idle.items():
            if so and getattr(config, name) != type(config).model_fields[name].default:
                raise CapabilityError(f"env.{name} ({getattr(config, name)}) does nothing, because {why}: remove it")

    def _check_lengths(self, task: Task, name: str, examples: Sequence[tuple[str, str]]) -> None:
        """Refuse questions that are known beforehand and too long, and not after hours when one of them is drawn."""
        most = self.config.max_context
        tokens = {where: len(self.speech.begin(text, examples)) for text, where in task.known().items()}
        long = [where for where, n in tokens.items() if n > most]
        if long:
            worst = max(long, key=lambda where: tokens[where])
            raise CapabilityError(
                f"{len(long)} of the {len(tokens)} questions of task '{name}' are longer than env.max_context ({most} "
                f"tokens with the chat template{' and the examples' if examples else ''}): {worst} has "
                f"{tokens[worst]}; raise env.max_context to {tokens[worst]} or more, or take them out "
                f"({', '.join(long[:3])}{', ...' if len(long) > 3 else ''})"
            )

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Draw questions for the masked copies; copies of one seed and task share theirs.

        Raises:
            CapabilityError: A question is longer than max_context.
        """
        drawn: dict[tuple[int, int], tuple[Question, list[int]]] = {}
        for row in mask.nonzero().flatten().tolist():
            key = int(tasks[row]), int(seeds[row])
            if key not in drawn:
                question = self._draw(*key)
                drawn[key] = question, self._begin(key[0], question, self._share)
            question, context = drawn[key]
            self._copies[row] = Conversation(*key, question, context, share=self._share)
            self._show(row, context)
        return self._look()

    def _draw(self, task: int, seed: int) -> Question:
        return self.tasks[task].draw(partial(numpy_rng, seed), bool(seed & 1), self.config.heldout)

    def hint(self, share: float) -> None:
        """Put the first `share` of the worked answer, 0 to 1, under the questions that the next resets ask."""
        self._share = share

    def demonstrate(self) -> tuple[Tensor, Tensor]:
        """The worked answers as replies; unknown where there is none or it is too long, or the task answers a reply."""
        action = torch.full((self.spec.num_envs, self.config.max_reply), PAD)
        for row, c in enumerate(self._copies):
            if c is None or self.tasks[c.task].speaks or not c.question.worked:
                continue
            ids = self.speech.say(c.question.worked)
            if len(ids) <= self.config.max_reply:
                action[row, : len(ids)] = torch.tensor(ids)
        action = action.to(self.device)
        return action, action[:, 0] != PAD

    def _begin(self, task: int, question: Question, share: float) -> list[int]:
        context, longest = self.speech.begin(_asked(question, share), self._examples[task]), self.config.max_context
        if len(context) > longest:
            start = question.text.replace("\n", " ")
            start = start if len(start) <= 60 else f"{start[:60]}..."
            raise CapabilityError(
                f"a question of task '{self.spec.tasks[task]}' has {len(context)} tokens with the chat template"
                f"{' and its examples' if self._examples[task] else ''}"
                f"{f' and {share:.0%} of its solution as a hint' if share else ''}, and "
                f"env.max_context is {longest} (it begins: {start}); raise env.max_context to {len(context)} or more "
                "(a run that has begun keeps its own: begin another one with start_from)"
            )
        return context

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Judge or answer one reply of each copy; copies that are not active, or whose conversation is over, wait."""
        self.spec.action.check(action, self.spec.num_envs, self.device, "text")
        b = self.spec.num_envs
        moving = [True] * b if active is None else active.tolist()
        replies = {
            i: ([x for x in row if x != PAD], c)
            for i, (row, c) in enumerate(zip(action.tolist(), self._copies, strict=True))
            if moving[i] and c is not None and not c.ending
        }
        numbers = torch.zeros(5, b)  # score, overlong cost, tokens, cut, and whether the judge failed
        success, result = torch.zeros(b, dtype=torch.bool), torch.full((b,), -1)
        for ids, c in replies.values():
            c.replies.append(self.speech.read(ids))
        answers = self.judges.ask([self._case(c) for _, c in replies.values()])
        for (i, (ids, c)), answer in zip(replies.items(), answers, strict=True):
            # A policy may end a reply by other means than the id for it, but never beyond the longest.
            finished = len(ids) < self.config.max_reply or ids[-1] in self._ends
            cost = overlong_cost(len(ids), finished, self.config.max_reply, self.config.overlong)
            score = self._follow(i, c, ids, answer)
            numbers[:, i] = torch.tensor([score, cost, len(ids), not finished, "failed" in answer])
            success[i] = score >= 1
            result[i] = number_of(answer.get("result"))
        score, cost, tokens, cut, failed = numbers.to(self.device)
        over = torch.tensor([c is None or bool(c.ending) for c in self._copies], device=self.device)
        invalid = failed.bool()
        metrics = {"tokens": tokens, "cut": cut}
        if self.config.overlong:
            metrics["overlong"] = cost
        return Step(
            self._look(), score - cost, over & ~invalid, invalid, success.to(self.device), metrics,
            result=result.to(self.device), invalid=invalid,
        )  # fmt: skip

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.speech.vocabulary.end

    def _case(self, c: Conversation) -> Case:
        return Case(c.task, c.question, c.replies, last=len(c.replies) >= self.config.max_turns)

    def _follow(self, row: int, c: Conversation, ids: Sequence[int], answer: dict[str, Any]) -> float:
        """End the conversation or let it go on; returns the score, 0 where there is none (yet)."""
        if "failed" in answer:
            c.ending = "not judged"
        elif "score" in answer:
            c.ending = f"score {answer['score']:g}"
            return float(answer["score"])
        else:
            c.said.append(answer["say"])
            context = self.speech.go_on(c.context, ids, answer["say"])
            if len(context) > self.config.max_context:
                c.ending = f"score 0: the conversation has outgrown {self.config.max_context} tokens"
            else:
                c.context = context
                self._show(row, context)
        return 0.0

    def _show(self, row: int, context: Sequence[int]) -> None:
        self._context[row] = PAD
        self._context[row, : len(context)] = torch.tensor(context)

    def _look(self) -> Obs:
        return {"context": self._context.to(self.device, copy=True)}

    def transcript(self, copies: Tensor) -> list[str]:
        """What was said in the copies asked for, then the answer that was wanted and how it ended."""
        return [self._told(self._copies[i]) for i in copies.tolist()]

    def _told(self, c: Conversation | None) -> str:
        if c is None:
            return ""
        lines = [f"question: {_asked(c.question, c.share)}"]
        for i, reply in enumerate(c.replies):
            lines.append(f"reply: {reply}")
            if i < len(c.said):
                lines.append(f"told: {c.said[i]}")
        if c.ending:
            lines += [f"right answer: {c.question.answer}", c.ending]
        return "\n".join(lines)

    def get_state(self) -> State:
        """Contexts and conversations; questions are drawn again from their seeds."""
        rows = [None if c is None else self._kept(c) for c in self._copies]
        return {"context": self._context.clone(), "copies": rows}

    @staticmethod
    def _kept(c: Conversation) -> State:
        return {
            "task": c.task, "seed": c.seed, "context": torch.tensor(c.context), "replies": list(c.replies),
            "said": list(c.said), "ending": c.ending, "share": c.share,
        }  # fmt: skip

    def set_state(self, state: State) -> Obs:
        """Restore `get_state`'s result.

        Raises:
            CheckpointError: It is of another number of copies or tokens.
        """
        if state["context"].shape != self._context.shape:
            raise CheckpointError(
                f"text state: found contexts {list(state['context'].shape)}, expected {list(self._context.shape)}; "
                "build the env as the state's run did"
            )
        self._context.copy_(state["context"])
        self._copies = [None if row is None else self._revived(row) for row in state["copies"]]
        return self._look()

    def _revived(self, row: State) -> Conversation:
        question = self._draw(row["task"], row["seed"])
        told = {name: list(row[name]) for name in ("replies", "said")}
        return Conversation(
            row["task"], row["seed"], question, row["context"].tolist(), **told, ending=row["ending"],
            share=row.get("share", 0.0),
        )  # fmt: skip

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """There is no camera."""
        raise NotFoundError(f"camera '{camera}' does not exist: conversations are read with `transcript`")

    def manifest(self) -> dict[str, Any]:
        """What results depend on."""
        settings = ("tasks", "system", "max_context", "max_reply", "max_turns", "heldout", "overlong")
        told = {name: getattr(self.config, name) for name in settings}
        return {**told, "packages": installed(["reasoning-gym", "math-verify"])}

    def close(self) -> None:
        """End the judges' processes."""
        self.judges.close()
