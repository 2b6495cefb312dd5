"""A judge that hangs, dies, raises or gives nothing makes its episode void, and the next reply is judged as ever."""

import os
import threading
import time

import pytest

from embodied_rl.envs.text.judge import Case, Judge, Judges
from embodied_rl.envs.text.task import Question
from embodied_rl.envs.text.tasks import build_task
from embodied_rl.errors import CapabilityError

NASTY = '''
import ctypes, os, sys, time
from embodied_rl.envs.text.task import Question, Task
from embodied_rl.section import Section

class Config(Section):
    die_at_start: bool = False

class Nasty(Task):
    speaks = True

    def question(self, rng):
        return Question("Say it.", "ok")

    def respond(self, question, replies):
        return f"you said {replies[-1][4:]}" if replies[-1].startswith("tell") else None

    def score(self, question, reply):
        print("judges may print", flush=True)
        if reply == "hang":
            while True:
                time.sleep(1)
        if reply == "die":
            ctypes.string_at(0)
        if reply == "quit":
            sys.exit(4)
        if reply == "raise":
            raise ValueError("no idea")
        if reply == "eat":
            return float(len(bytearray(2**40)))
        odd = {"none": None, "nan": float("nan"), "inf": float("inf"), "half": 0.5, "yes": True, "pid": os.getpid()}
        return odd[reply] if reply in odd else super().score(question, reply)

    def result(self, question, reply):
        return {"half": lambda: 1 / 0, "yes": lambda: 7}.get(reply, lambda: super(Nasty, self).result(question, reply))()

def build(config):
    if config.die_at_start and __import__("multiprocessing").current_process().pid != PARENT:
        raise RuntimeError("the licence has run out")
    return Nasty()
'''


@pytest.fixture
def nasty(tmp_path):
    path = tmp_path / "nasty.py"
    path.write_text(NASTY.replace("PARENT", str(os.getpid())))
    return str(path)


def judges(path, **given):
    entries = [path, "arithmetic"]
    settings = {"seconds": 1.0, "processes": 1} | given
    return Judges([build_task(e) for e in entries], entries, ["nasty", "arithmetic"], **settings)


def cases(*replies, last=True):
    return [Case(0, Question("Say it.", "ok"), [r], last) for r in replies]


def test_every_way_to_fail_is_told_and_none_is_a_score(nasty, caplog):
    j = judges(nasty)
    begun = time.monotonic()
    answers = j.ask(cases("ok", "hang", "wrong", "die", "ok", "quit", "raise", "none", "nan", "inf", "eat", "half", "yes"))
    assert time.monotonic() - begun < 60
    failed = [a.get("failed", a.get("score")) for a in answers]
    assert failed == [
        1.0, "it did not answer within 1 s (env.judge_seconds)", 0.0, "its process died (signal SIGSEGV)", 1.0,
        "SystemExit: 4", "ValueError: no idea", "it gave None", "it gave nan", "it gave inf", "MemoryError: ", 0.5, 1.0,
    ]  # fmt: skip
    results = [a.get("result") for a in answers if "score" in a]
    assert results == ["ok", "wrong", "ok", None, "7"], "a result that fails takes nothing from the score"
    told = [r.message for r in caplog.records]
    assert len(told) == 3 < sum("failed" in a for a in answers), "the first few are told, all are counted"
    assert told[0] == "the judge of task 'nasty' failed (it did not answer within 1 s (env.judge_seconds)): the episode is void"
    assert told[2].endswith("the episode is void; further ones are only counted, in rollout/invalid_rate")
    j.close(), j.close()


def test_a_reply_is_answered_there_too_and_the_last_one_is_judged(nasty):
    j = judges(nasty)
    assert j.ask(cases("tell me", last=False)) == [{"say": "you said  me"}]
    assert j.ask(cases("tell me", last=True)) == [{"score": 0.0, "result": "tell me"}]
    j.close()


def test_tasks_that_cannot_hang_are_judged_here_and_start_no_process(nasty):
    j = judges(nasty)
    assert j.ask([Case(1, Question("What is 1 + 1?", "2"), ["2"], False)]) == [{"score": 1.0, "result": "2"}]
    assert j._judges[0]._process is None
    both = j.ask([*cases("ok"), Case(1, Question("What is 1 + 1?", "2"), ["3"], False), *cases("half")])
    assert [a["score"] for a in both] == [1.0, 0.0, 0.5]
    j.close()


def test_several_processes_judge_side_by_side(nasty):
    j = judges(nasty, processes=3)
    together = threading.Barrier(3)

    class Busy:
        def ask(self, case):
            together.wait(timeout=20)  # until all three are here
            return {"score": float(len(case.replies[0]))}

    j._judges = [Busy() for _ in j._judges]
    assert j.ask(cases("a", "bb", "ccc", "dddd", "eeeee", "ffffff")) == [{"score": float(i)} for i in range(1, 7)]


def test_a_process_that_is_killed_is_gone(nasty):
    judge = Judge([nasty], seconds=0.3)
    pid = int(judge.ask(cases("pid")[0])["score"])
    os.kill(pid, 0)
    judge.ask(cases("hang")[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    other = int(judge.ask(cases("pid")[0])["score"])
    judge.close()
    assert other != pid
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_judges_that_cannot_start_are_an_error_not_a_void_episode(nasty):
    judge = Judge([{"task": nasty, "die_at_start": True}], seconds=1.0)
    with pytest.raises(CapabilityError, match="could not be started .*the licence has run out"):
        judge.ask(cases("ok")[0])
