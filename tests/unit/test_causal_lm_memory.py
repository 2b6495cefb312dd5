"""Where memory runs out while replies are written or judged: batches are halved, and the result is the same."""

import pytest
import torch

from embodied_rl.errors import UserError
from embodied_rl.policies.causal_lm import decode
from embodied_rl.policies.causal_lm.generator import in_batches
from embodied_rl.policies.causal_lm.product import product
from tests.unit.test_causal_lm import contexts, llama, make

__all__ = ["llama"]


def test_where_memory_runs_out_the_batch_is_halved(caplog):
    asked = []

    def write(rows: slice) -> decode.Written:
        asked.append((rows.start, rows.stop))
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        x = torch.arange(rows.start, rows.stop)[:, None]
        return decode.Written(x, x.float(), None)

    assert in_batches(write, 10, None).units.flatten().tolist() == list(range(10))
    assert asked == [(0, 10), (0, 5), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert "set policy.rows: 2" in caplog.text

    def never(rows: slice) -> decode.Written:
        return decode.Written(torch.empty(2**50), torch.empty(0), None)  # what a CPU itself says when it has no memory

    with pytest.raises(UserError, match="not enough memory to write a single reply: lower the env's max_context"):
        in_batches(never, 4, None)
    assert "not enough memory to write 2 replies at once: going on with 1" in caplog.text
    with pytest.raises(RuntimeError, match="a bug"):
        in_batches(lambda rows: (_ for _ in ()).throw(RuntimeError("a bug")), 4, None)


def test_weights_are_not_arranged_where_there_is_no_memory_for_a_copy(monkeypatch):
    weight, x = torch.randn(4, 3), torch.randn(2, 3)
    called = []

    def reorder(weight, rows):
        called.append(rows)
        raise RuntimeError(called_with)

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", reorder)
    called_with = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    torch.testing.assert_close(product(weight, None, 2)(x), x @ weight.T)
    called_with = "a bug"
    with pytest.raises(RuntimeError, match="a bug"):
        product(weight, None, 2)
    assert called == [2, 2]


def test_replies_are_judged_in_batches_as_they_are_written(llama, monkeypatch, caplog):
    policy, env = make(llama, critic={"kind": "scalar"})
    obs, asked, plain = contexts(env), [], policy.evaluate
    whole = policy.act(obs, generator=torch.Generator().manual_seed(0))

    def evaluate(some, units, **how):
        asked.append(len(units))
        return plain(some, units, **how) if len(units) <= 5 else torch.empty(2**50)

    monkeypatch.setattr(policy, "evaluate", evaluate)
    halved = policy.act(obs, generator=torch.Generator().manual_seed(0))
    assert asked == [12, 6, 3, 3, 3, 3] and "set policy.rows: 3 to begin with that" in caplog.text
    policy.config = policy.config.model_copy(update={"rows": 5})
    bounded = policy.act(obs, generator=torch.Generator().manual_seed(0))
    assert asked[6:] == [5, 5, 2]
    for out in (halved, bounded):
        assert torch.equal(out.units, whole.units)
        torch.testing.assert_close(out.logp, whole.logp, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(out.value, whole.value, atol=1e-4, rtol=1e-4)
