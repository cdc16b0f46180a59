"""
The three cases of a retry on a standalone cluster, each after a real kill -9 of the task's process, and a lost answer.

Counted by the master's own record: one driver per submission. The other instants are the same code whatever the
cluster, and told on Kubernetes.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.together import together


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
    assert len(drivers) == life.ti.try_number == 2, "one driver for each try"
    assert life.ti.state == "failed"
    assert "Prior job in terminal state" in life.log(2)


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
