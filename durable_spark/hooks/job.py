"""
The contract of a hook: what a service that runs jobs must be able to say.

Operators and triggers know a cluster through :class:`JobHook` alone. An author of a hook for another
service implements it and inherits :class:`durable_spark.testing.JobHookContract`, which checks every
promise made here against the real service.

What flows in: a connection ID, a job's description, a :class:`~durable_spark.jobs.Submission`.
What flows out: :class:`~durable_spark.jobs.JobStatus`, and the exceptions of
:mod:`durable_spark.jobs`; no other exception leaves a hook on purpose.

The trap: everything a hook is handed from a store or a cluster (job IDs, URLs, states) is untrusted.
It is validated before a URL, a path or a command is built from it.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from airflow.providers.common.compat.module_loading import import_string
from airflow.sdk import BaseHook

from durable_spark.jobs import BadConfiguration

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from durable_spark.jobs import Absent, Found, JobRef, JobStatus, OwnedJob, Submission

__all__ = ["Followed", "JobHook", "load_hook_class"]


class Followed(Protocol):
    """The jobs that a feed follows at the moment. A running :meth:`JobHook.follow` asks anew before each poll."""

    def jobs(self) -> Collection[JobRef]:
        """Return the jobs to follow now."""

    async def pause(self) -> None:
        """Return when the poll interval has passed, or earlier if a job has been added."""


class JobHook(BaseHook, abc.ABC):
    """
    One Airflow connection to one cluster that runs jobs.

    Constructing a hook is cheap and does no I/O: the connection is read on first use, in the event
    loop that uses it. A hook belongs to that loop; ``async with hook:`` (or :meth:`aclose`)
    releases what it holds. Every method may raise :class:`~durable_spark.jobs.BadConfiguration`,
    :class:`~durable_spark.jobs.ClusterUnreachable` and
    :class:`~durable_spark.jobs.AuthenticationFailed`, and every request it makes has a timeout.

    :param conn_id: the Airflow connection.
    """

    default_poll_interval: float = 5.0
    """Seconds between two polls when neither the connection nor the operator says otherwise."""

    def __init__(self, conn_id: str) -> None:
        super().__init__()
        self.conn_id = conn_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Release what the hook holds (sessions, sockets). The hook can be used again afterwards."""

    @abc.abstractmethod
    async def cluster(self) -> Sequence[str]:
        """
        Return the names by which the connection knows its cluster, without secrets.

        Two answers that share a member name the same cluster: a connection that gains a standby
        master still does. Read from the connection alone: the cluster is not asked.
        """

    async def poll_interval(self) -> float:
        """Return the seconds between two polls that the connection asks for."""
        return self.default_poll_interval

    @abc.abstractmethod
    async def prepare(self, job: Any, submission: Submission) -> Submission:
        """
        Check the job's description and make ready for :meth:`submit`, without submitting anything.

        Called once per submission, before the intent is written to the store. What the hook will
        need in order to find the job again goes into the submission that it returns: the job's ID
        where it can be known beforehand, the cluster's clock, evidence.

        :raises BadArguments: when the description is wrong or asks for what this cluster cannot do.
        """

    @abc.abstractmethod
    async def submit(self, job: Any, submission: Submission) -> JobRef:
        """
        Submit the job: at most one exists per submission, however often this is called.

        :raises SubmissionRefused: the cluster said no; nothing was submitted.
        :raises SubmissionUncertain: it cannot be told whether the job was submitted.
        """

    @abc.abstractmethod
    async def find(self, submission: Submission) -> Found | Absent:
        """
        Find the job of a submission whose ID was never stored, because its worker died.

        :raises SubmissionUncertain: when neither can be proven.
        """

    @abc.abstractmethod
    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        """
        Return the status of each of the jobs, in as few requests as the cluster allows.

        A job that a healthy cluster does not know is answered with
        :attr:`~durable_spark.jobs.JobState.ABSENT`, one whose state cannot be told now with
        :attr:`~durable_spark.jobs.JobState.UNKNOWN`; either way, every job gets an answer.
        An ID that is not one of this cluster's is ``ABSENT`` and is never sent to it.
        """

    @abc.abstractmethod
    async def kill(self, job: JobRef) -> None:
        """
        Kill the job. Returns when the cluster has accepted it, or the job has ended or is not known.

        :raises RequestRefused: the cluster does not allow it.
        """

    async def release(self, job: JobRef) -> None:
        """
        Let go of what is kept of a job: its end is recorded, or nobody waits for it any more.

        Called whenever a task has done with a job, at least once, so also of a job that is not known any more. What a
        service forgets by itself needs no hand; this default does nothing.

        :raises RequestRefused: the cluster does not allow it.
        """

    async def follow(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        """
        Yield what is learnt of the followed jobs, for as long as it is iterated.

        Polls on an interval; a cluster that can be watched overrides it. Of a job that ``followed.jobs()`` has named
        before without a gap, only what is new need be told. An exception ends the iteration: the feed backs off and
        calls it again, and is then told of each job anew.
        """
        while True:
            if jobs := followed.jobs():
                yield await self.poll(jobs)
            await followed.pause()

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        """
        Return the jobs that carry a deployment's label (and an owner's), as far as the cluster shows them.

        Those that live, and those that have ended and are kept until :meth:`release`.

        :raises NotImplementedError: this cluster keeps no labels.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot look jobs up by their labels")

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        """Return at most the last ``lines`` lines of the job's log. Best effort: empty when there is none to be had."""
        return ()

    @abc.abstractmethod
    async def check(self) -> str:
        """
        Reach the cluster, authenticate, see whether jobs may be submitted; say in one line what was reached.

        :raises DurableJobError: with what is wrong and how to mend it.
        """

    def test_connection(self) -> tuple[bool, str]:
        """Run :meth:`check` for Airflow's *Test* button."""

        async def run() -> str:
            async with self:
                return await self.check()

        try:
            return True, asyncio.run(run())
        except Exception as error:  # the button shows whatever is wrong
            return False, f"{type(error).__name__}: {error}"


def load_hook_class(path: str) -> type[JobHook]:
    """
    Return the hook class of that path.

    :raises BadConfiguration: when it cannot be imported or is not a :class:`JobHook`.
    """
    try:
        found = import_string(path)
    except ImportError as error:
        raise BadConfiguration(f"hook: {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, JobHook)):
        raise BadConfiguration(f"hook: {path!r} is not a subclass of durable_spark.hooks.job.JobHook")
    return found
