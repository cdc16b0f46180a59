"""
Jobs that outlive what Airflow keeps: the store's retention, and Airflow's own commands that clean up.

A job cannot run for a month here. Instead what the database has of it is made older, by SQL, than those commands keep.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

from dev.airflow import ApiError
from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.together import together

AGE = timedelta(days=40)
CUT_OFF = timedelta(days=35)
LIVE = {"durable_spark", "spark_job_id"}
"""What of a live job must not expire."""
TIMES = {
    "task_state_store": ("updated_at", "expires_at"),
    "xcom": ("timestamp",),
    "log": ("dttm",),
    "task_instance": ("queued_dttm", "scheduled_dttm", "start_date"),
    "task_instance_history": ("start_date",),
    "dag_run": ("queued_at", "run_after", "start_date"),
}
OLD_TRIGGERS = threading.Lock()
"""Held by who has an old trigger: Airflow cleans those of all Dags, and stories are told side by side."""
SAFE = ("callback", "deadline", "job", "log", "task_instance_history", "task_reschedule", "task_state_store", "xcom")
"""The tables that can be cleaned whatever runs. The commands for others clean task instances, too."""


def age(job: Run, *tables: str) -> None:
    """Make what these tables have of a run older."""
    for table in tables:
        older = ", ".join(f"{column} = {column} - %(age)s" for column in TIMES[table])
        sql = f"UPDATE {table} SET {older} WHERE dag_id = %(dag)s AND run_id = %(run)s"
        job.stage.postgres.query(sql, age=AGE, dag=job.dag, run=job.id)


def age_trigger(job: Run) -> None:
    """Make the trigger of a deferred task older."""
    ours = "SELECT trigger_id FROM task_instance WHERE dag_id = %(dag)s AND run_id = %(run)s"
    sql = f"UPDATE trigger SET created_date = created_date - %(age)s WHERE id IN ({ours}) RETURNING id"
    assert len(job.stage.postgres.query(sql, age=AGE, dag=job.dag, run=job.id)) == 1


def clean_store(job: Run) -> None:
    """Run ``airflow state-store clean``."""
    job.stage.airflow.airflow("state-store", "clean")


def clean_database(job: Run, *tables: str) -> str:
    """Run ``airflow db clean`` for some tables, of what belongs to the Dag where a table tells that."""
    before = (datetime.now(timezone.utc) - CUT_OFF).isoformat()
    options = ("--clean-before-timestamp", before, "--dag-ids", job.dag, "--skip-archive", "--yes")
    return job.stage.airflow.airflow("db", "clean", "--tables", ",".join(tables), *options)


def is_gone(job: Run) -> bool:
    """Whether the task instance is not there any more."""
    try:
        return job.ti is None
    except ApiError as error:
        if error.status != 404:
            raise
        return True


# --- the retention


@together
def test_a_record_expires_only_when_its_job_has_ended(stage: Stage, run: Callable[..., Run]) -> None:
    with stage.killed_before_it_defers(run, "long_retry") as job:
        pod = job.wait_for_pod("Running")
        stage.airflow.pause(job.dag)
    age(job, "task_state_store")
    kept = job.store()
    assert {*LIVE} < kept.keys(), "there is something beside that may expire"
    clean_store(job)
    assert job.store() == {key: kept[key] for key in LIVE}
    stage.airflow.unpause(job.dag)
    job.wait("deferred", try_number=2)
    assert "Reconnecting to existing job" in job.log(2)
    open_gate(job)
    assert job.wait(*ENDED).state == "success"
    assert job.pods() == [pod]

    age(job, "task_state_store")
    clean_store(job)
    assert job.store() == {}
    stage.airflow.clear(job.dag, job.id, ["job"])
    job.wait("success", try_number=3)
    assert len(job.pods()) == 2, "what has ended runs again, record or not"


# --- airflow db clean


@together
def test_what_can_be_cleaned_whatever_runs(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("long_deferred")
    pod = job.wait_for_followed_pod()
    with OLD_TRIGGERS:
        age(job, *TIMES)
        age_trigger(job)
        kept = job.store()
        clean_database(job, *SAFE)
        assert "spark_job_id" not in job.xcoms(), "it was old enough"
        assert {key: value for key, value in job.store().items() if key in LIVE} == {key: kept[key] for key in LIVE}
        assert job.ti.state == "deferred"
        assert job.phase(pod) == "Running"
        open_gate(job)
        ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert job.xcoms()["return_value"] == f"spark:{pod.name}"
    assert job.pods() == [pod]


@together
def test_the_deadline_is_kept_without_what_was_cleaned(stage: Stage, run: Callable[..., Run]) -> None:
    """The trigger cannot tell whether its try is in charge, so it leaves the kill to a worker."""
    job = run("long_timeout")
    job.wait_for_followed_pod()
    age(job, "xcom")
    clean_database(job, "xcom")
    assert not {"spark_job_id", "durable_spark_try"} & job.xcoms().keys()
    assert job.wait(*ENDED, deadline=120).state == "failed"
    assert "DeadlinePassed" in job.logs()
    job.wait_for_pod(None)


@pytest.mark.parametrize("table", ["trigger", "task_instance"])
@together
def test_a_task_that_is_cleaned_away_is_made_anew(stage: Stage, run: Callable[..., Run], table: str) -> None:
    """Airflow deletes what began before the cut-off, whether it waits or not. The record stays with the Dag run."""
    job = run("long_trigger" if table == "trigger" else "long_instance")
    pod = job.wait_for_followed_pod()
    old = job.ti.id
    with OLD_TRIGGERS if table == "trigger" else contextlib.nullcontext():
        if table == "trigger":
            age_trigger(job)
        else:
            age(job, table)

        def cleaned() -> bool:  # a table on which it meets a deadlock is skipped, with a warning
            clean_database(job, table)
            return is_gone(job) or job.ti.id != old

        wait_until(cleaned, 60, "the task instance to be deleted")
    wait_until(lambda: not is_gone(job) and job.ti.id != old, 60, "another task instance", interval=0.2)
    job.wait("deferred")
    open_gate(job)
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1), job.logs()
    assert "Reconnecting to existing job" in job.log()
    assert job.pods() == [pod]


@together
def test_a_run_that_is_cleaned_away_ends_its_job(stage: Stage, run: Callable[..., Run]) -> None:
    """To a trigger it looks as if a person had deleted it."""
    killed, kept = run("long_run"), run("long_kept")
    pods = [job.wait_for_followed_pod() for job in (killed, kept)]
    for job in (killed, kept):
        age(job, "dag_run")
        clean_database(job, "dag_run")
        assert is_gone(job)
    killed.wait_for_pod(None)
    said = f"Leaving spark:{pods[1].name} alone, as on_kill='keep' asks"
    logs = stage.airflow.home / "logs"
    wait_until(
        lambda: any(said in log.read_text() for log in logs.rglob(f"*{kept.id}/**/*.log")), 60, "word", interval=1
    )
    assert kept.phase(pods[1]) == "Running"
    open_gate(kept)
    kept.wait_for_pod("Succeeded")
