"""The updater against a plain loop with torch.optim.AdamW, Muon against torch.optim.Muon, schedules against their rules."""

import copy

import pytest
import torch

from embodied_rl.batch import flatten, minibatches
from embodied_rl.errors import CapabilityError
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.optimizer import FlatParameters, Muon, Optimizer, orthogonal
from embodied_rl.types import ActionSpec, Advantage, TensorSpec
from embodied_rl.update import Update, Updater
from tests.kit import mlp, number, rollout_of, spec

ENV = spec({"x": TensorSpec((3,))}, ActionSpec("continuous", 2))


def experience(policy, seed=0, t=8, b=4, spread=1.0):
    """Decisions of the policy on random observations, with random advantages of the given spread and random targets."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, b, 3, generator=g)
    out = policy.act({"x": x.flatten(0, 1)}, generator=g)
    rollout = rollout_of(
        torch.zeros(t, b), obs={"x": x}, units=out.units.view(t, b, 2).clone(), logp=out.logp.view(t, b, 2).clone(),
        value=out.value.view(t, b).clone(),
    )  # fmt: skip
    return rollout, Advantage(spread * torch.randn(t, b, generator=g), torch.randn(t, b, generator=g))


def build(loss=None, **update):
    policy = mlp(ENV, hidden=(16,), shake=0.1)
    function = LossFunction(loss or Loss(entropy_coef=0.01), 1)
    return policy, Updater(policy, function, Update(**update), seed=5, max_bad_updates=1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
def test_an_update_is_adamw_with_a_clipped_gradient_over_epochs_of_minibatches(max_grad_norm, weight_decay):
    policy, updater = build(epochs=3, minibatches=4, lr=2e-3, max_grad_norm=max_grad_norm, weight_decay=weight_decay)
    plain = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-3, eps=1e-5, weight_decay=weight_decay)
    shuffle = torch.Generator().manual_seed(5)
    norms = []
    for i in range(2):
        rollout, advantage = experience(policy, seed=i)
        for _ in range(3):
            for batch in minibatches(flatten(rollout, advantage), 4, updater.loss, shuffle):
                optimizer.zero_grad()
                updater.loss(plain.evaluate(batch.obs, batch.units), batch).total.backward()
                norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)))
                optimizer.step()
        metrics = updater.update(rollout, advantage, progress=0.0).reduce()
        for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
        assert metrics["actor/grad_norm"] == pytest.approx(sum(norms[-4:]) / 4, rel=1e-3)
        assert updater.version == i + 1
    assert (min(norms) > 0.05) and (max(norms) < 100), "one setting clips every step, the other none"


class Net(torch.nn.Module):
    """One layer of each form: tall, wide, a convolution, a table of words, and a critic."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__()
        self.words = torch.nn.Embedding(5, 6)
        self.tall, self.wide = torch.nn.Linear(6, 40), torch.nn.Linear(40, 12)
        self.conv = torch.nn.Conv2d(3, 8, 4)
        self.critic = torch.nn.Linear(6, 7)

    def grade(self):
        """Random gradients of very different sizes, as few rows or many would give them."""
        for i, p in enumerate(self.parameters()):
            assert p.grad is not None
            p.grad.copy_(10.0 ** (i % 3 - 1) * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def paces(net, muon, **steps):
    """What each parameter moved by in two steps with other gradients."""
    flat = FlatParameters(net, last="critic", muon=muon)
    optimizer = Optimizer(flat, eps=1e-5, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net.grade()
    optimizer.step(1e-2, **steps)
    flat.grad.mul_(-0.3).add_(0.05)
    optimizer.step(1e-2, **steps)
    return before, {n: p.detach().clone() for n, p in net.named_parameters()}


def test_muon_steps_as_torch_does_and_adam_moves_the_rest():
    """torch.optim.Muon computes in bfloat16: directions agree to a cosine of 0.999 and lengths to 2 %."""
    net, plain = Net(), Net()
    before, after = paces(net, Muon(lr=0.03), last_lr=2e-2, muon_lr=0.03)
    own = {"tall.weight", "wide.weight", "conv.weight"}
    named = dict(plain.named_parameters())
    # torch's takes matrices only: a convolution is one of as many columns as a window has numbers.
    matrices = {n: torch.nn.Parameter(named[n].detach().flatten(1).clone()) for n in sorted(own)}
    critic = [p for n, p in named.items() if n.startswith("critic")]
    others = [p for n, p in named.items() if n not in own and not n.startswith("critic")]
    optimizers = [
        torch.optim.Muon(list(matrices.values()), lr=0.03, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=1e-2, eps=1e-5, weight_decay=0.1),
        torch.optim.AdamW(critic, lr=2e-2, eps=1e-5, weight_decay=0.1),
    ]
    for p in plain.parameters():
        p.grad = torch.zeros_like(p)
    plain.grade()
    for change in (lambda g: g, lambda g: -0.3 * g + 0.05):
        for p in plain.parameters():
            p.grad = change(p.grad)
        for n, p in matrices.items():
            p.grad = named[n].grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for n, p in named.items():
        if n in own:
            moved, theirs = (after[n] - before[n]).flatten(), (matrices[n] - before[n].flatten(1)).flatten().detach()
            assert float(torch.cosine_similarity(moved, theirs, dim=0)) > 0.999, n
            assert float(moved.norm() / theirs.norm()) == pytest.approx(1.0, abs=0.02), n
        else:
            torch.testing.assert_close(after[n], p.detach(), rtol=1e-5, atol=1e-6)


def test_an_orthogonal_matrix_keeps_directions_and_levels_their_sizes():
    """Against the polar factor of an SVD: same singular vectors, singular values near 1 whatever they were."""
    g = torch.Generator().manual_seed(3)
    for shape in ((6, 20), (20, 6), (9, 9)):
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
        sizes = torch.logspace(0, -1.3, min(shape))
        out = orthogonal(37.0 * (u * sizes) @ v)
        levels = torch.diagonal(u.T @ out @ v.T)
        torch.testing.assert_close((u * levels) @ v, out, rtol=0, atol=1e-4)
        assert 0.6 < float(levels.min()) and float(levels.max()) < 1.25
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_muon_moves_what_it_is_told_to_and_says_what_there_is():
    kept, moved = paces(Net(), Muon(lr=0.03, only=("conv",)), last_lr=0.0, muon_lr=0.0)
    assert torch.equal(kept["conv.weight"], moved["conv.weight"]), "its own step size is 0"
    assert torch.equal(kept["critic.weight"], moved["critic.weight"])
    assert not torch.equal(kept["tall.weight"], moved["tall.weight"])
    with pytest.raises(CapabilityError, match=r"muon.only names 'eyes', .* choose among conv, critic, tall, wide"):
        FlatParameters(Net(), muon=Muon(lr=0.03, only=("conv", "eyes")))
    with pytest.raises(CapabilityError, match="choose among conv, tall, wide"):
        FlatParameters(Net(), last="critic", muon=Muon(lr=0.03, only=("critic",)))
    with pytest.raises(CapabilityError, match="none of them is trained here: set muon.lr: null"):
        FlatParameters(torch.nn.Embedding(5, 6), muon=Muon(lr=0.03))
    with pytest.raises(ValueError, match=r"only \(conv\) does nothing with lr \(null\)"):
        Muon(only=("conv",))


def test_muon_follows_the_schedule_of_the_other_step_size():
    policy, updater = build(lr=1e-3, lr_schedule="linear", muon={"lr": 0.02}, epochs=1, minibatches=1)
    layers = [m.weight for m in policy.modules() if isinstance(m, torch.nn.Linear)]

    def moved(progress):
        before = [w.detach().clone() for w in layers]
        updater.update(*experience(policy), progress=progress)
        return sum(float((a.detach() - b).norm()) for a, b in zip(layers, before, strict=True))

    first, last = moved(0.0), moved(1.0)
    assert first > 0.02 and last == 0.0


def step_size(updater, progress, seed=0, **given):
    """The step size reported by one update."""
    return updater.update(*experience(updater.policy, seed, **given), progress=progress).reduce()["actor/lr"]


def test_the_linear_schedule_ends_at_zero():
    _, updater = build(lr=1e-3, lr_schedule="linear")
    assert [step_size(updater, p) for p in (0.0, 0.25, 0.9)] == pytest.approx([1e-3, 7.5e-4, 1e-4])
    before = [p.detach().clone() for p in updater.policy.parameters()]
    assert step_size(updater, 1.0) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, updater.policy.parameters(), strict=True))


