"""
Driver pods from a real Airflow: the three cases of a retry, and what may happen to a pod that a task waits for.

Counted by the API server's audit log: one pod per submission, whatever died when.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.together import together, without_triggerers

STORE = r"/execution/store/"


# --- the three cases of a retry


@together
def test_still_active_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    with stage.killed_before_it_defers(run, "pod_active", seconds="40") as job:
        pod = job.wait_for_pod("Running")
    job.wait("deferred", try_number=2)
    assert job.wait(*ENDED).state == "success"
    assert job.pods() == [pod]
    assert job.xcoms()["return_value"] == f"spark:{pod.name}"
    assert "Reconnecting to existing job" in job.log(2)


@together
def test_already_succeeded_is_the_result(stage: Stage, run: Callable[..., Run]) -> None:
    with stage.killed_before_it_defers(run, "pod_succeeded", seconds="1") as job:
        pod = job.wait_for_pod("Succeeded")
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert job.pods() == [pod]
    assert "already completed successfully" in job.log(2)
    assert "Deferring" not in job.log(2)


@together
def test_failed_is_submitted_again(stage: Stage, run: Callable[..., Run]) -> None:
    with stage.killed_before_it_defers(run, "pod_failed", seconds="1", exit_code="3") as job:
        first = job.wait_for_pod("Failed")
    assert job.wait(*ENDED, deadline=120).state == "failed"
    pods = job.pods()
    assert pods[0] == first
    assert len(pods) == job.ti.try_number == 3, "one pod for each try"
    assert "Prior job in terminal state" in job.log(2)
    said = job.logs()
    assert "exit code 3" in said
    assert "exiting with 3" in said, "the end of the driver's log"


# --- the instants in between


@together
def test_killed_before_the_request_left(stage: Stage, run: Callable[..., Run]) -> None:
    """The intent is stored, nothing was sent: the retry sees that there is no pod, and never was."""
    with stage.execution_api.holding("PUT", STORE, body='pod-unsent-job-.*"job": ?null', after=True) as held:
        job = run("pod_unsent", seconds="1")
        held.wait()
        job.kill()
        held.drop()
    assert job.pods() == []
    ended = job.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert len(job.pods()) == 1
    assert "does not exist on the cluster" in job.log(2)


@together
def test_killed_before_the_uid_was_stored(stage: Stage, run: Callable[..., Run]) -> None:
    """The pod exists, its uid never came to the store: the intent holds its name."""
    api, with_uid = stage.execution_api, r'"job": ?\["spark:pod-no-uid-job-[^"]+", ?"[0-9a-f-]{36}"'
    with api.holding("PUT", STORE, body=with_uid) as held:
        job = run("pod_no_uid", seconds="40")
        path = re.escape(held.wait().path)
        pod = job.wait_for_pod("Running")
        job.kill()
        with api.failing(400, method="PUT", path=path, body=with_uid):
            before = api.count("PUT", path)
            held.drop()
            wait_until(lambda: api.count("PUT", path) > before, 60, "the supervisor to send it again", interval=0.2)
    assert job.wait(*ENDED, deadline=120).state == "success"
    assert job.pods() == [pod]
    stage.wait_for_count("adoptions.found", "kubernetes")


# --- from submission to verdict


@together
def test_the_test_button(stage: Stage, run: Callable[..., Run]) -> None:
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


@together
def test_spark_runs_with_an_executor(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("pod_spark", seconds="0")
    assert job.wait(*ENDED, deadline=180).state == "success", job.logs()
    (pod,) = job.pods()
    assert "total=4950" in stage.pod_cluster.log(pod.name)


@together
def test_deferred_and_let_go_of_at_the_end(stage: Stage, run: Callable[..., Run]) -> None:
    """Held until its end is recorded, and deleted then, as it was asked for."""
    job = run("pod_held", seconds="8")
    job.wait("deferred")
    pod = job.wait_for_pod("Running")
    assert stage.pod_cluster.pod(pod.name)["metadata"]["finalizers"] == ["durable-spark/end-not-recorded"]
    assert job.store()["spark_job_id"] == job.xcoms()["spark_job_id"] == f"spark:{pod.name}"
    links = stage.airflow.links(*job.key)
    assert links["Job"] == f"https://dashboard.invalid/spark/{pod.name}"
    assert links["Driver log"] == f"https://logs.invalid/{pod.uid}"
    assert links["Spark history"] == f"https://history.invalid/spark-{pod.name.rpartition('-')[2]}"
    job.wait_for_pod("Succeeded", None)
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert job.store()["durable_spark"]["verdict"]["state"] == "succeeded"
    job.wait_for_pod(None)


@pytest.mark.parametrize("status", [403, 503])
@together
def test_held_pod_is_let_go_of_though_it_is_refused_at_first(
    stage: Stage, run: Callable[..., Run], status: int
) -> None:
    """No later try does it. A request that an API server forbids at one moment may be allowed in the next."""
    job = run(f"pod_held_{status}")
    pod = job.wait_for_followed_pod()
    api, patch = stage.kubernetes_api, f"/pods/{pod.name}"
    with api.failing(status, answer="not now", method="PATCH", path=patch):
        open_gate(job)
        wait_until(lambda: api.count("PATCH", patch) > 1, 60, "the finalizer to be taken off again", interval=0.2)
        assert job.ti.state == "running"
        assert stage.pod_cluster.pod(pod.name)["metadata"]["finalizers"]
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)
    job.wait_for_pod(None)
    assert job.pods() == [pod]


@without_triggerers
def test_held_pod_that_is_deleted_tells_its_end(stage: Stage, run: Callable[..., Run]) -> Iterator[None]:
    """It succeeds, and is deleted, while no triggerer is there to see it."""
    job = run("pod_held_alone")
    pod = job.wait_for_followed_pod()
    yield
    open_gate(job)
    job.wait_for_pod("Succeeded")
    stage.pod_cluster.delete_pod(pod.name)
    yield
    ended = job.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    job.wait_for_pod(None)


@without_triggerers
def test_pod_that_vanished_is_no_success(stage: Stage, run: Callable[..., Run]) -> Iterator[None]:
    """Upstream's operator takes the 404 for a success. Here the job is lost, and is not submitted again unasked."""
    job = run("pod", seconds="600")
    pod = job.wait_for_followed_pod()
    yield
    stage.pod_cluster.delete_pod(pod.name, 0)
    yield
    ended = job.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("failed", 1)
    assert job.pods() == [pod]
    assert "JobLost" in job.logs()


