"""
Spark on YARN: ``spark-submit`` submits, the ResourceManager's REST server tells the rest.

What flows in: an Airflow connection (``yarn``) and the arguments of :class:`~durable_spark.hooks.cli.SparkCliHook`'s
methods. What flows out: their answers.

A job is a YARN application; its ID is the ResourceManager's (``application_…``). Our tags on it
(``spark.yarn.tags``) say whose it is, and one request finds all that carry a tag.

The trap: a ResourceManager that does not know an application may only not know it *yet* (it has been restarted and is
still reading its state), or not any more (it keeps the last 1000 that have ended). The first is ruled out by
:meth:`~durable_spark.hooks._yarn_managers.Managers.vouching`, the second by the evidence that
:meth:`YarnHook.prepare_cli` notes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from durable_spark.hooks._yarn_api import APP_LIMIT, Applications, Timeline
from durable_spark.hooks._yarn_apps import (
    ACTIVE_STATES,
    COMMON_TAG,
    TAGS_KEY,
    App,
    deployment_tag,
    is_application_id,
    owner_tag,
    tag_value,
    tags_with_ours,
    token_tag,
)
from durable_spark.hooks._yarn_follow import Jobs, follow
from durable_spark.hooks._yarn_logs import LogReader
from durable_spark.hooks._yarn_managers import Ask, Info, Managers, NotVouchedFor, said
from durable_spark.hooks.cli import CliSubmission, SparkCliHook
from durable_spark.jobs import (
    Absent,
    BadArguments,
    BadConfiguration,
    ClusterError,
    DurableJobError,
    Found,
    JobRef,
    JobStatus,
    OwnedJob,
    RequestRefused,
    Submission,
    SubmissionUncertain,
    utc,
)

if TYPE_CHECKING:
    from durable_spark.hooks.job import Followed

__all__ = ["YarnHook"]

NOT_NATIVELY = (
    "YARN is not submitted to natively: use durable_spark.operators.spark_submit.SparkSubmitOperator, "
    "which submits by spark-submit and follows as this one does"
)
WAIT_KEY = "spark.yarn.submit.waitAppCompletion"
ATTEMPTS_KEY = "spark.yarn.maxAppAttempts"
CLOCK_SLACK = 300.0
"""Seconds by which the clocks of a ResourceManager and of the timeline server may differ."""
NOT_DURABLE = ("NEW", "NEW_SAVING")
"""States of an application that a ResourceManager has not written down: it is forgotten if that one dies now."""

_SUBMITTED = re.compile(r"(?<!\w)Submitted application (application_[0-9]{10,20}_[0-9]{4,9})(?![\w/])", re.ASCII)
"""
What YARN's client says once the ResourceManager has accepted it (``YarnClientImpl.submitApplication``, 3.5.0).

