"""
Time that runs out, and tries that do: whatever ends a task, its job is killed, or there for a person to see.

Timed by the API server's audit log.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.elsewhere import run_elsewhere
from tests.airflow.gates import open_gate
from tests.airflow.lives import Life, lives_of, now, one_after_the_other
from tests.airflow.test_person import (
    clear,
    ends_well,
    killed_before_it_defers,
    runs_anew,
    wait_for_kill,
)
from tests.airflow.together import begins_last, from_the_start, together, without_triggerers

NO_RETRY = "retries=0: there is no try in which the job of a dead worker could be found again"
LATE = 60.0
"""Seconds after the deadline within which the job is killed. On an idle machine it takes less than one."""


def timed_out(job: Run, life: Life, *, after: float, try_number: int = 1, late: float = LATE) -> None:
    """See that a try's pod was killed in time, dead before the task failed, and that the task says so."""
    ti = job.stage.airflow.tries(*job.key)[try_number - 1]
    assert ti.start is not None
    assert ti.end is not None
    assert life.killed is not None, job.logs()
    assert life.over is not None
    was_late = (life.killed - ti.start).total_seconds() - after
    print(f"{job.dag}: killed {was_late:.1f} s after its deadline")
    assert -0.5 <= was_late <= late
    assert life.over <= ti.end, "it was seen dead"
    said = job.logs()
    assert "AirflowTaskTimeout" in said
    assert (
        f"DeadlinePassed: the execution timeout of {timedelta(seconds=after)} passed: spark:{life.pod.name} was" in said
    )


# --- execution_timeout


@together
def test_each_try_has_its_own_time(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("time_own")
    ended = job.wait("failed", deadline=150)
    assert ended.try_number == 2
    for number, life in enumerate(one_after_the_other(job, 2), 1):
        timed_out(job, life, after=30, try_number=number)


@together
def test_by_default_args(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("time_default")
    job.wait("failed")
    timed_out(job, *one_after_the_other(job, 1), after=30)


@together
def test_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("time_waiting")
    job.wait("failed")
    timed_out(job, *one_after_the_other(job, 1), after=30)


@together
def test_a_retry_that_follows_the_job_on_has_its_own_time(stage: Stage, run: Callable[..., Run]) -> None:
    job = killed_before_it_defers(stage, run, "time_retried")
    ended = job.wait("failed", deadline=120)
    assert ended.try_number == 2
    timed_out(job, *one_after_the_other(job, 1), after=30, try_number=2)


@together
def test_a_job_that_ends_in_the_same_second(stage: Stage, run: Callable[..., Run]) -> None:
    """The kill is on its way when the job succeeds: the cluster's verdict counts."""
    path = r"/namespaces/spark/pods/time-same-job-"
    with stage.kubernetes_api.holding("DELETE", path) as held:
        job = run("time_same")
        held.wait()
        open_gate(job)
        job.wait_for_pod("Succeeded")
    assert job.wait(*ENDED).state == "success", job.logs()
    (life,) = lives_of(job)
    assert (life.killed, job.phase(life.pod)) == (None, "Succeeded")


@together
def test_kept_if_so_asked_and_cleared(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("time_kept")
    assert job.wait_for_end() == "failed"
    (old,) = job.pods()
    assert f"spark:{old.name} was left running, as on_timeout='keep' asks" in job.logs()
    is_there_to_be_seen(job)
    clear(job)
    runs_anew(job, old)


@pytest.mark.parametrize("dag", ["time_run", "time_run_waiting"])
@together
def test_the_time_of_the_run(stage: Stage, run: Callable[..., Run], dag: str) -> None:
    """Airflow skips the task."""
    job = run(dag)
    pod = job.wait_for_pod("Running")
    job.wait("skipped")
    wait_for_kill(job)
    job.wait_for_pod(None)
    assert job.pods() == [pod]
    path = f"/dags/{job.dag}/dagRuns/{job.id}"
    assert stage.airflow.api("GET", path)["state"] == "failed"


@pytest.mark.parametrize("dag", ["time_standalone", "time_yarn"])
@together
def test_on_other_clusters(stage: Stage, run: Callable[..., Run], dag: str) -> None:
    """The drop-in on YARN, the other operator on a standalone cluster."""
    other = run_elsewhere(stage, run, dag)
    job = other.run
    job.wait("failed", deadline=150)
    assert other.states() == ["killed"]
    passed = "DeadlinePassed: the execution timeout of 0:01:00 passed"
    assert f"{passed}: {job.store()['spark_job_id']} was killed" in job.logs()


# --- no try left


def is_there_to_be_seen(job: Run) -> None:
    """See that a failed task has left its job alone, and still shows it."""
    (life,) = lives_of(job)
    assert (life.killed, job.phase(life.pod)) == (None, "Running")
    assert job.xcoms()["spark_job_id"] == job.store()["spark_job_id"] == f"spark:{life.pod.name}"
    if job.dag != "last_away":  # its connection names no dashboard
        assert job.stage.airflow.links(*job.key)["Job"] == f"https://dashboard.invalid/spark/{life.pod.name}"


@together
def test_no_retry_and_a_clear_that_follows_the_job_on(stage: Stage, run: Callable[..., Run]) -> None:
    job = killed_before_it_defers(stage, run, "last_killed")
    assert job.wait_for_end() == "failed"
    is_there_to_be_seen(job)
    assert job.log().count(NO_RETRY) == 1
    clear(job)
    job.wait("deferred", try_number=2)
    assert NO_RETRY not in job.log(2)
    ends_well(job, 1)
    assert job.log().count(NO_RETRY) == 1


@from_the_start
def test_the_last_try_gives_up_and_a_clear_finds_the_cluster_away(stage: Stage, run: Callable[..., Run]) -> None:
    """Nothing is killed at the end of the last try, and nothing submitted before the old job is seen dead."""
    job = run("last_away")
    old = job.wait_for_followed_pod()
    away = r"/pods(\?|/last-away-job-)"
    with stage.kubernetes_api.failing(503, method="GET", path=away):
        assert job.wait_for_end() == "failed"
        assert job.ti.try_number == 2
        assert "OutageTooLong" in job.logs()
        stage.wait_for_count("poll_errors", "kubernetes_proxied")
        assert f"spark:{old.name} may still run, and no try is left. The way out: clear the task" in job.logs()
        is_there_to_be_seen(job)
        clear(job)
        assert job.wait_for_end() == "failed"
        assert job.ti.try_number == 4
        assert re.search(
            f"the old job spark:{old.name} was not seen dead within 8 s .*nothing was submitted", job.logs()
        )
        assert job.pods() == [old]
    clear(job)
    runs_anew(job, old)


# --- while no triggerer is there


@begins_last
@without_triggerers
def test_over_the_death_of_all_triggerers(stage: Stage, run: Callable[..., Run]) -> Iterator[None]:
    """One deadline passes while they are away, the other one when they are back."""
    away, moved = run("time_away"), run("time_moved")
    for job in (away, moved):
        job.wait_for_followed_pod()
    yield
    began = away.ti.start
    assert began is not None
    wait_until(lambda: now() > began + timedelta(seconds=62), 120, "the deadline", interval=0.5)
    assert [lives_of(job)[0].killed for job in (away, moved)] == [None, None]
    yield
    for job, after in ((away, 60), (moved, 105)):
        job.wait("failed", deadline=120)
        timed_out(job, *one_after_the_other(job, 1), after=after, late=90)
