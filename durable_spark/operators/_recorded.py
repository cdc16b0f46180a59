"""
The record of a task's job: reading it, writing it, and who may; the operator's first layer.

``RecordedTask`` → :class:`~durable_spark.operators._cluster.ClusterTask` →
:class:`~durable_spark.operators._ending.EndingTask` → :class:`~durable_spark.operators.job.DurableJobOperator`: each
knows those before it. What flows in: a task's context. What flows out: the record of its submission, and what others
may see of it in XCom. Nothing is decided here.

The trap: Airflow fences ``set`` on the store for a process of an older try (404), while ``get`` answers
as if the store were empty (tried on 3.3.2). So the record is written before every request that changes
something on the cluster, and nothing is concluded from an empty ``get`` alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, ResumableJobMixin

from durable_spark.hooks.job import JobHook, load_hook_class
from durable_spark.jobs import (
    RECORD_KEY,
    TRY_XCOM_KEY,
    BadArguments,
    BadConfiguration,
    JobRef,
    JobStatus,
    PreviousSubmission,
    Record,
    Submission,
    new_token,
    utc,
)
from durable_spark.operators._conversation import Conversation
from durable_spark.operators._store import (
    deployment,
    digest_of,
    fingerprint_of,
    generation_of,
    owner_of,
    store_of,
    way_out,
    write,
)
from durable_spark.operators._telling import count

if TYPE_CHECKING:
    from airflow.sdk import Context
    from pydantic import JsonValue

__all__ = ["RecordedTask"]


class RecordedTask(ResumableJobMixin, BaseOperator):
    """
    A task whose job is in a record. Its arguments are described where they are assigned, in ``DurableJobOperator``.

    :ivar _record: the record as this process has read or written it last.
    :ivar _status: what the cluster has said last of its job, in this process.
    :ivar _anew: a new submission follows, whatever the record names.
    :ivar _old_is_dead: what the record names is known not to run any more.
    :ivar _reason: the decision that a new submission is to be reported as, and why.
    :ivar _kill_requested: this process was told to stop.
    """

    hook: type[JobHook] | str
    conn_id: str
    job: Any
    deferrable: bool
    kill_jobs: bool
    on_clear: str
    on_timeout: str
    on_lost: str
    kill_timeout: float
    outage_timeout: float
    log_lines: int
    _talk: Conversation | None
    _record: Record | None
    _status: JobStatus | None
    _anew: bool
    _old_is_dead: bool
    _reason: tuple[str, str]
    _kill_requested: bool
    _mirrored: tuple[JsonValue, bool] | None
    _pushed: dict[str, str]
    _fingerprint: str | None

    # What a subclass may say

    @property
    def hook_path(self) -> str:
        """The class path of the hook, as the trigger's arguments carry it."""
        return self.hook if isinstance(self.hook, str) else f"{self.hook.__module__}.{self.hook.__qualname__}"

    def build_job(self, context: Context) -> Any:
        """
        Return the description of the job for :meth:`JobHook.prepare` and :meth:`JobHook.submit`.

        :raises BadArguments: when an argument is wrong.
        """
        return self.describe_job()

    def describe_job(self) -> Any:
        """Return what of :meth:`build_job` is the same on every try as long as the Dag is."""
        return self.job

    def after_end(self) -> None:
        """
        Do what is to be done once a job has ended, or is lost.

        Its verdict is in the store by then, so a process that dies here is not followed by another that does it again.
        Within one process it may be called more than once.
        """

    # The record

    @property
    def _recorded(self) -> Record:
        if self._record is None:
            raise RuntimeError("there is no record yet")
        return self._record

    def _is_cleared(self, context: Context, record: Record) -> bool:
        return (record.generation, record.fingerprint) != (generation_of(context), self._fingerprint_of(context))

    def _fingerprint_of(self, context: Context) -> str:
        """Return the fingerprint, made once: over an XCom's list it takes a request."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(context)
        return self._fingerprint

    def _fence(self, context: Context) -> None:
        """
        See that this try is in charge, where there is nothing else to be written.

        :raises Superseded: when another try is.
        """
        if self.durable:
            write(context, TRY_XCOM_KEY, str(context["ti"].id), for_ever=False)

    def _load(self, context: Context) -> None:
        value = store_of(context).get(RECORD_KEY) if self.durable else None
        if value is None:
            self._record = None
            return
        try:
            self._record = Record.from_json(value)
        except (ValueError, TypeError) as error:
            raise BadConfiguration(
                f"the record of this task in the task state store cannot be read ({error}); nothing was submitted. "
                f"{way_out(context)}"
            ) from error

    def _save(self, context: Context, record: Record) -> None:
        """
        Write the record. This is the fence: an older try is refused here.

        :raises Superseded: when another try is in charge.
        """
        ended = record.verdict is not None and (self._record is None or self._record.verdict is None)
        self._record = record
        if self.durable:
            write(context, RECORD_KEY, record.to_json(), for_ever=record.verdict is None)
        if ended:
            self.after_end()

    def mirror(self, context: Context, job_id: JsonValue) -> None:
        """Write the job's ID where upstream's operators and other readers look for it."""
        ended = self._record is not None and self._record.verdict is not None
        if self.durable and self._mirrored != (job_id, ended):
            write(context, self.external_id_key, job_id, for_ever=not ended)
            self._mirrored = (job_id, ended)

    def _new_submission(self, context: Context, prior: Record | None) -> Submission:
        ti = context["ti"]
        return Submission(
            token=new_token(),
            owner=owner_of(context),
            deployment=deployment(),
            ordinal=prior.submission.ordinal + 1 if prior else 1,
            name=f"{ti.dag_id}.{ti.task_id}",
        )

    def _record_of(
        self,
        context: Context,
        submission: Submission,
        *,
        job: JobRef | None = None,
        cluster: Sequence[str] | None = None,
        previous: tuple[PreviousSubmission, ...] = (),
    ) -> Record:
        """
        Return a record: of a submission that is about to be sent, or of a job that has none.

        :param cluster: the cluster's names, if not those that the connection has now.
        """
        talk = self._conversing
        return Record(
            submission=submission,
            generation=generation_of(context),
            fingerprint=self._fingerprint_of(context),
            arguments="" if job else digest_of(submission.token, self.describe_job()),
            cluster=tuple(talk.run(talk.hook.cluster()) if cluster is None else cluster),
            intended_at=time.time(),
            job=job,
            previous=previous,
        )

    def _unrecorded(self, context: Context, job: JobRef, *, token: str) -> Record:
        """Return a record for a job that has none: the task is not durable, or its record was deleted."""
        return self._record_of(context, Submission(token=token), job=job, cluster=())

    # What others see

    def _push_try(self, context: Context, token: str) -> None:
        """Say which try is in charge, before looking at the cluster: the trigger and an older try read it."""
        ti = context["ti"]
        ti.xcom_push(key=TRY_XCOM_KEY, value={"token": token, "ti_id": str(ti.id)})

    def _push_job(self, context: Context) -> None:
        """Let others see the job and its links, as soon as they are known and whatever becomes of this try."""
        job = self._record.job if self._record else None
        if job is None:
            return
        values = {link.xcom_key: url for link, url in (self._status.links if self._status else {}).items()}
        if self.do_xcom_push:
            values[self.external_id_key] = job.id
        for key, value in values.items():
            if self._pushed.get(key) != value:
                context["ti"].xcom_push(key=key, value=value)
                self._pushed = {**self._pushed, key: value}  # the dict itself is shared with the Dag's operator

    def _origin(self, record: Record) -> str:
        """Return which submission it is, and where it went, for logs and messages."""
        submission = record.submission
        return (
            f"submission {submission.ordinal} (token {submission.token}) to {', '.join(record.cluster)} "
            f"by connection {self.conn_id!r} at {utc(record.intended_at)}"
        )

    def _count(self, context: Context, what: str) -> None:
        count(context, what, operator=type(self).__name__, conn_id=self.conn_id)

    # The conversation with the cluster

    @property
    def _conversing(self) -> Conversation:
        if self._talk is None:
            raise RuntimeError("no conversation with the cluster is open")
        return self._talk

    @contextlib.contextmanager
    def _conversation(self) -> Iterator[None]:
        if not self.conn_id:
            raise BadArguments("conn_id: name the Airflow connection of the cluster")
        self._talk = Conversation(load_hook_class(self.hook_path)(self.conn_id))
        if self._kill_requested:
            self._talk.interrupt()
        try:
            yield
        finally:
            talk, self._talk = self._talk, None
            talk.close()
