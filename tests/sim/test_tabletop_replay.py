"""One demonstration, repeated where the objects lie elsewhere: the same at its own start, solved at others, mended after errors."""

import json

import pytest
import torch

from embodied_rl.config import load_component
from embodied_rl.demo_check import validate
from embodied_rl.demo_starts import Shown
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.envs.tabletop import Config, build
from embodied_rl.errors import CapabilityError
from embodied_rl.record_demos import Disturbance, collect_demonstrations
from embodied_rl.seeding import start_seeds
from tests.sim.conftest import SETTINGS, TASKS

COPIES = 60


@pytest.fixture(scope="module")
def table():
    config = Config(tasks=list(TASKS), reward="sparse", max_steps=60, threads=1)
    env = build(config, num_envs=COPIES, device=torch.device("cpu"), split="train", seed=0)
    yield env
    env.close()


def begin(env, shown, elsewhere=True):
    """A replay at starts of its own or of the demonstrations, and the task of each copy."""
    task, everyone = torch.arange(COPIES) % 3, torch.ones(COPIES, dtype=torch.bool)
    again = env.replay(shown.seeds, shown.tasks, shown.actions)
    there = {int(t): int(s) for s, t in zip(shown.seeds, shown.tasks, strict=True)}
    own = torch.tensor([there[int(t)] for t in task])
    env.reset(everyone, start_seeds(3, "train", torch.arange(COPIES), torch.arange(COPIES)) if elsewhere else own, task)
    again.reset(everyone)
    return again, task


def test_at_its_own_start_it_does_what_was_shown(table, demos):
    shown = Shown.read(demos, "tabletop", TASKS)
    again, task = begin(table, shown, elsewhere=False)
    for t in range(max(map(len, shown.actions))):
        action = again.act()
        for k, kind in enumerate(shown.tasks.tolist()):
            if t < len(shown.actions[k]):
                assert torch.allclose(action[task == kind], shown.actions[k][t].expand(COPIES // 3, -1), atol=1e-4), (kind, t)
        table.step(action)


@pytest.mark.parametrize(("noise", "least"), [(0.0, (1.0, 0.95, 0.95)), (1.0, (0.9, 0.6, 0.6))])
def test_elsewhere_it_solves_the_same_task_also_pushed_about(table, demos, noise, least):
    again, task = begin(table, Shown.read(demos, "tabletop", TASKS))
    pushes, solved = Disturbance(noise, torch.tensor(again.disturbed), COPIES, seed=0), torch.zeros(COPIES, dtype=torch.bool)
    for _ in range(60):
        solved |= table.step((again.act() + pushes.draw()).clamp(-1, 1)).success
    for number, (name, share) in enumerate(zip(TASKS, least, strict=True)):
        assert float(solved[task == number].float().mean()) >= share, name


def test_a_hand_that_errs_misses_and_the_replay_mends_it(table, demos):
    again, task = begin(table, Shown.read(demos, "tabletop", TASKS))
    everyone = torch.ones(COPIES, dtype=torch.bool)
    chosen = torch.arange(COPIES) < COPIES // 2
    clumsy = again.clumsy(chosen, seed=0)
    clumsy.reset(everyone)
    assert torch.equal(clumsy.errs, chosen & (task > 0)), "what is only touched cannot be missed"
    missed, solved = torch.zeros(COPIES, dtype=torch.bool), torch.zeros(COPIES, dtype=torch.bool)
    for _ in range(60):
        wanted, errs = again.act(), clumsy.errs
        solved |= table.step(torch.where(errs[:, None], clumsy.act(), wanted)).success
        missed |= errs & ~clumsy.errs & ~table.view().held
    assert not clumsy.errs.any() and not missed[~chosen].any()
    among = chosen & (task > 0)
    assert float(missed[among].float().mean()) > 0.4
    assert float(solved[among & missed].float().mean()) > 0.6
    assert float(solved[~among].float().mean()) > 0.95


def test_a_recorded_set_of_repetitions_is_whole_and_says_what_was_repeated(demos, tmp_path):
    env = load_component("env", "tabletop", SETTINGS)
    collect_demonstrations(env, tmp_path / "more", 9, replay=demos, misses=0.5, show_misses=True, copies=6)
    assert validate(tmp_path / "more") == []
    made = Demonstrations(tmp_path / "more")
    assert made.info["embodied_rl"]["made"]["replay"] == str(demos)
    assert all(line.extra["success"] for line in made.lines)
    whole = [episode.action for episode in made.load(cameras=())]
    collect_demonstrations(env, tmp_path / "first", 4, replay=demos, misses=0.5, show_misses=True, copies=6)
    collect_demonstrations(env, tmp_path / "first", 9, replay=demos, misses=0.5, show_misses=True, copies=6)
    again = [episode.action for episode in Demonstrations(tmp_path / "first").load(cameras=())]
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True)), "interrupted or not"


def change(folder, made=None, rows=None):
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    info["embodied_rl"]["made"] |= made or {}
    path.write_text(json.dumps(info))
    lines = folder / "meta/episodes.jsonl"
    kept = [json.loads(line) | (rows or {}) for line in lines.read_text().splitlines()]
    lines.write_text("".join(json.dumps(line) + "\n" for line in kept))


@pytest.mark.parametrize(
    ("changed", "tasks", "sentence"),
    [
        ({"made": {"disturbance": {"std": 1.0}}}, TASKS, "its hand was pushed about or missed, so its actions do not lead where it went"),
        ({"made": {"misses": 0.5}}, TASKS, "record it with --noise 0 and without --misses"),
        ({"made": {"env": {"type": "elsewhere"}}}, TASKS, "was recorded in env 'elsewhere', and this one is 'tabletop'"),
        ({}, (*TASKS, "open"), "has no episode of task open: record one, or leave the task out"),
        ({"rows": {"seed": None}}, TASKS, "does not say at which seeds its episodes began"),
        ({"rows": {"seed": 7}}, TASKS, "was recorded at evaluation starts, which training must not see"),
    ],
)
def test_what_cannot_be_repeated_is_refused(demos, tmp_path, changed, tasks, sentence):
    folder = tmp_path / "set"
    collect_demonstrations(load_component("env", "tabletop", SETTINGS), folder, 3, noise=0.0, copies=6)
    change(folder, **changed)
    with pytest.raises(CapabilityError, match=sentence):
        Shown.read(folder, "tabletop", tasks)


def test_a_replay_that_cannot_err_is_not_asked_for_misses(demos, tmp_path, monkeypatch):
    from embodied_rl.envs.tabletop.replay import Replay

    monkeypatch.delattr(Replay, "clumsy")
    with pytest.raises(CapabilityError, match=r"give it a method `clumsy\(\)`, or record without --misses"):
        collect_demonstrations(load_component("env", "tabletop", SETTINGS), tmp_path / "set", 3, replay=demos, misses=0.5, copies=6)


def test_only_tasks_of_the_env_are_read(demos):
    shown = Shown.read(demos, "tabletop", ("lift",))
    assert shown.tasks.tolist() == [0] and len(shown.actions) == 1
    assert shown.seeds.tolist() == [Demonstrations(demos).lines[2].extra["seed"]]
