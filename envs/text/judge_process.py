"""What runs in a judge's own process: one request per line of standard input, one answer per line.

    {"task": 0, "question": {...}, "replies": ["46"], "last": true}  ->  {"score": 1.0, "result": "46"}
                                                                    or  {"say": "84"}     the conversation goes on
                                                                    or  {"failed": "ValueError: ..."}

The first line holds the entries of `env.tasks`; it is answered by {"ready": true} when the tasks are built.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from embodied_rl.envs.text.task import Question, Task
from embodied_rl.envs.text.tasks import build_task

MEMORY = 8 * 2**30
"""Bytes of address space: a judge that is tricked into building a huge number dies alone."""


def outcome(task: Task, question: Question, replies: Sequence[str], *, last: bool) -> dict[str, Any]:
    """What follows from the last reply.

    Args:
        task: Whose question it is.
        question: What the conversation began with.
        replies: All of the policy's so far.
        last: No further reply is possible, so nothing is answered.

    Returns:
        outcome: {"say": text}, {"score": number, "result": text or None}, or {"failed": reason}.
    """
    try:
        if task.speaks and not last and (text := task.respond(question, replies)) is not None:
            return {"say": str(text)}
        score = task.score(question, replies[-1])
        if score is None:
            return {"failed": "it gave None"}
        value = float(score)
        if not math.isfinite(value):
            return {"failed": f"it gave {value}"}
    except (Exception, SystemExit) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"score": value, "result": _result(task, question, replies[-1])}


def _result(task: Task, question: Question, reply: str) -> str | None:
    """What a reply comes to; None where the task fails to say it, which takes nothing from the score."""
    try:
        result = task.result(question, reply)
        return None if result is None else str(result)
    except (Exception, SystemExit):
        return None


def main() -> None:
    """Answer until standard input ends; what goes wrong outside a judgement is left on standard error."""
    try:
        _serve()
    except BaseException:
        traceback.print_exc()
        # An ordinary end would wait for the thread that waits for input.
        os._exit(1)


def _serve() -> None:
    # What a judge prints must not reach the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _limit_memory()
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    tasks = [None if entry is None else build_task(entry) for entry in json.loads(requests.get())]
    tell({"ready": True})
    while True:
        r = json.loads(requests.get())
        task = tasks[r["task"]]
        assert task is not None
        tell(outcome(task, Question(**r["question"]), r["replies"], last=r["last"]))


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Read ahead in a thread, so that a judge that hangs still ends when the run has gone."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
