"""The socket between engine and worker: what an eager end waits for actively, and that it gives up where that is in vain."""

import os
import socket

import pytest

from embodied_rl.envs.isolated import worker
from embodied_rl.envs.isolated.worker import DONE, LONGEST_REST, STEP, Line


class Slow:
    """A socket whose other side answers only those who sleep; counts the waits that were active first."""

    def __init__(self):
        self.active = 0
        self.asked = False

    def recv(self, size, flags=0):
        if flags == socket.MSG_DONTWAIT:
            self.active += not self.asked
            self.asked = True
            raise BlockingIOError
        self.asked = False
        return DONE


class Prompt(Slow):
    """One whose other side has answered already."""

    def recv(self, size, flags=0):
        assert flags == socket.MSG_DONTWAIT, "it slept although the answer was there"
        return DONE


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(worker, "EAGER_SECONDS", 1e-5)


def test_an_eager_end_does_not_sleep_while_answers_come_soon():
    line = Line(Prompt(), eager=True)
    assert [line.hear() for _ in range(100)] == [DONE] * 100


def test_beside_slow_steps_next_to_no_wait_is_active():
    slow = Slow()
    line = Line(slow, eager=True)
    assert {line.hear() for _ in range(3 * LONGEST_REST)} == {DONE}
    # Rests of 2, 4, ... 1024 waits: ten active ones in the first 2,056, then one in 1,025.
    assert slow.active == 11
    line.sock = Prompt()
    line._rest = 0
    line.hear()
    line.sock = slow
    for _ in range(3):
        line.hear()
    assert slow.active == 12 and line._rest == 0, "one answer in time, and the next rest is a short one again"


def test_an_end_that_is_not_eager_never_waits_actively():
    slow = Slow()
    line = Line(slow)
    assert line.hear() == DONE and slow.active == 0


@pytest.mark.parametrize("eager", [False, True])
def test_a_side_that_is_gone_or_silent_is_noticed_and_messages_arrive_whole(eager):
    ours, theirs = socket.socketpair()
    line, other = Line(ours, eager=eager), Line(theirs)
    other.tell(STEP)
    other.say({"text": "a" * 1000})
    assert (line.hear(), line.hear()) == (STEP, {"text": "a" * 1000})
    line.patience(0.01)
    with pytest.raises(BlockingIOError):
        line.hear()
    theirs.close()
    for _ in range(3):
        with pytest.raises(EOFError):
            line.hear()
    ours.close()


@pytest.mark.parametrize(
    ("workers", "copies", "cores", "eager"),
    [(None, 1, 2, True), (None, 4, 2, False), (1, 4, 2, True), (2, 4, 3, True), (2, 4, 2, False), (None, 1, 1, False)],
)
def test_both_sides_are_eager_where_each_has_a_core(monkeypatch, workers, copies, cores, eager):
    from embodied_rl.envs import isolated

    seen = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(isolated, "IsolatedEnv", lambda foreign, **given: seen.update(given, eager=foreign.eager))
    config = isolated.Config(simulator=__file__, workers=workers)
    isolated.build(config, num_envs=copies, device=None, split="train", seed=0)
    assert (seen["eager"], seen["workers"]) == (eager, min(workers or cores, copies))
