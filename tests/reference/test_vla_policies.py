"""Small VLA policies: log-probabilities, gradients and samples against the same Gaussians and softmaxes worked out apart.

What is taken from the policy is one answer of its network for one noisy chunk or one prefix of tokens at a time; the
chain, its probability, the masks and the losses are written anew here in numpy.
"""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm

from embodied_rl import registry
from embodied_rl.errors import CapabilityError
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.policies._trunk import ActionScale
from embodied_rl.types import ActionSpec, TensorSpec
from embodied_rl.value_loss import ValueLoss, value_loss
from tests.kit import CPU, batch_of, spec

F64 = torch.float64
OBSERVATION = {
    "front": TensorSpec((16, 16, 3), torch.uint8, low=0, high=255),
    "state": TensorSpec((3,)),
    "instruction": TensorSpec((4,), torch.int64, low=0, high=9, constant=True),
}
C, D, K = 2, 3, 3
SMALL = {"width": 16, "heads": 2, "layers": 2, "channels": 8, "glances": 2, "chunk": C, "critic": {"hidden": 8}}
CHAINS = {
    "sde": {},
    "sde, strong": {"noise": 0.9, "min_std": 0.01},
    "sde, floor": {"noise": 0.2, "min_std": 0.15},
    "sde, one step": {"stochastic": "one"},
    "sde, last step": {"stochastic": "last", "start": 0.0},
    "learned, one step": {"likelihood": "learned", "stochastic": "one", "start": 0.5},
    "diffusion": {"process": "diffusion", "noise": 1.0},
    "learned": {"likelihood": "learned", "min_std": 0.05, "max_std": 0.5},
}
FLOWS = CHAINS | {"cfm": {"likelihood": "cfm", "samples": 3}, "latent": {"likelihood": "latent"}}
DECODINGS = ["parallel", "autoregressive"]
LOW, HIGH = torch.tensor([-0.5, -1.0, 0.2]), torch.tensor([0.9, 0.4, 0.2])
"""Range of the demonstrated actions; the last dimension never moves."""


@contextmanager
def float64():
    """New tensors are float64, so that noise and times that a policy draws are too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(name, *, seed=0, action=None, observation=None, **config):
    """A small policy in float64 whose every parameter matters."""
    module = registry.load("policy", name)
    torch.manual_seed(seed)
    env = spec(observation or OBSERVATION, action or ActionSpec("continuous", D))
    policy = module.build(module.Config(**SMALL | config), env=env, device=CPU)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * torch.randn_like(p)
    policy.fit_actions(LOW[: policy.size], HIGH[: policy.size])
    return policy.double()


def flow(case="sde", **config):
    return build("tiny_vla_flow", **{"denoising_steps": K} | FLOWS[case] | config)


def tokens(decoding, **config):
    return build("tiny_vla_tokens", **{"bins": 5} | config, decoding=decoding)


def look(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "front": torch.randint(0, 256, (n, 16, 16, 3), generator=g).to(torch.uint8),
        "state": torch.randn(n, 3, generator=g, dtype=F64),
        "instruction": torch.randint(0, 10, (n, 4), generator=g),
    }


def row(obs, i):
    """One row, alone in its batch."""
    return {k: v[i : i + 1] for k, v in obs.items()}


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def decide(policy, obs, seed=1, **how):
    """A sampled decision, as tensors that autograd accepts."""
    with float64():
        out = policy.act(obs, generator=generator(seed), **how)
    return out.units.clone(), out.logp.clone(), out.action.clone()


def answer(policy, obs, x, t):
    """The network's answer (and standard deviation) to one noisy chunk [C, D] at one time: no other chunk is near."""
    from embodied_rl.policies._trunk import padded

    with torch.no_grad():
        cache = policy.trunk.prefix(padded(obs)[0])[1]
        n = len(cache[0][0])
        x = torch.as_tensor(x, dtype=F64).expand(n, 1, C, policy.size)
        out, std = policy._answer(cache, x, torch.full((n, 1), float(t), dtype=F64))
    return out[0, 0].numpy(), None if std is None else std[0, 0].numpy()


def clock(policy):
    """Times before and after each step, rounded as the policy stores them (an embedding of time magnifies that)."""
    first = 1.0 if policy.config.process == "flow" else 0.98
    steps = policy.config.denoising_steps
    assert [*policy.now.tolist(), 0.0] == pytest.approx(list(np.linspace(first, 0.0, steps + 1)), abs=1e-7)
    return list(zip(policy.now.tolist(), policy.after.tolist(), strict=True))


def ode(policy, obs, x, first=0, last=None):
    """Deterministic steps `first` to `last`, from x [C, D]."""
    for now, after in clock(policy)[first:last]:
        v, _ = answer(policy, obs, x, now)
        if policy.config.process == "flow":
            x = x + (after - now) * v
        else:
            a, s, a2, s2 = (f(math.pi * t / 2) for t in (now, after) for f in (math.cos, math.sin))
            x = a2 * (x - s * v) / a + s2 * v
    return x


