"""
Triggers that move: whatever becomes of their triggerer, another one follows the jobs on, and nothing is killed.

All jobs are put on the stage once, on one triggerer. Each test stops the triggerer that has them, in another way, and
they go over to the other one. In the end each job has ended once, whatever it has been through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pytest

from dev.processes import Server, wait_until
from tests.airflow.conftest import ENDED, Run, Stage, runs_of
from tests.airflow.gates import open_gate

if TYPE_CHECKING:
    from dev.airflow import TaskInstance

ITEMS = {"moved_items": 3, "moved_marked": 2}
"""Over how many items a Dag's task is mapped."""
FRESH = 2.0
"""Seconds: a triggerer whose last heartbeat is older may lose its triggers before a test takes them from it."""
STAYING = ("moved", "moved_items")
DAGS = (*STAYING, "moved_ended", "moved_unseen", "moved_marked", "moved_cleared", "moved_retried", "moved_unreached")


class Triggerer(NamedTuple):
    """One that is at work, as the database has it."""

    job: int
    name: str
    silent: float
    """Seconds since its last heartbeat."""


@dataclasses.dataclass(frozen=True)
class Followed:
    """A task instance whose job a triggerer follows."""

    run: Run
    index: int
    """Its map index, -1 if it is not mapped."""

    @property
    def ti(self) -> TaskInstance:
        return self.run.stage.airflow.task(*self.run.key, self.index)

    @property
    def name(self) -> tuple[str, int]:
        return self.run.id, self.index

    @property
    def pod(self) -> str:
        """The name of its pod, as the task has told it."""
        return str(self.run.stage.airflow.xcoms(*self.run.key, self.index)["spark_job_id"]).removeprefix("spark:")

    @property
    def log(self) -> dict[str, str]:
        """The files of the first try's log."""
        return self.run.told(1, self.index)

    def count(self, what: str) -> int:
        """Return how often the first try's log has this, a regular expression that goes over lines."""
        return sum(len(re.findall(what, text, re.DOTALL | re.MULTILINE)) for text in self.log.values())

    def wait_until_told(self, what: str, *, times: int = 1) -> None:
        """Wait until the first try's log has this so often."""
        try:
            wait_until(lambda: self.count(what) >= times, 60, f"{self.run.dag} to say {what!r}", interval=0.7)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def times_taken_up(self) -> int:
        """Return how many triggers of the first try have found its pod running."""
        return self.count(r"^spark:\S+ is Running$")


@dataclasses.dataclass(frozen=True)
class Jobs:
    """All jobs of the module."""

    stage: Stage
    runs: dict[str, Run]

    def of(self, *dags: str) -> list[Followed]:
        return [
            Followed(self.runs[dag], index) for dag in dags for index in (range(ITEMS[dag]) if dag in ITEMS else [-1])
        ]

    @property
    def deferred(self) -> list[Followed]:
        """What is deferred now."""
        return [job for job in self.of(*DAGS) if job.name in self._triggerers()]

    def triggerer(self) -> int:
        """Return the number of the triggerer that follows them all, once one does."""

        def having() -> Triggerer | None:
            triggerers = {each and each.job: each for each in self._triggerers().values()}
            one = triggerers.popitem()[1]
            if triggerers or one is None or one.silent > FRESH:
                return None
            its_file = f".trigger.{one.job}.log"
            return one if all(any(its_file in name for name in job.log) for job in self.deferred) else None

        name = wait_until(having, 60, "one triggerer to follow all jobs", interval=0.7).name
        return [triggerer.name for triggerer in self.stage.airflow.triggerers].index(name)

    def _triggerers(self) -> dict[tuple[str, int], Triggerer | None]:
        """Return who has the trigger of each task that is deferred: from the database, because it is asked often."""
        found = self.stage.postgres.query(
            "SELECT run_id, map_index, job.id, job.hostname, extract(epoch FROM now() - latest_heartbeat) "
            "FROM task_instance LEFT JOIN trigger ON trigger_id = trigger.id LEFT JOIN job ON triggerer_id = job.id "
            "WHERE task_instance.state = 'deferred' AND task_instance.dag_id = ANY(%(dags)s)",
            dags=list(DAGS),
        )
        return {(run, index): Triggerer(*job) if job[0] is not None else None for run, index, *job in found}

    @contextlib.contextmanager
    def moving(self, jobs: Sequence[Followed], number: int) -> Iterator[None]:
        """Wait, at the end of the block, until jobs are followed by a triggerer; nothing was killed on the way."""
        before = [job.times_taken_up() for job in jobs]
        yield
        server, names = self.stage.airflow.triggerers[number], [job.name for job in jobs]

        def moved() -> bool:
            triggerers = self._triggerers()
            return all((its := triggerers.get(each)) and its.name == server.name for each in names)

        def taken_up() -> bool:
            return all(job.times_taken_up() > times for job, times in zip(jobs, before, strict=True))

        wait_until(moved, 60, f"{server.name} to have the triggers", servers=[server], interval=0.7)
        wait_until(taken_up, 60, f"{server.name} to follow the jobs", servers=[server], interval=0.5)
        self.assert_alive(jobs)

    def assert_alive(self, jobs: Sequence[Followed]) -> None:
        for job in jobs:
            assert self.stage.pod_cluster.pod(job.pod)["status"]["phase"] == "Running"
            assert job.pod not in self.deleted_pods()

    def deleted_pods(self) -> set[str]:
        """Return the pods for whose deletion anybody has asked, by the API server's audit log."""
        return {
            entry["objectRef"]["name"]
            for entry in self.stage.pod_cluster.audit()
            if entry["verb"] == "delete" and entry["objectRef"]["resource"] == "pods"
        }


