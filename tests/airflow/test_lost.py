"""
The cluster forgets a job before anybody has seen its end: an error, which says what is known, and never a success.

A pod is deleted, a master drops the drivers that completed first, a ResourceManager has lost what it kept of an
application. All that happens at once, while there is no triggerer.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from dev.processes import wait_until
from durable_spark.triggers.job import NOTE_XCOM_KEY
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.together import together, without_triggerers

if TYPE_CHECKING:
    from dev.spark import StandaloneCluster
    from dev.yarn import YarnCluster

RETAINED = 200
"""Completed drivers that a master lists (``spark.deploy.retainedDrivers``)."""


def evict(cluster: StandaloneCluster, ids: set[str]) -> None:
    """Have other drivers complete until the master lists none of these. Killed in the queue, they cost nothing."""
    filler = {
        "action": "CreateSubmissionRequest",
        "appResource": "local:///nothing.jar",
        "mainClass": "Nothing",
        "appArgs": [],
        "clientSparkVersion": cluster.spark.version,
        "environmentVariables": {},
        "sparkProperties": {"spark.app.name": "filler", "spark.driver.memory": "900g", "spark.master": cluster.url},
    }
    rest = f"http://127.0.0.1:{cluster.master.rest_port}/v1/submissions"

    def submit_and_kill(_: int) -> None:
        headers = {"Content-Type": "application/json;charset=UTF-8"}
        request = urllib.request.Request(f"{rest}/create", json.dumps(filler).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            cluster.kill_driver(json.load(answer)["submissionId"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(submit_and_kill, range(RETAINED)))
    wait_until(lambda: not ids & {driver.id for driver in cluster.drivers()}, 60, f"{ids} to be forgotten")


def forget(yarn: YarnCluster, ids: list[str]) -> None:
    """Restart the ResourceManager without what it has kept of these applications."""
    yarn.kill_manager()
    for app in ids:
        for kept in list((yarn.directory / "state").rglob(app)):
            shutil.rmtree(kept, ignore_errors=True)  # one may be within another
    yarn.start_manager()
    yarn.wait_for_state("ACTIVE")
    yarn.wait_for_node()
    assert not set(ids) & {app.id for app in yarn.apps()}


@pytest.mark.parametrize("dag", ["lost_retry", "lost_retry_again"])
@together
def test_found_lost_by_a_retry(stage: Stage, run: Callable[..., Run], dag: str) -> None:
    """Its worker died before it deferred, and the pod was deleted before the retry looked."""
    with stage.killed_before_it_defers(run, dag) as job:
        first = job.wait_for_pod("Running")
        stage.pod_cluster.delete_pod(first.name, 0)
    if dag == "lost_retry":
        ended = job.wait(*ENDED)
        assert (ended.state, ended.try_number) == ("failed", 2), "of three"
        assert job.pods() == [first]
        assert "JobLost" in job.logs()
        return
    job.wait("deferred", try_number=2)
    open_gate(job)
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert len(job.pods()) == 2
    assert job.pods()[0] == first


@without_triggerers
def test_forgotten_while_nobody_looked(stage: Stage, run: Callable[..., Run]) -> Iterator[None]:
    yarn = stage.submit.yarn if stage.submit is not None else None
    before = {app.id for app in yarn.apps()} if yarn is not None else set()
    apps = [run("lost_app"), run("lost_app_again")] if yarn is not None else []
    driver, driver_again = run("lost_driver"), run("lost_driver_again")
    pod, again = run("lost_pod"), run("lost_again")
    first = {job.dag: job.wait_for_followed_pod() for job in (pod, again)}
    for job in (driver, driver_again):
        job.wait_for_driver("RUNNING", deadline=90)
        job.wait_until_followed()
    for app in apps:
        app.wait("deferred", deadline=120)
        app.wait_until_followed()
    # Two ends are seen, and not reported yet, as these Dags ask for.
    seen, driver_seen = run("lost_seen"), run("lost_driver_seen")
    for job in (seen, driver_seen):
        job.wait("deferred")
        open_gate(job)
    for job in (seen, driver_seen):
        what = f"the end of {job.dag} to be seen"
        wait_until(lambda job=job: NOTE_XCOM_KEY in job.xcoms(), 60, what, interval=0.3)  # type: ignore[misc]
    yield
    assert {seen.ti.state, driver_seen.ti.state} == {"deferred"}, "it was too late: the event has been sent"
    first["lost_seen"] = seen.wait_for_pod("Succeeded")
    for job in (driver, driver_again):
        open_gate(job)
        job.wait_for_driver("FINISHED", deadline=90)
    for gone in first.values():
        stage.pod_cluster.delete_pod(gone.name, 0)
    made = {job.dag: job.drivers() for job in (driver, driver_again, driver_seen)}
    with ThreadPoolExecutor() as pool:
        evicting = pool.submit(evict, stage.cluster, {d.id for one in made.values() for d in one})
        if yarn is not None:
            ids = sorted({app.id for app in yarn.apps()} - before)
            assert len(ids) == len(apps)
            for app_id in ids:
                yarn.kill_app(app_id)
                yarn.wait_for_app(app_id, "KILLED")
            forget(yarn, ids)
        evicting.result()
    yield

    for job in (driver, pod, *apps[:1]):
        ended = job.wait(*ENDED, deadline=120)
        assert (ended.state, ended.try_number) == ("failed", 1), "of three, because no other try can know more"
        said = job.logs()
        assert "JobLost" in said
        submission = job.store()["durable_spark"]["submission"]
        for known in (
            f"does not know {job.store()['durable_spark']['job'][0]}",
            f"token {submission['token']}",
            "not known since",
            "its log was at",
            "it may have succeeded or failed",
            "clear the task to run it again",
        ):
            assert known in said, known
    for conn_id in ("kubernetes", "spark_default"):
        stage.wait_for_count("lost_jobs", conn_id)
    for job in (seen, driver_seen):
        ended = job.wait(*ENDED)
        assert (ended.state, ended.try_number) == ("success", 1), job.logs()
        assert job.store()["durable_spark"]["verdict"]["state"] == "succeeded"
    assert len(pod.pods()) == len(seen.pods()) == 1
    assert driver.drivers() == driver_seen.drivers() == [], "nothing but what the master has forgotten"

    again.wait_for_pod("Running")
    open_gate(again)
    driver_again.wait_for_driver("FINISHED", deadline=90)
    for job in (again, driver_again):
        ended = job.wait(*ENDED)
        assert (ended.state, ended.try_number) == ("success", 1), job.logs()
    assert again.pods()[0] == first["lost_again"]
    assert len(again.pods()) == 2
    assert len(driver_again.drivers()) == 1, "beside the one that the master has forgotten"
    if yarn is not None:
        anew = wait_until(lambda: [app for app in yarn.apps() if app.id not in before], 90, "another application")
        assert len(anew) == 1
        assert anew[0].id not in ids
        stage.airflow.set_state(*apps[1].key, "failed")

    # The way out that the error names.
    stage.airflow.clear(pod.dag, pod.id, ["job"])
    pod.wait("deferred", try_number=2)
    open_gate(pod)
    assert pod.wait(*ENDED).state == "success"
    assert len(pod.pods()) == 2
