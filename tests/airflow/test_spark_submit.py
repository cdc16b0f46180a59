"""
The drop-in on a real Airflow and each cluster: a Dag that was written for upstream's operator, its import changed.

Counted by each cluster's own record: one job per submission, whatever died when.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, LAST_LOOK, SUBMIT_DAG, Run, Stage
from tests.clusters import CLUSTERS, Clusters, Job, change_import, spark_submits

if TYPE_CHECKING:
    from dev.proxy import Hold


@dataclasses.dataclass
class SubmitRun:
    """A run whose job ``spark-submit`` submits, and all jobs that the cluster has had since it began."""

    clusters: Clusters
    cluster: str
    life: Run
    before: set[str]

    def jobs(self) -> list[Job]:
        return [job for job in self.clusters.jobs(self.cluster) if job.id not in self.before]

    def wait_for_job(self, *states: str) -> Job:
        """Wait until the run's latest job is in one of the states."""

        def reached() -> Job | None:
            jobs = self.jobs()
            return jobs[-1] if jobs and jobs[-1].state in states else None

        try:
            return wait_until(reached, 90, f"a job of {self.life.dag} that is {states}", interval=0.1)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.jobs()}\n{self.life.logs()}") from None

    def notes(self) -> list[str]:
        """Return the tries in which ``post_submit_commands`` ran."""
        file = self.clusters.directory / "notes" / self.life.id
        return file.read_text().split() if file.exists() else []


@dataclasses.dataclass
class Scene:
    """One cluster's part of a test."""

    stage: Stage
    clusters: Clusters
    cluster: str
    trigger: Callable[..., Run]

    def submit(self, file: str, **conf: str) -> SubmitRun:
        """Trigger a run of a Dag file's Dag for the cluster."""
        before = {job.id for job in self.clusters.jobs(self.cluster)}
        return SubmitRun(self.clusters, self.cluster, self.trigger(f"{file}_{self.cluster}", **conf), before)

    def last_look(self) -> AbstractContextManager[Hold]:
        """Hold back what the cluster's task asks last before it defers."""
        return self.stage.execution_api.holding("GET", f"{LAST_LOOK}.*_{self.cluster}")

    def change_operator(self, *, to_ours: bool) -> None:
        """Write the Dag file that begins with the one operator and goes on with the other."""
        source = SUBMIT_DAG.read_text()
        (self.stage.dags / f"changing_{self.cluster}.py").write_text(change_import(source) if to_ours else source)


@pytest.fixture
def on_each_cluster(stage: Stage, run: Callable[..., Run]) -> Callable[[Callable[[Scene], None]], None]:
    """Play the scene on all clusters at the same time: most of it is waiting."""
    clusters = stage.submit
    if clusters is None:
        pytest.skip("there is no Kubernetes or no YARN cluster")

    def play(scene: Callable[[Scene], None]) -> None:
        with ThreadPoolExecutor() as threads:
            playing = {name: threads.submit(scene, Scene(stage, clusters, name, run)) for name in CLUSTERS}
        failures = {name: error for name, played in playing.items() if (error := played.exception())}
        for name, error in failures.items():
            print(f"--- {name}")
            traceback.print_exception(error)
        assert not failures, failures

    return play


OnEachCluster = Callable[[Callable[[Scene], None]], None]


# --- the three cases of a retry


def test_still_active_is_followed_on(on_each_cluster: OnEachCluster) -> None:
    def scene(on: Scene) -> None:
        with on.last_look() as held:
            job = on.submit("dropin", seconds="40")
            held.wait(90)
            first = job.wait_for_job("running")
            job.life.kill()
            held.drop()
        job.life.wait("deferred", try_number=2)
        assert job.life.wait(*ENDED, deadline=120).state == "success", job.life.logs()
        assert job.jobs() == [Job(first.id, "succeeded")]
        assert job.life.store()["spark_job_id"] == job.life.xcoms()["return_value"] == first.id
        assert "Reconnecting to existing job" in job.life.log(2)
        assert job.notes() == ["2"], "post_submit_commands run once, after the verdict"

    on_each_cluster(scene)


