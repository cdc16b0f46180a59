"""
What the soak runs, and how it is judged. Pure: no I/O, so that a test can tell of every verdict.

What flows in: a seed; later what Airflow says of each task, and what the clusters' own records say of its jobs. What
flows out: the runs to trigger; then for each task what was broken, and what is a limit that the documentation names.

Each job is planned together with its end, so that there is one right answer for each task: how many jobs it has, and
how they and it end. Everything that dies meanwhile may cost tries, never jobs.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

__all__ = ["FOR_GOOD", "KINDS", "Ended", "Job", "Judgement", "Planned", "Run", "judge", "plan"]

FOR_GOOD = -1
"""As :attr:`Planned.failures`: the job fails, and its task is not to run it again."""
_BATCH = 10


@dataclasses.dataclass(frozen=True)
class Kind:
    """
    One kind of job, and the Dag of its name.

    :param cluster: ``kubernetes``, ``standalone`` or ``yarn``.
    :param runs: how many runs of each deck of cards.
    :param about: for the page.
    :param jvm: whether it takes a JVM, of which there may be few at once: such jobs are short.
    :param waits: whether it waits on its worker: such jobs are shorter still.
    """

    name: str
    cluster: str
    runs: int
    about: str
    jvm: bool = False
    waits: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("pod", "kubernetes", 27, "pods"),
        Kind("batch", "kubernetes", 5, f"pods of mapped tasks, {_BATCH} to a run"),
        Kind("held", "kubernetes", 6, "pods that are held for their end, then deleted"),
        Kind("blocking", "kubernetes", 3, "pods that a worker waits for", waits=True),
        Kind("spark", "kubernetes", 2, "PySpark with an executor", jvm=True),
        Kind("driver", "standalone", 6, "drivers", jvm=True),
        Kind("submit_standalone", "standalone", 1, "drivers by spark-submit", jvm=True),
        Kind("submit_kubernetes", "kubernetes", 2, "pods by spark-submit", jvm=True),
        Kind("submit_yarn", "yarn", 2, "Spark applications by spark-submit", jvm=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """
    A job that is to be run, and thereby a task.

    :param key: its name on the cluster, and in the judgement; begins with the run's ID.
    :param seconds: how long it takes.
    :param failures: how often it fails before it succeeds, or :data:`FOR_GOOD`.
    """

    kind: Kind
    key: str
    run_id: str
    map_index: int
    seconds: float
    failures: int

    @property
    def jobs(self) -> int:
        """How many jobs it takes, if nothing goes wrong."""
        return max(self.failures, 0) + 1

    @property
    def succeeds(self) -> bool:
        """Whether its task is to succeed."""
        return self.failures != FOR_GOOD


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a Dag: one task, or a batch of mapped ones."""

    kind: Kind
    id: str
    jobs: Sequence[Planned]

    def conf(self) -> dict[str, Any]:
        """Return the params of the run."""
        if self.kind.name == "batch":
            parts = [{"key": job.key, "seconds": job.seconds, "failures": job.failures} for job in self.jobs]
            return {"jobs": parts}
        (job,) = self.jobs
        return {"seconds": f"{job.seconds:.1f}", "failures": job.failures}

    def within(self, seconds: float) -> Run:
        """Return the run with no job longer than this."""
        jobs = [dataclasses.replace(job, seconds=min(job.seconds, seconds / job.jobs)) for job in self.jobs]
        return dataclasses.replace(self, jobs=jobs)


def plan(seed: str, longest: float) -> Iterator[Run]:
    """
    Return runs without end, the same ones for the same seed.

    :param longest: seconds that a job may take.
    """
    rng = random.Random(f"{seed} jobs")
    number = count(1)
    while True:
        deck = [kind for kind in KINDS.values() for _ in range(kind.runs)]
        rng.shuffle(deck)
        for kind in deck:
            yield _run(rng, kind, f"{kind.name.replace('_', '-')}-{next(number):04}", longest)


def _run(rng: random.Random, kind: Kind, run_id: str, longest: float) -> Run:
    if kind.name != "batch":
        return Run(kind, run_id, [_planned(rng, kind, run_id, run_id, -1, longest)])
    jobs = [_planned(rng, kind, f"{run_id}-{index}", run_id, index, longest) for index in range(_BATCH)]
    return Run(kind, run_id, jobs)


def _planned(rng: random.Random, kind: Kind, key: str, run_id: str, map_index: int, longest: float) -> Planned:
    shortest, longest = (2, 40) if kind.waits else (5, 90) if kind.jvm else (10, longest)
    seconds = rng.uniform(shortest, max(longest, shortest))
    if kind.jvm:
        failures = rng.choices((0, FOR_GOOD), (8, 2))[0]
    elif kind.name == "batch":
        failures = rng.choices((0, 1, 2), (8, 1, 1))[0]
    else:
        failures = rng.choices((0, 1, 2, FOR_GOOD), (14, 3, 1, 2))[0]
    return Planned(kind, key, run_id, map_index, round(seconds / (max(failures, 0) + 1), 1), failures)


