"""An episode whose judge failed is in no mean, no baseline and no loss; it is counted, and nothing else knows of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.batch import flatten
from embodied_rl.collect import Collector
from embodied_rl.compare import compare, print_evaluation
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.errors import CapabilityError, DivergenceError
from embodied_rl.evaluate import choose, evaluate
from embodied_rl.measure import rollout_metrics
from embodied_rl.results import EvaluationResult
from embodied_rl.selection import refill
from tests.kit import Scripted, algorithm, mlp, rollout_of, toy, wire
from tests.toys.failing import fails

JUNK = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30, 0.0])
GROUPED = {
    "grpo": Credit(returns="trajectory", baseline="group_mean", scale="group_std", gamma=1.0),
    "maxrl": Credit(returns="trajectory", baseline="group_mean", scale="group_mean", gamma=1.0),
    "rloo": Credit(returns="trajectory", baseline="leave_one_out", gamma=1.0),
    "to go": Credit(returns="return_to_go", baseline="group_mean", scale="group_std", gamma=0.9),
    "lite": Credit(returns="trajectory", baseline="group_mean", scale="batch_std", gamma=1.0, whiten=True, clip=2.0),
    "batch": Credit(returns="return_to_go", baseline="batch_mean", scale="batch_std", gamma=0.9),
    "gae": Credit(gamma=0.9, reward_scale="running_return_std", whiten=True),
}


def still():
    return Scripted(lambda obs: torch.zeros(len(obs["t"]), 1, 1), lambda obs: obs["t"].sum(-1))


def voided(rollout, copies):
    """The rollout with the whole episodes of some copies given up."""
    bad = torch.zeros_like(rollout.valid)
    bad[:, copies] = rollout.valid[:, copies]
    valid = rollout.valid & ~bad
    return replace(rollout, valid=valid, mask=rollout.mask & valid.unsqueeze(-1), invalid=bad)


def test_a_group_of_four_with_a_failure_is_a_group_of_three():
    # Returns 1, 0, (failed), 1: mean 2/3, unbiased standard deviation sqrt(1/3).
    rollout = voided(rollout_of(torch.tensor([[1.0, 0.0, float("nan"), 1.0]]), group=torch.zeros(1, 4, dtype=torch.int64)), [2])
    std = (1 / 3) ** 0.5
    for name, expected in {
        "grpo": [1 / 3 / std, -2 / 3 / std, 0.0, 1 / 3 / std], "rloo": [0.5, -1.0, 0.0, 0.5], "maxrl": [0.5, -1.0, 0.0, 0.5],
    }.items():  # fmt: skip
        torch.testing.assert_close(CreditChain(GROUPED[name])(rollout).advantage, torch.tensor([expected]))


@pytest.mark.parametrize("credit", GROUPED.values(), ids=GROUPED)
@given(st.integers(0, 10**6), st.sampled_from([[2], [0, 5], [4, 5, 6], [4, 5, 6, 7]]), JUNK, st.booleans())
def test_the_others_learn_what_they_would_learn_without_it(credit, seed, failed, junk, drop):
    t, b = 3, 8
    g = torch.Generator().manual_seed(seed)
    x = lambda *shape: torch.randint(-2, 3, shape, generator=g).double()  # noqa: E731
    ends = torch.zeros(t, b, dtype=torch.bool)
    ends[-1] = True
    group = (torch.arange(b) // 4).expand(t, b)
    fields = {"truncated": ends, "value": x(t, b), "next_value": x(t, b), "logp": x(t, b, 2), "group": group, "solved": None}
    whole = rollout_of(x(t, b), num_units=2, **fields)
    kept = [i for i in range(b) if i not in failed]
    few = replace(
        whole, **{n: getattr(whole, n)[:, kept] for n in ("units", "logp", "mask", "valid", "reward", "steps", "terminated", "truncated", "value", "next_value", "group", "task", "policy_version", "episode")},
        obs={"x": whole.obs["x"][:, kept]},
    )  # fmt: skip
    dirty = voided(whole, failed)
    for name in ("reward", "value", "next_value", "logp"):
        getattr(dirty, name)[:, failed] = junk
    drop = drop and credit.needs_groups
    if credit.baseline == "leave_one_out" and len(failed) == 3:
        # One member is left, whom nobody can be compared with; a group made of one copy is refused instead.
        assert bool((CreditChain(credit)(dirty).advantage[:, 4:] == 0).all())
        return
    ours, theirs = (CreditChain(credit, drop_equal_groups=drop) for _ in range(2))
    a, b_ = ours(dirty), theirs(few)
    torch.testing.assert_close(a.advantage[:, kept], b_.advantage, rtol=0, atol=0)
    assert bool((a.advantage[:, failed] == 0).all())
    assert a.metrics == b_.metrics
    assert ours.state_dict()["m2"] == theirs.state_dict()["m2"]
    rows, wanted = flatten(dirty, a), flatten(few, b_)
    assert len(rows) == len(wanted) and torch.equal(rows.rows["logp"], wanted.rows["logp"])
    if credit.needs_groups:
        assert torch.equal(ours.contrast(dirty)[kept], theirs.contrast(few))


@pytest.mark.parametrize("mode", ["episodes", "stream"])
def test_a_rollout_tells_failures_apart_and_its_numbers_are_of_the_rest(mode):
    collector = Collector([toy("failing", 30)], still(), decisions=8, mode=mode)
    lengths = []
    for _ in range(4):
        rollout = collector.collect()
        names = rollout.constants["name"][rollout.episode][..., 0]
        failing = fails(names, 3)
        ended = (rollout.terminated | rollout.truncated) & (rollout.valid | rollout.invalid)
        void = torch.isin(rollout.episode, rollout.episode[ended & failing])
        assert bool(void.any()) and torch.equal(rollout.invalid, void & (rollout.invalid | rollout.valid))
        assert not bool((rollout.valid & rollout.invalid).any()) and not bool(rollout.mask[rollout.invalid].any())
        done = rollout.finished
        assert not bool(fails(done["seed"] % 1000, 3).any()) and bool(torch.isfinite(done["return"]).all())
        assert torch.equal(done["return"], (done["length"] * (done["length"] + 1) / 2).double()), "1 + 2 + ... + length"
        assert torch.equal(done["success_once"], done["length"] >= 2)
        total, count = rollout.metrics["paid"]
        assert (total, count) == (float(rollout.reward[rollout.valid].sum()), float(rollout.valid.sum()))
        told = rollout_metrics(rollout, ("a", "b")).reduce()
        number = len(rollout.episode[rollout.invalid].unique())
        assert told["rollout/invalid_rate"] == number / (number + len(done["return"]))
        assert told["rollout/invalid_episodes"] == number
        lengths += done["length"].tolist()
    assert set(lengths) == set(range(1, 7))


def test_failures_move_no_success_rate_and_fill_no_group():
    rollouts = []

    def one():
        rollouts.append(Collector([toy("failing", 8, every=1 if not rollouts else 3)], still(), decisions=8, mode="episodes", group_size=4, run_seed=len(rollouts)).collect())
        return rollouts[-1]

    chain = CreditChain(Credit(returns="trajectory", baseline="group_mean", gamma=1.0))
    joined, attempts = refill(one, chain.contrast, groups=1, max_attempts=3)
    assert attempts == 3 and joined.reward.shape[1] == 24, "equal members have no contrast, and failed ones have none"
    assert rollouts[0].finished == {} and not bool(rollouts[0].valid.any())
    assert int(joined.invalid.sum()) == sum(int(r.invalid.sum()) for r in rollouts) > 0


def test_a_run_whose_judge_always_fails_stops_with_a_sentence():
    env = toy("failing", 4, every=1)
    method = algorithm("grpo", update={"epochs": 1})
    run = wire([env], mlp(env.spec, critic={"kind": "none"}), method, decisions=8, mode="episodes", group_size=2)
    run.updater.max_bad_updates = 3
    before = [p.clone() for p in run.policy.parameters()]
    run.iterate(), run.iterate()
    with pytest.raises(DivergenceError, match="failed in every episode of the last 3 updates"):
        run.iterate()
    assert all(torch.equal(x, y) for x, y in zip(before, run.policy.parameters(), strict=True))


def play(every=3, **given):
    return evaluate(still(), toy("failing", 7, every=every), episodes=60, run_seed=0, **given)


def test_an_evaluation_counts_failures_as_nothing_but_failures_of_the_judge(tmp_path):
    result = play()
    names = result.seed % 1000
    assert torch.equal(result.invalid, fails(names, 3)) and 10 < int(result.invalid.sum()) < 30
    overall, kept = result.to_dict()["overall"], ~result.invalid
    assert overall["episodes"] == int(kept.sum()) and overall["invalid"] == int(result.invalid.sum())
    assert overall["success_once"]["successes"] == int((result.length[kept] >= 2).sum())
    assert result.score == float((result.length[kept] >= 2).double().mean())
    told = result.metrics("heldout").reduce()
    assert told["eval/heldout/invalid"] == told["eval/heldout/invalid/a"] + told["eval/heldout/invalid/b"] == overall["invalid"]
    assert told["eval/heldout/episodes"] == overall["episodes"]
    result.save(tmp_path / "evaluation.json")
    assert EvaluationResult.load(tmp_path / "evaluation.json").to_dict() == result.to_dict()
    assert not bool(result.invalid[choose(result, 60)].any()), "nobody watches what was not judged"
    print_evaluation("x", result)


def test_pairs_are_those_that_were_judged_twice():
    a, b = play(), play()
    other = replace(b, invalid=torch.zeros(60, dtype=torch.bool), success_once=~b.success_once)
    other.invalid[:30] = True
    both = ~a.invalid & ~other.invalid
    paired = compare(a, other).overall
    assert paired.episodes == int(both.sum()) and paired.only_a == int((a.success_once & both).sum())
    with pytest.raises(CapabilityError, match="no start that was judged in both"):
        compare(a, replace(b, invalid=~a.invalid))


def test_an_evaluation_without_one_judged_episode_is_no_result():
    with pytest.raises(DivergenceError, match="failed in all 60 evaluation episodes"):
        play(every=1)
    assert play(every=1000).invalid is None or int(play(every=1000).invalid.sum()) < 3
