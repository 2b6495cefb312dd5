"""Everything a recipe describes, built and wired: env parts, policy, rewards, credit, loss, optimizer, collector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from embodied_rl import host, registry
from embodied_rl.algorithms import AlgorithmConfig
from embodied_rl.anneal import Anneal
from embodied_rl.batch import observed
from embodied_rl.collect import Collector
from embodied_rl.conformance import Negotiated, Side
from embodied_rl.credit import CreditChain
from embodied_rl.errors import CapabilityError, NotFoundError
from embodied_rl.extra import Extra
from embodied_rl.fit import check_extras, check_fit
from embodied_rl.guide import Guided
from embodied_rl.loss import LossFunction
from embodied_rl.measure import Clock, restarts_of, rollout_metrics
from embodied_rl.metrics import Partials
from embodied_rl.recipe import Recipe
from embodied_rl.replay import ReplayBuffer
from embodied_rl.rewards import RewardConfig
from embodied_rl.saved import Saved, start_policy
from embodied_rl.seeding import seed_everything
from embodied_rl.selection import refill, with_hints
from embodied_rl.self_imitation import OwnSuccesses
from embodied_rl.shaping import Shaping, check_reward
from embodied_rl.types import Annealed, Env, EnvSpec, Policy, Rollout, Split, State
from embodied_rl.update import Updater


def choose_device(name: str) -> torch.device:
    """Turn the recipe's `device` into a torch device.

    Args:
        name: auto, cpu, cuda or cuda:<index>.

    Returns:
        device: auto gives the first CUDA device when there is one, else the CPU.

    Raises:
        NotFoundError: The device does not exist on this machine; nothing is silently replaced.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind == "cuda" and (index == "" or index.isdigit()) and int(index or 0) < count:
        return torch.device(f"cuda:{int(index or 0)}")
    available = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    raise NotFoundError(
        f"device '{name}' is not there; this machine has: {available}. Set device to one of them, or to auto"
    )


def build_env(recipe: Recipe, *, num_envs: int, device: torch.device, split: Split, part: int = 0) -> Env:
    """Build copies of the recipe's env.

    Args:
        recipe: The run.
        num_envs: Copies.
        device: Where its tensors live.
        split: Training or evaluation starts and wordings.
        part: Index of the part, so that envs that are only seeded once differ from each other.
    """
    module = registry.load("env", _type_of(recipe.env))
    # Far apart, so that parts and splits of an env that derives per-copy seeds by counting up never overlap.
    seed = recipe.seed * 1_000_003 + part * 10_007 + (500_000 if split == "eval" else 0)
    return cast(Env, module.build(recipe.env, num_envs=num_envs, device=device, split=split, seed=seed % 2**31))


def build_policy(recipe: Recipe, *, env: EnvSpec, device: torch.device) -> Policy:
    """Build the recipe's policy for an env; its parameters depend on the recipe's seed only.

    Raises:
        CapabilityError: One decision of the policy is longer than an episode of the env, or than what its copies can be
            held to.
    """
    module = registry.load("policy", _type_of(recipe.policy))
    seed_everything(recipe.seed)
    policy = cast(Policy, module.build(recipe.policy, env=env, device=device))
    if env.max_steps is not None and policy.chunk > env.max_steps:
        raise CapabilityError(
            f"a decision of the policy covers {policy.chunk} control steps and an episode of the env has "
            f"{env.max_steps}, so the rest could never be executed: lower the policy's chunk to {env.max_steps}, or "
            "raise env.max_steps"
        )
    if env.restarts_itself and policy.chunk > 1:
        raise CapabilityError(
            f"a decision of the policy covers {policy.chunk} control steps, and a copy of the env whose episode ends "
            f"within it cannot wait for the others{env.because}: set the policy's chunk to 1, or use an env whose "
            "copies wait for their reset"
        )
    return policy


def build_shaping(recipe: Recipe, *, env: EnvSpec, device: torch.device) -> Shaping | None:
    """Build the recipe's reward model and what is done with its answers; None without one.

    Raises:
        CapabilityError: It cannot work with this env or method.
    """
    if recipe.reward is None:
        return None
    module = registry.load("reward", _type_of(recipe.reward))
    config, credit = cast(RewardConfig, recipe.reward), cast(AlgorithmConfig, recipe.algorithm).credit
    check_reward(config, credit, recipe.collect, env, getattr(recipe.env, "only_pays", {}))
    return Shaping(module.build(config, env=env, device=device), config, credit)


