"""
A task from submission to verdict on a real Airflow and a standalone cluster.

What a person does to it meanwhile is in :mod:`tests.airflow.test_person`, but for what takes a driver of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from dev.processes import process, wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.together import fatal, together, without_triggerers


@together
def test_deferred_with_its_slot_free(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life_deferred", seconds="30")
    life.wait("deferred")
    driver = life.wait_for_driver("RUNNING")
    assert life.store()["spark_job_id"] == life.xcoms()["spark_job_id"] == driver.id
    wait_until(lambda: stage.airflow.links(*life.key)["Driver log"], 30, "the log's link", interval=0.2)
    links = stage.airflow.links(*life.key)
    assert driver.id in str(links["Driver log"])
    assert re.match(r"http://127\.0\.0\.1:\d+/#", str(links["Job"]))
    pid = life.ti.pid
    assert pid is not None
    wait_until(lambda: process(pid) is None, 15, "the task's process to be gone", interval=0.1)
    assert life.state() == ("deferred", 1), "while its job runs on"
    ended = life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert life.xcoms()["return_value"] == driver.id
    assert life.store()["durable_spark"]["verdict"]["state"] == "succeeded"
    worker, *triggerers = (f"{text}\n" for _, text in sorted(life.told().items()))
    running, finished = (f"{driver.id} is {end}\n" for end in ("RUNNING", "FINISHED"))
    assert (worker.count(running), worker.count(finished)) == (0, 1)
    for line in (running, finished):  # there are two triggerers if the first one was too busy for a heartbeat
        said = [text.count(line) for text in triggerers]
        assert max(said) == 1, "each says it once, if it follows the job for long enough"


@together
def test_a_job_that_ends_at_once_does_not_burn_the_try(stage: Stage, run: Callable[..., Run]) -> None:
    """An event within the first seconds after a deferral makes Airflow's scheduler fail the try."""
    life = run("life_short", seconds="0")
    ended = life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 1)


@together
def test_failure_says_what_the_cluster_said(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life_failing", seconds="0", exit_code="3")
    assert life.wait(*ENDED).state == "failed"
    said = life.logs()
    assert "ended as FAILED" in said
    assert "exiting with 3" in said, "the last lines of the driver's stderr"


@together
def test_waiting_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life_blocking", seconds="3")
    life.wait("running")
    assert life.wait(*ENDED).state == "success"
    assert "Deferring" not in life.log()
    assert [d.state for d in life.drivers()] == ["FINISHED"]


@together
def test_marked_while_it_waits_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life_blocking_marked", seconds="300")
    life.wait_for_driver("RUNNING")
    stage.airflow.set_state(*life.key, "failed")
    life.wait_for_driver("KILLED", deadline=60)


@together
def test_marked_while_it_submits(stage: Stage, run: Callable[..., Run]) -> None:
    """The request is on its way when the task is marked: the driver that it makes is killed before the deferral."""
    with stage.submitting("life_marked") as held:
        life = run("life_marked", seconds="300")
        held.wait()
        stage.airflow.set_state(*life.key, "success")
    life.wait_for_driver("KILLED", deadline=60)
    assert len(life.drivers()) == 1


@without_triggerers
def test_the_triggerer_dies_and_the_job_is_followed_on(stage: Stage, run: Callable[..., Run]) -> Iterator[None]:
    life = run("life_followed")
    life.wait("deferred")
    driver = life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    yield
    yield
    open_gate(life)
    ended = life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert [(d.id, d.state) for d in life.drivers()] == [(driver.id, "FINISHED")]


@fatal
def test_the_master_dies_and_the_job_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("life", seconds="20")
    life.wait("deferred")
    driver = life.wait_for_driver("RUNNING")
    life.wait_until_followed()
    stage.cluster.restart_master()
    ended = life.wait(*ENDED, deadline=120)
    assert (ended.state, ended.try_number) == ("success", 1)
    assert life.xcoms()["return_value"] == driver.id
