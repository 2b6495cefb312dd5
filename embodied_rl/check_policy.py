"""What `embodied-rl check policy` tries; each function's first line is what it makes sure of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from embodied_rl.check_tools import (
    Broken,
    Finding,
    NotTried,
    attempt,
    check_tensor,
    clone,
    differing,
    examine,
    expect,
    identical,
)
from embodied_rl.errors import CapabilityError, ShapeError
from embodied_rl.types import FEATURES, PAD, ActionSpec, EnvSpec, Obs, Policy, PolicyOutput, TensorSpec

ROWS = 64

_WORDS = TensorSpec((6,), torch.int64, low=0, high=31, constant=True, meaning="instruction word ids")
_VECTOR = {"state": TensorSpec((11,))}
_SLOTS = {"state": TensorSpec((7,)), "objects": TensorSpec((3, 9)), "instruction": _WORDS}
_PIXELS = {"front": TensorSpec((32, 32, 3), torch.uint8, low=0, high=255), "instruction": _WORDS}


def _spec(observation: dict[str, TensorSpec], action: ActionSpec) -> EnvSpec:
    return EnvSpec(observation, action, ROWS, 100, ("task",), seedable=True, has_state=True)


SPECS = {
    "vector, continuous": _spec(_VECTOR, ActionSpec("continuous", 4)),
    "vector, discrete": _spec(_VECTOR, ActionSpec("discrete", 5)),
    "objects and words": _spec(_SLOTS, ActionSpec("continuous", 7)),
    "pixels and words": _spec(_PIXELS, ActionSpec("continuous", 7)),
}
"""Made-up envs that a policy is built for when none is given."""


@dataclass
class PolicyCase:
    """A policy under test, how to make another one, and what it looks at."""

    make: Callable[[EnvSpec], Policy]
    spec: EnvSpec
    policy: Policy
    device: torch.device

    @property
    def module(self) -> nn.Module:
        """The policy as a module."""
        return cast(nn.Module, self.policy)

    def obs(self, rows: int = ROWS, seed: int = 0) -> Obs:
        """Made-up observations within the spec's bounds."""
        g, out = torch.Generator().manual_seed(seed), {}
        for name, o in self.spec.observation.items():
            if o.dtype.is_floating_point:
                x = torch.randn(rows, *o.shape, generator=g)
                low, high = (float("-inf") if o.low is None else o.low), (float("inf") if o.high is None else o.high)
                out[name] = x.clamp(low, high).to(o.dtype)
            else:
                top = int(o.high if o.high is not None else 1) + 1
                x = torch.randint(max(int(o.low or 0), 0), top, (rows, *o.shape), generator=g).to(o.dtype)
                if o.low == PAD:  # rows of tokens end early
                    count = torch.randint(1, o.shape[-1] + 1, (rows, *o.shape[:-1], 1), generator=g)
                    x = x.masked_fill(torch.arange(o.shape[-1]) >= count, PAD)
                out[name] = x
        return {name: x.to(self.device) for name, x in out.items()}

    def act(self, obs: Obs, seed: int = 0, *, greedy: bool = False) -> PolicyOutput:
        """One decision by a generator of its own, copied as a rollout copies it."""
        out = self.policy.act(obs, generator=torch.Generator(self.device).manual_seed(seed), greedy=greedy)
        return PolicyOutput(*(clone(getattr(out, name)) for name in ("units", "logp", "action", "value", "mask")))


