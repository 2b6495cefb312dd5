"""One copy of each group takes the policy's mode: it is a baseline, not experience."""

import pytest
import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.measure import rollout_metrics
from embodied_rl.session import Session
from tests.kit import algorithm, toy, wire
from tests.resume import lab
from tests.toys.table import Config, Table


def run(turns=1, parts=1):
    torch.manual_seed(0)
    envs = [toy("words", 12 // parts, turns=turns, partial=True) for _ in range(parts)]
    policy = Table(Config(spread=1.0), envs[0].spec)
    method = algorithm("reinforce", credit={"baseline": "greedy", "whiten": False, "gamma": 1.0})
    return wire(envs, policy, method, decisions=turns, mode="episodes", group_size=3)


@pytest.mark.parametrize("turns", [1, 2])
def test_the_first_copy_of_each_group_takes_the_mode_and_the_others_sample(turns):
    r = run(turns)
    rollout = r.collector.collect()
    assert rollout.greedy.tolist() == [[True, False, False] * 4] * turns
    for t in range(turns):
        obs = {"context": rollout.obs["context"][t] if turns > 1 else rollout.constants["context"][rollout.episode[t]]}
        mode = r.policy.act(obs, generator=None, greedy=True).units
        assert (rollout.units[t] == mode).all(-1)[::3].all()
        assert not (rollout.units[t] == mode).all(-1).view(4, 3)[:, 1:].all()
        again = r.policy.evaluate(obs, rollout.units[t]).logp
        assert torch.equal(again[rollout.mask[t]], rollout.logp[t][rollout.mask[t]])
    r.collector.close()


def test_two_parts_decide_as_one_where_nothing_is_drawn():
    one, two = (run(parts=p).collector.collect() for p in (1, 2))
    assert torch.equal(one.units[:, ::3], two.units[:, ::3])


def test_what_the_greedy_copies_did_is_in_no_metric_and_in_no_batch():
    r = run()
    rollout, metrics = r.iterate()
    assert sorted(rollout.finished["copy"].tolist()) == [1, 2, 4, 5, 7, 8, 10, 11]
    mean = rollout_metrics(rollout, ("spell",)).value("rollout/return_mean")
    assert mean == pytest.approx(float(rollout.reward[0].view(4, 3)[:, 1:].mean()))
    out = r.credit(rollout)
    wanted = rollout.reward[0].view(4, 3)[:, 1:] - rollout.reward[0].view(4, 3)[:, :1]
    torch.testing.assert_close(out.advantage[0].view(4, 3)[:, 1:], wanted)
    assert int(out.counts.sum()) == 8


def test_a_greedy_baseline_needs_somebody_to_compare():
    with pytest.raises(CapabilityError, match="group_size is 1"):
        Session.build(lab.recipe("greedy baseline", collect={"group_size": 1}))
