"""The contract of a hook, on a real YARN cluster, to which the tests submit over REST what spark-submit would."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from dev.processes import free_port, wait_until
from dev.yarn import YarnCluster
from durable_spark.hooks.yarn import YarnHook
from durable_spark.jobs import Found, JobRef, Submission
from durable_spark.testing import JobHookContract
from tests.conftest import require
from tests.yarn import YarnJob, submit_app

if TYPE_CHECKING:
    from durable_spark.hooks.job import JobHook

KEPT = 10
"""Applications that have ended and are kept by the ResourceManager; it can then be made to forget one."""


@dataclasses.dataclass(frozen=True)
class Job:
    app: YarnJob = dataclasses.field(default_factory=YarnJob)
    conf: Mapping[str, str] = dataclasses.field(default_factory=dict)


@pytest.fixture(scope="module")
def cluster() -> Iterator[YarnCluster]:
    limit = {"yarn.resourcemanager.max-completed-applications": str(KEPT)}
    with require(lambda: YarnCluster(yarn_site=limit)) as cluster:
        wait_until_believed(cluster)
        yield cluster


def wait_until_believed(cluster: YarnCluster) -> None:
    """Wait until the ResourceManager's process is so old that an absence is believed."""
    started = cluster.get("/ws/v1/cluster/info")["clusterInfo"]["startedOn"] / 1000
    time.sleep(max(0.0, started + YarnHook.recovery_time + 1.0 - time.time()))  # the header Date has no fractions


class TestYarnHook(JobHookContract):
    hook_class = YarnHook
    keeps_labels = True

    @pytest.fixture
    def connection(self, cluster: YarnCluster) -> dict[str, Any]:
        return cluster.connection(yarn_user=cluster.user)

    @pytest.fixture
    def dead_connection(self) -> dict[str, Any]:
        extra = {"yarn_resourcemanager_webapp_address": f"http://127.0.0.1:{free_port()}"}
        return {"conn_type": "spark", "host": "yarn", "login": "me", "password": "hush-hush-hush", "extra": extra}

    @pytest.fixture
    def sent(self) -> set[str]:
        return set()

    @pytest.fixture(autouse=True)
    def _remember(self, cluster: YarnCluster, sent: set[str]) -> None:
        self._cluster, self._sent = cluster, sent

    async def prepare(self, hook: JobHook, job: Job, submission: Submission) -> Submission:
        assert isinstance(hook, YarnHook)
        ready = await hook.prepare_cli(job.conf, submission)
        self._conf = ready.conf
        return ready.submission

    async def send(self, hook: JobHook, job: Job, submission: Submission) -> JobRef:
        """Look for what was sent before, as the operator does; ``spark-submit`` would send it again."""
        if submission.token in self._sent:
            found = await hook.find(submission)
            assert isinstance(found, Found)
            return found.status.job
        self._sent.add(submission.token)
        tags = self._conf["spark.yarn.tags"].split(",")
        return JobRef(await asyncio.to_thread(submit_app, self._cluster, job.app, tags))

    @pytest.fixture
    def job_that_succeeds(self) -> Job:
        return Job()

    @pytest.fixture
    def job_that_fails(self) -> Job:
        return Job(YarnJob(end="FAILED", diagnostics="User application exited with status 3"))

    @pytest.fixture
    def job_that_runs(self) -> Job:
        return Job(YarnJob(seconds=600))

    @pytest.fixture
    def wrong_job(self) -> Job:
        return Job(conf={"spark.yarn.tags": "a,b,c,d,e,f,g,h"})

    @pytest.fixture
    def unknown_job(self) -> JobRef:
        return JobRef("application_1111111111111_0001")

    @pytest.fixture
    def all_jobs(self, cluster: YarnCluster) -> Callable[[], list[str]]:
        return lambda: [app.id for app in cluster.apps()]

    @pytest.fixture
    def restart(self, cluster: YarnCluster) -> Callable[[], None]:
        def restart() -> None:
            cluster.kill_manager()
            cluster.restart_manager()

        return restart

    @pytest.fixture
    def forget(self, cluster: YarnCluster) -> Callable[[JobRef], None]:
        """Let so many others end that it is dropped."""

        def forget(job: JobRef) -> None:
            quick = YarnJob(command="exit 0")
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda _: submit_app(cluster, quick), range(KEPT)))
            wait_until(lambda: job.id not in [app.id for app in cluster.apps()], 60, f"{job} to be forgotten")
            wait_until_believed(cluster)  # if it has just been restarted

        return forget