def examine_policy(
    make: Callable[[EnvSpec], Policy], specs: dict[str, EnvSpec] | None, device: torch.device
) -> list[Finding]:
    """Build the policy for each env and run `CHECKS` on it; see `embodied_rl.check.check_policy_factory`."""
    findings, accepted = [], 0
    for name, spec in (specs or SPECS).items():
        prefix = f"[{name}] " if name else ""
        torch.manual_seed(0)
        made: list[Policy] = []
        try:
            findings.append(attempt(f"{prefix}can be built", lambda: made.append(make(spec))))  # noqa: B023 (used at once)
        except CapabilityError as error:
            findings.append(Finding(f"{prefix}can be built", None, str(error)))
            continue
        accepted += 1
        if not made:
            continue
        policy = made[0]
        if not isinstance(policy, nn.Module):
            findings.append(Finding(f"{prefix}is a torch.nn.Module", False, f"it is a {type(policy).__name__}"))
            continue
        # Tidy initial values (zero heads, equal rows) would hide mistakes.
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.05 * torch.randn_like(p))
        findings += examine(CHECKS, PolicyCase(make, spec, policy, device), prefix)
    if not accepted:
        findings.append(Finding("some env is understood", False, "every env was refused; see the reasons above"))
    return findings


def _state(case: PolicyCase) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], clone(dict(case.module.state_dict())))


def _counted(logp: Tensor, mask: Tensor | None) -> Tensor:
    return logp if mask is None else torch.where(mask, logp, torch.zeros_like(logp))


