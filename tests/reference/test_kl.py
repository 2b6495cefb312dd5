"""KL estimators against the exact divergence of two categorical distributions, all outcomes enumerated."""

import pytest
import torch

from embodied_rl import loss
from embodied_rl.loss import Kl, Loss, LossFunction, ValueLoss
from tests.kit import batch_of, evaluation_of, number

F64 = torch.float64
P_LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1, -0.4], dtype=F64)
Q_LOGITS = torch.tensor([-0.5, 0.4, 1.1, -0.9, 0.2], dtype=F64)


def exact_kl(p_logits, q_logits):
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return (p.exp() * (p - q)).sum()


def expectation(kind, p_logits=P_LOGITS, q_logits=Q_LOGITS):
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return float((p.exp() * loss.kl_estimate(p - q, kind)).sum())


def test_k1_and_k3_estimate_the_kl_without_bias():
    exact = float(exact_kl(P_LOGITS, Q_LOGITS))
    assert expectation("k1") == pytest.approx(exact, rel=1e-12)
    assert expectation("k3") == pytest.approx(exact, rel=1e-12)


def test_k2_is_biased_but_right_to_second_order():
    for step in (0.1, 0.05, 0.025):
        q = P_LOGITS + step * Q_LOGITS
        exact = float(exact_kl(P_LOGITS, q))
        assert expectation("k2", P_LOGITS, q) == pytest.approx(exact, rel=step)
    assert expectation("k2") != pytest.approx(float(exact_kl(P_LOGITS, Q_LOGITS)), rel=0.01)


def test_values_of_the_estimators_by_hand():
    d = torch.tensor([0.0, 1.0, -1.0], dtype=F64)
    assert loss.kl_estimate(d, "k1").tolist() == [0.0, 1.0, -1.0]
    assert loss.kl_estimate(d, "k2").tolist() == [0.0, 0.5, 0.5]
    # exp(-1) + 1 - 1 = 0.36788, exp(1) - 1 - 1 = 0.71828
    assert loss.kl_estimate(d, "k3").tolist() == pytest.approx([0.0, 0.36787944117144233, 0.7182818284590451])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_k3_is_never_negative_not_even_by_rounding(dtype):
    d = torch.logspace(-12, 1.5, 20_000, dtype=F64).to(dtype)
    for sign in (1, -1):
        assert float(loss.kl_estimate(sign * d, "k3").min()) >= 0


def expected_gradient(kind):
    """Gradient of the expected penalty: outcomes weighted by their probability, as infinitely many samples would be."""
    theta = P_LOGITS.clone().requires_grad_()
    # k1 is refused as a penalty by the config, so its gradient is taken from the estimator itself.
    logp, ref = torch.log_softmax(theta, -1), torch.log_softmax(Q_LOGITS, -1)
    weight = logp.detach().exp().unsqueeze(-1)
    if kind == "k1":
        (loss.kl_estimate(logp - ref, kind) * weight.squeeze(-1)).sum().backward()
        return theta.grad
    function = LossFunction(Loss(kl=Kl(kind=kind, coef=1.0), value=ValueLoss(coef=0.0)), 1)
    batch = batch_of(
        logp.detach().unsqueeze(-1), function, logp_ref=ref.unsqueeze(-1), advantage=torch.zeros(5, dtype=F64), weight=weight
    )
    function(evaluation_of(logp.unsqueeze(-1)), batch).total.backward()
    return theta.grad


def exact_gradient(forward):
    theta = P_LOGITS.clone().requires_grad_()
    (exact_kl(Q_LOGITS, theta) if forward else exact_kl(theta, Q_LOGITS)).backward()
    return theta.grad


def test_a_k1_penalty_has_no_gradient_in_expectation_and_is_refused():
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(5, dtype=F64), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="zero expected gradient"):
        Kl(kind="k1", coef=0.1)


def test_a_k2_penalty_has_the_gradient_of_the_reverse_kl():
    torch.testing.assert_close(expected_gradient("k2"), exact_gradient(forward=False), rtol=0, atol=1e-12)


def test_a_k3_penalty_has_the_gradient_of_the_forward_kl():
    torch.testing.assert_close(expected_gradient("k3"), exact_gradient(forward=True), rtol=0, atol=1e-12)


def test_the_reported_kl_is_from_the_old_to_the_new_policy():
    function = LossFunction(Loss(), 1)
    old, new = torch.log_softmax(P_LOGITS, -1).unsqueeze(-1), torch.log_softmax(Q_LOGITS, -1).unsqueeze(-1)
    result = function(evaluation_of(new), batch_of(old, function, weight=old.exp()), diagnose=True)
    exact = float(exact_kl(P_LOGITS, Q_LOGITS))
    for key in ("actor/kl_k1", "actor/kl_k3"):
        total, count = result.metrics[key]
        assert number(total) / float(count) == pytest.approx(exact, rel=1e-12), key
    assert float(result.kl) == pytest.approx(exact, rel=1e-12)


def test_the_kl_of_a_decision_is_the_kl_of_the_joint_distribution():
    # Two independent units with the same pair of distributions: all 25 outcomes, KL doubles.
    p, q = torch.log_softmax(P_LOGITS, -1), torch.log_softmax(Q_LOGITS, -1)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    function = LossFunction(Loss(kl=Kl(kind="k3", coef=1.0)), 1)
    weight = p[pairs].sum(-1, keepdim=True).exp()
    batch = batch_of(p[pairs], function, logp_ref=q[pairs], advantage=torch.zeros(25, dtype=F64), weight=weight)
    result = function(evaluation_of(p[pairs]), batch, diagnose=True)
    assert number(result.total) == pytest.approx(2 * float(exact_kl(P_LOGITS, Q_LOGITS)), rel=1e-12)
    total, count = result.metrics["actor/kl_to_reference"]
    assert number(total) / float(count) == pytest.approx(2 * float(exact_kl(P_LOGITS, Q_LOGITS)), rel=1e-12)
