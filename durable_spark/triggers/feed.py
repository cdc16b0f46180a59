"""
One status stream per cluster in a triggerer process, shared by all triggers that follow a job there.

A trigger joins the feed of its cluster and is told of its job's changes; the feed asks the cluster
for all its jobs at once, so that N deferred jobs cost one request an interval, not N. Airflow's own
shared streams (``BaseEventTrigger``) hand every event to every subscriber, tell a late one nothing of
what was said before, and end on the first error of a poll; this feed keeps the last status of each
job, wakes only the triggers whose job changed, and outlives errors.

In: job references and poll intervals. Out: :class:`~durable_spark.jobs.JobStatus` and
:class:`Outage`. The feed decides nothing about a job: what an end means is its trigger's business.

The trap: a task started from within a trigger inherits that trigger's log context, and its lines
would land in one user's task log (tried on 3.3.2). The feed therefore runs in an empty context.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import random
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from durable_spark import _metrics
from durable_spark.hooks.job import JobHook
from durable_spark.jobs import (
    AuthenticationFailed,
    ClusterChanged,
    ClusterUnreachable,
    DurableJobError,
    JobRef,
    JobState,
    JobStatus,
)

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["LONGEST_BACKOFF", "Feed", "FeedKey", "Outage", "Subscription", "asked_pause", "join", "pauses"]

_NEWCOMER_PAUSE = 1.0
"""Seconds between two polls while there are jobs that were never asked for (a triggerer starting up), at least."""
_NEWCOMER_SHARE = 3.0
"""Such a pause is as many times as long as the poll before it: thousands of triggers take a while to start."""
_TOLD_AT_ONCE = 50
"""Triggers that are woken in one turn of the event loop. Each of them writes to its task's log."""
_HEARD_AT_ONCE = 1000
"""Statuses that are gone through in one turn."""
LONGEST_BACKOFF = 60.0
"""Seconds between two attempts to reach a cluster, at most."""
_LONGEST_RETRY_AFTER = 600.0
"""A cluster that asks to be left alone for longer is asked sooner all the same."""
_SHORTEST_INTERVAL = 0.01
_ABSENCES_BELIEVED = 2
"""Polls in a row that must say that a job is not known before anybody is told."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class FeedKey:
    """What makes two triggers share a feed."""

    hook: str
    """Class path of the hook."""
    conn_id: str
    cluster: tuple[str, ...]
    """The cluster that the job was submitted to: a connection that is edited makes another feed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outage:
    """A time without word from the cluster."""

    since: float
    """Wall clock, in seconds since the epoch."""
    error: str


