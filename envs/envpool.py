"""Any envpool id: copies stepped by envpool's C++ threads (optional extra `envpool`).

envpool seeds its copies once, when they are made, and cannot save their state: the spec says `seedable=False` and
`has_state=False`, so there are no groups, no fixed evaluation layouts and no exact resume; use `gymnasium` for these.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import envpool
import numpy as np
import torch
from pydantic import Field, JsonValue
from torch import Tensor

from embodied_rl.envs._spaces import ActionMap, Array, check_action, leaves
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError, nearest
from embodied_rl.runfolder import installed
from embodied_rl.section import Section
from embodied_rl.types import EnvSpec, Obs, Split, State, Step

RESERVED = ("num_envs", "batch_size", "num_threads", "seed", "env_seed", "max_episode_steps", "max_num_players")


class Config(Section):
    """Settings of an envpool env."""

    type: Literal["envpool"] = "envpool"
    id: str = Field(min_length=1)
    """One of `envpool.list_all_envs()`, for example `HalfCheetah-v4`."""
    kwargs: dict[str, JsonValue] = {}
    """Further settings of that env, for example {frame_skip: 4}."""
    max_steps: int | None = Field(None, ge=1)
    """Control steps after which an episode is truncated; null keeps envpool's own limit."""
    threads: int = Field(0, ge=0)
    """C++ threads of this pool; 0 lets envpool choose (one per core). Results do not depend on it."""
    reward_terms: bool = False
    """Log the parts of the reward that the env reports; costs a few microseconds per step."""


