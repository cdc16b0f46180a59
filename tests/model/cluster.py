"""
A cluster in memory that is wrong in all the ways that clusters were seen to be, and a hook on it.

In: what a state machine has it do. Out: answers within the contract of :class:`~durable_spark.hooks.job.JobHook`, which
are not always true: a request arrives late or never, an acceptance is lost or not told, one poll knows nothing, another
shows what was, a restarted cluster has forgotten what ended. What is true stands in :attr:`Cluster.jobs`.

Two kinds: one that names its jobs by the submission's token and refuses a second one of a name (Kubernetes), and one
that takes whatever it is sent (standalone, YARN behind ``spark-submit``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from durable_spark.hooks.job import JobHook
from durable_spark.jobs import (
    Absent,
    ClusterUnreachable,
    Found,
    JobRef,
    JobState,
    JobStatus,
    OwnedJob,
    RequestRefused,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
)

if TYPE_CHECKING:
    from durable_spark.hooks.job import Followed
    from tests.model.clock import Clock

NEIGHBOUR = JobRef("neighbour")
"""Somebody else's job, which runs for ever."""
LOOKS_EVERY = 1.0
"""Seconds after which a stream that tells only what is new has seen it."""
SETTLES_IN = 5.0
"""Seconds after an intent in which a cluster without names of ours does not prove an absence."""


@dataclasses.dataclass
class Job:
    """What is true of a job."""

    ref: JobRef
    token: str
    owner: str
    born: float
    late: bool
    """Whether its request arrived when nobody waited for the answer any more."""
    state: JobState = JobState.RUNNING
    listed: bool = True
    vanished: bool = False
    """Accepted, then forgotten as if it had never been: it never ran."""
    dies_at: float | None = None
    told: JobState = JobState.RUNNING
    """What a stale answer says."""

    @property
    def runs(self) -> bool:
        return self.state in (JobState.PENDING, JobState.RUNNING)


@dataclasses.dataclass(eq=False)
class Request:
    """A submission on its way."""

    submission: Submission
    arrived: Job | None = None


class Cluster:
    """
    The cluster.

    :param clock: the time.
    :param names_jobs: whether a job's name is made of its token.
    :param watched: whether its hook tells of a followed job only what is new, as soon as it can.
    """

    def __init__(self, clock: Clock, *, names_jobs: bool, watched: bool = False) -> None:
        self.clock = clock
        self.names_jobs = names_jobs
        self.watched = watched
        self.jobs: list[Job] = []
        self.on_their_way: list[Request] = []
        self.reachable = True
        self.recovering = False
        self.uncertain = False
        """Whether it cannot be told just now whose a job is."""
        self.blind_polls = 0
        self.stale = False
        self.submit_fate = "taken"
        self.kill_fate = "taken"
        self.kill_takes = 0.0
        self.on_effect: Callable[[str], None] = lambda name: None
        self.on_send: Callable[[Submission], None] = lambda submission: None
        self.on_kill: Callable[[Job], None] = lambda job: None
        self.is_late: Callable[[], bool] = lambda: False
        """Whether the one who sends is not in charge any more."""

    # what happens to it

    def settle(self) -> None:
        """Let those die whose time has come."""
        for job in self.jobs:
            if job.dies_at is not None and self.clock.now >= job.dies_at and job.runs:
                self.end(job, JobState.KILLED)

    def end(self, job: Job, state: JobState) -> None:
        job.state = state
        if state is JobState.KILLED and self.names_jobs:
            job.listed = False  # a pod that is deleted takes its end with it

    def arrive(self, request: Request, *, late: bool) -> Job:
        """Take a request in, once."""
        if request in self.on_their_way:
            self.on_their_way.remove(request)
        if request.arrived is None:
            submission = request.submission
            there = [job for job in self.jobs if job.token == submission.token and job.listed]
            if self.names_jobs and there:
                request.arrived = there[0]
            else:
                number = len(self.jobs) + 1
                name = f"ns:{submission.token}" if self.names_jobs else f"job-{number}"
                ref = JobRef(name, f"uid-{number}" if self.names_jobs else "")
                request.arrived = Job(ref, submission.token, submission.owner, self.clock.now, late)
                self.jobs.append(request.arrived)
        return request.arrived

    def relaunch(self, job: Job) -> None:
        """Start a job anew by ourselves, under another ID."""
        job.state = JobState.RELAUNCHED
        ref = JobRef(f"job-{len(self.jobs) + 1}")
        self.jobs.append(Job(ref, job.token, job.owner, self.clock.now, job.late))

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.runs]

    # what it answers

    def ask(self, name: str) -> None:
        """Be asked something: the one who asks may be stopped or killed here."""
        self.on_effect(name)
        self.settle()
        if not self.reachable:
            raise ClusterUnreachable("503")

    def job(self, ref: JobRef) -> Job | None:
        for job in self.jobs:
            if job.listed and job.ref.id == ref.id and ref.uid in ("", job.ref.uid):
                return job
        return None

    def status(self, ref: JobRef) -> JobStatus:
        job = self.job(ref)
        if self.recovering:
            state = JobState.UNKNOWN
        elif ref == NEIGHBOUR:
            state = JobState.RUNNING
        elif job is None:
            state = JobState.ABSENT
        else:
            state = job.told if self.stale else job.state
        return _gone(ref) if state is JobState.ABSENT else JobStatus(job=ref, state=state, raw=state.name)


