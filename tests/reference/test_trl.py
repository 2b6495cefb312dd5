"""The same log-probabilities and advantages through TRL's GRPOTrainer, where it is installed: losses and gradients.

TRL's own `_compute_loss` runs, on a trainer that has everything but a model: its log-probabilities are given. What
differs on purpose is not the loss: TRL divides advantages by (std + 1e-4), here the divisor is max(std, floor).
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from embodied_rl.loss import Loss, LossFunction
from embodied_rl.types import Evaluation
from embodied_rl.value_loss import ValueLoss
from tests.kit import batch_of, number

pytestmark = pytest.mark.trl
F64 = torch.float64
ROWS, LENGTH = 8, 6


@pytest.fixture(scope="module")
def grpo_trainer():
    return pytest.importorskip("trl").GRPOTrainer


def inputs(seed):
    """Current, old and reference log-probabilities [N, A], mask and advantages; ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(ROWS, LENGTH, generator=g, dtype=F64)
    new, ref = (old + 0.3 * torch.randn(ROWS, LENGTH, generator=g, dtype=F64) for _ in range(2))
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=g)
    return new, old, ref, torch.arange(LENGTH) < lengths, torch.randn(ROWS, generator=g, dtype=F64)


def theirs(trainer, seed, *, loss_type, level, low, high, beta):
    """Loss and gradient by the current log-probabilities, by TRL's code."""
    new, old, ref, mask, advantage = inputs(seed)
    new.requires_grad_()
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction=None: x, sync_gradients=True)
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(old), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level,
        beta=beta, loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False, max_completion_length=LENGTH,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), accelerator=accelerator,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    given = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.to(F64), "advantages": advantage,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(fake, None, given)
    loss.backward()
    return number(loss), new.grad


def ours(seed, **switches):
    new, old, ref, mask, advantage = inputs(seed)
    function = LossFunction(Loss(**({"ratio": "unit", "value": ValueLoss(coef=0.0)} | switches)), chunk=1)
    batch = batch_of(old, function, mask=mask, advantage=advantage, logp_ref=ref)
    new.requires_grad_()
    total = function(Evaluation(new), batch).total
    total.backward()
    return number(total), new.grad


def both(trainer, seed, switches, *, loss_type, level="token", low=0.2, high=0.2, beta=0.0):
    kl = {"kl": {"kind": "k3", "coef": beta}} if beta else {}
    own = ours(seed, clip_low=low, clip_high=high, **kl, **switches)
    return own, theirs(trainer, seed, loss_type=loss_type, level=level, low=low, high=high, beta=beta)


CASES = {
    "grpo": ({"aggregate": "trajectory_mean"}, {"loss_type": "grpo"}),
    "grpo with a KL penalty": ({"aggregate": "trajectory_mean"}, {"loss_type": "grpo", "beta": 0.1}),
    "dr_grpo": ({"aggregate": "constant", "constant_units": LENGTH}, {"loss_type": "dr_grpo"}),
    "dapo": ({"aggregate": "unit_mean"}, {"loss_type": "dapo", "high": 0.28}),
    "dapo with a KL penalty": ({"aggregate": "unit_mean"}, {"loss_type": "dapo", "high": 0.28, "beta": 0.1}),
    "gspo": (
        {"aggregate": "trajectory_mean", "ratio": "trajectory", "reduce": "mean"},
        {"loss_type": "grpo", "level": "sequence", "low": 0.03, "high": 0.04},
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_trl(grpo_trainer, case, seed):
    (loss, grad), (their_loss, their_grad) = both(grpo_trainer, seed, CASES[case][0], **CASES[case][1])
    assert loss == pytest.approx(their_loss, abs=1e-5)
    torch.testing.assert_close(grad, their_grad, rtol=1e-5, atol=1e-6)
    if "KL" not in case:
        assert (grad[inputs(seed)[3]] == 0).any(), "no cell was clipped"


@pytest.mark.parametrize("seed", range(3))
def test_cispo_has_the_gradient_of_trl_and_another_value(grpo_trainer, seed):
    # TRL's value is that of -w A log pi, ours of -w A: a constant apart as far as the gradient goes. TRL's epsilon_high
    # is the largest ratio itself, ours its distance from 1.
    own = ours(seed, trust="weight", clip_low=1.0, clip_high=0.3, aggregate="unit_mean")
    their = theirs(grpo_trainer, seed, loss_type="cispo", level="token", low=0.2, high=1.3, beta=0.0)
    torch.testing.assert_close(own[1], their[1], rtol=1e-5, atol=1e-6)
