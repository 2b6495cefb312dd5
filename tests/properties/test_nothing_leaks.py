"""What does not count changes nothing, even when it is NaN or infinite: masked units, decisions after the end."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.batch import as_batch, flatten
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.loss import Kl, Loss, LossFunction, ValueLoss
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import batch_of, evaluation_of, mlp, rollout_of, spec

F64 = torch.float64
JUNK = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30])
LEVELS = ["unit", "action", "decision", "trajectory"]
AGGREGATES = ["unit_mean", "decision_mean", "trajectory_mean", "constant"]


def config(level, aggregate, reduce="sum"):
    return Loss(
        ratio=level, reduce="sum" if level == "unit" else reduce, aggregate=aggregate, constant_units=9 if aggregate == "constant" else None, entropy_coef=0.1,
        dual_clip=3.0, kl=Kl(kind="k3", coef=0.3), value=ValueLoss(coef=0.5),
    )  # fmt: skip


def numbers(shape, seed):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@given(st.integers(0, 10**6), st.sampled_from(LEVELS), st.sampled_from(AGGREGATES), st.sampled_from(["sum", "mean"]), JUNK)
def test_masked_units_change_neither_the_loss_nor_any_gradient(seed, level, aggregate, reduce, junk):
    n, a = 6, 4
    mask = torch.rand(n, a, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0], mask[1] = True, False
    trajectory = torch.tensor([0, 0, 1, 1, 1, 2])
    function = LossFunction(config(level, aggregate, reduce), chunk=2)

    def outcome(fill):
        old, new, ref, entropy = (torch.where(mask, numbers((n, a), seed + i), fill) for i in range(4))
        new, entropy, value = new.requires_grad_(), entropy.requires_grad_(), numbers(n, 8).requires_grad_()
        batch = batch_of(
            old, function, mask=mask, trajectory=trajectory, logp_ref=ref, advantage=numbers(n, 9), target=numbers(n, 10)
        )
        result = function(evaluation_of(new, entropy=entropy, value=value), batch, diagnose=True)
        result.total.backward()
        metrics = {k: float(s) for k, (s, _) in result.metrics.items()}
        return result.total.detach(), new.grad, entropy.grad, value.grad, metrics

    plain, dirty = outcome(0.0), outcome(junk)
    for x, y in zip(plain[:-1], dirty[:-1], strict=True):
        assert torch.equal(x, y)
    assert plain[-1] == dirty[-1]
    assert bool((dirty[1][~mask] == 0).all())


def padded_rollout(seed, junk, t=5, b=4, units=2):
    """Episodes of different lengths, padded; whatever lies after an end is `junk`."""
    lengths = torch.tensor([5, 1, 3, 2])[:b]
    time = torch.arange(t).unsqueeze(-1)
    valid = time < lengths
    end = time == lengths - 1
    fill = lambda x: torch.where(valid, x, torch.full_like(x, junk))  # noqa: E731
    fields = {
        "valid": valid, "terminated": end & torch.tensor([True, False, True, False]), "truncated": end & torch.tensor([False, True, False, True]),
        "value": fill(numbers((t, b), seed + 1)), "next_value": fill(numbers((t, b), seed + 2)),
        "group": torch.tensor([0, 0, 1, 1]).expand(t, b), "episode": torch.arange(b).expand(t, b),
        "steps": torch.where(valid, 2, 0), "chunk": 2,
    }  # fmt: skip
    unit_fill = lambda x: torch.where(valid.unsqueeze(-1), x, torch.full_like(x, junk))  # noqa: E731
    fields["units"], fields["logp"] = (unit_fill(numbers((t, b, units), seed + i)) for i in (3, 4))
    fields["obs"] = {"x": unit_fill(numbers((t, b, 2), seed + 5))}
    return rollout_of(fill(numbers((t, b), seed)), num_units=units, **fields)


CREDITS = [
    Credit(gamma=0.9, whiten=True),
    Credit(gamma=0.9, reward_scale="running_return_std", clip=1.0),
    Credit(gamma=1.0, returns="trajectory", baseline="group_mean", scale="group_std"),
    Credit(gamma=1.0, returns="trajectory", baseline="leave_one_out", scale="batch_std"),
    Credit(gamma=0.9, returns="return_to_go", baseline="group_mean", scale="group_std"),
    Credit(gamma=0.9, returns="return_to_go", baseline="leave_one_out"),
    Credit(gamma=0.9, returns="return_to_go", baseline="batch_mean", scale="batch_std", whiten=True, negative_weight=0.5),
    Credit(gamma=0.9, returns="return_to_go", baseline="group_mean", scale="group_mean"),
    Credit(gamma=0.9, returns="return_to_go", baseline="none"),
]


@pytest.mark.parametrize("credit", CREDITS, ids=lambda c: f"{c.returns}-{c.baseline}-{c.scale}")
@given(st.integers(0, 10**6), JUNK)
def test_decisions_after_the_end_change_no_advantage_and_get_none(credit, seed, junk):
    clean, dirty = (CreditChain(credit)(padded_rollout(seed, x)) for x in (0.0, junk))
    assert torch.equal(clean.advantage, dirty.advantage)
    assert bool((dirty.advantage[~padded_rollout(seed, 0.0).valid] == 0).all())
    assert clean.metrics == dirty.metrics
    if clean.target is not None:
        assert torch.equal(clean.target, dirty.target)


@pytest.mark.parametrize("credit", CREDITS, ids=lambda c: f"{c.returns}-{c.baseline}-{c.scale}")
def test_more_padding_changes_nothing(credit):
    short = padded_rollout(1, 0.0)
    pad = lambda x: torch.cat([x, torch.zeros(3, *x.shape[1:], dtype=x.dtype)]) if isinstance(x, torch.Tensor) else x  # noqa: E731
    long = replace(short, **{k: pad(v) for k, v in vars(short).items() if k not in ("obs", "constants", "finished", "metrics")})
    long = replace(long, obs={k: pad(v) for k, v in short.obs.items()}, group=short.group[:1].expand(8, -1))
    a, b = (CreditChain(credit)(r) for r in (short, long))
    torch.testing.assert_close(b.advantage[:5], a.advantage, rtol=0, atol=1e-12)
    assert bool((b.advantage[5:] == 0).all())


@pytest.mark.parametrize("level", LEVELS)
def test_decisions_after_the_end_and_masked_units_reach_no_weight_of_a_policy(level):
    env = spec({"x": TensorSpec((2,))}, ActionSpec("continuous", 1))
    function = LossFunction(config(level, "trajectory_mean"), chunk=2)

    def policy_gradient(junk):
        policy = mlp(env, hidden=(8,), chunk=2, shake=0.1).double()
        rollout = padded_rollout(3, junk)
        mask = rollout.valid.unsqueeze(-1) & (torch.rand(5, 4, 2, generator=torch.Generator().manual_seed(0)) < 0.7)
        mask[0, 0] = torch.tensor([True, False])
        dirty = lambda x: torch.where(mask, x, torch.full_like(x, junk))  # noqa: E731
        rollout = replace(rollout, mask=mask, units=dirty(rollout.units), logp=dirty(rollout.logp))
        batch = as_batch(flatten(rollout, CreditChain(Credit())(rollout)), function)
        batch.logp_ref = batch.logp
        evaluation = policy.evaluate(batch.obs, batch.units)
        function(evaluation, batch).total.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    clean = policy_gradient(0.0)
    assert float(clean.norm()) > 0
    for junk in (float("nan"), float("inf"), 1e30):
        assert torch.equal(policy_gradient(junk), clean)


def test_a_step_without_any_counting_unit_has_no_policy_loss():
    function = LossFunction(Loss(), chunk=1)
    logp = torch.full((3, 2), float("nan"), dtype=F64, requires_grad=True)
    batch = batch_of(torch.zeros(3, 2, dtype=F64), function, mask=torch.zeros(3, 2, dtype=torch.bool))
    total = function(evaluation_of(logp), batch, diagnose=True).total
    total.backward()
    assert float(total.detach()) == 0.0 and bool((logp.grad == 0).all())
