"""A language model of one table: the logits of the next id depend on the context, the position and the id before."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from embodied_rl.section import Section
from embodied_rl.types import PAD, EnvSpec, Evaluation, Obs, PolicyOutput
from tests.toys import words


class Config(Section):
    """Settings."""

    type: str = "tests/toys/table.py"
    critic: Literal["none", "decision", "unit"] = "none"
    spread: float = 0.0
    """Deviation of the initial logits."""
    reads_back: bool = True
    """Logits depend on the id before; false: on context and position alone."""
    lean: float = 0.0
    """Added to the logits of the ids that words.py (one turn) pays for: a policy that knows a little."""


class Table(nn.Module):
    """Row `V` of the id before stands for the beginning."""

    chunk = 1
    actions_per_decision = 1
    value_range = None

    def __init__(self, config: Config, env: EnvSpec) -> None:
        super().__init__()
        assert env.vocabulary is not None
        v, contexts = env.action.size, int(env.observation["context"].high or 0) + 1
        self.reads_back = config.reads_back
        self.num_units, self.end = env.action.length, env.vocabulary.end[0]
        self.logits = nn.Parameter(config.spread * torch.randn(contexts, self.num_units, v + 1, v))
        for context in range(contexts if config.lean else 0):
            reply = words.word(context, words.Config(letters=v - 1, length=self.num_units))
            for place, (before, right) in enumerate(zip([v, *reply], reply, strict=False)):
                if right != PAD:
                    self.logits.data[context, place, before, right] += config.lean
        self.has_critic, self.value_per_unit = config.critic != "none", config.critic == "unit"
        shape = (contexts, self.num_units, v + 1) if self.value_per_unit else (contexts,)
        self.values = nn.Parameter(torch.zeros(shape)) if self.has_critic else None
        self.temperature: Tensor | None = None

    def anneal(self, temperature: Tensor | None) -> None:
        """[A] temperature of each unit until the next call; None for 1."""
        self.temperature = temperature

    def _before(self, units: Tensor) -> Tensor:
        """[N, A] the id before each unit."""
        start = torch.full_like(units[:, :1], self.logits.shape[-1])
        if not self.reads_back:
            return start.expand(units.shape)
        return torch.cat([start, units[:, :-1]], 1).clamp(min=0)

    def _log_softmax(self, context: Tensor, units: Tensor) -> Tensor:
        """[N, A, V] of every unit given those before it."""
        place = torch.arange(self.num_units, device=units.device)
        logits = self.logits[context.unsqueeze(-1), place, self._before(units)]
        if self.temperature is not None:
            logits = logits / self.temperature.view(1, -1, 1).to(logits)
        return torch.log_softmax(logits, -1)

    def _mask(self, units: Tensor) -> Tensor:
        """[N, A] bool: up to the end, which counts."""
        ended = (units == self.end).long().cumsum(1)
        return torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1) == 0

    def _value(self, context: Tensor, units: Tensor) -> Tensor | None:
        if self.values is None:
            return None
        if not self.value_per_unit:
            return self.values[context]
        place = torch.arange(self.num_units, device=units.device)
        return self.values[context.unsqueeze(-1), place, self._before(units)]

    @torch.no_grad()
    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        context = obs["context"][:, 0]
        units = torch.full((len(context), self.num_units), self.end, dtype=torch.int64, device=context.device)
        for a in range(self.num_units):
            logp = self._log_softmax(context, units)[:, a]
            drawn = logp.argmax(-1) if greedy or generator is None else torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
            over = (units[:, :a] == self.end).any(1)
            units[:, a] = torch.where(over, self.end, drawn)
        mask = self._mask(units)
        logp = self._log_softmax(context, units).gather(-1, units.unsqueeze(-1)).squeeze(-1)
        action = torch.where(mask, units, PAD)
        return PolicyOutput(action, torch.where(mask, logp, 0.0), action.unsqueeze(1), self._value(context, units), mask)

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        context, units = obs["context"][:, 0], units.clamp(min=0)
        logs = self._log_softmax(context, units)
        logp = logs.gather(-1, units.unsqueeze(-1)).squeeze(-1)
        return Evaluation(logp, -(logs.exp() * logs).sum(-1) if entropy else None, self._value(context, units))

    @torch.no_grad()
    def value(self, obs: Obs) -> Tensor:
        context = obs["context"][:, 0]
        first = self._value(context, torch.zeros(len(context), self.num_units, dtype=torch.int64, device=context.device))
        assert first is not None
        return first[:, 0] if self.value_per_unit else first

    def encode(self, action: Tensor) -> tuple[Tensor, Tensor]:
        return action[:, 0], action[:, 0] != PAD

    def observe(self, obs: Obs) -> None:
        pass


def build(config: Config, *, env: EnvSpec, device: torch.device) -> Table:
    return Table(config, env).to(device)
