"""
Driver pods from a real Airflow: the three cases of a retry, and what may happen to a pod that a task waits for.

Counted by the API server's audit log: one pod per submission, whatever died when.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from dev.kubernetes import RequestFailed
from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.test_retry import LAST_LOOK

if TYPE_CHECKING:
    from dev.kubernetes import CreatedPod, KubernetesCluster

    RunPod = Callable[..., "PodRun"]

STORE = r"/execution/store/"


@dataclasses.dataclass
class PodRun:
    """A run whose job is a pod, and all pods that were ever created for it."""

    cluster: KubernetesCluster
    life: Run
    before: set[str]

    def pods(self) -> list[CreatedPod]:
        return [
            pod
            for pod in self.cluster.created_pods()
            if pod.name.startswith(f"{self.life.dag.replace('_', '-')}-job-") and pod.uid not in self.before
        ]

    def phase(self, pod: CreatedPod) -> str | None:
        """Return the pod's phase, ``None`` when it is gone."""
        try:
            return str(self.cluster.pod(pod.name)["status"]["phase"])
        except RequestFailed as error:
            if error.status != 404:
                raise
            return None

    def wait_for_pod(self, *phases: str | None) -> CreatedPod:
        """Wait until the run's latest pod is in one of the phases."""

        def reached() -> CreatedPod | None:
            pods = self.pods()
            return pods[-1] if pods and self.phase(pods[-1]) in phases else None

        try:
            return wait_until(reached, 60, f"a pod of {self.life.dag} that is {phases}", interval=0.1)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.life.logs()}") from None

    def wait_until_followed(self) -> CreatedPod:
        """Wait until the run's pod runs and its trigger follows it."""
        self.life.wait("deferred")
        pod = self.wait_for_pod("Running")
        self.life.wait_until_followed()
        return pod


@pytest.fixture
def run_pod(stage: Stage, run: Callable[..., Run]) -> RunPod:
    """Trigger a run of a Dag whose job is a pod."""
    cluster = stage.kubernetes
    if cluster is None:
        pytest.skip("there is no Kubernetes cluster")

    def trigger(dag: str, **conf: str) -> PodRun:
        before = {pod.uid for pod in cluster.created_pods()}
        return PodRun(cluster, run(dag, **conf), before)

    return trigger


# --- the three cases of a retry


def test_still_active_is_followed_on(stage: Stage, run_pod: RunPod) -> None:
    with stage.execution_api.holding("GET", LAST_LOOK) as held:
        job = run_pod("pod", seconds="15")
        held.wait()
        pod = job.wait_for_pod("Running")
        job.life.kill()
        held.drop()
    job.life.wait("deferred", try_number=2)
    assert job.life.wait(*ENDED).state == "success"
    assert job.pods() == [pod]
    assert job.life.xcoms()["return_value"] == f"spark:{pod.name}"
    assert "Reconnecting to existing job" in job.life.log(2)


def test_already_succeeded_is_the_result(stage: Stage, run_pod: RunPod) -> None:
    with stage.execution_api.holding("GET", LAST_LOOK) as held:
        job = run_pod("pod", seconds="1")
        held.wait()
        stage.airflow.pause("pod")
        job.life.kill()
        held.drop()
    pod = job.wait_for_pod("Succeeded")
    stage.airflow.unpause("pod")
    ended = job.life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert job.pods() == [pod]
    assert "already completed successfully" in job.life.log(2)
    assert "Deferring" not in job.life.log(2)


def test_failed_is_submitted_again(stage: Stage, run_pod: RunPod) -> None:
    with stage.execution_api.holding("GET", LAST_LOOK) as held:
        job = run_pod("pod", seconds="1", exit_code="3")
        held.wait()
        stage.airflow.pause("pod")
        job.life.kill()
        held.drop()
    first = job.wait_for_pod("Failed")
    stage.airflow.unpause("pod")
    assert job.life.wait(*ENDED, deadline=120).state == "failed"
    pods = job.pods()
    assert pods[0] == first
    assert len(pods) == job.life.ti.try_number == 3, "one pod for each try"
    assert "Prior job in terminal state" in job.life.log(2)
    said = job.life.logs()
    assert "exit code 3" in said
    assert "exiting with 3" in said, "the end of the driver's log"


# --- the instants in between


def test_killed_before_the_request_left(stage: Stage, run_pod: RunPod) -> None:
    """The intent is stored, nothing was sent: the retry sees that there is no pod, and never was."""
    with stage.execution_api.holding("PUT", STORE, body='"job": ?null', after=True) as held:
        job = run_pod("pod", seconds="1")
        held.wait()
        job.life.kill()
        held.drop()
    assert job.pods() == []
    ended = job.life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert len(job.pods()) == 1
    assert "does not exist on the cluster" in job.life.log(2)


def test_killed_before_the_uid_was_stored(stage: Stage, run_pod: RunPod) -> None:
    """The pod exists, its uid never came to the store: the intent holds its name."""
    with stage.execution_api.holding("PUT", STORE, body=r'"job": ?\["spark:[^"]+", ?"[0-9a-f-]{36}"') as held:
        job = run_pod("pod", seconds="15")
        held.wait()
        pod = job.wait_for_pod("Running")
        job.life.kill()
        held.drop()
    assert job.life.wait(*ENDED, deadline=120).state == "success"
    assert job.pods() == [pod]


