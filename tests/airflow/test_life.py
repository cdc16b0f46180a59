"""A task from submission to verdict on a real Airflow, and what a person does to it meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage


def test_deferred_with_its_slot_free(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life", seconds="12")
    life.wait("deferred")
    driver = life.wait_for_driver("RUNNING")
    assert life.store()["spark_job_id"] == life.xcoms()["spark_job_id"] == driver.id
    wait_until(lambda: stage.airflow.links(*life.key)["Driver log"], 30, "the log's link", interval=0.2)
    links = stage.airflow.links(*life.key)
    assert driver.id in str(links["Driver log"])
    assert re.match(r"http://127\.0\.0\.1:\d+/#", str(links["Job"]))
    assert not life_has_a_process(stage)
    ended = life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert life.xcoms()["return_value"] == driver.id
    assert life.store()["durable_spark"]["verdict"]["state"] == "succeeded"
    log = life.log()
    assert [log.count(f"{driver.id} is {state}\n") for state in ("RUNNING", "FINISHED")] == [1, 2]


def life_has_a_process(stage: Stage) -> bool:
    """Whether any worker of the executor runs a task now."""
    running = stage.airflow.api("GET", "/dags/~/dagRuns/~/taskInstances", params={"state": "running"})
    return bool(running["total_entries"])


def test_a_job_that_ends_at_once_does_not_burn_the_try(run: Callable[..., Run]) -> None:
    """An event within the first seconds after a deferral makes Airflow's scheduler fail the try."""
    life = run("single", seconds="0")
    ended = life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)


def test_failure_says_what_the_cluster_said(run: Callable[..., Run]) -> None:
    life = run("single", seconds="0", exit_code="3")
    assert life.wait(*ENDED).state == "failed"
    said = life.logs()
    assert "ended as FAILED" in said
    assert "exiting with 3" in said, "the last lines of the driver's stderr"


def test_waiting_on_the_worker(run: Callable[..., Run]) -> None:
    life = run("blocking", seconds="3")
    life.wait("running")
    assert life.wait(*ENDED).state == "success"
    assert "Deferring" not in life.log()
    assert [d.state for d in life.drivers()] == ["FINISHED"]


@pytest.mark.parametrize("state", ["failed", "success"])
def test_marked_by_a_person_the_job_is_killed(stage: Stage, run: Callable[..., Run], state: str) -> None:
    life = run("life", seconds="300")
    life.wait("deferred")
    life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    stage.airflow.set_state(*life.key, state)
    life.wait_for_driver("KILLED", deadline=60)
    assert life.ti.state == state


def test_marked_while_it_waits_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("blocking", seconds="300")
    life.wait_for_driver("RUNNING")
    stage.airflow.set_state(*life.key, "failed")
    life.wait_for_driver("KILLED", deadline=60)


def test_kept_if_so_asked(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("keeping", seconds="25")
    life.wait("deferred")
    life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    stage.airflow.set_state(*life.key, "failed")
    life.wait_for_driver("FINISHED", deadline=90)


def test_marked_while_it_submits(stage: Stage, run: Callable[..., Run]) -> None:
    """The request is on its way when the task is marked: the driver that it makes is killed before the deferral."""
    with stage.rest.holding("POST", "/v1/submissions/create") as held:
        life = run("proxied", seconds="300")
        held.wait()
        stage.airflow.set_state(*life.key, "success")
    life.wait_for_driver("KILLED", deadline=60)
    assert len(life.drivers()) == 1


def test_cleared_runs_again_never_beside_the_old_one(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life", seconds="300")
    life.wait("deferred")
    old = life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    stage.airflow.clear(life.dag, life.id, ["job"])
    life.wait("deferred", try_number=2)
    assert [d.id for d in life.drivers() if d.state == "KILLED"] == [old.id]
    new = wait_until(lambda: next((d for d in life.drivers() if d.id != old.id), None), 30, "the new driver")
    assert len(life.drivers()) == 2
    life.wait_for_driver("RUNNING")
    time_of_a_late_on_kill = time.monotonic() + 8
    while (
        time.monotonic() < time_of_a_late_on_kill
    ):  # the old trigger's on_kill comes late and must not hit the new job
        assert [d.state for d in life.drivers() if d.id == new.id] != ["KILLED"]
        time.sleep(0.5)


def test_cleared_after_success_runs_again(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life", seconds="0")
    assert life.wait(*ENDED).state == "success"
    stage.airflow.clear(life.dag, life.id, ["job"])
    life.wait("deferred", try_number=2)
    assert life.wait(*ENDED).state == "success"
    assert [d.state for d in life.drivers()] == ["FINISHED", "FINISHED"]


def test_cleared_and_reconnected_if_so_asked(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("reconnecting", seconds="20")
    life.wait("deferred")
    driver = life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    stage.airflow.clear(life.dag, life.id, ["job"])
    life.wait("deferred", try_number=2)
    assert life.wait(*ENDED).state == "success"
    assert [(d.id, d.state) for d in life.drivers()] == [(driver.id, "FINISHED")]


def test_execution_timeout_kills(run: Callable[..., Run]) -> None:
    life = run("limited", seconds="300")
    life.wait("deferred")
    ended = life.wait(*ENDED, deadline=120)
    assert ended.state == "failed"
    assert [d.state for d in life.drivers()] == ["KILLED"]
    assert "DeadlinePassed" in life.logs()
    assert life.drivers()[0].id in life.logs()


def test_the_triggerer_dies_and_the_job_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life", seconds="20")
    life.wait("deferred")
    driver = life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    stage.airflow.kill_triggerer()
    stage.airflow.start_triggerer()
    ended = life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert [(d.id, d.state) for d in life.drivers()] == [(driver.id, "FINISHED")]


def test_the_master_dies_and_the_job_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life", seconds="20")
    life.wait("deferred")
    driver = life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    stage.cluster.restart_master()
    ended = life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert life.xcoms()["return_value"] == driver.id
    log = life.log()
    assert log.count("No word from the cluster") == log.count("answers again") <= 1
