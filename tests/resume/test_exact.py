"""A run that is stopped or killed and resumed ends with the same bits as one that never was."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from embodied_rl.session import Session
from tests.resume import lab

PROGRAM = Path(sys.executable).with_name("embodied-rl")


def same(rows, state, wanted):
    expected_rows, expected_state = wanted
    assert [r["progress/update"] for r in rows] == [r["progress/update"] for r in expected_rows]
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == expected
    assert lab.differing(state, expected_state) == []


@pytest.mark.parametrize("name", lab.RECIPES)
def test_stopped_and_resumed_three_times(name, whole, tmp_path):
    rows = []
    for i, until in enumerate((1, 4, 5, -1)):
        part, state = lab.go(lab.recipe(name), tmp_path / "run", until=until, resume=i > 0)
        rows += part
    same(rows, state, whole(name))


@pytest.mark.parametrize("name", ["stream", "groups", "pendulum", "tabletop", "imitation"])
def test_killed_at_random_moments_and_resumed(name, whole, tmp_path):
    assert lab.train_with_kills(lab.recipe(name), tmp_path, kills=5, seed=len(name)) >= 2
    same(lab.rows_of(tmp_path / "run"), lab.state_of(tmp_path / "run" / "checkpoints"), whole(name))


def test_the_installed_program_killed_and_resumed(whole, tmp_path):
    recipe, run, dice = lab.write(lab.recipe("stream"), tmp_path), tmp_path / "run", random.Random(0)
    for kill in (True, False):
        argv = [str(PROGRAM), "train", str(recipe), *(["--resume"] if run.exists() else [])]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            if kill:
                target = 3
                while lab.count_rows(run) < target and process.poll() is None:
                    time.sleep(0.003)
                time.sleep(dice.uniform(0, 0.05))
                process.send_signal(signal.SIGKILL)
            text = process.communicate(timeout=120)[0]
        assert process.returncode == (-signal.SIGKILL if kill else 0), text
    same(lab.rows_of(run), lab.state_of(run / "checkpoints"), whole("stream"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert len(evaluation["episodes"]) == 6


DICEY = '''
"""A user's env that draws from every global generator."""
import random
import numpy as np
import torch
from embodied_rl import registry
point = registry.load("env", r"{point}")
class Config(point.Config):
    """Settings."""
class Dicey(point.Point):
    def step(self, action, active=None):
        step = super().step(action, active)
        step.reward = step.reward + torch.rand(()) + np.random.rand() + random.random() + random.gauss(0, 1)
        return step
def build(config, *, num_envs, device, split, seed):
    return Dicey(config, num_envs, device)
'''


@pytest.fixture
def dicey(tmp_path):
    """Changes to a recipe: an env that draws from the global generators of Python, NumPy and torch."""
    path = tmp_path / "dicey.py"
    path.write_text(DICEY.format(point=lab.TOYS / "point.py"))
    return {"env": {"type": str(path), "max_steps": 7}}


def test_global_generators_are_part_of_the_state(dicey, tmp_path):
    wanted = lab.recipe(updates=5, **dicey)
    rows, state = lab.go(wanted, tmp_path / "whole")
    first, _ = lab.go(wanted, tmp_path / "run", until=2)
    rest, end = lab.go(wanted, tmp_path / "run", resume=True)
    same(first + rest, end, (rows, state))


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluating_during_training_changes_nothing_but_the_metrics(greedy, dicey, tmp_path):
    rows, state = lab.go(lab.recipe(updates=5, **dicey), tmp_path / "without")
    evaluate = {"every": 2, "greedy": greedy}
    with_rows, with_state = lab.go(lab.recipe(updates=5, evaluate=evaluate, **dicey), tmp_path / "with")
    assert any(k.startswith("eval/") for k in with_rows[1])
    assert [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in with_rows] == rows
    assert lab.differing(state, with_state) == []


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(tmp_path):
    lab.go(lab.recipe("two parts", updates=3), tmp_path / "run")
    rest, state = lab.go(lab.recipe("two parts", updates=7), tmp_path / "run", resume=True)
    rows, expected = lab.go(lab.recipe("two parts", updates=7), tmp_path / "whole")
    same(rest, state, (rows[3:], expected))


def test_a_run_that_reached_its_target_does_not_train_on_when_resumed(tmp_path):
    sampled = {"every": 2, "episodes_during": 64, "greedy": False}
    wanted = lab.recipe(evaluate=sampled, train={"target_success": 0.01}, policy={"init_std": 1.0})
    rows, state = lab.go(wanted, tmp_path / "run")
    assert len(rows) < lab.UPDATES and rows[-1]["eval/heldout/success_rate"] >= 0.01
    again, state_again = lab.go(wanted, tmp_path / "run", resume=True)
    assert again == [] and lab.differing(state, state_again) == []


@pytest.mark.parametrize("name", ["stream", "groups", "tabletop", "imitation"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(name, whole, tmp_path):
    rows, state = lab.go(lab.recipe(name), tmp_path / "again")
    same(rows, state, whole(name))
    other_rows, other = lab.go(lab.recipe(name, seed=1), tmp_path / "other")
    assert other_rows[0] != rows[0]
    assert any(place.startswith("/policy") for place in lab.differing(state, other))


def test_the_state_in_memory_is_restored_by_a_session_that_has_already_trained(tmp_path):
    """Loading replaces everything, also what the session did before."""
    wanted = lab.recipe("two parts")
    fresh, used = Session.build(wanted), Session.build(wanted)
    rollout = used.collector.collect()
    used.updater.update(rollout, used.credit(rollout), progress=0.0)
    used.load_state_dict(fresh.state_dict(), "memory")
    a, b = (s.collector.collect() for s in (fresh, used))
    assert torch.equal(a.reward, b.reward)
    for s, rollout in ((fresh, a), (used, b)):
        s.updater.update(rollout, s.credit(rollout), progress=0.0)
    assert lab.differing(fresh.state_dict(), used.state_dict()) == []
    fresh.close(), used.close()


def test_the_reference_policy_is_restored_and_not_rebuilt():
    """It need not be the weights that the seed gives: a run may start from others."""
    a, b = (Session.build(lab.recipe("groups")) for _ in range(2))
    with torch.no_grad():
        for p in a.updater.reference.parameters():
            p.add_(1.0)
    b.load_state_dict(a.state_dict(), "memory")
    for x, y in zip(a.updater.reference.parameters(), b.updater.reference.parameters(), strict=True):
        assert torch.equal(x, y)
    a.close(), b.close()


def test_every_key_that_is_logged_is_in_the_table_and_every_row_of_the_table_is_logged(whole):
    from embodied_rl.metrics import METRICS, find

    seen = {find(key).key for name in lab.RECIPES for row in whole(name)[0] for key in row}
    missing = {key for key in METRICS if not key.startswith(("time/", "perf/"))} - seen
    # Absent, not 0, where nothing was skipped, no episode was void and no reward votes.
    assert missing <= {
        "actor/skipped_updates", "eval/<suite>/invalid", "eval/<suite>/invalid/<task>", "rollout/majority_share",
        "rollout/majority_right_rate",
    }, missing  # fmt: skip
