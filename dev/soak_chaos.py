"""
What dies in a soak, and when: a timeline that is drawn from a seed, and the threads that carry it out.

What flows in: a seed, and the parts of Airflow and of the clusters. What flows out: :attr:`Chaos.done`, what was done
when. At the end of each act its target runs again; a part of Airflow that dies by itself, as its scheduler does
without a database, is started again as a service manager would.

The trap: of LocalExecutor's two processes for a task neither is told by its parent, as schedulers die, too. They are
told by their title, and must be of a session that a scheduler here has begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg2  # type: ignore[import-untyped]

from dev.processes import Server, descendants, in_session, processes, send_signal

if TYPE_CHECKING:
    from dev.airflow import Airflow
    from dev.kubernetes import KubernetesCluster
    from dev.postgres import Postgres
    from dev.spark import StandaloneCluster
    from dev.yarn import YarnCluster

__all__ = ["ACTS", "Act", "Chaos", "Done", "Parts", "draw", "title"]

_EVERY = 10.0
"""Seconds between two acts, on average."""
_REST = 15.0
"""Seconds that a target is left alone after an act."""
_WORKER = b"airflow worker -- LocalExecutor"
_IDLE = b"<idle>"


class Act(NamedTuple):
    """
    One act of the timeline.

    :param at: seconds after the begin.
    :param seconds: how long it lasts.
    """

    at: float
    name: str
    target: str
    seconds: float


class Kind(NamedTuple):
    """
    One kind of act.

    :param targets: what it is done to, one of them at a time.
    :param weight: how often, beside the others.
    :param seconds: how long it lasts, at least and at most.
    """

    targets: tuple[str, ...]
    weight: int
    seconds: tuple[float, float]


_TRIGGERERS = ("triggerer", "triggerer-2")
_SCHEDULERS = ("scheduler", "scheduler-2")

ACTS: Mapping[str, Kind] = {
    # of Airflow; a triggerer is missed after 12 s, a scheduler after 30, a task after 40
    "triggerer killed": Kind(_TRIGGERERS, 6, (1, 15)),
    "triggerer terminated": Kind(_TRIGGERERS, 3, (2, 10)),
    "triggerer stopped": Kind(_TRIGGERERS, 5, (14, 30)),
    "scheduler killed, with its workers": Kind(_SCHEDULERS, 4, (1, 15)),
    "scheduler killed, its workers live on": Kind(_SCHEDULERS, 3, (30, 50)),
    "scheduler stopped": Kind(_SCHEDULERS, 3, (32, 50)),
    "task's process killed": Kind(("task",), 8, (0, 1.5)),
    "task's supervisor killed": Kind(("task",), 5, (0, 1.5)),
    "both processes of a task killed": Kind(("task",), 4, (0, 1.5)),
    "processes of a task stopped": Kind(("suspended task",), 5, (42, 60)),
    "API server killed": Kind(("api-server",), 3, (0, 8)),
    "API server stopped": Kind(("api-server",), 2, (3, 20)),
    "Dag processor killed": Kind(("dag-processor",), 1, (0, 10)),
    "database killed": Kind(("database",), 2, (1, 10)),
    "database stopped": Kind(("database",), 2, (3, 15)),
    "database connections cut": Kind(("database",), 4, (0, 0)),
    # of the clusters
    "Kubernetes API server killed": Kind(("kubernetes",), 4, (1, 20)),
    "Kubernetes API server stopped": Kind(("kubernetes",), 3, (3, 30)),
    "Kubernetes node stopped": Kind(("kubernetes-node",), 2, (3, 20)),
    "standalone master killed": Kind(("master",), 3, (1, 20)),
    "standalone master stopped": Kind(("master",), 2, (3, 20)),
    "standalone worker stopped": Kind(("standalone-worker",), 1, (3, 20)),
    "ResourceManager killed": Kind(("resource-manager",), 3, (1, 20)),
    "ResourceManager stopped": Kind(("resource-manager",), 2, (3, 20)),
    "NodeManager killed": Kind(("node-manager",), 2, (1, 15)),
}


def draw(seed: str, seconds: float) -> list[Act]:
    """Return the timeline of a seed: no two acts on one target at the same time, all of them over in time."""
    rng = random.Random(f"{seed} acts")
    names, weights = list(ACTS), [kind.weight for kind in ACTS.values()]
    free: dict[str, float] = {}
    acts: list[Act] = []
    at = 0.0
    while (at := at + rng.expovariate(1 / _EVERY)) < seconds:
        (name,) = rng.choices(names, weights)
        target, lasts = rng.choice(ACTS[name].targets), rng.uniform(*ACTS[name].seconds)
        if at >= free.get(target, 0.0) and at + lasts < seconds:
            acts.append(Act(round(at, 1), name, target, round(lasts, 1)))
            free[target] = at + lasts + (0.0 if "task" in target else _REST)
    return acts


@dataclasses.dataclass(frozen=True)
class Parts:
    """All that can be hit."""

    airflow: Airflow
    postgres: Postgres
    kubernetes: KubernetesCluster
    standalone: StandaloneCluster
    yarn: YarnCluster

    def servers(self) -> dict[str, Server]:
        """Return the servers by the names that targets have."""
        return {
            **{server.name: server for server in self.airflow.servers},
            "database": self.postgres.server,
            "kubernetes": self.kubernetes.api_server,
            "kubernetes-node": self.kubernetes.node,
            "etcd": self.kubernetes.etcd,
            "master": self.standalone.master.server,
            "standalone-worker": self.standalone.workers[0].server,
            "resource-manager": self.yarn.managers[0].server,
            "node-manager": self.yarn.node,
        }


@dataclasses.dataclass(frozen=True)
class Done:
    """
    An act that was carried out.

    :param began: in seconds since the epoch, as is ``ended``.
    :param about: what it hit, where that is decided only then.
    """

    act: Act
    began: float
    ended: float
    about: str

    def __str__(self) -> str:
        return f"{self.act.name}: {self.about or self.act.target}, {self.ended - self.began:.1f} s"


class Chaos:
    """
    Carries out a timeline; a context manager, at whose end everything runs again.

    :param say: is told what was done.
    """

    def __init__(self, parts: Parts, acts: Sequence[Act], say: Callable[[Done], None]) -> None:
        self.parts = parts
        self.acts = acts
        self.done: list[Done] = []
        self.missed: list[Act] = []
        """Acts on a task's process that found none in time."""
        self.restarted: dict[str, int] = {}
        """How often a part had died by itself and was started again."""
        self.failed: list[str] = []
        self._say = say
        self._servers = parts.servers()
        self._down: set[str] = set()
        self._lock = threading.Lock()
        self._sessions: set[int] = set()
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._acting = ThreadPoolExecutor(16, thread_name_prefix="act")
        self._pending: list[Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="chaos")
        self._do: dict[str, Callable[[Act], str]] = {
            "triggerer killed": self._kill,
            "triggerer terminated": self._terminate,
            "triggerer stopped": self._freeze,
            "scheduler killed, with its workers": self._kill,
            "scheduler killed, its workers live on": self._kill_main,
            "scheduler stopped": self._suspend,
            "task's process killed": self._kill_runner,
            "task's supervisor killed": self._kill_supervisor,
            "both processes of a task killed": self._kill_both,
            "processes of a task stopped": self._stop_task,
            "API server killed": self._kill,
            "API server stopped": self._freeze,
            "Dag processor killed": self._kill,
            "database killed": self._kill_database,
            "database stopped": self._freeze,
            "database connections cut": self._cut_database,
            "Kubernetes API server killed": self._kill,
            "Kubernetes API server stopped": self._freeze,
            "Kubernetes node stopped": self._suspend,  # and not the pods, which are its children
            "standalone master killed": self._kill,
            "standalone master stopped": self._freeze,
            "standalone worker stopped": self._suspend,
            "ResourceManager killed": self._kill,
            "ResourceManager stopped": self._freeze,
            "NodeManager killed": self._kill_main,
        }

    def __enter__(self) -> Chaos:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._closing.set()
        self._thread.join()
        self._acting.shutdown()

    def stop(self) -> None:
        """Begin no act any more, end those that last, and return when all that they hit is up again."""
        self._stopping.set()
        for act in list(self._pending):
            act.result()

    # The timeline

    def _run(self) -> None:
        begun = time.monotonic()
        left = list(self.acts)
        while not self._closing.wait(0.2):
            self._keep_up()
            if left and not self._stopping.is_set() and time.monotonic() - begun >= left[0].at:
                self._pending.append(self._acting.submit(self._perform, left.pop(0)))

    def _keep_up(self) -> None:
        with self._lock:
            self._sessions.update(scheduler.pid for scheduler in self.parts.airflow.schedulers)
            for name, server in self._servers.items():
                if name in self._down or server.alive:
                    continue
                self.restarted[name] = self.restarted.get(name, 0) + 1
                if name != "node-manager":  # its containers are to live on
                    server.kill()
                server.start()

    def _perform(self, act: Act) -> None:
        began = time.time()
        try:
            about = self._do[act.name](act)
        except _NoTask:
            self.missed.append(act)
            return
        except Exception as error:
            self.failed.append(f"{act.name} ({act.target}): {error!r}")
            return
        done = Done(act, began, time.time(), about)
        self.done.append(done)
        self._say(done)

    def _last(self, act: Act) -> None:
        self._stopping.wait(act.seconds)

    @contextlib.contextmanager
    def _down_for(self, act: Act) -> Iterator[Server]:
        """For the length of the block nobody else starts the act's target again."""
        with self._lock:
            self._down.add(act.target)
        try:
            yield self._servers[act.target]
        finally:
            with self._lock:
                self._down.discard(act.target)

    # The acts

    def _kill(self, act: Act) -> str:
        with self._down_for(act) as server:
            server.kill()
            self._last(act)
            server.start()
        return ""

    def _terminate(self, act: Act) -> str:
        with self._down_for(act) as server:
            server.stop(deadline=act.seconds)
            server.start()
        return ""

    def _kill_main(self, act: Act) -> str:
        """Kill the process alone; what it has started lives on until the end of the act, a NodeManager's for ever."""
        with self._down_for(act) as server:
            old = server.pid
            send_signal([old], signal.SIGKILL)
            while server.alive:
                time.sleep(0.01)
            if act.target == "node-manager":
                self._last(act)
                server.start()
                return ""
            server.start()
        self._last(act)
        send_signal(in_session(old), signal.SIGKILL)
        return ""

    def _freeze(self, act: Act) -> str:
        frozen = descendants(self._servers[act.target].pid)
        send_signal(frozen, signal.SIGSTOP)
        self._last(act)
        send_signal(frozen, signal.SIGCONT)
        return ""

    def _suspend(self, act: Act) -> str:
        pid = self._servers[act.target].pid
        send_signal([pid], signal.SIGSTOP)
        self._last(act)
        send_signal([pid], signal.SIGCONT)
        return ""

    def _kill_database(self, act: Act) -> str:
        with self._down_for(act):
            self.parts.postgres.kill()
            self._last(act)
            self.parts.postgres.start()
        return ""

    def _cut_database(self, act: Act) -> str:
        ((cut,),) = self.parts.postgres.query(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity "
            "where pid <> pg_backend_pid() and backend_type = 'client backend'",
        )
        return f"{cut} of them"

    def _kill_runner(self, act: Act) -> str:
        task = self._task(act.seconds)
        send_signal([task.runner], signal.SIGKILL)
        return self._name_of(task)

    def _kill_supervisor(self, act: Act) -> str:
        task = self._task(act.seconds)
        send_signal([task.supervisor], signal.SIGKILL)
        return self._name_of(task)

    def _kill_both(self, act: Act) -> str:
        task = self._task(act.seconds)
        send_signal([task.supervisor, task.runner], signal.SIGKILL)
        return self._name_of(task)

    def _stop_task(self, act: Act) -> str:
        """Stop all processes of a task for so long that Airflow calls it dead, and let them go on."""
        task = self._task(0.0)
        stopped = descendants(task.supervisor)
        send_signal(stopped, signal.SIGSTOP)
        name = self._name_of(task)  # its next try will have another ID
        self._last(act)
        send_signal(reversed(stopped), signal.SIGCONT)
        return name

    def _task(self, delay: float) -> _Task:
        """
        Return a task whose code runs now, and ran a moment ago: one at random, or the next that begins.

        :raises _NoTask: when there was none for a while.
        """
        until = time.monotonic() + 30
        while not self._stopping.is_set() and time.monotonic() < until:
            if running := self._tasks():
                task = random.choice(running)  # by an order of IDs that no seed knows
                self._stopping.wait(delay)
                if task in self._tasks():
                    return task
            time.sleep(0.05)
        raise _NoTask

    def _tasks(self) -> list[_Task]:
        among = processes()
        titles = {pid: title(pid) for pid, process in among.items() if process.session in self._sessions}
        workers = {pid: its for pid, its in titles.items() if its.startswith(_WORKER) and _IDLE not in its}
        return [
            _Task(pid, process.parent, workers[process.parent].decode(errors="replace").strip("\0 ").split()[-1])
            for pid, process in among.items()
            if process.parent in workers
        ]

    def _name_of(self, task: _Task) -> str:
        """Return which task of which run it is, or its ID when the database does not answer."""
        name = "concat_ws(' ', run_id, task_id, nullif(map_index, -1), 'try', try_number)"
        with contextlib.suppress(psycopg2.OperationalError):
            query = f"select {name} from task_instance where cast(id as text) = %(id)s"
            for (found,) in self.parts.postgres.query(query, id=task.ti_id):
                return str(found)
        return task.ti_id


def title(pid: int) -> bytes:
    """Return a process' command line, of which it may have made a title; nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class _NoTask(Exception):
    """No task ran."""


class _Task(NamedTuple):
    runner: int
    supervisor: int
    ti_id: str