Spark says ``Submitting application … to ResourceManager`` before, which vouches for nothing.
"""


class YarnHook(SparkCliHook):
    """
    A YARN cluster with one ResourceManager or several.

    :param conn_id: an Airflow connection of the type ``durable_spark`` or ``spark``. Host: ``yarn``. Login and
        password: for a gateway that asks for them (Apache Knox). Extras: ``yarn_resourcemanager_webapp_address``
        (else ``HADOOP_CONF_DIR`` is read), ``yarn-user``, ``yarn-auth``, ``principal``, ``keytab``,
        ``yarn-timeline-address``, ``history-url``, ``ca``, ``poll-interval``.
    """

    settle_time: float = 5.0
    """Seconds after the intent in which an absence is not believed yet: ``spark-submit`` may just have been killed."""
    recovery_time: float = Managers.recovery_time
    """Seconds after the start of a ResourceManager in which what it does not know is not believed."""
    patience: float = 15.0
    """Seconds for which :meth:`find` waits for a ResourceManager that can be believed."""
    list_interval: float | None = None
    """Seconds between two lists of the jobs that run; ``None``: twelve polls, and at least 30 s."""

    def __init__(self, conn_id: str) -> None:
        super().__init__(conn_id)
        self._managers = Managers(conn_id, poll_interval=self.default_poll_interval)
        self._managers.recovery_time = self.recovery_time
        self._apps = Applications(self._managers)
        self._timeline = Timeline(self._managers)
        self._jobs = Jobs(self._managers, self._apps, self._timeline)

    async def aclose(self) -> None:
        """Close the HTTP session."""
        await self._managers.aclose()

    async def cluster(self) -> Sequence[str]:
        """Return the addresses of the ResourceManagers' web apps, in the connection's order."""
        return [manager.base for manager in (await self._managers.settings()).managers]

    async def poll_interval(self) -> float:
        """Return the connection's extra ``poll-interval``, or the default."""
        return (await self._managers.settings()).poll_interval

    # --- submit

    async def prepare(self, job: Any, submission: Submission) -> Submission:
        """Refuse: see :meth:`prepare_cli`."""
        raise BadArguments(NOT_NATIVELY)

    async def submit(self, job: Any, submission: Submission) -> JobRef:
        """Refuse: see :meth:`prepare_cli`."""
        raise BadArguments(NOT_NATIVELY)

    async def prepare_cli(self, conf: Mapping[str, str], submission: Submission) -> CliSubmission:
        """
        Check the tags, reach the active ResourceManager, and note what can prove an absence later.

        The evidence: ``last_ended``, the application that ended last, whosever it is; ``manager`` and ``started``, who
        is active and since when its process lives.
        """
        properties = {TAGS_KEY: tags_with_ours(str(conf.get(TAGS_KEY) or ""), submission), WAIT_KEY: "false"}
        if str(conf.get(WAIT_KEY)).strip().lower() == "true":
            self.log.info("%s=true is not heeded: the triggerer waits, not spark-submit", WAIT_KEY)
        if not conf.get(ATTEMPTS_KEY):
            properties[ATTEMPTS_KEY] = "1"  # YARN's own default, 2, runs the user's code twice inside one job
        info = await self._managers.active()
        last = await self._apps.last_ended(info.time, self._managers.asking(info.manager))
        evidence = {
            "manager": info.manager.base[:300],
            "started": str(info.started),
            "last_ended": last.id if last else "",
        }
        return CliSubmission(
            submission=dataclasses.replace(submission, cluster_time=info.time, evidence=evidence),
            conf=properties,
            output_is_proof=False,  # what runs before spark-submit in a script may submit applications of its own
        )

    def job_in(self, line: str, submission: Submission) -> JobRef | None:
        """Return the application that YARN's client says it has submitted."""
        match = _SUBMITTED.search(line)
        return JobRef(match[1]) if match else None

    async def glimpse(self, submission: Submission) -> JobRef | None:
        """Return the application with the submission's tag, once the ResourceManager has written it down."""
        try:
            apps = (await self._apps.tagged(token_tag(submission.token))).apps
        except ClusterError as error:
            self.log.debug("No glimpse of submission %s…: %s", submission.token[:8], error)
            return None
        kept = [app for app in apps if app.status.raw not in NOT_DURABLE]
        return min(kept, key=lambda app: app.age).status.job if kept else None

    # --- find

    async def find(self, submission: Submission) -> Found | Absent:
        """
        Look for the applications with the submission's tag.

        None is an absence if the ResourceManager can be believed (:meth:`Managers.vouching`) and has forgotten
        nothing since the intent, which is so if either

        * the application that had ended last at the time of the intent is still known: a ResourceManager forgets those
          that ended first, and after a restart those with the lowest IDs (``RMAppManager``, 3.5.0), so ours would have
          been kept longer; or
        * it is the same process as at the intent, and holds fewer ended applications than it keeps
          (``yarn.resourcemanager.max-completed-applications``, if it shows its configuration), so it has dropped none.

        Else the timeline server, if there is one, may still know it. What no look can rule out: a ``spark-submit`` that
        goes on later than ``settle_time`` after the intent (it dies with its worker, and the store fences that).
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        tag = token_tag(submission.token)
        while True:
            if apps := (await self._apps.tagged(tag)).apps:
                return _found(apps)
            waited = loop.time() - began
            try:
                async with self._managers.vouching() as (info, active):
                    apps = (await self._apps.tagged(tag, ask=active)).apps
                    why = "" if apps else await self._forgotten(submission, info, active)
            except NotVouchedFor as error:
                if waited < self.patience:
                    await asyncio.sleep(min(1.0, self.patience))
                    continue
                raise SubmissionUncertain(f"{_untold(submission)}: {error}. The next try looks again") from error
            if apps:
                return _found(apps)
            age = max(waited, info.time - (submission.cluster_time or 0.0))
            if age < self.settle_time:
                await asyncio.sleep(self.settle_time - age)
            elif not why:
                return Absent()
            else:
                return await self._find_in_timeline(submission, info, why)

    async def _forgotten(self, submission: Submission, info: Info, ask: Ask) -> str:
        """
        Return why a ResourceManager may have forgotten the submission's application; ``""`` if it cannot have.

        Asked after the tag: what is still known now was known then.
        """
        if await self._apps.hides_from_others(info.manager):
            return (
                "the ResourceManager lists to a user only what that user may view "
                "(yarn.webapp.filter-entity-list-by-user), so an empty list proves nothing"
            )
        last = submission.evidence.get("last_ended", "")
        if is_application_id(last) and await self._apps.get(last, ask) is not None:
            return ""
        process = (submission.evidence.get("manager"), submission.evidence.get("started"))
        if process == (info.manager.base[:300], str(info.started)):
            kept = await self._apps.remembers(info.manager)
            if kept is not None and await self._apps.count_of_ended(ask) < kept:
                return ""
        if is_application_id(last):
            return f"the ResourceManager has forgotten {last}, which had ended before the intent, so perhaps this one"
        return (
            "no application had ended before the intent that would show whether the ResourceManager has forgotten any"
        )

    async def _find_in_timeline(self, submission: Submission, info: Info, why: str) -> Found:
        """Return the job as the timeline server knows it. That it does not know it proves nothing: it is told late."""
        if await self._timeline.in_use():
            try:
                since = (submission.cluster_time or 0.0) - CLOCK_SLACK
                apps = await self._timeline.with_token(submission.token, since=since)
            except ClusterError as error:
                raise SubmissionUncertain(
                    f"{_untold(submission)}: {why}, and the timeline server cannot be asked: {error}. "
                    "The next try looks again"
                ) from error
            if apps:
                job = min(apps, key=lambda app: app.age).status.job
                return Found(status=(await self.poll([job]))[job])
            why = f"{why}; the timeline server does not know it, either"
        since_then = utc(submission.cluster_time or 0)
        raise SubmissionUncertain(
            f"{_untold(submission)}: {why}. Look at {info.manager.base} for an application with the tag "
            f"{token_tag(submission.token)} that was submitted after {since_then}; when there is none that runs, "
            "delete the entry 'durable_spark' of this task's state store (REST …/state-store/durable_spark) and clear "
            "the task, to submit again",
            permanent=True,
        )

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        """
        Return the live applications with these tags.

        :raises NotVouchedFor: when a ResourceManager cannot be believed that there are no others.
        """
        wanted = {deployment_tag(deployment)} if deployment else set()
        if owner is not None:
            wanted.add(owner_tag(owner))
        async with self._managers.vouching() as (_, active):
            tag = max(wanted, default=COMMON_TAG)  # the owner's, if there is one
            apps = (await self._apps.tagged(tag, states=ACTIVE_STATES, ask=active)).apps
        return [
            OwnedJob(status=app.status, token=app.labels.token, owner=app.labels.owner)
            for app in sorted(apps, key=lambda app: app.age)
            if app.labels.token and app.labels.deployment == tag_value(deployment) and wanted <= app.tags
        ]

    # --- follow

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        """Return the status of each job: of a few by their IDs, of many from the list of those with our tag."""
        return await self._jobs.poll(jobs)

    async def follow(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        """Yield what changes: ends and starts at each interval, all that is known at a longer one."""
        interval = self.list_interval
        if interval is None:
            interval = max(30.0, 12 * await self.poll_interval())
        async with aclosing(follow(self._jobs, self._managers, followed, list_interval=interval)) as changes:
            async for statuses in changes:
                yield statuses

    # --- kill, log, check

    async def kill(self, job: JobRef) -> None:
        """
        Kill the application. One that has ended, or that is proven not to be known, needs it no more.

        :raises RequestRefused: the user of the connection may not; user and queue are named.
        """
        if not is_application_id(job.id):
            return
        path, body = f"apps/{job.id}/state", {"state": "KILLED"}
        _, answer = await self._managers.ask(path, method="PUT", body=body, limit=APP_LIMIT)
        if answer.status in (200, 202):
            return
        if answer.status == 404:
            async with self._managers.vouching() as (_, active):  # else it is only not known yet, and goes on
                app = await self._apps.get(job.id, active)
            if app is not None and app.status.state.active:
                raise NotVouchedFor(f"{job.id} was not known when it was to be killed, and is now: try again")
            return
        if answer.status == 403:
            raise RequestRefused(await self._why_not_killed(job, await said(answer)))
        answer.expect_ok()

    async def _why_not_killed(self, job: JobRef, text: str) -> str:
        settings = await self._managers.settings()
        who = f"as {settings.who}" if settings.who else "anonymously: the connection names no user (extra 'yarn-user')"
        try:
            app = await self._apps.get(job.id)
        except DurableJobError:
            app = None
        queue = f" in queue {app.queue}" if app is not None and app.queue else ""
        return (
            f"the ResourceManager does not let {job.id}{queue} be killed, asked {who}: {text}. It takes the user that "
            "submitted it, or one that may administer its queue"
        )

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        """
        Return the last lines of the ApplicationMaster's ``stderr`` and, if it wrote any, of its ``stdout``.

        In cluster mode that is the driver's log. It is read from the NodeManager that ran it, or from the timeline
        server, which has aggregated logs.
        """
        if not is_application_id(job.id) or lines < 1:
            return ()
        try:
            app = await self._apps.get(job.id)
            if app is None or app.logs is None:
                return ()
            return await LogReader(self._managers, *app.logs).tail(lines)
        except DurableJobError as error:
            self.log.info("The log of %s cannot be read: %s", job.id, error)
            return ()

    async def check(self) -> str:
        """Reach the active ResourceManager and have it hand out an application ID, as submitting begins."""
        info = await self._managers.active()
        settings = await self._managers.settings()
        _, answer = await self._managers.ask("apps/new-application", method="POST", limit=APP_LIMIT)
        if answer.status == 403:
            raise BadConfiguration(
                f"YARN {info.version}: {info.manager.base} is active, but does not take applications "
                f"from {settings.who or 'nobody'}: {await said(answer)}. Set the extra 'yarn-user', or 'principal'"
            )
        answer.expect_ok()
        who = f"asked as {settings.who}" if settings.who else "asked anonymously, which suffices without ACLs"
        others = f", one of {len(settings.managers)}" if len(settings.managers) > 1 else ""
        return f"YARN {info.version}: {info.manager.base} is active{others}; {who}; it takes applications"


def _untold(submission: Submission) -> str:
    return f"whether submission {submission.token[:8]}… has become an application cannot be told"


def _found(apps: Sequence[App]) -> Found:
    oldest, *others = sorted(apps, key=lambda app: app.age)
    return Found(status=oldest.status, younger=[app.status.job for app in others if app.status.state.active])