class Subscription:
    """
    One job's place in a feed: the last thing known of it, and a way to wait for the next.

    There are thousands of them: no attribute, and no task or timer while it is waited, that is not needed.
    """

    __slots__ = (
        "_feed",
        "_news",
        "_waiter",
        "absences",
        "absent_since",
        "interval",
        "job",
        "last_seen",
        "last_seen_at",
        "outage",
        "status",
    )

    def __init__(self, feed: Feed, job: JobRef, interval: float | None, status: JobStatus | None) -> None:
        self._feed = feed
        self.job = job
        self.interval = max(_SHORTEST_INTERVAL, interval) if isinstance(interval, (int, float)) else None
        self.status = status
        self.outage = outage = feed._outage
        self.absences = 0
        self.absent_since: float | None = None
        """When the cluster first did not know the job any more, in seconds since the epoch."""
        self.last_seen = status
        """The last status in which the cluster knew the job."""
        self.last_seen_at = time.time()
        """When that was told, in seconds since the epoch."""
        self._news = status is not None or outage is not None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def beside(self) -> int:
        """How many other jobs the feed follows."""
        return len(self._feed._subscriptions) - 1

    async def changed(self, timeout: float | None) -> bool:
        """
        Wait until the status or the outage changes.

        :param timeout: seconds, or ``None`` to wait for ever.
        :return: whether there was a change; ``False`` when the time is up.
        """
        if not self._news and (timeout is None or timeout > 0):
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = None if timeout is None else loop.call_later(timeout, _wake, waiter, context=self._feed._context)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        news, self._news = self._news, False
        return news

    def _hear(self, status: JobStatus, now: float) -> bool:
        """Take note of what the cluster said; tell it, and return ``True``, if it is new and to be believed."""
        if status.state is not JobState.ABSENT:
            self.absences, self.absent_since, self.last_seen, self.last_seen_at = 0, None, status, now
        else:
            self.absences += 1
            self.absent_since = self.absent_since or now
            ended = self.status is not None and self.status.state.final
            if self.absences < _ABSENCES_BELIEVED or ended:  # an end that was seen counts, whatever is forgotten later
                return False
        if status is self.status or status == self.status:
            return False
        self._tell(status=status, outage=None)
        return True

    def _tell(self, *, status: JobStatus | None, outage: Outage | None) -> None:
        self.status = status
        self.outage = outage
        self._news = True
        if self._waiter is not None:
            _wake(self._waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Feed:
    """
    Follows jobs on one cluster for the subscribers it has.

    Runs while it has subscribers; the last one to leave stops it and waits until it has stopped.

    :param key: what it follows.
    :param make_hook: returns a new hook. Called again after every failure, so that the connection is
        read anew: its password may have been renewed.
    :param gauged: whether to say in Airflow's metrics how many jobs it follows.
    :param feeds: those of the event loop. A connection that was edited has two feeds, and one gauge.
    """

    def __init__(
        self,
        key: FeedKey,
        make_hook: Callable[[], JobHook],
        *,
        gauged: bool = False,
        feeds: Mapping[FeedKey, Feed] | None = None,
    ) -> None:
        self.key = key
        self.gauged = gauged
        self._feeds = {key: self} if feeds is None else feeds
        self._make_hook = make_hook
        self._subscriptions: dict[JobRef, tuple[Subscription, ...]] = {}
        self._left: dict[JobRef, JobStatus | None] = {}
        """
        The last word of jobs that nobody follows any more, until the stream asks which there are. To it one that comes
        back before is none that is new, and what it has said of it once it need not say again.
        """
        self._intervals: Counter[float | None] = Counter()
        self._newcomer = asyncio.Event()
        self._context = contextvars.Context()  # of all timers, each of which would keep one of its own
        self._task: asyncio.Task[None] | None = None
        self._outage: Outage | None = None
        self._interval = self._pausing = JobHook.default_poll_interval
        self._asked_at = time.monotonic()

    # What a running JobHook.follow() sees of us

    def jobs(self) -> Collection[JobRef]:
        """Return the jobs to follow now."""
        self._newcomer.clear()
        self._left.clear()
        self._asked_at = time.monotonic()
        self._gauge()  # not at each leave: when thousands leave at once, that is what takes their time
        return list(self._subscriptions)

    async def pause(self) -> None:
        """Return when the next poll is due: the shortest interval asked for, sooner when somebody new has come."""
        started = time.monotonic()
        interval = min((self._interval if each is None else each for each in self._intervals), default=self._interval)
        soon = min(max(_NEWCOMER_PAUSE, _NEWCOMER_SHARE * (started - self._asked_at)), interval)
        self._pausing = interval
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._newcomer.wait(), interval)
            await asyncio.sleep(max(0.0, soon - (time.monotonic() - started)))

    # What a trigger sees of us

    def enter(self, job: JobRef, *, interval: float | None) -> Subscription:
        """
        Follow a job, until :meth:`leave`.

        :param job: the job.
        :param interval: seconds between two polls, or ``None`` for what the connection says.
        """
        group = self._subscriptions.get(job, ())
        heard = [subscription.status for subscription in group] or [self._left.pop(job, None)]
        known = next((status for status in heard if status is not None and status.state is not JobState.ABSENT), None)
        subscription = Subscription(self, job, interval, known)
        self._subscriptions[job] = (*group, subscription)
        self._intervals[subscription.interval] += 1
        if known is None or (subscription.interval or self._interval) < self._pausing:
            self._newcomer.set()
        self._start()
        return subscription

    async def leave(self, subscription: Subscription) -> None:
        """End a subscription, and the stream with the last one."""
        job, interval = subscription.job, subscription.interval
        if rest := tuple(each for each in self._subscriptions[job] if each is not subscription):
            self._subscriptions[job] = rest
        else:
            del self._subscriptions[job]
            self._left[job] = subscription.status
        self._intervals[interval] -= 1
        if not self._intervals[interval]:
            del self._intervals[interval]
        if not self._subscriptions:
            self._left.clear()  # a new stream tells of each anew
            self._gauge()
            await self._stop()

    # The stream

    def _start(self) -> None:
        if self._task is None or self._task.done():
            name = f"durable_spark feed of {self.key.conn_id}"
            self._task = contextvars.Context().run(asyncio.create_task, self._run(), name=name)

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        while not task.done():  # asyncio.wait_for may swallow a cancellation before Python 3.12
            task.cancel()
            await asyncio.wait([task], timeout=1)

    def _gauge(self) -> None:
        if self.gauged:
            conn_id = self.key.conn_id
            feeds = list(self._feeds.values())  # a copy: the first time, this runs in a thread
            number = sum(len(feed._subscriptions) for feed in feeds if feed.gauged and feed.key.conn_id == conn_id)
            _metrics.followed_jobs(number, conn_id=conn_id)

    async def _run(self) -> None:
        await asyncio.to_thread(self._gauge)  # the first use of metrics may ask the resolver
        failures = 0
        while True:
            heard = False
            try:
                async with self._make_hook() as hook:
                    await self._expect_same_cluster(hook)
                    self._interval = await hook.poll_interval()
                    async with contextlib.aclosing(hook.follow(self)) as stream:
                        async for statuses in stream:
                            heard, failures = True, 0
                            await self._publish(statuses)
                error: Exception = ClusterUnreachable("the status stream ended")
            except DurableJobError as caught:
                error = caught
            except Exception as caught:  # a bug in a hook must not end the following of everybody's jobs
                log.exception("The feed of %s met an error that its hook should have named", self.key.conn_id)
                error = caught
            failures = 1 if heard else failures + 1
            _metrics.count("poll_errors", {"conn_id": self.key.conn_id, "error": type(error).__name__})
            await self._publish_outage(error)
            self._gauge()
            await asyncio.sleep(self._backoff(failures, error))

    async def _expect_same_cluster(self, hook: JobHook) -> None:
        names = tuple(await hook.cluster())
        if self.key.cluster and not set(names) & set(self.key.cluster):
            raise ClusterChanged(
                f"connection {self.key.conn_id!r} now names {', '.join(names)}, "
                f"but the job was submitted to {', '.join(self.key.cluster)}"
            )

    def _backoff(self, failures: int, error: Exception) -> float:
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 not a secret
        delay = min(LONGEST_BACKOFF, self._interval * 2.0 ** min(failures - 1, 10)) * jitter
        return max(delay, asked_pause(error) * (1.0 + jitter / 10))

    async def _publish(self, statuses: Mapping[JobRef, JobStatus]) -> None:
        now, told = time.time(), 0
        recovered = self._outage is not None
        if recovered:
            log.info("%s answers again", self.key.conn_id)
        self._outage = None
        for number, (job, status) in enumerate(statuses.items(), start=1):
            for subscription in self._subscriptions.get(job, ()):
                told += subscription._hear(status, now)
            if job in self._left and status.state is not JobState.ABSENT:  # of that there will be more word
                self._left[job] = status
            if told >= _TOLD_AT_ONCE or not number % _HEARD_AT_ONCE:
                told = 0
                await asyncio.sleep(0)
        if recovered:
            await self._tell_each(None)

    async def _publish_outage(self, error: Exception) -> None:
        since = self._outage.since if self._outage else time.time()
        kind = "" if isinstance(error, (ClusterUnreachable, AuthenticationFailed)) else f"{type(error).__name__}: "
        outage = Outage(since=since, error=f"{kind}{error}"[:1000])
        if self._outage is None:
            log.warning("No word from %s: %s", self.key.conn_id, outage.error)
        self._outage = outage
        for group in self._subscriptions.values():
            for subscription in group:
                subscription.absences, subscription.absent_since = 0, None
        await self._tell_each(outage)

    async def _tell_each(self, outage: Outage | None) -> None:
        """Tell those who have not heard of it that an outage has begun, or is over."""
        told = 0
        for subscription in [each for group in self._subscriptions.values() for each in group]:
            if (subscription.outage is None) is not (outage is None):
                subscription._tell(status=subscription.status, outage=outage)
                told += 1
                if not told % _TOLD_AT_ONCE:
                    await asyncio.sleep(0)


