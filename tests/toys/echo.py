"""A question of digits, and a reward for each of its digits that the reply repeats in its place; ends are tokens, too."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import PAD, ActionSpec, EnvSpec, Obs, State, Step, TensorSpec, Vocabulary
from embodied_rl.vocabulary import fingerprint


class Config(Section):
    """Settings."""

    type: str = "tests/toys/echo.py"
    model: str
    digits: str = "0123456789"
    question: int = 2
    """Digits of a question."""
    length: int = 4
    max_context: int = 24


class Echo:
    """Question and reply are one turn each; the context is <|start|>user\\n<digits><|end|>\\n<|start|>assistant\\n."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.tokenizer = AutoTokenizer.from_pretrained(config.model)
        template = str(self.tokenizer.chat_template or "")
        mark = fingerprint([(Path(config.model) / "tokenizer.json").read_bytes(), template.encode()])
        size = len(self.tokenizer)
        self.spec = EnvSpec(
            observation={"context": TensorSpec((config.max_context,), torch.int64, low=PAD, high=size - 1, constant=True)},
            action=ActionSpec("tokens", size, length=config.length),
            num_envs=num_envs, max_steps=1, tasks=("echo",), seedable=True, has_state=True, has_success=True,
            vocabulary=Vocabulary(config.model, size, mark, (self.tokenizer.eos_token_id,)),
        )  # fmt: skip
        self.answer = torch.zeros(num_envs, config.question, dtype=torch.int64, device=device)
        self.context = torch.full((num_envs, config.max_context), PAD, device=device)

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        for i in mask.nonzero().flatten().tolist():
            rng, c = numpy_rng(int(seeds[i]), "echo"), self.config
            question = "".join(rng.choice(list(c.digits), c.question))
            turn = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
            self.context[i] = PAD
            self.context[i, : len(ids)] = ids
            self.answer[i] = torch.tensor(self.tokenizer(question, add_special_tokens=False).input_ids)
        return {"context": self.context.clone()}

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        self.spec.action.check(action, len(action), self.device, "echo")
        right = action[:, : self.config.question] == self.answer
        ended = torch.ones(len(action), dtype=torch.bool, device=self.device)
        return Step({"context": self.context.clone()}, right.float().mean(1), ended, ~ended, right.all(1))

    def get_state(self) -> State:
        return {"answer": self.answer, "context": self.context}

    def set_state(self, state: State) -> Obs:
        self.answer, self.context = state["answer"].clone(), state["context"].clone()
        return {"context": self.context.clone()}

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Echo:
    return Echo(config, num_envs, device)