@together
def test_pod_that_is_deleted_is_killed(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("pod_single", seconds="600")
    pod = job.wait_for_followed_pod()
    stage.pod_cluster.delete_pod(pod.name)
    assert job.wait(*ENDED).state == "failed"
    assert "the pod was deleted while it ran" in job.logs()


@together
def test_pod_that_never_starts_is_reported_and_fails_in_time(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("pod_stuck")
    job.wait("deferred")
    pod = job.wait_for_pod("Pending")
    cause = 'Container image "no/such:image" is not present with pull policy of Never'
    job.wait_until_said(cause, deadline=30)
    assert job.ti.state == "deferred", "it is told while the task waits"
    assert job.wait(*ENDED).state == "failed"
    said = job.logs()
    assert "start_timeout" in said
    assert "hush-hush-hush" not in said
    job.wait_for_pod(None)
    path = f"/api/v1/namespaces/{pod.namespace}/secrets/{pod.name}"
    owners = stage.pod_cluster.request("GET", path)["metadata"]["ownerReferences"]
    assert [owner["uid"] for owner in owners] == [pod.uid], "the garbage collector takes it"


@pytest.mark.parametrize("dag", ["pod_marked", "pod_held_marked"])
@together
def test_marked_by_a_person_the_pod_is_deleted(stage: Stage, run: Callable[..., Run], dag: str) -> None:
    job = run(dag, seconds="600")
    job.wait_for_followed_pod()
    stage.airflow.set_state(*job.key, "failed")
    job.wait_for_pod(None)


def test_the_api_server_dies_and_the_pod_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("pod", seconds="15")
    pod = job.wait_for_followed_pod()
    stage.pod_cluster.restart_api_server()
    ended = job.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert job.pods() == [pod]
