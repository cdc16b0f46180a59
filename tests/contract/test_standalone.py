"""The contract of a hook, on a real standalone cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from dev.processes import free_ports
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.jobs import JobRef, SparkJob
from durable_spark.testing import JobHookContract
from tests.standalone import jvm_job

if TYPE_CHECKING:
    from dev.spark import StandaloneCluster


class TestStandaloneHook(JobHookContract):
    hook_class = StandaloneHook
    keeps_labels = True

    @pytest.fixture
    def connection(self, standalone_cluster: StandaloneCluster) -> dict[str, Any]:
        return standalone_cluster.connection()

    @pytest.fixture
    def dead_connection(self) -> dict[str, Any]:
        port, rest_port, ui_port = free_ports(3)
        return {
            "conn_type": "durable_spark",
            "host": "spark://127.0.0.1",
            "port": port,
            "password": "hush-hush-hush",
            "extra": {"rest-port": rest_port, "ui-port": ui_port},
        }

    @pytest.fixture
    def job_that_succeeds(self) -> SparkJob:
        return jvm_job(0)

    @pytest.fixture
    def job_that_fails(self) -> SparkJob:
        return jvm_job(0, 3)

    @pytest.fixture
    def job_that_runs(self) -> SparkJob:
        return jvm_job(600)

    @pytest.fixture
    def unknown_job(self) -> JobRef:
        return JobRef("driver-20200101000000-0000")

    @pytest.fixture
    def wrong_job(self) -> SparkJob:
        return jvm_job(0, driver_memory="plenty")

    @pytest.fixture
    def all_jobs(self, standalone_cluster: StandaloneCluster) -> Callable[[], list[str]]:
        return lambda: [driver.id for driver in standalone_cluster.drivers()]

    @pytest.fixture
    def restart(self, standalone_cluster: StandaloneCluster) -> Callable[[], None]:
        return standalone_cluster.restart_master

    @pytest.fixture
    def forget(self, standalone_cluster: StandaloneCluster) -> Callable[[JobRef], None]:
        return lambda _: standalone_cluster.restart_master()  # only living drivers are kept for its recovery
