"""Starts that spread out from demonstrated ones: hand-worked shares, what envs are told, what is refused, what is saved."""

import json

import pytest
import torch

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.collect import Collector
from embodied_rl.config import load_component
from embodied_rl.errors import CapabilityError
from embodied_rl.record_demos import collect_demonstrations
from embodied_rl.seeding import start_seeds
from embodied_rl.spread import Spread, Spreader
from tests.kit import TOYS, Scripted
from tests.unit.test_curriculum import ended, env

CPU = torch.device("cpu")


class Plain:
    """An env that is never played."""

    def __init__(self, tasks=2, has_success=True):
        self.spec = env(tasks, has_success)


class Told(Plain):
    """It notes what it is told."""

    def __init__(self, tasks=2, has_success=True):
        super().__init__(tasks, has_success)
        self.told = []

    def spread(self, seeds, tasks, share):
        self.told.append((seeds.tolist(), tasks.tolist(), share.tolist()))


def demonstrated(folder, *rows):
    """A set without frames: a spreader reads no more than where its episodes began."""
    (folder / "meta").mkdir(parents=True)
    info = {"codebase_version": "v2.1", "features": {"action": {"dtype": "float32", "shape": [1]}}}
    (folder / "meta/info.json").write_text(json.dumps(info))
    lines = [{"episode_index": i, "tasks": ["go"], "length": 3} | row for i, row in enumerate(rows)]
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return demonstrated(tmp_path / "set", {"seed": 8, "task": "b"}, {"seed": 4, "task": "a"}, {"seed": 6, "task": "b"})


def test_shares_by_hand(folder):
    s = Spreader(Spread(around=folder, target=0.25, gain=0.1), [Told()])
    assert s.share.tolist() == [0, 0]
    # Task a: 2 of 3, 2 - 3 x 0.25 = 1.25. Task b: none of 2, below 0.
    s.observe(ended((0, True), (0, True), (0, False), (1, False), (1, False)))
    assert s.share.tolist() == pytest.approx([0.125, 0])
    s.observe(ended((1, True), (0, False)))  # a: 0.125 - 0.025, b: 0.075
    assert s.share.tolist() == pytest.approx([0.1, 0.075])
    assert s.metrics().reduce() == {"rollout/start_spread/a": pytest.approx(0.1), "rollout/start_spread/b": pytest.approx(0.075)}
    s.observe({})
    assert s.share.tolist() == pytest.approx([0.1, 0.075])
    s.observe(ended(*[(0, True)] * 13))
    assert float(s.share[0]) == 1, "there is nothing beyond anywhere"


def test_all_parts_are_told_the_same_also_by_a_restored_one(folder):
    parts = [Told(), Told()]
    s = Spreader(Spread(around=folder, gain=0.1), parts)
    s.tell()
    s.observe(ended((1, True)))
    s.tell()
    for part in parts:
        assert part.told == [([8, 4, 6], [1, 0, 1], [0, 0]), ([8, 4, 6], [1, 0, 1], [0, pytest.approx(0.05)])]
    other = Spreader(Spread(around=folder), [fresh := Told()])
    other.load_state_dict(s.state_dict())
    other.tell()
    assert fresh.told == parts[0].told[-1:]


@pytest.mark.parametrize(
    ("made", "rows", "sentence"),
    [
        (Plain(), [], "this env cannot start near another start, or does not tell success: set collect.spread: null"),
        (Told(has_success=False), [], "does not tell success"),
        (Told(), [{"seed": 4, "task": "a"}, {}], "does not say at which seeds its episodes began"),
        (Told(3), [{"seed": 4, "task": "b"}], "has no episode of task a, c, so training does not know where to begin it"),
        (Told(), [{"seed": 4, "task": "a"}, {"seed": 5, "task": "b"}], "was recorded at evaluation starts"),
    ],
)
def test_what_cannot_be_spread_is_refused(tmp_path, made, rows, sentence):
    with pytest.raises(CapabilityError, match=sentence):
        Spreader(Spread(around=demonstrated(tmp_path / "set", *rows)), [made])


def test_training_begins_at_the_demonstrated_starts_and_leaves_them_where_it_succeeds(tmp_path):
    """The tabletop, its own demonstrations and a policy that does nothing; successes are told to the spreader by hand."""
    config = load_component("env", "tabletop", ["tasks=[reach,lift]", "max_steps=3", "threads=1"])
    collect_demonstrations(load_component("env", "tabletop", ["tasks=[reach,lift]", "threads=1"]), tmp_path / "set", 2, copies=4)
    table = registry.load("env", "tabletop").build(config, num_envs=4, device=CPU, split="train", seed=0)
    try:
        c = Collector(
            [table], Scripted(lambda obs: torch.zeros(4, 1, 7), lambda obs: torch.zeros(4), num_units=7), decisions=3, mode="episodes",
            spread=Spread(around=str(tmp_path / "set"), gain=0.05),
        )  # fmt: skip
        c.collect()
        assert c.spreader.share.tolist() == [0, 0], "nothing was solved"

        def starts():
            mask = torch.ones(4, dtype=torch.bool)
            table.reset(mask, start_seeds(0, "train", torch.arange(4), torch.arange(4)), torch.tensor([0, 1, 0, 1]))
            return table.object_poses().clone()

        table.reset(torch.ones(4, dtype=torch.bool), c.spreader.seeds.repeat(2), c.spreader.task_of.repeat(2))
        there = table.object_poses().clone()
        assert torch.equal(starts(), there)
        c.spreader.observe(ended(*[(1, True)] * 10))  # by half of 0.05 each
        assert torch.equal(starts(), there), "what is played again now begins where it did"
        c.collect()
        here = starts()
        assert torch.equal(here[::2], there[::2]) and not torch.equal(here[1::2], there[1::2])
    finally:
        table.close()


@pytest.mark.parametrize(
    ("around", "env_type", "sentence"),
    [
        ("nowhere", "tabletop", "error: nowhere: there is no such folder; make a set with: embodied-rl collect\n"),
        (
            "set", "tabletop",
            "error: set: was recorded in env 'elsewhere', and this run plays 'tabletop', where its seeds begin something "
            "else: record a set in this env, or set collect.spread: null\n",
        ),
        (
            "set", "elsewhere.py",
            "error: collect.spread begins near the starts of set, and this env cannot start near another start, or does "
            "not tell success: set collect.spread: null, or use the tabletop\n",
        ),
    ],
)  # fmt: skip
def test_a_run_that_cannot_begin_near_demonstrations_says_why(tmp_path, monkeypatch, capsys, around, env_type, sentence):
    monkeypatch.chdir(tmp_path)
    demonstrated(tmp_path / "set", {"seed": 4, "task": "reach"})
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    made = {"made": {"env": {"type": "elsewhere" if env_type == "tabletop" else "elsewhere.py"}}}
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info | {"embodied_rl": made}))
    (tmp_path / "elsewhere.py").write_text((TOYS / "point.py").read_text())
    (tmp_path / "my.yaml").write_text(f"extends: algorithm/ppo.yaml\nname: my\nenv: {{type: {env_type}}}\npolicy: {{type: mlp}}\n")
    assert main(["train", "my.yaml", f"collect.spread.around={around}"]) == 2
    assert capsys.readouterr().err.endswith(sentence)
