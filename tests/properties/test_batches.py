"""Minibatches share out every decision once, and the gradient does not know how an optimizer step was split."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl.batch import as_batch, flatten, micro_batches, minibatches, with_signal
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.loss import Kl, Loss, LossFunction, ValueLoss
from embodied_rl.types import ActionSpec, Advantage, Evaluation, TensorSpec
from embodied_rl.update import Update, Updater
from tests.kit import gradient, mlp, rollout_of, spec

F64 = torch.float64
LEVELS = ["unit", "action", "decision", "trajectory"]
AGGREGATES = ["unit_mean", "decision_mean", "trajectory_mean", "constant"]
UNITS, CHUNK = 4, 2


def loss_of(level="decision", aggregate="decision_mean", **given):
    constant = 50 if aggregate == "constant" else None
    return LossFunction(Loss(ratio=level, aggregate=aggregate, constant_units=constant, **given), CHUNK)


def ragged(seed, t=6, b=5, full=False):
    """Random episodes in a stream (`full`) or padded side by side, with ragged masks, in float64.

    Every row can be told by its first old log-probability; `obs.x` and the per-episode `name` go with it.
    """
    g = torch.Generator().manual_seed(seed)
    if full:
        valid = torch.ones(t, b, dtype=torch.bool)
        done = torch.rand(t, b, generator=g) < 0.3
    else:
        lengths = torch.randint(1, t + 1, (b,), generator=g)
        valid = torch.arange(t).unsqueeze(-1) < lengths
        done = torch.arange(t).unsqueeze(-1) == lengths - 1
    mask = (torch.rand(t, b, UNITS, generator=g) < 0.7) & valid.unsqueeze(-1)
    numbers = [torch.randn(t, b, *shape, generator=g, dtype=F64) for shape in ((), (), (), (2,), (UNITS,))]
    reward, value, next_value, x, units = numbers
    logp = 0.1 * torch.randn(t, b, UNITS, generator=g, dtype=F64) - 1.2
    logp[..., 0] = -1 - torch.randperm(t * b, generator=g).view(t, b) / (t * b)
    rollout = rollout_of(
        reward, valid=valid, terminated=done, value=value, next_value=next_value, obs={"x": x}, units=units, logp=logp, mask=mask, chunk=CHUNK
    )
    names = torch.randn(int(rollout.episode.max()) + 1, 1, generator=g, dtype=F64)
    rollout.constants = {"name": names}
    return rollout, CreditChain(Credit())(rollout)


def by_name(batch):
    """logp -> everything else of the row, to compare rows in different orders."""
    columns = (batch.logp[:, 0], batch.obs["x"], batch.obs["name"][:, 0], batch.advantage)
    return {key: (tuple(x), name, a) for key, x, name, a in zip(*(c.tolist() for c in columns), strict=True)}


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from(LEVELS), st.sampled_from(AGGREGATES), st.booleans())
def test_an_epoch_visits_every_valid_decision_exactly_once(seed, count, level, aggregate, full):
    rollout, advantage = ragged(seed, full=full)
    batches = list(minibatches(flatten(rollout, advantage), count, loss_of(level, aggregate), torch.Generator().manual_seed(seed)))
    seen = sorted(k for batch in batches for k in batch.logp[:, 0].tolist())
    assert seen == sorted(rollout.logp[..., 0][rollout.valid].tolist())
    assert 1 <= len(batches) <= count
    if level != "trajectory" and aggregate in ("unit_mean", "decision_mean"):
        sizes = [len(b) for b in batches]
        assert len(batches) == min(count, int(rollout.valid.sum())) and max(sizes) - min(sizes) <= 1
    # The per-episode entry of each row is that of its own episode, and the other columns went along.
    expected = {
        float(rollout.logp[t, b, 0]): (
            tuple(rollout.obs["x"][t, b].tolist()), float(rollout.constants["name"][rollout.episode[t, b]]), float(advantage.advantage[t, b])
        )
        for t, b in rollout.valid.nonzero().tolist()
    }  # fmt: skip
    assert {k: v for batch in batches for k, v in by_name(batch).items()} == expected


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from(LEVELS), st.sampled_from(AGGREGATES[:3]), st.booleans())
def test_the_weights_of_every_optimizer_step_add_up_to_1(seed, count, level, aggregate, full):
    rollout, advantage = ragged(seed, full=full)
    for batch in minibatches(flatten(rollout, advantage), count, loss_of(level, aggregate), torch.Generator().manual_seed(0)):
        assert bool((batch.weight >= 0).all())
        if batch.mask is None or bool(batch.mask.any()):
            assert float(batch.weight.sum()) == pytest.approx(1.0, abs=1e-5)
        assert float(batch.row_weight.sum()) == pytest.approx(1.0, abs=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans())
def test_trajectories_stay_whole_where_the_ratio_covers_them(seed, count, full):
    rollout, advantage = ragged(seed, full=full)
    owner = {}
    for i, batch in enumerate(minibatches(flatten(rollout, advantage), count, loss_of("trajectory"), torch.Generator().manual_seed(0))):
        changes = int((batch.trajectory.diff() != 0).sum())
        assert changes == len(batch.trajectory.unique()) - 1, "rows of one trajectory are consecutive"
        for trajectory in batch.trajectory.unique().tolist():
            assert owner.setdefault(trajectory, i) == i


@pytest.mark.parametrize("level", ["unit", "decision", "trajectory"])
def test_over_an_epoch_trajectory_mean_weighs_long_and_short_trajectories_alike(level):
    # 8 trajectories of 1 to 6 decisions in 4 minibatches: each has half of the weight of the step it is in.
    rollout, advantage = ragged(1, b=8)
    rollout.mask = rollout.valid.unsqueeze(-1).expand(-1, -1, UNITS).clone()
    lengths = rollout.valid.sum(0)
    assert int(lengths.min()) == 1 and int(lengths.max()) == 6
    weight = torch.zeros(8)
    for batch in minibatches(flatten(rollout, advantage), 4, loss_of(level, "trajectory_mean"), torch.Generator().manual_seed(0)):
        weight.index_add_(0, batch.trajectory, batch.weight.sum(-1))
    torch.testing.assert_close(weight, torch.full((8,), 0.5))


def test_another_seed_shuffles_differently_and_the_same_seed_equally():
    rollout, advantage = ragged(0, full=True)
    orders = []
    for seed in (0, 0, 1):
        batches = minibatches(flatten(rollout, advantage), 3, loss_of(), torch.Generator().manual_seed(seed))
        orders.append(torch.cat([b.logp[:, 0] for b in batches]))
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


@cache
def original():
    env = spec({"x": TensorSpec((2,)), "name": TensorSpec((1,))}, ActionSpec("continuous", UNITS // CHUNK))
    return mlp(env, hidden=(16,), chunk=CHUNK, shake=0.2, std="state", squash=True).double()


def policy():
    """A fresh copy of one small policy in float64."""
    return copy.deepcopy(original())


FULL_LOSS = {"entropy_coef": 0.03, "dual_clip": 3.0, "kl": Kl(kind="k3", coef=0.2), "value": ValueLoss(kind="clipped", coef=0.5)}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@settings(max_examples=12)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(["sum", "mean"]))
def test_the_gradient_is_the_same_for_any_split_into_micro_batches(level, aggregate, seed, size, reduce):
    rollout, advantage = ragged(seed)
    function = loss_of(level, aggregate, reduce="sum" if level == "unit" else reduce, **FULL_LOSS)
    flat = flatten(rollout, advantage)
    flat.rows["logp_ref"] = flat.rows["logp"] + 0.1
    (whole,) = minibatches(flat, 1, function, torch.Generator().manual_seed(seed))
    gradients = []
    for pieces in ([whole], list(micro_batches(whole, size, level == "trajectory"))):
        net = policy()
        for piece in pieces:
            function(net.evaluate(piece.obs, piece.units), piece).total.backward()
        gradients.append(gradient(net))
    assert float(gradients[0].norm()) > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS)
def test_metrics_do_not_depend_on_the_split_either(level):
    rollout, advantage = ragged(3)
    function = loss_of(level, **FULL_LOSS)
    flat = flatten(rollout, advantage)
    flat.rows["logp_ref"] = flat.rows["logp"] + 0.1
    (whole,) = minibatches(flat, 1, function, torch.Generator())
    net, sums = policy(), []
    for pieces in ([whole], list(micro_batches(whole, 3, level == "trajectory"))):
        results = [function(net.evaluate(p.obs, p.units), p, diagnose=True).metrics for p in pieces]
        total = {}
        for key in results[0]:
            if key.endswith("_max"):
                total[key] = max(float(r[key][0]) for r in results)
            else:
                total[key] = sum(float(r[key][0]) for r in results) / sum(float(r[key][1]) for r in results)
        sums.append(total)
    assert sums[0].keys() == sums[1].keys() and "actor/kl_to_reference" in sums[0]
    for key, value in sums[0].items():
        assert sums[1][key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


@pytest.mark.parametrize("level", LEVELS)
def test_a_whole_update_is_the_same_for_any_micro_batch(level):
    rollout, advantage = ragged(11)
    advantage = Advantage(advantage.advantage, advantage.target)
    weights = []
    for size in (None, 1, 4, 7):
        net = policy()
        config = Update(epochs=3, minibatches=2, micro_batch=size, lr=1e-3)
        Updater(net, loss_of(level, **FULL_LOSS), config, seed=0, max_bad_updates=1).update(rollout, advantage, progress=0.0)
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert float((weights[0] - torch.cat([p.detach().flatten() for p in policy().parameters()])).norm()) > 1e-3
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_order_of_the_rows_of_a_step_does_not_matter(level, seed):
    rollout, advantage = ragged(seed)
    function = loss_of(level, "trajectory_mean", **FULL_LOSS)
    flat = flatten(rollout, advantage)
    flat.rows["logp_ref"] = flat.rows["logp"] + 0.1
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    gradients = []
    for part in (flat, flat.take(order)):
        net, batch = policy(), as_batch(part, function)
        function(net.evaluate(batch.obs, batch.units), batch).total.backward()
        gradients.append(gradient(net))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


TERMS = {
    "entropy": ({"entropy_coef": 0.1}, {"entropy_coef": 0.0}),
    "value": ({"value": ValueLoss(coef=0.5)}, {"value": ValueLoss(coef=0.0)}),
    "kl": ({"kl": Kl(kind="k2", coef=0.5)}, {"kl": Kl(kind="k2", coef=0.0)}),
    "clip": ({"clip_low": 0.01, "clip_high": 0.01}, {"trust": "none"}),
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_with_a_weight_changes_the_gradient(term):
    rollout, advantage = ragged(2)
    gradients = []
    for switches in TERMS[term]:
        function = loss_of(**({"value": ValueLoss(coef=0.0)} | switches))
        flat = flatten(rollout, advantage)
        flat.rows["logp_ref"] = flat.rows["logp"] + 0.1
        net, batch = policy(), as_batch(flat, function)
        function(net.evaluate(batch.obs, batch.units), batch).total.backward()
        gradients.append(gradient(net))
    assert float((gradients[0] - gradients[1]).norm()) > 1e-6


@settings(deadline=None, max_examples=30)
@given(level=st.sampled_from(LEVELS[:3]), aggregate=st.sampled_from(AGGREGATES), seed=st.integers(0, 99), trust=st.sampled_from(["clip", "quadratic", "none"]))
def test_rows_without_an_advantage_change_no_gradient(level, aggregate, seed, trust):
    rollout, advantage = ragged(seed)
    advantage.advantage[torch.rand(advantage.advantage.shape, generator=torch.Generator().manual_seed(seed)) < 0.6] = 0.0
    loss = loss_of(level, aggregate, trust=trust, value=ValueLoss(coef=0.0))
    whole = as_batch(flatten(rollout, advantage), loss)
    assert loss.skips(whole)
    rest = with_signal(whole)
    assert len(rest) == int((whole.advantage != 0).sum()) <= len(whole)
    gradients = []
    for batch in (whole, rest):
        logp = (batch.logp + 0.3 * batch.obs["x"][:, :1]).requires_grad_()
        loss(Evaluation(logp), batch, diagnose=False).total.backward()
        full = torch.zeros_like(whole.logp)
        full[(whole.advantage != 0) if batch is rest else slice(None)] = logp.grad
        gradients.append(full)
    assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize(
    "switches", [{"entropy_coef": 0.01}, {"kl": Kl(coef=0.1)}, {"value": ValueLoss(coef=0.5)}, {"level": "trajectory"}]
)
def test_rows_without_an_advantage_stay_where_something_else_learns_from_them(switches):
    loss = loss_of(**({"value": ValueLoss(coef=0.0)} | switches))
    assert not loss.skips(as_batch(flatten(*ragged(0)), loss))


def test_an_update_of_groups_without_contrast_evaluates_nothing_and_says_so():
    policy = mlp(spec({"x": TensorSpec((3,))}, ActionSpec("continuous", 2)))
    updater = Updater(policy, LossFunction(Loss(value=ValueLoss(coef=0.0)), 1), Update(epochs=1, minibatches=1), seed=0, max_bad_updates=1)
    out = policy.act({"x": torch.randn(8, 3)}, generator=None)
    rollout = rollout_of(torch.zeros(4, 2), obs={"x": torch.randn(4, 2, 3)}, units=out.units.view(4, 2, 2).clone(), logp=out.logp.view(4, 2, 2).clone())
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = updater.update(rollout, Advantage(torch.zeros(4, 2)), progress=0.0).reduce()
    assert metrics["actor/skipped_rows_rate"] == 1.0 and "actor/kl_k3" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("level", ["unit", "trajectory"])
@pytest.mark.parametrize("units", [1, 5, 9])
def test_a_budget_of_units_cuts_where_it_is_spent_and_changes_no_gradient(level, units):
    rollout, advantage = ragged(3)
    found = []
    for budget in (None, units):
        net = policy()
        config = Update(epochs=2, minibatches=2, micro_units=budget, lr=1e-3)
        Updater(net, loss_of(level, **FULL_LOSS), config, seed=0, max_bad_updates=1).update(rollout, advantage, progress=0.0)
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
    whole = next(minibatches(flatten(rollout, advantage), 1, loss_of(level), torch.Generator().manual_seed(0)))
    pieces = list(micro_batches(whole, None, level == "trajectory", units))
    used = [int(p.mask.sum()) for p in pieces]
    assert sum(used) == int(whole.mask.sum()) and sum(len(p) for p in pieces) == len(whole)
    for piece, n in zip(pieces, used, strict=True):
        assert n <= units or len(piece.trajectory.unique() if level == "trajectory" else piece) == 1
    if level == "unit":
        following = [int(p.mask[0].sum()) for p in pieces[1:]]
        assert all(n + more > units for n, more in zip(used[:-1], following, strict=True)), "a row would have fitted"


@pytest.mark.parametrize("level", ["unit", "trajectory"])
def test_in_order_the_rows_of_a_step_are_as_they_were_collected(level):
    rollout, advantage = ragged(4)
    flat = flatten(rollout, advantage)
    place = {key: i for i, key in enumerate(flat.rows["logp"][:, 0].tolist())}
    steps = [
        [set(b.logp[:, 0].tolist()) for b in minibatches(flat, 3, loss_of(level), torch.Generator().manual_seed(0), in_order=order)]
        for order in (False, True)
    ]
    assert steps[0] == steps[1], "the same rows in each step"
    for batch in minibatches(flat, 3, loss_of(level), torch.Generator().manual_seed(0), in_order=True):
        rows = [place[key] for key in batch.logp[:, 0].tolist()]
        key = (lambda i: (int(flat.episode[i]), i)) if level == "trajectory" else (lambda i: i)
        assert rows == sorted(rows, key=key)


def test_masked_integers_keep_what_they_are():
    rollout, advantage = ragged(0)
    rollout.units = torch.full_like(rollout.units, -1, dtype=torch.int64)
    assert bool((flatten(rollout, advantage).rows["units"] == -1).all())
