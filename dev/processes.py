"""
Servers as child processes: started on free ports, watched, and never left behind.

Tests, the demo and benchmarks drive real servers. What flows in is a command; what flows out is a
:class:`Server` that can be stopped, killed, suspended and started again, with its output in a log
file that every error quotes.

Nothing outlives its parent: each server is sent SIGKILL by the kernel when the parent dies, however
it dies (``PR_SET_PDEATHSIG``, through ``setpriv`` of util-linux). The trap: that signal fires on the
death of the *thread* that started the child, so all servers are started from one thread that lives
as long as the interpreter. Linux only.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

from typing_extensions import Self

__all__ = [
    "Process",
    "Server",
    "ServerDied",
    "Startable",
    "ToolMissing",
    "descendants",
    "free_port",
    "free_ports",
    "in_session",
    "process",
    "processes",
    "send_signal",
    "wait_until",
    "wait_until_async",
]

T = TypeVar("T")

_PORTS = range(20000, 30000)  # below Linux's ephemeral ports (32768-60999), which any connection may take
_reserved: dict[int, int] = {}  # port: descriptor that holds its lock


def _make_spawner() -> None:
    global _spawner
    _spawner = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


_spawner: concurrent.futures.ThreadPoolExecutor
_make_spawner()
os.register_at_fork(after_in_child=_make_spawner)  # the thread of the one there is stays with the parent


class ToolMissing(RuntimeError):
    """A program that developers need is not installed. The message says which, and how to get it."""


class ServerDied(RuntimeError):
    """A server ended while it was waited for."""


def free_port() -> int:
    """
    Return a TCP port of 127.0.0.1 that nobody listens on and that is reserved until this process ends.

    No two calls return the same port, in this process or in another one of the same user: each port
    has a lock file. So a server may be stopped and started again on its port.
    """
    directory = Path(tempfile.gettempdir()) / f"durable-spark-ports-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    for port in random.sample(_PORTS, len(_PORTS)):
        if port not in _reserved and _reserve(directory / str(port), port):
            return port
    raise RuntimeError(f"no free port in {_PORTS.start}-{_PORTS.stop - 1}")


def free_ports(count: int) -> list[int]:
    """Return as many different ports, as :func:`free_port` does."""
    return [free_port() for _ in range(count)]


def _reserve(lock: Path, port: int) -> bool:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except OSError:
        os.close(descriptor)
        return False
    _reserved[port] = descriptor
    return True


class Server:
    """
    One child process in a session of its own, and its descendants there.

    :param name: for error messages.
    :param command: the program and its arguments.
    :param log: the file that its output is appended to.
    :param env: the whole environment; that of this process when ``None``.
    :param cwd: its working directory.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.command = [str(part) for part in command]
        self.log = log
        self.env = env
        self.cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Server {self.name}, pid {self._process.pid if self._process else None}>"

    @property
    def pid(self) -> int:
        """The process ID, which is the session's ID, too."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; ``None`` while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start the process; also again after it has ended."""
        if self.alive:
            raise RuntimeError(f"{self.name} runs already")
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ToolMissing("setpriv is not on the PATH: install util-linux")
        command = [setpriv, "--pdeathsig", "KILL", *self.command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            spawned = _spawner.submit(
                subprocess.Popen,
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
            )
            self._process = spawned.result()

    def stop(self, *, deadline: float = 10.0) -> None:
        """Send SIGTERM, after ``deadline`` seconds SIGKILL; return when nothing of the session lives."""
        if self.alive:
            os.kill(self.pid, signal.SIGTERM)
            os.kill(self.pid, signal.SIGCONT)
            try:
                self._wait(deadline)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the process and its descendants; return when none of them lives."""
        if self._process is None:
            return
        until = time.monotonic() + 10
        while living := in_session(self.pid):
            if time.monotonic() > until:
                raise RuntimeError(f"{self.name}: processes {living} do not die")
            send_signal(living, signal.SIGKILL)
            time.sleep(0.01)
        self._wait(10)

    def suspend(self) -> None:
        """Send SIGSTOP to the process alone: its sockets stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT to the process."""
        os.kill(self.pid, signal.SIGCONT)

    def freeze(self) -> None:
        """Send SIGSTOP to the process and its descendants: the machine is cut off, and may come back."""
        frozen: set[int] = set()
        while new := set(in_session(self.pid)) - frozen:  # born while the others were listed
            send_signal(new, signal.SIGSTOP)
            frozen |= new

    def thaw(self) -> None:
        """Send SIGCONT to the process and its descendants."""
        send_signal(in_session(self.pid), signal.SIGCONT)

    def tail(self, lines: int = 30) -> str:
        """Return the last lines of the log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 65536))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def _wait(self, deadline: float) -> None:
        if self._process is not None:
            self._process.wait(deadline)


