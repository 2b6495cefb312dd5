"""Every method that asks something of the env, with the text env and the language model: each part does its work."""

import math

import pytest
import torch

from embodied_rl.config import load_recipe
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from tests.toys.tiny_lm import tiny_lm

METHODS = {
    # name: what lies below, changes, metrics that must be there, of which some must be above 0
    "ghpo": (["method/grpo.yaml"], [], ["rollout/hinted_groups"]),
    "ttrl": ([], [], ["rollout/majority_share"]),
    "evol_rl": ([], [], ["rollout/majority_share", "rollout/progress_reward_mean"]),
    "spear": ([], ["algorithm.replay.ramp=0", "algorithm.replay.quantile=0.1", "env.overlong=5"], ["rollout/replayed_decisions", "actor/replay_loss"]),
    "rl_plus": ([], [], ["rollout/demonstrated_starts", "actor/demonstration_logp"]),
    "relift": ([], ["algorithm.update.micro_units=8"], ["rollout/demonstrated_starts", "actor/demonstration_logp"]),
    "knapsack": (["method/grpo.yaml"], ["collect.curriculum.starts=4"], ["rollout/group_size_max", "rollout/start_success_mean"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("models") / "tiny", hidden=32)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_works_on_text(name, model, tmp_path):
    below, changes, wanted = METHODS[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"extends: [{', '.join([*below, f'method/{name}.yaml'])}]\nthreads: 1\ndevice: cpu\n"
        f"env: {{type: text, model: {model}, max_context: 120, max_reply: 6, tasks: [{{task: arithmetic, digits: [1, 1]}}]}}\n"
        f"policy: {{type: causal_lm, model: {model}}}\ncollect: {{copies: 8, decisions: 1, group_size: 4}}\n"
        "algorithm: {update: {epochs: 1, minibatches: 1, lr: 1.0e-2}}\nlog: {tensorboard: false, progress: false}\n"
    )
    session = Session.build(load_recipe(path, changes).recipe)
    before = [p.detach().clone() for p in session.policy.parameters()]
    seen: dict[str, float] = {}
    for _ in range(3):
        row = session.iterate(Clock()).reduce()
        assert all(math.isfinite(v) for v in row.values()), row
        seen |= {k: v for k, v in row.items() if k not in seen or v != 0}
    for metric in wanted:
        assert seen.get(metric, 0.0) != 0.0, (metric, seen)
    moved = any(not torch.equal(a, b) for a, b in zip(before, session.policy.parameters(), strict=True))
    assert moved or name in ("ghpo", "knapsack"), "a random model may never succeed there"
    session.close()


def test_a_text_run_with_replay_goes_on_bit_for_bit(model, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "extends: [method/spear.yaml]\nthreads: 1\ndevice: cpu\n"
        f"env: {{type: text, model: {model}, max_context: 120, max_reply: 6, overlong: 5, tasks: [{{task: arithmetic, digits: [1, 1]}}]}}\n"
        f"policy: {{type: causal_lm, model: {model}}}\ncollect: {{copies: 8, decisions: 1, group_size: 4}}\n"
        "algorithm: {update: {epochs: 1, minibatches: 1, lr: 1.0e-2}, replay: {ramp: 0, quantile: 0.1}}\nlog: {tensorboard: false, progress: false}\n"
    )
    recipe = load_recipe(path, []).recipe
    whole, other = Session.build(recipe), Session.build(recipe)
    for _ in range(2):
        whole.iterate(Clock())
    other.load_state_dict(whole.state_dict(), "memory")
    for _ in range(2):
        a, b = (s.iterate(Clock()).reduce() for s in (whole, other))
        same = [k for k in a if not k.startswith(("time/", "perf/"))]
        assert {k: a[k] for k in same} == {k: b[k] for k in same} and a["rollout/replayed_decisions"] > 0
    assert all(torch.equal(x, y) for x, y in zip(whole.policy.parameters(), other.policy.parameters(), strict=True))
    whole.close(), other.close()
