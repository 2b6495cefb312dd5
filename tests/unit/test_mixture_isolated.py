"""A mixture of which one part lives in other processes: its contract, what it says, and what a lost worker costs."""

import json
import tempfile

import pytest
import torch

from embodied_rl.check import check_env_factory
from embodied_rl.collect import Collector
from embodied_rl.config import build_recipe
from embodied_rl.envs.mixture import Config, build
from embodied_rl.execute import execute
from embodied_rl.measure import rollout_metrics
from embodied_rl.offers import Restarting, Sparing, Speaking
from embodied_rl.train import run
from tests.kit import CPU, TOYS, Scripted

POINT = TOYS / "foreign" / "point.py"
LEFT, RIGHT, TARGET = 0, 1, 2
"""Tasks of the mixture."""


@pytest.fixture
def make(bare_python, tmp_path, monkeypatch):
    """Build mixtures of the isolated toy simulator and the target; they are closed after the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # logs of lost workers are kept
    made = []

    def build_it(num_envs=4, copies=(None, None), workers=2, trouble=None, **settings):
        there = {"type": "isolated", "simulator": str(POINT), "python": bare_python, "workers": workers}
        there["settings"] = {"bare": True, "trouble": trouble or {}, **settings}
        parts = [
            {"name": "point", "env": there, "action": [1], "copies": copies[0]},
            {"env": {"type": "target"}, "rename": {"state": "wanted", "picture": "shot"}, "copies": copies[1]},
        ]
        config = Config.model_validate_json(json.dumps({"missing": "zeros", "parts": parts}))
        made.append(build(config, num_envs=num_envs, device=CPU, split="train", seed=0))
        return made[-1]

    yield build_it
    for env in made:
        env.close()


def start(env, tasks, mask=None):
    n = env.spec.num_envs
    mask = torch.ones(n, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return env.reset(mask, torch.arange(n) * 2 + 10, torch.tensor(tasks))


def push(env, active=None):
    return env.step(torch.full((env.spec.num_envs, 2), 0.5), None if active is None else torch.tensor(active))


@pytest.mark.parametrize("copies", [(None, None), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_the_contract_of_an_env_holds_with_a_part_that_shows_itself_on_demand(make, copies):
    findings = check_env_factory(lambda b, **_: make(b, copies, on_demand=True, speaks=True), copies=4, steps=12)
    assert [f"{f.name}: {f.detail}" for f in findings if f.ok is False] == []
    assert sum(f.ok is True for f in findings) > 10


def test_copies_are_told_what_their_part_tells_and_elsewhere_their_task(make):
    env = make(speaks=True)
    start(env, [LEFT, TARGET, RIGHT, TARGET])
    assert isinstance(env, Speaking)
    assert env.instructions() == ["go left", "target.target", "go right", "target.target"]
    state = env.get_state()
    start(env, [TARGET, RIGHT, LEFT, LEFT], mask=[True, True, False, False])
    assert env.instructions() == ["target.target", "go right", "go right", "target.target"]
    env.set_state(state)
    assert env.instructions() == ["go left", "target.target", "go right", "target.target"]
    own = make(copies=(1, 3), speaks=True)
    start(own, [RIGHT, TARGET, TARGET, TARGET])
    assert own.instructions() == ["go right", *["target.target"] * 3]
    assert not isinstance(make(), Speaking)


@pytest.mark.parametrize(("copies", "tasks", "spared"), [((None, None), [LEFT, TARGET, LEFT, TARGET], 2), ((2, 2), [LEFT, LEFT, TARGET, TARGET], 1)])
def test_what_is_spared_is_passed_on_to_the_part_that_plays_it(make, copies, tasks, spared):
    env = make(copies=copies, on_demand=True)
    start(env, tasks)
    before = env.observe()["state"][:, 1]
    push(env)
    assert isinstance(env, Sparing)
    env.spare(torch.arange(4) == spared)
    after = env.observe()["state"][:, 1]
    assert before.tolist() == [0] * 4 and after.tolist() == pytest.approx([0.05 * (t == LEFT and i != spared) for i, t in enumerate(tasks)])


@pytest.mark.parametrize("on_demand", [False, True])
def test_a_worker_that_dies_voids_its_own_copies_episode_alone(make, tmp_path, on_demand):
    trouble = {"what": "die", "at": 2, "seed": 10, "once": str(tmp_path / "flag")}
    env = make(trouble=trouble, on_demand=on_demand)  # one process has copies 0 and 1, the other 2 and 3
    start(env, [LEFT, TARGET, LEFT, TARGET])
    first = push(env)
    before = env.observe()
    second = push(env)
    assert not first.invalid.any() and not (first.terminated | first.truncated).any()
    assert second.invalid.tolist() == second.truncated.tolist() == [True, False, False, False]
    assert not second.terminated.any() and second.reward[0] == 0 and second.reward[2] != 0
    seen = env.observe()
    assert torch.equal(seen["state"][0], before["state"][0]), "what was seen last"
    assert torch.allclose(seen["state"][:, 1], torch.tensor([0.05, 0.0, 0.1, 0.0]))
    # The others go on, and the lost copy's next episode is whole, also in the new process.
    assert not push(env, [False, True, True, True]).invalid.any()
    start(env, [RIGHT, TARGET, LEFT, TARGET], mask=[True, False, False, False])
    again = push(env)
    assert not again.invalid.any() and torch.allclose(env.observe()["state"][:, 1], torch.tensor([0.05, 0.0, 0.2, 0.0]))
    assert isinstance(env, Restarting) and env.restarts == 1


def test_what_was_lost_in_a_chunk_is_passed_on_and_counted_by_the_collector(make, tmp_path):
    trouble = {"what": "die", "at": 2, "seed": 10, "once": str(tmp_path / "flag")}
    env = make(trouble=trouble)
    start(env, [LEFT, TARGET, LEFT, TARGET])
    executed = execute(env, torch.full((4, 3, 2), 0.5), None)
    assert executed.invalid.tolist() == [True, False, False, False] and executed.reward[0] == 0
    policy = Scripted(lambda obs: torch.zeros(4, 1, 2), lambda obs: torch.zeros(len(obs["state"])), num_units=2)
    dying = make(trouble={"what": "die", "at": 3, "once": str(tmp_path / "other")})
    collector = Collector([dying], policy, decisions=48)
    told = rollout_metrics(collector.collect(), env.spec.tasks).reduce()
    collector.close()
    assert told["rollout/invalid_episodes"] == 1 and 0 < told["rollout/invalid_rate"] < 0.5


BLIND = """