def transition(policy, obs, x, k):
    """Mean and standard deviation of the noisy step k."""
    c = policy.config
    now, after = clock(policy)[k]
    v, std = answer(policy, obs, x, now)
    if std is not None:
        return x - v * (now - after), std
    if c.process == "diffusion":
        bar, bar2 = math.cos(math.pi * now / 2) ** 2, math.cos(math.pi * after / 2) ** 2
        # Equations 12 and 16 of Song et al. 2021; the floor changes what is added, not what is expected.
        std = c.noise * math.sqrt((1 - bar2) / (1 - bar) * (1 - bar / bar2))
        clean = (x - math.sqrt(1 - bar) * v) / math.sqrt(bar)
        mean = math.sqrt(bar2) * clean + math.sqrt(max(0.0, 1 - bar2 - std**2)) * v
    else:
        d, held = now - after, min(now, clock(policy)[1][0]) if len(clock(policy)) > 1 else 0.0
        strength = c.noise * math.sqrt(now / (1 - held))
        score = -(x + (1 - now) * v) / now
        # dx = -(v - s^2 / 2 score) d + s dw, time running backwards.
        mean, std = x - v * d + strength**2 * d / 2 * score, strength * math.sqrt(d)
    return mean, np.full_like(mean, max(std, c.min_std))


def restored(x, size=D):
    """The action of a normalised chunk, with the scale of `build`."""
    low, high = LOW[:size].double().numpy(), HIGH[:size].double().numpy()
    reach = np.maximum((high - low) / 2, 0.01)
    return np.clip(x * reach + (low + high) / 2, -1, 1)


# ---- flow and diffusion: probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CHAINS)
def test_the_probability_of_a_chain_is_that_of_its_gaussian_steps(case):
    policy, obs = flow(case), look(3)
    units, logp, action = decide(policy, obs)
    given = policy.evaluate(obs, units)
    assert units.shape == (3, policy.num_units, 2 * C * D + 1)
    for i in range(3):
        for j in range(policy.num_units):
            x, after = units[i, j, :-1].view(2, C, D).numpy()
            mean, std = transition(policy, row(obs, i), x, int(units[i, j, -1]))
            expected = norm.logpdf(after, mean, std).sum()
            assert float(given.logp[i, j].detach()) == pytest.approx(expected, rel=1e-6, abs=1e-6), (i, j)
            assert float(given.entropy[i, j].detach()) == pytest.approx(norm.entropy(mean, std).sum(), rel=1e-6)
            if policy.num_units == K:
                assert float(units[i, j, -1]) == j
    torch.testing.assert_close(logp, given.logp.detach(), rtol=1e-9, atol=1e-9)
    if policy.num_units == K:
        # Step k begins where step k - 1 ended, and the last one ends at the action.
        assert torch.equal(units[:, 1:, : C * D], units[:, :-1, C * D : -1])
        last = units[:, -1, C * D : -1].view(3, C, D).numpy()
        np.testing.assert_allclose(action.numpy(), restored(last), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["sde", "diffusion", "learned"])
def test_steps_are_drawn_from_the_gaussian_they_are_scored_with(case):
    """4000 decisions of one row: standardised steps have mean 0 and deviation 1 within 4.5 standard errors."""
    n = 4000
    policy, obs = flow(case), look(1)
    units, _, _ = decide(policy, {k: v.expand(n, *v.shape[1:]) for k, v in obs.items()})
    x, after = units[..., : C * D], units[..., C * D : -1]
    first = x[:, 0].flatten()
    assert float(first.mean()) == pytest.approx(0, abs=4.5 / len(first) ** 0.5)
    assert float(first.std()) == pytest.approx(1, rel=4.5 / (2 * len(first)) ** 0.5)
    # A few rows tell where each step should go; all rows begin at different places.
    with torch.no_grad():
        cache = policy.trunk.prefix({k: v.expand(n, *v.shape[1:]) for k, v in obs.items()})[1]
        mean, std, _ = policy._step(cache, x.unflatten(-1, (C, D)), units[..., -1].long())
    z = (after - mean.flatten(2)) / std.flatten(2)
    for k in range(K):
        assert float(z[:, k].mean()) == pytest.approx(0, abs=4.5 / (n * C * D) ** 0.5)
        assert float(z[:, k].std()) == pytest.approx(1, rel=4.5 / (2 * n * C * D) ** 0.5)


