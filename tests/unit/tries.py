"""
A task instance and a service in memory: what the operator decides, without processes.

The real store, scheduler and clusters are in ``tests/airflow``; here every branch of a decision is
reached in milliseconds. The store fences as Airflow's does: ``set`` of an older try is refused with 404,
``get`` answers as if the store were empty.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
import signal
import threading
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG
from airflow.sdk.bases.operator import ExecutorSafeguard
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType, TaskDeferred
from airflow.sdk.execution_time.comms import ErrorResponse

from durable_spark.hooks.cli import CliSubmission, SparkCliHook
from durable_spark.hooks.job import JobHook
from durable_spark.jobs import (
    Absent,
    BadArguments,
    ClusterUnreachable,
    Found,
    JobRef,
    JobState,
    JobStatus,
    Link,
    OwnedJob,
    Submission,
)
from durable_spark.operators.job import DurableJobOperator
from durable_spark.triggers.job import SubmissionTrigger

if TYPE_CHECKING:
    import pytest


class Died(SystemExit):
    """
    The process was killed here.

    Asyncio keeps what else a signal's handler raises in a callback of its loop.
    """


@dataclasses.dataclass
class Job:
    token: str
    owner: str
    state: JobState = JobState.RUNNING
    message: str = ""
    held_up_since: float | None = None


class Service:
    """Runs jobs, and can be told to misbehave."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.submissions = 0
        self.kills: list[str] = []
        self.releases: list[str] = []
        self.descriptions: list[Any] = []
        """What was submitted, in the order of the jobs."""
        self.looks = 0
        """How often somebody asked for a job's state."""
        self.names: Sequence[str] = ("service://one",)
        self.unreachable = False
        self.die_before_submit = False
        self.die_after_submit = False
        self.find_error: Exception | None = None
        self.release_error: Exception | None = None
        self.outlives_kills = False
        self.before_submit: Any = None
        self.after_submit: Any = None
        self.before_kill: Any = None
        self.before_release: Any = None
        self.landing: Path | None = None
        """Where other processes submit: a file per job, named like it, that holds its token."""
        self.blind = False
        self.on_glimpse: Any = None
        self.environment_stays = True
        self.prepared: list[Mapping[str, str]] = []

    def add(self, token: str, owner: str = "", state: JobState = JobState.RUNNING) -> str:
        job_id = f"job-{len(self.jobs) + 1}"
        self.jobs[job_id] = Job(token, owner, state)
        return job_id

    def take_in(self) -> None:
        """Notice what other processes have submitted."""
        for path in sorted(self.landing.iterdir()) if self.landing else ():
            if path.name not in self.jobs:
                self.jobs[path.name] = Job(path.read_text().strip(), "")
                self.submissions += 1

    @property
    def running(self) -> list[str]:
        return [job_id for job_id, job in self.jobs.items() if job.state.active]


service = Service()


