"""Any envpool ids: copies stepped by envpool's C++ threads (optional extra `envpool`).

    env: {type: envpool, id: HalfCheetah-v4}
    env: {type: envpool, id: [MetaWorld/Reach-v3, "MetaWorld/Drawer*"], kwargs: {partially_observable: false}}

Several ids are the tasks of one batch (`several.py`). MetaWorld's tasks are told in words; other ids are where
`instructions` has a sentence for them.

envpool seeds its copies once, when they are made, and cannot save their state: the spec says `seedable=False` and
`has_state=False`, so there are no groups, no fixed evaluation layouts and no exact resume; use `gymnasium` for these.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import envpool
import torch
from pydantic import Field, JsonValue

from embodied_rl.envs.envpool.layout import Layout, layout_of
from embodied_rl.envs.envpool.metaworld import sentence_of
from embodied_rl.envs.envpool.pool import EnvpoolEnv
from embodied_rl.envs.envpool.several import EnvpoolTasks
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError, nearest
from embodied_rl.manifest import frame
from embodied_rl.runfolder import installed
from embodied_rl.section import Section
from embodied_rl.types import Split

__all__ = ["Config", "EnvpoolEnv", "EnvpoolTasks", "build"]

RESERVED = ("num_envs", "batch_size", "num_threads", "seed", "env_seed", "max_episode_steps", "max_num_players")


class Config(Section):
    """Settings of an envpool env."""

    type: Literal["envpool"] = "envpool"
    id: str | tuple[str, ...] = Field(min_length=1)
    """One of `envpool.list_all_envs()`, for example `HalfCheetah-v4`; or several, which are the tasks of one batch. `*`
    stands for anything: `MetaWorld/Drawer*` is two tasks, `MetaWorld/*` all fifty."""
    instructions: dict[str, str] = {}
    """Id -> what its policy is told, for example {FetchPush-v4: push the block to the mark}. MetaWorld's tasks have
    sentences of their own, which this replaces."""
    kwargs: dict[str, JsonValue] = {}
    """Further settings of that env, for example {frame_skip: 4}."""
    max_steps: int | None = Field(None, ge=1)
    """Control steps after which an episode is truncated; null keeps envpool's own limit."""
    threads: int = Field(0, ge=0)
    """C++ threads of each pool; 0 lets envpool choose (one per core). Results do not depend on it."""
    reward_terms: bool = False
    """Log the parts of the reward that the env reports; costs a few microseconds per step."""


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> EnvpoolEnv | EnvpoolTasks:
    """Make one pool, or pools of several ids.

    Args:
        config: What to make.
        num_envs: Copies B.
        device: Where its tensors live; envpool itself runs on the CPU.
        split: Not needed here: `seed` already differs between training and evaluation.
        seed: Copy i of an id is seeded with `seed + i`.

    Raises:
        NotFoundError: No such id; names the nearest.
        CapabilityError: Several players, a space that is not understood, or ids that do not fit together.
        ConfigError: envpool refused a setting; names the nearest.
    """
    ids = _ids(config)
    unknown = [name for name in config.instructions if name not in ids]
    if unknown:
        raise ConfigError(f"env envpool: instructions has a sentence for '{unknown[0]}'{nearest(unknown[0], ids)}")
    layouts = [_layout(config, id) for id in ids]

    def make(layout: Layout, copies: int, first: int) -> Any:
        return _pool(config, layout.id, copies, config.threads, (seed + first) % 2**31)

    if len(layouts) == 1:
        env: EnvpoolEnv | EnvpoolTasks = EnvpoolEnv(layouts[0], make(layouts[0], num_envs, 0), device)
    else:
        env = EnvpoolTasks(_agreed(layouts), make, num_envs, device)
    env.told = functools.cache(functools.partial(_manifest, config, layouts))
    return env