def test_with_one_noisy_step_the_others_follow_the_ode():
    n = 8
    policy, obs = flow("sde, one step"), look(n)
    units, _, action = decide(policy, obs, seed=3)
    assert policy.num_units == 1
    # What the generator gave first is the noise that the chain began with.
    begin = torch.randn(n, C, D, generator=generator(3), dtype=F64).numpy()
    chosen = units[:, 0, -1].long().tolist()
    assert len(set(chosen)) == K, "each step is chosen somewhere"
    for i, k in enumerate(chosen):
        before, after = units[i, 0, :-1].view(2, C, D).numpy()
        np.testing.assert_allclose(ode(policy, row(obs, i), begin[i], 0, k), before, rtol=1e-5, atol=1e-6)
        end = ode(policy, row(obs, i), after, k + 1)
        np.testing.assert_allclose(action[i].numpy(), restored(end), rtol=1e-5, atol=1e-6)
        assert np.abs(after - ode(policy, row(obs, i), before, k, k + 1)).min() > 1e-6, "the chosen step is noisy"


def test_each_step_is_chosen_equally_often():
    n = 900
    policy, obs = flow("sde, one step"), look(1)
    units, _, _ = decide(policy, {k: v.expand(n, *v.shape[1:]) for k, v in obs.items()})
    assert chisquare(np.bincount(units[:, 0, -1].long().numpy(), minlength=K)).pvalue > 1e-3


def test_the_learned_deviation_stays_within_its_bounds():
    policy, obs = flow("learned"), look(2)
    with torch.no_grad():
        for bias, bound in ((-50.0, 0.05), (50.0, 0.5), (0.0, None)):
            policy.spread.bias.fill_(bias)
            _, std = answer(policy, row(obs, 0), np.zeros((C, D)), 1.0)
            assert std.min() >= 0.05 - 1e-9 and std.max() <= 0.5 + 1e-9
            if bound:
                np.testing.assert_allclose(std, bound, rtol=1e-6)
    # Half way between the bounds on a logarithmic scale.
    with torch.no_grad():
        policy.spread.weight.zero_()
    np.testing.assert_allclose(answer(policy, row(obs, 0), np.zeros((C, D)), 1.0)[1], math.sqrt(0.05 * 0.5), rtol=1e-6)


@pytest.mark.parametrize("case", FLOWS)
def test_mean_divides_by_the_numbers_of_a_step(case):
    obs = look(4)
    total, mean = (flow(case, log_prob=how) for how in ("sum", "mean"))
    units, _, _ = decide(total, obs)
    a, b = (p.evaluate(obs, units) for p in (total, mean))
    torch.testing.assert_close(a.logp, b.logp * (C * D))
    assert (a.entropy is None) == (b.entropy is None) == (case == "cfm")
    if a.entropy is not None:
        torch.testing.assert_close(a.entropy, b.entropy * (C * D))


@pytest.mark.parametrize("case", FLOWS)
def test_the_greedy_chunk_is_the_ode_from_the_middle_of_the_noise(case):
    policy, obs = flow(case), look(3)
    _, _, action = decide(policy, obs, seed=1, greedy=True)
    assert torch.equal(action, decide(policy, obs, seed=2, greedy=True)[2])
    for i in range(3):
        begin = latent(policy, row(obs, i))[0] if case == "latent" else np.zeros((C, D))
        np.testing.assert_allclose(action[i].numpy(), restored(ode(policy, row(obs, i), begin)), rtol=1e-5, atol=1e-6)


# ---- the flow-matching ratio and the frozen flow ---------------------------------------------------------------------


def matching_loss(policy, obs, unit):
    """Mean over stored pairs of the squared error of the velocity, summed over a chunk."""
    s = policy.config.samples
    action, noises, times = unit[: C * D].reshape(C, D), unit[C * D : -s].reshape(s, C, D), unit[-s:]
    errors = []
    for e, t in zip(noises, times, strict=True):
        v, _ = answer(policy, obs, (1 - t) * action + t * e, t)
        errors.append(((v - (e - action)) ** 2).sum())
    return np.mean(errors)


def test_the_ratio_of_cfm_is_that_of_the_matching_losses():
    old, new, obs = flow("cfm"), flow("cfm"), look(3)
    with torch.no_grad():
        for p in new.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator(7), dtype=F64)
    units, logp_old, action = decide(old, obs)
    logp_new = new.evaluate(obs, units).logp
    assert units.shape == (3, 1, C * D + 3 * C * D + 3) and new.evaluate(obs, units).entropy is None
    for i in range(3):
        unit = units[i, 0].numpy()
        before, after = (matching_loss(p, row(obs, i), unit) for p in (old, new))
        ratio = float((logp_new - logp_old)[i, 0].detach().exp())
        assert ratio == pytest.approx(math.exp(before - after), rel=1e-6) and ratio != pytest.approx(1, rel=1e-3)
        np.testing.assert_allclose(action[i].numpy(), restored(unit[: C * D].reshape(C, D)), rtol=1e-6, atol=1e-6)
    times = units[:, 0, -3:]
    assert bool(((times >= 0) & (times < 1)).all())


