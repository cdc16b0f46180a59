"""
An Airflow in this process, for lives of tasks that cost seconds: all is Airflow's own but the scheduler.

Each try runs in Airflow's task runner, under Airflow's supervisor, each trigger in its TriggerRunner under its
supervisor; both supervisors run here and talk with Airflow's execution API, which answers in this process from a
SQLite database. So the store fences, a deferral, an event and a retry are what they are in a deployment. What a
scheduler does in between is done by :class:`Life`: a try is queued when the last one is up for retry, or when an event
has come.

What a task's or a trigger's process asks Airflow for goes by :meth:`Interposer.exchange`, which may kill it there; so
does what the process does on its own machine (starts a program, sends a signal, writes a file), of which Python's audit
events tell.

The trap: processes are forked from this one, as Airflow's are. What they are to find in their environment must be set
before, and who kills is another thread of this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.airflow import migrated_database

if TYPE_CHECKING:
    from tests.crash.interposer import Exchange, Interposer

__all__ = ["TASK", "Airflow", "Life", "Stuck"]

TASK = "job"
_TICK = 0.1
_DAG_FILE = "lives.py"
_BUNDLE = "dags-folder"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_ACTS = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.kill", "os.killpg"}


class Stuck(TimeoutError):
    """A task has not ended in time."""


class Airflow:
    """
    The Airflow of this process. There is one, where ``AIRFLOW_HOME`` says.

    :param dag_file: the source of the Dags, each with one task of the name :data:`TASK`.
    :param connections: Airflow connections by ID, in their JSON form.
    """

    def __init__(self, dag_file: str, connections: Mapping[str, Mapping[str, Any]], interposer: Interposer) -> None:
        self.home = Path(os.environ["AIRFLOW_HOME"])
        self.interposer = interposer
        self._dag_file = dag_file
        self._connections = connections

    def prepare(self) -> None:
        """Make a database, with the Dags and the connections in it."""
        os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
        os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "server"  # whose connections are in the database
        self.home.mkdir(parents=True, exist_ok=True)
        shutil.copy(migrated_database(), self.home / "airflow.db")
        with contextlib.closing(sqlite3.connect(self.home / "airflow.db")) as connection:
            # Kept in the file: who reads does not lock out who writes. What is written need not outlive the machine.
            connection.execute("PRAGMA journal_mode=WAL")
        folder = self.home / "dags"
        folder.mkdir(exist_ok=True)
        (folder / _DAG_FILE).write_text(self._dag_file)

        from airflow.dag_processing.bundles.manager import DagBundlesManager
        from airflow.dag_processing.dagbag import BundleDagBag, sync_bag_to_db
        from airflow.models.connection import Connection
        from airflow.sdk.execution_time.supervisor import InProcessTestSupervisor
        from airflow.utils.session import create_session

        manager = DagBundlesManager()  # type: ignore[no-untyped-call]
        with create_session() as session:
            manager.sync_bundles_to_db(session=session)
            for name, parts in self._connections.items():
                session.add(Connection.from_json(json.dumps(parts), conn_id=name))
        bundle = manager.get_bundle(_BUNDLE)
        bundle.initialize()
        bag = BundleDagBag(dag_folder=bundle.path, bundle_path=bundle.path, bundle_name=bundle.name)
        if bag.import_errors:
            raise RuntimeError(f"the Dags cannot be imported: {bag.import_errors}")
        sync_bag_to_db(bag, bundle.name, bundle.version)
        self.client = InProcessTestSupervisor._api_client()

    def close(self) -> None:
        """Remove the database."""
        from airflow import settings

        if settings.engine is not None:
            settings.engine.dispose()  # a connection that is kept would go on reading the file
        (self.home / "airflow.db").unlink(missing_ok=True)

    def live(self, dag_id: str, run_id: str, conf: Mapping[str, Any]) -> Life:
        """Begin a run of a Dag, with these values for its templates. What it starts has its ID in the environment."""
        import pendulum
        from airflow.models.serialized_dag import SerializedDagModel
        from airflow.utils.session import create_session
        from airflow.utils.types import DagRunTriggeredByType, DagRunType

        os.environ["CRASH_RUN"] = run_id
        with create_session() as session:
            dag: Any = SerializedDagModel.get_dag(dag_id, session=session)
            now = pendulum.now("UTC")
            run = dag.create_dagrun(
                run_id=run_id,
                logical_date=now,
                data_interval=(now, now),
                run_after=now,
                conf=dict(conf),
                run_type=DagRunType.MANUAL,
                triggered_by=DagRunTriggeredByType.TEST,
                state="running",
                session=session,
            )
            run.verify_integrity(session=session, dag_version_id=run.created_dag_version_id)
        return Life(self, dag_id, run_id)


class Life:
    """
    A task instance, from its first try to its end.

    :ivar processes: how many processes it has had: tries, triggers, resumes.
    """

    waits = True

    def __init__(self, airflow: Airflow, dag_id: str, run_id: str) -> None:
        self.dag_id, self.run_id = dag_id, run_id
        self.processes = 0
        self._airflow = airflow
        self._interposer = airflow.interposer

    def live(self, deadline: float, *, at_death: Callable[[], None]) -> str:
        """
        Run the task to its end, and return its state: ``success`` or ``failed``.

        :param deadline: seconds, for the whole.
        :param at_death: called when a process was killed, before another is started.
        """
        until = time.monotonic() + deadline
        while True:
            state = self.state
            if state in ("success", "failed"):
                return state
            if time.monotonic() > until:
                raise Stuck(f"{self.run_id} has not ended in {deadline:g} s: it is {state}")
            self.processes += 1
            deaths = len(self._interposer.killed)
            if state == "deferred":
                self._follow(until)
            else:
                self._try(until, anew=state != "scheduled")
            if len(self._interposer.killed) > deaths:
                at_death()

    @property
    def state(self) -> str:
        """The state of the task instance, ``""`` if it has none yet."""
        (row,) = self._query("SELECT state FROM task_instance WHERE dag_id = :dag AND run_id = :run")
        return row[0] or ""

    @property
    def tries(self) -> int:
        """How many tries it has had."""
        ((tries,),) = self._query("SELECT try_number FROM task_instance WHERE dag_id = :dag AND run_id = :run")
        return int(tries)

    def store(self) -> dict[str, Any]:
        """Return what is in the task state store."""
        rows = self._query("SELECT key, value FROM task_state_store WHERE dag_id = :dag AND run_id = :run")
        return {key: json.loads(value) for key, value in rows}

    def log(self) -> str:
        """Return the messages of all tries and triggers."""
        files = sorted((self._airflow.home / "logs").rglob("*"), key=lambda file: file.stat().st_mtime)
        told = []
        for file in files:
            if file.is_file() and self.run_id in str(file):
                for line in file.read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError):
                        entry = json.loads(line)
                        told.append(
                            (str(entry.get("timestamp")), f"{entry.get('event')} {entry.get('error_detail') or ''}")
                        )
        return "\n".join(" ".join(each) for each in sorted(told))

    # What a scheduler, an executor and a triggerer do

    def _try(self, until: float, *, anew: bool) -> None:
        from airflow.executors.workloads import BundleInfo, TaskInstanceDTO
        from airflow.sdk.api.client import ServerResponseError
        from airflow.sdk.execution_time.supervisor import _configure_logging
        from airflow.utils.session import create_session

        with create_session() as session:
            instance = self._instance(session)
            instance.try_number += anew
            instance.state = "queued"
            session.flush()
            workload = TaskInstanceDTO.model_validate(instance, from_attributes=True)
        logger, file = _configure_logging(f"{self.run_id}.log", self._airflow.client)
        with file, _LocalActs(self._interposer) as acts:
            process = _task_supervisor(self._interposer).start(
                what=workload,
                dag_rel_path=_DAG_FILE,
                bundle_info=BundleInfo(name=_BUNDLE, version=None),
                client=self._airflow.client,
                target=acts.told_of(_run_task),
                logger=logger,
            )
            with _killed_at(until, process.pid), contextlib.suppress(ServerResponseError):
                process.wait()  # an end that comes after what the server knows already is refused
            self._interposer.ended(process.pid)

    def _follow(self, until: float) -> None:
        from airflow.jobs.job import Job
        from airflow.utils.session import create_session

        with create_session() as session:
            job: Any = Job(job_type="TriggererJob", state="running")  # type: ignore[no-untyped-call]
            session.add(job)
            session.flush()
            session.expunge(job)
        with _LocalActs(self._interposer) as acts:
            supervisor = _trigger_supervisor(self._airflow, acts).start(job=job, capacity=10)
            self._interposer.watch(supervisor.pid)
            try:
                while self.state == "deferred" and supervisor.is_alive() and time.monotonic() < until:
                    supervisor.run_once()
            finally:
                self._interposer.ended(supervisor.pid)
                supervisor.kill(signal.SIGKILL)
                supervisor._cleanup_open_sockets()
        with create_session() as session:
            job = session.get(Job, job.id)
            job.state, job.end_date = "failed", job.latest_heartbeat

    def _instance(self, session: Any) -> Any:
        from airflow.models.taskinstance import TaskInstance
        from sqlalchemy import select

        return session.scalar(select(TaskInstance).filter_by(dag_id=self.dag_id, run_id=self.run_id))

    def _query(self, statement: str) -> list[Any]:
        from airflow.utils.session import create_session
        from sqlalchemy import text

        with create_session() as session:
            return list(session.execute(text(statement), {"dag": self.dag_id, "run": self.run_id}))


def _run_task() -> None:
    from airflow.sdk.execution_time.supervisor import _subprocess_main

    os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "client"
    _subprocess_main()


class _Carried:
    """What both supervisors do with a message: it is an exchange, if it asks Airflow for something."""

    interposer: Interposer
    _current: Exchange | None = None

    def _handle_request(self, msg: Any, log: Any, req_id: int) -> None:
        if (what := self._asks(msg)) is not None:
            exchange = self.interposer.exchange(what)
            if not exchange.leaves():
                return
            self._current = exchange
        super()._handle_request(msg, log, req_id)  # type: ignore[misc]

    def send_msg(self, msg: Any, request_id: int, error: Any = None, **options: Any) -> None:
        exchange, self._current = self._current, None
        if exchange and not exchange.answered():
            return
        super().send_msg(msg, request_id, error, **options)  # type: ignore[misc]
        if exchange:
            exchange.over()

    def _service_subprocess(
        self, max_wait_time: float, raise_on_timeout: bool = False, expect_signal: int | None = None
    ) -> Any:
        # Airflow notices only at the next tick that a process has ended that closed its sockets before.
        tick = min(max_wait_time, _TICK)
        return super()._service_subprocess(tick, raise_on_timeout, expect_signal)  # type: ignore[misc]

    def _asks(self, msg: Any) -> str | None:
        name = type(msg).__name__
        detail = next((str(getattr(msg, part)) for part in ("key", "conn_id", "state") if hasattr(msg, part)), "")
        return None if name == "MaskSecret" else f"Airflow: {name} {detail}".rstrip()


def _task_supervisor(interposer: Interposer) -> Any:
    from airflow.sdk.execution_time.supervisor import ActivitySubprocess

    class Supervisor(_Carried, ActivitySubprocess):
        def _on_child_started(self, **details: Any) -> None:
            self.interposer.watch(self.pid)
            super()._on_child_started(**details)

    Supervisor.interposer = interposer
    return Supervisor


def _trigger_supervisor(airflow: Airflow, acts: _LocalActs) -> Any:
    from airflow.jobs.triggerer_job_runner import TriggerRunnerSupervisor

    class Supervisor(_Carried, TriggerRunnerSupervisor):
        @classmethod
        def run_in_process(cls) -> None:
            acts.told_of(super().run_in_process)()

        def make_client(self) -> Any:
            return airflow.client

        def heartbeat(self) -> None:
            """Do without: it sleeps, and nobody else would take the triggers over."""

        def _asks(self, msg: Any) -> str | None:
            if type(msg).__name__ != "TriggerStateChanges":
                return super()._asks(msg)
            return "Airflow: an event" if msg.events or msg.failures else None

        def send_msg(self, msg: Any, request_id: int, error: Any = None, **options: Any) -> None:
            if self._current:  # what was asked for is done, also with an event, before it is answered
                self.handle_events()  # type: ignore[no-untyped-call]
                self.handle_failed_triggers()  # type: ignore[no-untyped-call]
            super().send_msg(msg, request_id, error, **options)

    Supervisor.interposer = airflow.interposer
    return Supervisor


class _LocalActs:
    """
    Hears of what a forked process does on its own machine, just before it does so.

    Python's audit events tell of it. The process waits for a byte before it goes on.
    """

    def __init__(self, interposer: Interposer) -> None:
        self._interposer = interposer
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="local-acts", daemon=True)

    def __enter__(self) -> _LocalActs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._theirs.close()
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._ours.close()

    def told_of(self, target: Callable[[], None]) -> Callable[[], None]:
        """Return what to run in the forked process."""

        def run() -> None:
            theirs, home, pid = self._theirs, os.environ["AIRFLOW_HOME"], os.getpid()

            def hear(event: str, arguments: tuple[Any, ...]) -> None:
                if (what := _local_act(event, arguments, home)) is None or os.getpid() != pid:
                    return
                theirs.sendall(what.encode(errors="replace")[:500].replace(b"\n", b" ") + b"\n")
                theirs.recv(1)

            sys.addaudithook(hear)
            target()

        return run

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._ours.makefile("rb") as lines:
            for line in lines:
                exchange = self._interposer.exchange(f"machine: {line.decode().rstrip()}")
                if exchange.leaves():
                    self._ours.sendall(b".")
                    self._interposer.settle(exchange)


def _local_act(event: str, arguments: tuple[Any, ...], home: str) -> str | None:
    """Return what an audit event tells of, if it changes something outside of the process and of Airflow's own home."""
    if event == "subprocess.Popen":
        return f"start {Path(os.fsdecode(arguments[0])).name}"
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str) or not isinstance(flags, int) or not flags & _WRITES:
            return None
    elif event in _ACTS:
        path = arguments[0]
    else:
        return None
    name = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    if name.startswith((home, "/dev/", "/proc/")) or "__pycache__" in name:
        return None
    return f"{event} {Path(name).suffix}".rstrip()


@contextlib.contextmanager
def _killed_at(until: float, pid: int) -> Iterator[None]:
    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(max(0.0, until - time.monotonic()), kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
