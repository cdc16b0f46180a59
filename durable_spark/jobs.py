"""
The vocabulary that operators, triggers and hooks share: jobs, submissions, states, exceptions.

Nothing here does I/O or knows Airflow, so that a hook can be written, and a promise reasoned about,
without either. Two words carry the package:

*job*
    what runs on the cluster: a standalone driver, a YARN application, a Kubernetes driver pod.
*submission*
    one intended run of a job. It has a token, and at most one job exists per submission.

The one trap: :attr:`JobState.ABSENT` is a statement ("this healthy cluster does not know the job"),
:attr:`JobState.UNKNOWN` is the lack of one ("it cannot tell now"). Who mixes them up submits twice.

The exceptions::

    DurableJobError
    ├── BadConfiguration         the connection or a setting: which field, what is wrong, how to mend it
    │   └── ClusterChanged       the connection names another cluster than the one the job was submitted to
    ├── BadArguments             an argument of the operator: nothing was submitted
    ├── SubmissionRefused        the cluster said no: nothing was submitted
    ├── SubmissionUncertain      whether the job exists cannot be told: never a second submission
    ├── ClusterError             a request to the cluster did not succeed
    │   ├── ClusterUnreachable   no answer, or a 5xx: worth asking again
    │   │   └── InvalidAnswer    an answer that is not what the protocol promises
    │   ├── AuthenticationFailed the credentials were not accepted: read the connection again
    │   └── RequestRefused       the cluster understood and refused (a kill that is not allowed)
    └── JobEnded                 the job has ended, or its following has, without success
        ├── JobFailed
        ├── JobKilled
        ├── JobLost              a healthy cluster does not know the job any more, and no end of it was seen
        ├── DeadlinePassed       the execution timeout passed
        └── OutageTooLong        no word of the job for longer than the outage timeout
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = [
    "ENDED_BY_A_PERSON",
    "RECORD_KEY",
    "TRY_XCOM_KEY",
    "Absent",
    "AuthenticationFailed",
    "BadArguments",
    "BadConfiguration",
    "ClusterChanged",
    "ClusterError",
    "ClusterUnreachable",
    "DeadlinePassed",
    "DurableJobError",
    "Found",
    "Generation",
    "InvalidAnswer",
    "JobEnded",
    "JobFailed",
    "JobKilled",
    "JobLost",
    "JobRef",
    "JobState",
    "JobStatus",
    "Link",
    "OutageTooLong",
    "OwnedJob",
    "PreviousSubmission",
    "Record",
    "RequestRefused",
    "SparkJob",
    "Submission",
    "SubmissionRefused",
    "SubmissionUncertain",
    "Verdict",
    "new_token",
    "owner_of",
    "utc",
]

RECORD_KEY = "durable_spark"
"""Key of the record in Airflow's task state store."""
TRY_XCOM_KEY = "durable_spark_try"
"""XCom in which each try says that it is the one in charge: ``{"token": …, "ti_id": …}``."""
ENDED_BY_A_PERSON = frozenset({"failed", "success", "skipped", "removed", None})
"""States of a task instance whose job nobody waits for any more; ``None``: the task instance is gone."""

_FAR = 1e15
"""No time and no count that is stored comes near; an infinity, or what is no number, does not pass, either."""
_TOKEN = re.compile(r"[0-9a-f]{32}\Z")


class DurableJobError(Exception):
    """Base of all that this package raises on purpose."""


class BadConfiguration(DurableJobError):
    """A connection or a setting is wrong. The message names the field and the way out."""


class ClusterChanged(BadConfiguration):
    """The connection names another cluster than the one that the job was submitted to."""


class BadArguments(DurableJobError):
    """An argument of the operator is wrong. The message names it; nothing was submitted."""


class SubmissionRefused(DurableJobError):
    """The cluster refused the submission. Nothing was submitted."""


class SubmissionUncertain(DurableJobError):
    """
    It cannot be told whether the submission reached the cluster, so it is not sent again.

    :param message: what could not be told, and the way out.
    :param permanent: ``True`` when asking again cannot help (the cluster has forgotten what it knew),
        ``False`` when the cause may pass (a worker's page out of reach, a driver still queued).
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ClusterError(DurableJobError):
    """A request to the cluster did not succeed."""


class ClusterUnreachable(ClusterError):
    """
    The cluster gave no answer, or a 5xx. Asking again may help.

    :param message: what was asked and what came back.
    :param retry_after: seconds that the cluster asked to be left alone for, from ``Retry-After``.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InvalidAnswer(ClusterUnreachable):
    """The answer is not what the protocol promises. It says nothing about any job."""


class AuthenticationFailed(ClusterError):
    """The cluster did not accept the credentials. They may have expired: read the connection again."""


