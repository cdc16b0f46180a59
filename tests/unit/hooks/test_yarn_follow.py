"""Following many applications in few requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any

import pytest

from durable_spark.hooks import _yarn_follow
from durable_spark.jobs import ClusterUnreachable, JobRef, JobState, JobStatus
from tests.unit.hooks.fake import fixed
from tests.unit.hooks.fake_yarn import NOW, FakeYarn, QuickYarnHook, app_id, ours, row

Connect = Callable[[dict[str, Any]], QuickYarnHook]
News = Mapping[JobRef, JobStatus]


def job(number: int) -> JobRef:
    return JobRef(app_id(number))


class Followed:
    """Jobs to follow; each turn is given by the test."""

    def __init__(self, *jobs: JobRef) -> None:
        self.wanted = list(jobs)
        self._turn = asyncio.Event()

    def jobs(self) -> Collection[JobRef]:
        return tuple(self.wanted)

    async def pause(self) -> None:
        await self._turn.wait()
        self._turn.clear()

    def turn(self) -> None:
        self._turn.set()


class Stream:
    """A running ``follow``, turn by turn."""

    def __init__(self, hook: QuickYarnHook, followed: Followed) -> None:
        self.followed = followed
        self._stream = hook.follow(followed)
        self._begun = False

    async def next(self) -> dict[JobRef, JobState]:
        if self._begun:
            self.followed.turn()
        self._begun = True
        news = await asyncio.wait_for(anext(self._stream), 10)
        assert all(status.job == ref for ref, status in news.items())
        return {ref: status.state for ref, status in news.items()}

    async def aclose(self) -> None:
        await self._stream.aclose()


@pytest.fixture
async def follow(yarn_hook: QuickYarnHook) -> AsyncIterator[Callable[..., Stream]]:
    async with contextlib.AsyncExitStack() as stack:

        def follow(*jobs: JobRef, list_interval: float = 3600.0) -> Stream:
            yarn_hook.list_interval = list_interval
            stream = Stream(yarn_hook, Followed(*jobs))
            stack.push_async_callback(stream.aclose)
            return stream

        yield follow


def add(yarn: FakeYarn, *numbers: int, state: str = "RUNNING") -> list[JobRef]:
    yarn.manager.add(*(row(number, state, tags=ours()) for number in numbers))
    return [job(number) for number in numbers]


def requests(yarn: FakeYarn) -> list[str]:
    """What was asked since the last time, without ``/info``."""
    asked = [path.removeprefix("/ws/v1/cluster/") for _, path in yarn.manager.requests if "/info" not in path]
    yarn.manager.requests.clear()
    return asked


async def test_one_request_an_interval(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    jobs = add(yarn, *range(1, 301))
    stream = follow(*jobs)
    assert await stream.next() == dict.fromkeys(jobs, JobState.RUNNING)
    assert len(requests(yarn)) == 2, "what has ended, and what runs"
    for _ in range(5):
        assert await stream.next() == {}
    asked = requests(yarn)
    assert len(asked) == 5
    assert all("finishedTimeBegin=" in path and "applicationTags=durable-spark&" in path for path in asked)
    assert all("deSelects=" in path for path in asked)
    yarn.manager.now += 5
    yarn.manager.end(7, "FINISHED", "FAILED")
    yarn.manager.end(8, "KILLED", "KILLED")
    assert await stream.next() == {job(7): JobState.FAILED, job(8): JobState.KILLED}
    assert len(requests(yarn)) == 1
    assert await stream.next() == {}


async def test_windows_overlap_by_the_resourcemanagers_clock(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    stream = follow(*add(yarn, 1))
    await stream.next()
    requests(yarn)
    begins = []
    for seconds in (5, 100, 3600, -7200):
        await stream.next()
        (path,) = requests(yarn)
        begins.append(int(path.partition("finishedTimeBegin=")[2].partition("&")[0]) / 1000)
        yarn.manager.now += seconds
    overlap = _yarn_follow.OVERLAP
    assert begins == [NOW - overlap, NOW - overlap, NOW + 5 - overlap, NOW + 105 - overlap]


async def test_a_clock_that_is_set_back_hides_no_end_for_long(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    """The window begins after the end, by the clock as it is now: the list of those that run shows it."""
    stream = follow(*add(yarn, 1), list_interval=0.0)
    await stream.next()
    yarn.manager.now -= 7200
    yarn.manager.end(1)
    yarn.manager.now += 7200
    assert await stream.next() == {job(1): JobState.SUCCEEDED}


async def test_a_start_is_told_at_once(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    stream = follow(*add(yarn, 1, 2, state="ACCEPTED"), *add(yarn, 3))
    assert await stream.next() == {job(1): JobState.PENDING, job(2): JobState.PENDING, job(3): JobState.RUNNING}
    yarn.manager.apps[app_id(2)]["state"] = "RUNNING"
    assert await stream.next() == {job(2): JobState.RUNNING}


async def test_few_of_many_that_wait_are_asked_for(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    stream = follow(*add(yarn, *range(1, 201), state="ACCEPTED"))
    await stream.next()
    requests(yarn)
    await stream.next()
    assert len(requests(yarn)) == 1 + _yarn_follow.WAITING_ONE_BY_ONE


async def test_the_list_of_those_that_run_comes_at_the_longer_interval(
    yarn: FakeYarn, follow: Callable[..., Stream]
) -> None:
    jobs = add(yarn, 1, 2, 3)
    stream = follow(*jobs, list_interval=0.0)
    await stream.next()
    yarn.manager.apps[app_id(1)]["diagnostics"] = "said something"
    requests(yarn)
    assert await stream.next() == dict.fromkeys(jobs, JobState.RUNNING), "all are told again"
    assert [path for path in requests(yarn) if "states=NEW,NEW_SAVING,SUBMITTED,ACCEPTED,RUNNING" in path]


async def test_a_job_that_is_in_no_list_is_asked_for(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    """It was killed while nobody could ask, and its end is out of the window."""
    stream = follow(*add(yarn, 1, 2), list_interval=0.0)
    await stream.next()
    yarn.manager.end(1, "KILLED", "KILLED")
    yarn.manager.apps[app_id(1)]["finishedTime"] = int(NOW - 86400) * 1000
    del yarn.manager.apps[app_id(2)]
    assert await stream.next() == {job(1): JobState.KILLED, job(2): JobState.ABSENT}
    requests(yarn)
    assert await stream.next() == {job(1): JobState.KILLED, job(2): JobState.ABSENT}, "an absence is said twice"
    assert not [path for path in requests(yarn) if app_id(1) in path], "an end stays an end"


async def test_a_job_that_joins_late(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    stream = follow(*add(yarn, 1))
    await stream.next()
    yarn.manager.add(row(2, "FINISHED", "SUCCEEDED", tags=ours(), finishedTime=int(NOW - 86400) * 1000))
    stream.followed.wanted.append(job(2))
    assert await stream.next() == {job(2): JobState.SUCCEEDED}
    requests(yarn)
    await stream.next()
    assert len(requests(yarn)) == 1, "an end stays an end"


async def test_many_that_join_at_once(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    """A triggerer that starts: one list, and only those that are not in it one by one."""
    running = add(yarn, *range(1, 501))
    yarn.manager.add(row(600, "FINISHED", tags=ours(), finishedTime=int(NOW - 86400) * 1000), row(601))
    stream = follow(*running, job(600), job(601))
    told = await stream.next()
    assert len(told) == 502
    assert (told[job(600)], told[job(601)]) == (JobState.SUCCEEDED, JobState.RUNNING)
    assert len(requests(yarn)) == 4


async def test_a_job_without_our_tag_is_asked_for_each_time(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    """Another operator submitted it."""
    yarn.manager.add(row(1), row(2))
    stream = follow(job(1), job(2), JobRef("../x"))
    assert await stream.next() == {
        job(1): JobState.RUNNING,
        job(2): JobState.RUNNING,
        JobRef("../x"): JobState.ABSENT,
    }
    yarn.manager.end(2)
    requests(yarn)
    assert await stream.next() == {job(2): JobState.SUCCEEDED, JobRef("../x"): JobState.ABSENT}
    assert sorted(path.partition("?")[0] for path in requests(yarn)) == [f"apps/{app_id(1)}", f"apps/{app_id(2)}"]
    await stream.next()
    assert [path.partition("?")[0] for path in requests(yarn)] == [f"apps/{app_id(1)}"]


async def test_a_recovery_ends_nothing(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    """Empty lists, 404s: all are there again in a moment."""
    jobs = add(yarn, *range(1, 101))
    stream = follow(*jobs, list_interval=0.0)
    await stream.next()
    yarn.manager.state = "INITIALIZING"
    requests(yarn)
    for _ in range(3):
        assert set((await stream.next()).values()) <= {JobState.RUNNING}
    assert len(requests(yarn)) == 3, "nobody is asked for one by one"
    yarn.manager.state = "ACTIVE"
    yarn.manager.end(1)
    assert (await stream.next())[job(1)] is JobState.SUCCEEDED


async def test_joining_in_a_recovery(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    jobs = add(yarn, 1, 2)
    stream = follow(*jobs)
    await stream.next()
    yarn.manager.state = "INITIALIZING"
    stream.followed.wanted += add(yarn, 3)
    assert await stream.next() == {job(3): JobState.UNKNOWN}
    yarn.manager.state = "ACTIVE"
    assert await stream.next() == {job(3): JobState.RUNNING}


async def test_an_outage_is_raised(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    """The feed waits, makes a new hook, and asks for all of them anew."""
    jobs = add(yarn, 1)
    stream = follow(*jobs)
    await stream.next()
    yarn.manager.handler = fixed(503, "busy", Retry_After="9")
    with pytest.raises(ClusterUnreachable) as caught:
        await stream.next()
    assert caught.value.retry_after == 9
    yarn.manager.handler = None
    yarn.manager.end(1)
    yarn.manager.now += 7200
    assert await follow(*jobs).next() == {job(1): JobState.SUCCEEDED}


async def test_a_list_that_is_too_long(
    yarn: FakeYarn, follow: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_spark.hooks._yarn_api.LIST_LIMIT", 20_000)
    jobs = add(yarn, *range(1, 41))
    stream = follow(*jobs, list_interval=0.0)
    assert await stream.next() == dict.fromkeys(jobs, JobState.RUNNING)
    assert await stream.next() == dict.fromkeys(jobs, JobState.RUNNING)


async def test_nothing_to_follow_asks_nothing(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    stream = follow()
    assert await stream.next() == {}
    assert yarn.manager.requests == []


async def test_a_job_that_left_is_forgotten(yarn: FakeYarn, follow: Callable[..., Stream]) -> None:
    stream = follow(*add(yarn, 1, 2))
    await stream.next()
    stream.followed.wanted.remove(job(1))
    yarn.manager.end(1)
    assert await stream.next() == {}
    stream.followed.wanted.append(job(1))
    assert await stream.next() == {job(1): JobState.SUCCEEDED}


async def test_the_longer_interval(yarn: FakeYarn, connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    async def note(*_: Any, list_interval: float) -> AsyncIterator[News]:
        seen.append(list_interval)
        yield {}

    monkeypatch.setattr("durable_spark.hooks.yarn.follow", note)
    for interval in ("0.5", "5", "60"):
        hook = connect_yarn(yarn.connection(**{"poll-interval": interval}))
        async with contextlib.aclosing(hook.follow(Followed())) as stream:
            await anext(stream)
    assert seen == [30.0, 60.0, 720.0]
