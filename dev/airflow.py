"""
A real Airflow on loopback, for tests, the demo and benchmarks: started in seconds, killed piece by piece.

What flows in: a folder of Dag files, connections, configuration. What flows out: an :class:`Airflow` whose
API server, scheduler, Dag processor and triggerer run as processes of their own, are looked at and driven
through the public REST API, and can be killed and started again one by one. Nothing of it is left behind,
also when this process is killed: a guard process sees that and ends the rest.

The trap: this module is called ``airflow``, so nothing in this folder may be run as a script
(``python dev/demo.py`` would import it instead of Airflow); run modules (``python -m dev.demo``).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from dev import processes
from dev.processes import Server, Startable, free_port, in_session, process, send_signal, wait_until

__all__ = [
    "IMPATIENT",
    "Airflow",
    "ApiError",
    "TaskInstance",
    "TaskProcess",
    "connection_text",
    "migrated_database",
    "parse_time",
]

Config = Mapping[str, Mapping[str, object]]

_CHECKOUT = Path(__file__).resolve().parent.parent

_QUICK: Config = {
    "core": {
        "load_examples": False,
        "executor": "LocalExecutor",
        "parallelism": 8,  # LocalExecutor forks that many workers at once
        "hostname_callable": "dev.hosts.hostname",  # the default asks the resolver
        "min_serialized_dag_update_interval": 0,  # or a file that changes twice in 30 s is not read a second time
        "test_connection": "Enabled",
        "dagbag_import_timeout": 60,
    },
    "api": {"host": "127.0.0.1", "workers": 1, "expose_config": True, "maximum_page_limit": 1000},
    "scheduler": {"scheduler_idle_sleep_time": 0.5, "enable_health_check": False},
    "dag_processor": {
        "refresh_interval": 1,
        "min_file_process_interval": 600,  # a file that has changed is read at once
        "bundle_refresh_check_interval": 1,
        "parsing_processes": 1,
    },
    "database": {"check_migrations": False},
    "usage_data_collection": {"enabled": False},
}

IMPATIENT: Config = {
    "scheduler": {
        "task_instance_heartbeat_timeout": 20,
        "task_instance_heartbeat_timeout_detection_interval": 2,
        "trigger_timeout_check_interval": 1,
        "orphaned_tasks_check_interval": 10,
    },
    "workers": {"min_heartbeat_interval": 2, "missing_dag_retry_delay": 2},
    "triggerer": {"job_heartbeat_sec": 1, "triggerer_health_check_threshold": 6},
}
"""Thresholds so low that the death of a process is noticed within seconds: for a test that waits for it."""


class ApiError(RuntimeError):
    """
    The REST API refused a request.

    :param status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class TaskInstance:
    """One try of a task instance, as the REST API tells it; ``raw`` has everything else."""

    id: str
    state: str | None
    try_number: int
    max_tries: int
    pid: int | None
    start: datetime | None
    end: datetime | None
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> TaskInstance:
        """Read an answer of ``/taskInstances``, or of ``/tries``, which knows no ``id``."""
        return cls(
            id=raw.get("id", ""),
            state=raw["state"],
            try_number=raw["try_number"],
            max_tries=raw["max_tries"],
            pid=raw.get("pid"),
            start=parse_time(raw["start_date"]),
            end=parse_time(raw["end_date"]),
            raw=raw,
        )


@dataclasses.dataclass(frozen=True)
class TaskProcess:
    """The process that runs a task's code, and its parent: the executor's worker, which supervises it."""

    runner: int
    supervisor: int

    def freeze(self) -> None:
        """Send SIGSTOP to both: the machine is cut off, and may come back."""
        send_signal([self.runner, self.supervisor], signal.SIGSTOP)

    def thaw(self) -> None:
        """Send SIGCONT to both."""
        send_signal([self.runner, self.supervisor], signal.SIGCONT)


class _Process(Server):
    """A server that the guard has been told of."""

    registered: Callable[[int], None]

    def start(self) -> None:
        super().start()
        self.registered(self.pid)


