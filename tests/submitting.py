"""What tests on any cluster do with a hook: submit as an operator does, and follow as a trigger does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from dev.processes import wait_until_async
from durable_spark.jobs import ClusterUnreachable, JobRef, JobState, JobStatus, SparkJob, Submission, new_token
from durable_spark.triggers.feed import FeedKey, Subscription, join

if TYPE_CHECKING:
    from durable_spark.hooks.job import JobHook

__all__ = ["Follower", "following", "new_submission", "states_during", "submit", "until"]


def new_submission() -> Submission:
    """Return a submission as an operator makes it, before a hook has prepared it."""
    return Submission(token=new_token(), owner=new_token(), deployment="tests", name="tests.task")


async def submit(hook: JobHook, job: SparkJob) -> tuple[Submission, JobRef]:
    """Prepare and submit a job."""
    submission = await hook.prepare(job, new_submission())
    return submission, await hook.submit(job, submission)


async def until(hook: JobHook, job: JobRef, *wanted: JobState, deadline: float = 60.0) -> JobStatus:
    """Poll until the job is in one of the states; a cluster out of reach may come back meanwhile."""

    async def reached() -> JobStatus | None:
        try:
            status = (await hook.poll([job]))[job]
        except ClusterUnreachable as error:
            raise OSError(str(error)) from error
        if status.state in wanted:
            return status
        if not status.state.active:
            raise AssertionError(f"{job} is to become {[state.value for state in wanted]}, but {status}")
        return None

    what = f"{job} to become {[state.value for state in wanted]}"
    return await wait_until_async(reached, deadline, what, interval=0.1)


@contextmanager
def states_during(hook: JobHook, job: JobRef) -> Iterator[set[JobState | None]]:
    """Poll all the while, and collect the states; ``None`` is a cluster out of reach."""
    states: set[JobState | None] = set()

    async def collect() -> None:
        while True:
            try:
                states.add((await hook.poll([job]))[job].state)
            except ClusterUnreachable:
                states.add(None)
            await asyncio.sleep(0.05)

    task = asyncio.ensure_future(collect())
    try:
        yield states
    finally:
        if task.done():
            task.result()
        task.cancel()


class Follower:
    """
    One job on a feed, as a trigger sees it.

    :ivar told: what was told of the job, in order, as far as somebody was waiting.
    """

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.told: list[JobStatus] = []

    async def until(self, *wanted: JobState, deadline: float = 60.0) -> JobStatus:
        """Return the status when the job is in one of the states."""
        give_up = time.monotonic() + deadline
        while True:
            status = self.subscription.status
            if status is not None and status not in self.told[-1:]:
                self.told.append(status)
            if status is not None and status.state in wanted:
                return status
            if not await self.subscription.changed(give_up - time.monotonic()):
                raise AssertionError(
                    f"{self.subscription.job} is to become {wanted}, but {self.told}, {self.subscription.outage}"
                )


@asynccontextmanager
async def following(
    make_hook: Callable[[], JobHook], *jobs: JobRef, interval: float = 0.5, key: FeedKey | None = None
) -> AsyncIterator[list[Follower]]:
    """Follow jobs on one feed: a new one, or the one of this key."""
    key = key or FeedKey(hook="tests", conn_id=new_token(), cluster=())
    async with AsyncExitStack() as stack:
        yield [
            Follower(await stack.enter_async_context(join(key, job, make_hook=make_hook, interval=interval)))
            for job in jobs
        ]
