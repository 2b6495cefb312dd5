"""Simulators in processes of another Python: what they show, and what becomes of episodes when they are lost."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied_rl import registry
from embodied_rl.check import check_env
from embodied_rl.envs._words import word_id
from embodied_rl.errors import CapabilityError, CheckpointError, SimulatorError
from tests.kit import CPU, TOYS

POINT = TOYS / "foreign" / "point.py"
ISOLATED = registry.load("env", "isolated")


@pytest.fixture
def make(bare_python, tmp_path, monkeypatch):
    """Build envs of the toy simulator; they are closed after the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # logs of lost workers are kept
    made = []

    def build(num_envs=2, trouble=None, **config):
        settings = {"bare": True, "trouble": trouble or {}} | config.pop("settings", {})
        config = {"simulator": str(POINT), "python": bare_python, "workers": num_envs, "settings": settings} | config
        made.append(ISOLATED.build(ISOLATED.Config(**config), num_envs=num_envs, device=CPU, split="train", seed=0))
        return made[-1]

    yield build
    for env in made:
        env.close()


def start(env, seeds=None, tasks=None, mask=None):
    b = env.spec.num_envs
    seeds = torch.arange(b) if seeds is None else torch.tensor(seeds)
    tasks = torch.zeros(b, dtype=torch.int64) if tasks is None else torch.tensor(tasks)
    return env.reset(torch.ones(b, dtype=torch.bool) if mask is None else torch.tensor(mask), seeds, tasks)


def push(env, force=1.0, active=None):
    action = torch.full((env.spec.num_envs, 1), force)
    return env.step(action, None if active is None else torch.tensor(active))


def first_x(seed):
    return np.float32(np.random.default_rng(seed).uniform(-1, 1))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- what they show -------------------------------------------------------------------------------------------------


def test_a_python_without_torch_simulates_and_numbers_arrive_where_they_belong(make):
    env = make(3, workers=2)
    obs = start(env, seeds=[5, 6, 7], tasks=[0, 1, 0])
    x = np.array([first_x(s) for s in (5, 6, 7)])
    assert obs["state"][:, 0].tolist() == x.tolist() and obs["word"][:, 0].tolist() == [0, 1, 0]
    step = env.step(torch.tensor([[1.0], [-0.5], [9.0]]))
    # v = 0.1 a and x += v, with 9 clipped to 1; the goal is at -1 or 1 by the task.
    moved = [first_x(s) + np.float32(v) for s, v in ((5, 0.1), (6, -0.05), (7, 0.1))]
    assert torch.allclose(step.obs["state"], torch.tensor([[m, v] for m, v in zip(moved, (0.1, -0.05, 0.1), strict=True)]))
    distance = torch.tensor([moved[0] + 1, 1 - moved[1], moved[2] + 1]).abs()
    assert torch.allclose(step.reward, -distance, atol=1e-6) and torch.allclose(step.metrics["distance"], distance, atol=1e-6)
    assert step.success.tolist() == (distance < 0.1).tolist()
    assert not step.invalid.any() and not step.terminated.any()


def test_observations_of_one_step_are_not_overwritten_by_the_next(make):
    env = make()
    first = start(env)["state"]
    kept = first.clone()
    after = push(env).obs["state"]
    kept_after = after.clone()
    push(env)
    assert torch.equal(first, kept) and torch.equal(after, kept_after)


def test_copies_that_are_not_active_stay_and_pay_nothing(make):
    env = make()
    before = start(env)["state"]
    step = push(env, active=[True, False])
    assert torch.equal(step.obs["state"][1], before[1]) and not torch.equal(step.obs["state"][0], before[0])
    assert step.reward[1] == 0 and step.metrics["distance"][1] == 0


@pytest.mark.slow
def test_the_contract_holds_with_several_processes_and_observations_on_demand(bare_python):
    more = ["workers=3", "settings={on_demand: true, speaks: true}"]
    findings = check_env("isolated", [f"simulator={POINT}", f"python={bare_python}", *more])
    assert [f"{f.name}: {f.detail}" for f in findings if f.ok is False] == []
    assert sum(f.ok is True for f in findings) >= 18


def test_instructions_are_text_and_word_ids_of_the_running_episode(make):
    env = make(settings={"speaks": True})
    obs = start(env, tasks=[1, 0])
    assert env.instructions() == ["go right", "go left"]
    assert obs["instruction"].tolist() == [[word_id("go"), word_id("right"), 0, 0], [word_id("go"), word_id("left"), 0, 0]]
    later = start(env, tasks=[0, 0], mask=[True, False])
    assert env.instructions() == ["go left", "go left"]
    assert obs["instruction"][0, 1] == word_id("right"), "an earlier observation keeps its words"
    assert torch.equal(later["instruction"][0], later["instruction"][1])
    assert sorted(word for _, word in env.spec.observation["instruction"].texts) == ["go", "left", "right"]
    assert not hasattr(make(), "instructions")


