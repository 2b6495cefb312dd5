"""What an envpool id shows and takes, read from its specification before any copy is made."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from embodied_rl.envs._spaces import ActionMap, Array, Leaf, leaves
from embodied_rl.envs._words import encode_words, word_row
from embodied_rl.envs.envpool.metaworld import convention_of
from embodied_rl.errors import CapabilityError
from embodied_rl.types import EnvSpec, TensorSpec

GOAL = ("observation", "achieved_goal", "desired_goal")
"""What Gymnasium-Robotics calls the three parts of an observation; they are joined in this order."""
MAX_WORDS = 16
"""Words of an instruction that there is room for."""


@dataclass(frozen=True)
class Entry:
    """One entry of the observation and the pool's arrays that it is made of, side by side on the last axis.

    Example: FetchReach's "state" [16] is made of three: observation [10], achieved_goal [3] and desired_goal [3].
    """

    name: str
    spec: TensorSpec
    leaves: tuple[Leaf, ...]
    at: tuple[int, ...]
    """Of each leaf, where its array lies in the pool's list."""

    def read(self, arrays: Sequence[Array], rows: int) -> Array:
        """[rows, *spec.shape] from what a pool gave."""
        parts = []
        for leaf, at in zip(self.leaves, self.at, strict=True):
            x = arrays[at]
            if leaf.start:
                x = x - leaf.start
            parts.append(x.astype(leaf.dtype, copy=False).reshape(rows, *leaf.spec.shape))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