@dataclasses.dataclass(frozen=True)
class Job:
    """
    A job by its cluster's own record.

    :param key: of the task that it is for.
    :param token: of its submission.
    :param state: ``running``, ``succeeded``, ``failed``, ``killed``, or ``gone``: deleted before it began.
    :param raw: in the cluster's words.
    """

    key: str
    token: str
    id: str
    state: str
    raw: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """
    What Airflow says of a task.

    :param state: of the task instance.
    :param tries: how many it had.
    :param tokens: of its submissions, by its record; the record keeps the last eleven.
    :param submissions: how many it had, by its record.
    :param error: the end of the log of its last try.
    """

    state: str | None
    tries: int = 1
    tokens: Sequence[str] = ()
    submissions: int = 0
    error: str = ""


@dataclasses.dataclass
class Judgement:
    """What is to be said of one task: promises that were broken, and limits that the documentation names."""

    broken: list[str] = dataclasses.field(default_factory=list)
    limits: list[str] = dataclasses.field(default_factory=list)


TWIN = "a second job for one submission, seen and killed"
HALF = "a pod without its config map, deleted and submitted again"
ERROR = "a driver that its master called ERROR, submitted again"
ALONE = "a Spark driver that failed because its API server was away, submitted again"
LOST = "lost: the master forgot the driver's end"
UNCERTAIN = "cannot tell: nothing was submitted"


def judge(planned: Planned, ended: Ended, jobs: Sequence[Job]) -> Judgement:
    """
    Hold what Airflow says of a task against its jobs.

    :param jobs: of the task, the oldest first.
    """
    said = Judgement()
    if ended.state not in ("success", "failed"):
        said.broken.append(f"the task has not ended: it is {ended.state}")
    if running := [job.id for job in jobs if job.state == "running"]:
        said.broken.append(f"still running, with nobody to follow: {', '.join(running)}")
    if len(ended.tokens) == ended.submissions:
        unknown = [job.id for job in jobs if job.token not in ended.tokens]
        said.broken += [f"no submission of the task tells of {job}" for job in unknown]
    jobs = _one_for_each_submission(planned, jobs, said)
    _judge_end(planned, ended, jobs, said)
    return said


def _one_for_each_submission(planned: Planned, jobs: Sequence[Job], said: Judgement) -> Sequence[Job]:
    """Return the jobs without those that came beside another of the same token and were killed or deleted."""
    kept = []
    for token in dict.fromkeys(job.token for job in jobs):
        same = [job for job in jobs if job.token == token]
        kept.append(same[-1] if same[0].state == "gone" else same[0])
        if len(same) == 1:
            continue
        deleted = planned.kind.name == "submit_kubernetes" and all(job.state == "gone" for job in same[:-1])
        killed = planned.kind.cluster != "kubernetes" and all(job.state == "killed" for job in same[1:])
        if deleted or killed:
            said.limits.append(HALF if deleted else TWIN)
        else:
            listed = ", ".join(f"{job.id} ({job.raw})" for job in same)
            said.broken.append(f"{len(same)} jobs for the submission {token}: {listed}")
    return kept


def _judge_end(planned: Planned, ended: Ended, jobs: Sequence[Job], said: Judgement) -> None:
    earlier, last = jobs[:-1], jobs[-1] if jobs else None
    standalone = planned.kind.cluster == "standalone"
    errors = sum(job.raw == "ERROR" for job in jobs)
    said.limits += [ERROR] * errors
    # A Spark driver makes its executors itself. Nothing else makes such a job fail that is to succeed.
    alone = sum(job.state == "failed" for job in jobs) if planned.kind.name == "spark" and planned.succeeds else 0
    said.limits += [ALONE] * alone
    said.broken += [
        f"submitted again, although {job.id} is {job.raw}"
        for job in earlier
        if job is not None and job.state != "failed"
    ]
    may_be_untold = standalone or (planned.kind.cluster == "yarn" and last is None)
    if ended.state == "failed" and may_be_untold and "SubmissionUncertain" in ended.error:
        said.limits.append(UNCERTAIN)
        return
    if ended.state == "failed" and standalone and "JobLost" in ended.error and last is not None:
        said.limits.append(LOST)
        return
    if last is None:
        said.broken.append(f"the task is {ended.state} without a job")
        return
    right = {"success": "succeeded", "failed": "failed"}.get(ended.state or "")
    if right is not None and last.state != right:
        said.broken.append(f"the task is {ended.state}, its job {last.id} {last.raw}")
    if right is not None and (ended.state == "success") != planned.succeeds and not (standalone and errors):
        said.broken.append(f"the task is {ended.state}, which its job was not to be")
    # A try that dies between its job's failure and its own is followed by another, and so is the job.
    if planned.succeeds and len(jobs) - errors - alone != planned.jobs and last.raw != "ERROR":
        said.broken.append(f"{len(jobs)} jobs, {planned.jobs} were meant")
