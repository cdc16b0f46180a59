"""
A cluster in memory that is wrong in all the ways that clusters were seen to be, and a hook on it.

In: what a state machine has it do. Out: answers within the contract of :class:`~durable_spark.hooks.job.JobHook`, which
are not always true: a request arrives late or never, an acceptance is lost or not told, one poll knows nothing, another
shows what was, a stream breaks or lags behind, a restarted cluster has forgotten what ended, or even what runs. What is
true stands in :attr:`Cluster.jobs`; who was told what is not, or nothing, in :attr:`Cluster.truths` and
:attr:`Cluster.errors`, so that a failure of the task can be judged.

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
    ClusterError,
    ClusterUnreachable,
    DurableJobError,
    Found,
    InvalidAnswer,
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
    """Whether the cluster knows it. Once it does not, it never will again."""
    vanished: bool = False
    """Accepted, then forgotten as if it had never been: it never ran."""
    dies_at: float | None = None
    told: JobState = JobState.RUNNING
    """What a stale answer says."""
    seen: bool = False
    """Whether somebody who looked for the jobs of its submission, and may act, was shown it."""
    spared: bool = False
    """Whether a kill of it was in vain since it was last seen."""
    ended_at: float | None = None

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
        self.away: type[ClusterError] | None = None
        """What whoever asks is told instead of an answer."""
        self.recovering = False
        self.uncertain = False
        """Whether it cannot be told just now whose a job is."""
        self.flickers = False
        """Whether every other answer to a poll is that a job is not known: never two in a row to one who asks."""
        self._flickered: set[tuple[object, JobRef]] = set()
        self.stale = False
        self.lags = False
        """Whether what is streamed, and that alone, is what was."""
        self.stream_fate = "goes on"
        self.submit_fate = "taken"
        self.kill_fate = "taken"
        self.kill_takes = 0.0
        self.on_effect: Callable[[str], None] = lambda name: None
        self.on_send: Callable[[Submission], None] = lambda submission: None
        self.on_kill: Callable[[Job], None] = lambda job: None
        self.is_late: Callable[[], bool] = lambda: False
        """Whether the one who sends is not in charge any more."""
        self.may_act: Callable[[], bool] = lambda: True
        """Whether who asks is in charge, or a trigger."""
        self.asker: Callable[[], object] = lambda: None
        """Returns the process that asks."""
        self.truths: dict[tuple[object, str], int] = {}
        """Who was told what is not true, or nothing, by what question; and how many true answers to it came since."""
        self.errors: list[tuple[object, DurableJobError]] = []
        """What was raised, and to whom."""

    # what happens to it

    def settle(self) -> None:
        """Let those die whose time has come."""
        for job in self.jobs:
            if job.dies_at is not None and self.clock.now >= job.dies_at and job.runs:
                self.end(job, JobState.KILLED)

    def end(self, job: Job, state: JobState) -> None:
        job.state, job.ended_at = state, self.clock.now
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
        self.end(job, JobState.RELAUNCHED)
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
        if self.away is not None:
            raise self.trouble(name, self.away("503" if self.away is ClusterUnreachable else "401"))

    def trouble(self, name: str, error: DurableJobError) -> DurableJobError:
        """Take note of what is raised instead of an answer."""
        self.answered(name, truly=False)
        self.errors.append((self.asker(), error))
        return error

    def answered(self, name: str, *, truly: bool) -> None:
        """Take note of an answer."""
        key = self.asker(), name
        if not truly:
            self.truths[key] = 0
        elif key in self.truths:
            self.truths[key] += 1

    def job(self, ref: JobRef) -> Job | None:
        for job in self.jobs:
            if job.listed and job.ref.id == ref.id and ref.uid in ("", job.ref.uid):
                return job
        return None

    def status(self, ref: JobRef, *, streamed: bool = False) -> JobStatus:
        job, state = self.job(ref), self._true_state(ref)
        if self.recovering:
            state = JobState.UNKNOWN
        elif job is not None and (self.stale or (streamed and self.lags)):
            state = job.told
        return _gone(ref) if state is JobState.ABSENT else JobStatus(job=ref, state=state, raw=state.name)

    def polled(self, ref: JobRef, *, streamed: bool = False) -> JobStatus:
        """Return a job's status, or that it is not known: at most every other time."""
        key = self.asker(), ref
        status = self.status(ref, streamed=streamed)
        if self.flickers and not self.recovering and key not in self._flickered:
            self._flickered.add(key)
            status = _gone(ref)
        else:
            self._flickered.discard(key)
        self.answered("stream" if streamed else "poll", truly=status.state is self._true_state(ref))
        return status

    def _true_state(self, ref: JobRef) -> JobState:
        job = self.job(ref)
        return job.state if job is not None else JobState.RUNNING if ref == NEIGHBOUR else JobState.ABSENT


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
            raise self.world.trouble("send", SubmissionRefused("no"))
        request = Request(submission)
        self.world.on_their_way.append(request)
        self.world.on_effect("arrive")
        if fate == "late":
            raise self.world.trouble("send", SubmissionUncertain("no answer in time"))
        if fate == "dropped":
            if request in self.world.on_their_way:  # else it has got through meanwhile
                self.world.on_their_way.remove(request)
            raise self.world.trouble("send", SubmissionUncertain("the connection broke"))
        taken = self.world.arrive(request, late=self.world.is_late())
        self.world.on_effect("answer")
        if fate == "unanswered":
            raise self.world.trouble("send", SubmissionUncertain("the connection broke"))
        return taken.ref

    async def find(self, submission: Submission) -> Found | Absent:
        self.world.ask("find")
        while True:
            if self.world.recovering or self.world.uncertain:
                raise self.world.trouble("find", SubmissionUncertain("it cannot be told now"))
            self.world.answered("find", truly=not self.world.stale)
            ours = [job for job in self.world.jobs if job.token == submission.token]
            listed = [job for job in ours if job.listed and job.state is not JobState.RELAUNCHED]
            if listed:
                first, *others = listed
                for job in listed if self.world.may_act() else ():
                    job.seen, job.spared = True, False
                younger = [job.ref for job in others if job.runs]
                return Found(status=self.world.status(first.ref), younger=younger)
            if any(not job.listed and not job.vanished for job in ours):
                error = SubmissionUncertain("it was there, and is forgotten", permanent=True)
                raise self.world.trouble("find", error)
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
        return {job: self.world.polled(job) for job in jobs}

    async def follow(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        looks = self._watch(followed) if self.world.watched else super().follow(followed)
        async with contextlib.aclosing(looks) as stream:
            async for statuses in stream:
                yield statuses
                fate, self.world.stream_fate = self.world.stream_fate, "goes on"
                if fate == "ends":
                    return
                if fate == "breaks":
                    name = "stream" if self.world.watched else "poll"
                    raise self.world.trouble(name, InvalidAnswer("half a line"))

    async def _streamed(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        self.world.ask("stream")
        return {job: self.world.polled(job, streamed=True) for job in jobs}

    async def _watch(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        shown: dict[JobRef, JobStatus] = {}
        while True:
            jobs = followed.jobs()
            statuses = await self._streamed(jobs)
            yield {job: status for job, status in statuses.items() if shown.get(job) != status}
            shown = {job: status for job, status in statuses.items() if status.state is not JobState.ABSENT}
            pause = asyncio.ensure_future(followed.pause())
            try:
                while not (await asyncio.wait([pause], timeout=LOOKS_EVERY))[0]:
                    statuses = await self._streamed(list(shown))
                    news = {job: status for job, status in statuses.items() if status not in (shown[job], _gone(job))}
                    shown.update(news)
                    if news:
                        yield news
            finally:
                pause.cancel()

    async def kill(self, job: JobRef) -> None:
        known = self.world.job(job)
        if known is not None:
            known.spared = True  # unless the kill gets through
        self.world.ask("kill")
        if self.world.kill_fate == "refused":
            raise self.world.trouble("kill", RequestRefused("not yours"))
        if known is not None:
            known.spared = False
            if known.runs and known.listed:
                self.world.on_kill(known)
                known.dies_at = min(known.dies_at or 1e18, self.world.clock.now + self.world.kill_takes)
                self.world.settle()
        self.world.on_effect("killed")
        if self.world.kill_fate == "unanswered":
            raise self.world.trouble("kill", ClusterUnreachable("no answer to a kill"))
        self.world.answered("kill", truly=True)

    async def release(self, job: JobRef) -> None:
        self.world.ask("release")

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        self.world.on_effect("log")
        return ()

    async def check(self) -> str:
        return "fine"
