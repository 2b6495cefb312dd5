"""What is learned from: groups without contrast that are dropped or replaced, and rollouts put side by side."""

import copy

import pytest
import torch

from embodied_rl.batch import as_batch, flatten, observed
from embodied_rl.collect import Collector
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.loss import Loss, LossFunction, ValueLoss
from embodied_rl.measure import Clock
from embodied_rl.selection import join, refill
from embodied_rl.session import Session
from embodied_rl.types import ActionSpec, TensorSpec
from embodied_rl.update import Update, Updater
from tests.kit import Scripted, mlp, rollout_of, spec, toy
from tests.resume import lab

GRPO = {"gamma": 1.0, "returns": "trajectory", "baseline": "group_mean"}
STATISTICS = {
    "group_std": {"scale": "group_std"}, "batch_std": {"scale": "batch_std"}, "whiten": {"whiten": True},
    "batch_std per decision": {"returns": "return_to_go", "scale": "batch_std"},
}  # fmt: skip


def groups(returns, **given):
    """One decision per copy, groups of 2, with these returns."""
    reward = torch.tensor([returns])
    index = torch.arange(len(returns)) // 2
    return rollout_of(reward, group=index.expand(1, -1), terminated=torch.ones_like(reward, dtype=torch.bool), **given)


def lengths(copies, decisions, seed, **given):
    policy = Scripted(lambda obs: obs["t"][:, :1].unsqueeze(1), lambda obs: obs["t"].sum(-1))
    return Collector([toy("lengths", copies, **given)], policy, decisions=decisions, mode="episodes", run_seed=seed, group_size=2)


# ---- dropping -------------------------------------------------------------------------------------------------------


