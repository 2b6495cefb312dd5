"""Small builders that tests share: toy envs, policies, hand-made rollouts and batches, and one wired run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from embodied_rl import registry
from embodied_rl.batch import observed
from embodied_rl.collect import Collector
from embodied_rl.credit import CreditChain
from embodied_rl.loss import LossFunction
from embodied_rl.metrics import Partials
from embodied_rl.types import ActionSpec, Batch, EnvSpec, Evaluation, Obs, PolicyOutput, Rollout, TensorSpec
from embodied_rl.update import Updater

CPU = torch.device("cpu")
TOYS = Path(__file__).parent / "toys"


def toy(name: str, num_envs: int, *, seed: int = 0, **config: Any) -> Any:
    """Copies of tests/toys/<name>.py, loaded the way a recipe would."""
    module = registry.load("env", str(TOYS / f"{name}.py"))
    return module.build(module.Config(**config), num_envs=num_envs, device=CPU, split="train", seed=seed)


def mlp(spec: EnvSpec, *, seed: int = 0, shake: float = 0.0, **config: Any) -> Any:
    """The mlp policy; `shake` adds noise to every parameter, so that nothing stays at its tidy initial value."""
    module = registry.load("policy", "mlp")
    torch.manual_seed(seed)
    policy = module.build(module.Config(**config), env=spec, device=CPU)
    with torch.no_grad():
        for p in policy.parameters():
            p += shake * torch.randn_like(p)
    return policy


def algorithm(name: str, **sections: Any) -> Any:
    """A method's Config, its sections given as dicts laid over its defaults."""
    module: ModuleType = registry.load("algorithm", name)
    return module.Config(**sections)


def spec(observation: dict[str, TensorSpec], action: ActionSpec, num_envs: int = 1) -> EnvSpec:
    """An env's description without the env."""
    return EnvSpec(observation, action, num_envs, None, ("task",), seedable=True, has_state=True)


@dataclass
class Scripted:
    """A policy without randomness: actions and values are given functions of the observation."""

    action: Callable[[Obs], Tensor]
    """obs -> [B, C, size]"""
    critic: Callable[[Obs], Tensor]
    """obs -> [B]"""
    chunk: int = 1
    num_units: int = 1
    has_critic: bool = True

    @property
    def actions_per_decision(self) -> int:
        """Every control step has its own action."""
        return self.chunk

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        action = self.action(obs)
        units = action.flatten(1)
        return PolicyOutput(units, torch.zeros(units.shape), action, self.critic(obs) if self.has_critic else None)

    def value(self, obs: Obs) -> Tensor:
        return self.critic(obs)


@dataclass
class Run:
    """Collector, credit and updater of one method, wired as a session does it."""

    policy: Any
    collector: Collector
    credit: CreditChain
    updater: Updater

    def iterate(self) -> tuple[Rollout, Partials]:
        """Collect, credit, update, observe."""
        rollout = self.collector.collect()
        metrics = self.updater.update(rollout, self.credit(rollout, self.updater.penalty(rollout)[0]), progress=0.0)
        seen = observed(rollout)
        if seen is not None:
            self.policy.observe(seen)
        self.collector.version = self.updater.version
        return rollout, metrics


def wire(
    envs: list[Any], policy: Any, method: Any, *, decisions: int, mode: str = "stream", group_size: int = 1, seed: int = 0
) -> Run:
    """Wire envs, a policy and a method's Config into a Run."""
    loss = LossFunction(method.loss, policy.actions_per_decision, policy.value_range)
    updater = Updater(policy, loss, method.update, seed=seed, max_bad_updates=1)
    collector = Collector(
        envs, policy, decisions=decisions, mode=mode, group_size=group_size, run_seed=seed,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed), greedy_baseline=method.credit.baseline == "greedy",
    )  # fmt: skip
    return Run(policy, collector, CreditChain(method.credit), updater)


def rollout_of(reward: Tensor, *, chunk: int = 1, num_units: int = 1, **given: Any) -> Rollout:
    """A rollout around rewards [T, B]; whatever is not given is the plainest choice.

    Episodes are numbered from `terminated | truncated`; copy b is its own group.
    """
    t, b = reward.shape
    no = torch.zeros(t, b, dtype=torch.bool)
    fields: dict[str, Any] = {
        "obs": {"x": torch.zeros(t, b, 1, dtype=reward.dtype)}, "constants": {},
        "units": torch.zeros(t, b, num_units, dtype=reward.dtype), "logp": torch.zeros(t, b, num_units, dtype=reward.dtype),
        "valid": ~no, "reward": reward, "steps": torch.full((t, b), chunk), "terminated": no, "truncated": no,
        "value": None, "next_value": None, "group": torch.arange(b).expand(t, b), "task": torch.zeros(t, b, dtype=torch.int64),
        "policy_version": torch.zeros(t, b, dtype=torch.int64), "chunk": chunk, "finished": {}, "metrics": {},
    } | given  # fmt: skip
    if "mask" not in fields:
        fields["mask"] = fields["valid"].unsqueeze(-1).expand(fields["logp"].shape).clone()
    if "episode" not in fields:
        done = fields["terminated"] | fields["truncated"]
        earlier = torch.cat([torch.zeros(1, b, dtype=torch.int64), done.cumsum(0)[:-1]])
        fields["episode"] = earlier * b + torch.arange(b)
    return Rollout(**fields)


def batch_of(logp: Tensor, loss: LossFunction, **given: Any) -> Batch:
    """A batch around old log-probabilities [N, A], weighed by the loss as one whole optimizer step."""
    n, a = logp.shape
    fields: dict[str, Any] = {
        "obs": {}, "units": torch.zeros_like(logp), "logp": logp, "mask": None, "advantage": torch.ones(n, dtype=logp.dtype),
        "target": None, "value": None, "row_weight": torch.full((n,), 1 / n, dtype=logp.dtype), "trajectory": torch.arange(n),
    } | given  # fmt: skip
    if "weight" not in fields:
        fields["weight"] = loss.weights(fields["mask"], fields["trajectory"], a)
    return Batch(**fields)


def evaluation_of(logp: Tensor, **given: Any) -> Evaluation:
    """What a policy would answer; only log-probabilities unless more is given."""
    return Evaluation(logp, **given)


def doubled(policy: Any) -> Any:
    """The policy in float64."""
    return policy.double()


def gradient(policy: Any) -> Tensor:
    """All gradients as one vector; zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()])


def number(x: Tensor) -> float:
    """The value of a scalar tensor, whether or not it carries a gradient."""
    return float(x.detach())


def unwrapped(text: str) -> str:
    """What was printed, on one line: where a terminal's lines break depends on how long paths are."""
    return " ".join(text.split())