def _far(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to 1 or the size of a."""
    return float(((a - b).abs() / a.abs().clamp(min=1.0)).max()) if a.numel() else 0.0


def _check_value(case: PolicyCase, value: Tensor | None, rows: int) -> None:
    has = case.policy.has_critic
    expect((value is not None) == has, f"value is {'None' if value is None else 'given'}, but has_critic is {has}")
    if value is not None:
        shape = (rows, case.policy.num_units) if getattr(case.policy, "value_per_unit", False) else (rows,)
        check_tensor(value, shape, value.dtype, case.device, "value")
        expect(bool(torch.isfinite(value).all()), "value is not finite")


# ---- the checks -------------------------------------------------------------------------------------------------


def decision_has_the_promised_form(case: PolicyCase) -> str:
    """A decision has the promised shapes and types, for any number of rows."""
    p, a = case.policy, case.spec.action
    for rows in (1, 2, ROWS):
        out = case.act(case.obs(rows))
        expect(out.logp.dtype.is_floating_point, f"logp is {out.logp.dtype}, expected floats")
        check_tensor(out.logp, (rows, p.num_units), out.logp.dtype, case.device, "logp")
        found, wanted = list(out.units.shape), [rows, p.num_units]
        expect(found[:2] == wanted, f"units are {found}, expected {wanted} and what a unit holds")
        check_tensor(out.action, (rows, p.chunk, *a.shape), a.dtype, case.device, "action")
        for c in range(p.chunk):
            try:
                a.check(out.action[:, c], rows, case.device, "the policy's")
            except ShapeError as error:
                raise Broken(str(error)) from error
        if out.mask is not None:
            check_tensor(out.mask, (rows, p.num_units), torch.bool, case.device, "mask")
        _check_value(case, out.value, rows)
        raw = p.act(case.obs(rows), generator=None, greedy=True)
        expect(not (raw.logp.requires_grad or raw.action.requires_grad), "act must not record gradients")
    return f"{p.num_units} units, chunk {p.chunk}"


def evaluation_has_the_promised_form(case: PolicyCase) -> None:
    """An evaluation has the promised shapes, for any number of rows; entropy only when asked for."""
    p = case.policy
    for rows in (1, 3, ROWS):
        obs = case.obs(rows)
        units = case.act(obs).units
        out = p.evaluate(obs, units)
        for name, x in (("logp", out.logp), ("entropy", out.entropy)):
            if x is not None:
                check_tensor(x, (rows, p.num_units), x.dtype, case.device, name)
                expect(bool(torch.isfinite(x).all()), f"{name} is not finite")
        _check_value(case, out.value, rows)
        lean = p.evaluate(obs, units, entropy=False)
        expect(lean.entropy is None, "entropy is computed although entropy=False")
        expect(identical(lean.logp, out.logp), "logp depends on whether entropy is asked for")


def ratio_is_one(case: PolicyCase) -> str:
    """Acting and evaluating give the same log-probabilities, bit for bit."""
    worst = 0.0
    for rows in (1, 5, ROWS):
        for greedy in (False, True):
            obs = case.obs(rows, seed=rows)
            out = case.act(obs, greedy=greedy)
            again = case.policy.evaluate(obs, out.units).logp.detach()
            a, b = _counted(out.logp, out.mask), _counted(again, out.mask)
            worst = max(worst, _far(a, b))
            how = "greedy" if greedy else "sampled"
            expect(identical(a, b), f"{rows} rows, {how}: they differ by up to {worst:.2g}")
    obs = case.obs()
    out = case.act(obs)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).to(case.device)[: ROWS // 2]
    part = case.policy.evaluate({k: v[order] for k, v in obs.items()}, out.units[order]).logp.detach()
    gap = _far(_counted(out.logp, out.mask)[order], _counted(part, None if out.mask is None else out.mask[order]))
    expect(gap < 1e-4, f"a minibatch of half of the rows in another order differs by {gap:.2g}")
    return f"largest gap in a minibatch {gap:.1g}"


def features_stand_for_the_observation(case: PolicyCase) -> str:
    """Evaluating what `act` gave as features equals evaluating the observation, in values and gradients."""
    obs = case.obs()
    features = case.policy.act(obs, generator=None, greedy=True).features
    if features is None:
        return "it gives none"
    check_tensor(features, (ROWS, *features.shape[1:]), features.dtype, case.device, "features")
    features, units, found = features.clone(), case.act(obs).units, []
    for seen in ({FEATURES: features}, obs):
        out = case.policy.evaluate(seen, units)
        terms = [x for x in (out.logp, out.entropy, out.value, out.value_logits) if x is not None]
        case.module.zero_grad()
        torch.stack([x.square().sum() for x in terms]).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in case.module.parameters()]
        found.append([x.detach() for x in terms] + grads)
    case.module.zero_grad()
    far = max(_far(a, b) for a, b in zip(*found, strict=True))
    expect(far < 1e-4, f"they differ by up to {far:.2g}: what makes the features must be frozen")
    return f"largest difference {far:.1g}"


def values_agree(case: PolicyCase) -> None:
    """Act, evaluate and value estimate the same values."""
    p, obs = case.policy, case.obs()
    if not p.has_critic:
        raise NotTried("it has no critic")
    out, value = case.act(obs), p.value(obs)
    check_tensor(value, (ROWS,), value.dtype, case.device, "value()")
    expect(not value.requires_grad, "value() must not record gradients")
    evaluated = p.evaluate(obs, out.units).value
    if getattr(p, "privileged_critic", False):
        told = {name: obs[name] for name, entry in case.spec.observation.items() if entry.privileged}
        gap = _far(value, p.value(case.obs(seed=9) | told))
        expect(gap < 1e-4, f"privileged_critic is True, but other entries move the value by {gap:.2g}")
    for name, other in (("act", out.value), ("evaluate", evaluated)):
        first = other[:, 0] if other is not None and other.ndim == 2 else other
        gap = float("inf") if first is None else _far(value, first.detach())
        expect(gap < 1e-4, f"value and {name} differ by {gap:.2g}")


def greedy_is_deterministic(case: PolicyCase) -> None:
    """Greedy decisions do not depend on the generator."""
    obs = case.obs()
    a, b = case.act(obs, 1, greedy=True), case.act(obs, 2, greedy=True)
    expect(identical(a.action, b.action), "two greedy decisions for the same observations differ")
    none = case.policy.act(obs, generator=None, greedy=True)
    expect(identical(a.action, none.action), "a greedy decision without a generator differs")


def samples_follow_the_generator(case: PolicyCase) -> None:
    """The same generator gives the same bits, another one other samples, and the global one is left alone."""
    obs = case.obs()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = case.act(obs, 1)
    expect(torch.equal(before, torch.get_rng_state()), "sampling moves torch's global generator although one was given")
    torch.manual_seed(2)
    b, c = case.act(obs, 1), case.act(obs, 2)
    for name in ("units", "logp", "action"):
        expect(identical(getattr(a, name), getattr(b, name)), f"{name} differ for the same generator")
    expect(not identical(a.units, c.units), "another generator gives the same samples: sampling does not use it")


def gradients_reach_every_parameter(case: PolicyCase) -> str:
    """The log-probabilities, entropies and values have a gradient for every trainable parameter."""
    obs, g = case.obs(), torch.Generator().manual_seed(0)
    out = case.policy.evaluate(obs, case.act(obs).units)
    case.module.zero_grad()
    # Random weights, because a plain sum can cancel (the log-probabilities of a softmax do).
    terms = [x for x in (out.logp, out.entropy, out.value, out.value_logits) if x is not None]
    torch.stack([(x * torch.randn(x.shape, generator=g).to(x)).sum() for x in terms]).sum().backward()
    trainable = [(n, p) for n, p in case.module.named_parameters() if p.requires_grad]
    silent = [n for n, p in trainable if p.grad is None or not bool(p.grad.any())]
    wild = [n for n, p in trainable if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    case.module.zero_grad()
    expect(not wild, f"the gradient is not finite in {', '.join(wild)}")
    expect(not silent, f"no gradient reaches {', '.join(silent)}: remove or freeze what is not used")
    return f"{len(trainable)} tensors, {sum(p.numel() for _, p in trainable):,} numbers"


def rows_do_not_meet(case: PolicyCase) -> None:
    """What a row gives does not depend on the other rows of the batch."""
    obs, other = case.obs(), case.obs(seed=9)
    units = case.act(obs).units
    mixed = {k: torch.cat([v[: ROWS // 2], other[k][ROWS // 2 :]]) for k, v in obs.items()}
    a, b = (case.policy.evaluate(o, units).logp.detach()[: ROWS // 2] for o in (obs, mixed))
    expect(_far(a, b) < 1e-4, f"log-probabilities move by {_far(a, b):.2g} when only other rows change")


def nothing_moves_while_collecting(case: PolicyCase) -> str:
    """Only observe moves running statistics: acting, evaluating and asking for values change nothing."""
    obs = case.obs(seed=3)
    before, greedy, kept = _state(case), case.act(obs, greedy=True).action.clone(), clone(obs)
    units = case.act(obs).units
    kept_units = units.clone()
    case.policy.evaluate(obs, units)
    if case.policy.has_critic:
        case.policy.value(obs)
    name = next(differing(before, _state(case)), None)
    expect(name is None, f"'{name}' changed")
    name = next(differing({**kept, "units": kept_units}, {**obs, "units": units}), None)
    expect(name is None, f"'{name}', which was handed in, was changed")
    again = case.act(obs, greedy=True).action
    expect(identical(greedy, again), "the same observations give another greedy decision afterwards")
    case.policy.observe(obs)
    moved = list(differing(before, _state(case)))
    trainable = {n for n, p in case.module.named_parameters()} & set(moved)
    expect(not trainable, f"observe changed the parameters {', '.join(sorted(trainable))}")
    return f"observe moves {len(moved)} tensors"


def state_dict_is_complete(case: PolicyCase) -> None:
    """The state_dict holds everything: another policy that loads it decides the same, bit for bit."""
    obs = case.obs(seed=4)
    case.policy.observe({k: v * 2 if v.dtype.is_floating_point else v for k, v in case.obs(seed=5).items()})
    torch.manual_seed(123)
    other = case.make(case.spec)
    cast(nn.Module, other).load_state_dict(_state(case))
    twin = PolicyCase(case.make, case.spec, other, case.device)
    a, b = case.act(obs, 3), twin.act(obs, 3)
    for name in ("units", "logp", "action", "value"):
        x, y = getattr(a, name), getattr(b, name)
        expect(x is None or identical(x, y), f"{name} differ after load_state_dict: something lives outside of it")


CHECKS: tuple[Callable[[PolicyCase], str | None], ...] = (
    decision_has_the_promised_form, evaluation_has_the_promised_form, ratio_is_one,
    features_stand_for_the_observation, values_agree, greedy_is_deterministic, samples_follow_the_generator,
    gradients_reach_every_parameter, rows_do_not_meet, nothing_moves_while_collecting, state_dict_is_complete,
)  # fmt: skip
