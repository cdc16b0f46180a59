"""
The synchronous half: reads the record, decides, submits once, stores, defers; later returns or raises.

:class:`DurableJobOperator` joins two things that Airflow has apart. ``ResumableJobMixin`` keeps a job's
ID in the task state store, so that a retry decides between *reconnect*, *already succeeded* and
*submit again*; its decision tree, metrics and spans are used as they are. Deferral moves the wait to
the triggerer. Around both stands the record (:class:`~durable_spark.jobs.Record`), which closes the
window that the mixin names in its docstring: the intent is written before anything is sent, so that a
job whose worker died before it could store the ID is found again.

What flows in: a hook, a description of a job. What flows out: the job's ID, or an exception of Airflow's.

The trap: Airflow fences ``set`` on the store for a process of an older try (404), while ``get`` answers
as if the store were empty (tried on 3.3.2). So the record is written before every request that changes
something on the cluster, and nothing is concluded from an empty ``get`` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

from airflow.sdk import BaseOperator, ResumableJobMixin
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowTaskTimeout,
    TaskDeferralTimeout,
)

from durable_spark.hooks.job import JobHook, load_hook_class
from durable_spark.jobs import (
    ENDED_BY_A_PERSON,
    RECORD_KEY,
    TRY_XCOM_KEY,
    AuthenticationFailed,
    BadArguments,
    BadConfiguration,
    ClusterChanged,
    ClusterError,
    ClusterUnreachable,
    DeadlinePassed,
    DurableJobError,
    Found,
    JobEnded,
    JobFailed,
    JobKilled,
    JobLost,
    JobRef,
    JobState,
    JobStatus,
    OutageTooLong,
    Record,
    RequestRefused,
    Submission,
    SubmissionUncertain,
    Verdict,
    new_token,
)
from durable_spark.links import JobHistoryLink, JobLink, JobLogLink, JobTrackingLink
from durable_spark.operators._conversation import Conversation, first_event
from durable_spark.operators._store import (
    Superseded,
    deployment,
    digest_of,
    fingerprint_of,
    generation_of,
    map_index,
    owner_of,
    store_of,
    way_out,
    write,
)

if TYPE_CHECKING:
    from datetime import timedelta

    from airflow.sdk import Context
    from pydantic import JsonValue

    from durable_spark.triggers.job import JobEvent, JobTriggerArguments

__all__ = ["DurableJobOperator"]

_BACKSTOP_MARGIN = 120.0
"""Seconds after the deadline at which Airflow itself ends the deferral, should the trigger not have."""
_KILL_CONFIRMED_WITHIN = 30.0
_TIMER_MARGIN = 2.0
_LOOK_AGAIN_AFTER = 1.0
_UPSTREAM_DRIVER_STATUS = "k8s_driver_status"
"""Where upstream's SparkSubmitOperator caches a pod's end, and believes it of the next pod, too."""


class DurableJobOperator(ResumableJobMixin, BaseOperator):
    """
    Runs a job on any service for which there is a :class:`~durable_spark.hooks.job.JobHook`.

    The job is submitted once. Whatever dies in between (worker, triggerer, scheduler, the service
    itself), the retry finds it and follows it on.

    :param hook: the hook, as a class or its path (a mapped task wants the path). It is constructed with ``conn_id``.
    :param conn_id: the Airflow connection of the service. (templated)
    :param job: the description of the job, as the hook understands it. (templated)
    :param deferrable: wait in the triggerer (the default), or on the worker.
    :param durable: keep the record that makes a retry find the job. ``False`` submits anew on each try.
    :param poll_interval: seconds between two looks at the cluster; ``None`` for what the connection
        says (5 s if it says nothing). The shortest interval that any task asks for counts for all
        tasks on the same connection.
    :param on_kill: ``"kill"`` (the default) or ``"keep"`` the job when a person marks the task as failed
        or succeeded or deletes its run.
    :param on_clear: ``"kill"`` (the default): a cleared task kills its old job, sees it dead, and submits
        anew; ``"reconnect"``: it follows the old job on if that is alive.
    :param on_timeout: ``"kill"`` (the default) or ``"keep"`` the job when ``execution_timeout`` passes.
    :param on_lost: what to do when the cluster does not know the job any more and its end was not
        seen: ``"fail"`` (the default), without a retry; or ``"resubmit"``.
    :param start_timeout: seconds for which the cluster may say why it cannot start the job (an image that cannot be
        pulled, a pod that fits on no node) before the job is killed and has failed; ``None`` to wait for ever. A job
        that merely waits its turn in a queue is waited for.
    :param kill_timeout: seconds within which an old job must be seen dead after a clear; else the task
        fails without submitting.
    :param outage_timeout: seconds without word from the cluster after which a try is given up; its
        retry reconnects.
    :param log_lines: how many of the last lines of the job's log a failure shows.
    """

    template_fields: Sequence[str] = ("job", "conn_id")
    ui_color = "#ffe8d6"
    operator_extra_links = (JobLink(), JobLogLink(), JobTrackingLink(), JobHistoryLink())
    external_id_key = "durable_job_id"

    def __init__(
        self,
        *,
        hook: type[JobHook] | str = "",
        conn_id: str = "",
        job: Any = None,
        deferrable: bool = True,
        durable: bool = True,
        poll_interval: float | None = None,
        on_kill: str = "kill",
        on_clear: str = "kill",
        on_timeout: str = "kill",
        on_lost: str = "fail",
        start_timeout: float | None = 1800.0,
        kill_timeout: float = 300.0,
        outage_timeout: float = 3600.0,
        log_lines: int = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(durable=durable, **kwargs)
        _one_of("on_kill", on_kill, "kill", "keep")
        _one_of("on_clear", on_clear, "kill", "reconnect")
        _one_of("on_timeout", on_timeout, "kill", "keep")
        _one_of("on_lost", on_lost, "fail", "resubmit")
        if poll_interval is not None:
            _positive("poll_interval", poll_interval)
        if start_timeout is not None:
            _positive("start_timeout", start_timeout)
        _positive("kill_timeout", kill_timeout)
        _positive("outage_timeout", outage_timeout)
        _positive("log_lines", log_lines)
        self.hook = hook
        self.conn_id = conn_id
        self.job = job
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.kill_jobs = on_kill == "kill"
        self.on_clear = on_clear
        self.on_timeout = on_timeout
        self.on_lost = on_lost
        self.start_timeout = start_timeout
        self.kill_timeout = kill_timeout
        self.outage_timeout = outage_timeout
        self.log_lines = log_lines
        self._talk: Conversation | None = None
        self._record: Record | None = None
        self._anew = False
        self._status: JobStatus | None = None
        self._sent_before = False
        self._kill_requested = False
        self._mirrored: tuple[JsonValue, bool] | None = None

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

    # What Airflow calls

    def execute(self, context: Context) -> Any:
        """Submit the job, or take up the one that an earlier try has submitted, and wait for its end."""
        with translated(), self._conversation():
            if self.retries == 0 and self.durable and context["ti"].try_number <= 1:
                self.log.warning("retries=0: there is no try in which the job of a dead worker could be found again")
            if not self.durable:
                return self.execute_resumable(context)
            self._resolve(context)
            view = cast("Context", {**context, "task_state_store": _StoredJobID(self, context)})
            return self.execute_resumable(view)

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """Write down the verdict that the trigger brought, then return or raise."""
        from durable_spark.triggers.job import JobEvent

        with translated(), self._conversation():
            try:
                reported = JobEvent.from_json(event)
            except ValueError as error:
                raise AirflowException(f"The trigger's event cannot be understood: {error}") from error
            return self._complete(context, reported)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Resume after a deferral; when Airflow's own backstop ended it, kill the job first."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except TaskDeferralTimeout:
            with translated(), self._conversation():
                self._load(context)
                if (job := self._job_of_this_try(context)) is None:
                    raise
                raise self._deadline_passed(context, job, killed_by_trigger=False) from None

    def on_kill(self) -> None:
        """
        Note that this process is told to stop.

        Deferrable: nothing is killed, a deploy's SIGTERM looks just the same; a person's wish is read
        from the task instance's state, before the deferral and in the trigger. Waiting on the worker:
        the job is killed, if this try is still in charge.
        """
        self._kill_requested = True
        if self._talk is not None:
            self._talk.interrupt()

    # What the mixin calls

    def submit_job(self, context: Context) -> str:
        """Write the intent, submit, write the ID. Returns the job's ID."""
        job = self.build_job(context)
        talk = self._conversing
        prior = self._record
        resend = prior is not None and prior.job is None and not self._anew
        submission = prior.submission if prior and resend else self._new_submission(context, prior)
        self._push_try(context, submission.token)
        prepared = self._prepare(job, submission)
        if resend and submission.cluster_time is not None:
            # A request of the worker that died may still arrive: its job must not look older than the intent.
            prepared = dataclasses.replace(prepared, cluster_time=submission.cluster_time)
        self._sent_before = resend
        intent = Record(
            submission=prepared,
            generation=generation_of(context),
            fingerprint=fingerprint_of(context),
            arguments=digest_of(prepared.token, self.describe_job()),
            cluster=tuple(talk.run(talk.hook.cluster())),
            intended_at=time.time(),
            previous=() if prior is None else prior.previous if resend else prior.as_previous(),
        )
        self._save(context, intent)
        self._forget_upstream_status(context)
        if self._kill_requested:
            raise AirflowException("Told to stop before the job was submitted: nothing was submitted")
        ref = self._send(context, job, intent)
        self.log.info("Submitted as %s (submission %d, token %s)", ref, prepared.ordinal, prepared.token)
        try:
            self._save(context, dataclasses.replace(intent, job=ref))
        except Superseded:
            self._give_way(context, ref, prepared)
            raise
        self._anew = False
        self._status = None
        return ref.id

    def _prepare(self, job: Any, submission: Submission) -> Submission:
        """Check the job and return the submission with all that is needed to find it again. Nothing is submitted."""
        return self._conversing.run(self._conversing.hook.prepare(job, submission))

    def _send(self, context: Context, job: Any, intent: Record) -> JobRef:
        """Submit the job. Its intent is in the store."""
        return self._conversing.run(self._conversing.hook.submit(job, intent.submission))

    def get_job_status(self, external_id: JsonValue, context: Context) -> str:
        """Return the state of the recorded job as a :class:`~durable_spark.jobs.JobState` value."""
        record = self._recorded
        if record.verdict is not None:
            self._status = _status_of(record)
            self._release(record.job)
            return record.verdict.state.value
        self._expect_same_cluster(record)
        status = self._look(context)
        if status is None:
            return JobState.UNKNOWN.value
        self._status = status = self._killed_if_gone(status)
        if status.state is JobState.ABSENT and self.on_lost == "fail":
            self.after_end()
            self._release(status.job)
            raise JobLost(self._lost_message(status))
        if status.state.final:
            self._save(context, dataclasses.replace(self._recorded, verdict=Verdict.of(status)))
            self._release(status.job)
        elif status.state.active:
            self._warn_of_changed_arguments(context)
        return status.state.value

    def is_job_active(self, status: str) -> bool:
        """Return whether the job may still run."""
        return JobState(status).active

    def is_job_succeeded(self, status: str) -> bool:
        """Return whether the cluster vouched for a success."""
        return JobState(status) is JobState.SUCCEEDED

    def poll_until_complete(self, external_id: JsonValue, context: Context) -> Any:
        """Defer until the job has ended (or wait for it, if not deferrable). Returns the result."""
        self._status = self._status or self._look(context)
        self._push_job(context)
        self.mirror(context, str(self._recorded.job))
        if self._status is not None and self._status.state.final:
            return self._finish(context, self._status)
        arguments = self._trigger_arguments(context)
        if not self.deferrable:
            return self._wait_here(context, arguments)
        self._expect_still_wanted(context)
        return self._defer(arguments)

    def get_job_result(self, external_id: JsonValue, context: Context) -> str:
        """Return the job's ID."""
        job = self._recorded.job
        self._push_job(context)
        return job.id if job is not None else str(external_id)

    # What is to be done: the record

    def _resolve(self, context: Context) -> None:
        """Read the record and settle everything that must be settled before the mixin decides."""
        self._load(context)
        mirrored = store_of(context).get(self.external_id_key)
        # The fence: if this is refused, an older try reads here, and what it has read means nothing.
        write(context, TRY_XCOM_KEY, str(context["ti"].id), for_ever=False)
        self._push_try(context, self._record.submission.token if self._record else "")
        self._adopt_what_upstream_submitted(context, mirrored)
        record = self._record
        if record is None:
            self._look_for_unrecorded_jobs(context)
            return
        if (record.generation, record.fingerprint) != (generation_of(context), fingerprint_of(context)):
            self._after_clear(context, record)
        elif record.job is None:
            self._expect_same_cluster(record)
            self.log.info(
                "An earlier try died while it submitted: looking for its job (token %s)", record.submission.token
            )
            if (found := self._find(context, record)) is not None:
                self._status = found.status
                self._save(context, dataclasses.replace(record, job=found.status.job))

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

    def _adopt_what_upstream_submitted(self, context: Context, job_id: JsonValue) -> None:
        """Take up a job ID under upstream's key that our record does not list: upstream's operator ran since."""
        prior = self._record
        if not isinstance(job_id, str) or (prior is not None and prior.lists(job_id)):
            return
        status = self._poll_or_none(JobRef(job_id))
        cleared = context["ti"].max_tries != self.retries
        if cleared and (status is None or status.state is JobState.UNKNOWN):
            raise ClusterUnreachable(
                f"whether {job_id}, which another operator submitted, ended before this task was cleared cannot be "
                "told now; nothing was submitted"
            )
        record = self._adopted(context, JobRef(job_id), self._new_submission(context, prior), prior=prior)
        if status is not None and status.state.final:
            record = dataclasses.replace(record, verdict=Verdict.of(status))
        if status is None or status.state.active or not cleared:
            self.log.info("Adopting %s, which another operator stored under %s", job_id, self.external_id_key)
            self._save(context, record)
        else:
            self.log.info("%s ended before this task was cleared: running again", job_id)
            self._record, self._anew = record, True

    def _adopted(self, context: Context, job: JobRef, submission: Submission, *, prior: Record | None) -> Record:
        """Return a record for a job that exists already."""
        talk = self._conversing
        return Record(
            submission=submission,
            generation=generation_of(context),
            fingerprint=fingerprint_of(context),
            arguments="",
            cluster=tuple(talk.run(talk.hook.cluster())),
            intended_at=time.time(),
            job=job,
            previous=prior.as_previous() if prior else (),
        )

    def _look_for_unrecorded_jobs(self, context: Context) -> None:
        """Without a record on a later try, look for live jobs that carry our label: it may have been deleted."""
        if context["ti"].try_number < 2:
            return
        talk = self._conversing
        try:
            owned = talk.run(talk.hook.find_owned(deployment(), owner_of(context)))
        except NotImplementedError:
            return
        if not owned:
            return
        names = ", ".join(str(job.status.job) for job in owned)
        if not deployment():
            raise BadConfiguration(
                f"this try has no record, but {names} carries the label of this task and still runs. Nothing was "
                "killed and nothing submitted, because [durable_spark] deployment is not set and the job may be "
                f"another deployment's. Set it, or look at the job yourself. {way_out(context)}"
            )
        if self.on_clear == "reconnect" and len(owned) == 1:
            self.log.info("Following %s on: it carries the label of this task, which has no record of it", names)
            submission = dataclasses.replace(self._new_submission(context, None), token=owned[0].token)
            self._save(context, self._adopted(context, owned[0].status.job, submission, prior=None))
            return
        for job in owned:
            self.log.warning("Killing %s: it carries the label of this task, which has no record of it", job.status.job)
            self._kill_and_see_dead(job.status.job)

    # What is to be done: after a clear

    def _after_clear(self, context: Context, record: Record) -> None:
        """See the old generation's job dead (or take it up, if so asked) before the new one submits."""
        why = (
            "The mapped arguments have changed"
            if record.fingerprint != fingerprint_of(context)
            else "The task was cleared"
        )
        self._anew = True
        if record.verdict is not None:
            self.log.info("%s: running again (the last job ended as %s)", why, record.verdict.state.value)
            self._release(record.job)
            return
        self._expect_same_cluster(record)
        if record.job is None and (found := self._find(context, record)) is not None:
            record = dataclasses.replace(record, job=found.status.job)
        if record.job is None:
            self.log.info("%s: running again (the last submission never reached the cluster)", why)
            self._release(record.submission.job)
            return
        job = record.job
        status = self._poll_or_none(job)
        if status is not None and (found := self._successor(context, record, status)) is not None:
            job, status = found.status.job, found.status
            record = record.moved_to(job)
        if status is not None and status.state.final:
            self.log.info("%s: running again (its job %s ended as %s)", why, job, status.raw)
            self._release(job)
            return
        same_item = record.fingerprint == fingerprint_of(context)
        if self.on_clear == "reconnect" and same_item and (status is None or status.state.active):
            self.log.info("%s: following %s on, as on_clear='reconnect' asks", why, job)
            self._anew = False
            self._save(context, dataclasses.replace(record, generation=generation_of(context)))
            return
        self.log.warning("%s: killing its job %s before it runs again", why, job)
        self._save(context, record)
        self._kill_and_see_dead(job, submission=record.submission)

    def _kill_and_see_dead(self, job: JobRef, *, submission: Submission | None = None) -> None:
        """
        Kill a job and wait until it is seen dead.

        :raises JobEnded: when that takes longer than ``kill_timeout``. Nothing was submitted.
        """
        talk = self._conversing
        until = time.monotonic() + self.kill_timeout
        trouble = "it is still alive"
        while time.monotonic() < until:
            try:
                talk.run(talk.hook.kill(job))
                status = talk.run(talk.hook.poll([job]))[job]
                if status.state is JobState.RELAUNCHED and submission is not None:
                    found = talk.run(talk.hook.find(submission))
                    if isinstance(found, Found) and found.status.job != job:
                        job = found.status.job
                        continue
                trouble = f"it is still {status.raw or status.state.value}"
                if status.state is JobState.ABSENT:
                    self.log.warning("The cluster does not know %s any more: taken for dead", job)
                    self._release(job)
                    return
                if status.state.final:
                    self.log.info("%s is %s", job, status.raw)
                    self._release(job)
                    return
            except (ClusterError, SubmissionUncertain) as error:
                trouble = str(error)
            talk.run(asyncio.sleep(_LOOK_AGAIN_AFTER))
        raise JobEnded(
            f"the old job {job} was not seen dead within {self.kill_timeout:.0f} s ({trouble}); nothing was submitted"
        )

    # What is to be done: the cluster

    def _expect_same_cluster(self, record: Record) -> None:
        talk = self._conversing
        names = talk.run(talk.hook.cluster())
        if record.cluster and not set(names) & set(record.cluster):
            raise ClusterChanged(
                f"connection {self.conn_id!r} names {', '.join(names)}, but job "
                f"{record.job or record.submission.token} was submitted to {', '.join(record.cluster)}. "
                "Restore the connection, or end that job and clear its record"
            )

    def _find(self, context: Context, record: Record) -> Found | None:
        """Return the submission's job, ``None`` if it is proven absent; kill jobs that came beside it."""
        talk = self._conversing
        try:
            found = talk.run(talk.hook.find(record.submission))
        except SubmissionUncertain as error:
            raise SubmissionUncertain(f"{error}. {way_out(context)}", permanent=error.permanent) from error
        if not isinstance(found, Found):
            self.log.info("Its job does not exist on the cluster: nothing was submitted")
            return None
        self.log.info("Found %s", found.status.job)
        for younger in found.younger:
            self.log.error("Killing %s: it carries the token of %s, and only one was meant", younger, found.status.job)
            self._save(context, record)
            try:
                self._kill(younger)
            except RequestRefused as error:  # it may be another user's, who has copied our labels
                self.log.error("%s could not be killed, look at it yourself: %s", younger, error)
        return found

    def _kill(self, job: JobRef) -> None:
        """Kill a job whose end nobody waits for."""
        self._conversing.run(self._conversing.hook.kill(job))
        self._release(job)

    def _kill_noted(self, context: Context, record: Record, job: JobRef) -> None:
        """Kill the task's job, and have that in the record before, unless the cluster does not take the kill."""
        self._save(context, dataclasses.replace(record, killing=True))
        try:
            self._conversing.run(self._conversing.hook.kill(job))
        except (AuthenticationFailed, RequestRefused):  # nobody has killed it: if it is gone one day, it is lost
            self._save(context, dataclasses.replace(record, killing=False))
            raise

    def _release(self, job: JobRef | None) -> None:
        """Let go of a job that this task has done with. What fails here is no reason to fail the task."""
        if job is None:
            return
        talk = self._conversing
        try:
            talk.run(talk.hook.release(job))
        except Exception as error:
            self.log.warning("What the cluster keeps of %s could not be let go of: %r", job, error)

    def _release_unless_followed_on(self, context: Context, job: JobRef) -> None:
        """Let go of a job, but not while its end is not recorded and a retry follows that will look for it."""
        ti, record = context["ti"], self._record
        ended = record is not None and record.verdict is not None
        if ended or not self.durable or ti.try_number > ti.max_tries:
            self._release(job)

    def _poll_or_none(self, job: JobRef) -> JobStatus | None:
        """Return the job's status, ``None`` when the cluster is out of reach."""
        talk = self._conversing
        try:
            status = talk.run(talk.hook.poll([job]))[job]
            if status.state is JobState.ABSENT:
                talk.run(asyncio.sleep(_LOOK_AGAIN_AFTER))
                status = talk.run(talk.hook.poll([job]))[job]
        except ClusterError as error:
            self.log.warning("No word of %s yet: %s", job, error)
            return None
        return status

    def _look(self, context: Context) -> JobStatus | None:
        """Return the status of the recorded job, or of the one that the cluster itself started in its place."""
        record = self._recorded
        assert record.job is not None  # noqa: S101 the mixin asks only for a job that it was given
        status = self._poll_or_none(record.job)
        found = self._successor(context, record, status) if status is not None else None
        if found is None:
            return status
        self._save(context, record.moved_to(found.status.job))
        return found.status

    def _successor(self, context: Context, record: Record, status: JobStatus) -> Found | None:
        """Return the job that the cluster itself started in the place of one that was relaunched, or is not known."""
        if status.state not in (JobState.RELAUNCHED, JobState.ABSENT):
            return None
        try:
            found = self._find(context, record)
        except (ClusterError, SubmissionUncertain) as error:
            passing = not (isinstance(error, SubmissionUncertain) and error.permanent)
            if passing and status.state is JobState.ABSENT and self.on_lost == "resubmit":
                raise  # the next try looks again, rather than submit beside a successor
            self.log.info("Whether %s has a successor cannot be told: %s", status.job, error)
            return None
        return found if found is not None and found.status.job != status.job else None

    def _give_way(self, context: Context, job: JobRef, submission: Submission) -> None:
        """Another try is in charge: kill our job only if it is one too many."""
        talk = self._conversing
        one_too_many: dict[JobRef, str] = {}
        in_charge = context["ti"].xcom_pull(task_ids=context["ti"].task_id, key=TRY_XCOM_KEY)
        another = isinstance(in_charge, Mapping) and in_charge.get("token") not in (None, "", submission.token)
        if another:
            one_too_many[job] = "the try in charge runs another submission"
        with contextlib.suppress(DurableJobError):
            found = talk.run(talk.hook.find(submission))
            if isinstance(found, Found):  # ours may not be the one that was seen first
                first, others = found.status.job, found.younger
                if first != job and job not in others and found.status.state.active:
                    others = (*others, job)
                if another and found.status.state.active:
                    others = (first, *others)
                for each in others:
                    one_too_many.setdefault(each, f"{first} is the job of this submission")
        if not one_too_many:
            self.log.warning("Another try is in charge: leaving %s to it", job)
        for each, reason in one_too_many.items():
            self.log.error("Another try is in charge, and %s: killing %s", reason, each)
            self._kill(each)

    # Waiting and ending

    def _trigger_arguments(self, context: Context) -> JobTriggerArguments:
        from durable_spark.triggers.job import JobTriggerArguments

        ti, record = context["ti"], self._recorded
        assert record.job is not None  # noqa: S101
        timeout: timedelta | None = self.execution_timeout
        # Airflow's own timer does it for a task that waits on its worker.
        deadline = ti.start_date.timestamp() + timeout.total_seconds() if timeout and self.deferrable else None
        quiet = conf.getfloat("durable_spark", "earliest_event", fallback=10.0) if self.deferrable else 0.0
        return JobTriggerArguments(
            hook=self.hook_path,
            conn_id=self.conn_id,
            cluster=record.cluster,
            job=record.job,
            submission=record.submission,
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            task_id=ti.task_id,
            map_index=map_index(ti),
            ti_id=str(ti.id),
            deadline=deadline,
            quiet=quiet,
            interval=self.poll_interval,
            outage_timeout=self.outage_timeout,
            start_timeout=self.start_timeout,
            kill=self.kill_jobs,
            kill_on_timeout=self.on_timeout == "kill",
            sent_before=self._sent_before,
            push_links=self.deferrable,
        )

    def _defer(self, arguments: JobTriggerArguments) -> NoReturn:
        from durable_spark.triggers.job import JobTrigger

        left = None if arguments.deadline is None else arguments.deadline - time.time() + _BACKSTOP_MARGIN
        self.log.info("Deferring: %s is followed from the triggerer", arguments.job)
        self.defer(trigger=JobTrigger(arguments.to_json()), method_name="execute_complete", timeout=left)

    def _left(self, context: Context) -> float | None:
        """Return the seconds until a little after Airflow's own timer has ended this process' work."""
        if self.execution_timeout is None:
            return None
        elapsed = time.time() - context["ti"].start_date.timestamp()
        return max(0.0, self.execution_timeout.total_seconds() - elapsed) + _TIMER_MARGIN

    def _wait_here(self, context: Context, arguments: JobTriggerArguments) -> Any:
        from durable_spark.triggers.job import JobEvent, JobTrigger

        talk = self._conversing
        try:
            waiting = first_event(JobTrigger(arguments.to_json()))
            event = talk.run(talk.until_interrupted(waiting, timeout=self._left(context)))
        except AirflowTaskTimeout:
            raise self._deadline_passed(context, arguments.job, killed_by_trigger=False) from None
        if event is not None:
            return self._complete(context, JobEvent.from_json(event))
        if self.kill_jobs:
            self.log.warning("Told to stop: killing %s", arguments.job)
            self._kill_noted(context, self._recorded, arguments.job)
            self._release(arguments.job)
        else:
            self._expect_still_wanted(context)
            self._release_unless_followed_on(context, arguments.job)
        raise AirflowException(f"Told to stop while waiting for {arguments.job}")

    def _expect_still_wanted(self, context: Context) -> None:
        """Before letting go of the job, see whether a person has ended the task meanwhile."""
        from durable_spark.triggers.job import state_of

        ti, job = context["ti"], self._recorded.job
        try:
            state = state_of(dag_id=ti.dag_id, run_id=ti.run_id, task_id=ti.task_id, map_index=map_index(ti))
        except Exception as error:
            self.log.warning("The state of this task could not be read: %s", error)
            return
        if state not in ENDED_BY_A_PERSON:
            return
        if job is not None and self.kill_jobs:
            self.log.warning("This task is %s by now: killing %s", state or "gone", job)
            if state is not None:
                self._kill_noted(context, self._recorded, job)
                self._release(job)
            else:  # nobody else can be in charge of what is gone, and there is no record any more
                self._kill(job)
        else:
            self._release(job)
        raise AirflowException(f"This task was set to {state or 'removed'} meanwhile")

    def _complete(self, context: Context, event: JobEvent) -> Any:
        if self._record is None:
            self._load(context)
        record = self._record
        if record is None:
            record = self._unrecorded(context, event.job, token=event.token)
        if record.submission.token != event.token:
            raise AirflowException("The trigger's event is about an earlier submission of this task")
        self._record = record.moved_to(event.job)
        if event.kind == "timeout":
            raise self._deadline_passed(context, event.job, killed_by_trigger=event.confirmed, message=event.message)
        if event.kind == "outage":
            self._release_unless_followed_on(context, event.job)
            raise OutageTooLong(f"{event.job}: {event.message}. It may still run: the next try reconnects")
        state = JobState.ABSENT if event.kind == "lost" else JobState(event.kind)
        status = JobStatus(job=event.job, state=state, raw=event.state, message=event.message)
        status = self._killed_if_gone(status)
        return self._lost(context, status) if status.state is JobState.ABSENT else self._finish(context, status)

    def _killed_if_gone(self, status: JobStatus) -> JobStatus:
        """Return the status; a job that is gone after this task has asked for its kill was killed, not lost."""
        if status.state is not JobState.ABSENT or not self._recorded.killing:
            return status
        return dataclasses.replace(status, state=JobState.KILLED, message="killed by an earlier try of this task")

    def _unrecorded(self, context: Context, job: JobRef, *, token: str | None = None) -> Record:
        """Return a record for a job that has none, because the task is not durable or its record was deleted."""
        return Record(
            submission=Submission(token=token or new_token()),
            generation=generation_of(context),
            fingerprint=fingerprint_of(context),
            arguments="",
            cluster=(),
            intended_at=time.time(),
            job=job,
        )

    def _job_of_this_try(self, context: Context) -> JobRef | None:
        if self._record is not None:
            return self._record.job
        job_id = context["ti"].xcom_pull(task_ids=context["ti"].task_id, key=self.external_id_key)
        return JobRef(job_id) if isinstance(job_id, str) else None

    def _finish(self, context: Context, status: JobStatus) -> str:
        """
        Write the verdict, then return the job's ID or raise.

        :raises JobFailed, JobKilled: with the cluster's words and the end of the job's log.
        """
        self._save(context, dataclasses.replace(self._recorded.moved_to(status.job), verdict=Verdict.of(status)))
        self.mirror(context, status.job.id)
        if status.state is JobState.SUCCEEDED:
            self.log.info("%s is %s", status.job, status.raw or "succeeded")
            self._release(status.job)
            return status.job.id
        what = f"{status.job} ended as {status.raw or status.state.value}"
        if status.message:
            what += f": {status.message}"
        tail = self._log_tail(status.job)
        self._release(status.job)
        if tail:
            what += "\nThe last lines of its log:\n" + "\n".join(tail)
        raise (JobKilled if status.state is JobState.KILLED else JobFailed)(what)

    def _log_tail(self, job: JobRef) -> Sequence[str]:
        """Return the end of the job's log. What fails here must not hide how the job ended."""
        talk = self._conversing
        try:
            return talk.run(talk.hook.log_tail(job, self.log_lines))
        except Exception as error:
            self.log.warning("The log of %s could not be read: %r", job, error)
            return ()

    def _lost(self, context: Context, status: JobStatus) -> Any:
        if self.on_lost == "fail":
            self.after_end()
            self._release(status.job)
            raise JobLost(self._lost_message(status))
        last = self._look(context)
        if last is None or last.state is not JobState.ABSENT:
            raise OutageTooLong(f"{status.job} is known again, or the cluster is out of reach: the next try reconnects")
        self.log.warning(
            "%s is not known to the cluster any more: submitting anew, as on_lost='resubmit' asks", status.job
        )
        self._save(context, dataclasses.replace(self._recorded, verdict=Verdict.of(status)))
        self._release(status.job)
        job_id = self.submit_job(context)
        self.mirror(context, job_id)
        return self.poll_until_complete(job_id, context)

    def _lost_message(self, status: JobStatus) -> str:
        return (
            f"the cluster does not know {status.job} any more, and its end was not seen: it may have succeeded or "
            "failed. Look at what it was to write; then clear the task to run it again, or mark it as succeeded. "
            "on_lost='resubmit' submits anew by itself"
        )

    def _deadline_passed(
        self, context: Context, job: JobRef, *, killed_by_trigger: bool, message: str = ""
    ) -> DeadlinePassed:
        """See the job dead, unless it is to be kept, let go of it, and return what to raise."""
        passed = self._end_at_deadline(context, job, killed_by_trigger=killed_by_trigger, message=message)
        self._release_unless_followed_on(context, job)
        return passed

    def _end_at_deadline(
        self, context: Context, job: JobRef, *, killed_by_trigger: bool, message: str
    ) -> DeadlinePassed:
        talk, record = self._conversing, self._record or self._unrecorded(context, job)
        what = f"the execution timeout of {self.execution_timeout} passed"
        if killed_by_trigger:
            self._save(context, dataclasses.replace(record, verdict=_killed(message)))
            return DeadlinePassed(f"{what}: {job} was killed")
        if self.on_timeout == "keep":
            return DeadlinePassed(f"{what}: {job} was left running, as on_timeout='keep' asks")
        try:
            self._expect_same_cluster(record)
            self._kill_noted(context, record, job)
            until = time.monotonic() + _KILL_CONFIRMED_WITHIN
            while time.monotonic() < until:
                status = talk.run(talk.hook.poll([job]))[job]
                if status.state.final or status.state is JobState.ABSENT:
                    self._save(context, dataclasses.replace(record, verdict=Verdict.of(status)))
                    return DeadlinePassed(f"{what}: {job} was killed and is {status.raw or 'gone'}")
                talk.run(asyncio.sleep(_LOOK_AGAIN_AFTER))
        except (ClusterError, ClusterChanged) as error:
            return DeadlinePassed(f"{what}, but {job} could not be killed and may still run: {error}")
        return DeadlinePassed(f"{what}: {job} was killed, but not seen dead yet")

    # What others see

    def _push_try(self, context: Context, token: str) -> None:
        """Say which try is in charge, before looking at the cluster: the trigger and an older try read it."""
        ti = context["ti"]
        ti.xcom_push(key=TRY_XCOM_KEY, value={"token": token, "ti_id": str(ti.id)})

    def _push_job(self, context: Context) -> None:
        job = self._recorded.job
        if job is None:
            return
        if self.do_xcom_push:
            context["ti"].xcom_push(key=self.external_id_key, value=job.id)
        for link, url in (self._status.links if self._status else {}).items():
            context["ti"].xcom_push(key=link.xcom_key, value=url)

    def _warn_of_changed_arguments(self, context: Context) -> None:
        record = self._recorded
        try:
            digest = digest_of(record.submission.token, self.describe_job())
        except BadArguments as error:
            self.log.warning(
                "The arguments of this task are wrong by now, but its job runs with the old ones: %s", error
            )
            return
        if record.arguments and record.arguments != digest:
            self.log.warning("The arguments of this task have changed; %s runs on with the old ones", record.job)

    def _forget_upstream_status(self, context: Context) -> None:
        if self.durable:
            store_of(context).delete(_UPSTREAM_DRIVER_STATUS)

    # The conversation with the cluster

    @property
    def _recorded(self) -> Record:
        if self._record is None:
            raise RuntimeError("there is no record yet")
        return self._record

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


