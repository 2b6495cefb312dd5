"""What the contract tests are made of: findings, a runner, comparisons, and an env under test."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.seeding import start_seeds
from embodied_rl.types import PAD, Env, EnvSpec, Obs, Split, Step

Case = TypeVar("Case")


@dataclass(frozen=True)
class Finding:
    """One thing the contract asks for.

    Example: `Finding("a partial reset leaves the other copies alone", False, "'state' of copy 1 changed")`.
    """

    name: str
    ok: bool | None
    """None when it could not be tried; the detail says why."""
    detail: str = ""


class Broken(Exception):
    """The contract is broken; the message says what was found."""


class NotTried(Exception):
    """The check does not apply; the message says why."""


def expect(condition: bool, detail: str) -> None:
    """Raise `Broken` with the detail unless the condition holds."""
    if not condition:
        raise Broken(detail)


def examine(checks: Sequence[Callable[[Case], str | None]], case: Case, prefix: str = "") -> list[Finding]:
    """Run checks one after another; a failing one does not stop the others.

    Args:
        checks: Functions whose docstring's first line is what they make sure of; they may return a detail.
        case: What they are called with.
        prefix: Put before each name.

    Returns:
        findings: One per check, in order.
    """
    return [_one(check, case, prefix) for check in checks]


def attempt(name: str, build: Callable[[], object]) -> Finding:
    """Whether something can be built; what the user can mend (`UserError`) is raised and is no finding."""
    try:
        build()
    except UserError:
        raise
    except Exception as error:
        return Finding(name, False, _describe(error))
    return Finding(name, True)


def _one(check: Callable[[Case], str | None], case: Case, prefix: str) -> Finding:
    name = prefix + (check.__doc__ or check.__name__).split("\n")[0].rstrip(".")
    try:
        return Finding(name, True, check(case) or "")
    except Broken as broken:
        return Finding(name, False, str(broken))
    except NotTried as reason:
        return Finding(name, None, str(reason))
    except Exception as error:
        return Finding(name, False, _describe(error))


def _describe(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"


def clone(tree: Any) -> Any:
    """A deep copy of tensors in dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: clone(v) for k, v in tree.items()}
    return type(tree)(clone(v) for v in tree) if isinstance(tree, list | tuple) else tree