class MemoryHook(JobHook):
    """A hook on :data:`service`."""

    async def cluster(self) -> Sequence[str]:
        return service.names

    async def prepare(self, job: Any, submission: Submission) -> Submission:
        if job == "bad":
            raise BadArguments("job: not 'bad'")
        self._reach()
        return dataclasses.replace(submission, cluster_time=1000.0 + service.submissions)

    async def submit(self, job: Any, submission: Submission) -> JobRef:
        self._reach()
        if service.before_submit:
            service.before_submit()
        if service.die_before_submit:
            raise Died
        service.submissions += 1
        service.descriptions.append(job)
        job_id = service.add(submission.token, submission.owner)
        if service.after_submit:
            service.after_submit()
        if service.die_after_submit:
            raise Died
        return JobRef(job_id)

    async def find(self, submission: Submission) -> Found | Absent:
        self._reach()
        if service.find_error:
            raise service.find_error
        mine = [
            JobRef(job_id)
            for job_id, job in service.jobs.items()
            if job.token == submission.token and job.state is not JobState.RELAUNCHED
        ]
        if not mine:
            return Absent()
        return Found(status=self._status(mine[0]), younger=[job for job in mine[1:] if job.id in service.running])

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        return [
            OwnedJob(status=self._status(JobRef(job_id)), token=service.jobs[job_id].token, owner=owner or "")
            for job_id in service.running
            if service.jobs[job_id].owner == owner
        ]

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        service.looks += 1
        self._reach()
        return {job: self._status(job) for job in jobs}

    async def kill(self, job: JobRef) -> None:
        self._reach()
        if service.before_kill:
            service.before_kill()
        service.kills.append(job.id)
        known = service.jobs.get(job.id)
        if known and known.state.active and not service.outlives_kills:
            known.state = JobState.KILLED

    async def release(self, job: JobRef) -> None:
        if service.before_release:
            service.before_release()
        service.releases.append(job.id)
        self._reach()
        if service.release_error:
            raise service.release_error

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        return ["the last line"]

    async def check(self) -> str:
        return "fine"

    def _status(self, job: JobRef) -> JobStatus:
        known = service.jobs.get(job.id)
        if known is None:
            known = Job("", "", JobState.ABSENT)
        return JobStatus(
            job=job,
            state=known.state,
            raw=known.state.name,
            message=known.message,
            held_up_since=known.held_up_since,
            links={Link.JOB: f"http://service/{job.id}"},
        )

    def _reach(self) -> None:
        if service.unreachable:
            raise ClusterUnreachable("the service does not answer")


