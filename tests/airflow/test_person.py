"""
What a person does to a task: clear it, mark it, delete or pause what it is part of.

Counted and timed by the API server's audit log: a cleared task never runs beside its old job, and a job that nobody
waits for any more is killed within seconds, or kept if so asked.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import pytest

from dev.airflow import ApiError
from dev.processes import wait_until
from durable_spark.jobs import RECORD_KEY
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.elsewhere import run_elsewhere
from tests.airflow.gates import open_gate
from tests.airflow.lives import lives_of, now, one_after_the_other
from tests.airflow.together import from_the_start, together

if TYPE_CHECKING:
    from datetime import datetime

    from dev.kubernetes import CreatedPod
    from dev.proxy import Hold

T = TypeVar("T")

SECONDS = 30.0
"""Within which a job is killed that nobody waits for. On an idle machine it takes two or three."""


@contextlib.contextmanager
def sending(stage: Stage, dag: str) -> Iterator[Hold]:
    """Hold back the API server's answer to the creation of a Dag's pod."""
    name = f'"name": ?"{dag.replace("_", "-")}-job-'
    with stage.kubernetes_api.holding("POST", r"/namespaces/spark/pods\b", body=name, after=True) as held:
        yield held


def killed_before_it_defers(stage: Stage, run: Callable[..., Run], dag: str, *, paused: bool = False) -> Run:
    """Return a run whose pod runs, and whose task's process was killed before the task could defer."""
    with stage.killed_before_it_defers(run, dag) as job:
        job.wait_for_pod("Running")
        if paused:
            stage.airflow.pause(dag)
    return job


def wait_for(job: Run, condition: Callable[[], T | None], what: str, deadline: float = 90) -> T:
    """Wait until a condition returns something true, and return that; a failure shows the task's log."""
    try:
        return wait_until(condition, deadline, f"{job.dag}: {what}", interval=0.7)
    except TimeoutError as error:
        try:
            said = job.logs()
        except ApiError as gone:  # a run that was deleted
            said = str(gone)
        raise AssertionError(f"{error}\n{said}") from None


def wait_for_kill(job: Run) -> datetime:
    """Wait until the hook has asked for the end of the run's first pod; return when it did."""
    return wait_for(job, lambda: next((life.killed for life in lives_of(job)), None), "its pod to be killed")


def clear(job: Run) -> None:
    job.stage.airflow.clear(job.dag, job.id, [job.task])


def cleared_while_followed(job: Run) -> CreatedPod:
    """Clear a deferred task; return its pod, when the old trigger has left that to the new try."""
    old = job.wait_for_followed_pod()
    clear(job)
    job.wait("deferred", try_number=2)
    job.wait_until_said(f"Not killing spark:{old.name}")
    return old


def runs_anew(job: Run, old: CreatedPod) -> None:
    """See a cleared task through to its end, and that its new pod was made after its old one was gone."""
    wait_for_kill(job)
    ends_well(job, 2)
    assert job.pods()[0] == old
    assert re.search(f"Submitted as .*, because .*spark:{old.name}\\b.* is dead", job.logs())


def ends_well(job: Run, count: int) -> None:
    """Let the run's pods end, of which there were so many, one after the other."""
    open_gate(job)
    assert job.wait(*ENDED).state == "success", job.logs()
    last = one_after_the_other(job, count)[-1]
    assert last.killed is None, "the last one was left alone"
    assert job.phase(last.pod) == "Succeeded"
    assert job.xcoms()["return_value"] == job.store()["spark_job_id"] == f"spark:{last.pod.name}"


# --- on the other clusters: few stories, because a job costs a JVM


@pytest.mark.parametrize("dag", ["other_standalone", "other_yarn"])
@together
def test_cleared_and_marked_on_other_clusters(stage: Stage, run: Callable[..., Run], dag: str) -> None:
    """The drop-in on YARN, the other operator on a standalone cluster."""
    other = run_elsewhere(stage, run, dag)
    job = other.run
    other.wait_until_followed()
    other.wait_for_jobs("running")
    clear(job)
    seen: list[str] = []

    def changed() -> bool:
        seen[:] = other.states()
        return seen != ["running"]

    wait_for(job, changed, "the old job's end")
    assert seen[0] == "killed", "before a new one is seen"
    other.wait_until_followed(2)
    other.wait_for_jobs("killed", "running")
    began = now()
    end(job, "failed")
    other.wait_for_jobs("killed", "killed")
    took = (now() - began).total_seconds()
    print(f"{job.dag}: killed after {took:.1f} s")
    assert took <= SECONDS
    assert job.ti.state == "failed"


# --- cleared