def latent(policy, obs):
    """Mean and standard deviation of the noise that the actor chooses."""
    from embodied_rl.policies._trunk import padded

    with torch.no_grad():
        mean = policy.actor(policy.trunk.prefix(padded(obs)[0])[0])[0]
        return mean.view(C, D).numpy(), policy.actor_log_std.exp().view(C, D).numpy()


def test_a_latent_decision_is_the_noise_that_the_flow_begins_with():
    policy, obs = flow("latent"), look(3)
    units, logp, action = decide(policy, obs)
    given = policy.evaluate(obs, units)
    assert units.shape == (3, 1, C * D)
    for i in range(3):
        w = units[i, 0].view(C, D).numpy()
        mean, std = latent(policy, row(obs, i))
        assert float(logp[i, 0]) == pytest.approx(norm.logpdf(w, mean, std).sum(), rel=1e-6)
        assert float(given.entropy[i, 0].detach()) == pytest.approx(norm.entropy(mean, std).sum(), rel=1e-6)
        np.testing.assert_allclose(action[i].numpy(), restored(ode(policy, row(obs, i), w)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logp, given.logp.detach())


def test_latent_noise_is_drawn_from_the_gaussian_it_is_scored_with():
    """4000 decisions of one row, 4.5 standard errors."""
    n = 4000
    policy, obs = flow("latent", latent_std=0.6), look(1)
    units, _, _ = decide(policy, {k: v.expand(n, *v.shape[1:]) for k, v in obs.items()})
    mean, std = latent(policy, obs)
    z = (units[:, 0].view(n, C, D).numpy() - mean) / std
    assert float(np.abs(z.mean(0)).max()) < 4.5 / n**0.5
    assert float(np.abs(z.std(0) - 1).max()) < 4.5 / (2 * n) ** 0.5


def test_with_latent_only_actor_and_critic_learn():
    from embodied_rl.optimizer import FlatParameters, Optimizer

    policy, obs = flow("latent"), look(20)
    units, _, _ = decide(policy, obs)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    parameters = FlatParameters(policy)
    names = {n.split(".")[0] for n, _ in parameters.named}
    assert names == {"actor", "actor_log_std", "critic"}
    given = policy.evaluate(obs, units)
    (given.logp.mean() + given.value.square().mean() + given.entropy.mean()).backward()
    assert all(bool((p.grad != 0).any()) for _, p in parameters.named)
    # Weight decay moves whatever the optimizer was given.
    Optimizer(parameters, eps=1e-5, weight_decay=0.1).step(0.1)
    moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {n for n, _ in parameters.named}


# ---- tokens ----------------------------------------------------------------------------------------------------------


def logits_by_hand(policy, obs, units):
    """[A, bins] of one row: autoregressive token after token with a growing cache, parallel one query at a time."""
    from embodied_rl.policies._trunk import padded

    with torch.no_grad():
        cache = list(policy.trunk.prefix(padded(obs)[0])[1])
        n, out = len(cache[0][0]), []
        if not policy.autoregressive:
            seen = policy.trunk.suffix(policy.query.expand(n, -1, -1), cache)
            return policy.head(policy.norm(seen))[0].view(C * D, -1).numpy()
        for i in range(C * D):
            x = policy.query[i].expand(n, 1, -1)
            if i:
                x = x + policy.bin_token(units[i - 1])
            out.append(policy.head(policy.norm(policy.trunk.suffix(x, cache, grow=True)))[0, 0])
    return torch.stack(out).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_probability_of_tokens_is_the_softmax_worked_out_one_after_the_other(decoding, temperature):
    policy, obs = tokens(decoding, temperature=temperature), look(3)
    units, logp, _ = decide(policy, obs)
    given = policy.evaluate(obs, units)
    assert units.shape == (3, C * D) and units.dtype == torch.int64
    for i in range(3):
        scores = logits_by_hand(policy, row(obs, i), units[i]) / temperature
        table = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        expected = table[np.arange(C * D), units[i].numpy()]
        np.testing.assert_allclose(given.logp[i].detach().numpy(), expected, rtol=1e-8, atol=1e-10)
        entropy = -(np.exp(table) * table).sum(-1)
        np.testing.assert_allclose(given.entropy[i].detach().numpy(), entropy, rtol=1e-8)
    torch.testing.assert_close(logp, given.logp.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_middle_of_some_draws_has_the_probability_of_its_distribution(decoding):
    """By the masses below and above, 3 F^2 - 2 F^3, of the softmax worked out one token after the other."""
    policy, obs = tokens(decoding, draws=3), look(3)
    units, logp, _ = decide(policy, obs)
    given = policy.evaluate(obs, units)
    for i in range(3):
        scores = logits_by_hand(policy, row(obs, i), units[i])
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        upto = p.cumsum(-1)
        q = np.diff(3 * upto**2 - 2 * upto**3, axis=-1, prepend=0)
        expected = np.log(q[np.arange(C * D), units[i].numpy()])
        np.testing.assert_allclose(given.logp[i].detach().numpy(), expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(given.entropy[i].detach().numpy(), -(q * np.log(q)).sum(-1), rtol=1e-6)
    torch.testing.assert_close(logp, given.logp.detach(), rtol=1e-9, atol=1e-9)


def test_a_token_sees_those_before_it_and_no_later_one():
    policy, obs = tokens("autoregressive"), look(1)
    units = torch.zeros(1, C * D, dtype=torch.int64)
    base = policy.evaluate(obs, units).logp
    for i in range(C * D):
        changed = units.clone()
        changed[0, i] = 3
        same = (policy.evaluate(obs, changed).logp - base).abs()[0] < 1e-12
        assert bool(same[:i].all()) and not bool(same[i + 1 :].any()), i


@pytest.mark.parametrize(("temperature", "draws"), [(1.0, 1), (0.3, 1), (1.0, 5)])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_tokens_are_drawn_from_their_softmax(decoding, temperature, draws):
    """All pairs of two tokens of three bins, 3000 draws; chi-square, one in a thousand."""
    n = 3000
    action = ActionSpec("continuous", 2)
    policy, obs = tokens(decoding, temperature=temperature, draws=draws, chunk=1, bins=3, action=action), look(1)
    with torch.no_grad():
        # Untrained logits are nearly equal, so neither temperature nor what came before would show.
        policy.head.weight *= 4 if draws == 1 else 1
        pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        p = policy.evaluate({k: v.expand(9, *v.shape[1:]) for k, v in obs.items()}, pairs).logp.sum(-1).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6) and float(p.max()) > 0.15
    units, _, _ = decide(policy, {k: v.expand(n, *v.shape[1:]) for k, v in obs.items()})
    drawn = np.bincount((units[:, 0] * 3 + units[:, 1]).numpy(), minlength=9)
    assert chisquare(drawn, n * p.numpy()).pvalue > 1e-3, (drawn, n * p)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_greedy_tokens_are_the_likeliest_and_do_not_depend_on_chance(decoding):
    policy, obs = tokens(decoding, temperature=3.0), look(3)
    units, _, action = decide(policy, obs, seed=1, greedy=True)
    again, _, action_again = decide(policy, obs, seed=2, greedy=True)
    assert torch.equal(units, again) and torch.equal(action, action_again)
    for i in range(3):
        assert units[i].tolist() == logits_by_hand(policy, row(obs, i), units[i]).argmax(-1).tolist()
        middle = (units[i].view(C, D).numpy() + 0.5) * 2 / 5 - 1
        np.testing.assert_allclose(action[i].numpy(), restored(middle), rtol=1e-6, atol=1e-6)


# ---- imitation -------------------------------------------------------------------------------------------------------

STATE = {"mean": torch.tensor([0.1, -0.3, 0.5]), "std": torch.tensor([0.7, 2.0, 0.0])}
"""Statistics of the only vector of the observation; one number of it never moves."""


def shown(n, seed=0):
    """Demonstrated actions within the range."""
    u = torch.rand(n, C, D, generator=generator(seed), dtype=F64)
    return LOW + (HIGH - LOW) * u


def ends(n):
    """The observation's vectors at the end of each demonstration."""
    return {"state": torch.randn(n, 3, generator=generator(8), dtype=F64)}


def learning(policy):
    """A policy as imitation prepares it."""
    policy.fit_vectors({"state": STATE})
    return policy


def gelu(x):
    """x times the normal distribution function."""
    return x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def foreseen(policy, obs):
    """What foresight adds for one row: a perceptron over what is seen, and its error in standard deviations: squared up
    to 1, then a line of the same slope."""
    from embodied_rl.policies._trunk import padded

    with torch.no_grad():
        sight = policy.trunk.prefix(padded(obs)[0]).sight[0].numpy()
    foresight = policy.trunk.foresight
    weight, bias = (x.detach().numpy() for x in foresight.hidden.parameters())
    hidden = gelu(weight @ sight + bias)
    weight, bias = (x.detach().numpy() for x in foresight.head.parameters())
    target = (obs["end"][0].numpy() - STATE["mean"].numpy()) / np.array([0.7, 2.0, 0.01])
    error = np.abs(weight @ hidden + bias - target)
    return policy.config.foresight * np.where(error <= 1, error**2, 2 * error - 1).mean()


@pytest.mark.parametrize("decoding", DECODINGS)
def test_tokens_imitate_by_the_cross_entropy_of_the_demonstrated_bins(decoding):
    """Whatever the temperature: that is of sampling."""
    plain, cool, obs = tokens(decoding, foresight=0.7), tokens(decoding, foresight=0.7, temperature=0.4), look(4)
    action = shown(4)
    action[0, 0] = torch.tensor([0.9, -1.0, 0.2])  # the upper edge of the range, the lower one, a constant
    action[1, 0] = torch.tensor([1.0, 0.6, 0.9])  # outside
    reach = ((HIGH - LOW) / 2).clamp(min=0.01).double()
    place = ((action - (LOW + HIGH) / 2) / reach + 1) / 2 * 5
    units = place.floor().clamp(0, 4).long()
    assert units[0, 0].tolist() == [4, 0, 2] and units[1, 0].tolist() == [4, 4, 4]
    expected = -plain.evaluate(obs, units.flatten(1)).logp.view(4, C, D).mean(-1)
    for policy in (plain, cool):
        learning(policy)
        extra = [foreseen(policy, row(obs, i) | {"end": ends(4)["state"][i : i + 1]}) for i in range(4)]
        with float64():
            loss = policy.imitation_loss(obs, action, ends(4), generator())
        torch.testing.assert_close(loss, expected + torch.tensor(extra, dtype=F64).view(4, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_median_is_the_bin_in_which_half_of_the_mass_is_reached(decoding, temperature):
    """A high peak beside the rest moves the likeliest bin and not the median, whatever the temperature of sampling."""
    shares = [0.15, 0.15, 0.25, 0.05, 0.4]  # 0.55 is reached in bin 2
    policy = tokens(decoding, greedy="median", temperature=temperature)
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.view(-1, 5)[:] = torch.tensor(shares, dtype=F64).log()
    assert (decide(policy, look(2), greedy=True)[0] == 2).all()
    plain = tokens(decoding, temperature=temperature)
    plain.load_state_dict(policy.state_dict())
    assert (decide(plain, look(2), greedy=True)[0] == 4).all()


@pytest.mark.parametrize("decoding", DECODINGS)
def test_smoothed_tokens_imitate_by_the_cross_entropy_of_a_gaussian(decoding):
    policy, obs, std = tokens(decoding, foresight=0.0, smoothing=0.8), look(4), 0.8
    learning(policy)
    action = shown(4)
    action[0, 0] = torch.tensor([0.9, -1.0, 0.2])  # the upper edge of the range, the lower one, a constant
    action[1, 0] = torch.tensor([1.0, 0.6, 0.9])  # outside
    reach = ((HIGH - LOW) / 2).clamp(min=0.01).double()
    place = (((action - (LOW + HIGH) / 2) / reach).clamp(-1, 1) + 1) / 2 * 5
    units = place.floor().clamp(0, 4).long().flatten(1)
    scores = np.stack([logits_by_hand(policy, row(obs, i), units[i]) for i in range(4)])
    logits = torch.from_numpy(scores).log_softmax(-1).view(4, C, D, 5)
    expected = torch.zeros(4, C, dtype=F64)
    for k in range(5):
        upper = 1.0 if k == 4 else torch.erf((k + 1 - place) / std / math.sqrt(2)) / 2 + 0.5
        lower = 0.0 if k == 0 else torch.erf((k - place) / std / math.sqrt(2)) / 2 + 0.5
        expected -= ((upper - lower) * logits[..., k]).mean(-1)
    with float64():
        loss = policy.imitation_loss(obs, action, {}, generator())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bins", [5, 256])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_what_a_token_does_is_the_middle_of_what_it_was_taught_for(decoding, bins):
    """A head that always says bin b acts as it was shown, and half a bin to either side; further away it is wrong."""
    policy, obs = tokens(decoding, bins=bins, foresight=0.0), look(2)
    width = torch.maximum((HIGH - LOW) / 2, torch.tensor(0.01)).double() * 2 / bins
    for b in (0, 1, bins // 2, bins - 1):
        with torch.no_grad():
            policy.head.weight.zero_(), policy.head.bias.zero_()
            policy.head.bias.view(-1, bins)[:, b] = 50.0
        _, _, action = decide(policy, obs, greedy=True)
        for shift, right in ((0.0, True), (0.49, True), (-0.49, True), (0.51, b == bins - 1), (-0.51, b == 0)):
            with float64(), torch.no_grad():
                loss = policy.imitation_loss(obs, action + shift * width, {}, generator())
            assert loss.shape == (2, C)
            assert bool(((loss < 1e-6) if right else (loss > 49)).all()), (b, shift, loss)


@pytest.mark.parametrize("case", ["sde", "diffusion", "learned", "cfm", "latent"])
def test_flows_imitate_by_the_squared_error_of_their_answer(case):
    policy, obs, action = learning(flow(case, foresight=0.7)), look(3), shown(3)
    with float64(), torch.no_grad():
        loss = policy.imitation_loss(obs, action, ends(3), generator(5))
    # The same draws: noise first, then one time for each row.
    g = generator(5)
    noise = torch.randn(3, C, D, generator=g, dtype=F64).numpy()
    t = torch.rand(3, generator=g, dtype=F64).numpy() * clock(policy)[0][0]
    low, high = LOW.double().numpy(), HIGH.double().numpy()
    a = (action.numpy() - (low + high) / 2) / np.maximum((high - low) / 2, 0.01)
    for i in range(3):
        if policy.config.process == "flow":
            x, target = (1 - t[i]) * a[i] + t[i] * noise[i], noise[i] - a[i]
        else:
            x, target = math.cos(math.pi / 2 * t[i]) * a[i] + math.sin(math.pi / 2 * t[i]) * noise[i], noise[i]
        v, _ = answer(policy, row(obs, i), x, t[i])
        extra = foreseen(policy, row(obs, i) | {"end": ends(3)["state"][i : i + 1]})
        np.testing.assert_allclose(loss[i].numpy(), ((v - target) ** 2).mean(-1) + extra, rtol=1e-5)


# ---- gradients -------------------------------------------------------------------------------------------------------


def disagreements(policy, loss):
    """Parameters whose derivative in a random direction is not that of finite differences; all are tried."""
    policy.zero_grad()
    loss().backward()
    wrong, moving = [], 0
    for name, p in policy.named_parameters():
        if not p.requires_grad:
            continue
        way = torch.randn(p.shape, generator=generator(11), dtype=F64)
        way /= way.norm()
        slope = 0.0 if p.grad is None else float((p.grad * way).sum())
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                p += h * way
                values.append(float(loss()))
                p -= h * way
        measured = (values[0] - values[1]) / 2e-5
        moving += measured != 0.0
        if slope != pytest.approx(measured, rel=1e-4, abs=1e-6):
            wrong.append((name, slope, measured))
    assert moving > 4
    return wrong


def of_evaluation(policy, obs, units):
    weight = torch.randn(len(units), policy.num_units, generator=generator(9), dtype=F64)

    def loss():
        out = policy.evaluate(obs, units)
        extra = 0.0 if out.entropy is None else 0.3 * out.entropy.mean()
        return (out.logp * weight).mean() + out.value.square().mean() + extra

    return loss


@pytest.mark.parametrize("case", FLOWS)
def test_gradients_of_a_flow_are_those_of_finite_differences(case):
    policy, obs = flow(case), look(2)
    units, _, _ = decide(policy, obs)
    assert disagreements(policy, of_evaluation(policy, obs, units)) == []


@pytest.mark.parametrize("decoding", DECODINGS)
def test_gradients_of_tokens_are_those_of_finite_differences(decoding):
    policy, obs = tokens(decoding), look(2)
    units, _, _ = decide(policy, obs)
    assert disagreements(policy, of_evaluation(policy, obs, units)) == []


@pytest.mark.parametrize("make", [flow, lambda **config: tokens("parallel", **config)], ids=["flow", "tokens"])
def test_gradients_of_a_classifying_critic_are_those_of_finite_differences(make):
    policy, obs = make(critic={"hidden": 8, "kind": "hl_gauss", "bins": 7}), look(2)
    units, logp, _ = decide(policy, obs)
    batch = batch_of(logp, LossFunction(Loss(), 1), target=torch.tensor([0.2, 0.9], dtype=F64))

    def loss():
        out = policy.evaluate(obs, units)
        # The number is the mean of the same distribution: what its logits say of it has a gradient of its own.
        return value_loss(out, batch, ValueLoss(kind="hl_gauss"), policy.value_range).mean() + out.value.square().mean()

    assert disagreements(policy, loss) == []
    assert float(policy.critic.head.weight.grad.abs().max()) > 0.01 and float(policy.trunk.summary.grad.norm()) > 1e-4


IMITATORS = {
    "flow": lambda: flow("sde", foresight=0.7), "diffusion": lambda: flow("diffusion", foresight=0.7),
    "latent": lambda: flow("latent", foresight=0.7), "parallel": lambda: tokens("parallel", foresight=0.7),
    "autoregressive": lambda: tokens("autoregressive", foresight=0.7),
}  # fmt: skip


@pytest.mark.parametrize("case", ["sde", "latent"])
def test_imitation_lets_go_of_the_flow_and_of_nothing_that_was_frozen_before(case):
    """A pretrained part may be frozen for good."""
    policy = flow(case)
    eyes = list(policy.trunk.eyes.parameters())
    if case == "latent":
        policy.requires_grad_(True)
    for p in eyes:
        p.requires_grad_(False)
    if case == "latent":
        policy.freeze_flow()
    learning(policy)
    assert {p for p in policy.parameters() if not p.requires_grad} == set(eyes)


@pytest.mark.parametrize("name", IMITATORS)
def test_gradients_of_imitation_are_those_of_finite_differences(name):
    policy, obs, action = learning(IMITATORS[name]()), look(2), shown(2)
    assert all(p.requires_grad for p in policy.parameters()), "imitation trains everything"

    def loss():
        return policy.imitation_loss(obs, action, ends(2), generator(4)).square().mean()

    with float64():
        assert disagreements(policy, loss) == []


# ---- the scale of actions --------------------------------------------------------------------------------------------


def test_the_scale_maps_the_range_to_1_and_back():
    scale = ActionScale(3)
    scale.fit(LOW, HIGH)
    torch.testing.assert_close(scale.normalise(LOW)[:2], -torch.ones(2))
    torch.testing.assert_close(scale.normalise(HIGH)[:2], torch.ones(2))
    action = LOW + (HIGH - LOW) * torch.rand(50, 4, 3, generator=generator())
    torch.testing.assert_close(scale.restore(scale.normalise(action)), action)
    # A dimension that never moved: 1 is 0.01 away, so that noise of a deviation of 1 hardly moves it.
    torch.testing.assert_close(scale.normalise(torch.tensor([0.0, 0.0, 0.21]))[2], torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(scale.restore(torch.zeros(3))[2], torch.tensor(0.2))
    # What lies outside of what an env takes is cut.
    assert scale.restore(torch.full((3,), 9.0)).tolist() == pytest.approx([1.0, 1.0, 0.29])
    assert set(scale.state_dict()) == {"center", "reach"}


def test_an_unfitted_scale_is_the_identity():
    x = torch.linspace(-1, 1, 6).view(2, 3)
    scale = ActionScale(3)
    assert torch.equal(scale.normalise(x), x) and torch.equal(scale.restore(x), x)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_vla_flow", "policy tiny_vla_flow moves continuous actions; this env's are discrete"),
        ("tiny_vla_tokens", "policy tiny_vla_tokens cuts continuous actions into bins; this env's are discrete"),
    ],
)
def test_discrete_actions_are_refused(name, message):
    with pytest.raises(CapabilityError) as error:
        build(name, action=ActionSpec("discrete", 4))
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["tiny_vla_flow", "tiny_vla_tokens"])
def test_observations_that_the_trunk_cannot_read_are_refused(name):
    with pytest.raises(CapabilityError) as error:
        build(name, observation=OBSERVATION | {"front": TensorSpec((16, 18, 3), torch.uint8, low=0, high=255)})
    assert str(error.value) == (
        "observation 'front' is a picture of 16 x 18 pixels; this policy takes multiples of 4: make the env's pictures 16 x 20"
    )
    with pytest.raises(CapabilityError) as error:
        build(name, observation=OBSERVATION | {"objects": TensorSpec((2, 5))})
    assert str(error.value) == (
        "policy with the tiny VLA trunk cannot read observation 'objects' (torch.float32, shape [2, 5]): it takes RGB "
        "pictures [H, W, 3] uint8, depths [H, W, 1] in metres, vectors, and one row of word ids"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"process": "diffusion", "likelihood": "cfm"}, "likelihood (cfm) belongs to process flow, process is diffusion: choose likelihood sde or latent, or process: flow"),
        ({"process": "diffusion", "likelihood": "learned"}, "likelihood (learned) belongs to process flow, process is diffusion: choose likelihood sde or latent, or process: flow"),
        ({"likelihood": "learned", "min_std": 0.2}, "min_std (0.2) must be below max_std (0.16)"),
        ({"likelihood": "cfm", "noise": 0.3}, "noise (0.3) does nothing with likelihood (cfm): remove it, or set likelihood: sde"),
        ({"likelihood": "latent", "stochastic": "one"}, "stochastic (one) does nothing with likelihood (latent): remove it, or set likelihood: sde or learned"),
        ({"likelihood": "cfm", "start": 0.5}, "start (0.5) does nothing with likelihood (cfm): remove it, or set likelihood: sde or learned"),
        ({"likelihood": "cfm", "min_std": 0.5}, "min_std (0.5) does nothing with likelihood (cfm): remove it, or set likelihood: sde or learned"),
        ({"critic": {"reads": "privileged", "detach": True}}, "detach (true) does nothing with reads (privileged)"),
        ({"samples": 3}, "samples (3) does nothing with likelihood (sde): remove it, or set likelihood: cfm"),
        ({"width": 30, "heads": 4}, "width (30) must be a multiple of heads (4)"),
        ({"critic": {"low": 1.0, "high": 0.0}}, "low (1.0) must be below high (0.0)"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(config, message):
    with pytest.raises(ValueError) as error:
        registry.load("policy", "tiny_vla_flow").Config(**config)
    assert message in str(error.value)


def test_the_floor_of_a_noisy_step_may_be_above_what_learned_noise_allows():
    policy, obs = flow("sde", min_std=0.4), look(1)
    units, logp, _ = decide(policy, obs)
    x, after = units[0, -1, :-1].view(2, C, D).numpy()
    mean, std = transition(policy, obs, x, K - 1)
    assert float(std.max()) == 0.4
    assert float(logp[0, -1]) == pytest.approx(norm.logpdf(after, mean, 0.4).sum(), rel=1e-6)
