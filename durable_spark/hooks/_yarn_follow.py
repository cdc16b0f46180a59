"""
What became of many applications, in few requests.

What flows in: jobs to look at or to follow. What flows out: their statuses, and whether they carry our tag.

Once an interval, one request asks for the applications of ours that have ended since the last one; its answer has a
row for each end, however many run. At a longer interval the list of those that run shows what the other missed, and
what merely changed from waiting to running. Only what is in neither, or carries no tag of ours, is asked for by its ID.

The trap: an empty list ends nothing. What a list does not show is asked for, and is absent only if
:meth:`~durable_spark.hooks._yarn_managers.Managers.vouching` stands behind it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from durable_spark.hooks._http import AnswerTooLong, for_each
from durable_spark.hooks._yarn_apps import COMMON_TAG, App, is_application_id
from durable_spark.hooks._yarn_managers import NotVouchedFor
from durable_spark.jobs import ClusterError, JobRef, JobState, JobStatus

if TYPE_CHECKING:
    from durable_spark.hooks._yarn_api import Applications, Timeline
    from durable_spark.hooks._yarn_managers import Managers
    from durable_spark.hooks.job import Followed

__all__ = ["Jobs", "Seen", "follow"]

ONE_BY_ONE = 16
"""As many jobs are asked for by their IDs, all at once; more are looked up in a list first."""
WAITING_ONE_BY_ONE = 8
"""As many jobs that wait to run are asked for at each interval, so that their start is told at once."""
OVERLAP = 60.0
"""Seconds that two windows of ended applications have in common: for clocks that are set, and differ in a pair."""

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """
    What was learnt of a job.

    :param ours: whether it carries our tag, and so is in our lists.
    """

    status: JobStatus
    ours: bool = False

    @classmethod
    def of(cls, app: App, job: JobRef) -> Seen:
        """Return what an application's report says of a job."""
        status = app.status if app.status.job == job else dataclasses.replace(app.status, job=job)
        return cls(status, app.ours)


class Jobs:
    """
    Looks at jobs, and tells one that is not known from one of which nothing can be told now.

    :param managers: who vouches for absences.
    :param apps: what the ResourceManager knows.
    :param timeline: what it has forgotten.
    """

    def __init__(self, managers: Managers, apps: Applications, timeline: Timeline) -> None:
        self.apps = apps
        self._managers = managers
        self._timeline = timeline
        self._timeline_is_out = False

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        """Return the status of each job: of a few by their IDs, of many from the list of ours, as far as it goes."""
        seen: dict[JobRef, Seen] = {}
        if len(jobs) > ONE_BY_ONE:
            seen.update(await self._listed(jobs))
        seen.update(await self.look([job for job in dict.fromkeys(jobs) if job not in seen]))
        return {job: each.status for job, each in seen.items()}

    async def _listed(self, jobs: Collection[JobRef]) -> Mapping[JobRef, Seen]:
        try:
            listed = await self.apps.tagged(COMMON_TAG)
        except AnswerTooLong as error:
            log.info("Asking for %d jobs one by one: %s", len(jobs), error)
            return {}
        return rows_of(jobs, listed.apps)

    async def look(self, jobs: Collection[JobRef]) -> Mapping[JobRef, Seen]:
        """Return what is known of each job, asked for by its ID; an ID that is none of YARN's is not sent."""
        seen = {job: Seen(_not_yarn(job)) for job in jobs if not is_application_id(job.id)}

        async def ask(job: JobRef) -> None:
            if (app := await self.apps.get(job.id)) is not None:
                seen[job] = Seen.of(app, job)

        await for_each(ask, [job for job in jobs if job not in seen], at_once=ONE_BY_ONE)
        if missing := [job for job in jobs if job not in seen]:
            seen.update(await self._look_again(missing))
        return seen

    async def _look_again(self, jobs: Collection[JobRef]) -> Mapping[JobRef, Seen]:
        """Return what is to be believed of jobs that a ResourceManager did not know."""
        seen: dict[JobRef, Seen] = {}
        try:
            async with self._managers.vouching() as (_, active):

                async def ask(job: JobRef) -> None:
                    if (app := await self.apps.get(job.id, active)) is not None:
                        seen[job] = Seen.of(app, job)

                await for_each(ask, jobs, at_once=ONE_BY_ONE)
        except NotVouchedFor as error:
            return {job: Seen(_unknown(job, str(error))) for job in jobs}

        async def remember(job: JobRef) -> None:
            seen[job] = Seen(await self._forgotten(job))

        await for_each(remember, [job for job in jobs if job not in seen], at_once=ONE_BY_ONE)
        return seen

    async def _forgotten(self, job: JobRef) -> JobStatus:
        """
        Return what is known of a job that the active ResourceManager does not know.

        A timeline server that cannot be asked leaves it untold: its answer may be an end.
        """
        if not await self._timeline.in_use():
            return _absent(job)
        try:
            app = await self._timeline.get(job)
        except ClusterError as error:
            if not self._timeline_is_out:
                self._timeline_is_out = True
                log.warning(
                    "The ResourceManager has forgotten %s, and the timeline server does not tell: %s", job, error
                )
            return _unknown(job, f"the ResourceManager does not know it, and the timeline server cannot tell: {error}")
        self._timeline_is_out = False
        if app is None:
            return _absent(job, ", nor does the timeline server")
        if not app.status.state.final:
            return _absent(job, f"; the timeline server saw it last as {app.status.raw}")
        return dataclasses.replace(app.status, job=job)


