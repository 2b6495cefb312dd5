"""The language model policy in whole runs: the ratio that training begins with, a critic of tokens, and vLLM's gap."""

from __future__ import annotations

import math
import os
from contextlib import closing

import pytest
import torch

from embodied_rl.config import load_recipe
from embodied_rl.loss import LossFunction
from embodied_rl.measure import Clock
from embodied_rl.metrics import find
from embodied_rl.session import Session
from tests.kit import TOYS
from tests.toys.tiny_lm import tiny_lm
from tests.unit.test_causal_lm_vllm import STAND_IN, interpreter

FEW = "0123:userasitn\n"
"""Characters of a model that may well answer right by chance."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_lm(tmp_path_factory.mktemp("models") / "tiny", characters=FEW, hidden=32))


def build(folder, model, extends, *changes):
    """A session of a method on the repeating of digits, 16 replies of at most 6 tokens per update."""
    path = folder / "recipe.yaml"
    path.write_text(
        f"extends: [{extends}.yaml]\nthreads: 1\ndevice: cpu\nenv: {{type: {TOYS}/echo.py, model: {model}, digits: '01', length: 6}}\n"
        f"policy: {{type: causal_lm, model: {model}}}\ncollect: {{mode: episodes, copies: 16, decisions: 1}}\n"
        "log: {tensorboard: false, progress: false}\n"
    )
    return closing(Session.build(load_recipe(path, list(changes)).recipe))


def update_seen(session):
    """One iteration: rollout, advantage, what `evaluate` said of the replies before the update, and the metrics."""
    seen, plain = [], session.updater.update

    def update(rollout, advantage, **how):
        with torch.no_grad():
            seen.extend([rollout, advantage, session.policy.evaluate(asked(rollout), rollout.units[0], entropy=False)])
        return plain(rollout, advantage, **how)

    session.updater.update = update
    row = session.iterate(Clock()).reduce()
    session.updater.update = plain
    return *seen, row


def asked(rollout):
    return {"context": rollout.constants["context"][rollout.episode[0]]}


@pytest.mark.parametrize("logp", ["evaluate", "decoder"])
def test_the_first_ratio_is_1_and_exactly_so_where_the_step_recomputes(logp, model, tmp_path):
    def first(*update):
        """Metrics of three optimizer steps (or one) that leave the weights where they are: every ratio is a first one."""
        changes = [f"policy.logp={logp}", f"algorithm.update={{{', '.join(['lr: 1e-30', 'epochs: 1', 'micro_units: 20', *update])}}}"]
        with build(tmp_path, model, "method/grpo", *changes) as s:
            with torch.no_grad():
                for p in s.policy.parameters():
                    p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
            row = s.iterate(Clock()).reduce()
        # Both extremes: a ratio below 1 counts in k3 as one above.
        assert abs(row["actor/ratio_max"] - 1) < 1e-5 and abs(row["actor/kl_k3"]) < 1e-10 and row["sync/logp_gap_mean"] < 1e-5
        return row

    first("minibatches: 3")
    mend = "logp_gap: {do: recompute, above: 0.0}"
    first("minibatches: 3", mend)
    exact = first("minibatches: 1", mend)
    assert exact["actor/ratio_max"] == 1 and exact["actor/kl_k3"] == 0


def test_a_critic_of_every_token_learns_in_a_run(model, tmp_path):
    update = "algorithm.update={epochs: 4, lr: 1e-4, critic_lr: 0.02}"
    changes = ["policy.critic.kind=scalar", "collect.copies=64", update]
    with build(tmp_path, model, "method/ppo_units", *changes) as s:
        assert not s.policy.critic.weight.any()
        rollout, advantage, before, row = update_seen(s)
        counts = rollout.mask[0]
        assert advantage.advantage.shape == rollout.mask.shape and (counts.sum(1) > 1).any()
        several = advantage.advantage[0][(counts.sum(1) > 1) & (rollout.reward[0] > 0)]
        assert len(several) and (several[:, 0] != several[:, 1]).all(), "tokens of one reply have advantages of their own"
        assert (before.value == 0).all() and s.policy.critic.weight.any()
        with torch.no_grad():
            after = s.policy.evaluate(asked(rollout), rollout.units[0], entropy=False).value
        far = [float((value - advantage.target[0])[counts].square().mean()) for value in (before.value, after)]
        assert far[1] < 0.95 * far[0], far
        # Read by the next rollout, and found by its name in the table of metrics.
        assert row["critic/value_mean"] == 0 != s.iterate(Clock()).reduce()["critic/value_mean"]


@pytest.mark.vllm
def test_updates_with_vllm_itself_log_its_gap_and_correct_it(tmp_path):
    """Its kernels round otherwise than torch's, and weights go there between the iterations."""
    python = os.environ.get("EMBODIED_RL_VLLM_PYTHON")
    if not python:
        pytest.skip("set EMBODIED_RL_VLLM_PYTHON to the Python of an environment that has vLLM")
    wide = str(tiny_lm(tmp_path / "wide", characters=FEW, hidden=256))  # vLLM's attention on a CPU has no heads of 16
    changes = [
        "algorithm.update={epochs: 1, minibatches: 1, lr: 1e-3, logp_gap: {do: correct, above: 0.0}}", "policy.logp=decoder",
        f"policy.generator={{kind: vllm, python: {python}}}",
    ]  # fmt: skip
    with build(tmp_path, wide, "method/grpo", *changes) as s:
        before = [p.detach().clone() for p in s.policy.parameters()]
        rows = [s.iterate(Clock()).reduce() for _ in range(3)]
        s.policy.generator.close()
    assert any((p != q).any() for p, q in zip(s.policy.parameters(), before, strict=True))
    gaps = [row["sync/logp_gap_mean"] for row in rows]
    assert all(0 < gap < 1e-3 for gap in gaps), f"stale weights would be further off: {gaps}"
    assert [row["sync/logp_mended_rate"] for row in rows] == [1, 1, 1]


