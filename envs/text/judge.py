"""Judges in processes of their own: one that hangs is killed, one that dies is replaced, and no score is made up.

A judge reads what a policy wrote, and a policy under training writes anything: numbers that take a computer algebra
system hours, text that crashes a parser. Alarm signals only work in the main thread and only between two instructions
of Python; a process can always be killed.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from embodied_rl.envs.text.judge_process import outcome
from embodied_rl.envs.text.task import Question, Task
from embodied_rl.envs.text.tasks import Entry
from embodied_rl.errors import CapabilityError

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""For importing and building what the tasks need."""
TOLD = 3
"""Failures of one task that are told in the log; all of them are counted in rollout/invalid_rate."""


@dataclass(frozen=True)
class Case:
    """One conversation in which the policy has just replied."""

    task: int
    question: Question
    replies: Sequence[str]
    last: bool
    """No further reply is possible."""


class Judge:
    """One process, started when first asked and again after each death."""

    def __init__(self, entries: Sequence[Entry | None], seconds: float) -> None:
        """Remember what to judge; nothing runs yet.

        Args:
            entries: Of `env.tasks`; None for those that are never sent here.
            seconds: Wall time of one answer.
        """
        self.entries, self.seconds = entries, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, case: Case) -> dict[str, Any]:
        """What follows from the last reply, see `outcome`; {"failed": reason} also when the process hangs or dies."""
        if self._process is None:
            self._start()
        request = {"task": case.task, "question": asdict(case.question), "replies": case.replies, "last": case.last}
        answer = self._exchange(request, self.seconds)
        if answer is not None:
            return answer
        code = self._end()
        if code is None:
            return {"failed": f"it did not answer within {self.seconds:g} s (env.judge_seconds)"}
        return {"failed": f"its process died ({_told(code)})"}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._rest = b""
        # A session of its own: Ctrl-C asks the run to finish its update, which still needs judging, and all that
        # a judge starts can be killed with it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.judge_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        if self._exchange(self.entries, START_SECONDS) != {"ready": True}:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().split("\n")[-1]
            self._end()
            raise CapabilityError(f"the judges of env.tasks could not be started ({last or 'no answer'})")

    def _exchange(self, request: object, seconds: float) -> dict[str, Any] | None:
        """Send a line and read one; None when there is none in time, or no process."""
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._read_line(monotonic() + seconds)
        return None if line is None else dict(json.loads(line))

    def _read_line(self, deadline: float) -> bytes | None:
        assert self._process is not None and self._process.stdout is not None
        source = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = deadline - monotonic()
            if left <= 0 or not select.select([source], [], [], left)[0]:
                return None
            more = os.read(source, 65536)
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _end(self) -> int | None:
        """Make sure that the process is gone; its exit code when it had died by itself, else None."""
        process, self._process = self._process, None
        assert process is not None
        with suppress(subprocess.TimeoutExpired):
            # One that closed its pipe is about to exit.
            process.wait(0.2)
        code = process.poll()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, self._errors):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        return code


class Judges:
    """Judges all conversations of one step: tasks that cannot hang here, the others in processes side by side."""

    def __init__(
        self, tasks: Sequence[Task], entries: Sequence[Entry], names: Sequence[str], *, seconds: float, processes: int
    ) -> None:  # fmt: skip
        """Prepare; processes start when first needed.

        Args:
            tasks: Of the env.
            entries: From which a process builds them again.
            names: Of the tasks, for messages.
            seconds: Wall time of one answer.
            processes: How many work side by side.
        """
        self.tasks, self.names = tasks, names
        apart = [entry if task.isolated else None for task, entry in zip(tasks, entries, strict=True)]
        self._judges = [Judge(apart, seconds) for _ in range(processes if any(t.isolated for t in tasks) else 0)]
        self._told = [0] * len(tasks)

    def ask(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What follows in each conversation, in their order; see `outcome`."""
        answers: list[dict[str, Any] | None] = [None] * len(cases)
        apart: SimpleQueue[int] = SimpleQueue()
        for i, case in enumerate(cases):
            task = self.tasks[case.task]
            if task.isolated:
                apart.put(i)
            else:
                answers[i] = outcome(task, case.question, case.replies, last=case.last)

        def work(judge: Judge) -> None:
            with suppress(Empty):
                while True:
                    i = apart.get_nowait()
                    answers[i] = judge.ask(cases[i])

        if len(self._judges) == 1:
            work(self._judges[0])
        elif not apart.empty():
            with ThreadPoolExecutor(len(self._judges)) as pool:
                list(pool.map(work, self._judges))
        whole = [a for a in answers if a is not None]
        assert len(whole) == len(cases)
        for case, answer in zip(cases, whole, strict=True):
            if "failed" in answer:
                self._tell(case.task, answer["failed"])
        return whole

    def close(self) -> None:
        """End all processes; may be called twice."""
        for judge in self._judges:
            judge.close()

    def _tell(self, task: int, reason: str) -> None:
        self._told[task] += 1
        if self._told[task] <= TOLD:
            more = "; further ones are only counted, in rollout/invalid_rate" if self._told[task] == TOLD else ""
            log.warning("the judge of task '%s' failed (%s): the episode is void%s", self.names[task], reason, more)


def _told(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