def test_the_constant_schedule_does_not_care():
    _, updater = build(lr=1e-3)
    assert [step_size(updater, p) for p in (0.0, 0.9)] == [1e-3, 1e-3]


def test_the_step_rises_over_the_updates_of_its_warm_up_and_then_follows_its_schedule():
    _, updater = build(lr=1e-3, lr_warmup=4)
    assert [step_size(updater, 0.0) for _ in range(6)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    _, updater = build(lr=1e-3, lr_warmup=2, lr_schedule="linear")
    assert [step_size(updater, p) for p in (0.0, 0.5, 0.75)] == pytest.approx([5e-4, 5e-4, 2.5e-4])


def test_the_step_rises_once_more_when_the_critic_has_warmed_up():
    _, updater = build(lr=1e-3, lr_warmup=2, critic_warmup=3)
    assert [step_size(updater, 0.0) for _ in range(6)] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 1e-3, 1e-3])


def test_the_adaptive_step_shrinks_when_the_policy_moves_too_far_and_grows_when_it_hardly_moves():
    # One change by 1.5 after each of the 2 epochs.
    _, updater = build(lr=1e-3, epochs=2, lr_schedule="adaptive_kl", target_kl=1e-9)
    assert step_size(updater, 0.0, spread=3.0) == pytest.approx(1e-3 / 1.5**2)
    _, updater = build(lr=1e-3, epochs=2, lr_schedule="adaptive_kl", target_kl=10.0)
    assert step_size(updater, 0.0) == pytest.approx(1e-3 * 1.5**2)