def test_vllms_gap_is_logged_and_corrected_by_capped_weights(model, tmp_path, monkeypatch):
    python = interpreter(tmp_path / "env")
    package = tmp_path / "env" / "packages" / "vllm" / "__init__.py"
    package.write_text(STAND_IN.read_text().replace("truncated(z /", "truncated(0.8 * z /"))  # its logits are a little off
    batches, plain = [], LossFunction.__call__
    monkeypatch.setattr(LossFunction, "__call__", lambda loss, e, batch, **how: batches.append(batch) or plain(loss, e, batch, **how))
    changes = [
        "algorithm.update={epochs: 1, minibatches: 1, logp_gap: {do: correct, above: 0.01, cap: 1.1}}", "policy.logp=decoder",
        f"policy.generator={{kind: vllm, python: {python}}}",
    ]  # fmt: skip
    with build(tmp_path, model, "method/grpo", *changes) as s:
        with torch.no_grad():
            for p in s.policy.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        rollout, _, judged, row = update_seen(s)
        s.policy.generator.close()
    mask, (batch,) = rollout.mask[0], batches
    log_ratio = (judged.logp - rollout.logp[0])[mask]
    assert row["sync/logp_gap_mean"] == pytest.approx(float(log_ratio.abs().mean()), rel=1e-3) and row["sync/logp_gap_mean"] > 0.01
    capped = float((log_ratio > math.log(1.1)).double().mean())
    assert row["sync/correction_capped_rate"] == pytest.approx(capped) and 0 < capped < 1
    assert row["sync/logp_mended_rate"] == 1 and all(find(key) for key in row)
    weights = batch.correction[batch.mask]
    torch.testing.assert_close(weights.sort().values, log_ratio.exp().clamp(max=1.1).sort().values, rtol=1e-4, atol=1e-5)
    assert float(weights.max()) == pytest.approx(1.1) and float(weights.min()) < 1