class _StoredJobID:
    """The task state store as the mixin sees it: under its key stands the job of our record; the rest is as it is."""

    def __init__(self, operator: DurableJobOperator, context: Context) -> None:
        self._operator = operator
        self._context = context
        self._store = store_of(context)

    def get(self, key: str, default: JsonValue = None) -> JsonValue:
        """Return the ID of the job to decide about, if there is one."""
        operator = self._operator
        if key != operator.external_id_key:
            return cast("JsonValue", self._store.get(key, default))
        record = operator._record
        return default if record is None or record.job is None or operator._anew else record.job.id

    def set(self, key: str, value: JsonValue, *, retention: timedelta | None = None) -> None:
        """Mirror the ID that was just submitted; the record has it already."""
        if key != self._operator.external_id_key:
            self._store.set(key, value, retention=retention)
            return
        self._operator.mirror(self._context, value)

    def delete(self, key: str) -> None:
        """Delete a key."""
        self._store.delete(key)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise Airflow's exceptions for ours: what must not be retried fails, the rest honours retries."""
    try:
        yield
    except (BadArguments, JobLost) as error:
        raise AirflowFailException(f"{type(error).__name__}: {error}") from error
    except SubmissionUncertain as error:
        kind = AirflowFailException if error.permanent else AirflowException
        raise kind(f"SubmissionUncertain: {error}") from error
    except DeadlinePassed as error:
        raise AirflowTaskTimeout(f"DeadlinePassed: {error}") from error
    except DurableJobError as error:
        raise AirflowException(f"{type(error).__name__}: {error}") from error


def _one_of(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {' or '.join(map(repr, allowed))}, not {value!r}")


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is a number greater than 0, not {value!r}")


def _status_of(record: Record) -> JobStatus:
    assert record.job is not None and record.verdict is not None  # noqa: S101, PT018
    verdict = record.verdict
    return JobStatus(job=record.job, state=verdict.state, raw=verdict.raw, message=verdict.message)


def _killed(message: str) -> Verdict:
    return Verdict(state=JobState.KILLED, raw="KILLED", message=message, at=time.time())
