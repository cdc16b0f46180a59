"""
What tests of the command ``airflow durable-spark orphans`` share: a database of Airflow's, and a call of the command.

The database is as Airflow itself makes it; task instances and records are put straight into it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dev.airflow import migrated_database
from durable_spark.cli._tasks import TaskKey
from durable_spark.jobs import (
    RECORD_KEY,
    TRY_XCOM_KEY,
    Generation,
    JobRef,
    JobState,
    Record,
    Submission,
    Verdict,
    owner_of,
)

__all__ = ["DEPLOYMENT", "Metadata", "Said", "empty_metadata", "run_orphans"]

DEPLOYMENT = "orphanage"  # no other test submits for it
NOW = "2026-01-01 00:00:00.000000"


@dataclasses.dataclass
class Said:
    """What the command has said, and how it ended: ``0``, ``1`` or the last words."""

    rows: list[dict[str, str]]
    printed: str
    errors: str
    code: Any

    @property
    def orphans(self) -> list[str]:
        return [row["job_id"] for row in self.rows if row["verdict"] == "orphan"]


def run_orphans(*arguments: str) -> Said:
    """Call the command as Airflow's command line does. In any thread that runs no event loop."""
    from airflow.cli.cli_parser import get_parser

    parsed = get_parser().parse_args(["durable-spark", "orphans", *arguments, "-o", "json"])
    code: Any = 0
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            parsed.func(parsed)
        except SystemExit as error:
            code = error.code
    return Said(json.loads(printed.getvalue() or "[]"), printed.getvalue(), errors.getvalue(), code)


class Metadata:
    """
    The database of the Airflow in this process.

    :param path: its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, dag_id: str, run_id: str) -> int:
        """Add a Dag run, unless it is there; return its number."""
        rows = self.execute("SELECT id FROM dag_run WHERE dag_id = ? AND run_id = ?", dag_id, run_id)
        if not rows:
            self.execute(
                "INSERT INTO dag_run (dag_id, run_id, run_type, run_after, state) VALUES (?, ?, ?, ?, ?)",
                *(dag_id, run_id, "manual", NOW, "running"),
            )
            rows = self.execute("SELECT id FROM dag_run WHERE dag_id = ? AND run_id = ?", dag_id, run_id)
        return int(rows[0][0])

    def task(self, state: str | None, *, run_id: str = "run1", task_id: str = "job", map_index: int = -1) -> TaskKey:
        """Add a task instance of the Dag ``dag``."""
        key = TaskKey("dag", run_id, task_id, map_index)
        self.run("dag", run_id)
        self.execute(
            "INSERT INTO task_instance (id, dag_id, run_id, task_id, map_index, state, try_number, pool, pool_slots)"
            " VALUES (?, ?, ?, ?, ?, ?, 1, 'default_pool', 1)",
            *(uuid.uuid4().hex, *key, state),
        )
        return key

    def owner(self, key: TaskKey) -> str:
        """Return the label of a task instance's jobs."""
        return owner_of(deployment=DEPLOYMENT, **key._asdict())

    def record(self, key: TaskKey, token: str, *, job: JobRef | None, verdict: JobState | None = None) -> None:
        """Write a record, as the operator does it."""
        record = Record(
            submission=Submission(token=token, owner=self.owner(key), deployment=DEPLOYMENT, name="dag.job"),
            generation=Generation(max_tries=1, traceparent=""),
            fingerprint="",
            arguments="",
            cluster=("cluster",),
            intended_at=time.time(),
            job=job,
            verdict=Verdict(state=verdict, raw=verdict.name, message="", at=time.time()) if verdict else None,
        )
        self.store(key, json.dumps(record.to_json()))

    def store(self, key: TaskKey, value: str) -> None:
        """Write a record's row."""
        self.execute(
            "INSERT INTO task_state_store (dag_run_id, dag_id, run_id, task_id, map_index, key, value, updated_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (dag_run_id, task_id, map_index, key) DO UPDATE SET value = excluded.value",
            *(self.run(key.dag_id, key.run_id), *key, RECORD_KEY, value, NOW),
        )

    def stored(self, key: TaskKey) -> Record:
        """Return a task instance's record."""
        ((value,),) = self.execute(
            "SELECT value FROM task_state_store WHERE dag_id = ? AND run_id = ? AND task_id = ? AND map_index = ?"
            " AND key = ?",
            *(*key, RECORD_KEY),
        )
        return Record.from_json(json.loads(value))

    def push_try(self, key: TaskKey, token: str, *, ti_id: str | None = None) -> None:
        """Write the XCom in which a try says that it is in charge: the current one, unless another is given."""
        value = {"token": token, "ti_id": ti_id or str(uuid.UUID(self.id_of(key)))}
        self.execute(
            "INSERT OR REPLACE INTO xcom (dag_run_id, dag_id, run_id, task_id, map_index, key, value, timestamp)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(self.run(key.dag_id, key.run_id), *key, TRY_XCOM_KEY, json.dumps(value), NOW),
        )

    def id_of(self, key: TaskKey) -> str:
        """Return the ID of a task instance's current try."""
        where = "dag_id = ? AND run_id = ? AND task_id = ? AND map_index = ?"
        return str(self.execute(f"SELECT id FROM task_instance WHERE {where}", *key)[0][0])

    def set_state(self, key: TaskKey, state: str | None) -> None:
        """Change the state of a task instance."""
        where = "dag_id = ? AND run_id = ? AND task_id = ? AND map_index = ?"
        self.execute(f"UPDATE task_instance SET state = ? WHERE {where}", state, *key)

    def delete_run(self, run_id: str) -> None:
        """Delete a run of the Dag, and with it what belongs to it."""
        self.execute("DELETE FROM dag_run WHERE dag_id = 'dag' AND run_id = ?", run_id)

    def execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            connection.execute("PRAGMA foreign_keys = ON")
            return connection.execute(statement, values).fetchall()


@contextlib.contextmanager
def empty_metadata() -> Iterator[Metadata]:
    """Give this process's Airflow a name and an empty database, where its default configuration looks for one."""
    from airflow import settings

    path = Path(os.environ["AIRFLOW_HOME"], "airflow.db")
    shutil.copy(migrated_database(), path)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AIRFLOW__DURABLE_SPARK__DEPLOYMENT", DEPLOYMENT)
            patch.setenv("_AIRFLOW_PROCESS_CONTEXT", "")  # which the command sets
            yield Metadata(path)
    finally:
        assert settings.engine is not None
        settings.engine.dispose()  # a connection that is kept would go on reading this file
        path.unlink()