class Startable(abc.ABC):
    """What has servers: a context manager that starts them, and stops all of them, also when the start fails."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start everything; return when it can be used."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Stop everything, also what is only half started."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class Process(NamedTuple):
    """A process of this machine."""

    parent: int
    session: int


def process(pid: int) -> Process | None:
    """Return a process, ``None`` when it has ended, also as a zombie: init may be slow to reap what was orphaned."""
    try:
        # proc(5): "pid (comm) state ppid pgrp session ..."; comm may hold spaces and parentheses
        state, parent, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else Process(int(parent), int(session))


def processes() -> dict[int, Process]:
    """Return all processes of this machine by their IDs."""
    found = ((int(directory.name), process(int(directory.name))) for directory in Path("/proc").glob("[0-9]*"))
    return {pid: one for pid, one in found if one is not None}


def descendants(pid: int) -> list[int]:
    """Return a process and all that it or its children have started, as far as they are still linked."""
    among, found = processes(), [pid]
    for one in found:
        found += [child for child, process in among.items() if process.parent == one]
    return found


def in_session(session: int) -> list[int]:
    """Return the processes of a session."""
    return [pid for pid, one in processes().items() if one.session == session]


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each of the processes that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


patience = 1.0
"""
By how much deadlines are longer than they say.

Each says what is ample on a machine that has little else to do; a suite that keeps it busy sets this at its begin.
"""


def wait_until(
    condition: Callable[[], T | None],
    deadline: float,
    what: str,
    *,
    servers: Iterable[Server] = (),
    interval: float = 0.05,
) -> T:
    """
    Call ``condition`` until it returns something true, and return that.

    An :class:`OSError` (a refused connection, an HTTP error of urllib's) counts as "not yet".

    :param deadline: seconds; see :data:`patience`.
    :param what: what is waited for, for the error: ``"the master's page"``.
    :param servers: those that must live meanwhile; the errors quote their logs.
    :param interval: seconds between two calls.
    :raises TimeoutError: when the deadline has passed.
    :raises ServerDied: when one of the servers has ended.
    """
    servers, deadline = list(servers), deadline * patience
    until = time.monotonic() + deadline
    while True:
        try:
            seen: object = (value := condition())
            if value:
                return value
        except OSError as error:
            seen = error
        _give_up(what, deadline, until, seen, servers)
        time.sleep(interval)


async def wait_until_async(
    condition: Callable[[], Awaitable[T | None]],
    deadline: float,
    what: str,
    *,
    servers: Iterable[Server] = (),
    interval: float = 0.05,
) -> T:
    """Do as :func:`wait_until` does, with an asynchronous condition, without blocking the loop."""
    servers, deadline = list(servers), deadline * patience
    until = time.monotonic() + deadline
    while True:
        try:
            seen: object = (value := await condition())
            if value:
                return value
        except OSError as error:
            seen = error
        _give_up(what, deadline, until, seen, servers)
        await asyncio.sleep(interval)


def _give_up(what: str, deadline: float, until: float, seen: object, servers: Sequence[Server]) -> None:
    if dead := [server for server in servers if not server.alive]:
        ended = ", ".join(f"{server.name} ended with {server.returncode}" for server in dead)
        raise ServerDied(f"while waiting for {what}: {ended}\n{_tails(dead)}")
    if time.monotonic() > until:
        raise TimeoutError(f"waited {deadline:g} s for {what}, last saw {seen!r}\n{_tails(servers)}")


def _tails(servers: Iterable[Server]) -> str:
    return "\n".join(f"--- {server.name}: {server.log}\n{server.tail()}" for server in servers)
