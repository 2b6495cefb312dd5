"""Top-p, top-k and temperature of each request, stop texts and forced ends: what is drawn, kept and learned from."""

import pytest
import torch
from scipy.stats import chisquare

from embodied_rl.errors import CapabilityError
from embodied_rl.evaluate import evaluate
from embodied_rl.policies.causal_lm import Config
from embodied_rl.policies.causal_lm.decode import Narrowing, sample
from embodied_rl.types import PAD
from tests.unit.test_causal_lm import contexts, llama, make

__all__ = ["llama"]


def narrowing(*rows):
    """Rows of (temperature, top_k, top_p)."""
    t, k, p = zip(*rows, strict=True)
    return Narrowing(torch.tensor(t), torch.tensor(k), torch.tensor(p))


def test_what_may_be_drawn_by_hand():
    # Probabilities 0.4, 0.1, 0.3, 0.2.
    z = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log().expand(7, 4)
    narrow = narrowing((1.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.7), (1.0, 0, 0.71), (1.0, 0, 0.01), (1.0, 3, 0.75), (0.5, 0, 1.0))
    found = narrow(z.clone(), torch.arange(7))
    kept = [[0, 1, 2, 3], [0, 2], [0, 2], [0, 2, 3], [0], [0, 2], [0, 1, 2, 3]]
    # The sixth: of three, 4/9 and 3/9 and 2/9, so that two make 7/9.
    assert [row.isfinite().nonzero().flatten().tolist() for row in found] == kept
    for i, ids in enumerate(kept[:6]):
        torch.testing.assert_close(found[i, ids], z[i, ids])
    torch.testing.assert_close(found[6].softmax(-1), torch.tensor([0.16, 0.01, 0.09, 0.04]) / 0.3)
    # Each row by its own settings, whichever rows are still there.
    assert torch.equal(narrow(z[:2].clone(), torch.tensor([4, 1])), found[[4, 1]])


def test_of_equals_the_first_are_kept():
    found = narrowing((1.0, 2, 1.0), (1.0, 0, 0.5))(torch.zeros(2, 4), torch.arange(2))
    assert found.isfinite().tolist() == [[True, True, False, False]] * 2


def test_what_is_drawn_has_the_frequencies_and_log_probabilities_of_what_is_kept():
    n = 4000
    z = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log().expand(n, 4)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logp = sample(narrowing(*[(1.0, 3, 0.75)] * n)(z, torch.arange(n)), torch.arange(n), uniform)
    counts = torch.bincount(ids, minlength=4)
    assert counts[[1, 3]].tolist() == [0, 0] and chisquare(counts[[0, 2]].numpy(), [n * 4 / 7, n * 3 / 7]).pvalue > 1e-3
    torch.testing.assert_close(logp, torch.where(ids == 0, 4 / 7, 3 / 7).log())