def _gone(job: JobRef) -> JobStatus:
    return JobStatus(job=job, state=JobState.ABSENT)


class SimulatedHook(JobHook):
    """A hook on :attr:`world`, the cluster of the story that is told."""

    world: ClassVar[Cluster]

    async def cluster(self) -> Sequence[str]:
        return ("cluster://one",)

    async def prepare(self, job: Any, submission: Submission) -> Submission:
        self.world.ask("prepare")
        ref = JobRef(f"ns:{submission.token}") if self.world.names_jobs else None
        return dataclasses.replace(submission, cluster_time=self.world.clock.now, job=ref)

    async def submit(self, job: Any, submission: Submission) -> JobRef:
        self.world.ask("send")
        fate, self.world.submit_fate = self.world.submit_fate, "taken"
        self.world.on_send(submission)
        if fate == "refused":
            raise SubmissionRefused("no")
        request = Request(submission)
        self.world.on_their_way.append(request)
        self.world.on_effect("arrive")
        if fate == "late":
            raise SubmissionUncertain("no answer in time")
        if fate == "dropped":
            if request in self.world.on_their_way:  # else it has got through meanwhile
                self.world.on_their_way.remove(request)
            raise SubmissionUncertain("the connection broke")
        taken = self.world.arrive(request, late=self.world.is_late())
        self.world.on_effect("answer")
        if fate == "unanswered":
            raise SubmissionUncertain("the connection broke")
        return taken.ref

    async def find(self, submission: Submission) -> Found | Absent:
        self.world.ask("find")
        while True:
            if self.world.recovering or self.world.uncertain:
                raise SubmissionUncertain("it cannot be told now")
            ours = [job for job in self.world.jobs if job.token == submission.token]
            listed = [job for job in ours if job.listed and job.state is not JobState.RELAUNCHED]
            if listed:
                first, *others = listed
                younger = [job.ref for job in others if job.runs]
                return Found(status=self.world.status(first.ref), younger=younger)
            if any(not job.listed and not job.vanished for job in ours):
                raise SubmissionUncertain("it was there, and is forgotten", permanent=True)
            settles = (submission.cluster_time or 0.0) + SETTLES_IN
            if self.world.names_jobs or self.world.clock.now >= settles:
                return Absent()
            await asyncio.sleep(settles - self.world.clock.now)
            self.world.ask("find")

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        self.world.ask("find_owned")
        return [
            OwnedJob(status=self.world.status(job.ref), token=job.token, owner=job.owner)
            for job in self.world.running
            if owner in (None, job.owner)
        ]

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        self.world.ask("poll")
        if self.world.blind_polls and not self.world.recovering:
            self.world.blind_polls -= 1
            return {job: _gone(job) for job in jobs}
        return {job: self.world.status(job) for job in jobs}

    async def follow(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        if not self.world.watched:
            async with contextlib.aclosing(super().follow(followed)) as polls:
                async for statuses in polls:
                    yield statuses
        shown: dict[JobRef, JobStatus] = {}
        while True:
            jobs = followed.jobs()
            statuses = await self.poll(jobs)
            yield {job: status for job, status in statuses.items() if shown.get(job) != status}
            shown = {job: status for job, status in statuses.items() if status.state is not JobState.ABSENT}
            pause = asyncio.ensure_future(followed.pause())
            try:
                while not (await asyncio.wait([pause], timeout=LOOKS_EVERY))[0]:
                    statuses = await self.poll(list(shown))
                    news = {job: status for job, status in statuses.items() if status not in (shown[job], _gone(job))}
                    shown.update(news)
                    if news:
                        yield news
            finally:
                pause.cancel()

    async def kill(self, job: JobRef) -> None:
        self.world.ask("kill")
        if self.world.kill_fate == "refused":
            raise RequestRefused("not yours")
        known = self.world.job(job)
        if known is not None and known.runs:
            self.world.on_kill(known)
            known.dies_at = min(known.dies_at or 1e18, self.world.clock.now + self.world.kill_takes)
            self.world.settle()
        self.world.on_effect("killed")
        if self.world.kill_fate == "unanswered":
            raise ClusterUnreachable("no answer to a kill")

    async def release(self, job: JobRef) -> None:
        self.world.ask("release")

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        self.world.on_effect("log")
        return ()

    async def check(self) -> str:
        return "fine"
