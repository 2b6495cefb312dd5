"""Steps on something else alone, after each update: hand-worked moves, what stays, what is not finite, what is saved."""

import pytest
import torch
from torch import nn

from embodied_rl.optimizer import FlatParameters
from embodied_rl.phase import Phases

SHUFFLE = torch.Generator().manual_seed(0)


class Two(nn.Module):
    """A weight that is learned here, and a critic's that is not."""

    def __init__(self):
        super().__init__()
        self.w, self.critic = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(1))


class Towards:
    """Draws the weight towards 3, by `times` (w - 3)^2."""

    def __init__(self, steps=1, lr=0.1, times=1.0):
        self.steps, self.lr, self.times, self.seen = steps, lr, times, []

    def losses(self, policy, shuffle):
        if self.times:
            loss = self.times * (policy.w - 3).square().sum()
            self.seen.append(float(loss.detach()))
            yield loss, {}


def made(*extras, max_grad_norm=1e9):
    policy = Two()
    return policy, Phases(extras, FlatParameters(policy, last="critic"), eps=1e-12, max_grad_norm=max_grad_norm)


def test_adams_first_step_is_as_long_as_its_size_and_the_critic_stays():
    policy, phases = made(Towards(lr=0.1))
    metrics = phases.run(policy, SHUFFLE, scale=0.5, muon=0.0)
    assert policy.w.tolist() == pytest.approx([0.05, 0.05]) and policy.critic.tolist() == [1.0]
    assert metrics.reduce() == {"actor/phase_loss": pytest.approx(18.0)}


def test_as_many_steps_as_asked_for_each_extra_by_itself():
    a, b, none = Towards(steps=4), Towards(steps=2), Towards(steps=0)
    policy, phases = made(a, none, b)
    metrics = phases.run(policy, SHUFFLE, scale=1.0, muon=0.0).reduce()
    assert [len(x.seen) for x in (a, none, b)] == [4, 0, 2]
    assert metrics["actor/phase_loss"] == pytest.approx(sum(a.seen + b.seen) / 6)
    # A gradient that hardly changes moves by the size of a step each time: each extra has moments of its own.
    assert policy.w.tolist() == pytest.approx([0.6, 0.6], rel=0.01)


def test_long_gradients_are_shortened_which_adam_sees_in_its_second_moment_only():
    policy, phases = made(Towards(), max_grad_norm=0.1)
    phases.run(policy, SHUFFLE, scale=1.0, muon=0.0)
    _, optimizer = phases.made[0]
    assert float(optimizer.moments["exp_avg"].norm()) == pytest.approx(0.1 * 0.1)


@pytest.mark.parametrize(("times", "told"), [(0.0, {}), (float("inf"), {"actor/skipped_updates": 3.0})])
def test_nothing_to_learn_from_and_nothing_finite_move_nothing(times, told):
    policy, phases = made(Towards(steps=3, times=times))
    assert phases.run(policy, SHUFFLE, scale=1.0, muon=0.0).reduce() == told
    assert policy.w.tolist() == [0, 0]


def test_a_restored_one_goes_on():
    policy, phases = made(Towards(steps=3))
    phases.run(policy, SHUFFLE, scale=1.0, muon=0.0)
    other, fresh = made(Towards(steps=3))
    with torch.no_grad():
        other.w.copy_(policy.w)
    fresh.load_state_dict(phases.state_dict())
    for p, x in ((policy, phases), (other, fresh)):
        x.run(p, SHUFFLE, scale=1.0, muon=0.0)
    assert torch.equal(policy.w, other.w)
