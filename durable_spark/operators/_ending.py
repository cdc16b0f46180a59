"""
What the end of a job comes to: a result, or what is raised; the operator's third layer.

In: the trigger's event, a state that the cluster vouches for, or the deadline. Out: the verdict in the record, written
before anything else is done about it, then the job's ID or one of our exceptions.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowException

from durable_spark.jobs import (
    BadArguments,
    ClusterChanged,
    ClusterError,
    DeadlinePassed,
    JobFailed,
    JobKilled,
    JobLost,
    JobRef,
    JobState,
    JobStatus,
    Link,
    OutageTooLong,
    SubmissionRefused,
    SubmissionUncertain,
    Verdict,
    new_token,
)
from durable_spark.operators._cluster import ClusterTask, StillAlive
from durable_spark.operators._store import is_last, pull, way_out
from durable_spark.operators._telling import push_decision

if TYPE_CHECKING:
    from datetime import timedelta

    from airflow.sdk import Context

    from durable_spark.triggers.job import JobEvent

__all__ = ["EndingTask"]

_KILL_CONFIRMED_WITHIN = 30.0


class EndingTask(ClusterTask):
    """A task that knows what to make of its job's end."""

    # The deadline

    def _deadline(self, context: Context) -> float | None:
        """Return when the execution timeout of this try passes, in seconds since the epoch."""
        timeout: timedelta | None = self.execution_timeout
        return None if timeout is None else float(context["ti"].start_date.timestamp() + timeout.total_seconds())

    def _is_past_deadline(self, context: Context) -> bool:
        deadline = self._deadline(context)
        return deadline is not None and time.time() >= deadline

    def _deadline_passed(self, what: str) -> DeadlinePassed:
        return DeadlinePassed(f"the execution timeout of {self.execution_timeout} passed: {what}")

    def _end_at_deadline(
        self, context: Context, job: JobRef, *, confirmed: bool = False, message: str = ""
    ) -> JobStatus:
        """
        End a job because the execution timeout has passed.

        :param confirmed: whether the trigger has killed it and seen it dead.
        :return: what has become of it, if it ended by itself or is lost.
        :raises DeadlinePassed: with what has become of it, otherwise.
        """
        record = self._record or self._unrecorded(context, job, token=new_token())
        self._record = record.moved_to(job)
        if confirmed:
            self._save(context, dataclasses.replace(self._record, verdict=_killed(message)))
            self._release(job)
            raise self._deadline_passed(f"{job} was killed")
        try:
            self._expect_same_cluster(self._record)
            status = self._killed_if_gone(self._look(context) or JobStatus(job=job, state=JobState.UNKNOWN))
            if status.state.active and self.on_timeout == "keep":
                self._release_unless_followed_on(context, job)
                raise self._deadline_passed(f"{status.job} was left running, as on_timeout='keep' asks")
            if status.state.active:
                status = self._kill_and_see_dead(context, status.job, within=_KILL_CONFIRMED_WITHIN)
            if not self._recorded.killing or status.state in (JobState.SUCCEEDED, JobState.FAILED):
                return status
        except (ClusterChanged, ClusterError, SubmissionUncertain) as error:
            self._release_unless_followed_on(context, job)
            raise self._deadline_passed(f"{job} could not be killed: {error}") from error
        except StillAlive as error:
            self._release_unless_followed_on(context, job)
            raise self._deadline_passed(f"{job} was to be killed, but is not seen dead yet: {error}") from error
        self._save(context, dataclasses.replace(self._recorded, verdict=Verdict.of(self._killed_if_gone(status))))
        self._release(status.job)
        raise self._deadline_passed(f"{status.job} was killed and is {status.raw or 'gone'}")

    # What the trigger has reported

    def _complete(self, context: Context, event: JobEvent) -> Any:
        if self._record is None:
            self._load(context)
        record = self._record
        if record is None:
            record = self._unrecorded(context, event.job, token=event.token)
        if record.submission.token != event.token:
            raise AirflowException("The trigger's event is about an earlier submission of this task")
        self._record = record.moved_to(event.job)
        if event.kind in ("lost", "timeout") and not event.confirmed:
            noted = self._noted(context)
            killed = self._fold_in_the_triggers_kill(noted)
            if event.kind == "lost" and not killed and noted is not None and noted.kind in ("succeeded", "killed"):
                event = noted  # Airflow had no answer, maybe, for the trigger that was to read what one before had seen
        if event.kind == "timeout":
            return self._conclude(
                context,
                self._end_at_deadline(context, event.job, confirmed=event.confirmed, message=event.message),
            )
        if event.kind == "outage":
            self._release_unless_followed_on(context, event.job)
            raise OutageTooLong(f"{event.job}: {event.message}")
        state = JobState.ABSENT if event.kind == "lost" else JobState(event.kind)
        return self._conclude(context, JobStatus(job=event.job, state=state, raw=event.state, message=event.message))

    def _fold_in_the_triggers_kill(self, noted: JobEvent | None) -> bool:
        """Take over into the record that this try's trigger has sent a kill, if it has noted one. Whether it has."""
        record = self._record
        if record is None or record.verdict is not None:
            return False
        if noted is None or not (noted.confirmed or noted.kind == "failed"):
            return False
        unanswered = noted.unanswered and (record.unanswered or not record.killing)
        self._record = dataclasses.replace(record, killing=True, unanswered=unanswered)
        return True

    def _noted(self, context: Context) -> JobEvent | None:
        """Return the event that a trigger of this try has noted of the record's job, if there is one."""
        from durable_spark.triggers.job import NOTE_XCOM_KEY, noted_end

        record = self._record
        if record is None:
            return None
        noted = noted_end(pull(context, NOTE_XCOM_KEY), ti_id=str(context["ti"].id))
        of_the_record = noted is not None and (noted.job, noted.token) == (record.job, record.submission.token)
        return noted if of_the_record else None

    def _job_of_this_try(self, context: Context) -> JobRef | None:
        if self._record is not None:
            return self._record.job
        job_id = pull(context, self.external_id_key)
        return JobRef(job_id) if isinstance(job_id, str) else None

    # The end

    def _conclude(self, context: Context, status: JobStatus) -> Any:
        """Return or raise what the end of a job comes to, or the loss of it."""
        status = self._killed_if_gone(status)
        return self._lost(context, status) if status.state is JobState.ABSENT else self._finish(context, status)

    def _killed_if_gone(self, status: JobStatus) -> JobStatus:
        """Return the status; a job that is gone after this task has asked for its kill was killed, not lost."""
        if status.state is not JobState.ABSENT or not self._recorded.killing:
            return status
        return dataclasses.replace(status, state=JobState.KILLED, message="killed by this task, in this try or before")

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

    def _lost(self, context: Context, status: JobStatus) -> Any:
        if self.on_lost == "fail":
            raise self._job_lost(context, status)
        last = self._look(context)
        if last is not None and last.state.final:
            return self._finish(context, last)
        if last is None or last.state is not JobState.ABSENT:
            raise OutageTooLong(f"{status.job} is known again, or the cluster is out of reach")
        self._reason = ("lost_resubmit", f"{status.job} is lost, and on_lost='resubmit'")
        self._count(context, "lost_jobs")
        self._save(context, dataclasses.replace(self._recorded, verdict=Verdict.of(last)))
        self._release(status.job)
        job_id = self.submit_job(context)
        self.mirror(context, job_id)
        return self.poll_until_complete(job_id, context)

    def _job_lost(self, context: Context, status: JobStatus) -> JobLost:
        """Let go of what may be left of a job that is lost, and return what to raise."""
        record = self._recorded
        self._fence(context)
        self._count(context, "lost_jobs")
        self.after_end()
        self._release(status.job)
        log = pull(context, Link.LOG.xcom_key)
        known = [self._origin(record), status.message, f"its log was at {log}" if log else ""]
        lost = JobLost(
            f"the cluster does not know {status.job} any more, and its end was not seen: it may have succeeded or "
            f"failed. {'; '.join(part for part in known if part)}. Look at what it was to write; then clear the task "
            "to run it again, or mark it as succeeded. on_lost='resubmit' submits anew by itself"
        )
        push_decision(context, "lost", why=str(lost), job=status.job, submission=record.submission)
        return lost

    # What is left behind

    def _leftover(self, context: Context, error: BaseException | None = None) -> str:
        """Return what a try that ends without a verdict may leave behind, and the way out."""
        record = self._record
        if record is None or record.verdict is not None:
            return ""
        if isinstance(error, (BadArguments, JobLost, SubmissionRefused)):
            return ""
        if record.job is None and isinstance(error, SubmissionUncertain) and error.permanent:
            return f". {way_out(context)}"
        if record.job is not None and self._anew and (self._old_is_dead or not is_last(context)):
            return ""  # else it is an old job, which no try is left to kill
        what = f"{record.job} may still run" if record.job else "whether the submission has become a job is not known"
        if not self.durable:
            return f". {what}: without a record nobody looks for it, so look on the cluster"
        if not is_last(context):
            return f". {what}: the next try {'follows it on' if record.job else 'looks for it'}"
        if record.job is None:
            return f". {what}, and no try is left. {way_out(context)}"
        if self.on_clear == "reconnect":
            return f". {what}, and no try is left. The way out: clear the task, which follows it on"
        return (
            f". {what}, and no try is left. The way out: clear the task, which kills it and runs again; with "
            "on_clear='reconnect' in the Dag, a clear follows it on"
        )


def _killed(message: str) -> Verdict:
    return Verdict(state=JobState.KILLED, raw="KILLED", message=message, at=time.time())