def build_extras(
    algorithm: AlgorithmConfig, policy: Policy, loss: LossFunction, *, device: torch.device, seed: int
) -> list[Extra]:
    """What each optimizer step learns from beside the rollout."""
    extras: list[Extra] = []
    if algorithm.self_imitation.coef:
        extras.append(OwnSuccesses(algorithm.self_imitation, device, seed))
    if algorithm.replay.coef:
        extras.append(ReplayBuffer(algorithm.replay, loss))
    if algorithm.guide.kind != "none":
        update = algorithm.update
        extras.append(Guided(algorithm.guide, policy, size=update.micro_batch, units=update.micro_units))
    return extras


def _type_of(section: Any) -> str:
    return cast(str, section.type)


@dataclass
class Session(Saved):
    """One run of reinforcement learning in memory; `state_dict` is all that an exact resume needs."""

    recipe: Recipe
    device: torch.device
    policy: Policy
    credit: CreditChain
    updater: Updater
    collector: Collector
    shaping: Shaping | None = None
    env_steps: int = 0
    episodes: int = 0
    decisions: int = 0
    wall_s: float = 0.0
    score: float | None = None
    """Of the evaluation after the latest update; None when there was none."""

    conformance: tuple[str, ...] = ()
    """What the parts that met agree on, and what was stated where they do not."""
    restarts: int = 0
    """Processes of simulators that have been replaced and counted."""

    _COUNTERS = ("env_steps", "episodes", "decisions", "wall_s", "score")

    @classmethod
    def build(cls, recipe: Recipe, *, fresh: bool = True) -> Session:
        """Build every part of a recipe.

        Args:
            recipe: Complete.
            fresh: False when a checkpoint is to be loaded next: `start_from` is then not read.

        Raises:
            UserError: A part is missing, or parts do not fit together.
        """
        host.prepare(recipe.threads)
        device = choose_device(recipe.device)
        algorithm, c = cast(AlgorithmConfig, recipe.algorithm), recipe.collect
        envs: list[Env] = []
        try:
            for part in range(c.pipeline):
                envs.append(build_env(recipe, num_envs=c.copies // c.pipeline, device=device, split="train", part=part))
            policy = build_policy(recipe, env=envs[0].spec, device=device)
            check_fit(recipe, policy, envs[0].spec)
            check_extras(recipe, policy, envs[0])
            shaping = build_shaping(recipe, env=envs[0].spec, device=device)
            report: tuple[str, ...] = envs[0].conformance if isinstance(envs[0], Negotiated) else ()
            if fresh:
                report += start_policy(policy, envs[0].spec, recipe, fresh_critic=True)
            loss = LossFunction(algorithm.loss, policy.actions_per_decision, getattr(policy, "value_range", None))
            patience, own = recipe.train.max_bad_updates, algorithm.self_imitation.coef > 0
            if own and (imitates := getattr(policy, "imitates", None)) is not None:
                imitates()
            updater = Updater(
                policy, loss, algorithm.update, seed=recipe.seed, max_bad_updates=patience,
                extras=build_extras(algorithm, policy, loss, device=device, seed=recipe.seed),
            )  # fmt: skip
            collector = Collector(
                envs, policy, decisions=c.decisions, mode=c.mode, group_size=c.group_size, curriculum=c.curriculum,
                run_seed=recipe.seed, generator=torch.Generator(device).manual_seed(recipe.seed),
                keep_final_obs=shaping is not None or own, keep_actions=own,
                greedy_baseline=algorithm.credit.baseline == "greedy", budget=c.budget,
                demonstrated=algorithm.guide.kind != "none", hindsight=algorithm.self_imitation.hindsight,
            )  # fmt: skip
        except BaseException:
            for env in envs:
                env.close()
            raise
        credit = CreditChain(algorithm.credit, drop_equal_groups=c.dynamic_sampling != "none")
        return cls(recipe, device, policy, credit, updater, collector, shaping, conformance=report)

    def meaning(self) -> Side:
        """What the env says of actions and pictures."""
        return Side.of("the env", self.collector.spec)

    @property
    def update(self) -> int:
        """Finished updates."""
        return self.updater.version

    @property
    def bad_in_a_row(self) -> int:
        """Updates in a row that were skipped because nothing in them was finite."""
        return self.updater.bad_in_a_row

    @property
    def progress(self) -> float:
        """Share of the training done, in [0, 1]."""
        return min(1.0, self.env_steps / self.total_steps)

    @property
    def total_steps(self) -> int:
        """Control steps that the whole training takes."""
        return self.recipe.train.env_steps

    def iterate(self, clock: Clock) -> Partials:
        """Make one iteration of the algorithm: collect, credit, update, measure.

        Args:
            clock: Takes the time of each phase.

        Returns:
            metrics: Of this iteration.
        """
        self._anneal(self.recipe.collect.anneal)
        with clock.phase("rollout"):
            rollout, gathered = self._collect()
        self.whole = False
        with clock.phase("advantage"):
            penalty, penalised = self.updater.penalty(rollout)
            advantage = self.credit(rollout, penalty)
        with clock.phase("update"):
            metrics = self.updater.update(rollout, advantage, progress=self.progress)
            self.updater.remember(rollout)
            if (seen := observed(rollout)) is not None:
                self.policy.observe(seen)
        self._anneal(None)
        self.collector.version = self.update

        steps, decisions = int(rollout.steps[rollout.valid].sum()), int(rollout.valid.sum())
        self.env_steps += steps
        self.decisions += decisions
        self.episodes += len(rollout.finished.get("return", ()))
        metrics.merge(rollout_metrics(rollout, self.collector.spec.tasks))
        metrics.merge(gathered)
        metrics.merge(penalised)
        metrics.merge(self.collector.sampler.metrics())
        if self.collector.budget is not None:
            metrics.last("rollout/group_size_max", float(torch.bincount(rollout.group[0]).max()))
        metrics.merge_pairs(advantage.metrics)
        if (restarts := restarts_of(part.env for part in self.collector.parts)) is not None:
            metrics.add("perf/worker_restarts", restarts - self.restarts)
            self.restarts = restarts
        busy = sum(clock.seconds.values())
        metrics.last("perf/env_steps_per_s", steps / busy)
        metrics.last("perf/decisions_per_s", decisions / busy)
        self.whole = True
        return metrics

    def _anneal(self, anneal: Anneal | None) -> None:
        """Set the temperatures of this iteration, also of the reference, which is compared unit by unit."""
        if self.recipe.collect.anneal is None:
            return
        temperature = None
        if anneal is not None:
            temperature = anneal.temperatures(self.policy.num_units, self.update).to(self.device)
        for policy in (self.policy, self.updater.reference):
            if policy is not None:
                cast(Annealed, policy).anneal(temperature)

    def _collect(self) -> tuple[Rollout, Partials]:
        """One rollout with what the reward model pays, or as many as dynamic sampling needs, side by side."""
        metrics = Partials()

        c = self.recipe.collect

        def judged(rollout: Rollout) -> Rollout:
            if self.shaping is None:
                return rollout
            rollout, pairs = self.shaping(rollout)
            metrics.merge_pairs(pairs)
            return rollout

        def one() -> Rollout:
            if not c.hints:
                return judged(self.collector.collect())
            rollout, hinted = with_hints(
                lambda: judged(self.collector.collect()), lambda *x: judged(self.collector.again(*x)), c.hints
            )
            metrics.add("rollout/hinted_groups", hinted)
            return rollout

        if c.dynamic_sampling != "refill":
            return one(), metrics
        rollout, attempts = refill(
            one, self.credit.contrast, groups=c.copies // c.group_size, max_attempts=c.max_attempts
        )
        metrics.last("rollout/attempts", attempts)
        return rollout, metrics

    def counters(self) -> dict[str, float]:
        """Rows of metrics that only count."""
        return {
            "progress/update": self.update,
            "progress/env_steps": self.env_steps,
            "progress/decisions": self.decisions,
            "progress/episodes": self.episodes,
        }

    def state_dict(self) -> State:
        """The state of every part."""
        shaping: State = {} if self.shaping is None else {"shaping": self.shaping.state_dict()}
        return (
            self.common_state()
            | shaping
            | {
                "credit": self.credit.state_dict(),
                "updater": self.updater.state_dict(),
                "collector": self.collector.state_dict(),
            }
        )

    def _restore_parts(self, state: State) -> bool:
        self.credit.load_state_dict(state["credit"])
        self.updater.load_state_dict(state["updater"])
        if self.shaping is not None:
            self.shaping.load_state_dict(state["shaping"])
        return self.collector.load_state_dict(state["collector"])

    def close(self) -> None:
        """Close the env parts and their threads."""
        self.collector.close()
