"""
What hundreds of waits may cost, in counts: requests to the cluster, and bytes and objects that each trigger keeps.

Times are for ``scripts/bench waits``, which also has Airflow's ``TriggerRunner`` around the triggers. The cluster is
the benchmark's, in a process of its own; it answers as the real ones were recorded to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from benchmarks.waits import HOOK, ask, connect, served
from dev.processes import wait_until_async
from durable_spark.jobs import JobRef, JobState, Submission
from durable_spark.triggers import feed
from durable_spark.triggers.job import JobTrigger, JobTriggerArguments

if TYPE_CHECKING:
    from airflow.triggers.base import TriggerEvent

JOBS = 300
INTERVAL = 0.25
"""Seconds between two polls."""
LARGEST = 4096
"""Bytes that a job may take: its trigger, its arguments, its place in the feed, and what the hook knows of it."""
MOST = 22
"""Objects that Python's garbage collector has to look through for it: while it does, nothing else goes on."""
TO_START = 12
"""Requests until all are known, at most, however many there are."""


class Cluster:
    """A cluster, and the triggers of its jobs, made from their serialized arguments as in a triggerer."""

    def __init__(self, name: str, url: str, names: list[str]) -> None:
        self.name, self.url, self.names = name, url, names
        self.jobs = ask(f"{url}/-/jobs")

    def trigger(self, number: int) -> JobTrigger:
        job_id, uid, token, _ = self.jobs[number]
        arguments = JobTriggerArguments(
            hook=HOOK,
            conn_id="waits",
            cluster=tuple(self.names),
            job=JobRef(job_id, uid),
            submission=Submission(token=token, owner=f"{number:064x}"),
            dag_id="waits",
            run_id="manual__2026-11-27T00:00:00+00:00",
            task_id="job",
            map_index=number,
            ti_id=f"00000000-0000-4000-8000-{number:012x}",
            interval=INTERVAL,
            deadline=time.time() + 86400,
            deferred_at=time.time() - 3600,
        )
        return JobTrigger(**JobTrigger(arguments.to_json()).serialize()[1])

    async def requests(self, session: aiohttp.ClientSession) -> dict[str, int]:
        """Return how often each request was made since this was last asked."""
        async with session.get(f"{self.url}/-/requests") as answer:
            return dict(await answer.json())


@pytest.fixture(scope="module", params=["standalone", "yarn", "kubernetes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, served(request.param, JOBS) as url:
        patch.setenv("AIRFLOW_CONN_WAITS", "")  # for it to be taken away again
        yield Cluster(request.param, url, connect("waits", url))


async def first_event(trigger: JobTrigger) -> TriggerEvent:
    async for event in trigger.run():
        return event
    raise AssertionError("it ended without an event")


@contextlib.asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_know(number: int) -> None:
    """Return when so many triggers know that their jobs run."""

    async def known() -> bool:
        feeds = feed._feeds.get(asyncio.get_running_loop(), {}).values()
        places = [place for each in feeds for group in each._subscriptions.values() for place in group]
        return sum(place.status is not None and place.status.state is JobState.RUNNING for place in places) == number

    await wait_until_async(known, 30, f"{number} jobs to be known")


def test_requests_do_not_grow_with_the_jobs(cluster: Cluster) -> None:
    async def follow() -> None:
        async with aiohttp.ClientSession() as session:
            await cluster.requests(session)
            async with running(*(first_event(cluster.trigger(number)) for number in range(JOBS))):
                await all_know(JOBS)
                start = await cluster.requests(session)
                began = time.monotonic()
                polls: dict[str, int] = {}

                async def polled() -> bool:
                    for what, count in (await cluster.requests(session)).items():
                        polls[what] = polls.get(what, 0) + count
                    return time.monotonic() > began + 8 * INTERVAL

                await wait_until_async(polled, 30, "eight intervals to pass")
                intervals = (time.monotonic() - began) / INTERVAL
        assert sum(start.values()) <= TO_START, start
        assert sum(polls.values()) <= intervals + 2, (polls, intervals)
        if cluster.name == "kubernetes":
            assert polls == {}, "a watch tells"

    asyncio.run(follow())


def test_memory_and_objects_of_a_wait(cluster: Cluster) -> None:
    async def nothing(_: int) -> None:
        await asyncio.Event().wait()

    async def followed(number: int) -> None:
        await first_event(cluster.trigger(number))

    async def grown(one: Callable[[int], Coroutine[Any, Any, None]], *, known: bool) -> tuple[float, float]:
        """Return the bytes and objects that each takes but the first, for which is paid what is paid once."""
        async with running(one(0)):
            if known:
                await all_know(1)
            gc.collect()
            objects = len(gc.get_objects())
            tracemalloc.start()
            try:
                async with running(*map(one, range(1, JOBS))):
                    await (all_know(JOBS) if known else asyncio.sleep(0))
                    gc.collect()
                    memory = tracemalloc.get_traced_memory()[0]
                    return memory / (JOBS - 1), (len(gc.get_objects()) - objects) / (JOBS - 1)
            finally:
                tracemalloc.stop()

    async def measure() -> tuple[float, ...]:
        ours, nothing_at_all = await grown(followed, known=True), await grown(nothing, known=False)
        return tuple(of_ours - of_nothing for of_ours, of_nothing in zip(ours, nothing_at_all, strict=True))

    memory, objects = asyncio.run(measure())
    assert memory < LARGEST
    assert objects < MOST