@together
def test_cleared_after_its_end_it_runs_again(stage: Stage, run: Callable[..., Run]) -> None:
    """The store still has the record of the job that failed."""
    job = run("clear_failed", exit_code="3")
    open_gate(job)
    assert job.wait_for_end() == "failed"
    before = job.store()[RECORD_KEY]
    clear(job)
    job.wait("failed", try_number=2)
    one_after_the_other(job, 2)
    record = job.store()[RECORD_KEY]
    assert record["submission"]["token"] != before["submission"]["token"]
    assert (before["submission"]["ordinal"], record["submission"]["ordinal"]) == (1, 2)


@together
def test_cleared_with_what_comes_after_and_with_its_run(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("clear_chain")
    after = Run(stage, job.dag, job.id, job._before, "after")
    open_gate(job)
    assert job.wait_for_end() == "success"
    (stage.airflow.home / "gates" / job.id).unlink()

    stage.airflow.clear(job.dag, job.id, ["job"], include_downstream=True)
    job.wait("deferred", try_number=2)
    job.wait_for_pod("Running")
    assert after.ti.state is None
    path = f"/dags/{job.dag}/dagRuns/{job.id}/clear"
    stage.airflow.api("POST", path, {"dry_run": False, "only_failed": False})
    job.wait("deferred", try_number=3)
    open_gate(job)
    after.wait(*ENDED)
    assert [task.ti.state for task in (job, after)] == ["success", "success"]
    assert [life.killed is not None for life in one_after_the_other(job, 3)] == [False, True, False]
    one_after_the_other(after, 2)


@together
def test_cleared_while_deferred(stage: Stage, run: Callable[..., Run]) -> None:
    """The old trigger is told late of it, and finds the new try's state: it kills nothing."""
    job = run("clear_deferred")
    old = cleared_while_followed(job)
    runs_anew(job, old)


@together
def test_cleared_and_followed_on_if_so_asked(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("clear_following")
    old = cleared_while_followed(job)
    ends_well(job, 1)
    assert job.pods() == [old]


@together
def test_cleared_while_it_submits(stage: Stage, run: Callable[..., Run]) -> None:
    """The pod is there, its submitter does not know that yet, and the store has only the intent."""
    with sending(stage, "clear_sending") as held:
        job = run("clear_sending")
        held.wait()
        old = job.wait_for_pod("Running")
        clear(job)
        wait_for_kill(job)
    runs_anew(job, old)


@together
def test_cleared_while_it_waits_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("clear_waiting")
    old = job.wait_for_pod("Running")
    job.wait_until_said(f"spark:{old.name} is Running")
    clear(job)
    job.wait("running", try_number=2)
    wait_for(job, lambda: len(job.pods()) == 2, "the new pod")
    ends_well(job, 2)


@together
def test_cleared_while_it_waits_for_its_retry(stage: Stage, run: Callable[..., Run]) -> None:
    job = killed_before_it_defers(stage, run, "clear_retry")
    (old,) = job.pods()
    job.wait("up_for_retry")
    clear(job)
    runs_anew(job, old)


@together
def test_cleared_after_it_failed_with_its_job_kept(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("clear_kept")
    old = job.wait_for_followed_pod()
    stage.airflow.set_state(*job.key, "failed")
    assert job.wait_for_end() == "failed"
    job.wait_until_said("Leaving")
    assert job.phase(old) == "Running"
    clear(job)
    runs_anew(job, old)


@together
def test_cleared_after_its_job_was_lost(stage: Stage, run: Callable[..., Run]) -> None:
    """Nobody saw the pod's end: no retry submits beside what it may have done, a person may."""
    job = killed_before_it_defers(stage, run, "clear_lost", paused=True)
    (old,) = job.pods()
    stage.pod_cluster.delete_pod(old.name, 0)
    stage.airflow.unpause(job.dag)
    assert job.wait_for_end() == "failed"
    assert job.ti.try_number == 2
    assert "JobLost" in job.logs()
    assert "clear the task to run it again" in job.logs()
    assert job.pods() == [old]
    clear(job)
    job.wait("deferred", try_number=3)
    ends_well(job, 2)


@together
def test_cleared_twice_in_a_row(stage: Stage, run: Callable[..., Run]) -> None:
    """The second time while the first one's new try still waits for the old pod's death."""
    job = run("clear_twice")
    old = job.wait_for_followed_pod()
    for try_number in (2, 3):
        clear(job)
        job.wait("running", try_number=try_number)
        job.wait_until_said(f"Killing spark:{old.name} before this task runs again", try_number=try_number)
    assert job.pods() == [old]
    runs_anew(job, old)
    assert job.ti.try_number == 3


@together
def test_cleared_with_its_store_dropped(stage: Stage, run: Callable[..., Run]) -> None:
    """As a newer Airflow does. The job is found by its label, but it may be another deployment's."""
    job = run("clear_dropped")
    old = job.wait_for_followed_pod()
    clear_with_its_store(job)
    assert job.wait(*ENDED).state == "failed"
    said = job.logs()
    assert f"spark:{old.name}" in said
    assert "[durable_spark] deployment is not set" in said
    (life,) = lives_of(job)
    assert (life.killed, job.phase(old)) == (None, "Running")
    open_gate(job)


@together
def test_cleared_with_its_store_dropped_and_a_name(stage: Stage, run: Callable[..., Run]) -> None:
    """The label says that the job is this deployment's."""
    job = run("clear_named")
    old = job.wait_for_followed_pod()
    clear_with_its_store(job)
    runs_anew(job, old)


@together
def test_cleared_with_its_store_dropped_and_followed_on_if_so_asked(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("clear_labelled")
    old = job.wait_for_followed_pod()
    clear_with_its_store(job)
    job.wait("deferred", try_number=2)
    assert f"Adopting spark:{old.name}" in job.log(2)
    stage.wait_for_count("adoptions.labelled", "kubernetes")
    ends_well(job, 1)
    assert job.pods() == [old]


def clear_with_its_store(job: Run) -> None:
    airflow = job.stage.airflow
    airflow.pause(job.dag)
    clear(job)
    for key in job.store():
        airflow.delete_store(*job.key, key)
    assert job.store() == {}
    airflow.unpause(job.dag)


# --- marked, deleted, paused


def end(job: Run, way: str) -> None:
    airflow = job.stage.airflow
    if way in ("failed", "success"):
        airflow.set_state(*job.key, way)
    else:
        airflow.set_run_state(job.dag, job.id, "failed")
    if way == "deleted":  # Airflow deletes no run that is running
        airflow.delete_run(job.dag, job.id)


@pytest.mark.parametrize("way", ["failed", "success", "run", "deleted"])
@together
def test_ended_by_a_person_while_deferred(stage: Stage, run: Callable[..., Run], way: str) -> None:
    job = run(f"end_{way}")
    job.wait_for_followed_pod()
    is_killed(job, way)


@together
def test_ended_by_a_person_while_it_waits_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("wait_failed")
    pod = job.wait_for_pod("Running")
    job.wait_until_said(f"spark:{pod.name} is Running")
    is_killed(job, "failed")


@pytest.mark.parametrize("way", ["failed", "success", "run", "deleted"])
@together
def test_ended_by_a_person_while_it_submits(stage: Stage, run: Callable[..., Run], way: str) -> None:
    with sending(stage, f"send_{way}") as held:
        job = run(f"send_{way}")
        held.wait()
        end(job, way)
        began = now()
    is_killed(job, began=began)


def is_killed(job: Run, way: str = "", *, began: datetime | None = None) -> None:
    """End the task in a way, unless that was done, and see its only pod killed within seconds."""
    if began is None:
        began = now()
        end(job, way)
    took = (wait_for_kill(job) - began).total_seconds()
    print(f"{job.dag}: killed after {took:.1f} s")
    assert took <= SECONDS
    job.wait_for_pod(None)
    assert len(job.pods()) == 1


@pytest.mark.parametrize("way", ["failed", "deleted"])
@together
def test_kept_if_so_asked(stage: Stage, run: Callable[..., Run], way: str) -> None:
    """It is let go of, since nobody waits for its end any more, and lives on."""
    job = run(f"keep_{way}")
    job.wait_for_followed_pod()
    end(job, way)
    is_kept(job)


@together
def test_kept_if_so_asked_while_it_submits(stage: Stage, run: Callable[..., Run]) -> None:
    with sending(stage, "send_kept") as held:
        job = run("send_kept")
        held.wait()
        end(job, "failed")
    is_kept(job)


def is_kept(job: Run) -> None:
    """See the run's only pod let go of, and its end, which nobody has brought about."""
    (pod,) = job.pods()
    cluster = job.stage.pod_cluster
    wait_for(job, lambda: "finalizers" not in cluster.pod(pod.name)["metadata"], "its pod to be let go of", SECONDS)
    open_gate(job)
    job.wait_for_pod("Succeeded")
    (life,) = lives_of(job)
    assert life.killed is None


@from_the_start
def test_paused_nothing_is_killed(stage: Stage, run: Callable[..., Run]) -> None:
    """While it submits, while it is deferred, and when its job ends. It goes on when the Dag does."""
    with sending(stage, "paused") as held:
        job = run("paused")
        held.wait()
        stage.airflow.pause(job.dag)
    pod = job.wait_for_followed_pod()
    open_gate(job)
    job.wait_for_pod("Succeeded")
    job.wait("scheduled")
    stage.airflow.unpause(job.dag)
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert job.pods() == [pod]
    assert lives_of(job)[0].killed is None
