"""Learning from demonstrations: a session that the training loop drives like any other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from typing import Any, cast

import torch
from torch import nn

from embodied_rl import host
from embodied_rl.algorithms import ImitationConfig
from embodied_rl.conformance import Side
from embodied_rl.convention import UNKNOWN
from embodied_rl.demo_batches import Batches, Drawn
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.errors import CapabilityError, DivergenceError
from embodied_rl.measure import Clock
from embodied_rl.metrics import Partials
from embodied_rl.optimizer import FlatParameters, Optimizer
from embodied_rl.recipe import Collect, Recipe, Train
from embodied_rl.saved import Saved, start_policy
from embodied_rl.schema import flatten, show
from embodied_rl.session import build_env, build_policy, choose_device
from embodied_rl.types import EnvSpec, Imitator, Policy, State


@dataclass
class ImitationSession(Saved):
    """Policy, demonstrations and optimizer; `state_dict` is all that an exact resume needs."""

    recipe: Recipe
    device: torch.device
    policy: Policy
    config: ImitationConfig
    parameters: FlatParameters
    optimizer: Optimizer
    batches: Batches
    generator: torch.Generator
    meant: Side
    """What the env says of actions and pictures, or the demonstrations where it says nothing of actions."""
    conformance: tuple[str, ...]
    """What demonstrations, env and `start_from` agree on."""
    steps: int = 0
    """Optimizer steps made."""
    frames: int = 0
    """Control steps of demonstrations trained on, repetitions included."""
    bad_in_a_row: int = 0
    """Updates in a row without one finite step."""
    wall_s: float = 0.0
    score: float | None = None
    """Of the evaluation after the latest update; None when there was none."""

    _COUNTERS = ("steps", "frames", "bad_in_a_row", "wall_s", "score")

    @classmethod
    def build(cls, recipe: Recipe, *, fresh: bool = True) -> ImitationSession:
        """Open the demonstrations and build the policy for the recipe's env.

        Args:
            recipe: Complete; `algorithm` is an `ImitationConfig`.
            fresh: False when a checkpoint is to be loaded next: `start_from` is then not read.

        Raises:
            UserError: A part is missing, or the demonstrations do not fit the env or the policy.
        """
        host.prepare(recipe.threads)
        if recipe.reward is not None:
            raise CapabilityError(
                f"reward ({cast(Any, recipe.reward).type}) does nothing with algorithm "
                f"{cast(Any, recipe.algorithm).type}, which learns from demonstrations: remove the section, or set "
                "reward=null"
            )
        refuse_idle(recipe)
        device, config = choose_device(recipe.device), cast(ImitationConfig, recipe.algorithm)
        demos = Demonstrations(config.demonstrations)
        env = build_env(recipe, num_envs=1, device=device, split="train")
        try:
            spec = env.spec
        finally:
            env.close()
        report = demos.require(spec)
        policy = build_policy(recipe, env=spec, device=device)
        if not isinstance(policy, Imitator):
            raise CapabilityError(
                f"policy {cast(Any, recipe.policy).type} has no imitation_loss, so demonstrations teach it nothing: "
                "choose tiny_vla_tokens, tiny_vla_flow, hf_vla or pi0"
            )
        if config.augment.changes and not _cameras(spec):
            raise CapabilityError(
                "algorithm.augment varies the light of pictures, and the env shows none: remove it, or choose cameras"
            )
        fit_actions(policy, demos, config)
        policy.fit_vectors(demos.statistics())
        if fresh:
            report += start_policy(cast(Policy, policy), spec, recipe)
        parameters = FlatParameters(cast(nn.Module, policy), muon=config.muon)
        optimizer = Optimizer(parameters, eps=config.adam_eps, weight_decay=config.weight_decay)
        order = torch.Generator().manual_seed(recipe.seed)
        batches = demos.batches(order, config.batch_size, policy.chunk, cameras=_cameras(spec))
        batches.prefetch()
        generator = torch.Generator(device).manual_seed(recipe.seed)
        meant = replace(Side.of("the env", spec), bounds=demos.bounds())
        if meant.convention == UNKNOWN:
            meant = replace(meant, convention=demos.action.convention or UNKNOWN)
        return cls(
            recipe, device, cast(Policy, policy), config, parameters, optimizer, batches, generator, meant, report
        )

    def meaning(self) -> Side:
        """See `meant`."""
        return self.meant

    @property
    def update(self) -> int:
        """Finished updates, of `steps_per_update` optimizer steps each."""
        return -(-self.steps // self.config.steps_per_update)

    @property
    def progress(self) -> float:
        """Share of the training done, in [0, 1]."""
        return self.steps / self.config.steps

    def iterate(self, clock: Clock) -> Partials:
        """Make one update: the next `steps_per_update` optimizer steps.

        Raises:
            DivergenceError: Not one step was finite in `train.max_bad_updates` updates in a row.
        """
        metrics = Partials()
        self.whole = good = False
        frames = self.frames
        for _ in range(min(self.config.steps_per_update, self.config.steps - self.steps)):
            with clock.phase("rollout"):
                drawn = next(self.batches)
            with clock.phase("update"):
                good |= self._step(drawn, metrics)
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        if self.bad_in_a_row >= self.recipe.train.max_bad_updates:
            raise DivergenceError(
                f"not one optimizer step of the last {self.bad_in_a_row} updates was finite; the weights were left as "
                "they were; lower algorithm.lr, or look for non-finite numbers with: embodied-rl check demos "
                f"{self.config.demonstrations}"
            )
        metrics.last("actor/lr", self.config.lr * self._pace())
        metrics.last("perf/env_steps_per_s", (self.frames - frames) / sum(clock.seconds.values()))
        self.whole = True
        return metrics

    def _step(self, drawn: Drawn, metrics: Partials) -> bool:
        """One optimizer step; False when it was skipped because something was not finite."""
        c, flat = self.config, self.parameters
        flat.grad.zero_()
        obs, action, mask, last = drawn
        obs, last = ({k: v.to(self.device) for k, v in x.items()} for x in (obs, last))
        obs = c.augment(obs, self.generator)
        weight = mask.to(self.device).float()
        each = cast(Imitator, self.policy).imitation_loss(obs, action.to(self.device), last, self.generator)
        loss = (each * weight).sum() / weight.sum()
        loss.backward()
        norm, value = float(torch.linalg.vector_norm(flat.grad)), float(loss.detach())
        self.steps += 1
        self.frames += len(mask)
        if not (math.isfinite(norm) and math.isfinite(value)):
            metrics.add("actor/skipped_updates", 1.0, 0.0)
            return False
        if norm > c.max_grad_norm:
            flat.grad.mul_(c.max_grad_norm / norm)
        self.optimizer.step(c.lr * self._pace(), muon_lr=(c.muon.lr or 0.0) * self._pace())
        metrics.add("actor/imitation_loss", value, 1.0)
        metrics.add("actor/grad_norm", norm, 1.0)
        return True

    def _pace(self) -> float:
        """What the step sizes are multiplied with in the optimizer step in turn, number `steps`, counted from 1."""
        c = self.config
        rise = min(1.0, self.steps / max(1, c.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * (self.steps - 1) / c.steps)) if c.lr_schedule == "cosine" else 1.0
        return rise * fall

    def counters(self) -> dict[str, float]:
        """Rows of metrics that only count."""
        return {
            "progress/update": self.update,
            "progress/optimizer_steps": self.steps,
            "progress/env_steps": self.frames,
        }

    @property
    def total_steps(self) -> int:
        """Frames that the whole training takes."""
        return self.config.steps * self.config.batch_size

    def state_dict(self) -> State:
        """The state of every part."""
        return self.common_state() | {
            "moments": dict(self.optimizer.moments),
            "batches": self.batches.state_dict(),
            "generator": self.generator.get_state(),
        }

    def _restore_parts(self, state: State) -> bool:
        for name, x in self.optimizer.moments.items():
            x.copy_(state["moments"][name])
        self.batches.load_state_dict(state["batches"])
        self.generator.set_state(state["generator"])
        return True

    def close(self) -> None:
        """Nothing runs in the background."""


def refuse_idle(recipe: Recipe) -> None:
    """Refuse settings that only rollouts read, where they are not what they would be had nobody given them.

    `collect.copies` is left alone: `embodied-rl collect` records as many episodes side by side.

    Raises:
        CapabilityError: Names all of them, and what undoes those that come with a recipe that is extended.
    """
    untouched = {
        "collect": Collect(copies=recipe.collect.copies).model_dump(mode="json"),
        "train": {"env_steps": Train().env_steps},
    }
    given = recipe.dump()
    pairs = {path: (reduce(getitem, path.split("."), given), own) for path, own in flatten(untouched).items()}
    idle = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
    if not idle:
        return
    found = ", ".join(f"{path} ({show(value)})" for path, (value, _) in idle.items())
    undone = " ".join(f"{path}={show(own)}" for path, (_, own) in idle.items())
    does, them = ("does", "it") if len(idle) == 1 else ("do", "them")
    raise CapabilityError(
        f"{found} {does} nothing with algorithm {cast(Any, recipe.algorithm).type}, which makes no rollouts: remove "
        f"{them}, or undo what a recipe that is extended brings with {undone}"
    )


def fit_actions(policy: Imitator, demos: Demonstrations, config: ImitationConfig) -> None:
    """Give the policy the range of the demonstrated actions."""
    if config.action_range == "none":
        return
    stats = demos.statistics()["action"]
    if config.action_range == "quantiles":
        policy.fit_actions(stats["q01"], stats["q99"])
    else:
        policy.fit_actions(stats["mean"] - 3 * stats["std"], stats["mean"] + 3 * stats["std"])


def _cameras(env: EnvSpec) -> list[str]:
    return [name for name, spec in env.observation.items() if spec.dtype == torch.uint8 and len(spec.shape) == 3]