async def follow(
    jobs: Jobs, managers: Managers, followed: Followed, *, list_interval: float
) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
    """
    Yield what changes of the followed jobs, and at the longer interval all that is known of them.

    :param list_interval: seconds between two lists of those that run.
    """
    loop = asyncio.get_running_loop()
    known: dict[JobRef, Seen] = {}
    told: dict[JobRef, JobStatus] = {}
    window: float | None = None
    next_list = loop.time()
    while True:
        wanted = dict.fromkeys(followed.jobs())
        known = {job: known[job] for job in wanted if job in known}
        told = {job: told[job] for job in wanted if job in told}
        due = loop.time() >= next_list
        if due:
            told.clear()
            next_list = loop.time() + list_interval
        if wanted and window is None:
            window = (await managers.active()).time

        new = [job for job in wanted if job not in known]
        in_lists = [job for job, seen in known.items() if seen.ours and not seen.status.state.final]
        many = len(new) > ONE_BY_ONE
        learnt: dict[JobRef, Seen] = {}
        if window is not None and (in_lists or many):
            ended = await jobs.apps.ended_since(window - OVERLAP)
            window = ended.time
            learnt.update(rows_of([*in_lists, *new], ended.apps))
        running = await _running(jobs, managers, [*in_lists, *new]) if many or (due and in_lists) else None
        if running is not None:
            learnt.update({job: seen for job, seen in running.items() if job not in learnt})
            to_ask = [job for job in in_lists if job not in learnt]
        else:
            next_list = loop.time() if due and in_lists else next_list
            waiting = [job for job in in_lists if job not in learnt and known[job].status.state is JobState.PENDING]
            to_ask = waiting[:WAITING_ONE_BY_ONE]
        by_list = set(in_lists)
        to_ask += [job for job in wanted if job not in learnt and job not in by_list and _open(known.get(job))]
        learnt.update(await jobs.look(to_ask))

        # What has not changed stays as it is: thousands that are made anew leave the memory full of holes.
        known.update({job: seen for job, seen in learnt.items() if known.get(job) != seen})
        news = {
            job: seen.status
            for job in (known if due else learnt)
            if (seen := known[job]).status != told.get(job) or seen.status.state is JobState.ABSENT  # to be said twice
        }
        told.update(news)
        yield news
        await followed.pause()


async def _running(jobs: Jobs, managers: Managers, wanted: Collection[JobRef]) -> Mapping[JobRef, Seen] | None:
    """
    Return what the list of those that run shows of some jobs; ``None`` if nothing follows from what it does not show.

    A ResourceManager in its recovery shows none, and each would be asked for by its ID.
    """
    try:
        async with managers.vouching() as (_, active):
            listed = await jobs.apps.active(active)
    except NotVouchedFor as error:
        log.debug("The list of those that run is not asked for: %s", error)
        return None
    except AnswerTooLong as error:
        log.info("Asking for %d jobs one by one: %s", len(wanted), error)
        return {}
    return rows_of(wanted, listed.apps)


def rows_of(jobs: Collection[JobRef], apps: Collection[App]) -> Mapping[JobRef, Seen]:
    """Return what a list shows of the jobs."""
    rows = {app.id: app for app in apps}
    return {job: Seen.of(rows[job.id], job) for job in jobs if job.id in rows}


def _open(seen: Seen | None) -> bool:
    """Whether a job is to be asked for that no list shows. An end stays an end."""
    return seen is None or not seen.status.state.final


def _absent(job: JobRef, more: str = "") -> JobStatus:
    message = f"the ResourceManager does not know it{more}"
    return JobStatus(job=job, state=JobState.ABSENT, raw="NotFound", message=message)


def _not_yarn(job: JobRef) -> JobStatus:
    return JobStatus(job=job, state=JobState.ABSENT, raw="NotFound", message="this is not the ID of a YARN application")


def _unknown(job: JobRef, why: str) -> JobStatus:
    return JobStatus(job=job, state=JobState.UNKNOWN, message=why[:1000])
