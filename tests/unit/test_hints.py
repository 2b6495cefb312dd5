"""Starts that a whole group has failed are played again with a part of the solution shown."""

import pytest
import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.measure import Clock
from embodied_rl.recipe import Collect
from embodied_rl.selection import unsolved, with_hints
from embodied_rl.session import Session
from tests.kit import algorithm, rollout_of, toy, wire
from tests.resume import lab
from tests.toys.table import Config, Table

WORDS = 3


def run(parts=1):
    torch.manual_seed(0)
    envs = [toy("words", 32 // parts, words=WORDS) for _ in range(parts)]
    policy = Table(Config(spread=1.0), envs[0].spec)
    return wire(envs, policy, algorithm("grpo"), decisions=1, mode="episodes", group_size=4)


def context(rollout):
    return rollout.constants["context"][rollout.episode[0]][:, 0]


def test_a_group_is_unsolved_when_nobody_in_it_succeeded():
    solved = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 1, 0, 2, 0, 1]])
    valid = torch.tensor([[True] * 6, [True] * 5 + [False]])
    group = torch.tensor([7, 7, 3, 5, 5, 3]).expand(2, 6)
    rollout = rollout_of(torch.zeros(2, 6), solved=solved, valid=valid, group=group)
    assert unsolved(rollout).tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_same_starts_are_played_again_by_these_copies_alone(parts):
    c = run(parts).collector
    first = c.collect()
    copies = torch.zeros(32, dtype=torch.bool)
    copies[4:12] = True
    second = c.again(copies, 0.67)
    assert second.reward.shape == (1, 8) and second.valid.all() and not second.finished
    assert torch.equal(context(second), context(first)[4:12] + WORDS)
    # Two of three letters are given: many more are right.
    assert torch.equal(second.group[0], first.group[0, 4:12])
    third = c.collect()
    assert (context(third) < WORDS).all() and third.valid.all()
    assert c.starts.tolist() == [2] * 32
    c.close()


def test_hints_grow_until_somebody_succeeds():
    c = run().collector
    asked = []

    def again(copies, share):
        asked.append((copies.clone(), share))
        return c.again(copies, share)

    rollout, hinted = with_hints(c.collect, again, (0.34, 0.67, 1.0))
    first = unsolved(rollout)[:32]
    assert torch.equal(asked[0][0], first) and hinted == pytest.approx(float(first.float().mean()))
    assert [share for _, share in asked] == [0.34, 0.67, 1.0][: len(asked)] and len(asked) >= 2
    for (before, _), (after, _) in zip(asked, asked[1:], strict=False):
        assert not (after & ~before).any() and int(after.sum()) < int(before.sum())
    # With the whole solution shown everybody succeeds.
    assert asked[-1][1] < 1.0 or rollout.reward[0, -int(asked[-1][0].sum()) :].eq(1).all()
    assert rollout.reward.shape[1] == 32 + sum(int(copies.sum()) for copies, _ in asked)
    assert len(rollout.finished["return"]) == 32
    assert len(rollout.group.unique()) == rollout.reward.shape[1] // 4


def test_what_is_learned_from_has_contrast_and_hints_are_counted():
    s = Session.build(lab.recipe("hints"))
    seen = []
    credit = s.credit
    s.credit = lambda rollout, penalty: seen.append((rollout, credit(rollout, penalty))) or seen[-1][1]
    metrics = s.iterate(Clock())
    rollout, advantage = seen[0]
    assert rollout.reward.shape[1] > 8 and metrics.value("rollout/hinted_groups") > 0
    assert not advantage.counts[0, :8][unsolved(rollout)[:8]].any()
    assert metrics.value("rollout/episodes") == 8
    s.close()


@pytest.mark.parametrize("hints", [[0.5, 0.25], [0.0, 0.5], [0.5, 1.5]])
def test_hints_that_do_not_grow_are_refused(hints):
    with pytest.raises(ValueError, match=r"must grow and lie in \(0, 1\]"):
        Collect(mode="episodes", hints=tuple(hints))


def test_hints_need_whole_episodes_and_an_env_that_has_them():
    with pytest.raises(ValueError, match="set mode: episodes"):
        Collect(hints=(0.5,))
    with pytest.raises(CapabilityError, match="this env has no hints"):
        Session.build(lab.recipe("groups", collect={"hints": [0.5]}))
