"""SIGINT and SIGTERM finish the update, save and say how to go on; a second SIGINT ends at once."""

import json
import os
import signal
import threading
import time

import pytest

from embodied_rl import checkpoint
from embodied_rl.train import run
from tests.resume import lab

ENDLESS = {"train": {"env_steps": 10**9}, "checkpoint": {"every": 10**6}}

SLOW = '''
"""A point that takes its time in one of the two splits."""
import time
from embodied_rl import registry
point = registry.load("env", r"{point}")
class Config(point.Config):
    """Settings."""
    slow: str = "train"
class Slow(point.Point):
    def step(self, action, active=None):
        time.sleep(self.pause)
        return super().step(action, active)
def build(config, *, num_envs, device, split, seed):
    env = Slow(config, num_envs, device)
    env.pause = 0.2 if split == config.slow else 0.0
    return env
'''


@pytest.fixture
def slow(tmp_path):
    """slow(split): changes to a recipe, so that every control step of that split takes 0.2 s."""
    path = tmp_path / "slow.py"
    path.write_text(SLOW.format(point=lab.TOYS / "point.py"))
    return lambda split: {"env": {"type": str(path), "max_steps": 7, "slow": split}}


def begun(wanted, folder):
    """The run in a process of its own."""
    log = folder / "log.txt"
    log.write_text("")
    return lab.start(["train", str(lab.write(wanted, folder))], log), log, folder / wanted.name


def last_row(run):
    return lab.rows_of(run)[-1]["progress/update"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(number, whole, tmp_path):
    process, log, path = begun(lab.recipe("stream", **ENDLESS), tmp_path)
    lab.wait_for(lambda: lab.count_rows(path) >= 3, process)
    os.kill(process.pid, number)
    process.join(240)
    assert process.exitcode == 128 + number, log.read_text()
    text = log.read_text()
    assert "finishing the current update, then saving (interrupt again to stop at once)" in text
    assert text.splitlines()[-1] == f"stopped by {number.name} and saved; go on with: embodied-rl train {path} --resume"
    newest = checkpoint.latest(path / "checkpoints")
    assert newest.name == f"update_{last_row(path):06d}", "the last update is in the checkpoint"
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["finished"], summary["stop_reason"], summary["evaluation"]) == (False, number.name, {})


def test_what_a_signal_stopped_goes_on_bit_for_bit(whole, tmp_path):
    wanted = lab.recipe("stream", checkpoint={"every": 10**6}, env={"max_steps": 7})
    process, log, path = begun(wanted, tmp_path)
    lab.wait_for(lambda: lab.count_rows(path) >= 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(240)
    assert process.exitcode in (143, 0), log.read_text()
    process = lab.start(["train", str(tmp_path / "recipe.yaml"), "--resume"], log)
    process.join(240)
    assert process.exitcode == 0, log.read_text()
    rows, state = whole("stream")
    assert lab.rows_of(path) == rows
    assert lab.differing(lab.state_of(path / "checkpoints"), state) == []


def test_a_second_interrupt_ends_at_once_and_leaves_the_checkpoint_intact(slow, tmp_path):
    process, log, path = begun(lab.recipe(**slow("train"), train={"env_steps": 10**9}), tmp_path)
    lab.wait_for(lambda: checkpoint.latest(path / "checkpoints") is not None, process)
    os.kill(process.pid, signal.SIGINT)
    lab.wait_for(lambda: "finishing the current update" in log.read_text(), process)
    rows = lab.count_rows(path)
    os.kill(process.pid, signal.SIGINT)
    process.join(240)
    assert process.exitcode == 130
    assert "second interrupt: stopping at once; what is saved is intact" in log.read_text()
    assert lab.count_rows(path) == rows, "the update, which takes 2 s, was not finished"
    assert checkpoint.load(checkpoint.latest(path / "checkpoints"))["counters"]["env_steps"] == 80 * last_row(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_final_evaluation_loses_nothing_of_the_training(number, slow, tmp_path):
    wanted = lab.recipe(**slow("eval"), updates=2, evaluate={"episodes": 400})
    process, log, path = begun(wanted, tmp_path)
    lab.wait_for(lambda: lab.count_rows(path) >= 2 and checkpoint.latest(path / "checkpoints"), process)
    time.sleep(1.0)
    os.kill(process.pid, number)
    process.join(240)
    assert process.exitcode == 128 + number, log.read_text()
    assert f"stopped by {number.name} and saved; go on with: " in log.read_text()
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["finished"], summary["updates"]) == (False, 2)
    process = lab.start(["train", str(tmp_path / "recipe.yaml"), "--resume", "evaluate.episodes=2"], log)
    process.join(240)
    assert process.exitcode == 0, log.read_text()
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["finished"], summary["updates"]) == (True, 2)
    assert summary["evaluation"]["heldout"]["overall"]["episodes"] == 2


def test_a_run_in_a_thread_trains_without_signal_handlers(tmp_path):
    wanted = lab.recipe(updates=2, evaluate={"episodes": 0}, log={"folder": str(tmp_path)})
    before = signal.getsignal(signal.SIGINT)
    reasons = []
    thread = threading.Thread(target=lambda: reasons.append(run(wanted).reason))
    thread.start()
    thread.join(240)
    assert reasons == ["finished"]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handlers_of_before_are_back_after_a_run(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run(lab.recipe(updates=1, evaluate={"episodes": 0}, log={"folder": str(tmp_path)}))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