class EnvpoolEnv:
    """See `embodied_rl.types.Env`; besides, `step` can be split into `send` and `recv`, and the pool works in between.

    envpool restarts a finished copy by itself at the step after its end. It never gets that far here: a finished copy
    is either reset explicitly or left out of the next step.
    """

    def __init__(self, config: Config, pool: Any, device: torch.device) -> None:
        """Wrap a pool in synchronous mode (batch size = number of copies)."""
        self.where = f"env envpool: '{config.id}'"
        self.device = device
        self._kwargs = config.kwargs
        self._pool: Any = pool
        settings = pool.config
        b = self._b = int(settings["num_envs"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Box low's precision lowered by casting": known and harmless
            self._leaves = leaves(pool.single_observation_space, self.where)
            self._action = ActionMap(pool.single_action_space, self.where)
        # The pool's own lists of arrays, without the dictionaries that its Python wrapper makes of them at every step
        # (30 of 50 microseconds): where each array lies in them never changes.
        keys = list(pool._state_keys)
        self._find = {name: keys.index(name) for name in ("reward", "done", "trunc")}
        observed = {tuple(k[4:].replace(":", ".").split(".")): i for i, k in enumerate(keys) if k.startswith("obs")}
        single = len(self._leaves) == 1 and not self._leaves[0].path
        self._obs_at = [next(iter(observed.values())) if single else observed[leaf.path] for leaf in self._leaves]
        self._success_at = next((keys.index(k) for k in ("info:success", "info:is_success") if k in keys), None)
        self._terms = _reward_terms(keys) if config.reward_terms else {}
        limit = int(settings.get("max_episode_steps", 0))
        self.spec = EnvSpec(
            observation={leaf.name: leaf.spec for leaf in self._leaves},
            action=self._action.spec,
            num_envs=b,
            max_steps=limit if 0 < limit < 2**31 - 1 else None,
            tasks=(config.id,),
            seedable=False,
            has_state=False,
            has_success=self._success_at is not None,
        )
        self._all = np.arange(b, dtype=np.int32)
        continuous = self._action.spec.kind == "continuous"
        self._buffer = np.empty((b, self._action.spec.size), self._action.dtype) if continuous else None
        self._sent: Array | None = None
        self._obs: Obs | None = None

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; seeds are not used (`spec.seedable` is False)."""
        assert self._sent is None, "reset between send and recv"
        ids = self._all if self._obs is None else np.flatnonzero(mask.cpu().numpy()).astype(np.int32)
        if len(ids):
            self._pool._reset(ids)
            self._obs = self._read(self._pool._recv(), ids)
        assert self._obs is not None
        return dict(self._obs)

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active stay where they are."""
        self.send(action, active)
        return self.recv()

    def send(self, action: Tensor, active: Tensor | None = None) -> None:
        """Begin a control step in the pool's threads; `recv` must follow."""
        check_action(action, self.spec.action, self._b, self.device, self.where)
        assert self._sent is None, "send twice without recv"
        assert self._obs is not None, "step before the first reset"
        native = self._action(action, self._buffer)
        ids = self._all
        if active is not None and not bool(active.all()):
            ids = np.flatnonzero(active.cpu().numpy()).astype(np.int32)
            native = native[ids]
        if len(ids):
            self._pool._send([ids, ids, native])
        self._sent = ids

    def recv(self) -> Step:
        """Wait for the step that `send` began."""
        ids, self._sent = self._sent, None
        assert ids is not None, "recv without send"
        if not len(ids):
            return self._idle()
        arrays = self._pool._recv()
        find = self._find
        self._obs = self._read(arrays, ids)
        cut = arrays[find["trunc"]]
        return Step(
            obs=dict(self._obs),
            reward=self._column(arrays[find["reward"]], ids),
            terminated=self._column(arrays[find["done"]] > cut, ids),
            truncated=self._column(cut, ids),
            success=None if self._success_at is None else self._column(arrays[self._success_at].astype(bool), ids),
            metrics={name: self._column(arrays[at].astype(np.float32), ids) for name, at in self._terms.items()},
        )

    def get_state(self) -> State:
        """Not possible.

        Raises:
            CapabilityError: Always.
        """
        raise CapabilityError(
            f"{self.where} cannot save its state: envpool gives no access to it, so a resumed run begins new episodes; "
            "for an exact resume use env.type: gymnasium with the same id"
        )

    def set_state(self, state: State) -> Obs:
        """Not possible; see `get_state`."""
        self.get_state()
        raise AssertionError("get_state raises")

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Not offered.

        Raises:
            NotFoundError: Always.
        """
        raise NotFoundError(
            f"{self.where}: camera '{camera}' does not exist: this env draws no pictures; use env.type: gymnasium with "
            "env.render: true"
        )

    def manifest(self) -> dict[str, Any]:
        """What results depend on."""
        return {"id": self.spec.tasks[0], "kwargs": self._kwargs, "packages": installed(["envpool"])}

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    # ---- inside -------------------------------------------------------------------------------------------------

    def _read(self, arrays: list[Array], ids: Array) -> Obs:
        """The observation of all copies, of which `ids` are new.

        envpool writes every step into fresh memory that lives as long as somebody refers to it, so arrays that need no
        conversion are handed on as they are.
        """
        obs: Obs = {}
        for leaf, at in zip(self._leaves, self._obs_at, strict=True):
            x = arrays[at]
            if leaf.start:
                x = x - leaf.start
            x = x.astype(leaf.dtype, copy=False).reshape(len(ids), *leaf.spec.shape)
            new = torch.from_numpy(x).to(self.device)
            if len(ids) < self._b:
                assert self._obs is not None
                new = self._obs[leaf.name].index_copy(0, torch.from_numpy(ids.astype(np.int64)).to(self.device), new)
            obs[leaf.name] = new
        return obs

    def _column(self, x: Array, ids: Array) -> Tensor:
        """[B] from what the stepped copies gave; 0 or False for the others."""
        if len(ids) < self._b:
            everyone = np.zeros(self._b, x.dtype)
            everyone[ids] = x
            x = everyone
        return torch.from_numpy(x).to(self.device)

    def _idle(self) -> Step:
        """A step in which no copy was active."""
        assert self._obs is not None
        no = torch.zeros(self._b, dtype=torch.bool, device=self.device)
        zero = torch.zeros(self._b, device=self.device)
        success = None if self._success_at is None else no.clone()
        return Step(dict(self._obs), zero, no, no.clone(), success, {name: zero.clone() for name in self._terms})


def _reward_terms(keys: list[str]) -> dict[str, int]:
    """Name -> index of every info that is a part of the reward: `reward_run` and `grasp_reward` -> run, grasp."""
    infos = {k.removeprefix("info:"): i for i, k in enumerate(keys) if k.startswith("info:")}
    chosen = {k: i for k, i in infos.items() if k.startswith("reward_") or k.endswith("_reward")}
    return {k.removeprefix("reward_").removesuffix("_reward"): i for k, i in chosen.items()}


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> EnvpoolEnv:
    """Make a pool.

    Args:
        config: What to make.
        num_envs: Copies B.
        device: Where its tensors live; envpool itself runs on the CPU.
        split: Not needed here: `seed` already differs between training and evaluation.
        seed: Copy i is seeded with `seed + i`.

    Raises:
        NotFoundError: No such id; names the nearest.
        CapabilityError: Several players, or a space that is not understood.
        ConfigError: envpool refused a setting; names the nearest.
    """
    where = f"env envpool: '{config.id}'"
    known = envpool.list_all_envs()
    if config.id not in known:
        alike = nearest(config.id, known)
        hint = alike if alike.startswith("; did") else "; envpool.list_all_envs() returns all"
        raise NotFoundError(f"{where} does not exist{hint}")
    allowed = {k for k in envpool.make_spec(config.id).config._fields if k not in RESERVED}
    for key in config.kwargs:
        if key not in allowed:
            raise ConfigError(f"{where} has no setting '{key}' in kwargs{nearest(key, allowed)}")
    settings: dict[str, Any] = dict(config.kwargs, num_envs=num_envs, num_threads=config.threads, seed=seed % 2**31)
    if config.max_steps is not None:
        settings["max_episode_steps"] = config.max_steps
    try:
        pool = envpool.make_gymnasium(config.id, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where} cannot be made: {error}; look at env.kwargs") from None
    if pool.config.get("max_num_players", 1) > 1 or len(pool._action_keys) != 3:
        raise CapabilityError(f"{where} has several players or several actions per step, and only one is understood")
    return EnvpoolEnv(config, pool, device)
