"""
The synchronous half: reads the record, decides, submits once, stores, defers; later returns or raises.

:class:`DurableJobOperator` joins two things that Airflow has apart. ``ResumableJobMixin`` keeps a job's
ID in the task state store, so that a retry decides between *reconnect*, *already succeeded* and
*submit again*; its decision tree, metrics and spans are used as they are. Deferral moves the wait to
the triggerer. Around both stands the record (:class:`~durable_spark.jobs.Record`), which closes the
window that the mixin names in its docstring: the intent is written before anything is sent, so that a
job whose worker died before it could store the ID is found again.

What flows in: a hook, a description of a job. What flows out: the job's ID, or an exception of Airflow's. What is
decided is here; below it are the record (:mod:`~durable_spark.operators._recorded`), what is said to the cluster
(:mod:`~durable_spark.operators._cluster`) and what the end of a job comes to
(:mod:`~durable_spark.operators._ending`), with a trap each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowTaskTimeout,
    TaskDeferralError,
    TaskDeferralTimeout,
)

from durable_spark.hooks.job import JobHook
from durable_spark.jobs import (
    BadArguments,
    BadConfiguration,
    ClusterUnreachable,
    DeadlinePassed,
    DurableJobError,
    JobEnded,
    JobLost,
    JobRef,
    JobState,
    JobStatus,
    Link,
    OutageTooLong,
    Record,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
    Verdict,
    utc,
)
from durable_spark.links import JobHistoryLink, JobLink, JobLogLink, JobTrackingLink, StoredLink
from durable_spark.operators._conversation import Conversation, first_event
from durable_spark.operators._ending import EndingTask
from durable_spark.operators._store import (
    Superseded,
    deployment,
    digest_of,
    generation_of,
    map_index,
    owner_of,
    store_of,
    way_out,
)
from durable_spark.operators._telling import push_decision, submission_span

if TYPE_CHECKING:
    from datetime import timedelta

    from airflow.sdk import BaseOperatorLink, Context
    from pydantic import JsonValue

    from durable_spark.triggers.job import JobTriggerArguments

__all__ = ["DurableJobOperator"]

_BACKSTOP_MARGIN = 120.0
"""Seconds after the deadline at which Airflow itself ends the deferral, should the trigger not have."""
_TIMER_MARGIN = 2.0
_UPSTREAM_DRIVER_STATUS = "k8s_driver_status"
"""Where upstream's SparkSubmitOperator caches a pod's end, and believes it of the next pod, too."""
_ANOTHER = "another"
"""What a try that will submit anew says in place of a token: no job that an older process still submits is wanted."""


class DurableJobOperator(EndingTask):
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
    operator_extra_links: Collection[BaseOperatorLink] = (JobLink(), JobLogLink(), JobTrackingLink(), JobHistoryLink())
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
        self._anew = self._old_is_dead = False
        self._status: JobStatus | None = None
        self._kill_requested = False
        self._mirrored: tuple[JsonValue, bool] | None = None
        self._pushed: dict[str, str] = {}
        self._fingerprint: str | None = None
        self._adopted = False
        self._reason = ("fresh_submit", "there is no earlier submission")

    # What Airflow calls

    def execute(self, context: Context) -> Any:
        """Submit the job, or take up the one that an earlier try has submitted, and wait for its end."""
        if self.retries == 0 and self.durable and context["ti"].try_number <= 1:
            self.log.warning("retries=0: there is no try in which the job of a dead worker could be found again")
        return self._take_up(context)

    def execute_again(self, context: Context, event: Any = None) -> Any:
        """Go on where :meth:`execute` waited until it can be told whether a submission has become a job."""
        return self._take_up(context)

    def _take_up(self, context: Context) -> Any:
        while True:
            told = False
            with self._answering(context):
                try:
                    if not self.durable:
                        return self.execute_resumable(context)
                    self._resolve(context)
                    told = True
                    view = cast("Context", {**context, "task_state_store": _StoredJobID(self, context)})
                    return self.execute_resumable(view)
                except DurableJobError as error:
                    untold = self._is_untold(error)
                    if untold and time.time() < self._word_due(context):
                        self._wait_for_word(context, error, told=told)
                        continue
                    self._tell_failure(context, error)
                    if untold and self._is_past_deadline(context):
                        raise self._deadline_passed(str(error)) from error
                    raise

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """Write down the verdict that the trigger brought, then return or raise."""
        from durable_spark.triggers.job import JobEvent

        with self._answering(context):
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
            with self._answering(context):
                self._load(context)
                if (job := self._job_of_this_try(context)) is None:
                    if self._word_due(context) == self._deadline(context):
                        raise self._deadline_passed("no job is known") from None
                    raise OutageTooLong(f"no job is known: no word for {self.outage_timeout:.0f} s") from None
                self._fold_in_the_triggers_kill(self._noted(context))
                return self._conclude(context, self._end_at_deadline(context, job))
        except TaskDeferralError as error:
            with translated():
                self._load(context)
                if self._fold_in_the_triggers_kill(self._noted(context)):
                    self._save(context, self._recorded)
            raise TaskDeferralError(f"{error}{self._leftover(context, error)}") from error

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
        if self._is_past_deadline(context):
            raise self._deadline_passed("nothing was submitted")
        job = self.build_job(context)
        prior = self._record
        resend = prior is not None and prior.job is None and not self._anew
        submission = prior.submission if prior and resend else self._new_submission(context, prior)
        if resend:
            self._reason = ("resend", "the job of the record's submission does not exist on the cluster")
        self._fence(context)  # what was found so far may have taken minutes, and an XCom has no fence of its own
        self._push_try(context, submission.token)
        with submission_span(submission, conn_id=self.conn_id) as span:
            prepared = self._prepare(job, submission)
            resent = prior is not None and resend and not prior.refused
            if resent and submission.cluster_time is not None:
                # A request of the worker that died may still arrive: its job must not look older than the intent.
                prepared = dataclasses.replace(prepared, cluster_time=submission.cluster_time)
            previous = () if prior is None else prior.previous if resend else prior.as_previous()
            intent = dataclasses.replace(self._record_of(context, prepared, previous=previous), resent=resent)
            ref = self._submit(context, job, intent, span)
        self._anew = False
        self._status = None
        decision, why = self._reason
        push_decision(context, decision, why=why, job=ref, submission=prepared)
        return ref.id

    def _submit(self, context: Context, job: Any, intent: Record, span: Any) -> JobRef:
        """Write the intent, send the submission, write the ID."""
        submission = intent.submission
        span.set_attribute("durable_spark.cluster", intent.cluster)
        self._save(context, intent)
        self._forget_upstream_status(context)
        if self._kill_requested:
            raise AirflowException("Told to stop before the job was submitted: nothing was submitted")
        ref = self._send(context, job, intent)
        span.set_attribute("durable_spark.job_id", ref.id)
        self._count(context, "submissions")
        self.log.info("Submitted as %s in %s, because %s", ref, self._origin(intent), self._reason[1])
        try:
            self._save(context, dataclasses.replace(intent, job=ref))
        except Superseded:
            self._give_way(context, ref, submission)
            raise
        if self._kill_requested:  # there are five seconds between SIGTERM and SIGKILL
            self._expect_still_wanted(context)
        return ref

    def _prepare(self, job: Any, submission: Submission) -> Submission:
        """Check the job and return the submission with all that is needed to find it again. Nothing is submitted."""
        return self._conversing.run(self._conversing.hook.prepare(job, submission))

    def _send(self, context: Context, job: Any, intent: Record) -> JobRef:
        """Submit the job. Its intent is in the store."""
        try:
            return self._conversing.run(self._conversing.hook.submit(job, intent.submission))
        except SubmissionRefused:
            if not intent.resent:  # else an earlier request may be on its way
                self._save(context, dataclasses.replace(intent, refused=True))
            raise

    def get_job_status(self, external_id: JsonValue, context: Context) -> str:
        """Return the state of the recorded job as a :class:`~durable_spark.jobs.JobState` value."""
        record = self._recorded
        if record.verdict is not None:
            self._status = status = _status_of(record)
            self._release(record.job)
            self._tell_found(context, status, f"the record says {status.raw or status.state.value}")
            return status.state.value
        self._expect_same_cluster(record)
        if (seen := self._look(context)) is None:
            self._status = JobStatus(job=JobRef(str(external_id)), state=JobState.UNKNOWN)
            self._tell_found(context, self._status, "the cluster is out of reach, and waited for")
            return JobState.UNKNOWN.value
        self._status = status = self._killed_if_gone(seen)
        self._tell_found(context, status, f"the cluster says {status.raw or status.state.value}")
        if status.state is JobState.ABSENT and self.on_lost == "fail":
            raise self._job_lost(context, status)
        if status.state.final:
            self._save(context, dataclasses.replace(self._recorded, verdict=Verdict.of(status)))
            self._release(status.job)
        elif status.state in (JobState.PENDING, JobState.RUNNING) and self._recorded.unanswered:
            # The kill of an earlier try has not arrived. If the job is gone one day, that was not this task.
            self._save(context, dataclasses.replace(self._recorded, killing=False, unanswered=False))
        if status.state.active or status.state is JobState.SUCCEEDED:
            self._warn_of_changed_arguments(context, status)
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
        self.mirror(context, str(self._recorded.job))
        self._push_job(context)
        if self._status is not None and self._status.state.final:
            return self._finish(context, self._status)
        job = self._recorded.job
        assert job is not None  # noqa: S101 the mixin gives us one that is in the record
        arguments = self._trigger_arguments(context, job)
        if not self.deferrable:
            return self._wait_here(context, arguments)
        self._expect_still_wanted(context)
        return self._defer(arguments)

    def get_job_result(self, external_id: JsonValue, context: Context) -> str:
        """Return the job's ID."""
        job = self._recorded.job
        self.mirror(context, job.id if job is not None else str(external_id))  # the try that was to may have died
        self._push_job(context)
        return job.id if job is not None else str(external_id)

    # What is to be done: the record

    def _resolve(self, context: Context) -> None:
        """Read the record and settle everything that must be settled before the mixin decides."""
        self._load(context)
        self._anew, self._adopted, self._status = False, False, None
        mirrored = store_of(context).get(self.external_id_key)
        self._fence(context)  # if this is refused, an older try reads here, and what it has read means nothing
        record = self._record
        cleared = record is not None and self._is_cleared(context, record)
        follows = record is not None and (not cleared or self.on_clear == "reconnect")
        self._push_try(context, record.submission.token if record and follows else _ANOTHER if record else "")
        self._push_job(context)
        self._adopt_what_upstream_submitted(context, mirrored)
        record = self._record
        if record is None:
            self._look_for_unrecorded_jobs(context)
        elif self._is_cleared(context, record):
            self._after_clear(context, record)
        elif record.job is None:
            self._expect_same_cluster(record)
            self.log.info("The record names no job of its %s: looking for it", self._origin(record))
            if (found := self._find(context, record)) is not None:
                self._status = found.status
                self._save(context, dataclasses.replace(record, job=found.status.job))
                why = "it carries the token of the record, which had no job yet"
                self._adopt(context, "adopt_found", "adoptions.found", why)

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
        record = self._record_of(
            context,
            self._new_submission(context, prior),
            job=JobRef(job_id),
            previous=prior.as_previous() if prior else (),
        )
        if status is not None and status.state.final:
            record = dataclasses.replace(record, verdict=Verdict.of(status))
        if status is None or status.state.active or not cleared:
            self._save(context, record)
            why = f"another operator stored it under {self.external_id_key}"
            self._adopt(context, "adopt_stored", "adoptions.stored", why)
        else:
            self._record = record
            self._run_anew(
                "clear_resubmit", f"{job_id}, which another operator stored, ended before the task was cleared"
            )

    def _adopt(self, context: Context, decision: str, what: str, why: str) -> None:
        """Say that a job is followed of which the record did not know."""
        record = self._recorded
        self._adopted = True
        self._count(context, what)
        self.log.info("%s %s: %s", "Found" if decision == "adopt_found" else "Adopting", record.job, why)
        push_decision(context, decision, why=why, job=record.job, submission=record.submission)

    def _run_anew(self, decision: str, why: str, *, dead: bool = True) -> None:
        """
        Have the mixin submit, whatever the record names.

        :param dead: whether what the record names is known not to run any more.
        """
        self._anew, self._old_is_dead = True, dead
        self._reason = (decision, why)

    def _look_for_unrecorded_jobs(self, context: Context) -> None:
        """Without a record on a later try, look for live jobs that carry our label: it may have been deleted."""
        if context["ti"].try_number < 2:
            return
        talk = self._conversing
        try:
            owned = talk.run(talk.hook.find_owned(deployment(), owner_of(context)))
        except NotImplementedError:
            return
        owned = [job for job in owned if job.status.state.active]  # not one that is only kept for its end
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
            submission = dataclasses.replace(self._new_submission(context, None), token=owned[0].token)
            self._save(context, self._record_of(context, submission, job=owned[0].status.job))
            why = "it carries the label of this task, which has no record of it"
            self._adopt(context, "adopt_labelled", "adoptions.labelled", why)
            return
        for job in owned:
            self.log.warning("Killing %s: it carries the label of this task, which has no record of it", job.status.job)
            self._kill_old(context, job.status.job)
        self._reason = ("clear_resubmit", f"{names}, of which there was no record, is dead")

    # What is to be done: after a clear

    def _after_clear(self, context: Context, record: Record) -> None:
        """See the old generation's job dead (or take it up, if so asked) before the new one submits."""
        same_item = record.fingerprint == self._fingerprint_of(context)
        why = "the task was cleared" if same_item else "the mapped arguments have changed"
        self._run_anew("clear_resubmit", why, dead=False)
        verdict = record.verdict
        # A success counts whatever there is beside it; a bad end does only when all else is dead.
        if verdict is not None and not (record.resent and verdict.state is JobState.SUCCEEDED):
            self._run_anew("clear_resubmit", f"{why}, and {record.job} has ended as {verdict.state.value}")
            self._release(record.job)
            return
        self._expect_same_cluster(record)
        if record.job is None and (found := self._find(context, record)) is not None:
            record = dataclasses.replace(record, job=found.status.job)
        if record.job is None:
            self._run_anew("clear_resubmit", f"{why}, and the last submission never reached the cluster")
            self._release(record.submission.job)
            return
        job = record.job
        status = self._poll_or_none(job) if verdict is None else _status_of(record)
        if status is not None and (another := self._successor(context, record, status, anew=True)) is not None:
            job, status = another.job, another
            record = record.moved_to(job)
        if status is not None and status.state.final:
            self._run_anew("clear_resubmit", f"{why}, and {job} has ended as {status.raw or status.state.value}")
            self._release(job)
            return
        if self.on_clear == "reconnect" and same_item and (status is None or status.state.active):
            self._anew = False
            self._save(context, dataclasses.replace(record, generation=generation_of(context)))
            self.log.info("Following %s on although %s: on_clear='reconnect'", job, why)
            return
        self.log.warning("Killing %s before this task runs again: %s", job, why)
        self._save(context, record)
        self._kill_old(context, job)
        self._run_anew("clear_resubmit", f"{why}, and {job} is dead")

    # Waiting and ending

    def _trigger_arguments(self, context: Context, job: JobRef) -> JobTriggerArguments:
        from durable_spark.triggers.job import JobTriggerArguments, digest_of_links

        ti, record = context["ti"], self._recorded
        # Airflow's own timer does it for a task that waits on its worker.
        deadline = self._deadline(context) if self.deferrable else None
        quiet = conf.getfloat("durable_spark", "earliest_event", fallback=10.0) if self.deferrable else 0.0
        return JobTriggerArguments(
            hook=self.hook_path,
            conn_id=self.conn_id,
            cluster=record.cluster,
            job=job,
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
            sent_before=record.resent,
            on_worker=not self.deferrable,
            deferred_at=time.time(),
            links=digest_of_links({link: url for link in Link if (url := self._pushed.get(link.xcom_key))}),
        )

    def _defer(self, arguments: JobTriggerArguments) -> NoReturn:
        from durable_spark.triggers.job import JobTrigger

        left = None if arguments.deadline is None else arguments.deadline - time.time() + _BACKSTOP_MARGIN
        self.log.info("Deferring: %s is followed from the triggerer", arguments.job)
        self.defer(trigger=JobTrigger(arguments.to_json()), method_name="execute_complete", timeout=left)

    def _left(self, context: Context) -> float | None:
        """
        Return the seconds until a little after Airflow's own timer has ended this process' work.

        That timer begins when the Dag has been read, seconds after the task's start perhaps: whoever went by the
        start alone would be interrupted by it while the job is killed.
        """
        if (deadline := self._deadline(context)) is None:
            return None
        timer, _ = signal.getitimer(signal.ITIMER_REAL)
        return max(0.0, deadline - time.time(), timer) + _TIMER_MARGIN

    # Waiting: until it can be told whether there is a job

    def _is_untold(self, error: DurableJobError) -> bool:
        """Whether the submission in the record may have become a job, and the cluster may yet tell."""
        from durable_spark.triggers.job import may_be_told_later

        record = self._record
        intent = record is not None and record.job is None and record.verdict is None
        return self.durable and intent and may_be_told_later(error)

    def _word_due(self, context: Context) -> float:
        """Return when the waiting ends, in seconds since the epoch."""
        given_up = float(context["ti"].start_date.timestamp()) + self.outage_timeout
        deadline = self._deadline(context)
        return given_up if deadline is None else min(given_up, deadline)

    def _wait_for_word(self, context: Context, error: DurableJobError, *, told: bool) -> None:
        """
        Wait until the cluster can tell whether the submission in the record has become a job.

        Deferred, the task goes on in :meth:`execute_again`.

        :param told: whether it could, and what failed is the sending: the trigger would be told at once, each time.
        """
        from durable_spark.triggers.feed import LONGEST_BACKOFF, asked_pause
        from durable_spark.triggers.job import SubmissionTrigger

        record, due = self._recorded, self._word_due(context)
        self.log.warning(
            "Whether there is a job of %s cannot be told now: %s. Nothing is submitted before it can; "
            "it is asked again until %s",
            self._origin(record),
            error,
            utc(due),
        )
        push_decision(context, "wait", why=str(error), job=None, submission=record.submission)
        unnamed = JobRef(f"the job of token {record.submission.token[:8]}…")
        arguments = dataclasses.replace(self._trigger_arguments(context, unnamed), deadline=due)
        if told:
            waited = time.time() - float(context["ti"].start_date.timestamp())  # ever more seldom, without a counter
            own = max(self.poll_interval or JobHook.default_poll_interval, min(waited / 4, LONGEST_BACKOFF))
            pause = max(own, asked_pause(error))
            arguments = dataclasses.replace(arguments, quiet=max(arguments.quiet, min(pause, due - time.time())))
        trigger = SubmissionTrigger(arguments.to_json())
        if self.deferrable:
            self._expect_still_wanted(context)
            self.log.info("Deferring: the cluster is asked again from the triggerer")
            timeout = due - time.time() + _BACKSTOP_MARGIN
            self.defer(trigger=trigger, method_name="execute_again", timeout=timeout)
        talk = self._conversing
        waiting = talk.until_interrupted(first_event(trigger), timeout=self._left(context))
        if talk.run(waiting) is None:
            raise AirflowException(
                f"Told to stop while it could not be told whether {unnamed} exists{self._leftover(context, error)}"
            )

    def _wait_here(self, context: Context, arguments: JobTriggerArguments) -> Any:
        from durable_spark.triggers.job import JobEvent, JobTrigger

        talk = self._conversing
        trigger = JobTrigger(arguments.to_json())
        try:
            waiting = first_event(trigger)
            event = talk.run(talk.until_interrupted(waiting, timeout=self._left(context)))
        except AirflowTaskTimeout:
            return self._conclude(context, self._end_at_deadline(context, arguments.job))
        if event is not None:
            return self._complete(context, JobEvent.from_json(event))
        job = trigger.job
        if job != arguments.job:
            self._record = self._recorded.moved_to(job)
        what = f"Told to stop while waiting for {job}"
        if self.kill_jobs:
            self.log.warning("Told to stop: killing %s", job)
            self._kill_noted(context, job)
            self._release(job)
            raise AirflowException(what)
        self._expect_still_wanted(context)
        self._release_unless_followed_on(context, job)
        raise AirflowException(f"{what}{self._leftover(context)}")

    # What others see

    def _warn_of_changed_arguments(self, context: Context, status: JobStatus) -> None:
        record = self._recorded
        runs = "ran" if status.state.final else "runs on"
        try:
            digest = digest_of(record.submission.token, self.describe_job())
        except BadArguments as error:
            self.log.warning(
                "The arguments of this task are wrong by now, but %s %s with the old ones: %s", record.job, runs, error
            )
            return
        if record.arguments and record.arguments != digest:
            self.log.warning("The arguments of this task have changed; %s %s with the old ones", record.job, runs)

    def _tell_found(self, context: Context, status: JobStatus, why: str) -> None:
        """Say what a try has found of the job in the record; what it makes of it, the mixin says."""
        record, job = self._recorded, self._recorded.job
        if self._adopted and status.state.active:
            return
        self.log.info("The record names %s, %s: %s", job, self._origin(record), why)
        if status.state.active:
            self._count(context, "reconnects")
            decision = "reconnect"
        elif status.state is JobState.SUCCEEDED:
            decision = "already_succeeded"
        else:
            lost = status.state is JobState.ABSENT
            self._reason = (
                ("lost_resubmit", f"{job} is lost, and on_lost='resubmit'")
                if lost
                else ("terminal_resubmit", f"{job} has ended: {why}")
            )
            if lost and self.on_lost == "resubmit":
                self._count(context, "lost_jobs")
            return
        push_decision(context, decision, why=why, job=job, submission=record.submission)

    def _tell_failure(self, context: Context, error: DurableJobError) -> None:
        """Say in XCom that this try has come to no decision, unless a later one is in charge."""
        if isinstance(error, JobEnded):
            return
        with contextlib.suppress(Exception):
            self._fence(context)
            record = self._record
            push_decision(
                context,
                "fail",
                why=f"{type(error).__name__}: {error}",
                job=record.job if record else None,
                submission=record.submission if record else None,
            )

    def _forget_upstream_status(self, context: Context) -> None:
        if self.durable:
            store_of(context).delete(_UPSTREAM_DRIVER_STATUS)

    @contextlib.contextmanager
    def _answering(self, context: Context) -> Iterator[None]:
        """Talk with the cluster, and end in an exception of Airflow's that says what is left behind."""
        # When a task's process ends, be it for a deferral, Airflow reads each link and pushes it again: two requests
        # for each, and an old one in the place of what the trigger has pushed meanwhile.
        others = [link for link in self.operator_extra_links if not isinstance(link, StoredLink)]
        self.operator_extra_links = others
        with translated(lambda error: self._leftover(context, error)), self._conversation():
            try:
                yield
            except Superseded:  # by a later try, which follows the job; or the run was deleted, and the store with it
                record = self._record
                if record is not None and record.job is not None and self._is_gone(context):
                    self._leave_nobodys(record.job)
                raise


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
def translated(leftover: Callable[[BaseException], str] = lambda _: "") -> Iterator[None]:
    """
    Raise Airflow's exceptions for ours: what must not be retried fails, the rest honours retries.

    :param leftover: returns what the end of the try leaves behind, to be said at the end of the message.
    """
    try:
        yield
    except DurableJobError as error:
        kind: type[BaseException] = AirflowException
        if isinstance(error, (BadArguments, JobLost)) or (isinstance(error, SubmissionUncertain) and error.permanent):
            kind = AirflowFailException
        elif isinstance(error, DeadlinePassed):
            kind = AirflowTaskTimeout
        raise kind(f"{type(error).__name__}: {error}{leftover(error)}") from error
    except AirflowTaskTimeout as error:  # Airflow's own timer
        raise AirflowTaskTimeout(f"{error}{leftover(error)}") from error


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