def test_already_succeeded_is_the_result(on_each_cluster: OnEachCluster) -> None:
    def scene(on: Scene) -> None:
        with on.last_look() as held:
            job = on.submit("dropin", seconds="1")
            held.wait(90)
            on.stage.airflow.pause(job.life.dag)
            job.life.kill()
            held.drop()
        first = job.wait_for_job("succeeded")
        on.stage.airflow.unpause(job.life.dag)
        ended = job.life.wait(*ENDED, deadline=120)
        assert (ended.state, ended.try_number) == ("success", 2), job.life.logs()
        assert job.jobs() == [first]
        assert "already completed successfully" in job.life.log(2)
        assert "Deferring" not in job.life.log(2)
        assert job.notes() == ["2"]

    on_each_cluster(scene)


def test_failed_is_submitted_again(on_each_cluster: OnEachCluster) -> None:
    def scene(on: Scene) -> None:
        with on.last_look() as held:
            job = on.submit("dropin", seconds="1", exit_code="3")
            held.wait(90)
            on.stage.airflow.pause(job.life.dag)
            job.life.kill()
            held.drop()
        first = job.wait_for_job("failed")
        on.stage.airflow.unpause(job.life.dag)
        assert job.life.wait(*ENDED, deadline=240).state == "failed", job.life.logs()
        jobs = job.jobs()
        assert jobs[0] == first
        assert len(jobs) == job.life.ti.try_number == 3, "one job for each try"
        assert {each.state for each in jobs} == {"failed"}
        assert "Prior job in terminal state" in job.life.log(2)
        assert "exiting with 3" in job.life.logs(), "the end of the driver's log"
        assert job.notes() == ["2", "2", "3"], "once for each end: of the dead try's job, and of each that followed"

    on_each_cluster(scene)


# --- while spark-submit runs


def test_marked_by_a_person_it_is_killed_and_so_is_what_it_submitted(on_each_cluster: OnEachCluster) -> None:
    def scene(on: Scene) -> None:
        job = on.submit("dropin", seconds="600")
        record = wait_until(lambda: job.life.store().get("durable_spark"), 60, "the intent", interval=0.1)
        token = record["submission"]["token"]
        wait_until(lambda: spark_submits(token), 30, "spark-submit to run", interval=0.2)
        on.stage.airflow.set_state(*job.life.key, "failed")
        wait_until(lambda: not spark_submits(token), 15, "spark-submit to be killed", interval=0.1)
        wait_until(lambda: all(each.state != "running" for each in job.jobs()), 30, "no job to be left", interval=0.2)
        assert len(job.jobs()) <= 1

    on_each_cluster(scene)


# --- from one operator to the other


def test_upstreams_task_in_flight_is_taken_up(on_each_cluster: OnEachCluster) -> None:
    def scene(on: Scene) -> None:
        on.change_operator(to_ours=False)
        job = on.submit(f"changing_{on.cluster}", seconds="40")
        first = job.wait_for_job("running")
        wait_until(lambda: job.life.store().get("spark_job_id") == first.id, 60, "upstream to store the ID")
        on.change_operator(to_ours=True)
        job.life.kill()
        job.life.wait("deferred", try_number=2)
        assert job.life.wait(*ENDED, deadline=120).state == "success", job.life.logs()
        assert job.jobs() == [Job(first.id, "succeeded")]
        assert f"Adopting {first.id}" in job.life.log(2)
        on.stage.wait_for_count("adoptions.stored", f"submit_{on.cluster}")

    on_each_cluster(scene)


def test_our_task_in_flight_is_taken_up_by_upstream(on_each_cluster: OnEachCluster) -> None:
    def scene(on: Scene) -> None:
        on.change_operator(to_ours=True)
        with on.last_look() as held:
            job = on.submit(f"changing_{on.cluster}", seconds="40")
            held.wait(90)
            first = job.wait_for_job("running")
            on.change_operator(to_ours=False)
            job.life.kill()
            held.drop()
        ended = job.life.wait(*ENDED, deadline=120)
        assert (ended.state, ended.try_number) == ("success", 2), job.life.logs()
        assert [each.id for each in job.jobs()] == [first.id]
        assert "Reconnecting to existing job" in job.life.log(2)

    on_each_cluster(scene)