class Airflow(Startable):
    """
    An Airflow with LocalExecutor, or CeleryExecutor; a context manager that starts it and stops all of it.

    :param dags: the folder of Dag files.
    :param connections: connection ID → URI or JSON, as ``AIRFLOW_CONN_*`` takes them.
    :param config: section → option → value, over the quick defaults; see :data:`IMPATIENT`.
    :param env: further environment variables for all processes.
    :param home: where its files go; kept if given, else a temporary folder that is removed at the end.
    :param database: SQLAlchemy URL; a SQLite file of its own by default.
    :param port: of the API server.
    :param execution_api: base URL by which tasks reach the API server, if not its own: a proxy's.
    :param schedulers: how many.
    :param triggerers: how many.
    :param celery: URL of a Redis: tasks run on Celery's workers, with which goes a database that is not SQLite.
    :param workers: how many of them.
    :param preload: modules that most tasks import: see :mod:`dev.preloaded`.
    """

    user = password = "admin"

    def __init__(
        self,
        dags: Path,
        *,
        connections: Mapping[str, str] | None = None,
        config: Config | None = None,
        env: Mapping[str, str] | None = None,
        home: Path | None = None,
        database: str | None = None,
        port: int | None = None,
        execution_api: str | None = None,
        schedulers: int = 1,
        triggerers: int = 1,
        celery: str | None = None,
        workers: int = 1,
        preload: Sequence[str] = (),
    ) -> None:
        self._keep_home = home is not None
        self.home = home or Path(tempfile.mkdtemp(prefix="durable-spark-airflow-"))
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._database = database
        self._preload = ",".join(preload)
        if celery is not None:
            config = _with_celery(config or {}, celery, self.database)
        self.env = self._environment(dags, execution_api or self.url, connections or {}, config or {}, env or {})
        self._client = httpx.Client(base_url=self.url, timeout=90, trust_env=False)  # longer than SQLite's lock
        self._guard: subprocess.Popen[str] | None = None
        self.api_server = self._process("api-server", "--host", "127.0.0.1", "--port", str(self.port))
        self.dag_processor = self._process("dag-processor")
        self.schedulers = [self._process("scheduler", "--skip-serve-logs", number=n) for n in range(schedulers)]
        self.triggerers = [self._process("triggerer", "--skip-serve-logs", number=n) for n in range(triggerers)]
        self.workers = [
            self._process("celery worker", "--skip-serve-logs", "--celery-hostname", f"worker{n}@%h", number=n)
            for n in range(workers if celery is not None else 0)
        ]

    # --- its life

    @property
    def servers(self) -> list[Server]:
        """All its processes."""
        return [self.api_server, self.dag_processor, *self.schedulers, *self.triggerers, *self.workers]

    @property
    def database(self) -> str:
        """SQLAlchemy URL of its database."""
        return self._database or f"sqlite:///{self.home}/airflow.db"

    def start(self, *, deadline: float = 120) -> None:
        """Start everything; return when the API server answers and calls all of it healthy."""
        self._guard = _start_guard(None if self._keep_home else self.home)
        self._prepare()
        for server in self.servers:
            server.start()
        wait_until(self._healthy, deadline, "a healthy Airflow", servers=self.servers, interval=0.1)
        # The first request makes the execution API ready, for seconds: not at the expense of the first task.
        self._client.get("/execution/health", timeout=60)
        token = self._request("POST", "/auth/token", {"username": self.user, "password": self.password})
        self._client.headers["Authorization"] = f"Bearer {token['access_token']}"

    def stop(self) -> None:
        """
        End everything and remove the temporary folder.

        By SIGKILL: a scheduler waits for its running tasks at SIGTERM, a triggerer for longer than
        ten seconds, and nothing of this Airflow is used afterwards.
        """
        for server in self.servers:
            server.kill()
        self._client.close()
        if self._guard and self._guard.stdin:
            self._guard.stdin.close()
            self._guard.wait(30)
            self._guard = None

    def revive(self) -> None:
        """Start what has died by itself, as a service manager would; return when all of it is healthy."""

        def healthy() -> bool:
            for server in self.servers:
                if not server.alive:  # or again, for want of another one
                    server.start()
            return self._healthy()

        wait_until(healthy, 120, "a healthy Airflow", interval=0.5)

    def kill_triggerer(self, number: int = 0) -> None:
        """Kill -9 a triggerer, with the child process in which its triggers run."""
        self.triggerers[number].kill()

    def triggerer_of(self, dag: str, run: str, task: str, map_index: int = -1) -> int | None:
        """Return the number of the triggerer that the deferred task's trigger is assigned to, ``None`` if none is."""
        job = self.task(dag, run, task, map_index).raw.get("triggerer_job") or {}
        names = [triggerer.name for triggerer in self.triggerers]
        return names.index(job["hostname"]) if job.get("hostname") in names else None

    def start_triggerer(self, number: int = 0) -> None:
        """Start a killed triggerer again. It takes over what is its own after the health threshold."""
        self.triggerers[number].start()

    def command(
        self, *arguments: str, timeout: float = 120, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run an ``airflow`` command in this Airflow's environment, with more variables, and return how it ended."""
        return subprocess.run(
            [sys.executable, "-m", "airflow", *arguments],
            env={**self.env, **(env or {})},
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout * processes.patience,
            check=False,
        )

    def airflow(self, *arguments: str, timeout: float = 120) -> str:
        """Run an ``airflow`` command that is to succeed, and return what it prints."""
        done = self.command(*arguments, timeout=timeout)
        if done.returncode:
            said = (done.stdout + done.stderr)[-4000:]
            raise RuntimeError(f"airflow {' '.join(arguments)} ended with {done.returncode}\n{said}")
        return done.stdout

    def _environment(
        self, dags: Path, execution_api: str, connections: Mapping[str, str], config: Config, env: Mapping[str, str]
    ) -> dict[str, str]:
        own: Config = {
            "core": {
                "dags_folder": dags.resolve(),
                "execution_api_server_url": f"{execution_api}/execution/",
                "simple_auth_manager_users": f"{self.user}:admin",
                "simple_auth_manager_passwords_file": self.home / "passwords.json",
                "fernet_key": base64.urlsafe_b64encode(os.urandom(32)).decode(),
            },
            "api": {"base_url": self.url, "port": self.port, "secret_key": secrets.token_hex(16)},
            "api_auth": {"jwt_secret": secrets.token_hex(32)},
            "database": {"sql_alchemy_conn": self.database},
            "logging": {"base_log_folder": self.home / "logs"},
        }
        settings = {
            f"AIRFLOW__{section.upper()}__{option.upper()}": str(value)
            for layer in (_QUICK, own, config)
            for section, options in layer.items()
            for option, value in options.items()
        }
        inherited = _inherited()
        path = os.pathsep.join(filter(None, [str(_CHECKOUT), env.get("PYTHONPATH") or inherited.get("PYTHONPATH")]))
        return {
            **inherited,
            "AIRFLOW_HOME": str(self.home),
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **settings,
            **{f"AIRFLOW_CONN_{name.upper()}": uri for name, uri in connections.items()},
            **env,
            "PYTHONPATH": path,
        }

    def _process(self, command: str, *options: str, number: int = 0) -> Server:
        name = command.replace(" ", "-") + (f"-{number + 1}" if number else "")
        env = self.env | ({"DURABLE_SPARK_HOST": name} if command == "triggerer" else {})
        forks = command in ("scheduler", "dag-processor")
        main = ["dev.preloaded", self._preload] if self._preload and forks else ["airflow"]
        process = _Process(
            name,
            [sys.executable, "-m", *main, *command.split(), *options],
            log=self.home / "servers" / f"{name}.log",
            env=env,
            cwd=self.home,
        )
        process.registered = self._register
        return process

    def _register(self, session: int) -> None:
        if self._guard and self._guard.stdin:
            self._guard.stdin.write(f"{session}\n")
            self._guard.stdin.flush()

    def _prepare(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "airflow.cfg").touch()  # else every process writes one, all at once
        (self.home / "passwords.json").write_text(json.dumps({self.user: self.password}))
        if self._database:
            self.airflow("db", "migrate")
        else:
            shutil.copy(migrated_database(), self.home / "airflow.db")
            with contextlib.closing(sqlite3.connect(self.home / "airflow.db")) as connection:
                # Kept in the file: who reads does not lock out who writes.
                connection.execute("PRAGMA journal_mode=WAL")

    def _healthy(self) -> bool:
        try:
            health = self._request("GET", "/api/v2/monitor/health")
        except (httpx.TransportError, ApiError):
            return False
        parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
        return all(health.get(part, {}).get("status") == "healthy" for part in parts)

    # --- the REST API

    def api(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, params: Mapping[str, Any] | None = None
    ) -> Any:
        """
        Send a request to the public REST API and return the decoded answer.

        :param path: below ``/api/v2``, its parts quoted.
        :raises ApiError: the answer's status is not a success.
        """
        return self._request(method, f"/api/v2{path}", body, params)

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None
    ) -> Any:
        for pause in (0.2, 0.5, 1.0, 2.0, None):
            answer = self._client.request(
                method, path, json=body, params=params, headers={"Accept": "application/json"}
            )
            if pause is None or answer.status_code != 500 or "Database error" not in answer.text:
                break
            time.sleep(pause)  # SQLite was locked by another of Airflow's processes: nothing was done
        if not answer.is_success:
            raise ApiError(f"{method} {path}: {answer.status_code} {answer.text[:2000]}", answer.status_code)
        return answer.json() if answer.content else None

    def _of(self, dag: str, run: str, task: str) -> str:
        return f"/dags/{quote(dag, safe='')}/dagRuns/{quote(run, safe='')}/taskInstances/{quote(task, safe='')}"

    def wait_for_dag(self, dag: str, *, deadline: float = 60) -> None:
        """Wait until the Dag has been parsed; an import error ends the wait at once."""

        def parsed() -> bool:
            try:
                self.api("GET", f"/dags/{quote(dag, safe='')}")
            except ApiError as error:
                if error.status != 404:
                    raise
            else:
                return True
            if errors := self.api("GET", "/importErrors")["import_errors"]:
                raise RuntimeError("\n".join(f"{error['filename']}:\n{error['stack_trace']}" for error in errors))
            return False

        wait_until(parsed, deadline, f"Dag {dag}", servers=[self.dag_processor], interval=0.1)

    def unpause(self, dag: str) -> None:
        """Let the Dag run."""
        self.api("PATCH", f"/dags/{quote(dag, safe='')}", {"is_paused": False})

    def pause(self, dag: str) -> None:
        """Schedule no task of a Dag any more, no retry either; what runs or is deferred goes on."""
        self.api("PATCH", f"/dags/{quote(dag, safe='')}", {"is_paused": True})

    def trigger(self, dag: str, *, conf: Mapping[str, Any] | None = None, run: str | None = None) -> str:
        """Wait until the Dag is there, unpause it, start a run with ``conf`` as its params, and return the run's ID."""
        self.wait_for_dag(dag)
        self.unpause(dag)
        body = {"dag_run_id": run or f"run-{secrets.token_hex(4)}", "logical_date": None, "conf": dict(conf or {})}
        return str(self.api("POST", f"/dags/{quote(dag, safe='')}/dagRuns", body)["dag_run_id"])

    def connect(self, conn_id: str, connection: Mapping[str, Any]) -> None:
        """Have a connection in the database, or change it there."""
        body = {**connection, "connection_id": conn_id, "extra": json.dumps(connection["extra"])}
        try:
            self.api("POST", "/connections", body)
        except ApiError as error:
            if error.status != 409:
                raise
            self.api("PATCH", f"/connections/{conn_id}", body)

    def task(self, dag: str, run: str, task: str, map_index: int = -1) -> TaskInstance:
        """Return the task instance as it is now."""
        path = self._of(dag, run, task)
        return TaskInstance.from_json(self.api("GET", path if map_index < 0 else f"{path}/{map_index}"))

    def tries(self, dag: str, run: str, task: str, map_index: int = -1) -> list[TaskInstance]:
        """Return all tries of the task instance, the current one last."""
        path = self._of(dag, run, task)
        found = self.api("GET", f"{path}/tries" if map_index < 0 else f"{path}/{map_index}/tries")
        return [TaskInstance.from_json(raw) for raw in found["task_instances"]]

    def wait_for_state(
        self,
        dag: str,
        run: str,
        task: str,
        states: str | Collection[str],
        *,
        deadline: float = 60,
        map_index: int = -1,
        try_number: int | None = None,
    ) -> TaskInstance:
        """Wait until the task instance is in one of the states, in the given try if one is given."""
        wanted = {states} if isinstance(states, str) else set(states)

        def reached() -> TaskInstance | None:
            now = self.task(dag, run, task, map_index)
            return now if now.state in wanted and try_number in (None, now.try_number) else None

        what = f"{dag}.{task} to be {' or '.join(sorted(wanted))}"
        try:
            return wait_until(reached, deadline, what, interval=0.5)
        except TimeoutError as error:
            now = self.task(dag, run, task, map_index)
            log = self.log(dag, run, task, now.try_number, map_index)
            raise TimeoutError(
                f"{error}\nit is {now.state} in try {now.try_number}; its log:\n"
                + "\n".join(str(line.get("event", line)) for line in log[-40:])
                + "\n--- the scheduler:\n"
                + self.schedulers[0].tail(40)
            ) from None

    def log(self, dag: str, run: str, task: str, try_number: int = 1, map_index: int = -1) -> list[dict[str, Any]]:
        """Return the task's log of one try: ``timestamp``, ``level``, ``event`` and whatever else each line has."""
        params = {"full_content": True, "map_index": map_index}
        answer = self.api("GET", f"{self._of(dag, run, task)}/logs/{try_number}", params=params)
        return [line if isinstance(line, dict) else {"event": line} for line in answer["content"]]

    def log_text(self, dag: str, run: str, task: str, try_number: int = 1, map_index: int = -1) -> str:
        """Return the messages of :meth:`log`, one on each line."""
        return "\n".join(str(line.get("event", "")) for line in self.log(dag, run, task, try_number, map_index))

    def events(self, dag: str, run: str, task: str) -> list[dict[str, Any]]:
        """Return the audit log of the task instance, the oldest first: ``when``, ``event``, ``try_number``."""
        params = {"dag_id": dag, "run_id": run, "task_id": task, "order_by": "id", "limit": 500}
        return list(self.api("GET", "/eventLogs", params=params)["event_logs"])

    def xcoms(self, dag: str, run: str, task: str, map_index: int = -1) -> dict[str, Any]:
        """Return all XComs of the task instance by their keys."""
        path = f"{self._of(dag, run, task)}/xcomEntries"
        params = {"map_index": map_index}
        values = {}
        for entry in self.api("GET", path, params=params)["xcom_entries"]:
            key = entry["key"]
            try:
                found = self.api("GET", f"{path}/{quote(key, safe='')}", params={**params, "stringify": False})
            except ApiError as error:
                if error.status != 404:  # deleted meanwhile
                    raise
            else:
                values[key] = found["value"]
        return values

    def links(self, dag: str, run: str, task: str, map_index: int = -1) -> dict[str, str | None]:
        """Return the task instance's extra links by their names."""
        answer = self.api("GET", f"{self._of(dag, run, task)}/links", params={"map_index": map_index})
        return dict(answer["extra_links"])

    def store(self, dag: str, run: str, task: str, map_index: int = -1) -> dict[str, Any]:
        """Return what the task state store holds for the task instance, by key."""
        params = {"map_index": map_index, "limit": 100}
        answer = self.api("GET", f"{self._of(dag, run, task)}/state-store", params=params)
        return {entry["key"]: entry["value"] for entry in answer["task_state_store"]}

    def set_store(self, dag: str, run: str, task: str, key: str, value: Any, map_index: int = -1) -> None:
        """Write a value into the task state store."""
        path = f"{self._of(dag, run, task)}/state-store/{quote(key, safe='')}"
        self.api("PUT", path, {"value": value}, params={"map_index": map_index})

    def delete_store(self, dag: str, run: str, task: str, key: str, map_index: int = -1) -> None:
        """Delete a value from the task state store."""
        path = f"{self._of(dag, run, task)}/state-store/{quote(key, safe='')}"
        self.api("DELETE", path, params={"map_index": map_index})

    def clear(self, dag: str, run: str, tasks: Sequence[str], **options: Any) -> None:
        """Clear tasks of a run; ``options`` as in the API's ``clearTaskInstances``."""
        body = {
            "dry_run": False,
            "only_failed": False,
            "dag_run_id": run,
            "task_ids": list(tasks),
            "reset_dag_runs": True,
            **options,
        }
        self.api("POST", f"/dags/{quote(dag, safe='')}/clearTaskInstances", body)

    def set_state(self, dag: str, run: str, task: str, state: str, map_index: int = -1) -> None:
        """Mark a task instance ``success``, ``failed`` or ``skipped``."""
        path = self._of(dag, run, task)
        self.api("PATCH", path if map_index < 0 else f"{path}/{map_index}", {"new_state": state})

    def set_run_state(self, dag: str, run: str, state: str) -> None:
        """Mark a run ``success``, ``failed`` or ``queued``."""
        self.api("PATCH", f"/dags/{quote(dag, safe='')}/dagRuns/{quote(run, safe='')}", {"state": state})

    def delete_run(self, dag: str, run: str) -> None:
        """Delete a run."""
        self.api("DELETE", f"/dags/{quote(dag, safe='')}/dagRuns/{quote(run, safe='')}")

    # --- the processes of a task

    def task_process(
        self, dag: str, run: str, task: str, *, map_index: int = -1, try_number: int | None = None, deadline: float = 30
    ) -> TaskProcess:
        """
        Wait until the task's code runs, in the given try if one is given, and return its processes.

        The supervisor reports the runner's ID to the API server when it starts the task; it is
        believed only if that process belongs to one of this Airflow's schedulers or workers.
        """
        sessions = {server.pid for server in (*self.schedulers, *self.workers)}

        def running() -> TaskProcess | None:
            now = self.task(dag, run, task, map_index)
            if now.state != "running" or now.pid is None or try_number not in (None, now.try_number):
                return None
            found = process(now.pid)
            return TaskProcess(now.pid, found.parent) if found and found.session in sessions else None

        return wait_until(running, deadline, f"{dag}.{task} to run", servers=self.schedulers, interval=0.02)

    def kill_task_process(self, dag: str, run: str, task: str, **options: Any) -> TaskProcess:
        """Kill -9 the process that runs the task's code; ``options`` as in :meth:`task_process`."""
        process = self.task_process(dag, run, task, **options)
        os.kill(process.runner, signal.SIGKILL)
        return process