class RequestRefused(ClusterError):
    """
    The cluster understood the request and refused it.

    Not to be believed at once where nobody asks again: a Kubernetes API server that has just started refuses everything
    (403) until it has read the roles (seen with 1.34.4).
    """


class JobEnded(DurableJobError):
    """The job has ended, or its following has, without success."""


class JobFailed(JobEnded):
    """The cluster vouched for a failure."""


class JobKilled(JobEnded):
    """The cluster vouched that somebody killed the job."""


class JobLost(JobEnded):
    """A healthy cluster does not know the job any more, and its end was not seen."""


class DeadlinePassed(JobEnded):
    """The execution timeout of the task passed before the job ended."""


class OutageTooLong(JobEnded):
    """Nothing was heard of the job for longer than the outage timeout. It may still run."""


class JobState(str, enum.Enum):
    """What a cluster says of a job, in words that all clusters share."""

    PENDING = "pending"
    """Accepted, not running yet."""
    RUNNING = "running"
    UNKNOWN = "unknown"
    """The cluster cannot tell now: a master in recovery, a standby. Ask again."""
    RELAUNCHED = "relaunched"
    """The cluster itself started the job anew under another ID: :meth:`JobHook.find` has it."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    KILLED = "killed"
    ABSENT = "absent"
    """A healthy cluster does not know the job. Not an end: what became of it cannot be told."""

    @property
    def active(self) -> bool:
        """Whether the job may still run, or is about to."""
        return self in (JobState.PENDING, JobState.RUNNING, JobState.UNKNOWN, JobState.RELAUNCHED)

    @property
    def final(self) -> bool:
        """Whether the cluster vouched for an end."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.KILLED)


class Link(str, enum.Enum):
    """What a person wants to click, whatever the cluster."""

    JOB = "job"
    """The job on the cluster's own page."""
    LOG = "log"
    """The log of its driver."""
    TRACKING = "tracking"
    """The application's own page while it runs: the Spark UI."""
    HISTORY = "history"
    """The application in the Spark history server."""

    @property
    def xcom_key(self) -> str:
        """The key under which the link is kept in XCom."""
        return f"durable_spark_{self.value}_link"


class JobRef(NamedTuple):
    """Names one job on a cluster."""

    id: str
    """The cluster's own name for it."""
    uid: str = ""
    """Tells two jobs of the same name apart, where a cluster lets a name be used again."""

    def __str__(self) -> str:
        return self.id


