"""
A Spark standalone cluster: submit, find, follow and kill drivers by HTTP alone.

What flows in: an Airflow connection (``spark://host:port[,host:port…]``) and the arguments of
:class:`~durable_spark.hooks.job.JobHook`'s methods. What flows out: its answers.

Three services are asked, each for what only it knows:

the master's REST server (port 6066)
    takes a driver, kills it, tells the state of one.
the master's page ``/json/`` (port 8080)
    tells the state of all drivers at once, who leads, the master's clock, the workers.
a worker's log page (port 8081)
    shows the head of a driver's ``stderr``, where the launch command is printed. Our properties stand
    in it; nowhere else does a cluster show whose a driver is.

The trap: a master does not remember for ever. It drops all but the last completed drivers, and all of
them when it restarts or hands over. A driver that it does not list may have run all the same, so
:meth:`StandaloneHook.find` answers :class:`~durable_spark.jobs.Absent` only when it can show that
nothing was forgotten since the intent.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from durable_spark.hooks._http import AnswerTimeout, ConnectFailed, for_each
from durable_spark.hooks._standalone_masters import (
    LOG_CHUNK,
    PAGE_LIMIT,
    Master,
    Masters,
    NobodyLeads,
    first_lines,
    not_leading,
)
from durable_spark.hooks._standalone_pages import (
    Driver,
    View,
    is_driver_id,
    labels_of,
    listed_drivers,
    local_time_of,
    state_of,
    tail,
)
from durable_spark.hooks._standalone_request import DEPLOYMENT, OWNER, TOKEN, build_request, labels, refuse_labels
from durable_spark.hooks._worker_files import read_properties_file
from durable_spark.hooks.cli import CliSubmission, SparkCliHook
from durable_spark.jobs import (
    Absent,
    AuthenticationFailed,
    BadConfiguration,
    ClusterError,
    ClusterUnreachable,
    DurableJobError,
    Found,
    InvalidAnswer,
    JobRef,
    JobState,
    JobStatus,
    OwnedJob,
    SparkJob,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
    utc,
)

__all__ = ["StandaloneHook"]

COMMAND_LIMIT = 1 << 20
"""Bytes of a log that are read in search of the end of the launch command; usually it takes 3,000."""
CONCURRENCY = 16
"""Requests under way at once when drivers are asked about one by one."""
GLIMPSED = 4
"""Drivers whose launch commands one glimpse reads."""
GLIMPSE_PAUSE = 10
"""Times as long as a glimpse took there is none afterwards: a page of thousands of drivers takes a second."""
CLOCK_SLACK = 300.0
"""Seconds by which the clocks of two masters may differ."""
TIME_ZONES = 15 * 3600.0
"""Seconds by which the local time in a driver's ID may differ from UTC."""
WAIT = "spark.standalone.submit.waitAppCompletion"
WORKER_REMEMBERS = 900
"""A worker's page that lists more drivers may have dropped some (``spark.worker.ui.retainedDrivers``, 1000)."""

_SUBMITTED = re.compile(
    r"(?:Driver successfully submitted|Submission successfully created) as (driver-[0-9]{14}-[0-9]{4,12})(?![-0-9])"
)
"""What ``ClientEndpoint`` and ``RestSubmissionClient`` say, by RPC and by REST, when the master has answered."""