def test_groups_without_contrast_leave_the_denominators():
    # Returns (1, 1), (1, 0), (0, 0): GRPO without a scale gives 0 0, 0.5 -0.5, 0 0. A mean over decisions has weights
    # 1/6 when all are kept and 1/2 when only the group with contrast is left.
    rollout = groups([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    loss = LossFunction(Loss(value=ValueLoss(coef=0.0)), 1)
    for drop, expected in ((False, [1 / 6] * 6), (True, [1 / 2] * 2)):
        advantage = CreditChain(Credit(**GRPO), drop_equal_groups=drop)(rollout)
        assert advantage.advantage.tolist() == [[0.0, 0.0, 0.5, -0.5, 0.0, 0.0]]
        assert advantage.metrics["rollout/zero_advantage_groups"] == (4.0, 6.0)
        batch = as_batch(flatten(rollout, advantage), loss)
        assert batch.weight.flatten().tolist() == pytest.approx(expected)
        assert batch.row_weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", STATISTICS)
def test_what_is_learned_from_does_not_know_what_was_dropped(name):
    # The same two groups with contrast, alone and among two groups without; at t = 1 one episode goes on.
    returns = torch.tensor([[5.0, 5.0, 1.0, 0.0, 3.0, 5.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    index = torch.arange(8) // 2
    going = torch.tensor([False, False, True, False, False, False, False, False])
    fields = {"terminated": torch.stack([~going, going]), "valid": torch.stack([~going | going, going])}
    everyone = rollout_of(returns, group=index.expand(2, -1), **fields)
    mid = slice(2, 6)
    alone = rollout_of(returns[:, mid], group=index[mid].expand(2, -1), **{k: v[:, mid] for k, v in fields.items()})
    chain = CreditChain(Credit(**GRPO | STATISTICS[name]), drop_equal_groups=True)
    a, b = (flatten(r, chain(r)).rows["advantage"] for r in (everyone, alone))
    assert len(a) == 5 and torch.equal(a, b) and float(a.abs().max()) > 0


def test_judging_contrast_moves_no_memory_and_agrees_with_the_advantages():
    chain = CreditChain(Credit(**GRPO, reward_scale="running_return_std"))
    before = copy.deepcopy(chain.state_dict())
    rollout = groups([0.3, 0.3, 0.3, 0.2, 7.0, 7.0])
    assert chain.contrast(rollout).tolist() == [False, False, True, True, False, False]
    assert chain.state_dict() == before
    assert torch.equal(chain(rollout).advantage[0] != 0, chain.contrast(rollout))


def test_an_update_without_anything_to_learn_from_changes_no_weight_and_counts():
    policy = mlp(spec({"x": TensorSpec((1,))}, ActionSpec("continuous", 1)))
    updater = Updater(policy, LossFunction(Loss(value=ValueLoss(coef=0.0)), 1), Update(), seed=0, max_bad_updates=1)
    before = copy.deepcopy(updater.state_dict()), copy.deepcopy(policy.state_dict())
    rollout = groups([1.0, 1.0, 0.0, 0.0])
    updater.update(rollout, CreditChain(Credit(**GRPO), drop_equal_groups=True)(rollout), progress=0.0)
    assert updater.version == 1 and updater.bad_in_a_row == 0
    after = updater.state_dict() | {"version": 0}
    assert lab.differing(before, (after, policy.state_dict())) == []


# ---- after success --------------------------------------------------------------------------------------------------


def test_returns_end_with_the_decision_that_succeeds():
    # Rewards 0 1 1 1 at gamma 0.5, success in the second decision: 0 + 0.5 x 1 = 0.5 instead of 0.875.
    reward = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    end = torch.tensor([[False], [False], [False], [True]])
    rollout = rollout_of(reward, truncated=end, solved=torch.tensor([[0], [1], [2], [2]]))
    credit = {"gamma": 0.5, "returns": "return_to_go", "baseline": "none"}
    masked = CreditChain(Credit(**credit, mask_after_success=True))(rollout)
    assert masked.advantage.flatten().tolist() == [0.5, 1.0, 0.0, 0.0]
    assert masked.counts.flatten().tolist() == [True, True, False, False]
    assert masked.metrics["rollout/after_success_rate"] == (2.0, 4.0)
    assert CreditChain(Credit(**credit))(rollout).advantage.flatten().tolist() == [0.875, 1.75, 1.5, 1.0]
    # Two decisions are left, each with half of the weight, and the forward pass sees no other.
    batch = as_batch(flatten(rollout, masked), LossFunction(Loss(value=ValueLoss(coef=0.0)), 1))
    assert batch.weight.flatten().tolist() == [0.5, 0.5] and batch.advantage.tolist() == [0.5, 1.0]


def test_the_critic_learns_that_nothing_follows_success():
    # gamma 0.5, lambda 0, values 1 2 3, next values 2 3 4: 0 + 0.5 x 2 - 1 = 0; 1 - 2 = -1, for nothing follows.
    value, after = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [3.0], [4.0]])
    rollout = rollout_of(torch.tensor([[0.0], [1.0], [1.0]]), value=value, next_value=after, solved=torch.tensor([[0], [1], [2]]))
    out = CreditChain(Credit(gamma=0.5, lam=0.0, mask_after_success=True))(rollout)
    assert out.advantage.flatten().tolist() == [0.0, -1.0, 0.0]
    assert flatten(rollout, out).rows["target"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("chunk", "solved"), [(1, [0, 1, 2, 2, 2, 2, 2]), (2, [1, 2, 2, 2]), (3, [1, 2, 2])])
def test_success_in_the_middle_of_a_chunk_is_the_last_decision_that_counts(chunk, solved):
    # Episodes of 7 steps that pay 1, 2, 3, ...; the goal holds at step 2 only.
    policy = Scripted(lambda obs: torch.zeros(len(obs["t"]), chunk, 1), lambda obs: 0.0 * obs["t"].sum(-1), chunk=chunk, num_units=chunk)
    rollout = Collector([toy("lengths", 1, lengths=(7,))], policy, decisions=9, mode="episodes").collect()
    assert rollout.solved.flatten().tolist() == solved
    out = CreditChain(Credit(gamma=0.5, lam=1.0, mask_after_success=True))(rollout)
    # Up to the decision that succeeds: 1 + 0.5 x 2; 1 + 2; 1 + 2 + 3.
    assert float(out.advantage[0, 0]) == {1: 2.0, 2: 3.0, 3: 6.0}[chunk]
    assert int(out.counts.sum()) == {1: 2, 2: 1, 3: 1}[chunk]


def test_success_is_remembered_across_rollouts_until_the_episode_ends():
    # A stream of 2 decisions per rollout; episodes of 5 steps, the goal holds at step 2.
    policy = Scripted(lambda obs: obs["t"][:, :1].unsqueeze(1), lambda obs: obs["t"].sum(-1))
    c = Collector([toy("lengths", 1, lengths=(5,))], policy, decisions=2)
    assert [c.collect().solved.flatten().tolist() for _ in range(5)] == [[0, 1], [2, 2], [2, 0], [1, 2], [2, 2]]


def test_an_env_that_goes_on_after_success_teaches_what_one_that_ends_there_teaches():
    def seek(obs):
        return ((obs["goals"][:, 0, :2] - obs["position"]) / 0.4).clamp(-0.7, 0.7).unsqueeze(1)

    flats, chain = [], CreditChain(Credit(gamma=0.9, whiten=True, mask_after_success=True))
    for ends in (True, False):
        env = toy("point", 32, max_steps=9, reward="sparse", end_on_success=ends)
        policy = Scripted(seek, lambda obs: obs["position"].sum(-1), num_units=2)
        rollout = Collector([env], policy, decisions=9, mode="episodes").collect()
        flats.append(flatten(rollout, chain(rollout)))
        assert bool(rollout.finished["success_once"].any()) and not bool(rollout.finished["success_once"].all())
    a, b = flats
    assert len(a) == len(b) < 32 * 9
    for x, y in [(a.rows[k], b.rows[k]) for k in ("advantage", "target", "units")] + [(a.obs[k], b.obs[k]) for k in a.obs]:
        assert torch.equal(x, y)


def test_decisions_after_success_are_not_evaluated():
    policy, seen = mlp(spec({"x": TensorSpec((1,))}, ActionSpec("continuous", 1))), []
    real = policy.evaluate
    policy.evaluate = lambda obs, units, **given: seen.append(len(units)) or real(obs, units, **given)
    rollout = rollout_of(
        torch.ones(4, 2), solved=torch.tensor([[0, 0], [1, 0], [2, 1], [2, 2]]), value=torch.zeros(4, 2), next_value=torch.zeros(4, 2)
    )
    updater = Updater(policy, LossFunction(Loss(), 1), Update(epochs=1, minibatches=1), seed=0, max_bad_updates=1)
    updater.update(rollout, CreditChain(Credit(mask_after_success=True))(rollout), progress=0.0)
    assert seen == [5]


# ---- side by side ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", [Credit(**GRPO, scale="group_std"), Credit(gamma=0.9), Credit(gamma=0.9, returns="return_to_go", baseline="group_mean")])
def test_side_by_side_every_copy_has_the_advantages_and_rows_it_had_alone(credit):
    c = lengths(6, 9, seed=3)
    parts = [c.collect() for _ in range(3)]
    made = [len(r.reward) for r in parts]
    assert len(set(made)) > 1, "rollouts of unequal length"
    whole = join(parts)
    assert whole.reward.shape == (max(made), 18)
    together, row_sets = CreditChain(credit)(whole), []
    for i, part in enumerate(parts):
        alone = CreditChain(credit)(part)
        mine = slice(6 * i, 6 * i + 6)
        torch.testing.assert_close(together.advantage[: made[i], mine], alone.advantage, rtol=0, atol=1e-6)
        assert not bool(whole.valid[made[i] :, mine].any())
        row_sets.append(flatten(part, alone))
    flat = flatten(whole, together)
    assert len(flat) == sum(len(rows) for rows in row_sets)
    key = lambda f: sorted(zip(f.full_obs()["name"][:, 0].tolist(), f.obs["t"][:, 0].tolist(), f.rows["value"].tolist(), strict=True))  # noqa: E731
    assert key(flat) == sorted(row for rows in row_sets for row in key(rows))
    # Episodes and groups have numbers of their own, and the finished ones point at their columns.
    assert len(whole.episode[whole.valid].unique()) == 18 and len(whole.group[0].unique()) == 9
    seeds = torch.empty(18, dtype=torch.int64)
    seeds[whole.finished["copy"]] = whole.finished["seed"]
    assert torch.equal(whole.constants["name"][whole.episode[0], 0], seeds % 1000)
    assert whole.metrics["paid"][1] == int(whole.steps[whole.valid].sum())
    seen = observed(whole)
    assert len(seen["t"]) == int(whole.valid.sum()) and float(seen["t"].max()) < 1e4


def test_decisions_beyond_the_end_of_a_shorter_rollout_do_not_look_old():
    c = lengths(2, 6, seed=0, lengths=(2,)), lengths(2, 6, seed=0, lengths=(5,))
    for one in c:
        one.version = 7
    whole = join([one.collect() for one in c])
    assert int(whole.policy_version.min()) == 7 and whole.valid.sum(0).tolist() == [2, 2, 5, 5]


# ---- refilling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "wanted", "attempts", "found"),
    [
        ([[1, 1, 1, 0], [1, 0, 1, 0]], 1, 1, 1),
        ([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]], 2, 3, 3),
        ([[1, 1, 1, 0], [1, 0, 0, 0]], 2, 2, 2),
        ([[1, 1, 0, 0]] * 9, 2, 4, 0),
    ],
    ids=["at once", "one more than wanted", "just enough", "never"],
)
def test_groups_are_refilled_until_there_are_enough_or_too_many_attempts(plan, wanted, attempts, found):
    chain, rest = CreditChain(Credit(**GRPO), drop_equal_groups=True), iter(plan)
    rollout, made = refill(lambda: groups([float(x) for x in next(rest)]), chain.contrast, groups=wanted, max_attempts=4)
    assert made == attempts and rollout.reward.shape == (1, 4 * attempts)
    assert rollout.reward[0].tolist() == [x for row in plan[:attempts] for x in row]
    rows = flatten(rollout, chain(rollout)).rows["advantage"]
    assert sorted(rows.tolist()) == [-0.5] * found + [0.5] * found


def sessions(**collect):
    """The bandit, whose groups of 2 differ when the two pick different arms."""
    return Session.build(lab.recipe("groups", env={"type": str(lab.TOYS / "bandit.py")}, collect={"group_size": 2} | collect))


def test_a_session_counts_everything_it_collected_and_learns_from_contrast():
    plain, refilled = sessions(), sessions(dynamic_sampling="refill", max_attempts=3)
    a, b = (s.iterate(Clock()).reduce() for s in (plain, refilled))
    assert "rollout/attempts" not in a and b["rollout/attempts"] in (2, 3)
    assert refilled.env_steps == refilled.decisions == refilled.episodes == 8 * b["rollout/attempts"] == b["rollout/episodes"]
    assert 0 < b["rollout/zero_advantage_groups"] < 1
    assert "actor/skipped_rows_rate" not in b, "nothing without an advantage is left"
    # The first attempt is the rollout of the plain session: the same starts and the same samples.
    again = sessions(dynamic_sampling="refill", max_attempts=3)
    rollout, _ = again._collect()
    assert torch.equal(rollout.reward[:, :8], sessions().collector.collect().reward)
    assert torch.equal(again.credit(rollout).counts[0], again.credit.contrast(rollout))
    for s in (plain, refilled, again):
        s.close()