def _with_celery(config: Config, broker: str, database: str) -> Config:
    celery = {
        "broker_url": broker,
        "result_backend": f"db+{database}",
        "worker_concurrency": 4,
        "worker_enable_remote_control": False,
    }
    core = {"executor": "CeleryExecutor", **config.get("core", {})}
    return {**config, "core": core, "celery": {**celery, **config.get("celery", {})}}


def connection_text(connection: Mapping[str, Any]) -> str:
    """Return a connection, whose ``extra`` is an object, as Airflow takes it from a variable ``AIRFLOW_CONN_*``."""
    return json.dumps({**connection, "extra": json.dumps(connection["extra"])})


def parse_time(text: str | None) -> datetime | None:
    """Return a time of the REST API, which is ISO 8601 in UTC with a ``Z`` that Python 3.10 does not read."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def _inherited() -> dict[str, str]:
    """Return this process's environment without what would reach into Airflow or double its start-up time."""
    dropped = {"PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW") and name not in dropped}


def migrated_database() -> Path:
    """Return a SQLite database as ``airflow db migrate`` makes it, made once for each version of Airflow."""
    root = os.environ.get("DURABLE_SPARK_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "durable-spark"
    )
    cached = Path(root) / f"airflow-{importlib.metadata.version('apache-airflow-core')}.db"
    if cached.exists():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as home:
        made = Path(home, "airflow.db")
        env = _inherited() | {"AIRFLOW_HOME": home, "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{made}"}
        done = subprocess.run(
            [sys.executable, "-m", "airflow", "db", "migrate"],
            env=env,
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"airflow db migrate ended with {done.returncode}\n{done.stderr[-4000:]}")
        made.replace(cached)
    return cached


def _start_guard(home: Path | None) -> subprocess.Popen[str]:
    """Start the process that ends the sessions it was told of, and removes ``home``, when this process ends."""
    command = [sys.executable, "-m", "dev.airflow", *([str(home)] if home else [])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=_CHECKOUT, text=True, start_new_session=True)


def _guard() -> None:
    """
    Wait until standard input ends, then kill -9 all sessions named there.

    LocalExecutor's workers outlive a scheduler that was killed: each of them holds both ends of the
    queue it reads, so it never sees that its parent is gone. That is why the kernel's signal at the
    death of a parent does not suffice.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sessions = {int(line) for line in sys.stdin}
    until = time.monotonic() + 10
    while (alive := [pid for session in sessions for pid in in_session(session)]) and time.monotonic() < until:
        send_signal(alive, signal.SIGKILL)
        time.sleep(0.02)
    if len(sys.argv) > 1:
        shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    _guard()