# --- from submission to verdict


def test_the_test_button(stage: Stage, run_pod: RunPod) -> None:
    assert stage.kubernetes is not None
    connection = stage.kubernetes.connection()
    body = {**connection, "connection_id": "trial", "extra": json.dumps(connection["extra"])}
    good = stage.airflow.api("POST", "/connections/test", body)
    assert good["status"], good
    assert "drivers may run in namespace 'spark'" in good["message"]
    bad = stage.airflow.api("POST", "/connections/test", {**body, "password": "hush-hush-hush"})
    assert not bad["status"]
    assert "does not accept" in bad["message"]
    assert "hush-hush-hush" not in bad["message"]


def test_spark_runs_with_an_executor(run_pod: RunPod) -> None:
    job = run_pod("pod_spark", seconds="0")
    assert job.life.wait(*ENDED, deadline=180).state == "success", job.life.logs()
    (pod,) = job.pods()
    assert "total=4950" in job.cluster.log(pod.name)


def test_deferred_and_let_go_of_at_the_end(stage: Stage, run_pod: RunPod) -> None:
    """Held until its end is recorded, and deleted then, as it was asked for."""
    job = run_pod("pod_held", seconds="8")
    job.life.wait("deferred")
    pod = job.wait_for_pod("Running")
    assert job.cluster.pod(pod.name)["metadata"]["finalizers"] == ["durable-spark/end-not-recorded"]
    assert job.life.store()["spark_job_id"] == job.life.xcoms()["spark_job_id"] == f"spark:{pod.name}"
    links = stage.airflow.links(*job.life.key)
    assert links["Job"] == f"https://dashboard.invalid/spark/{pod.name}"
    assert links["Driver log"] == f"https://logs.invalid/{pod.uid}"
    assert links["Spark history"] == f"https://history.invalid/spark-{pod.name.rpartition('-')[2]}"
    job.wait_for_pod("Succeeded", None)
    ended = job.life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert job.life.store()["durable_spark"]["verdict"]["state"] == "succeeded"
    job.wait_for_pod(None)


def test_held_pod_that_is_deleted_tells_its_end(stage: Stage, run_pod: RunPod) -> None:
    """It succeeds, and is deleted, while no triggerer is there to see it."""
    job = run_pod("pod_held", seconds="6")
    pod = job.wait_until_followed()
    stage.airflow.kill_triggerer()
    job.wait_for_pod("Succeeded")
    job.cluster.delete_pod(pod.name)
    stage.airflow.start_triggerer()
    ended = job.life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    job.wait_for_pod(None)


def test_pod_that_vanished_is_no_success(stage: Stage, run_pod: RunPod) -> None:
    """Upstream's operator takes the 404 for a success. Here the job is lost, and is not submitted again unasked."""
    job = run_pod("pod", seconds="600")
    pod = job.wait_until_followed()
    stage.airflow.kill_triggerer()
    job.cluster.delete_pod(pod.name, 0)
    stage.airflow.start_triggerer()
    ended = job.life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("failed", 1)
    assert job.pods() == [pod]
    assert "JobLost" in job.life.logs()


def test_pod_that_is_deleted_is_killed(run_pod: RunPod) -> None:
    job = run_pod("pod_single", seconds="600")
    pod = job.wait_until_followed()
    job.cluster.delete_pod(pod.name)
    assert job.life.wait(*ENDED).state == "failed"
    assert "the pod was deleted while it ran" in job.life.logs()


def test_pod_that_never_starts_is_reported_and_fails_in_time(run_pod: RunPod) -> None:
    job = run_pod("pod_stuck")
    job.life.wait("deferred")
    pod = job.wait_for_pod("Pending")
    cause = 'Container image "no/such:image" is not present with pull policy of Never'
    wait_until(lambda: cause in job.life.log(), 30, "the cause in the task's log", interval=0.2)
    assert job.life.ti.state == "deferred", "it is told while the task waits"
    assert job.life.wait(*ENDED).state == "failed"
    said = job.life.logs()
    assert "start_timeout" in said
    assert "hush-hush-hush" not in said
    job.wait_for_pod(None)
    path = f"/api/v1/namespaces/{pod.namespace}/secrets/{pod.name}"
    owners = job.cluster.request("GET", path)["metadata"]["ownerReferences"]
    assert [owner["uid"] for owner in owners] == [pod.uid], "the garbage collector takes it"


@pytest.mark.parametrize("dag", ["pod", "pod_held"])
def test_marked_by_a_person_the_pod_is_deleted(stage: Stage, run_pod: RunPod, dag: str) -> None:
    job = run_pod(dag, seconds="600")
    job.wait_until_followed()
    stage.airflow.set_state(*job.life.key, "failed")
    job.wait_for_pod(None)


def test_the_api_server_dies_and_the_pod_is_followed_on(run_pod: RunPod) -> None:
    job = run_pod("pod", seconds="15")
    pod = job.wait_until_followed()
    job.cluster.restart_api_server()
    ended = job.life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert job.pods() == [pod]