def test_rows_of_one_call_have_their_own_settings(llama):
    policy, env = make(llama, temperature=1.3)
    obs = contexts(env)
    uniform = torch.rand(12, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain, greedy = policy.write(obs["context"], uniform), policy.write(obs["context"], None)
    rows = narrowing(*[(1.0, 0, 1.0)] * 4, *[(1.0, 1, 1.0)] * 4, *[(1.0, 0, 1e-6)] * 4)
    mixed = policy.write(obs["context"], uniform, narrow=rows)
    assert torch.equal(mixed.units[:4], plain.units[:4]) and torch.equal(mixed.units[4:], greedy.units[4:])
    assert not torch.equal(plain.units[4:], greedy.units[4:])
    hot = policy.write(obs["context"], uniform, narrow=narrowing(*[(0.5, 0, 1.0)] * 12))
    cold, _ = make(llama, temperature=0.65)
    assert torch.equal(hot.units, cold.write(obs["context"], uniform).units)


def evaluation_takes_the_likeliest(policy, obs) -> None:
    """While it is evaluated, and only then, a policy with evaluation: {top_k: 1} writes what greedy play does."""

    def written():
        return policy.act(obs, generator=torch.Generator().manual_seed(1)).units

    sampled, greedy = written(), policy.act(obs, generator=None, greedy=True).units
    policy.evaluating(True)
    assert torch.equal(written(), greedy) and not torch.equal(sampled, greedy)
    policy.evaluating(False)
    assert torch.equal(written(), sampled)


def test_evaluation_samples_as_it_is_told_and_training_as_before(llama):
    policy, env = make(llama, evaluation={"top_k": 1}, temperature=1.5)
    evaluation_takes_the_likeliest(policy, contexts(env))
    evaluate(policy, env, episodes=2, run_seed=0, greedy=False, generator=torch.Generator().manual_seed(0))
    assert policy._evaluating is False


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_log_probabilities_at_sampling_are_those_of_training_under_any_temperature(llama, temperature):
    policy, env = make(llama, temperature=temperature, logp="decoder")
    obs = contexts(env)
    out = policy.act(obs, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(out.logp, policy.evaluate(obs, out.units).logp.detach(), rtol=1e-5, atol=2e-5)


def test_truncated_training_is_refused_with_the_reason(llama):
    with pytest.raises(ValueError, match=r"top_p \(0.9\) would sample training replies from a part of the distribution.*set evaluation.top_p"):
        Config(model=str(llama), top_p=0.9)


def test_a_reply_ends_with_a_stop_text_and_keeps_it(llama):
    policy, env = make(llama, length=24, stop=("7", "ab"))
    plain, _ = make(llama, length=24)
    obs = contexts(env)
    units, whole = (p.act(obs, generator=torch.Generator().manual_seed(4)).units for p in (policy, plain))
    tokenizer, stopped = policy.generator.tokenizer, 0
    for row, reference in zip(units.tolist(), whole.tolist(), strict=True):
        ids = [i for i in row if i != PAD]
        assert ids == reference[: len(ids)], "nobody else's reply, nor what comes before, is changed"
        told = tokenizer.decode(ids, skip_special_tokens=True)
        before = tokenizer.decode(ids[:-1], skip_special_tokens=True)
        assert "7" not in before and "ab" not in before
        if told.endswith(("7", "ab")):
            stopped += 1
            assert len(ids) <= len([i for i in reference if i != PAD])
        else:
            assert ids == [i for i in reference if i != PAD]
    assert 2 <= stopped


def test_a_forced_end_is_in_no_loss(llama):
    policy, env = make(llama, length=5, force_end=True)
    plain, _ = make(llama, length=5)
    obs = contexts(env)
    out, free = (p.act(obs, generator=torch.Generator().manual_seed(4)) for p in (policy, plain))
    full = (free.units != PAD).all(1)
    assert bool(full.any()) and bool((out.units[full, -1] == policy.end[0]).all())
    assert torch.equal(out.units[:, :-1], free.units[:, :-1]) and torch.equal(out.mask[:, :-1], free.mask[:, :-1])
    assert not bool(out.mask[:, -1].any()) and torch.equal(out.action[:, 0], out.units)
    assert torch.equal(out.logp[out.mask], free.logp[out.mask])


def test_settings_that_nothing_uses_are_refused(llama):
    from embodied_rl.config import build_recipe
    from embodied_rl.session import Session
    from tests.toys import echo

    recipe = {
        "env": {"type": echo.__file__, "model": str(llama)}, "policy": {"type": "causal_lm", "model": str(llama), "evaluation": {"top_p": 0.9}},
        "algorithm": {"type": "grpo"}, "collect": {"mode": "episodes", "group_size": 2, "copies": 2, "decisions": 1}, "log": {"tensorboard": False},
    }  # fmt: skip
    with pytest.raises(CapabilityError, match="set evaluate.greedy: false, or remove policy.evaluation"):
        Session.build(build_recipe(recipe))
    Session.build(build_recipe(recipe | {"evaluate": {"greedy": False}})).close()