def _manifest(config: Config, layouts: Sequence[Layout]) -> dict[str, Any]:
    """What results depend on.

    No episode can be started again, so what each id shows is told of one more pool: it is seeded when it is made, and
    its first observation is the same wherever the simulator and its assets are.
    """
    frames, one, zero = {}, torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    for layout in layouts:
        env = EnvpoolEnv(layout, _pool(config, layout.id, copies=1, threads=1, seed=0), zero.device)
        frames[layout.id] = frame(env.reset(one, zero, zero), 0, seed=0)
        env.close()
    # The assets are distributions of their own, with versions of their own.
    names = {found.name for found in importlib.metadata.distributions() if str(found.name).startswith("envpool")}
    packages = installed(sorted(names))
    return {"ids": list(frames), "settings": _settings(config), "packages": packages, "frames": frames}


def _where(id: str) -> str:
    return f"env envpool: '{id}'"


def _ids(config: Config) -> tuple[str, ...]:
    """What `id` stands for, each once."""
    known = envpool.list_all_envs()
    found: dict[str, None] = {}
    for wanted in (config.id,) if isinstance(config.id, str) else config.id:
        # An id is taken as it is written: some have brackets, which a pattern would read as a choice of letters.
        some = [wanted] if wanted in known else sorted(x for x in known if fnmatchcase(x, wanted.replace("[", "[[]")))
        if not some:
            alike = nearest(wanted, known)
            hint = alike if alike.startswith("; did") else "; envpool.list_all_envs() returns all"
            raise NotFoundError(f"{_where(wanted)} does not exist{hint}")
        found |= dict.fromkeys(some)
    return tuple(found)


def _pool(config: Config, id: str, copies: int, threads: int, seed: int) -> Any:
    size = {"num_envs": copies, "num_threads": threads, "seed": seed}
    return _refused(_where(id), envpool.make_gymnasium, id, _settings(config) | size)


def _settings(config: Config) -> dict[str, Any]:
    limit = {} if config.max_steps is None else {"max_episode_steps": config.max_steps}
    return dict(config.kwargs) | limit


def _layout(config: Config, id: str) -> Layout:
    where = _where(id)
    allowed = {k for k in _refused(where, envpool.make_spec, id, {}).config._fields if k not in RESERVED}
    for key in config.kwargs:
        if key not in allowed:
            raise ConfigError(f"{where} has no setting '{key}' in kwargs{nearest(key, allowed)}")
    spec = _refused(where, envpool.make_spec, id, _settings(config))
    sentence = config.instructions[id] if id in config.instructions else sentence_of(id)
    return layout_of(spec, id, sentence, config.reward_terms, where)


def _refused(where: str, make: Callable[..., Any], id: str, settings: dict[str, Any]) -> Any:
    try:
        return make(id, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where} cannot be made: {error}; look at env.kwargs") from None


def _agreed(layouts: list[Layout]) -> list[Layout]:
    """The layouts of several ids, if one policy can play them all; reward terms that only some have are left out.

    Raises:
        CapabilityError: They show or take different things, or a policy could not tell which is wanted.
    """
    first = layouts[0]
    for other in layouts[1:]:
        mute = next((x.id for x in (first, other) if x.words is None), None)
        if mute is not None:
            raise CapabilityError(
                f"{_where(mute)} is one of several tasks and has no instruction, so a policy could not tell which is "
                f"wanted: set env.instructions: {{{mute}: a sentence}}"
            )
        shown = [{name: (spec.shape, spec.dtype) for name, spec in x.observation.items()} for x in (first, other)]
        if shown[0] != shown[1] or first.action.spec != other.action.spec:
            told = [
                ", ".join(f"{k} {list(shape)}" for k, (shape, _) in entries.items()) + f", takes {_told(x)}"
                for entries, x in zip(shown, (first, other), strict=True)
            ]
            raise CapabilityError(
                f"env envpool: '{first.id}' shows {told[0]}, '{other.id}' {told[1]}, which one batch cannot "
                "hold: make each a part of env.type: mixture, which states what is padded and mapped"
            )
    shared = set.intersection(*(set(x.terms) for x in layouts))
    return [replace(x, terms={name: at for name, at in x.terms.items() if name in shared}) for x in layouts]


def _told(layout: Layout) -> str:
    """What an action is."""
    convention = layout.action.spec.convention
    return f"{layout.action.spec.size} numbers" + (f" ({convention.told()})" if convention else "")
