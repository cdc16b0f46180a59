"""
Numbers the exchanges between a process and all that is not that process, and kills it at one of them.

What flows in: an :class:`Exchange` for each message, request and local act, from whoever carries it (the supervisors
of :mod:`tests.crash.inprocess`, the :mod:`dev.proxy` before a cluster); and a plan, which says at which of them the
process dies, and how. What flows out: the exchanges in their order, and at which it died. Nobody is told how many there
are.

The trap: a process that is dead may have sent what has not been read yet. What belongs to it is neither passed on nor
numbered.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from dev.processes import descendants, wait_until

__all__ = ["Exchange", "Interposer", "Kill", "Way"]


_CLUSTER = "cluster: "
_QUESTIONS = (f"{_CLUSTER}GET ", "machine: start curl")  # upstream's operator asks with a program
_PART = ", a part"
_PERIOD = 3
"""How many different questions a poll may consist of."""


class Way(enum.Enum):
    """When in an exchange the process is killed."""

    BEFORE = "before the request leaves"
    ACTED = "acted upon, not answered"
    AFTER = "after the answer"


class Kill(NamedTuple):
    """One death: at an exchange, counted from 1 since the last death, or since the task began."""

    exchange: int
    way: Way
    later: float = 0.0
    """Seconds by which it comes after that: an instant in the life of the program that an exchange has started."""
    what: str = ""
    """In the place of the number: the exchange of this name."""

    def __str__(self) -> str:
        return f"{self.what or self.exchange}/{self.way.name.lower()}" + (
            f"+{self.later * 1000:.0f}ms" if self.later else ""
        )


class Exchange:
    """One exchange. Each method says whether it goes on: after a ``False`` nothing more is to be passed on."""

    def __init__(self, interposer: Interposer, what: str, life: int, number: int, *, stream: bool = False) -> None:
        self.what = what
        self._stream = stream
        self._opened = False
        self._interposer = interposer
        self._life = life
        self._number = number

    def leaves(self) -> bool:
        """The request has come, and would be passed on."""
        return self._goes_on(Way.BEFORE)

    def answered(self) -> bool:
        """The far side has acted, and its answer would be passed on."""
        return self._goes_on(Way.ACTED)

    def part(self) -> Exchange | None:
        """A part of the answer has come: an exchange of its own, if this one is a stream, as a watch is."""
        if not self._stream:
            return None
        opened, self._opened = self._opened, True
        if not opened and not self.over():  # a stream has been answered when its first part comes
            return Exchange(self._interposer, self.what, -1, 0)
        return self._interposer.exchange(self.what + _PART, life=self._life)

    def over(self) -> bool:
        """The answer has been passed on."""
        return self._goes_on(Way.AFTER)

    def _goes_on(self, way: Way) -> bool:
        return self._interposer._goes_on(self._life, self._number, way)


class Interposer:
    """
    Counts the exchanges of the process that is watched, and kills it as planned.

    :ivar instead: kills the cluster's server in the place of the process, which lives on. Only what it asks the cluster
        for is numbered then.
    :ivar repeats: whether a question that is asked again and again (a poll) counts each time, or only the first time.
    :ivar crossed: the exchanges of each life, from one death to the next: what they were, in their order.
    :ivar times: when each of them came, by ``time.monotonic()``.
    :ivar killed: at which of them it was killed, in their own words.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pid: int | None = None
        self._end: Callable[[str], None] | None = None
        self._life = 0
        self._plan: list[Kill] = []
        self._number = 0
        self.repeats = True
        self.instead: Callable[[], None] | None = None
        self.crossed: list[list[str]] = [[]]
        self.times: list[list[float]] = [[]]
        self.killed: list[str] = []

    def plan(self, kills: Sequence[Kill]) -> None:
        """Begin a case, with nothing watched."""
        with self._lock:
            self._pid, self._plan, self._number = None, list(kills), 0
            self.crossed, self.times, self.killed = [[]], [[]], []

    def watch(self, pid: int, kill: Callable[[str], None] | None = None) -> None:
        """
        Watch a process, the one that lives now.

        :param kill: how it is killed, given at which exchange, if not it alone is.
        """
        with self._lock:
            self._pid, self._end = pid, kill
            self._life += 1

    def ended(self, pid: int) -> None:
        """Say that a process has ended: what still comes of it is not to be passed on."""
        with self._lock:
            if self._pid == pid:
                self._pid = None

    @property
    def watching(self) -> bool:
        """Whether a process is watched that lives."""
        return self._pid is not None

    @property
    def life(self) -> int:
        """Which of the processes that were ever watched lives now; for :meth:`exchange`."""
        return self._life

    def exchange(self, what: str, *, life: int | None = None, stream: bool = False) -> Exchange:
        """
        Number an exchange.

        :param what: for people.
        :param life: of which process it is, where that is known; else of the one that lives now.
        :param stream: whether each part of the answer counts as an exchange, too.
        """
        with self._lock:
            if self._pid is None or life not in (None, self._life):
                return Exchange(self, what, -1, 0)
            if self.instead is not None and not what.startswith(_CLUSTER):
                return Exchange(self, what, self._life, 0)
            if not self.repeats and _is_question(what) and what in self._asked():
                return Exchange(self, what, self._life, 0, stream=stream)
            self._number += 1
            self.crossed[-1].append(what)
            self.times[-1].append(time.monotonic())
            return Exchange(self, what, self._life, self._number, stream=stream)

    def _asked(self) -> Sequence[str]:
        """Return the last few questions, since something else was done: by then they are others."""
        asked = itertools.takewhile(_is_question, reversed(self.crossed[-1]))
        return list(itertools.islice(asked, _PERIOD))

    def settle(self, act: Exchange) -> None:
        """
        Kill as planned in an act on the process's own machine, which has just been allowed.

        Nobody answers it, so what stands for the other two ways is this instant, or for a program that is started when
        it is there, and when it has started another.
        """
        for children, goes_on in ((1, act.answered), (2, act.over)):
            if self._is_due(act) and act.what.startswith("machine: start "):
                with contextlib.suppress(TimeoutError):
                    wait_until(partial(self._has, children), 10, "what it starts", interval=0.002)
            if not goes_on():
                return

    def _has(self, children: int) -> bool:
        pid = self._pid
        return pid is None or len(descendants(pid)) > children

    def _is_due(self, exchange: Exchange) -> bool:
        with self._lock:
            return bool(self._plan) and self._is_at(self._plan[0], exchange._number)

    def _is_at(self, kill: Kill, number: int) -> bool:
        if kill.what and number:
            return self.crossed[-1][number - 1] == kill.what
        return kill.exchange == number

    def _goes_on(self, life: int, number: int, way: Way) -> bool:
        with self._lock:
            if self._pid is None or life != self._life:
                return False
            if not self._plan or self._plan[0].way is not way or not self._is_at(self._plan[0], number):
                return True
            kill = self._plan.pop(0)
            said = f"{way.value}: {self.crossed[-1][number - 1]}"
            if self.instead is not None:
                self.killed.append(said)
                self.instead()
                return way is Way.AFTER
            if not kill.later:
                self._kill(said)
                return False
            timer = threading.Timer(kill.later, self._kill_later, (life, f"{kill.later:.2f} s after {said}"))
            timer.daemon = True
            timer.start()
            return True

    def _kill_later(self, life: int, said: str) -> None:
        with self._lock:
            if self._pid is not None and life == self._life:
                self._kill(said)

    def _kill(self, said: str) -> None:
        assert self._pid is not None
        if self._end is not None:
            self._end(said)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._pid = None
        self.killed.append(said)
        self.crossed.append([])
        self.times.append([])
        self._number = 0


def _is_question(what: str) -> bool:
    return what.startswith(_QUESTIONS) and not what.endswith(_PART)
