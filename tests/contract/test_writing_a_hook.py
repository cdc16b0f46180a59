"""The page on writing a hook (docs/hooks.md): the files that it shows are what runs here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dev.processes import Server, free_port, wait_until
from durable_spark.hooks.job import load_hook_class
from durable_spark.jobs import JobRef
from durable_spark.testing import JobHookContract

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

sys.path.insert(0, str(EXAMPLES))  # where Airflow would have it installed, or among its plugins


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def service(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("service") / "log"
    command = [sys.executable, EXAMPLES / "process_service.py", "--port", str(port)]
    server = Server("process_service", [str(part) for part in command], log=log)
    _start(server, port)
    yield server
    server.stop()


def _start(server: Server, port: int) -> None:
    server.start()
    wait_until(lambda: _jobs(port) is not None, 30, "the job service", servers=[server])


def _jobs(port: int) -> list[str]:
    try:
        return list(httpx.get(f"http://127.0.0.1:{port}/jobs", trust_env=False).json()["jobs"])
    except httpx.TransportError as error:
        raise OSError(str(error)) from error


# start: the contract
class TestProcessHook(JobHookContract):
    hook_class = load_hook_class("process_hook.ProcessHook")
    refuses_duplicates = True

    @pytest.fixture
    def connection(self, service: Server, port: int) -> dict[str, Any]:
        return {"conn_type": "http", "host": "127.0.0.1", "port": port}

    @pytest.fixture
    def dead_connection(self) -> dict[str, Any]:
        port = free_port()
        return {"conn_type": "http", "host": "127.0.0.1", "port": port, "password": "hush-hush-hush"}

    @pytest.fixture
    def job_that_succeeds(self) -> dict[str, Any]:
        return {"command": ["true"]}

    @pytest.fixture
    def job_that_fails(self) -> dict[str, Any]:
        return {"command": ["sh", "-c", "seq 100; exit 3"]}

    @pytest.fixture
    def job_that_runs(self) -> dict[str, Any]:
        return {"command": ["sleep", "600"]}

    @pytest.fixture
    def unknown_job(self) -> JobRef:
        return JobRef("airflow-" + 32 * "0")

    @pytest.fixture
    def wrong_job(self) -> dict[str, Any]:
        return {"command": "sleep 600"}

    @pytest.fixture
    def all_jobs(self, port: int) -> Callable[[], list[str]]:
        return lambda: _jobs(port)

    @pytest.fixture
    def forget(self, service: Server, port: int) -> Callable[[JobRef], None]:
        def restart(_: JobRef) -> None:
            service.stop()
            _start(service, port)

        return restart


# end: the contract
