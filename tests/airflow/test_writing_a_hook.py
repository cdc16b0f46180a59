"""
The hook of the documentation's page, on a real Airflow: the cases of a retry, with no other file changed.

The witness is the job service itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dev.processes import Server, wait_until
from tests.airflow.conftest import ENDED, EXAMPLES, Run, Stage

DAG = "process_example"


@pytest.fixture
def jobs(stage: Stage, tmp_path: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """Start the service; return what it says of its jobs."""
    url = f"http://127.0.0.1:{stage.service_port}/jobs"

    def ask() -> dict[str, str]:
        try:
            return dict(httpx.get(url, trust_env=False).json()["jobs"])
        except httpx.TransportError as error:
            raise OSError(str(error)) from error

    command = [sys.executable, str(EXAMPLES / "process_service.py"), "--port", str(stage.service_port)]
    server = Server("process_service", command, log=tmp_path / "service.log")
    server.start()
    try:
        wait_until(lambda: ask() == {}, 30, "the job service", servers=[server])
        yield ask
    finally:
        server.stop()


def ended(jobs: Callable[[], dict[str, str]], state: str) -> Any:
    return wait_until(lambda: list(jobs().values()) == [state], 60, f"a job that has {state}", interval=0.1)


def test_still_active_is_followed_on(stage: Stage, run: Callable[..., Run], jobs: Callable[[], Any]) -> None:
    with stage.killed_before_it_defers(run, DAG, task="sleep", script="sleep 15") as life:
        pass
    life.wait("deferred", try_number=2)
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert list(jobs().values()) == ["succeeded"]
    assert life.xcoms()["return_value"] == next(iter(jobs()))


def test_already_succeeded_is_the_result(stage: Stage, run: Callable[..., Run], jobs: Callable[[], Any]) -> None:
    with stage.killed_before_it_defers(run, DAG, task="sleep", script="sleep 1") as life:
        stage.airflow.pause(DAG)
    ended(jobs, "succeeded")
    stage.airflow.unpause(life.dag)
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert len(jobs()) == 1


def test_failed_is_submitted_again(stage: Stage, run: Callable[..., Run], jobs: Callable[[], Any]) -> None:
    with stage.killed_before_it_defers(run, DAG, task="sleep", script="sleep 1; exit 3") as life:
        stage.airflow.pause(DAG)
    ended(jobs, "failed")
    stage.airflow.unpause(life.dag)
    life.wait(*ENDED)
    assert life.ti.state == "failed"
    assert len(jobs()) == life.ti.try_number == 3


def test_killed_after_the_service_has_acted(stage: Stage, run: Callable[..., Run], jobs: Callable[[], Any]) -> None:
    with stage.processes.holding("PUT", "/jobs/", after=True) as held:
        life = run(DAG, task="sleep", script="sleep 3")
        held.wait()
        life.kill()
        held.drop()
    life.wait(*ENDED)
    assert (life.ti.state, life.ti.try_number) == ("success", 2)
    assert list(jobs().values()) == ["succeeded"]