def test_on_demand_only_what_moved_is_looked_at(make):
    env = make(settings={"on_demand": True})
    start(env)
    assert push(env).obs == {}
    push(env, active=[True, False])
    seen = env.observe()
    assert torch.allclose(seen["state"][:, 1], torch.tensor([0.2, 0.1]))
    assert torch.equal(env.observe()["state"], seen["state"])


def test_a_spared_copy_is_not_looked_at_until_its_reset_and_costs_no_resumed_run(make):
    env, other = (make(settings={"on_demand": True}, max_steps=2) for _ in range(2))
    start(env)
    push(env, active=[True, False])
    seen = env.observe()
    assert push(env).truncated.tolist() == [True, False]
    env.spare(torch.tensor([True, False]))
    after = env.observe()
    assert torch.equal(after["state"][0], seen["state"][0]) and torch.allclose(after["state"][1, 1], torch.tensor(0.1))
    again = other.set_state(env.get_state())
    assert all(torch.equal(again[name], after[name]) for name in after)
    for one in (env, other):
        assert start(one, seeds=[5, 0], mask=[True, False])["state"][0].tolist() == [first_x(5), 0]


def test_pictures_are_of_the_copies_asked_for(make):
    env = make(3, workers=2)
    start(env, seeds=[5, 6, 7])
    pictures = env.render(torch.tensor([2, 0]), "side", 3, 5)
    assert pictures.shape == (2, 3, 5, 3)
    assert pictures[:, 0, 0, 0].tolist() == [int(100 + 10 * np.random.default_rng(s).uniform(-1, 1)) for s in (7, 5)]


# ---- what they print --------------------------------------------------------------------------------------------


def test_what_a_simulator_prints_disturbs_nothing_and_is_thrown_away(make, capfd):
    env = make()
    logs = [worker.log for worker in env._workers]
    start(env)
    push(env)
    assert "a banner on standard output" in logs[0].read_text() and "chatter" in logs[0].read_text()
    env.close()
    assert not any(log.exists() for log in logs)
    assert capfd.readouterr() == ("", "")


# ---- lost workers -----------------------------------------------------------------------------------------------

WAYS = {
    "die": "died of SIGKILL",
    "leave": "ended with exit code 3",
    "hang": "gave no sign for 0.5 s",
    "raise": "gave up: copy 1 failed in step 2: ValueError: joint 3 is on fire",
    "ask": "EOFError",
}


@pytest.mark.parametrize("what", WAYS)
def test_a_lost_worker_costs_its_own_episodes_only(make, tmp_path, caplog, what):
    env = make(3, workers=2, trouble={"what": what, "at": 2, "seed": 7, "once": str(tmp_path / "flag")}, step_seconds=0.5)
    assert [(w.low, w.high) for w in env._workers] == [(0, 2), (2, 3)]
    start(env, seeds=[6, 7, 8])
    before = push(env)
    with caplog.at_level(logging.WARNING):
        step = push(env)
    assert step.invalid.tolist() == [True, True, False]
    assert step.truncated.tolist() == [True, True, False] and not step.terminated.any()
    assert step.reward[:2].tolist() == [0, 0] and step.metrics["distance"][:2].tolist() == [0, 0] and step.reward[2] != 0
    assert torch.equal(step.obs["state"][:2], before.obs["state"][:2]), "what was seen last"
    assert torch.allclose(step.obs["state"][2, 1], torch.tensor(0.2))
    (told,) = caplog.messages
    assert WAYS[what] in told and "copies 0 to 1" in told and "2 running episodes do not count" in told and "restart 1" in told
    assert (env.restarts, env.void) == (1, 2)
    # The third copy goes on while the others are started again, and their next episodes are whole.
    assert push(env, active=[False, False, True]).invalid.tolist() == [False] * 3
    start(env, seeds=[6, 7, 8], mask=[True, True, False])
    again = push(env)
    assert not again.invalid.any()
    assert torch.equal(again.obs["state"][:2], before.obs["state"][:2]) and torch.allclose(again.obs["state"][2, 1], torch.tensor(0.4))