_NO_LINKS: Mapping[Link, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """
    What the cluster said of one job, once.

    :param job: the job.
    :param state: in our words.
    :param raw: in the cluster's words, for logs and errors (``FINISHED``, ``Succeeded``).
    :param message: the cluster's own explanation, at most a few thousand characters, without secrets.
    :param held_up_since: for a job that is pending: since when something keeps it from starting that waiting its turn
        is not, in seconds since the epoch; ``None`` for one that merely waits its turn.
    :param links: what a person wants to click. Built from validated values only.
    """

    job: JobRef
    state: JobState
    raw: str = ""
    message: str = ""
    held_up_since: float | None = None
    links: Mapping[Link, str] = dataclasses.field(default_factory=lambda: _NO_LINKS)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """
    One intended run of a job, as it is written to the store before anything is sent.

    :param token: 128 random bits as lower-case hex. At most one job exists per token.
    :param owner: hash of deployment, Dag, run, task and map index; for finding and reporting only.
    :param deployment: name of the Airflow deployment, or ``""`` when it was not set.
    :param ordinal: how many submissions this task instance has had, from 1.
    :param name: readable name of the task (``dag.task``), for names that people see.
    :param cluster_time: the cluster's own clock when the intent was made, in seconds since the
        epoch, or ``None`` when the cluster has no need of it.
    :param job: the job, where the cluster lets it be known before it exists.
    :param evidence: what the hook wants to see again when it must prove that the job does not
        exist. Opaque to everybody else, at most a kilobyte.
    """

    token: str
    owner: str = ""
    deployment: str = ""
    ordinal: int = 1
    name: str = ""
    cluster_time: float | None = None
    job: JobRef | None = None
    evidence: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _TOKEN.match(self.token):
            raise ValueError(f"a submission's token is 32 lower-case hex digits, not {self.token[:40]!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the submission as plain JSON values, for the store and for a trigger's arguments."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        value["evidence"] = dict(self.evidence)
        value["job"] = list(self.job) if self.job else None
        return value

    @classmethod
    def from_json(cls, value: Any) -> Submission:
        """
        Return the submission that :meth:`to_json` wrote. Unknown keys are ignored.

        :raises ValueError: when the value is not a submission.
        """
        value = _object(value, "submission")
        evidence = _object(value.get("evidence", {}), "evidence")
        return cls(
            token=_text(value.get("token"), "token"),
            owner=_text(value.get("owner", ""), "owner"),
            deployment=_text(value.get("deployment", ""), "deployment"),
            ordinal=int(_number(value.get("ordinal", 1), "ordinal")),
            name=_text(value.get("name", ""), "name"),
            cluster_time=_optional_number(value.get("cluster_time"), "cluster_time"),
            job=_job_ref(value.get("job")),
            evidence={_text(k, "evidence"): _text(v, "evidence") for k, v in evidence.items()},
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """
    The job of a submission.

    :param status: of the job: the oldest one of the submission that the cluster did not relaunch.
    :param younger: jobs that carry the same token although only one was meant, and still run.
        Whoever sees them kills them and says so loudly.
    :param untold: why it cannot be told whether there are others; ``None`` if it can.
    """

    status: JobStatus
    younger: Sequence[JobRef] = ()
    untold: SubmissionUncertain | None = None

    @property
    def counts(self) -> bool:
        """Whether it counts beside another job of a submission sent twice: one that was killed was one too many."""
        return self.status.state not in (JobState.KILLED, JobState.ABSENT)


@dataclasses.dataclass(frozen=True)
class Absent:
    """It is proven that no job of the submission exists. Not to be answered on a mere suspicion."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OwnedJob:
    """A job that carries the labels of a deployment, and lives or is kept for its end."""

    status: JobStatus
    token: str
    owner: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkJob:
    """
    A Spark application as its user described it, before any cluster has looked at it.

    The fields are the arguments of :class:`~durable_spark.operators.spark.SparkJobOperator`, which
    documents them; ``None`` means that the user said nothing.
    """

    application: str
    java_class: str | None = None
    application_args: Sequence[str] = ()
    conf: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "airflow-spark"
    files: str | None = None
    py_files: str | None = None
    archives: str | None = None
    jars: str | None = None
    driver_class_path: str | None = None
    packages: str | None = None
    exclude_packages: str | None = None
    repositories: str | None = None
    driver_memory: str | None = None
    driver_cores: int | str | None = None
    executor_memory: str | None = None
    executor_cores: int | str | None = None
    total_executor_cores: int | str | None = None
    num_executors: int | str | None = None
    env_vars: Mapping[str, str] = dataclasses.field(default_factory=dict)
    properties_file: str | None = None
    keytab: str | None = None
    principal: str | None = None
    proxy_user: str | None = None
    supervise: bool | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What only one kind of cluster understands, by name; another one refuses it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """
    The life of a task instance between two clears.

    Airflow changes neither value on a retry and at least one of them on a clear (tried on 3.3.2).

    :param max_tries: ``ti.max_tries``.
    :param traceparent: ``ti.context_carrier["traceparent"]``, or ``""``.
    """

    max_tries: int
    traceparent: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """
    A final state that the cluster vouched for; or :attr:`JobState.ABSENT`, the finding that it can vouch for none.

    :param at: when it was written down, in seconds since the epoch.
    """

    state: JobState
    raw: str = ""
    message: str = ""
    at: float = 0.0

    @classmethod
    def of(cls, status: JobStatus) -> Verdict:
        """Return the verdict that a status holds, dated now."""
        return cls(state=status.state, raw=status.raw[:100], message=status.message[:1000], at=time.time())

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain JSON values."""
        return {"state": self.state.value, "raw": self.raw, "message": self.message, "at": self.at}


class PreviousSubmission(NamedTuple):
    """What is kept of a submission that another one has followed."""

    token: str
    job_id: str
    state: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """
    What the store holds for a task instance. Written before each request that changes anything on the cluster.

    :param submission: the current one.
    :param generation: of the task instance when the submission was made.
    :param fingerprint: digest of the mapped arguments; ``""`` for a task that is not mapped.
    :param arguments: digest of the job's description, keyed with the token, to notice a changed Dag.
    :param cluster: the names of the cluster, see :meth:`JobHook.cluster`.
    :param intended_at: our clock when the intent was written, in seconds since the epoch.
    :param job: the submission's job, once it is known to exist; ``None`` for a mere intent.
    :param verdict: of that job, once there is one.
    :param killing: whether this task has asked the cluster to kill the job: if it is gone, it was killed, not lost.
    :param unanswered: whether the cluster has answered none of these kills: a job that lives on was not killed.
    :param resent: whether the submission was sent more than once, so that it may have made a second job.
    :param refused: whether the cluster has said no to all that was sent: there is no job, and nothing on its way.
    :param previous: earlier submissions of the task instance, the latest first.
    """

    VERSION = 1
    _KEPT = 10

    submission: Submission
    generation: Generation
    fingerprint: str
    arguments: str
    cluster: tuple[str, ...]
    intended_at: float
    job: JobRef | None = None
    verdict: Verdict | None = None
    killing: bool = False
    unanswered: bool = False
    resent: bool = False
    refused: bool = False
    previous: tuple[PreviousSubmission, ...] = ()

    def lists(self, job_id: str) -> bool:
        """Return whether a job of that ID is one of the task instance's submissions."""
        return (self.job is not None and self.job.id == job_id) or any(p.job_id == job_id for p in self.previous)

    def moved_to(self, job: JobRef) -> Record:
        """
        Return the record with another job of its submission in the old one's place.

        The old ID stays listed. What has ended, or was killed, was the old one.
        """
        if self.job is None or self.job.id == job.id:
            return dataclasses.replace(self, job=job)
        old = PreviousSubmission(self.submission.token, self.job.id, JobState.RELAUNCHED.value)
        previous = (old, *self.previous)[: self._KEPT]
        return dataclasses.replace(self, job=job, previous=previous, verdict=None, killing=False, unanswered=False)

    def as_previous(self) -> tuple[PreviousSubmission, ...]:
        """Return the list of previous submissions for the record that follows this one."""
        state = self.verdict.state.value if self.verdict else ""
        latest = PreviousSubmission(self.submission.token, self.job.id if self.job else "", state)
        return (latest, *self.previous)[: self._KEPT]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, for the store."""
        return {
            "version": self.VERSION,
            "submission": self.submission.to_json(),
            "generation": dataclasses.asdict(self.generation),
            "fingerprint": self.fingerprint,
            "arguments": self.arguments,
            "cluster": list(self.cluster),
            "intended_at": self.intended_at,
            "job": list(self.job) if self.job else None,
            "verdict": {**dataclasses.asdict(self.verdict), "state": self.verdict.state.value}
            if self.verdict
            else None,
            "killing": self.killing,
            "unanswered": self.unanswered,
            "resent": self.resent,
            "refused": self.refused,
            "previous": [list(previous) for previous in self.previous],
        }

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """
        Return the record that :meth:`to_json` wrote. Unknown keys are ignored.

        :raises ValueError: when the value is not a record, or one of a version that this code does not know.
        """
        value = _object(value, "record")
        if value.get("version") != cls.VERSION:
            raise ValueError(f"its version is {str(value.get('version'))[:40]!r}, this package knows {cls.VERSION}")
        generation = _object(value.get("generation"), "generation")
        cluster = value.get("cluster")
        previous = value.get("previous", [])
        if not isinstance(cluster, list) or not isinstance(previous, list):
            raise ValueError("cluster and previous are lists")
        return cls(
            submission=Submission.from_json(value.get("submission")),
            generation=Generation(
                max_tries=int(_number(generation.get("max_tries"), "max_tries")),
                traceparent=_text(generation.get("traceparent"), "traceparent"),
            ),
            fingerprint=_text(value.get("fingerprint", ""), "fingerprint"),
            arguments=_text(value.get("arguments", ""), "arguments"),
            cluster=tuple(_text(name, "cluster") for name in cluster),
            intended_at=_number(value.get("intended_at"), "intended_at"),
            job=_job_ref(value.get("job")),
            verdict=_verdict(value.get("verdict")),
            killing=value.get("killing") is True,
            unanswered=value.get("unanswered") is True,
            resent=value.get("resent") is True,
            refused=value.get("refused") is True,
            previous=tuple(map(_previous, previous)),
        )


def new_token() -> str:
    """Return 128 random bits as lower-case hex."""
    return secrets.token_hex(16)


def utc(moment: float) -> str:
    """Return a moment, in seconds since the epoch, as people read it. UTC, like the log."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


def owner_of(*, deployment: str, dag_id: str, run_id: str, task_id: str, map_index: int) -> str:
    """Return the label that says whose a job is: 32 hex digits, the same for every try of a task instance."""
    parts = (deployment, dag_id, run_id, task_id, str(map_index))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a string")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _FAR:
        raise ValueError(f"{what} is not a number")
    return value


def _previous(value: Any) -> PreviousSubmission:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError("a previous submission is not token, job and state")
    return PreviousSubmission(*(_text(part, "previous") for part in value))


def _optional_number(value: Any, what: str) -> float | None:
    return None if value is None else _number(value, what)


def _job_ref(value: Any) -> JobRef | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("job is not a pair of ID and uid")
    return JobRef(_text(value[0], "job"), _text(value[1], "job"))


def _verdict(value: Any) -> Verdict | None:
    if value is None:
        return None
    value = _object(value, "verdict")
    return Verdict(
        state=JobState(value.get("state")),
        raw=_text(value.get("raw", ""), "raw"),
        message=_text(value.get("message", ""), "message"),
        at=_number(value.get("at", 0.0), "at"),
    )