def before_each_poll(monkeypatch: pytest.MonkeyPatch, do: Callable[[int, Collection[JobRef]], object]) -> None:
    """Have something done before each poll, which is given its number and the jobs that are asked for."""
    original, numbers = MemoryHook.poll, itertools.count(1)

    async def poll(self: MemoryHook, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        do(next(numbers), jobs)
        return await original(self, jobs)

    monkeypatch.setattr(MemoryHook, "poll", poll)


class MemoryCliHook(MemoryHook, SparkCliHook):
    """A hook on :data:`service` for jobs that a command line tool submits."""

    async def prepare_cli(self, conf: Mapping[str, str], submission: Submission) -> CliSubmission:
        if "spark.bad" in conf:
            raise BadArguments("conf: not spark.bad")
        self._reach()
        service.prepared.append(conf)
        return CliSubmission(
            submission=dataclasses.replace(submission, cluster_time=1000.0 + service.submissions),
            conf={"spark.token": submission.token},
            environment_stays=service.environment_stays,
        )

    def job_in(self, line: str, submission: Submission) -> JobRef | None:
        match = re.match(r"the cluster has (job-\d+)", line)
        return JobRef(match[1]) if match else None

    async def glimpse(self, submission: Submission) -> JobRef | None:
        if service.on_glimpse:
            service.on_glimpse()
        self._reach()
        jobs = [job_id for job_id, job in service.jobs.items() if job.token == submission.token]
        return JobRef(jobs[0]) if jobs and not service.blind else None

    def _reach(self) -> None:
        super()._reach()
        service.take_in()


def waits(deferral: Any) -> bool:
    """Whether the task waits until it can be told whether there is a job."""
    assert isinstance(deferral, TaskDeferred), deferral
    return isinstance(deferral.trigger, SubmissionTrigger) and deferral.method_name == "execute_again"


class alarm:  # noqa: N801 reads as a statement
    """Fail what hangs, without the timer that is Airflow's."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        main = threading.get_ident()
        self.timer = threading.Timer(seconds, lambda: signal.pthread_kill(main, signal.SIGUSR2))

    def __enter__(self) -> None:
        def hung(*_: Any) -> None:
            raise RuntimeError(f"still waiting after {self.seconds} s")

        self.before = signal.signal(signal.SIGUSR2, hung)
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.timer.join()
        signal.signal(signal.SIGUSR2, self.before)


class TaskInstance:
    """
    What Airflow keeps of a task instance: its store and XComs, over all tries.

    :param build: the operator's class.
    :param defaults: its arguments on every try.
    """

    def __init__(self, build: Callable[..., Any] = DurableJobOperator, **defaults: Any) -> None:
        self.build = build
        self.defaults = defaults or {"hook": MemoryHook, "conn_id": "memory", "job": "good", "retries": 2}
        self.store: dict[str, Any] = {}
        self.retentions: dict[str, Any] = {}
        self.xcoms: dict[str, Any] = {}
        self.current: Try | None = None
        self.max_tries = 2
        self.traceparent = "00-one"

    def begin(self, **arguments: Any) -> Try:
        """Begin the first try, or the next."""
        number = self.current.try_number + 1 if self.current else 1
        self.xcoms.clear()
        self.current = Try(self, number, arguments)
        return self.current

    def clear(self) -> None:
        """Do what Airflow does on a clear."""
        self.max_tries += 2
        self.traceparent += "+"


class Try:
    """One try: what ``context["ti"]`` is to the operator, and a way to run it."""

    dag_id, run_id, task_id, map_index = "dag", "run", "task", -1

    def __init__(self, instance: TaskInstance, number: int, arguments: dict[str, Any]) -> None:
        self.instance = instance
        self.id = uuid.uuid4()
        self.try_number = number
        self.max_tries = instance.max_tries
        self.context_carrier = {"traceparent": instance.traceparent}
        self.start_date = datetime.datetime.now(datetime.timezone.utc)
        self.stats_tags: dict[str, str] = {}
        self._arguments = arguments
        self.operator = self._operator()

    def _operator(self) -> Any:
        with DAG(self.dag_id, schedule=None):
            return self.instance.build(task_id=self.task_id, **{**self.instance.defaults, **self._arguments})

    # what the operator sees

    @property
    def fenced(self) -> bool:
        return self.instance.current is not self

    def get(self, key: str, default: Any = None) -> Any:
        return default if self.fenced else self.instance.store.get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        if self.fenced:
            error = ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"status_code": 404})
            raise AirflowRuntimeError(error)
        self.instance.store[key] = value
        self.instance.retentions[key] = retention

    def delete(self, key: str) -> None:
        if not self.fenced:
            self.instance.store.pop(key, None)

    def xcom_push(self, key: str, value: Any) -> None:
        self.instance.xcoms[key] = value

    def xcom_pull(self, *, key: str, map_indexes: int | None = None, **_: Any) -> Any:
        value = self.instance.xcoms.get(key)
        # As Airflow does: who names no map index is given what all of them have pushed.
        return value if self.map_index < 0 or map_indexes == self.map_index else [None, value]

    # what a test does

    @property
    def context(self) -> Any:
        dag = self.operator.dag
        return {"ti": self, "task_instance": self, "task": self.operator, "dag": dag, "task_state_store": self}

    def execute(self) -> Any:
        """Run ``execute``. Returns its result, or the deferral it asked for."""
        return self._call("execute")

    def again(self) -> Any:
        """Run ``execute_again`` in a process of its own."""
        self.operator = self._operator()
        return self._call("execute_again")

    def fail(self, error: str) -> Any:
        """Run what Airflow runs when the trigger has ended without an event."""
        self.operator = self._operator()
        return self.operator.resume_execution("__fail__", {"error": error}, self.context)

    def complete(self, event: Mapping[str, Any]) -> Any:
        """Run ``execute_complete`` in a process of its own."""
        self.operator = self._operator()
        return self._call("execute_complete", event=event)

    def _call(self, method: str, **arguments: Any) -> Any:
        token = ExecutorSafeguard.tracker.set(self.operator)
        try:
            return getattr(self.operator, method)(self.context, **arguments)
        except TaskDeferred as deferral:
            return deferral
        finally:
            ExecutorSafeguard.tracker.reset(token)

    @property
    def record(self) -> Any:
        return self.instance.store["durable_spark"]
