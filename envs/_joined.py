"""One observation and one action for several envs, and a report of what that took."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embodied_rl.envs._bridge import Bridge, bridge_parts
from embodied_rl.envs._words import unambiguous
from embodied_rl.errors import CapabilityError, ConfigError, nearest
from embodied_rl.types import ActionSpec, EnvSpec, Obs, TensorSpec

if TYPE_CHECKING:
    from embodied_rl.envs.mixture import Config


@dataclass(frozen=True)
class Joined:
    """How the parts of a mixture fit together."""

    spec: EnvSpec
    report: tuple[str, ...]
    part_of: Tensor
    """[tasks] int64 which part a task of the mixture belongs to."""
    task_in_part: Tensor
    """[tasks] int64 which of its tasks it is there."""
    rename: tuple[dict[str, str], ...]
    bridges: tuple[Bridge, ...]
    """From the mixture's action to each part's."""
    rows: tuple[slice, ...]
    """Copies of the mixture that each part holds."""

    def observation_of(self, p: int, obs: Obs, wanted: Collection[str] | None = None) -> Obs:
        """Part p's observation under the mixture's names, with vectors padded; entries it lacks are absent.

        Args:
            p: Number of the part.
            obs: What it shows.
            wanted: The mixture's names of the entries that are asked for; None for all.
        """
        out = {}
        for old, x in obs.items():
            name = self.rename[p].get(old, old)
            if wanted is None or name in wanted:
                lacking = sum(self.spec.observation[name].shape[-1:]) - sum(x.shape[1:][-1:])
                out[name] = torch.nn.functional.pad(x, (0, lacking)) if lacking else x
        return out

    def action_of(self, p: int, action: Tensor) -> Tensor:
        """Part p's share [B, ...] of the mixture's action."""
        return self.bridges[p](action)


def share_copies(wanted: Sequence[int], copies: int) -> list[slice]:
    """Divide copies among parts in proportion, at least one each; the largest remainders are rounded up.

    Args:
        wanted: Copies of each part, of their sum.
        copies: B, at least one for each part.

    Returns:
        rows: Consecutive copies of each part; of 8, (1, 2, 1) makes 0:2, 2:6, 6:8.
    """
    exact = [copies * n / sum(wanted) for n in wanted]
    given = [max(1, int(x)) for x in exact]
    while sum(given) < copies:
        given[max(range(len(given)), key=lambda p: exact[p] - given[p])] += 1
    while sum(given) > copies:
        given[min((p for p in range(len(given)) if given[p] > 1), key=lambda p: exact[p] - given[p])] -= 1
    ends = list(accumulate(given))
    return [slice(end - n, end) for n, end in zip(given, ends, strict=True)]


def join(config: Config, names: Sequence[str], specs: Sequence[EnvSpec], rows: Sequence[slice] | None = None) -> Joined:
    """Negotiate one spec.

    Args:
        config: Of the mixture: what may be filled, padded, renamed and mapped.
        names: Of the parts.
        specs: Of the parts.
        rows: The copies of each; None where all parts have all of them.

    Returns:
        joined: The spec, and a report of everything that is not the same in every part.

    Raises:
        CapabilityError: They cannot be joined as stated.
        ConfigError: A setting of a part names what it does not have.
    """
    report: list[str] = []
    rename = tuple(dict(part.rename) for part in config.parts)
    observation = _observation(config, names, _renamed(names, specs, rename, report), report)
    action, bridges = _action(config, names, specs, report)
    tasks = [(p, t) for p, spec in enumerate(specs) for t in range(len(spec.tasks))]
    weights = [config.parts[p].weight / len(specs[p].tasks) for p, _ in tasks]
    limits = [spec.max_steps for spec in specs]
    cameras = tuple(c for c in specs[0].cameras if all(c in s.cameras for s in specs))
    clocks = {spec.control_hz for spec in specs}
    if len(clocks) > 1:
        told = ", ".join(f"{n} {s.control_hz or 'unknown'}" for n, s in zip(names, specs, strict=True))
        report.append(f"control steps per second differ ({told}), so films have no clock")
    if not cameras and any(spec.cameras for spec in specs):
        report.append("no camera is shared by all parts, so nothing can be filmed")
    abilities = {"has_success": "success", "seedable": "equal starts for equal seeds", "has_state": "state"}
    for flag, what in abilities.items():
        lacking = [n for n, s in zip(names, specs, strict=True) if not getattr(s, flag)]
        if lacking and len(lacking) < len(specs):
            report.append(f"the mixture has no {what}, because {', '.join(lacking)} has none")
    if len({s.vocabulary.fingerprint if s.vocabulary else None for s in specs}) > 1:
        raise CapabilityError("mixture: the parts speak different vocabularies, so the same ids would be other words")
    restless = [n for n, s in zip(names, specs, strict=True) if s.restarts_itself]
    if restless and rows is None:
        raise CapabilityError(
            f"mixture: the copies of {', '.join(restless)} restart by themselves, so they cannot wait while another "
            "part is played: state copies for every part, and at least one copy for each wherever it is played "
            "(evaluate.copies)"
        )
    blocks = None
    if rows is not None:
        of_part = [tuple(i for i, (q, _) in enumerate(tasks) if q == p) for p in range(len(specs))]
        blocks = tuple((r.stop - r.start, own) for r, own in zip(rows, of_part, strict=True))
        shares = ", ".join(f"{n} {r.stop - r.start}" for n, r in zip(names, rows, strict=True))
        report.append(f"each part has copies of its own: {shares}")
    spec = EnvSpec(
        observation=observation,
        action=action,
        num_envs=specs[0].num_envs if rows is None else rows[-1].stop,
        blocks=blocks,
        max_steps=None if None in limits else max(x for x in limits if x is not None),
        tasks=tuple(f"{names[p]}.{specs[p].tasks[t]}" for p, t in tasks),
        seedable=all(s.seedable for s in specs),
        has_state=all(s.has_state for s in specs),
        has_success=all(s.has_success for s in specs),
        cameras=cameras,
        control_hz=specs[0].control_hz if len(clocks) == 1 else None,
        on_demand=any(s.on_demand for s in specs),
        restarts_itself=bool(restless),
        reason="; ".join(f"{n}: {s.reason}" for n, s in zip(names, specs, strict=True) if s.reason),
        vocabulary=specs[0].vocabulary,
        task_weights=None if rows is not None or len(set(weights)) == 1 else tuple(weights),
    )
    pair = torch.tensor(tasks)
    held = tuple(rows) if rows is not None else (slice(0, spec.num_envs),) * len(specs)
    return Joined(spec, tuple(report), pair[:, 0], pair[:, 1], rename, bridges, held)


def _renamed(
    names: Sequence[str], specs: Sequence[EnvSpec], rename: Sequence[dict[str, str]], report: list[str]
) -> list[dict[str, TensorSpec]]:
    """Each part's observation under the mixture's names."""
    out = []
    for name, spec, table in zip(names, specs, rename, strict=True):
        for old, new in table.items():
            if old not in spec.observation:
                raise ConfigError(
                    f"mixture: {name} is to show '{old}' as '{new}', but it has no '{old}'"
                    f"{nearest(old, spec.observation)}"
                )
            report.append(f"{name} shows '{old}' as '{new}'")
        entries = {table.get(k, k): v for k, v in spec.observation.items()}
        if len(entries) < len(spec.observation):
            raise ConfigError(f"mixture: {name} would show two entries under one name; look at its rename {table}")
        out.append(entries)
    return out


def _observation(
    config: Config, names: Sequence[str], parts: Sequence[dict[str, TensorSpec]], report: list[str]
) -> dict[str, TensorSpec]:
    """The union of all entries; filling and padding are reported."""
    union: dict[str, TensorSpec] = {}
    used = {"missing": False, "pad": False}
    for entry in dict.fromkeys(k for part in parts for k in part):
        have = {n: part[entry] for n, part in zip(names, parts, strict=True) if entry in part}
        lacking = [n for n in names if n not in have]
        if lacking and config.missing == "refuse":
            raise CapabilityError(
                f"mixture: '{entry}' is shown by {', '.join(have)} and not by {', '.join(lacking)}: set env.missing: "
                "zeros to fill it there, or rename an entry that means the same (rename)"
            )
        vocabularies = {n: spec.vocabulary for n, spec in have.items() if spec.vocabulary}
        if len(set(vocabularies.values())) > 1:
            told = ", ".join(f"{text} ({n})" for n, text in vocabularies.items())
            raise CapabilityError(
                f"mixture: the ids of '{entry}' are of different vocabularies: {told}; give one of them another name "
                "(rename), which takes a policy that reads several rows of ids (mlp does)"
            )
        first, shape = next(iter(have.values())), _shape(config, entry, have, report)
        padded = any(spec.shape != shape for spec in have.values())
        used["pad"] |= padded and first.dtype == torch.float32
        if lacking:
            report.append(f"'{entry}' is filled with zeros in {', '.join(lacking)}")
            used["missing"] = True
        meanings = {n: spec.meaning for n, spec in have.items() if spec.meaning}
        if len(set(meanings.values())) > 1:
            report.append(f"'{entry}' is told as {'; '.join(f'{text} ({n})' for n, text in meanings.items())}")
        filled = bool(lacking) or padded
        union[entry] = replace(
            first,
            shape=shape,
            low=_widest([s.low for s in have.values()], min, filled),
            high=_widest([s.high for s in have.values()], max, filled),
            constant=all(s.constant for s in have.values()),
            meaning=" | ".join(dict.fromkeys(s.meaning for s in have.values() if s.meaning)),
            vocabulary=next(iter(vocabularies.values()), "") if len(vocabularies) == len(have) else "",
            texts=unambiguous(pair for s in have.values() for pair in s.texts),
        )
    idle = [f"{k} ({getattr(config, k)})" for k in used if getattr(config, k) in ("zeros", True) and not used[k]]
    if idle:
        raise ConfigError(f"mixture: {', '.join(idle)} does nothing, because all parts agree there: remove it")
    return union


def _shape(config: Config, entry: str, have: dict[str, TensorSpec], report: list[str]) -> tuple[int, ...]:
    """The shape of an entry that some parts have: the longest, where zeros can fill the shorter ones at their end."""
    shapes = {n: (spec.shape, spec.dtype) for n, spec in have.items()}
    kinds = set(shapes.values())
    if len(kinds) == 1:
        return kinds.pop()[0]
    rows, dtypes = all(len(shape) == 1 for shape, _ in kinds), {dtype for _, dtype in kinds}
    vectors, words = rows and dtypes == {torch.float32}, rows and dtypes == {torch.int64}
    nameless = [n for n, spec in have.items() if not spec.vocabulary]
    # 0 is no word in any vocabulary: a short sentence in a longer row ends in it as well.
    if not (config.pad if vectors else words and not nameless):
        told = ", ".join(f"{n} {dtype} {list(shape)}" for n, (shape, dtype) in shapes.items())
        cure = ""
        if vectors:
            cure = "set env.pad: true, or "
        elif words:
            cure = f"name the vocabulary of its ids in the spec of {' and of '.join(nameless)}, or "
        elif dtypes == {torch.uint8}:
            cure = "pictures are not resized: set one size in all of these envs, or "
        raise CapabilityError(
            f"mixture: '{entry}' differs: {told.replace('torch.', '')}; {cure}give one of them another name (rename)"
        )
    longest: int = max(shape[0] for shape, _ in kinds)
    for n, (shape, _) in shapes.items():
        if shape[0] < longest:
            what = "word ids" if words else "numbers"
            report.append(f"'{entry}' of {n} is padded with zeros from {shape[0]} to {longest} {what}")
    return (longest,)


def _widest(bounds: list[float | None], pick: Any, filled: bool) -> float | None:
    """The bound that holds in every part, zero included where something is filled with it."""
    known = [x for x in bounds if x is not None]
    if len(known) < len(bounds):
        return None
    return float(pick([*known, 0.0] if filled else known))


def _action(
    config: Config, names: Sequence[str], specs: Sequence[EnvSpec], report: list[str]
) -> tuple[ActionSpec, tuple[Bridge, ...]]:
    """One action, and how every part reads its own from it."""
    kinds = {n: s.action for n, s in zip(names, specs, strict=True)}
    told = ", ".join(f"{n} takes {a.kind} {list(a.shape) or a.size}" for n, a in kinds.items())
    if len({a.kind for a in kinds.values()}) > 1:
        raise CapabilityError(f"mixture: the parts take different kinds of action ({told}), which no mapping can join")
    first = specs[0].action
    if first.kind != "continuous":
        if any(part.action is not None for part in config.parts):
            raise ConfigError(f"mixture: action chooses numbers of a continuous action, and this one is {first.kind}")
        if idle := [n for n, part in zip(names, config.parts, strict=True) if part.bridge or part.convention]:
            raise ConfigError(
                f"mixture: bridge and convention of {idle[0]} are of continuous actions, and this one is {first.kind}: "
                "remove them"
            )
        if len({(a.size, a.length) for a in kinds.values()}) > 1:
            raise CapabilityError(f"mixture: the parts take different actions ({told}); take envs with the same ones")
        return replace(first, names=()), (Bridge(),) * len(specs)
    whole = [a.size for a, part in zip(kinds.values(), config.parts, strict=True) if part.action is None]
    wanted = [max(part.action) + 1 for part in config.parts if part.action]
    size = max([*whole, *wanted])
    for (name, spec), part in zip(kinds.items(), config.parts, strict=True):
        columns = part.action
        if columns is None and spec.size != size:
            raise CapabilityError(
                f"mixture: {told}, of {size} numbers in all; say which of them {name} takes, for example action: "
                f"{list(range(spec.size))}"
            )
        if columns is not None:
            if len(columns) != spec.size or len(set(columns)) != len(columns) or min(columns, default=0) < 0:
                raise ConfigError(
                    f"mixture: {name} takes {spec.size} numbers, and its action is {list(columns)}: name {spec.size} "
                    "different places, counted from 0"
                )
            if columns != tuple(range(size)):
                report.append(f"{name} takes the numbers {list(columns)} of {size}, and ignores the others")
    all_names = {a.names for a in kinds.values()}
    if len(all_names) > 1 and len({a.size for a in kinds.values()}) == 1:
        told = ", ".join(str(list(x)) for x in sorted(all_names))
        report.append(f"the action's numbers are called differently: {told}")
    shared = all_names.pop() if len(all_names) == 1 else ()
    bridges, convention = bridge_parts(config.parts, names, list(kinds.values()), size, report)
    return ActionSpec("continuous", size, shared if len(shared) == size else (), convention=convention), bridges
