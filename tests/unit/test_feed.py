"""One feed for all: few requests, no word lost, no error that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.observability import stats

from dev.processes import wait_until_async
from durable_spark import _metrics
from durable_spark.jobs import AuthenticationFailed, ClusterUnreachable, JobRef, JobState, JobStatus
from durable_spark.triggers import feed as feed_module
from durable_spark.triggers.feed import FeedKey, Subscription, join
from tests.unit.tries import MemoryHook

if TYPE_CHECKING:
    from durable_spark.hooks.job import Followed, JobHook

KEY = FeedKey(hook="tests.PolledHook", conn_id="here", cluster=("service://one",))
INTERVAL = 0.02
whose_context: contextvars.ContextVar[str] = contextvars.ContextVar("whose_context", default="nobody's")


class PolledHook(MemoryHook):
    """Answers from a table; counts polls, hooks and what is left open."""

    states: Mapping[str, JobState]
    polls: list[Collection[JobRef]]
    errors: list[Exception]
    made: list[PolledHook]
    contexts: set[str]
    names: tuple[str, ...] = ("service://one", "service://standby")

    def __init__(self, conn_id: str = "here") -> None:
        super().__init__(conn_id)
        self.closed = False
        self.made.append(self)

    async def aclose(self) -> None:
        self.closed = True

    async def cluster(self) -> Any:
        return self.names

    async def poll_interval(self) -> float:
        return INTERVAL

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        self.contexts.add(whose_context.get())
        self.polls.append(jobs)
        if self.errors:
            raise self.errors.pop(0)
        return {job: JobStatus(job=job, state=self.states.get(job.id, JobState.ABSENT)) for job in jobs}


class WatchingHook(PolledHook):
    """Says of a job that it was asked for before only what is new, and that at once, as a watch does."""

    news: asyncio.Queue[JobStatus]

    async def follow(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        shown: set[JobRef] = set()
        while True:
            jobs = set(followed.jobs())
            yield await self.poll(jobs - shown)
            shown = jobs
            pausing = asyncio.ensure_future(followed.pause())
            try:
                while not pausing.done():
                    get = asyncio.ensure_future(self.news.get())
                    await asyncio.wait([get, pausing], return_when=asyncio.FIRST_COMPLETED)
                    if get.done():
                        yield {get.result().job: get.result()}
                    get.cancel()
            finally:
                pausing.cancel()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> type[PolledHook]:
    monkeypatch.setattr(feed_module, "_NEWCOMER_PAUSE", INTERVAL)

    class Fresh(PolledHook):
        states: Mapping[str, JobState] = {}
        polls: list[Collection[JobRef]] = []
        errors: list[Exception] = []
        made: list[PolledHook] = []
        contexts: set[str] = set()

    return Fresh


def follow(hook: type[JobHook], job: str, interval: float | None = INTERVAL) -> Any:
    return join(KEY, JobRef(job), make_hook=lambda: hook("here"), interval=interval)


async def state(subscription: Subscription) -> JobState | None:
    assert await subscription.changed(5)
    return subscription.status.state if subscription.status else None


async def test_many_jobs_cost_one_request_an_interval(hook: type[PolledHook]) -> None:
    hook.states = {f"job-{n}": JobState.RUNNING for n in range(500)}
    async with contextlib.AsyncExitStack() as stack:
        everyone = [await stack.enter_async_context(follow(hook, job)) for job in hook.states]
        assert {await state(one) for one in everyone} == {JobState.RUNNING}
        seen = len(hook.polls)
        hook.states = {**hook.states, "job-7": JobState.SUCCEEDED}
        assert await state(everyone[7]) is JobState.SUCCEEDED
        assert not await everyone[8].changed(0)
        assert len(hook.polls) <= seen + 3
        assert seen <= 2
    assert len(hook.made) == 1


async def test_who_comes_late_is_told_at_once(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.RUNNING}
    async with follow(hook, "job", interval=60) as first:
        assert await state(first) is JobState.RUNNING
        polls = len(hook.polls)
        async with follow(hook, "job", interval=60) as late:
            assert await late.changed(0)
            assert late.status == first.status
        assert len(hook.polls) == polls


async def test_a_newcomer_does_not_wait_for_the_interval(hook: type[PolledHook]) -> None:
    hook.states = {"old": JobState.RUNNING, "new": JobState.RUNNING}
    async with follow(hook, "old", interval=60) as old:
        await state(old)
        async with follow(hook, "new", interval=60) as new:
            assert await state(new) is JobState.RUNNING


async def test_the_shortest_interval_asked_for_wins(hook: type[PolledHook]) -> None:
    hook.states = {"slow": JobState.RUNNING, "quick": JobState.RUNNING}
    async with follow(hook, "slow", interval=60) as slow:
        await state(slow)
        async with follow(hook, "quick", interval=INTERVAL) as quick:
            await state(quick)
            hook.states = {**hook.states, "slow": JobState.FAILED}
            assert await state(slow) is JobState.FAILED


async def test_a_longer_interval_than_the_connections_can_be_asked_for(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.RUNNING}
    async with follow(hook, "job", interval=60) as subscription:
        await state(subscription)
        polls = len(hook.polls)
        assert not await subscription.changed(10 * INTERVAL)
        assert len(hook.polls) == polls


async def test_errors_are_told_once_and_outlived(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.RUNNING}
    async with follow(hook, "job") as subscription:
        await state(subscription)
        hook.errors = [ClusterUnreachable("down"), AuthenticationFailed("expired"), KeyError("a bug")]
        assert await subscription.changed(5)
        assert subscription.outage is not None
        assert subscription.outage.error == "down"
        assert subscription.status is not None
        assert await subscription.changed(30)
        assert subscription.outage is None
        assert not hook.errors
    assert len(hook.made) == 4, "a new hook after each failure, which reads the connection anew"
    assert all(one.closed for one in hook.made)


async def test_who_joins_during_an_outage_is_told(hook: type[PolledHook]) -> None:
    hook.errors = [ClusterUnreachable("down") for _ in range(100)]
    async with follow(hook, "job") as first:
        assert await first.changed(5)
        async with follow(hook, "other") as late:
            assert await late.changed(0)
            assert late.outage == first.outage


async def test_an_absence_is_believed_when_it_is_said_twice(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.RUNNING}
    async with follow(hook, "job") as subscription:
        await state(subscription)
        hook.states = {}
        seen = len(hook.polls)
        assert await state(subscription) is JobState.ABSENT
        assert len(hook.polls) >= seen + 2


async def test_an_outage_in_between_makes_an_absence_new(hook: type[PolledHook]) -> None:
    answers = [JobState.ABSENT, None, JobState.ABSENT, JobState.RUNNING]

    class Flickering(hook):  # type: ignore[misc, valid-type]
        async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
            answer = answers.pop(0) if answers else JobState.RUNNING
            if answer is None:
                raise ClusterUnreachable("down")
            return {job: JobStatus(job=job, state=answer) for job in jobs}

    async with follow(Flickering, "job") as subscription:
        while subscription.status is None:
            await subscription.changed(30)
        assert subscription.status.state is JobState.RUNNING


async def test_another_cluster_is_an_outage_not_an_absence(hook: type[PolledHook]) -> None:
    hook.names = ("service://elsewhere",)
    async with follow(hook, "job") as subscription:
        assert await subscription.changed(5)
        assert subscription.status is None
        assert subscription.outage is not None
        assert "service://elsewhere" in subscription.outage.error
        assert "service://one" in subscription.outage.error
        assert not hook.polls


@pytest.mark.parametrize(
    "ended", ["while it was followed", "while nobody followed it", "and was forgotten", "before it was asked for"]
)
async def test_who_comes_anew_is_told_whatever_was_told_to_others(
    hook: type[PolledHook], monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    """A job is let go of and followed again before the stream asks which there are: to the stream it is an old one."""
    monkeypatch.setattr(feed_module, "_NEWCOMER_PAUSE", 0.2)

    class Watching(WatchingHook, hook):  # type: ignore[misc, valid-type]
        news: asyncio.Queue[JobStatus] = asyncio.Queue()

    hook.states = {"job": JobState.RUNNING, "other": JobState.RUNNING}
    end = JobStatus(job=JobRef("job"), state=JobState.SUCCEEDED)
    async with follow(Watching, "other", interval=60) as other:
        await state(other)
        async with follow(Watching, "job", interval=60) as before:
            await state(before)
            if ended in ("while it was followed", "and was forgotten"):
                Watching.news.put_nowait(end)
                assert await state(before) is JobState.SUCCEEDED
        if ended in ("while nobody followed it", "and was forgotten"):
            forgotten = dataclasses.replace(end, state=JobState.ABSENT)
            Watching.news.put_nowait(forgotten if ended == "and was forgotten" else end)
            Watching.news.put_nowait(JobStatus(job=JobRef("other"), state=JobState.RUNNING, raw="a line after it"))
            await state(other)
        async with follow(Watching, "job", interval=60) as anew:
            if ended == "before it was asked for":
                assert await state(anew) is JobState.RUNNING
                Watching.news.put_nowait(end)
            assert await state(anew) is JobState.SUCCEEDED
        assert len(Watching.polls) < 5


async def test_the_last_to_leave_leaves_nothing(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.RUNNING}
    async with follow(hook, "job") as first, follow(hook, "other") as second:
        await state(first)
        assert second is not first
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert all(one.closed for one in hook.made)
    assert not feed_module._feeds[asyncio.get_running_loop()]
    async with follow(hook, "job") as again:
        assert await state(again) is JobState.RUNNING


async def test_a_cancelled_trigger_leaves_nothing(hook: type[PolledHook]) -> None:
    joined = asyncio.Event()

    async def trigger() -> None:
        async with follow(hook, "job") as subscription:
            joined.set()
            await subscription.changed(None)
            await asyncio.sleep(60)

    task = asyncio.create_task(trigger())
    await joined.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_it_runs_in_nobodys_context(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.RUNNING}
    whose_context.set("a user's task")
    async with follow(hook, "job") as subscription:
        await state(subscription)
    assert hook.contexts == {"nobody's"}


async def test_a_stream_that_ends_is_an_outage(hook: type[PolledHook]) -> None:
    class Ending(hook):  # type: ignore[misc, valid-type]
        async def follow(self, followed: Any) -> AsyncIterator[Mapping[JobRef, JobStatus]]:
            yield {}

    async with follow(Ending, "job") as subscription:
        assert await subscription.changed(5)
        assert subscription.outage is not None


@pytest.mark.parametrize(("asked", "shortest", "longest"), [(30.0, 30.0, 33.0), (1e9, 600.0, 660.0), (0.0, 0.0, 1.0)])
async def test_a_cluster_that_asks_to_be_left_alone_is(
    hook: type[PolledHook], asked: float, shortest: float, longest: float
) -> None:
    feed = feed_module.Feed(KEY, lambda: hook("here"))
    feed._interval = 1.0
    error = ClusterUnreachable("busy", retry_after=asked)
    delays = [feed._backoff(1, error) for _ in range(100)]
    assert shortest <= min(delays) <= max(delays) <= longest
    assert len(set(delays)) > 50, "not everybody at once"


async def test_an_end_is_not_forgotten(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.SUCCEEDED}
    async with follow(hook, "job") as subscription:
        await state(subscription)
        hook.states = {}
        polls = len(hook.polls)
        assert not await subscription.changed(10 * INTERVAL)
        assert len(hook.polls) >= polls + 2
        assert subscription.status is not None
        assert subscription.status.state is JobState.SUCCEEDED


async def test_what_was_last_seen_of_a_job_that_is_gone(hook: type[PolledHook]) -> None:
    hook.states = {"job": JobState.RUNNING}
    async with follow(hook, "job") as subscription:
        await state(subscription)
        began = time.time()
        hook.states = {}
        assert await state(subscription) is JobState.ABSENT
        assert subscription.last_seen is not None
        assert subscription.absent_since is not None
        assert subscription.last_seen.state is JobState.RUNNING
        assert subscription.last_seen_at <= subscription.absent_since
        assert began <= subscription.absent_since <= time.time()


class TestMetrics:
    @pytest.fixture
    def told(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
        """What was handed to Airflow's metrics."""
        said: list[tuple[str, Any, Any]] = []
        monkeypatch.setattr(stats, "incr", lambda name, tags: said.append((name, 1, tags)))
        monkeypatch.setattr(stats, "gauge", lambda name, value, tags=None: said.append((name, value, tags)))
        return said

    async def test_each_failed_poll_is_counted(self, hook: type[PolledHook], told: list[Any]) -> None:
        hook.states = {"job": JobState.RUNNING}
        hook.errors = [ClusterUnreachable("down"), KeyError("a bug")]
        async with follow(hook, "job") as subscription:
            while subscription.status is None:
                await subscription.changed(5)
        assert told == [
            ("durable_spark.poll_errors", 1, {"conn_id": "here", "error": "ClusterUnreachable"}),
            ("durable_spark.poll_errors", 1, {"conn_id": "here", "error": "KeyError"}),
        ]

    async def test_the_jobs_that_a_triggerer_follows(
        self, hook: type[PolledHook], told: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_metrics, "_hostname", lambda: "host.example")
        hook.states = {"job": JobState.RUNNING, "other": JobState.RUNNING}

        def followed() -> list[int]:
            values = [value for name, value, _ in told if name == "durable_spark.followed_jobs"]
            return [value for value, before in zip(values, [None, *values], strict=False) if value != before]

        async with join(KEY, JobRef("job"), make_hook=lambda: hook("here"), interval=INTERVAL, gauged=True) as first:
            await state(first)
            async with join(KEY, JobRef("other"), make_hook=lambda: hook("here"), interval=INTERVAL) as second:
                await state(second)
            await wait_until_async(lambda: asyncio.sleep(0, followed() == [1, 2, 1]), 5, "the gauge to fall")
        assert followed() == [1, 2, 1, 0]
        assert {(name, str(tags)) for name, _, tags in told} == {
            ("durable_spark.followed_jobs", "{'conn_id': 'here', 'hostname': 'host.example'}"),
            ("durable_spark.followed_jobs.host__example.here", "None"),
        }

    async def test_one_gauge_for_the_two_feeds_of_a_connection_that_was_edited(
        self, hook: type[PolledHook], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: dict[str, int] = {}
        monkeypatch.setattr(_metrics, "followed_jobs", lambda number, *, conn_id: told.update({conn_id: number}))
        hook.states = {"job": JobState.RUNNING, "other": JobState.RUNNING}
        keys = (KEY, dataclasses.replace(KEY, cluster=PolledHook.names))
        first, second = (
            join(key, JobRef(job), make_hook=lambda: hook("here"), interval=INTERVAL, gauged=True)
            for key, job in zip(keys, hook.states, strict=True)
        )
        async with first, second:
            await wait_until_async(lambda: asyncio.sleep(0, told.get("here") == 2), 5, "the sum of both")

    async def test_no_metric_ends_a_feed(self, hook: type[PolledHook], monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no route to the statsd host")

        monkeypatch.setattr(stats, "incr", fail)
        monkeypatch.setattr(stats, "gauge", fail)
        hook.states = {"job": JobState.RUNNING}
        hook.errors = [ClusterUnreachable("down")]
        async with join(KEY, JobRef("job"), make_hook=lambda: hook("here"), interval=INTERVAL, gauged=True) as one:
            while one.status is None:
                assert await one.changed(5)