@pytest.mark.parametrize(("lr", "target_kl"), [(1e-6, 1e-12), (0.05, 1e3)])
def test_the_adaptive_step_never_turns_the_wrong_way(lr, target_kl):
    # A step below the usual floor must not be raised when the KL is too large, nor one above the ceiling lowered.
    _, updater = build(lr=lr, epochs=3, lr_schedule="adaptive_kl", target_kl=target_kl)
    found = step_size(updater, 0.0, spread=3.0)
    assert found <= lr if target_kl < 1 else found >= lr


def test_the_update_stops_after_the_epoch_that_moved_too_far():
    steps = {}
    for target in (None, 1e-9):
        _, updater = build(lr=1e-2, epochs=4, minibatches=2, target_kl=target)
        step_size(updater, 0.0)
        steps[target] = number(updater.state_dict()["moments"]["step"])
    assert steps == {None: 8, 1e-9: 2}


def test_during_the_warm_up_only_the_critic_learns():
    policy, updater = build(Loss(), lr=1e-2, critic_warmup=2)
    for update in range(3):
        before = {n: p.detach().clone() for n, p in policy.named_parameters()}
        step_size(updater, 0.0, seed=update)
        moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
        actor = {n for n in before if n.startswith(("actor", "log_std"))}
        assert actor and moved == (set(before) if update == 2 else set(before) - actor)


def test_the_reference_is_the_policy_at_the_start_and_never_moves():
    policy, updater = build(Loss(kl={"kind": "k3", "coef": 0.5}), lr=1e-2, epochs=2, minibatches=1)
    start = copy.deepcopy(policy)
    for i in range(3):
        rollout, advantage = experience(policy, seed=i)
        updater.update(rollout, advantage, progress=0.0)
        policy.observe({"x": 5 + rollout.obs["x"].flatten(0, 1)})
    # A step too small to move anything measures the KL between the weights of now and those of the start.
    updater.config = updater.config.model_copy(update={"lr": 1e-12, "epochs": 1})
    updater.lr = 1e-12
    rollout, advantage = experience(policy, seed=9)
    metrics = updater.update(rollout, advantage, progress=0.0).reduce()
    obs, units = {"x": rollout.obs["x"].flatten(0, 1)}, rollout.units.flatten(0, 1)
    with torch.no_grad():
        d = (policy.evaluate(obs, units).logp - start.evaluate(obs, units).logp).sum(-1)
    assert metrics["actor/kl_to_reference"] == pytest.approx(float((torch.exp(-d) + d - 1).mean()), rel=1e-4)
    assert metrics["actor/kl_to_reference"] > 1e-4
