"""
What a task says to its cluster about its job: look, kill, let go; the operator's second layer.

What flows in: the record. What flows out: states, and the record, moved to the job that stands in the place of the one
it named. Every kill of a job that the task may be asked about later is in the record before it is sent.

The trap: for a submission that was sent twice, or a job that the cluster itself started again, there is another job
than the recorded one. A bad end counts, and a new submission may follow, only when that one is dead, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from airflow.sdk.exceptions import AirflowException
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from durable_spark.jobs import (
    ENDED_BY_A_PERSON,
    TRY_XCOM_KEY,
    AuthenticationFailed,
    ClusterChanged,
    ClusterError,
    ClusterUnreachable,
    DurableJobError,
    Found,
    JobEnded,
    JobRef,
    JobState,
    JobStatus,
    Record,
    RequestRefused,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
)
from durable_spark.operators._recorded import RecordedTask
from durable_spark.operators._store import is_last, map_index, pull

if TYPE_CHECKING:
    from airflow.sdk import Context

__all__ = ["ClusterTask", "StillAlive"]

_LET_GO_WITHIN = 60.0
_LOOK_AGAIN_AFTER = 1.0
_GONE = "gone"


class StillAlive(Exception):
    """A job that was killed is not seen dead yet. The message says what was seen last, or what was in the way."""


class ClusterTask(RecordedTask):
    """A task that deals with its cluster about the job in the record."""

    def _expect_same_cluster(self, record: Record) -> None:
        talk = self._conversing
        names = talk.run(talk.hook.cluster())
        if record.cluster and not set(names) & set(record.cluster):
            raise ClusterChanged(
                f"connection {self.conn_id!r} names {', '.join(names)}, but job "
                f"{record.job or record.submission.token} was submitted to {', '.join(record.cluster)}. "
                "Restore the connection, or end that job and clear its record"
            )

    # Looking

    def _poll(self, job: JobRef) -> JobStatus:
        """Return the job's status. That it is not known is believed only when it is said twice."""
        talk = self._conversing
        status = talk.run(talk.hook.poll([job]))[job]
        if status.state is JobState.ABSENT:
            talk.run(asyncio.sleep(_LOOK_AGAIN_AFTER))
            status = talk.run(talk.hook.poll([job]))[job]
        return status

    def _poll_or_none(self, job: JobRef) -> JobStatus | None:
        """Return the job's status, ``None`` when the cluster is out of reach."""
        try:
            return self._poll(job)
        except ClusterError as error:
            self.log.warning("No word of %s yet: %s", job, error)
            return None

    def _look(self, context: Context) -> JobStatus | None:
        """Return the status of the recorded job, or of the one that stands in its place."""
        record = self._recorded
        assert record.job is not None  # noqa: S101 the mixin asks only for a job that it was given
        status = self._poll_or_none(record.job)
        another = self._successor(context, record, status) if status is not None else None
        if another is None:
            return status
        self._save(context, record.moved_to(another.job))
        return another

    def _successor(
        self, context: Context, record: Record, status: JobStatus, *, anew: bool = False
    ) -> JobStatus | None:
        """
        Do the same as :meth:`_another`, and take it for ``None`` if it cannot be told yet and nobody would be harmed.

        :param anew: as there.
        """
        try:
            return self._another(context, record, status, within=self.kill_timeout, anew=anew)
        except (ClusterError, SubmissionUncertain) as error:
            ended = status.state in (JobState.FAILED, JobState.KILLED) or (status.state is JobState.SUCCEEDED and anew)
            submits = anew or record.resent or self.on_lost == "resubmit"
            if ended or (status.state is JobState.ABSENT and submits):
                raise  # it is looked for again, rather than submitted beside, or called lost
            self.log.info("Whether another job stands in the place of %s cannot be told: %s", status.job, error)
            return None

    def _another(
        self, context: Context, record: Record, status: JobStatus, *, within: float, anew: bool = False
    ) -> JobStatus | None:
        """
        Return another job of the submission if a job has ended, was relaunched or is not known, and that one counts.

        That is one that the cluster itself started in its place, or the older one of two requests. Of what has ended,
        one that was killed, or is not known either, says nothing. ``None`` also if it can never be told.

        :param within: seconds for which the end of younger ones is waited for, which are killed.
        :param anew: whether a new submission follows also upon a success.
        :raises SubmissionUncertain: when it cannot be told yet, or a younger one is not seen dead by then. Of a
            submission that was sent more than once also when it can never be told.
        """
        if status.state not in (JobState.RELAUNCHED, JobState.ABSENT) and not (record.resent and status.state.final):
            return None
        until = time.monotonic() + within
        stands = status.state is JobState.SUCCEEDED and not anew  # whatever there is beside it
        try:
            found = self._find(context, record)
            while found is not None and found.younger and not stands:
                if time.monotonic() >= until:
                    names = ", ".join(map(str, found.younger))
                    raise SubmissionUncertain(f"{names}, of the same submission as {status.job}, may not be dead yet")
                self._conversing.run(asyncio.sleep(_LOOK_AGAIN_AFTER))
                found = self._find(context, record)
        except SubmissionRefused:  # its name is somebody else's by now
            return None
        except SubmissionUncertain as error:
            if record.resent or not error.permanent:
                raise
            self.log.info("Whether another job stands in the place of %s can never be told: %s", status.job, error)
            return None
        if found is None:
            return None
        if found.status.job != status.job and (found.counts or not record.resent):
            return found.status
        if found.untold is not None and not stands:
            gone = status.state is JobState.ABSENT and not found.untold.permanent
            if record.resent or gone:
                raise found.untold
        return None

    def _find(self, context: Context, record: Record) -> Found | None:
        """Return the submission's job, ``None`` if it is proven absent; kill jobs that came beside it."""
        if record.refused:
            return None
        talk = self._conversing
        found = talk.run(talk.hook.find(record.submission))
        if not isinstance(found, Found):
            return None
        for younger in found.younger:
            self.log.error("Killing %s: it carries the token of %s, and only one was meant", younger, found.status.job)
            self._save(context, record)
            try:
                self._kill(younger)
            except RequestRefused as error:  # it may be another user's, who has copied our labels
                self.log.error("%s could not be killed, look at it yourself: %s", younger, error)
        return found

    def _log_tail(self, job: JobRef) -> Sequence[str]:
        """Return the end of the job's log. What fails here must not hide how the job ended."""
        talk = self._conversing
        try:
            return talk.run(talk.hook.log_tail(job, self.log_lines))
        except Exception as error:
            self.log.warning("The log of %s could not be read: %r", job, error)
            return ()

    # Killing

    def _kill(self, job: JobRef) -> None:
        """Kill a job whose end nobody waits for."""
        self._conversing.run(self._conversing.hook.kill(job))
        self._release(job)

    def _kill_noted(self, context: Context, job: JobRef) -> None:
        """
        Kill the task's job, and have that in the record before, unless the cluster does not take the kill.

        :raises Superseded: when another try is in charge. Nothing was killed.
        """
        if self._record is None:
            self._fence(context)
            self._conversing.run(self._conversing.hook.kill(job))
            return
        before = self._record
        self._save(context, dataclasses.replace(before, killing=True))
        try:
            self._conversing.run(self._conversing.hook.kill(job))
        except (AuthenticationFailed, RequestRefused):  # nobody has killed it: if it is gone one day, it is lost
            self._save(context, dataclasses.replace(self._recorded, killing=False, unanswered=False))
            raise
        except ClusterUnreachable:
            if not before.killing:  # else an earlier kill may have been answered
                self._save(context, dataclasses.replace(self._recorded, unanswered=True))
            raise
        if before.unanswered:
            self._save(context, dataclasses.replace(self._recorded, unanswered=False))

    def _kill_old(self, context: Context, job: JobRef) -> None:
        """
        Kill an old job and wait until it is seen dead.

        :raises JobEnded: when that takes longer than ``kill_timeout``. Nothing was submitted.
        """
        try:
            status = self._kill_and_see_dead(context, job, within=self.kill_timeout, anew=True)
        except StillAlive as error:
            raise JobEnded(
                f"the old job {job} was not seen dead within {self.kill_timeout:.0f} s ({error}); nothing was submitted"
            ) from error
        if status.state is JobState.ABSENT:
            self.log.warning("The cluster does not know %s any more: taken for dead", status.job)
        else:
            self.log.info("%s is %s", status.job, status.raw or status.state.value)
        self._release(status.job)

    def _kill_and_see_dead(self, context: Context, job: JobRef, *, within: float, anew: bool = False) -> JobStatus:
        """
        Kill a job, and what the cluster starts in its place, until it is dead or not known any more.

        :param within: seconds.
        :param anew: whether a new submission follows also if it succeeds before.
        :raises StillAlive: when the time is up, with what was seen last.
        """
        talk = self._conversing
        until = time.monotonic() + within
        dead: set[JobRef] = set()
        while True:
            try:
                self._kill_noted(context, job)
                status, record = self._poll(job), self._record
                another = None if record is None else self._another(context, record, status, within=0.0, anew=anew)
                if another is not None:
                    job, status = another.job, another
                    self._record = self._recorded.moved_to(job)
                    if status.state.final and job not in dead:  # once more for what stands in its place, late or not
                        dead.add(job)
                        continue
                elif status.state.final or status.state is JobState.ABSENT:
                    return status
                trouble = f"{job} is still {status.raw or status.state.value}"
            except (ClusterError, SubmissionUncertain) as error:
                trouble = str(error)
            if time.monotonic() >= until:
                raise StillAlive(trouble)
            talk.run(asyncio.sleep(_LOOK_AGAIN_AFTER))

    # Letting go

    def _release(self, job: JobRef | None, *, within: float = _LET_GO_WITHIN) -> None:
        """
        Let go of a job that this task has done with. What fails here is no reason to fail the task.

        No later try does it, so an outage that is short is waited out, and a refusal is not believed at once.

        :param within: seconds.
        """
        if job is None:
            return
        from durable_spark.triggers.feed import pauses

        hook = self._conversing.hook

        async def let_go() -> None:
            async for attempt in AsyncRetrying(
                stop=lambda state: self._kill_requested or (state.seconds_since_start or 0.0) >= within,
                wait=pauses(wait_random_exponential(multiplier=0.5, max=5), within=within),
                retry=retry_if_exception_type(ClusterError),
                reraise=True,
            ):
                with attempt:
                    await hook.release(job)

        try:
            self._conversing.run(let_go())
        except Exception as error:
            self.log.warning("What the cluster keeps of %s could not be let go of: %r", job, error)

    def _release_unless_followed_on(self, context: Context, job: JobRef) -> None:
        """Let go of a job, but not while its end is not recorded and a retry follows that will look for it."""
        record = self._record
        ended = record is not None and record.verdict is not None
        if not ended and self.durable and not is_last(context):
            return
        if not ended:
            self._fence(context)  # a later try may follow it
        self._release(job, within=_LET_GO_WITHIN if ended else 0.0)  # else it is the cluster's outage that ends the try

    def _give_way(self, context: Context, job: JobRef, submission: Submission) -> None:
        """Another try is in charge: kill our job only if it is one too many."""
        talk = self._conversing
        if self._is_gone(context):
            return  # no try is: whoever asked sees to its job
        one_too_many: dict[JobRef, str] = {}
        in_charge = pull(context, TRY_XCOM_KEY)
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

    def _expect_still_wanted(self, context: Context) -> None:
        """Before letting go of the job, see whether a person has ended the task meanwhile."""
        job = self._recorded.job
        if (state := self._state_that_ends_it(context)) is None:
            return
        if state == _GONE:
            self._leave_nobodys(job)
        elif job is not None and self.kill_jobs:
            self.log.warning("This task is %s by now: killing %s", state, job)
            self._kill_noted(context, job)
            self._release(job)
        else:
            self._release(job)
        raise AirflowException(f"This task was set to {'removed' if state == _GONE else state} meanwhile")

    def _leave_nobodys(self, job: JobRef | None) -> None:
        """Kill, or keep, the job of a task instance that is gone: there is no record any more, and no other try."""
        if job is not None and self.kill_jobs:
            self.log.warning("This task is gone by now: killing %s", job)
            self._kill(job)
        else:
            self._release(job)

    def _is_gone(self, context: Context) -> bool:
        """Whether the task instance is gone with its run."""
        return self._state_that_ends_it(context) == _GONE

    def _state_that_ends_it(self, context: Context) -> str | None:
        """Return the state in which nobody waits for the job any more; ``None`` if the task goes on, or who knows."""
        from durable_spark.triggers.job import state_of

        ti = context["ti"]
        try:
            state = state_of(dag_id=ti.dag_id, run_id=ti.run_id, task_id=ti.task_id, map_index=map_index(ti))
        except Exception as error:
            self.log.warning("The state of this task could not be read: %s", error)
            return None
        return state or _GONE if state in ENDED_BY_A_PERSON else None
