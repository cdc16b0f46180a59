"""
The three cases of a retry, each after a real kill -9 of the task's process, and the instants in between.

Counted by the master's own record: one driver per submission, whatever died when.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.airflow.conftest import ENDED, Run, Stage

_STORE = r"/execution/store/"


def test_still_active_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    """Killed between store and deferral."""
    with stage.killed_before_it_defers(run, "life", seconds="15") as life:
        driver = life.wait_for_driver()
    life.wait("deferred", try_number=2)
    life.wait(*ENDED)
    assert life.ti.state == "success"
    assert [(d.id, d.state) for d in life.drivers()] == [(driver.id, "FINISHED")]
    assert life.xcoms()["return_value"] == driver.id
    assert "Reconnecting to existing job" in life.log(2)


def test_already_succeeded_is_the_result(stage: Stage, run: Callable[..., Run]) -> None:
    """Killed between store and deferral; the driver ends before the retry looks."""
    with stage.killed_before_it_defers(run, "life", seconds="1") as life:
        stage.airflow.pause("life")
    driver = life.wait_for_driver("FINISHED")
    stage.airflow.unpause("life")
    ended = life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert [d.id for d in life.drivers()] == [driver.id]
    assert life.xcoms()["return_value"] == driver.id
    assert "already completed successfully" in life.log(2)
    assert "Deferring" not in life.log(2)


def test_failed_is_submitted_again(stage: Stage, run: Callable[..., Run]) -> None:
    """Killed between store and deferral; the driver fails before the retry looks."""
    with stage.killed_before_it_defers(run, "life", seconds="1", exit_code="3") as life:
        stage.airflow.pause("life")
    first = life.wait_for_driver("FAILED")
    stage.airflow.unpause("life")
    life.wait(*ENDED)
    drivers = life.drivers()
    assert drivers[0].id == first.id
    assert len(drivers) == life.ti.try_number == 3, "one driver for each try"
    assert life.ti.state == "failed"
    assert "Prior job in terminal state" in life.log(2)


def test_killed_before_the_request_left(stage: Stage, run: Callable[..., Run]) -> None:
    """The intent is stored, nothing was sent: the retry proves that and submits."""
    with stage.rest.holding("POST", "/v1/submissions/create") as held:
        life = run("proxied", seconds="1")
        held.wait()
        assert life.store()["durable_spark"]["job"] is None
        assert "spark_job_id" not in life.store()
        life.kill()
        held.drop()
    life.wait(*ENDED, deadline=120)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert [d.state for d in life.drivers()] == ["FINISHED"]
    assert "does not exist on the cluster" in life.log(2)


def test_killed_after_the_master_has_acted(stage: Stage, run: Callable[..., Run]) -> None:
    """The driver exists, its ID never came back: the retry finds it by its launch command."""
    with stage.rest.holding("POST", "/v1/submissions/create", after=True) as held:
        life = run("proxied", seconds="15")
        held.wait()
        driver = life.wait_for_driver()
        life.kill()
        held.drop()
    life.wait(*ENDED)
    assert life.ti.state == "success"
    assert life.store()["spark_job_id"] == driver.id
    assert [d.id for d in life.drivers()] == [driver.id]
    assert f"Found {driver.id}" in life.log(2)


def test_killed_before_the_id_was_stored(stage: Stage, run: Callable[..., Run]) -> None:
    """The ID came back, the store never heard of it."""
    with stage.execution_api.holding("PUT", _STORE, body='"job": ?."driver-') as held:
        life = run("life", seconds="10")
        held.wait()
        driver = life.wait_for_driver()
        life.kill()
        held.drop()
    life.wait(*ENDED, deadline=120)
    assert life.ti.state == "success"
    assert [d.id for d in life.drivers()] == [driver.id]


def test_killed_while_it_resumes(stage: Stage, run: Callable[..., Run]) -> None:
    """The trigger has reported the end; the process that was to write it down dies."""
    with stage.execution_api.holding("PUT", _STORE, body='"verdict": ?{') as held:
        life = run("life", seconds="1")
        held.wait(60)
        life.kill()
        held.drop()
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert [d.state for d in life.drivers()] == ["FINISHED"]