class Given(NamedTuple):
    """What n copies gave, in the order in which a pool was told of them."""

    obs: dict[str, Array]
    """Without the instruction."""
    reward: Array
    terminated: Array
    truncated: Array
    success: Array | None
    terms: dict[str, Array]

    @staticmethod
    def joined(parts: Sequence[Given]) -> Given:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        successes = [part.success for part in parts if part.success is not None]
        return Given(
            {name: np.concatenate([part.obs[name] for part in parts]) for name in parts[0].obs},
            np.concatenate([part.reward for part in parts]),
            np.concatenate([part.terminated for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            np.concatenate(successes) if len(successes) == len(parts) else None,
            {name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms},
        )


@dataclass(frozen=True)
class Layout:
    """What one id shows and takes."""

    id: str
    entries: tuple[Entry, ...]
    action: ActionMap
    find: dict[str, int]
    """Where "reward", "done" and "trunc" lie in the pool's list of arrays."""
    success_at: int | None
    terms: dict[str, int]
    """Reward terms that are logged, and where they lie."""
    max_steps: int | None
    sentence: str | None
    """Its instruction; None where there is none."""
    words: tuple[int, ...] | None
    """Ids of the instruction's words; None where there is none."""

    @property
    def observation(self) -> dict[str, TensorSpec]:
        """Every entry, the instruction included."""
        told = {} if self.words is None else {"instruction": INSTRUCTION}
        return {entry.name: entry.spec for entry in self.entries} | told

    def observed(self, arrays: Sequence[Array], rows: int) -> dict[str, Array]:
        """The observation of n rows from what a pool gave, without the instruction."""
        return {entry.name: entry.read(arrays, rows) for entry in self.entries}

    def read(self, arrays: Sequence[Array], rows: int) -> Given:
        """Everything from what a pool gave for n rows."""
        cut = arrays[self.find["trunc"]]
        return Given(
            self.observed(arrays, rows),
            arrays[self.find["reward"]],
            arrays[self.find["done"]] > cut,
            cut,
            None if self.success_at is None else arrays[self.success_at].astype(bool),
            {name: arrays[at].astype(np.float32) for name, at in self.terms.items()},
        )


INSTRUCTION = word_row(MAX_WORDS)


def spec_of(layouts: Sequence[Layout], num_envs: int) -> EnvSpec:
    """The spec of an env whose tasks are these, all alike in what they show and take."""
    limits = [layout.max_steps for layout in layouts]
    observation = layouts[0].observation
    if "instruction" in observation:
        observation |= {"instruction": word_row(MAX_WORDS, [layout.sentence or "" for layout in layouts])}
    return EnvSpec(
        observation=observation,
        action=layouts[0].action.spec,
        num_envs=num_envs,
        max_steps=None if None in limits else max(x for x in limits if x is not None),
        tasks=tuple(layout.id for layout in layouts),
        seedable=False,
        has_state=False,
        reason="envpool seeds its copies once, when they are made, and gives no access to their state",
        has_success=all(layout.success_at is not None for layout in layouts),
    )


def layout_of(spec: Any, id: str, sentence: str | None, reward_terms: bool, where: str) -> Layout:
    """Read a specification.

    Args:
        spec: What `envpool.make_spec` returns.
        id: Of the env.
        sentence: Its instruction; None for none.
        reward_terms: Find the parts of the reward.
        where: For messages.

    Raises:
        CapabilityError: Several players, a space that is not understood, or an instruction that is too long.
    """
    keys = list(spec._state_keys)
    if getattr(spec.config, "max_num_players", 1) > 1 or len(spec._action_keys) != 3:
        raise CapabilityError(f"{where} has several players or several actions per step, and only one is understood")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Box low's precision lowered by casting": known and harmless
        found = leaves(spec.gymnasium_observation_space, where)
        action = ActionMap(spec.gymnasium_action_space, where)
    action.spec = replace(action.spec, convention=convention_of(id))
    limit = int(getattr(spec.config, "max_episode_steps", 0))
    words = None
    if sentence is not None:
        words = encode_words(sentence, MAX_WORDS, where, "raise MAX_WORDS in envs/envpool/layout.py")
    return Layout(
        id=id,
        entries=_entries(found, keys),
        action=action,
        find={name: keys.index(name) for name in ("reward", "done", "trunc")},
        success_at=next((keys.index(k) for k in ("info:success", "info:is_success") if k in keys), None),
        terms=_reward_terms(keys) if reward_terms else {},
        max_steps=limit if 0 < limit < 2**31 - 1 else None,
        sentence=sentence,
        words=words,
    )


def _entries(found: tuple[Leaf, ...], keys: list[str]) -> tuple[Entry, ...]:
    """One entry per leaf, or a single one where the leaves are the three parts of a goal env's observation."""
    observed = {tuple(k[4:].replace(":", ".").split(".")): i for i, k in enumerate(keys) if k.startswith("obs")}
    if len(found) == 1 and not found[0].path:
        return (Entry(found[0].name, found[0].spec, found, (next(iter(observed.values())),)),)
    vectors = all(leaf.spec.dtype == torch.float32 and len(leaf.spec.shape) == 1 for leaf in found)
    if {leaf.path[0] for leaf in found} == set(GOAL) and vectors:
        found = tuple(sorted(found, key=lambda leaf: GOAL.index(leaf.path[0])))
        parts = ", ".join(f"{leaf.name} {leaf.spec.shape[0]}" for leaf in found)
        spec = TensorSpec((sum(leaf.spec.shape[0] for leaf in found),), meaning=parts)
        return (Entry("state", spec, found, tuple(observed[leaf.path] for leaf in found)),)
    return tuple(
        Entry(leaf.name, replace(leaf.spec, privileged=leaf.path[0] == "privileged_state"), (leaf,), (at,))
        for leaf, at in ((leaf, observed[leaf.path]) for leaf in found)
    )


def _reward_terms(keys: list[str]) -> dict[str, int]:
    """Name -> index of every info that is a part of the reward: `reward_run` and `grasp_reward` -> run, grasp."""
    infos = {k.removeprefix("info:"): i for i, k in enumerate(keys) if k.startswith("info:")}
    chosen = {k: i for k, i in infos.items() if k.startswith("reward_") or k.endswith("_reward")}
    return {k.removeprefix("reward_").removesuffix("_reward"): i for k, i in chosen.items()}