def identical(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same = a == b
    return bool((same | ((a != a) & (b != b))).all())


def differing(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Places at which two trees of tensors and plain values are not identical."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not identical(a, b):
            yield place
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            inner = f"{place}/{key}".lstrip("/")
            yield from differing(a[key], b[key], inner) if key in a and key in b else (inner,)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differing(x, y, f"{place}/{i}".lstrip("/"))
    elif type(a) is not type(b) or a != b:
        yield place


def check_obs(obs: Obs, spec: EnvSpec, rows: int, device: torch.device, when: str) -> None:
    """Raise `Broken` unless an observation is what the spec promises: names, shapes, types, finite, within bounds."""
    expect(set(obs) == set(spec.observation), f"{when}: entries {sorted(obs)}, the spec has {sorted(spec.observation)}")
    for name, entry in spec.observation.items():
        x = obs[name]
        check_tensor(x, (rows, *entry.shape), entry.dtype, device, f"{when}: '{name}'")
        if x.dtype.is_floating_point:
            bad = ~torch.isfinite(x)
            expect(not bool(bad.any()), f"{when}: '{name}' is not finite in copies {rows_where(bad)}")
        values = x.double()
        slack = 1e-5 * max(abs(entry.low or 0.0), abs(entry.high or 0.0), 1.0) if x.dtype.is_floating_point else 0.0
        for bound, beyond in ((entry.low, -1), (entry.high, 1)):
            if bound is not None:
                bad = beyond * (values - bound) > slack
                detail = f"{when}: '{name}' reaches {float(values[bad][0]) if bool(bad.any()) else 0:g}"
                expect(not bool(bad.any()), f"{detail}, the spec's {'low' if beyond < 0 else 'high'} is {bound:g}")


def check_tensor(x: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> None:
    """Raise `Broken` unless x is a tensor of this shape, type and device."""
    expect(isinstance(x, Tensor), f"{what} is a {type(x).__name__}, expected a tensor")
    found = f"{what} is {x.dtype} {list(x.shape)} on {x.device}"
    right = tuple(x.shape) == shape and x.dtype == dtype and x.device.type == device.type
    expect(right, f"{found}, expected {dtype} {list(shape)} on {device}")


def rows_where(mask: Tensor) -> list[int]:
    """Rows with a True anywhere, at most 8."""
    return [int(i) for i in mask.reshape(len(mask), -1).any(dim=1).nonzero().flatten()[:8]]


@dataclass
class EnvCase:
    """An env under test and how to make more of them."""

    make: Callable[..., Env]
    copies: int
    steps: int
    can_lengthen: bool
    opened: list[Env] = field(default_factory=list)
    _env: Env | None = None

    @property
    def env(self) -> Env:
        """One env that most checks share; each begins with a full reset."""
        if self._env is None:
            self._env = self.fresh()
        return self._env

    def fresh(self, copies: int | None = None, **settings: Any) -> Env:
        """A new env."""
        env = self.make(copies or self.copies, **settings)
        self.opened.append(env)
        return env

    def tidy(self) -> None:
        """Close every env but the shared one: simulators are too large to keep those of earlier checks."""
        for env in self.opened:
            if env is not self._env:
                env.close()
        self.opened = [env for env in self.opened if env is self._env]

    def close(self) -> None:
        """Close every env that was made."""
        for env in self.opened:
            env.close()


def seeds_of(env: Env, first: int = 0, split: Split = "train") -> Tensor:
    """[B] different start seeds; another `first` gives others."""
    b = env.spec.num_envs
    return start_seeds(0, split, torch.zeros(b, dtype=torch.int64), torch.arange(first, first + b)).to(env.device)


def tasks_of(env: Env, first: int = 0) -> Tensor:
    """[B] tasks in turn, of those that each copy can play."""
    able = env.spec.playable()
    if able is not None:
        turn = (torch.arange(env.spec.num_envs) + first) % able.sum(1)
        return (able & (able.cumsum(1) == turn[:, None] + 1)).int().argmax(1).to(env.device)
    return ((torch.arange(env.spec.num_envs) + first) % len(env.spec.tasks)).to(env.device)


def start(env: Env, first: int = 0) -> Obs:
    """Reset every copy; the observation, copied."""
    b = env.spec.num_envs
    everyone = torch.ones(b, dtype=torch.bool, device=env.device)
    return clone(env.reset(everyone, seeds_of(env, first), tasks_of(env, first)))


def restart(env: Env, mask: Tensor, first: int = 1000) -> Obs:
    """Reset the masked copies; the observation, copied."""
    return clone(env.reset(mask.to(env.device), seeds_of(env, first), tasks_of(env, first)))


def move(env: Env, action: Tensor, active: Tensor | None = None) -> Step:
    """One step and its observation, copied: an env may reuse its arrays."""
    step = env.step(action, active)
    if env.spec.on_demand:
        expect(not step.obs, "spec.on_demand is True, but step gives an observation: leave Step.obs empty")
        step.obs = env.observe()
    return Step(**{f.name: clone(getattr(step, f.name)) for f in dataclasses.fields(Step)})


def actions_for(env: Env, steps: int, seed: int = 0) -> list[Tensor]:
    """Random actions, the same for the same seed."""
    g, a, b = torch.Generator().manual_seed(seed), env.spec.action, env.spec.num_envs
    if a.kind == "discrete":
        return [torch.randint(a.size, (b,), generator=g).to(env.device) for _ in range(steps)]
    if a.kind == "tokens":
        rows = [torch.randint(a.size, (b, a.length), generator=g) for _ in range(steps)]
        ends = [torch.randint(1, a.length + 1, (b, 1), generator=g) for _ in range(steps)]
        place = torch.arange(a.length)
        return [x.masked_fill(place >= end, PAD).to(env.device) for x, end in zip(rows, ends, strict=True)]
    return [(torch.rand(b, a.size, generator=g) * 2 - 1).to(env.device) for _ in range(steps)]


def zeros_for(env: Env) -> Tensor:
    """The action that is zero everywhere."""
    return torch.zeros(env.spec.num_envs, *env.spec.action.shape, dtype=env.spec.action.dtype, device=env.device)


def copy_mask(env: Env, *copies: int) -> Tensor:
    """[B] bool, True for the given copies."""
    mask = torch.zeros(env.spec.num_envs, dtype=torch.bool, device=env.device)
    mask[list(copies)] = True
    return mask


def check_step(step: Step, env: Env, when: str, rows: Tensor | None = None) -> None:
    """Raise `Broken` unless a step is what the spec promises; `rows` [B] bool are those whose values count."""
    spec, b = env.spec, env.spec.num_envs
    rows = torch.ones(b, dtype=torch.bool, device=env.device) if rows is None else rows
    for name in ("terminated", "truncated"):
        check_tensor(getattr(step, name), (b,), torch.bool, env.device, f"{when}: {name}")
    check_tensor(step.reward, (b,), torch.float32, env.device, f"{when}: reward")
    bad = ~torch.isfinite(step.reward) & rows
    expect(not bool(bad.any()), f"{when}: reward is not finite in copies {rows_where(bad)}")
    both = step.terminated & step.truncated & rows
    expect(not bool(both.any()), f"{when}: copies {rows_where(both)} are both terminated and truncated")
    if step.invalid is not None:
        check_tensor(step.invalid, (b,), torch.bool, env.device, f"{when}: invalid")
        going = step.invalid & ~(step.terminated | step.truncated) & rows
        expect(not bool(going.any()), f"{when}: copies {rows_where(going)} are invalid, but their episodes go on")
    if step.starting is not None:
        check_tensor(step.starting, (b,), torch.bool, env.device, f"{when}: starting")
        expect(spec.restarts_itself, f"{when}: starting is given, but spec.restarts_itself is False")
        busy = step.starting & (step.terminated | step.truncated | (step.reward != 0))
        expect(not bool(busy.any()), f"{when}: copies {rows_where(busy)} pay or end while their episode has not begun")
    if spec.has_success:
        check_tensor(step.success, (b,), torch.bool, env.device, f"{when}: success")
    else:
        expect(step.success is None, f"{when}: success is given, but spec.has_success is False")
    if spec.has_results:
        check_tensor(step.result, (b,), torch.int64, env.device, f"{when}: result")
        assert step.result is not None
        low = (step.result < -1) & rows
        expect(not bool(low.any()), f"{when}: result is below -1 in copies {rows_where(low)}")
    else:
        expect(step.result is None, f"{when}: result is given, but spec.has_results is False")
    for name, x in step.metrics.items():
        check_tensor(x, (b,), torch.float32, env.device, f"{when}: metrics['{name}']")
        bad = ~torch.isfinite(x) & rows
        expect(not bool(bad.any()), f"{when}: metrics['{name}'] is not finite in copies {rows_where(bad)}")
    shown = {k: v[rows] for k, v in step.obs.items()}
    check_obs(shown, spec, int(rows.sum()), env.device, when)


def observations_differ(a: Obs, b: Obs, rows: Tensor) -> list[str]:
    """Names of entries that are not identical in the given rows."""
    return [name for name in a if not identical(a[name][rows], b[name][rows])]