def asked_pause(error: BaseException | None) -> float:
    """Return the seconds for which a cluster has asked to be left alone, as far as it is obeyed; 0 if it has not."""
    asked = error.retry_after if isinstance(error, ClusterUnreachable) else None
    return min(asked or 0.0, _LONGEST_RETRY_AFTER)


def pauses(backoff: Callable[[RetryCallState], float], *, within: float) -> Callable[[RetryCallState], float]:
    """
    Return what tenacity is to wait: as long as a backoff says, longer if the cluster has asked for it.

    :param within: seconds after the first attempt beyond which no pause goes. By tenacity's clock: by one that was set
        forward, the cluster would be asked without a pause.
    """

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        left = within - (state.seconds_since_start or 0.0)
        return max(0.0, min(max(backoff(state), asked_pause(error)), left))

    return pause


_feeds: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[FeedKey, Feed]] = weakref.WeakKeyDictionary()


class _Place:
    """What :func:`join` returns. A class of its own: of a generator, each job that is followed would keep one."""

    __slots__ = ("_feed", "_gauged", "_interval", "_job", "_key", "_make_hook", "_subscription")

    def __init__(
        self, key: FeedKey, job: JobRef, make_hook: Callable[[], JobHook], interval: float | None, *, gauged: bool
    ) -> None:
        self._key = key
        self._job = job
        self._make_hook = make_hook
        self._interval = interval
        self._gauged = gauged

    async def __aenter__(self) -> Subscription:
        feeds = _feeds.setdefault(asyncio.get_running_loop(), {})
        feed = feeds.get(self._key)
        if feed is None:
            feed = feeds[self._key] = Feed(self._key, self._make_hook, gauged=self._gauged, feeds=feeds)
        self._feed = feed
        self._subscription = feed.enter(self._job, interval=self._interval)
        return self._subscription

    async def __aexit__(self, *exc_info: object) -> None:
        feeds = _feeds.get(asyncio.get_running_loop(), {})
        try:
            await self._feed.leave(self._subscription)
        finally:
            if not self._feed._subscriptions and feeds.get(self._key) is self._feed:
                del feeds[self._key]


def join(
    key: FeedKey,
    job: JobRef,
    *,
    make_hook: Callable[[], JobHook],
    interval: float | None = None,
    gauged: bool = False,
) -> contextlib.AbstractAsyncContextManager[Subscription]:
    """
    Follow a job on the one feed that this event loop has for its cluster, for as long as the context is open.

    :param key: names the feed.
    :param job: the job.
    :param make_hook: returns a new hook on the cluster, if the feed must be started.
    :param interval: seconds between two polls, or ``None`` for what the connection says. The
        shortest interval that any subscriber asks for counts for all.
    :param gauged: whether the feed, if it must be started, says in Airflow's metrics how many jobs it follows.
    """
    return _Place(key, job, make_hook, interval, gauged=gauged)