class Simulator(Simulator):
    spec = {**Simulator.spec, "observation": {k: v for k, v in Simulator.spec["observation"].items() if k != "picture"}}

    def observe(self):
        return {k: v for k, v in super().observe().items() if k != "picture"}
"""


@pytest.mark.parametrize("mixed", [True, False])
def test_what_was_lost_stands_in_the_metrics_and_in_the_report(bare_python, tmp_path, monkeypatch, mixed):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "blind.py").write_text(POINT.read_text() + BLIND)
    trouble = {"what": "die", "at": 3, "once": str(tmp_path / "flag")}
    lone = {"type": "isolated", "simulator": str(tmp_path / "blind.py"), "python": bare_python, "workers": 2}
    lone["settings"] = {"trouble": trouble}
    arm = {"type": str(TOYS / "arm.py"), "numbers": 1}
    env = {"type": "mixture", "missing": "zeros", "parts": [{"env": lone, "rename": {"word": "goal"}}, {"env": arm}]} if mixed else lone
    recipe = {
        "name": "lossy", "env": env, "policy": {"type": "mlp", "hidden": [8], "word_dim": 4},
        "algorithm": {"type": "ppo", "update": {"epochs": 1, "minibatches": 1}},
        "collect": {"copies": 2, "decisions": 24}, "train": {"env_steps": 144}, "evaluate": {"episodes": 0},
        "log": {"folder": str(tmp_path), "tensorboard": False, "progress": False},
    }  # fmt: skip
    folder = run(build_recipe(recipe)).folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lost = rows[0]["perf/worker_restarts"]
    assert lost in (1, 2), "both may die in the step after which none does any more"
    for key in ("perf/worker_restarts", "rollout/invalid_episodes"):
        assert [row[key] for row in rows] == [lost] + [0] * (len(rows) - 1) and len(rows) > 2
    page = (folder / "report.html").read_text()
    assert f"Episodes in which the judge or the simulator failed, which count nowhere: {lost:.0f}." in page
    assert f"Processes of simulators that were lost and started again: {lost:.0f}." in page
