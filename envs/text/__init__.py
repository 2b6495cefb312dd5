"""Questions in words, answers in tokens: verifiable tasks for a policy that speaks.

A copy is one conversation. It begins with a task's question; the action is a reply in token ids; the task's checker
pays for it. Some tasks answer a reply first (the result of a tool, a further question), up to `max_turns` replies.

    arithmetic, countdown     short questions with an exact answer
    calculator                a calculation with a tool: `<calc>12 * (3 + 4)</calc>` is answered with its result
    reasoning_gym/<dataset>   any data set of reasoning-gym (extra `tasks`)
    questions.jsonl           a file of your own, judged by math-verify (extra `tasks`)
    ./my_task.py              a task of your own, see `embodied_rl.envs.text.task`

Which questions are for evaluation is a property of the question, not of chance: those whose text has a hash in the
lowest `heldout` of its range. Training never sees one of them, whatever the seeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from embodied_rl.envs.text.task import Question, Task
from embodied_rl.envs.text.tasks import check_entry
from embodied_rl.section import Section

if TYPE_CHECKING:
    import torch

    from embodied_rl.envs.text.env import TextEnv
    from embodied_rl.types import Split

__all__ = ["Config", "Question", "Task", "build"]


class Config(Section):
    """Which questions, in whose words."""

    type: Literal["text"] = "text"
    model: str
    """Folder of the model that replies, or the name of one that was downloaded before; only its tokenizer and chat
    template are read."""
    tasks: tuple[str | dict[str, Any], ...] = Field(("arithmetic",), min_length=1)
    """Tasks side by side in one batch: names, or with settings as in {task: arithmetic, name: sums, digits: [3, 3]},
    where `name` is how metrics call it, `weight` (1 without it) how often training plays it beside the others, and
    `examples` ([[question, reply], ...]) what stands before each question as if it had been asked and replied."""
    max_context: int = Field(160, ge=1)
    """Most tokens of a conversation that the policy is shown; a longer question is refused, a longer conversation
    ends."""
    max_reply: int = Field(32, ge=1)
    """Most tokens of one reply; what is not finished by then is cut and judged as it is."""
    max_turns: int = Field(4, ge=2)
    """Replies of one conversation, for tasks that answer."""
    system: str | None = None
    """System message before the question; null leaves what the chat template writes by itself."""
    heldout: float = Field(0.2, gt=0, lt=1)
    """Share of the questions that are for evaluation only, chosen by a hash of their text."""
    overlong: int = Field(0, ge=0)
    """Tokens before max_reply from which on length costs: the reward falls linearly to 1 less at max_reply (DAPO's soft
    overlong punishment); 0 charges nothing."""
    judge_seconds: float = Field(5.0, gt=0)
    """Wall time for judging one reply in a process of its own, which is killed then; the episode is void."""
    judges: int = Field(1, ge=1)
    """Processes that judge side by side."""

    @field_validator("tasks")
    @classmethod
    def _tasks_exist(cls, tasks: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        names = [check_entry(entry) for entry in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two tasks are called '{twice[0]}': give one of them another name, as in {{task: ..., name: ...}}"
            )
        return tasks

    @model_validator(mode="after")
    def _overlong_fits(self) -> Config:
        if self.overlong >= self.max_reply:
            raise ValueError(
                f"overlong ({self.overlong}) must be less than max_reply ({self.max_reply}), or every reply is too long"
            )
        return self

    @property
    def only_pays(self) -> dict[str, Any]:
        """Settings that change the reward and nothing else, which a reward model may replace."""
        return {"overlong": self.overlong} if self.overlong else {}


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> TextEnv:
    """Make an env; `split` and `seed` are not needed, because each start seed says all.

    Raises:
        UserError: A task, its file or the tokenizer is missing or unusable.
    """
    from embodied_rl.envs.text.env import TextEnv  # a judge's process reads this package without torch

    return TextEnv(config, num_envs, device)