@pytest.fixture(scope="module")
def jobs(stage: Stage) -> Iterator[Jobs]:
    """Put all jobs on the stage; the first triggerer follows them."""
    first, second = stage.airflow.triggerers
    with runs_of(stage) as trigger:
        second.freeze()
        try:
            jobs = Jobs(stage, {dag: trigger(dag) for dag in DAGS})
            wait_until(lambda: len(jobs.deferred) == len(jobs.of(*DAGS)), 120, "all to be deferred", interval=0.7)
            jobs.triggerer()
        finally:
            second.thaw()
        assert first.alive
        yield jobs
        for run in jobs.runs.values():
            open_gate(run)


def test_told_to_stop(stage: Stage, jobs: Jobs) -> None:
    old = jobs.triggerer()
    triggerer = stage.airflow.triggerers[old]
    with jobs.moving(jobs.deferred, 1 - old):
        os.kill(triggerer.pid, signal.SIGTERM)
    wait_until(lambda: not triggerer.alive, 60, "the triggerer to end")
    triggerer.start()


def test_killed_as_it_looks(stage: Stage, jobs: Jobs) -> None:
    """
    The process that speaks to Airflow dies, as ``on_kill`` asks what has become of a task that is marked as failed.

    The process that runs the triggers outlives it, and never gets the answer: it kills nothing, not even that job.
    """
    old = jobs.triggerer()
    triggerer, other = stage.airflow.triggerers[old], stage.airflow.triggerers[1 - old]
    (unseen,) = jobs.of("moved_unseen")
    others = [job for job in jobs.deferred if job != unseen]
    with jobs.moving(others, 1 - old):
        other.freeze()  # it takes none of them too early
        try:
            assert jobs.triggerer() == old
            suspend_as_it_looks(stage, triggerer, unseen)
        finally:
            other.thaw()
        os.kill(triggerer.pid, signal.SIGKILL)
    jobs.assert_alive([unseen])
    triggerer.kill()
    triggerer.start()


