"""
The drop-in on a real Airflow and each cluster: a Dag that was written for upstream's operator, its import changed.

Counted by each cluster's own record: one job per submission, whatever died when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, SUBMIT_DAG, Run, Stage
from tests.airflow.elsewhere import Elsewhere, clusters_of, run_elsewhere
from tests.airflow.marks import SUBMITTING
from tests.airflow.together import together
from tests.clusters import Job, change_import, spark_submits


def on_its_clusters(story: str) -> pytest.MarkDecorator:
    """
    Tell a story on the clusters that have a Dag for it.

    That is one where they differ only in what ``tests/contract`` and ``tests/cluster`` show of each.
    """
    return pytest.mark.parametrize("cluster", [cluster for told, cluster in SUBMITTING if told == story])


@contextmanager
def killed_before_it_defers(stage: Stage, run: Callable[..., Run], dag: str, **conf: str) -> Iterator[Elsewhere]:
    """Trigger a run whose task is about to defer; at the end of the block the task's process is killed."""
    with stage.about_to_defer(dag) as held:
        job = run_elsewhere(stage, run, dag, **conf)
        held.wait(120)
        yield job
        job.run.kill()
        held.drop()


# --- the three cases of a retry


@on_its_clusters("active")
@together
def test_still_active_is_followed_on(stage: Stage, run: Callable[..., Run], cluster: str) -> None:
    with killed_before_it_defers(stage, run, f"submit_active_{cluster}") as job:
        (first,) = job.wait_for_jobs("running")
    job.run.wait("deferred", try_number=2)
    job.open_gate()
    assert job.run.wait(*ENDED).state == "success", job.run.logs()
    assert job.jobs() == [Job(first.id, "succeeded")]
    assert job.run.store()["spark_job_id"] == job.run.xcoms()["return_value"] == first.id
    assert "Reconnecting to existing job" in job.run.log(2)
    assert job.notes() == ["2"], "post_submit_commands run once, after the verdict"


@on_its_clusters("succeeded")
@together
def test_already_succeeded_is_the_result(stage: Stage, run: Callable[..., Run], cluster: str) -> None:
    with killed_before_it_defers(stage, run, f"submit_succeeded_{cluster}", seconds="1") as job:
        first = job.wait_for_jobs("succeeded")
    ended = job.run.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2), job.run.logs()
    assert job.jobs() == first
    assert "already completed successfully" in job.run.log(2)
    assert "Deferring" not in job.run.log(2)
    assert job.notes() == ["2"]


@on_its_clusters("failed")
@together
def test_failed_is_submitted_again(stage: Stage, run: Callable[..., Run], cluster: str) -> None:
    with killed_before_it_defers(stage, run, f"submit_failed_{cluster}", seconds="1", exit_code="3") as job:
        (first,) = job.wait_for_jobs("failed")
    assert job.run.wait(*ENDED, deadline=240).state == "failed", job.run.logs()
    jobs = job.jobs()
    assert jobs[0] == first
    assert len(jobs) == job.run.ti.try_number == 2, "one job for each try"
    assert {each.state for each in jobs} == {"failed"}
    assert "Prior job in terminal state" in job.run.log(2)
    assert "exiting with 3" in job.run.logs(), "the end of the driver's log"
    assert job.notes() == ["2", "2"], "once for each end: of the dead try's job, and of the one that followed"


# --- while spark-submit runs


@on_its_clusters("marked")
@together
def test_marked_by_a_person_it_is_killed_and_so_is_what_it_submitted(
    stage: Stage, run: Callable[..., Run], cluster: str
) -> None:
    job = run_elsewhere(stage, run, f"submit_marked_{cluster}")
    record = wait_until(lambda: job.run.store().get("durable_spark"), 120, "the intent", interval=0.3)
    token = record["submission"]["token"]
    wait_until(lambda: spark_submits(token), 60, "spark-submit to run", interval=0.2)
    stage.airflow.set_state(*job.run.key, "failed")
    wait_until(lambda: not spark_submits(token), 30, "spark-submit to be killed", interval=0.2)
    wait_until(lambda: "running" not in job.states(), 60, "no job to be left", interval=0.3)
    assert len(job.jobs()) <= 1


# --- from one operator to the other


def change_operator(stage: Stage, dag: str, *, to_ours: bool) -> None:
    """Write the Dag file that began with the one operator, and goes on with the other."""
    source = SUBMIT_DAG.read_text()
    (stage.dags / f"{dag}.py").write_text(change_import(source) if to_ours else source)


@on_its_clusters("taken")
@together
def test_upstreams_task_in_flight_is_taken_up(stage: Stage, run: Callable[..., Run], cluster: str) -> None:
    dag = f"submit_taken_{cluster}"
    job = run_elsewhere(stage, run, dag)
    (first,) = job.wait_for_jobs("running")
    wait_until(lambda: job.run.store().get("spark_job_id") == first.id, 60, "upstream to store the ID", interval=0.3)
    change_operator(stage, dag, to_ours=True)
    job.run.kill()
    job.run.wait("deferred", try_number=2)
    job.open_gate()
    assert job.run.wait(*ENDED).state == "success", job.run.logs()
    assert job.jobs() == [Job(first.id, "succeeded")]
    assert f"Adopting {first.id}" in job.run.log(2)
    stage.wait_for_count("adoptions.stored", f"submit_{cluster}")


@on_its_clusters("given")
@together
def test_our_task_in_flight_is_taken_up_by_upstream(stage: Stage, run: Callable[..., Run], cluster: str) -> None:
    clusters_of(stage)
    dag = f"submit_given_{cluster}"
    with killed_before_it_defers(stage, run, dag) as job:
        (first,) = job.wait_for_jobs("running")
        change_operator(stage, dag, to_ours=False)
    job.run.wait_until_said("Reconnecting to existing job", try_number=2, deadline=120)
    job.open_gate()
    ended = job.run.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2), job.run.logs()
    assert [each.id for each in job.jobs()] == [first.id]
