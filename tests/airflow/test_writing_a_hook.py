"""
The hook of the documentation's page, on a real Airflow: the cases of a retry, with no other file changed.

The witness is the job service itself.
"""

from __future__ import annotations

from collections.abc import Callable

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.together import together

DAG = "process_example"


def wait_for_end(stage: Stage, script: str, state: str) -> None:
    """Wait until the one job with this script has ended so."""
    wait_until(
        lambda: list(stage.job_service.jobs(script).values()) == [state], 60, f"a job that has {state}", interval=0.3
    )


@together
def test_still_active_is_followed_on(stage: Stage, run: Callable[..., Run]) -> None:
    script = f"until [ -e {stage.airflow.home}/process-followed ]; do sleep 0.3; done"
    with stage.killed_before_it_defers(run, DAG, task="sleep", script=script) as life:
        pass
    life.wait("deferred", try_number=2)
    (stage.airflow.home / "process-followed").touch()
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert stage.job_service.jobs(script) == {life.xcoms()["return_value"]: "succeeded"}


@together
def test_already_succeeded_is_the_result(stage: Stage, run: Callable[..., Run]) -> None:
    gate = stage.airflow.home / "process-succeeded"
    script = f"until [ -e {gate} ]; do sleep 0.3; done"
    with stage.killed_before_it_defers(run, DAG, task="sleep", script=script) as life:
        gate.touch()
        wait_for_end(stage, script, "succeeded")
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert len(stage.job_service.jobs(script)) == 1


@together
def test_failed_is_submitted_again(stage: Stage, run: Callable[..., Run]) -> None:
    gate = stage.airflow.home / "process-failed"
    script = f"until [ -e {gate} ]; do sleep 0.3; done; exit 3"
    with stage.killed_before_it_defers(run, DAG, task="sleep", script=script) as life:
        gate.touch()
        wait_for_end(stage, script, "failed")
    life.wait(*ENDED)
    assert life.ti.state == "failed"
    assert len(stage.job_service.jobs(script)) == life.ti.try_number == 3


@together
def test_killed_after_the_service_has_acted(stage: Stage, run: Callable[..., Run]) -> None:
    script = "sleep 3; echo killed"
    with stage.job_service.proxy.holding("PUT", "/jobs/", body=script, after=True) as held:
        life = run(DAG, task="sleep", script=script)
        held.wait()
        life.kill()
        held.drop()
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert list(stage.job_service.jobs(script).values()) == ["succeeded"]