def test_a_number_that_is_not_finite_costs_one_episode_and_names_the_copy(make, caplog):
    env = make(3, workers=1, trouble={"what": "nan", "at": 2, "seed": 7})
    start(env, seeds=[6, 7, 8])
    before = push(env)
    with caplog.at_level(logging.WARNING):
        step = push(env)
    assert step.invalid.tolist() == [False, True, False] and step.truncated.tolist() == [False, True, False]
    assert all(torch.isfinite(x.float()).all() for x in (*step.obs.values(), step.reward, *step.metrics.values()))
    assert torch.equal(step.obs["state"][1], before.obs["state"][1]) and step.reward[1] == 0
    assert caplog.messages == ["env isolated: 'point.py': 'state' is not finite in copies [1]: their episodes do not count"]
    assert (env.restarts, env.void) == (0, 1)
    start(env, seeds=[6, 9, 8], mask=[False, True, False])
    assert not push(env).invalid.any()


def test_what_is_not_finite_may_be_shown_before_anybody_looks(make, caplog):
    env = make(settings={"on_demand": True}, trouble={"what": "nan", "at": 2, "seed": 7})
    start(env, seeds=[6, 7])
    before = push(env) and env.observe()
    assert push(env).invalid.tolist() == [False, True]
    # The reward was not a number either, because of the state.
    assert caplog.messages == ["env isolated: 'point.py': 'state' is not finite in copies [1]: their episodes do not count"]
    assert torch.equal(env.observe()["state"][1], before["state"][1])
    assert torch.isfinite(start(env, seeds=[6, 9], mask=[False, True])["state"]).all()
    assert not push(env).invalid.any()


def test_a_worker_lost_at_a_start_is_replaced_and_the_start_repeated(make, tmp_path, caplog):
    env = make(2, workers=1, trouble={"what": "die", "when": "reset", "seed": 7, "once": str(tmp_path / "flag")})
    start(env, seeds=[6, 8])
    push(env)
    obs = start(env, seeds=[0, 7], mask=[False, True])
    assert obs["state"][1, 0] == first_x(7), "the second attempt"
    step = push(env)
    assert step.invalid.tolist() == [True, False], "the other copy of the process lost its episode, and is told so now"
    assert torch.isfinite(step.obs["state"]).all() and (env.restarts, env.void) == (1, 1)


def test_a_start_that_never_succeeds_stops_with_a_sentence(make):
    env = make(1, trouble={"what": "raise", "when": "reset", "seed": 7})
    with pytest.raises(SimulatorError, match="episode of seed 7, task 'right' could not be started, 3 times in a row"):
        start(env, seeds=[7], tasks=[1])


