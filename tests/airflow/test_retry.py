"""
The three cases of a retry, each after a real kill -9 of the task's process, and the instants in between.

Counted by the master's own record: one driver per submission, whatever died when.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.together import together

_STORE = r"/execution/store/"


@together
def test_still_active_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    """Killed between store and deferral."""
    with stage.killed_before_it_defers(run, "retry_active", seconds="15") as life:
        driver = life.wait_for_driver()
    life.wait("deferred", try_number=2)
    life.wait(*ENDED)
    assert life.ti.state == "success"
    assert [(d.id, d.state) for d in life.drivers()] == [(driver.id, "FINISHED")]
    assert life.xcoms()["return_value"] == driver.id
    assert "Reconnecting to existing job" in life.log(2)


@together
def test_already_succeeded_is_the_result(stage: Stage, run: Callable[..., Run]) -> None:
    """Killed between store and deferral; the driver ends before the retry looks."""
    with stage.killed_before_it_defers(run, "retry_succeeded", seconds="1") as life:
        driver = life.wait_for_driver("FINISHED")
    ended = life.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert [d.id for d in life.drivers()] == [driver.id]
    assert life.xcoms()["return_value"] == driver.id
    assert "already completed successfully" in life.log(2)
    assert "Deferring" not in life.log(2)


@together
def test_failed_is_submitted_again(stage: Stage, run: Callable[..., Run]) -> None:
    """Killed between store and deferral; the driver fails before the retry looks."""
    with stage.killed_before_it_defers(run, "retry_failed", seconds="1", exit_code="3") as life:
        first = life.wait_for_driver("FAILED")
    life.wait(*ENDED)
    drivers = life.drivers()
    assert drivers[0].id == first.id
    assert len(drivers) == life.ti.try_number == 3, "one driver for each try"
    assert life.ti.state == "failed"
    assert "Prior job in terminal state" in life.log(2)


@together
def test_killed_before_the_request_left(stage: Stage, run: Callable[..., Run]) -> None:
    """The intent is stored, nothing was sent: the retry proves that and submits."""
    with stage.submitting("retry_unsent") as held:
        life = run("retry_unsent", seconds="1")
        held.wait()
        assert life.store()["durable_spark"]["job"] is None
        assert "spark_job_id" not in life.store()
        life.kill()
        held.drop()
    life.wait(*ENDED, deadline=120)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert [d.state for d in life.drivers()] == ["FINISHED"]
    assert "does not exist on the cluster" in life.log(2)


@together
def test_killed_after_the_master_has_acted(stage: Stage, run: Callable[..., Run]) -> None:
    """The driver exists, its ID never came back: the retry finds it by its launch command."""
    with stage.submitting("retry_sent", after=True) as held:
        life = run("retry_sent", seconds="15")
        held.wait()
        driver = life.wait_for_driver()
        life.kill()
        held.drop()
    life.wait(*ENDED)
    assert life.ti.state == "success"
    assert life.store()["spark_job_id"] == driver.id
    assert [d.id for d in life.drivers()] == [driver.id]
    assert f"Found {driver.id}" in life.log(2)


@together
def test_killed_before_the_id_was_stored(stage: Stage, run: Callable[..., Run]) -> None:
    """The ID came back, the store never heard of it."""
    with stage.execution_api.holding("PUT", _STORE, body=r'(?=.*"retry_unstored\.job").*"job": ?\["driver-') as held:
        life = run("retry_unstored", seconds="10")
        held.wait()
        driver = life.wait_for_driver()
        life.kill()
        held.drop()
    life.wait(*ENDED, deadline=120)
    assert life.ti.state == "success"
    assert [d.id for d in life.drivers()] == [driver.id]


@together
def test_killed_while_it_resumes(stage: Stage, run: Callable[..., Run]) -> None:
    """The trigger has reported the end; the process that was to write it down dies."""
    with stage.execution_api.holding("PUT", _STORE, body=r'(?=.*"retry_resuming\.job").*"verdict": ?\{') as held:
        life = run("retry_resuming", seconds="1")
        held.wait(60)
        life.kill()
        held.drop()
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert [d.state for d in life.drivers()] == ["FINISHED"]
