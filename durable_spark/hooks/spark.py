"""
The face of a Spark connection: its test button, and the one table from master URL to hook.

What flows in: a connection ID. What flows out: the answers of the hook of whatever cluster the
connection's master URL names. Operators and triggers know this class alone, so they never ask which
cluster it is.

The trap: triggers construct a hook by its class path, where nothing may block. The connection is read
on the first call of a method, not before.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from durable_spark.hooks._connection import master_url, read_connection
from durable_spark.hooks.cli import CliSubmission, SparkCliHook
from durable_spark.hooks.job import Followed, JobHook, load_hook_class
from durable_spark.jobs import BadConfiguration

if TYPE_CHECKING:
    from durable_spark.jobs import Absent, Found, JobRef, JobStatus, OwnedJob, Submission

__all__ = ["SparkHook"]

_HOOK_OF_SCHEME = {
    "spark": "durable_spark.hooks.standalone.StandaloneHook",
    "k8s": "durable_spark.hooks.kubernetes.KubernetesHook",
    "yarn": "durable_spark.hooks.yarn.YarnHook",
}

_WHY_NOT = {
    "local": "a local master has no cluster that would keep the job alive: give the master URL of one",
    "mesos": "Spark has removed Mesos",
}


class SparkHook(SparkCliHook):
    """
    Whatever cluster the master URL of a connection names.

    :param conn_id: an Airflow connection of the type ``durable_spark``, or of the Spark provider's
        ``spark``.
    """

    conn_name_attr = "conn_id"
    default_conn_name = "spark_default"
    conn_type = "durable_spark"
    hook_name = "Spark (durable)"

    def __init__(self, conn_id: str = default_conn_name) -> None:
        super().__init__(conn_id)
        self._hook: JobHook | None = None

    async def resolve(self) -> JobHook:
        """
        Return the hook of the connection's cluster; the connection is read once.

        :raises BadConfiguration: when there is no such connection, or no hook for its master URL.
        """
        if self._hook is None:
            url = master_url(await read_connection(self.conn_id))
            self._hook = _hook_class(url, self.conn_id)(self.conn_id)
        return self._hook

    async def aclose(self) -> None:
        """Release what the cluster's hook holds."""
        if self._hook is not None:
            await self._hook.aclose()

    async def cluster(self) -> Sequence[str]:
        """See :meth:`JobHook.cluster`."""
        return await (await self.resolve()).cluster()

    async def poll_interval(self) -> float:
        """See :meth:`JobHook.poll_interval`."""
        return await (await self.resolve()).poll_interval()

    async def prepare(self, job: Any, submission: Submission) -> Submission:
        """See :meth:`JobHook.prepare`."""
        return await (await self.resolve()).prepare(job, submission)

    async def submit(self, job: Any, submission: Submission) -> JobRef:
        """See :meth:`JobHook.submit`."""
        return await (await self.resolve()).submit(job, submission)

    async def prepare_cli(self, conf: Mapping[str, str], submission: Submission) -> CliSubmission:
        """See :meth:`SparkCliHook.prepare_cli`."""
        return await self._by_cli(await self.resolve()).prepare_cli(conf, submission)

    def job_in(self, line: str, submission: Submission) -> JobRef | None:
        """See :meth:`SparkCliHook.job_in`. Nothing is known before the connection has been read."""
        return None if self._hook is None else self._by_cli(self._hook).job_in(line, submission)

    async def glimpse(self, submission: Submission) -> JobRef | None:
        """See :meth:`SparkCliHook.glimpse`."""
        return await self._by_cli(await self.resolve()).glimpse(submission)

    def _by_cli(self, hook: JobHook) -> SparkCliHook:
        if not isinstance(hook, SparkCliHook):
            raise BadConfiguration(f"the cluster of connection {self.conn_id!r} is not one of spark-submit's")
        return hook

    async def find(self, submission: Submission) -> Found | Absent:
        """See :meth:`JobHook.find`."""
        return await (await self.resolve()).find(submission)

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        """See :meth:`JobHook.find_owned`."""
        return await (await self.resolve()).find_owned(deployment, owner)

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        """See :meth:`JobHook.poll`."""
        return await (await self.resolve()).poll(jobs)

    async def follow(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        """See :meth:`JobHook.follow`."""
        async with aclosing((await self.resolve()).follow(followed)) as answers:
            async for statuses in answers:
                yield statuses

    async def kill(self, job: JobRef) -> None:
        """See :meth:`JobHook.kill`."""
        await (await self.resolve()).kill(job)

    async def release(self, job: JobRef) -> None:
        """See :meth:`JobHook.release`."""
        await (await self.resolve()).release(job)

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        """See :meth:`JobHook.log_tail`."""
        return await (await self.resolve()).log_tail(job, lines)

    async def check(self) -> str:
        """See :meth:`JobHook.check`."""
        return await (await self.resolve()).check()


def _hook_class(url: str, conn_id: str) -> type[JobHook]:
    scheme = url.partition("://")[0].split("[")[0].lower()
    path = _HOOK_OF_SCHEME.get(scheme)
    if path is None:
        why = _WHY_NOT.get(scheme.partition(":")[0], "give spark://…, k8s://… or yarn")
        raise BadConfiguration(f"the master URL {url[:200]!r} of connection {conn_id!r} cannot be used: {why}")
    return load_hook_class(path)
