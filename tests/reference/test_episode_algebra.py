"""Episodes that end anywhere, from the env through the collector to the advantage: by hand, and restarted against padded."""

import pytest
import torch

from embodied_rl.collect import Collector
from embodied_rl.credit import Credit, CreditChain
from tests.kit import Scripted, toy

CREDITS = {
    "gae": Credit(gamma=0.9, lam=0.7),
    "monte carlo": Credit(gamma=0.9, lam=1.0),
    "return to go": Credit(gamma=0.8, returns="return_to_go", baseline="none"),
    "trajectory": Credit(gamma=0.8, returns="trajectory", baseline="none"),
}


def collector(chunk, copies, *, lengths=(), own=0.0, **given):
    """Step t of an episode pays t and is worth 8 t, plus `own` times a number of the episode's own."""
    policy = Scripted(
        lambda obs: torch.zeros(len(obs["t"]), chunk, 1), lambda obs: 8 * obs["t"][:, 0] + own * obs["t"][:, 1],
        chunk=chunk, num_units=chunk,
    )  # fmt: skip
    return Collector([toy("lengths", copies, lengths=lengths)], policy, **given)


@pytest.mark.parametrize("mode", ["stream", "episodes"])
def test_success_termination_and_truncation_in_the_middle_of_a_chunk(mode):
    # Chunks of 3, gamma 0.5: three steps are discounted by 0.125, two by 0.25, one by 0.5. First decision of both copies:
    #   1 + 2 + 3 = 6,  6 + 0.125 x 24 - 0 = 9.
    # Copy 0 succeeds at step 2 and goes on, terminates at step 5, the second step of its second chunk:
    #   4 + 5 = 9,      9 - 24 = -15;                  9 + 0.125 x 0.5 x (-15) = 8.0625
    # Copy 1 is truncated at step 4, the first step of its second chunk, in a state worth 32:
    #   4,              4 + 0.5 x 32 - 24 = -4;        9 + 0.125 x 0.5 x (-4) = 8.75
    rollout = collector(3, 2, lengths=(5, 4), decisions=2, mode=mode).collect()
    assert rollout.steps.tolist() == [[3, 3], [2, 1]] and rollout.reward.tolist() == [[6.0, 6.0], [9.0, 4.0]]
    assert rollout.terminated.tolist() == [[False, False], [True, False]]
    assert rollout.truncated.tolist() == [[False, False], [False, True]]
    assert rollout.solved.tolist() == [[1, 1], [2, 2]]
    assert rollout.finished["success_once"].tolist() == [True, True] and rollout.finished["success_at_end"].tolist() == [False, False]
    out = CreditChain(Credit(gamma=0.5, lam=0.5))(rollout)
    assert out.advantage.tolist() == [[8.0625, 8.75], [-15.0, -4.0]]
    assert out.target.tolist() == [[8.0625, 8.75], [9.0, 20.0]]
    # Without a critic: 6 + 0.125 x 9 and 6 + 0.125 x 4.
    plain = CreditChain(Credit(gamma=0.5, returns="return_to_go", baseline="none"))(rollout)
    assert plain.advantage.tolist() == [[7.125, 6.5], [9.0, 4.0]]


def by_episode(rollouts, credit):
    """(copy, number of its episode, decision) -> advantage and target, of episodes seen from start to end."""
    chain, out, ended = CreditChain(credit), {}, [0] * 6
    for rollout in rollouts:
        result = chain(rollout)
        for b in range(6):
            rows = []
            for t in rollout.valid[:, b].nonzero().flatten().tolist():
                rows.append((float(result.advantage[t, b]), None if result.target is None else float(result.target[t, b])))
                if bool(rollout.done[t, b]):
                    out |= {(b, ended[b], i): row for i, row in enumerate(rows)}
                    rows, ended[b] = [], ended[b] + 1
    return out


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("name", ["gae", "monte carlo", "return to go"])
def test_restarted_at_once_or_padded_an_episode_has_the_same_advantages(name, chunk):
    """Copy b plays the same episodes in both modes: a stream restarts it at once, the other waits for the rest."""
    stream, padded = (collector(chunk, 6, own=0.01, decisions=20, run_seed=4, mode=mode) for mode in ("stream", "episodes"))
    restarted = by_episode([stream.collect()], CREDITS[name])
    waiting = by_episode([padded.collect() for _ in range(20)], CREDITS[name])
    assert len({key[:2] for key in restarted}) > 24, "several episodes per copy"
    assert restarted == {key: waiting[key] for key in restarted}


@pytest.mark.parametrize("chunk", [1, 3])
def test_waiting_longer_changes_no_advantage(chunk):
    """The slowest copy decides how long the others are padded."""
    for credit in CREDITS.values():
        quick, slow = (collector(chunk, 3, lengths=(2, 5, last), decisions=40, mode="episodes").collect() for last in (3, 30))
        assert len(slow.reward) > len(quick.reward)
        a, b = (CreditChain(credit)(r).advantage for r in (quick, slow))
        assert torch.equal(a[:, :2], b[: len(a), :2]) and not bool(b[len(a) :, :2].any())