class _Untold(Exception):
    """Whose a driver is cannot be told. The message says why."""

    def __init__(self, message: str, *, permanent: bool = False, queued: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.queued = queued


class StandaloneHook(SparkCliHook):
    """
    A Spark standalone cluster with one master or several.

    :param conn_id: an Airflow connection of the type ``durable_spark`` or ``spark``. Host: the master
        URL (``spark://host:7077``, ``spark://h1:7077,h2:7077``). Password: a bearer token, for masters
        that ask for one. Extras: ``rest-scheme``, ``rest-port`` (6066), ``ui-scheme``, ``ui-port``
        (8080), ``ca``, ``poll-interval``.
    """

    queue_patience: float = 10.0
    """Seconds for which :meth:`find` waits for a driver that is queued, and cannot be told until it is launched."""
    settle_time: float = 5.0
    """Seconds after the intent, or after a request that was not answered, in which an absence is not believed yet."""

    def __init__(self, conn_id: str) -> None:
        super().__init__(conn_id)
        self._masters = Masters(conn_id, poll_interval=self.default_poll_interval)
        self._unsent: dict[str, Mapping[str, Any]] = {}
        self._page_is_out = False
        self._told: Mapping[JobRef, tuple[Driver, JobStatus]] = {}
        self._workers: Mapping[str, str] = {}
        self._glimpsed: dict[str, Mapping[str, str]] = {}
        self._glimpse_again = 0.0

    async def aclose(self) -> None:
        """Close the HTTP session."""
        await self._masters.aclose()

    async def cluster(self) -> Sequence[str]:
        """Return the masters, as ``spark://host:port``, in the connection's order."""
        return [master.address for master in (await self._masters.settings()).masters]

    async def poll_interval(self) -> float:
        """Return the connection's extra ``poll-interval``, or the default."""
        return (await self._masters.settings()).poll_interval

    # --- submit

    async def prepare(self, job: SparkJob, submission: Submission) -> Submission:
        """
        Check the job, reach the leader and its REST server, and note what can prove an absence later.

        The evidence: ``last_completed``, the driver that completed last; ``newest``, the highest number of a
        driver; ``workers``, a digest of the workers.
        """
        settings = await self._masters.settings()
        defaults = await read_properties_file(job)
        build_request(job, submission, master=settings.master_url, defaults=defaults, version="unknown")
        view = await self._masters.first_view()
        version = await self._masters.reach_rest(await self._masters.master_of(view))
        self._unsent[submission.token] = build_request(
            job, submission, master=settings.master_url, defaults=defaults, version=version
        )
        return _noted(submission, view)

    async def submit(self, job: SparkJob, submission: Submission) -> JobRef:
        """
        Send the driver to the leader, unless it is there already.

        Only what this very hook has prepared, and has not sent yet, is sent without being looked for.
        """
        request = self._unsent.pop(submission.token, None)
        if request is None:
            found = await self.find(submission)
            if isinstance(found, Found):
                return found.status.job
            await self.prepare(job, submission)
            request = self._unsent.pop(submission.token)
        try:
            answer = await self._masters.create(request)
        except (ConnectFailed, NobodyLeads, AuthenticationFailed, BadConfiguration):
            self._unsent[submission.token] = request  # certainly not submitted
            raise
        except ClusterUnreachable as error:
            return await self._find_after(error, submission)
        return _accepted(answer)

    async def _find_after(self, error: ClusterUnreachable, submission: Submission) -> JobRef:
        """Settle what became of a request that was sent and not answered."""
        await asyncio.sleep(self.settle_time)
        try:
            found = await self.find(submission)
        except SubmissionUncertain as uncertain:
            raise SubmissionUncertain(f"{error}; {uncertain}", permanent=uncertain.permanent) from error
        except ClusterError as silence:
            raise SubmissionUncertain(f"{error}; looking for the driver: {silence}") from error
        if isinstance(found, Found):
            return found.status.job
        if isinstance(error, AnswerTimeout):
            raise SubmissionUncertain(f"{error}; no driver has come of it, but one still may") from error
        raise ClusterUnreachable(
            f"{error}; no driver has come of it: nothing was submitted", retry_after=error.retry_after
        ) from error

    # --- submit by spark-submit

    async def prepare_cli(self, conf: Mapping[str, str], submission: Submission) -> CliSubmission:
        """
        Reach the leader and its REST server, and note what can prove an absence later, as :meth:`prepare` does.

        ``spark-submit`` hands all Spark properties to the driver, so ours show in its launch command. It hands over its
        environment, too, ``SPARK_*`` at least (``ClientApp``): that must hold nothing meant for its own JVM.
        """
        refuse_labels(conf)
        if conf.get(WAIT, "").strip().lower() == "true":
            self.log.info("%s is set to false: the task waits for the end, not spark-submit", WAIT)
        view = await self._masters.first_view()
        await self._masters.reach_rest(await self._masters.master_of(view))
        return CliSubmission(
            submission=_noted(submission, view),
            conf={WAIT: "false", **labels(submission)},
            environment_stays=False,
        )

    def job_in(self, line: str, submission: Submission) -> JobRef | None:
        """Return the driver if the master's own answer names it."""
        match = _SUBMITTED.search(line)
        return JobRef(match[1]) if match else None

    async def glimpse(self, submission: Submission) -> JobRef | None:
        """
        Return the driver, if it is among the newest few and its launch command can be read now.

        ``spark-submit`` says at the level INFO what the master answered, which a log4j configuration may not show. It
        stays for five seconds more.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        if began < self._glimpse_again:
            return None
        view = await self._masters.leading_view()
        found: list[JobRef] = []

        async def look(driver: Driver) -> None:
            with contextlib.suppress(_Untold):
                self._glimpsed[driver.id] = await self._labels(driver, view)
            if self._glimpsed.get(driver.id, {}).get(TOKEN) == submission.token:
                found.append(JobRef(driver.id))

        news = [d for d in _candidates(view, submission, complete=True) if d.worker and d.id not in self._glimpsed]
        await for_each(look, news[:GLIMPSED], at_once=GLIMPSED)
        self._glimpse_again = clock() + GLIMPSE_PAUSE * (clock() - began)
        return min(found) if found else None

    # --- find

    async def find(self, submission: Submission) -> Found | Absent:
        """
        Look for the driver whose launch command carries the submission's token.

        The candidates are the drivers that the leader created after the intent. If the driver that had
        completed last at the time of the intent is still listed, the leader has forgotten nothing since (it drops
        the oldest first, and all when it restarts), and the list is complete. Else the workers are asked which
        drivers they ran; that list is complete if they are still the same workers.

        What no look can rule out: a request that is sent later than ``settle_time`` after the intent (its sender was
        suspended; the store fences it), and workers that were told to remember fewer than 1000 drivers
        (``spark.worker.ui.retainedDrivers``).
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        known: dict[str, Mapping[str, str]] = {}
        while True:
            view = await self._masters.agreed_view()
            matches, untold = await self._look(view, submission, known)
            if matches:
                return _found(matches, view, _uncertain(untold, submission, view) if untold else None)
            waited = loop.time() - started
            age = max(waited, view.time - (submission.cluster_time or 0.0))
            if any(reason.queued for reason in untold) and waited < self.queue_patience:
                await asyncio.sleep(1.0)
            elif untold:
                raise _uncertain(untold, submission, view)
            elif age < self.settle_time:
                await asyncio.sleep(self.settle_time - age)
            else:
                return Absent()

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        """Return the live drivers with these labels; those whose launch command cannot be read are left out."""
        view = await self._masters.leading_view()
        owned: list[OwnedJob] = []

        async def look(driver: Driver) -> None:
            try:
                labels = await self._labels(driver, view)
            except _Untold as untold:
                self.log.warning("Whose %s is cannot be told: %s", driver.id, untold)
                return
            if labels.get(DEPLOYMENT, "") == deployment and (owner is None or labels.get(OWNER) == owner):
                owned.append(
                    OwnedJob(status=view.status(driver), token=labels.get(TOKEN, ""), owner=labels.get(OWNER, ""))
                )

        await for_each(look, [driver for driver in view.drivers.values() if driver.live], at_once=CONCURRENCY)
        return sorted(owned, key=lambda job: job.status.job)

    async def _look(
        self, view: View, submission: Submission, known: dict[str, Mapping[str, str]]
    ) -> tuple[Sequence[Driver], Sequence[_Untold]]:
        """
        Read the launch commands of the candidates.

        :param known: what was read before; a launch command does not change.
        :returns: the drivers that carry the token, and what could not be told.
        """
        untold: list[_Untold] = []
        matches: list[Driver] = []
        complete = submission.evidence.get("last_completed", "") in view.drivers
        candidates = _candidates(view, submission, complete=complete)
        if not complete:
            ran = await self._drivers_of_workers(view, submission, untold)
            candidates = [*_located(candidates, ran, certain=not untold), *_forgotten(ran, view, submission)]

        async def look(driver: Driver) -> None:
            try:
                if driver.id not in known:
                    known[driver.id] = await self._labels(driver, view)
            except _Untold as reason:
                untold.append(reason)
                return
            token = known[driver.id].get(TOKEN, "")
            if token == submission.token:
                matches.append(driver)
            elif "redacted" in token:
                untold.append(_Untold(f"{driver.id} hides it (spark.redaction.regex)", permanent=True))

        await for_each(look, candidates, at_once=CONCURRENCY)
        return matches, untold

    async def _drivers_of_workers(self, view: View, submission: Submission, untold: list[_Untold]) -> Mapping[str, str]:
        """Return the drivers that the workers ran, each with its worker; note why the list may not be complete."""
        if not view.fleet or view.fleet != submission.evidence.get("workers"):
            why = "the master may have forgotten drivers, and its workers are not those that it had"
            # A dead worker may come back; and to a master that has just started the first one is on its way.
            untold.append(_Untold(why, permanent=bool(view.alive) and not view.dead))
        ran: dict[str, str] = {}

        async def read(worker: str) -> None:
            if worker not in view.alive or not view.workers[worker]:
                untold.append(_Untold(f"{worker} is not alive"))
                return
            try:
                page = (await self._masters.ask("GET", f"{view.workers[worker]}/", limit=PAGE_LIMIT)).expect_ok()
            except DurableJobError as error:
                untold.append(_Untold(f"the page of {worker} cannot be read: {error}"))
                return
            if worker not in page.text or not page.text.rstrip().endswith("</html>"):
                untold.append(_Untold(f"what answers for {worker} does not show its page, or not all of it"))
                return
            listed = listed_drivers(page.text)
            if len(listed) > WORKER_REMEMBERS:
                untold.append(_Untold(f"{worker} may have forgotten drivers", permanent=True))
            ran.update(dict.fromkeys(listed, worker))

        await for_each(read, view.workers.keys() - view.dead, at_once=CONCURRENCY)
        return ran

    async def _labels(self, driver: Driver, view: View) -> Mapping[str, str]:
        """
        Return our properties from a driver's launch command; none when it never was launched.

        :raises _Untold: when it cannot be read, or is not written yet.
        """
        if not driver.worker:
            if driver.raw == "KILLED":
                return {}  # in the queue
            if driver.live:
                raise _Untold(f"{driver.id} is queued and shows nothing until it is launched", queued=True)
            raise _Untold(f"{driver.id} has no worker any more ({driver.raw})", permanent=True)
        if driver.worker not in view.workers:
            raise _Untold(f"{driver.worker}, which ran {driver.id}, is gone", permanent=True)
        if not view.workers[driver.worker]:
            raise _Untold(f"the address of {driver.worker} is not valid")
        try:
            return await self._read_command(driver, view.workers[driver.worker])
        except DurableJobError as error:
            raise _Untold(f"the log of {driver.id} cannot be read: {error}") from error

    async def _read_command(self, driver: Driver, worker: str) -> Mapping[str, str]:
        text, length = "", 1
        for offset in range(0, COMMAND_LIMIT, LOG_CHUNK):
            if offset >= length:
                break
            chunk = await self._masters.log_page(worker, driver.id, offset=offset)
            if chunk is None and not driver.live:
                raise _Untold(f"the log of {driver.id} has been removed", permanent=True)
            if chunk is None:
                break
            text, length = text + chunk[0], chunk[1]
            if (labels := labels_of(text)) is not None:
                return labels
        else:
            raise _Untold(f"the launch command of {driver.id} is too long to read", permanent=True)
        if driver.raw in ("ERROR", "KILLED") and not text and not length:
            return {}  # its application could not be fetched, or it was killed meanwhile
        if driver.live:
            raise _Untold(f"{driver.id} is being launched", queued=True)
        raise _Untold(f"the log of {driver.id} does not show its launch command", permanent=True)

    # --- follow

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        """Return the status of each job from the leader's page, or from its REST server if the page cannot be read."""
        statuses = {job: JobStatus(job=job, state=JobState.ABSENT) for job in jobs if not is_driver_id(job.id)}
        ours = [job for job in jobs if is_driver_id(job.id)]
        if not ours:
            return statuses
        try:
            view = await self._masters.leading_view()
        except NobodyLeads:
            raise
        except ClusterError as error:
            return {**statuses, **await self._poll_by_rest(ours, error)}
        if self._page_is_out:
            self._page_is_out = False
            self.log.info("The master's page %s/json/ can be read again", view.address)
        before = self._told if self._workers == view.workers else {}
        told: dict[JobRef, tuple[Driver, JobStatus]] = {}
        untold = []
        for number, job in enumerate(ours, start=1):
            if driver := view.drivers.get(job.id):
                last = before.get(job)
                seen = last if last and last[0] is driver else (driver, view.status(driver, job=job))
                told[job], statuses[job] = seen, seen[1]
            if driver is None or seen[1].state is JobState.FAILED:
                untold.append(job)
            if not number % 1000:
                await asyncio.sleep(0)
        self._told, self._workers = told, view.workers
        await self._ask_about_rest(view, untold, statuses)
        return statuses

    async def _ask_about_rest(self, view: View, jobs: Sequence[JobRef], statuses: dict[JobRef, JobStatus]) -> None:
        """Ask the REST server for the reason of failures, and for the drivers that the page does not list."""
        leader = await self._masters.master_of(view)

        async def ask(job: JobRef) -> None:
            listed = statuses.get(job)
            try:
                told = await self._rest_status(leader, job)
            except AuthenticationFailed:
                raise
            except ClusterError as error:
                if listed is None:
                    statuses[job] = JobStatus(job=job, state=JobState.UNKNOWN, message=str(error)[:1000])
                return
            if listed is None:
                statuses[job] = told
            elif told.message:
                statuses[job] = dataclasses.replace(listed, message=f"{told.message}\n{listed.message}")

        await for_each(ask, jobs, at_once=CONCURRENCY)

    async def _poll_by_rest(self, jobs: Sequence[JobRef], error: ClusterError) -> Mapping[JobRef, JobStatus]:
        try:
            leader = await self._masters.leader_by_rest()
        except ClusterError:
            raise error from None
        if not self._page_is_out:
            self._page_is_out = True
            self.log.warning("The master's page cannot be read (%s); asking %s for each driver", error, leader.rest)
        statuses: dict[JobRef, JobStatus] = {}

        async def ask(job: JobRef) -> None:
            statuses[job] = await self._rest_status(leader, job)

        await for_each(ask, jobs, at_once=CONCURRENCY)
        return statuses

    async def _rest_status(self, leader: Master, job: JobRef) -> JobStatus:
        told = await self._masters.get_status(leader, job.id)
        message = first_lines(told.get("message"))
        if told.get("success") is True:
            raw = str(told.get("driverState"))[:40]
            return JobStatus(job=job, state=state_of(raw), raw=raw, message=message)
        if not_leading(told):
            raise NobodyLeads(f"{leader.address} does not lead any more: {message}")
        if told.get("success") is False and told.get("message") is None and told.get("driverState") is None:
            return JobStatus(job=job, state=JobState.ABSENT, raw="not known to the master")
        raise InvalidAnswer(f"{leader.rest} says neither yes nor no about {job.id}: {message}")

    # --- kill, log, check

    async def kill(self, job: JobRef) -> None:
        """Have the leader kill a driver. One that has ended, or is not known, is none of its business, nor an error."""
        if not is_driver_id(job.id):
            return
        await self._masters.kill(job.id)

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        """
        Return the last lines of the driver's ``stderr`` and, if it wrote any, of its ``stdout``: half of each.

        A PySpark driver writes its tracebacks to ``stdout`` (tried on 4.3.0). From the last 64 KiB of each.
        """
        if not is_driver_id(job.id):
            return ()
        try:
            view = await self._masters.leading_view()
            driver = view.drivers.get(job.id)
            worker = view.workers.get(driver.worker) if driver else None
            if not worker:
                return ()
            errors, output = await asyncio.gather(
                self._masters.log_page(worker, job.id), self._masters.log_page(worker, job.id, log="stdout")
            )
        except DurableJobError as error:
            self.log.info("The log of %s cannot be read: %s", job.id, error)
            return ()
        written = tail(output[0], lines // 2) if output else ()
        shown = tail(errors[0], lines - len(written) - bool(written)) if errors else ()
        return [*shown, "--- stdout:", *written] if written else shown

    async def check(self) -> str:
        """Reach the leader's page and its REST server with the connection's credentials."""
        view = await self._masters.first_view()
        leader = await self._masters.master_of(view)
        version = await self._masters.reach_rest(leader)
        return f"Spark {version}: {leader.address} leads, {len(view.alive)} workers are alive"


def _noted(submission: Submission, view: View) -> Submission:
    evidence = {"last_completed": view.last_completed, "newest": str(view.newest), "workers": view.fleet}
    return dataclasses.replace(submission, cluster_time=view.time, evidence=evidence)


def _candidates(view: View, submission: Submission, *, complete: bool) -> Sequence[Driver]:
    """
    Return the drivers that may be the submission's, those nearest to the intent first.

    :param complete: the master is the one that the intent saw: its drivers are numbered in the order of their
        creation, so only clocks set back make those with lower numbers candidates. ``Date`` is cut to seconds.
    """
    intent = submission.cluster_time or 0.0
    newest = submission.evidence.get("newest", "")
    after = int(newest) if complete and re.fullmatch(r"-1|[0-9]{1,12}", newest) else None

    def may_be(driver: Driver) -> bool:
        if driver.raw == "RELAUNCHING":
            return False
        if after is None:
            return driver.start >= intent - CLOCK_SLACK
        return driver.number > after or driver.start >= intent

    return sorted(filter(may_be, view.drivers.values()), key=lambda driver: abs(driver.start - intent))


def _located(candidates: Sequence[Driver], ran: Mapping[str, str], *, certain: bool) -> Sequence[Driver]:
    """
    Give ended drivers without a worker the one that ran them; drop those that none ran, if that is certain.

    A new leader ends the drivers that it finds in the queue (ERROR), and no longer knows who ran one whose worker
    did not come back (tried on 4.3.0).
    """
    located = [dataclasses.replace(d, worker=d.worker or ("" if d.live else ran.get(d.id, ""))) for d in candidates]
    return [driver for driver in located if driver.worker or driver.live or not certain]


def _forgotten(ran: Mapping[str, str], view: View, submission: Submission) -> Sequence[Driver]:
    """Return the drivers that workers ran and the master does not list, unless they are too old by their ID."""
    oldest = (submission.cluster_time or 0.0) - TIME_ZONES
    return [
        Driver(id=driver_id, raw="", start=local_time_of(driver_id), worker=worker, live=False)
        for driver_id, worker in ran.items()
        if driver_id not in view.drivers and local_time_of(driver_id) >= oldest
    ]


def _found(matches: Sequence[Driver], view: View, untold: SubmissionUncertain | None) -> Found:
    in_order = sorted(matches, key=lambda driver: (driver.start, driver.number))
    oldest = in_order[0]
    if not oldest.raw:  # the master has forgotten it: it may have been relaunched, as one that is listed
        listed = (driver for driver in in_order if driver.raw and state_of(driver.raw) is not JobState.KILLED)
        oldest = next(listed, oldest)
    others = [driver for driver in in_order if driver is not oldest]
    status = view.status(oldest)
    if not oldest.raw:
        status = dataclasses.replace(
            status, state=JobState.ABSENT, message="a worker ran it; the master has forgotten it"
        )
    younger = [JobRef(driver.id) for driver in others if driver.raw and state_of(driver.raw).active]
    return Found(status=status, younger=younger, untold=untold)


def _uncertain(untold: Sequence[_Untold], submission: Submission, view: View) -> SubmissionUncertain:
    reasons = "; ".join(sorted({str(reason) for reason in untold})[:5])
    what = f"whether submission {submission.token[:8]}… has become a driver cannot be told: {reasons}"
    if not all(reason.permanent for reason in untold):
        return SubmissionUncertain(f"{what}. The next try looks again.")
    since = utc(submission.cluster_time or 0)
    return SubmissionUncertain(
        f"{what}. Look at {view.address} for a driver that was submitted after {since}; when there is none that runs, "
        "delete the entry 'durable_spark' of this task's state store (REST …/state-store/durable_spark) and clear the "
        "task, to submit again",
        permanent=True,
    )


def _accepted(answer: Mapping[str, Any]) -> JobRef:
    if answer.get("success") is not True:
        raise SubmissionRefused(f"the master refused the submission: {first_lines(answer.get('message')) or answer}")
    driver_id = answer.get("submissionId")
    if not isinstance(driver_id, str) or not is_driver_id(driver_id):
        raise SubmissionUncertain(
            f"the master took the submission and named it {str(driver_id)[:80]!r}, which is not a driver ID: "
            "spark.deploy.driverIdPattern must be left at its default",
            permanent=True,
        )
    return JobRef(driver_id)