FRAGILE = """

class Simulator(Simulator):
    def __init__(self, settings):
        super().__init__(settings)
        with open(settings["builds"], "a+") as file:
            file.write("x")
            if file.tell() in settings["dies"]:
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("dies", "lives"), [([2, 3], True), ([2, 3, 4], False)])
def test_a_successor_that_is_killed_while_it_starts_has_a_successor(make, tmp_path, caplog, dies, lives):
    """Where memory is short the next one may be killed as well."""
    file = tmp_path / "fragile.py"
    file.write_text(POINT.read_text() + FRAGILE)
    env = make(1, simulator=str(file), settings={"builds": str(tmp_path / "builds"), "dies": dies})
    start(env)
    os.kill(env._workers[0].process.pid, signal.SIGKILL)
    assert push(env).invalid.tolist() == [True]
    if not lives:
        with pytest.raises(SimulatorError, match="does not start: its worker died of SIGKILL"):
            start(env, seeds=[5])
        return
    assert start(env, seeds=[5])["state"][0, 0] == first_x(5)
    assert not push(env).invalid.any() and env.restarts == 3
    assert sum("did not start again" in message for message in caplog.messages) == 2


def test_workers_that_are_lost_over_and_over_stop_the_run(make, monkeypatch):
    monkeypatch.setattr("embodied_rl.envs.isolated.env.LOSSES", 2)
    env = make(1, trouble={"what": "leave"})
    with pytest.raises(SimulatorError, match="3 workers were lost without one finished episode between them, the last one ended"):
        for _ in range(20):
            start(env)
            assert push(env).invalid.all()
    assert env.restarts == 3


def test_a_finished_episode_forgives_earlier_losses(make, monkeypatch):
    monkeypatch.setattr("embodied_rl.envs.isolated.env.LOSSES", 2)
    env = make(1, trouble={"what": "leave", "seed": 7}, max_steps=1)
    for seed in [7, 7, 8, 7, 7]:
        start(env, seeds=[seed])
        step = push(env)
        assert bool(step.truncated) and bool(step.invalid) == (seed == 7)
    assert env.restarts == 4


def test_pictures_of_a_lost_copy_are_black_and_its_episode_is_void(make):
    env = make(2)
    start(env)
    os.kill(env._workers[0].process.pid, signal.SIGKILL)
    env._workers[0].process.wait()
    pictures = env.render(torch.tensor([0, 1]), "side", 2, 2)
    assert pictures[0].sum() == 0 and pictures[1].sum() > 0
    assert push(env).invalid.tolist() == [True, False]


# ---- state ------------------------------------------------------------------------------------------------------


def test_a_state_remembers_which_episodes_are_lost(make):
    trouble = {"what": "nan", "at": 2, "seed": 7}
    env, other = make(3, trouble=trouble), make(3, trouble=trouble)
    start(env, seeds=[6, 7, 8])
    push(env, 0.3)
    push(env, -0.7, active=[True, True, False])
    env._lost[2] = True  # as if its worker had died between two steps
    state = env.get_state()
    seen = other.set_state(state)
    assert torch.equal(seen["state"], torch.from_numpy(env._seen["state"]))
    mine, theirs = push(env, 0.5), push(other, 0.5)
    assert mine.invalid.tolist() == theirs.invalid.tolist() == [False, False, True]
    assert torch.equal(mine.obs["state"], theirs.obs["state"]) and torch.equal(mine.reward, theirs.reward)


def test_a_simulator_that_throws_dice_is_told_from_one_that_repeats(make):
    env, other = make(trouble={"dice": True}), make(trouble={"dice": True})
    start(env)
    push(env)
    with pytest.raises(CapabilityError, match="did not repeat its episode: after 1 replayed steps 'state' of copy 0"):
        other.set_state(env.get_state())


def test_a_state_of_another_number_of_copies_is_refused(make):
    env = make(2)
    start(env)
    with pytest.raises(CheckpointError, match="2 copies of 2 tasks, expected 3 of 2"):
        make(3).set_state(env.get_state())


def test_without_resumable_there_is_no_state(make):
    env = make(resumable=False)
    start(env)
    assert not env.spec.has_state
    with pytest.raises(CapabilityError, match="env.resumable is false"):
        env.get_state()


# ---- processes --------------------------------------------------------------------------------------------------


def test_closing_ends_every_process_and_leaves_no_descriptor(make):
    before = len(os.listdir("/proc/self/fd"))
    env = make(2)
    start(env)
    push(env)
    env.render(torch.tensor([0]), "side", 2, 2)
    pids = [worker.process.pid for worker in env._workers]
    env.close()
    env.close()
    assert not any(map(alive, pids)) and len(os.listdir("/proc/self/fd")) == before


ENGINE = """
import os, signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
from embodied_rl import registry
m = registry.load("env", "isolated")
settings = {{"trouble": {{"what": "{what}", "at": 1}}}}
config = m.Config(simulator={point!r}, python={python!r}, workers=2, settings=settings, step_seconds=1000)
env = m.build(config, num_envs=2, device=torch.device("cpu"), split="train", seed=0)
env.reset(torch.ones(2, dtype=torch.bool), torch.arange(2), torch.zeros(2, dtype=torch.int64))
print(*(w.process.pid for w in env._workers), flush=True)
while True:
    env.step(torch.zeros(2, 1))
    env.reset(torch.ones(2, dtype=torch.bool), torch.arange(2), torch.zeros(2, dtype=torch.int64))
"""


@pytest.mark.parametrize(("what", "number"), [("hang", signal.SIGKILL), ("hang", signal.SIGINT), ("nothing", signal.SIGKILL)])
def test_however_the_engine_ends_no_process_stays(bare_python, what, number):
    code = textwrap.dedent(ENGINE.format(what=what, point=str(POINT), python=bare_python))
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = [int(pid) for pid in engine.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    time.sleep(0.2)
    engine.send_signal(number)
    engine.wait(20)
    engine.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_the_manifest_is_of_the_simulators_own_python(make, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(POINT.read_text() + "\n    def manifest(self):\n        return {'protocol': {'name': 'toy'}}\n")
    env = make(simulator=str(file))
    start(env)
    told = env.manifest()
    assert told["simulator"] == hashlib.sha256(file.read_bytes()).hexdigest() and told["protocol"] == {"name": "toy"}
    assert told["packages"]["numpy"] == np.__version__ and "torch" not in told["packages"]
    assert told["python"].count(".") == 2
    os.kill(env._workers[0].process.pid, signal.SIGKILL)
    assert env.manifest() == told, "asked once: a lost worker does not change what was played"


def test_a_simulator_without_a_manifest_of_its_own_is_told_by_its_settings(make):
    told = make(1, settings={"mass": 2.0}).manifest()
    assert told["settings"] == {"bare": True, "trouble": {}, "mass": 2.0} and told["simulator"]


def test_a_manifest_that_fails_costs_a_worker_and_is_told(make, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(POINT.read_text() + "\n    def manifest(self):\n        raise KeyError('assets')\n")
    env = make(1, simulator=str(file))
    with pytest.raises(SimulatorError, match="no worker could tell its manifest; its output is in .*KeyError: 'assets'"):
        env.manifest()
