"""A tiny language model learns to repeat a question, from scratch, through the whole engine."""

import statistics

import pytest
import torch

from embodied_rl.policies import causal_lm
from tests.kit import algorithm, wire
from tests.toys import echo
from tests.toys.tiny_lm import tiny_lm

pytestmark = pytest.mark.learning
CPU = torch.device("cpu")
UPDATE = {"epochs": 1, "minibatches": 1, "lr": 3e-3, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_lm(tmp_path_factory.mktemp("lm") / "tiny", characters="0123:userasitn\n"))


def run_of(model, seed, update=None, **policy):
    config = echo.Config(model=model, digits="01", question=2, length=3)
    envs = [echo.Echo(config, 64, CPU)]
    torch.manual_seed(seed)
    net = causal_lm.build(causal_lm.Config(model=model, **policy), env=envs[0].spec, device=CPU)
    method = algorithm("grpo", loss={"ratio": "unit"}, update=UPDATE | (update or {}))
    return wire(envs, net, method, decisions=1, seed=seed, mode="episodes", group_size=8)


@pytest.mark.parametrize(
    ("policy", "update"),
    [
        ({"logp": "decoder"}, {"micro_units": 50, "logp_gap": {"do": "recompute", "above": 0.0}}),
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16", "temperature": 1.2, "checkpoint_gradients": True}, {}, marks=pytest.mark.slow),
    ],
)
def test_two_digits_are_repeated_in_their_order(model, policy, update):
    # Observed: 0.26, 0.68, 0.98 (float32, both ways), 0.92, 0.65, 0.98 (bfloat16); an untrained model scores 0.
    scores = []
    for seed in (0, 1, 2):
        run = run_of(model, seed, update, **policy)
        last = []
        for _ in range(60):
            rollout, _ = run.iterate()
            last.append(float(rollout.finished["success_at_end"].double().mean()))
        scores.append(statistics.mean(last[-10:]))
    assert statistics.median(scores) >= 0.5, scores