def test_suspended_and_awake_again(stage: Stage, jobs: Jobs) -> None:
    """What has become of the tasks meanwhile is not the old triggerer's business when it wakes up."""
    old = jobs.triggerer()
    triggerer = stage.airflow.triggerers[old]
    (ended,), (cleared,), (retried,) = map(jobs.of, ("moved_ended", "moved_cleared", "moved_retried"))
    kept, marked = jobs.of("moved_marked")
    with jobs.moving(jobs.deferred, 1 - old):
        triggerer.freeze()
    killed = {marked.pod, cleared.pod}
    stage.airflow.set_state(*marked.run.key, "failed", marked.index)
    stage.airflow.clear(cleared.run.dag, cleared.run.id, ["job"])
    open_gate(ended.run)
    wait_until(lambda: killed <= jobs.deleted_pods(), 60, "two pods to be killed", interval=0.2)
    cleared.run.wait("deferred", try_number=2)
    assert ended.run.wait(*ENDED).state == "success"
    fail_by_an_outage(stage, retried)

    going_on = [*jobs.of(*STAYING), kept, retried]
    before = [job.count("goes on elsewhere") for job in going_on]
    triggerer.thaw()
    for job, times in zip(going_on, before, strict=True):
        job.wait_until_told("goes on elsewhere", times=times + 1)
    jobs.assert_alive([*going_on, cleared])
    ours = {pod.name for run in jobs.runs.values() for pod in run.pods()}
    assert jobs.deleted_pods() & ours == killed
    assert stage.pod_cluster.pod(ended.pod)["status"]["phase"] == "Succeeded"
    assert all(triggerer.alive for triggerer in stage.airflow.triggerers)


def test_marked_while_the_cluster_hangs(stage: Stage, jobs: Jobs) -> None:
    """With each round of its loop the triggerer cancels ``on_kill`` anew, which the kill must outlive."""
    (job,) = jobs.of("moved_unreached")
    cluster, pod = stage.pod_cluster, job.pod
    cancelled = "invoking on_kill.*?trigger completed"
    before = job.count(cancelled)
    cluster.api_server.suspend()
    try:
        stage.airflow.set_state(*job.run.key, "failed")
        job.wait_until_told(cancelled, times=before + 1)
    finally:
        cluster.api_server.resume()
    wait_until(lambda: pod in jobs.deleted_pods(), 60, "the pod to be killed", interval=0.2)


def suspend_as_it_looks(stage: Stage, triggerer: Server, job: Followed) -> None:
    """Mark a task as failed, and suspend its triggerer when that asks for the task's state."""
    with contextlib.closing(stage.postgres.connect()) as one, contextlib.closing(stage.postgres.connect()) as two:
        cursor = one.cursor()
        # As the API server does it, which itself needs what is to be locked.
        cursor.execute(
            "UPDATE task_instance SET state = 'failed', end_date = now(), trigger_id = NULL WHERE id = %s", [job.ti.id]
        )
        two.cursor().execute("SET lock_timeout = '30s'")
        two.cursor().execute("LOCK TABLE dag_run IN ACCESS EXCLUSIVE MODE")  # a task's state is read with its run
        one.commit()

        def looks() -> bool:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s",
                [f"%FROM task_instance%'{job.run.id}'%"],
            )
            one.commit()
            return bool(cursor.fetchone()[0])

        wait_until(looks, 30, "the triggerer to ask for the task's state", interval=0.05)
        triggerer.suspend()


def fail_by_an_outage(stage: Stage, job: Followed) -> None:
    """Let a try end because the cluster is out of reach for longer than it bears; wait until another one follows."""
    cluster = stage.pod_cluster
    cluster.api_server.kill()
    try:
        wait_until(lambda: job.ti.try_number > 1, 60, "a retry", interval=0.2)
    finally:
        cluster.api_server.start()
    wait_until(cluster.ready, 60, "the API server", servers=[cluster.api_server], interval=0.1)
    job.run.wait("deferred")
    job.run.wait_until_followed()


def test_each_has_ended_once(stage: Stage, jobs: Jobs) -> None:
    for run in jobs.runs.values():
        open_gate(run)
    for job in jobs.of(*STAYING):
        ended = stage.airflow.wait_for_state(*job.run.key, ENDED, deadline=90, map_index=job.index)
        assert (ended.state, ended.try_number) == ("success", 1)
        events = stage.airflow.events(*job.run.key)
        begun = [event for event in events if (event["event"], event["map_index"]) == ("running", job.index)]
        assert len(begun) == 2, f"execute, and execute_complete: {events}"
        assert job.count("Trigger fired event") == 1
        assert stage.airflow.store(*job.run.key, job.index)["durable_spark"]["verdict"]["state"] == "succeeded"
    assert [len(jobs.runs[dag].pods()) for dag in STAYING] == [1, 3]
