"""One ratio over the K denoising steps of a decision, as their product and as their geometric mean, by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from embodied_rl.loss import Loss, LossFunction
from tests.kit import batch_of, evaluation_of, number
from tests.reference.test_vla_policies import F64, C, D, K, decide, flow, generator, look, row, transition

N = 4


def log_ratios(old, new, obs, units):
    """[N, K] of each step's Gaussian."""
    out = np.zeros((N, K))
    for i in range(N):
        for k in range(K):
            x, after = units[i, k, :-1].view(2, C, D).numpy()
            a, b = (norm.logpdf(after, *transition(p, row(obs, i), x, k)).sum() for p in (old, new))
            out[i, k] = b - a
    return out


@pytest.mark.parametrize("case", ["sde", "learned", "diffusion"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_mean_over_the_steps_allows_k_times_the_log_ratio_of_the_chain(case, reduce):
    old, new, obs = flow(case), flow(case), look(N)
    with torch.no_grad():
        for p in new.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=generator(7), dtype=F64)
    units, before, _ = decide(old, obs)
    given, step = new.evaluate(obs, units).logp.detach(), log_ratios(old, new, obs, units)
    for i in range(N):
        # Each chain went where its advantage wants it, further than the clip allows it and less than K times as far.
        joint = step[i].sum()
        limit, sign = abs(joint) * (1 + 1 / K) / 2, float(np.sign(joint))
        function = LossFunction(
            Loss(ratio="decision", reduce=reduce, clip_low=-math.expm1(-limit), clip_high=math.expm1(limit)), chunk=1
        )
        logp = given[i : i + 1].clone().requires_grad_()
        batch = batch_of(before[i : i + 1], function, advantage=torch.tensor([sign], dtype=F64))
        result = function(evaluation_of(logp), batch, diagnose=True)
        result.total.backward()
        if reduce == "sum":
            expected, slope = sign * math.exp(sign * limit), 0.0
        else:
            expected = sign * math.prod(math.exp(r) for r in step[i]) ** (1 / K)
            slope = -expected / K
        assert number(result.total) == pytest.approx(-expected, rel=1e-5)
        assert number(result.metrics["actor/clip_fraction"][0]) == (reduce == "sum")
        np.testing.assert_allclose(logp.grad.numpy(), np.full((1, K), slope), rtol=1e-5)
