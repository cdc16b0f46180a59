"""The contract of a hook, on a real API server whose pods run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from dev.processes import free_port, wait_until
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.jobs import JobRef, JobState, SparkJob
from durable_spark.testing import JobHookContract, Submit
from tests.kubernetes import shell_job, spark_job

if TYPE_CHECKING:
    from dev.kubernetes import KubernetesCluster


class TestKubernetesHook(JobHookContract):
    hook_class = KubernetesHook
    refuses_duplicates = True
    keeps_labels = True

    @pytest.fixture
    def connection(self, kubernetes_cluster: KubernetesCluster) -> dict[str, Any]:
        return kubernetes_cluster.connection()

    @pytest.fixture
    def dead_connection(self, kubernetes_cluster: KubernetesCluster) -> dict[str, Any]:
        return {**kubernetes_cluster.connection(), "port": free_port(), "password": "hush-hush-hush"}

    @pytest.fixture
    def job_that_succeeds(self) -> SparkJob:
        return shell_job("exit 0")

    @pytest.fixture
    def job_that_fails(self) -> SparkJob:
        return shell_job("for i in 1 2 3 4 5 6 7; do echo line $i; done; exit 3")

    @pytest.fixture
    def job_that_runs(self) -> SparkJob:
        return shell_job("exec sleep 600")

    @pytest.mark.asyncio
    async def test_a_spark_application_is_a_job(
        self, hook: KubernetesHook, submit: Submit, kubernetes_cluster: KubernetesCluster
    ) -> None:
        """A driver that has the executor that it asks for, which reaches it at its pod's address."""
        conf = kubernetes_cluster.conf()
        del conf["spark.kubernetes.executor.useDriverPodIP"]  # spark-submit's drivers need it where there is no DNS
        _, ref = await submit(spark_job(0, conf=conf))
        await self._until(hook, ref, JobState.SUCCEEDED)
        assert any("total=4950" in line for line in await hook.log_tail(ref, 500))

    @pytest.fixture
    def unknown_job(self) -> JobRef:
        return JobRef("spark:never-was-0123456789abcdef0123456789abcdef", "7d0b8e8e-0000-4000-8000-000000000000")

    @pytest.fixture
    def wrong_job(self) -> SparkJob:
        return SparkJob(application="/home/me/job.py", conf={"spark.kubernetes.container.image": "spark"})

    @pytest.fixture
    def all_jobs(self, kubernetes_cluster: KubernetesCluster) -> Callable[[], list[str]]:
        return lambda: [f"{pod.namespace}:{pod.name}" for pod in kubernetes_cluster.created_pods()]

    @pytest.fixture
    def restart(self, kubernetes_cluster: KubernetesCluster) -> Callable[[], None]:
        return kubernetes_cluster.restart_api_server

    @pytest.fixture
    def forget(self, kubernetes_cluster: KubernetesCluster) -> Callable[[JobRef], None]:
        def delete(job: JobRef) -> None:
            name = job.id.partition(":")[2]
            kubernetes_cluster.delete_pod(name)
            wait_until(
                lambda: all(pod["metadata"]["name"] != name for pod in kubernetes_cluster.pods()), 30, f"{name} to go"
            )

        return delete
