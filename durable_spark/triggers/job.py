"""
The asynchronous half of an operator: waits in the triggerer for one job's end and reports it once.

In: the trigger's arguments, written by the operator when it deferred. Out: one event with the verdict,
and lines in the task's own log. The status comes from the :mod:`~durable_spark.triggers.feed` of the
cluster; what to make of it is decided here.

Traps, all tried on Airflow 3.3.2:

* ``on_kill`` is called on a takeover by another triggerer and on a clear just as on *mark failed*, so
  the task instance's state is read before anything is killed.
* A trigger is cancelled anew each second until it has ended, and with it an ``on_kill`` that is still at work.
* An event within the first seconds after a deferral burns the try (apache/airflow issue 71580).
* Airflow does not enforce ``execution_timeout`` while a task is deferred; the deadline is ours to keep.
* A triggerer may die between a kill of its own and the event. Its successor finds a job that was killed, or is not
  there any more, so what the kill is to end in is noted before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from airflow.triggers.base import BaseTrigger, TriggerEvent
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from durable_spark.hooks.job import JobHook, load_hook_class
from durable_spark.jobs import (
    ENDED_BY_A_PERSON,
    TRY_XCOM_KEY,
    Absent,
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    DurableJobError,
    Found,
    JobRef,
    JobState,
    JobStatus,
    Link,
    RequestRefused,
    Submission,
    SubmissionUncertain,
    utc,
)
from durable_spark.triggers.feed import LONGEST_BACKOFF, FeedKey, Outage, Subscription, join, pauses

__all__ = [
    "NOTE_XCOM_KEY",
    "JobEvent",
    "JobTrigger",
    "JobTriggerArguments",
    "SubmissionTrigger",
    "digest_of_links",
    "may_be_told_later",
    "noted_end",
    "state_of",
]

_T = TypeVar("_T")

NOTE_XCOM_KEY = "durable_spark_noted_end"
"""XCom in which a try's trigger notes the event that is to come, before it kills the job or holds the event back."""
_DOUBLES_EVERY = 600.0
"""Seconds between two looks for a second job of the same token, in the long run."""
_KILL_CONFIRMED_WITHIN = 30.0
_MESSAGE_LIMIT = 1000
_AIRFLOW_ANSWERS_WITHIN = 10.0
_FAR = 1e15
"""Seconds beyond any time there is; an infinity, or what is no number, does not pass, either."""
NO_STATUS = "no_status"
"""
The state of a task instance that is about to be scheduled (again): after a clear, when the scheduler that had queued it
is dead, or when it was deleted (as by ``airflow db clean``) and is made anew because its run is there. Airflow answers
``null``, or nothing (tried on 3.3.2).
"""
_MANY = 100
"""Jobs that are followed beside one from which on its log does not say again what it most likely says already."""
_LINKS_APART = 0.1
"""
Seconds between the links of two jobs, on average, when many are taken over at once from another triggerer. They cost a
few requests to Airflow each, and are most often there already.
"""
_TAKEN_OVER_AFTER = 60.0
"""Seconds after a deferral from which a trigger that starts is taken to be not the first."""
_ON_KILL_BOUND = 25.0
"""Airflow gives ``on_kill`` 30 s."""
_OTHERS_FOUND_WITHIN = 10.0
_SUCCESS_WAITS = 120.0
"""Seconds for which a success is held back while it cannot be told whether its submission has a second job."""
_SAYS_NOTHING = {
    JobState.RELAUNCHED: "the cluster relaunched it, and its successor could not be found",
    JobState.UNKNOWN: "the cluster could not tell what has become of it",
}
"""States in which a job is waited for as in an outage, and what is said in the end."""
_letting_go: set[asyncio.Task[None]] = set()
"""
What goes on although Airflow has cancelled its ``on_kill``: a loop remembers its tasks only weakly. Each step of it has
a time limit, and it tells its own failure; a triggerer that ends before cancels and awaits it with its loop.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobTriggerArguments:
    """
    All that a trigger needs to follow a job. Stored in Airflow's database: no secrets.

    :param hook: class path of the hook.
    :param conn_id: the connection of the cluster.
    :param cluster: the names of the cluster that the job was submitted to.
    :param job: the job.
    :param submission: its submission, to find a successor that the cluster itself started.
    :param dag_id: with ``run_id``, ``task_id`` and ``map_index``: the task instance.
    :param ti_id: ID of the try.
    :param deadline: when the execution timeout passes, in seconds since the epoch, or ``None``.
    :param quiet: seconds after its start before which the trigger reports nothing.
    :param interval: seconds between two polls, or ``None`` for what the connection says.
    :param outage_timeout: seconds without word, of the job or of its successor, after which the following is given up.
    :param start_timeout: seconds for which the cluster may say why it cannot start the job; ``None``: for ever.
    :param kill: whether the job is killed when a person ends the task.
    :param kill_on_timeout: whether the job is killed when the deadline passes.
    :param sent_before: whether the submission had been sent before, so that a request that was still
        on its way may have made a second job.
    :param on_worker: whether the task waits on its worker, and does not defer.
    :param deferred_at: when the task deferred, in seconds since the epoch; ``None`` if it is not known.
    :param links: :func:`digest_of_links` of those that Airflow's UI shows already.
    """

    hook: str
    conn_id: str
    cluster: tuple[str, ...]
    job: JobRef
    submission: Submission
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    ti_id: str
    deadline: float | None = None
    quiet: float = 0.0
    interval: float | None = None
    outage_timeout: float = 3600.0
    start_timeout: float | None = None
    kill: bool = True
    kill_on_timeout: bool = True
    sent_before: bool = False
    on_worker: bool = False
    deferred_at: float | None = None
    links: str = ""

    VERSION: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as plain JSON values."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        value.update(
            v=self.VERSION, cluster=list(self.cluster), job=list(self.job), submission=self.submission.to_json()
        )
        return value

    @classmethod
    def from_json(cls, value: Any) -> JobTriggerArguments:
        """
        Return the arguments that :meth:`to_json` wrote; keys that a newer version added are ignored.

        What thousands of triggers have in common is kept once.

        :raises ValueError: when the value is not such arguments.
        """
        if not isinstance(value, Mapping):
            raise ValueError("they are not an object")
        types = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        known = {name: _once(part) if isinstance(part, str) else part for name, part in value.items() if name in types}
        known["submission"] = Submission.from_json(known.get("submission"))
        for name in ("cluster", "job"):
            parts = known.get(name)
            if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
                raise ValueError(f"{name} is not a list of texts")
        for name in known.keys() - {"submission", "cluster", "job"}:
            _expect_type(name, known[name], types[name])
        known["cluster"] = _once(tuple(known["cluster"]))
        try:
            known["job"] = JobRef(*known["job"])
            return cls(**known)
        except TypeError as error:
            raise ValueError(str(error)) from error


_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
}


def _expect_type(name: str, value: Any, annotation: str) -> None:
    wrong = not isinstance(value, _TYPES[annotation]) or (isinstance(value, bool) and annotation != "bool")
    if wrong or (isinstance(value, (int, float)) and not abs(value) < _FAR):
        raise ValueError(f"{name} is {value!r:.40}, not {annotation}")


@functools.lru_cache(maxsize=256)
def _once(value: _T) -> _T:
    """Return a value that is equal to this one, and in use for as long as others of its kind come."""
    return value


@functools.lru_cache(maxsize=256)
def _feed_of(hook: str, conn_id: str, cluster: tuple[str, ...]) -> tuple[FeedKey, Callable[[], JobHook]]:
    """Return the key of a feed, and what makes its hook: the same ones for all jobs that share it."""
    return FeedKey(hook=hook, conn_id=conn_id, cluster=cluster), lambda: load_hook_class(hook)(conn_id)


def digest_of_links(links: Mapping[Link, str]) -> str:
    """Return what tells whether two sets of links are the same; nothing for none."""
    if not links:
        return ""
    text = json.dumps(sorted((link.value, url) for link, url in links.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobEvent:
    """
    What a trigger reports to ``execute_complete``. Stored in Airflow's database and logged: small, no secrets.

    :param kind: ``succeeded``, ``failed``, ``killed``: the cluster's verdict. ``lost``: a healthy cluster
        does not know the job. ``timeout``: the deadline passed. ``outage``: no word for too long. ``told``: of a
        :class:`SubmissionTrigger`.
    :param state: what was last known of the job, in the cluster's words.
    :param confirmed: for ``timeout``: whether the job was seen dead.
    :param unanswered: of one that is noted: whether the cluster has not answered the kill that it is noted for.
    """

    kind: str
    job: JobRef
    token: str
    state: str = ""
    message: str = ""
    confirmed: bool = False
    unanswered: bool = False

    VERSION = 1

    def to_json(self) -> dict[str, Any]:
        """Return the event as plain JSON values."""
        return {
            "v": self.VERSION,
            "kind": self.kind,
            "job_id": self.job.id,
            "uid": self.job.uid,
            "token": self.token,
            "state": self.state,
            "message": self.message[:_MESSAGE_LIMIT],
            "confirmed": self.confirmed,
            "unanswered": self.unanswered,
        }

    @classmethod
    def from_json(cls, value: Any) -> JobEvent:
        """
        Return the event that :meth:`to_json` wrote.

        :raises ValueError: when the value is not such an event.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"not an event of this package: {value!r:.100}")
        kinds = ("succeeded", "failed", "killed", "lost", "timeout", "outage", "told")
        texts = {key: value.get(key, "") for key in ("kind", "job_id", "uid", "token", "state", "message")}
        if texts["kind"] not in kinds or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"not an event of this package: {value!r:.100}")
        job = JobRef(texts.pop("job_id"), texts.pop("uid"))
        confirmed, unanswered = value.get("confirmed") is True, value.get("unanswered") is True
        return cls(job=job, confirmed=confirmed, unanswered=unanswered, **texts)


def noted_end(value: Any, *, ti_id: str) -> JobEvent | None:
    """Return the event that a trigger of this very try has noted under :data:`NOTE_XCOM_KEY`, if there is one."""
    if not isinstance(value, Mapping) or value.get("ti_id") != ti_id:
        return None
    try:
        return JobEvent.from_json(value)
    except ValueError:
        return None


def may_be_told_later(error: BaseException) -> bool:
    """Whether what the cluster could not tell may be told when it is asked again."""
    if isinstance(error, SubmissionUncertain):
        return not error.permanent
    return isinstance(error, (ClusterUnreachable, AuthenticationFailed))


def state_of(*, dag_id: str, run_id: str, task_id: str, map_index: int) -> str | None:
    """
    Return the state of a task instance as Airflow has it now, ``None`` when it is gone with its run.

    One that has no state, or will be made anew, is not gone: that is :data:`NO_STATUS`. Blocks; works in a worker and,
    from a thread, in the triggerer. Knows no try: after a clear it shows the new one.
    """
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    states = RuntimeTaskInstance.get_task_states(
        dag_id=dag_id, task_ids=[task_id], run_ids=[run_id], map_index=map_index
    )
    of_run, name = states.get(run_id, {}), task_id if map_index < 0 else f"{task_id}_{map_index}"
    if name not in of_run and not RuntimeTaskInstance.get_dr_count(dag_id=dag_id, run_ids=[run_id]):
        return None
    state = of_run.get(name)
    return NO_STATUS if state is None else str(getattr(state, "value", state))


class JobTrigger(BaseTrigger):
    """
    Waits for the end of one job.

    :param arguments: :meth:`JobTriggerArguments.to_json`, or its text.
    :raises TypeError: when they are no such arguments. By that Airflow knows a trigger that cannot be made; any other
        exception would end the triggerer, and with it everybody's triggers (3.3.2).
    """

    def __init__(self, arguments: str | dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logger()  # one for the class: else each of thousands makes its own
        try:
            values = json.loads(arguments) if isinstance(arguments, str) else arguments
            self._args = JobTriggerArguments.from_json(values)
        except (RecursionError, ValueError) as error:
            raise TypeError(f"these are not the arguments of a trigger: {error!s:.200}") from error
        self._job = self._args.job
        self._began = time.time()
        self._look_for_double_at: float | None = None
        self._pause = 0.0
        self._not_given_up_before = 0.0
        self._noted: JobEvent | None = None
        self._dead_by = 0.0

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """
        Return class path and arguments, as Airflow stores them.

        As a text, because Airflow goes through every value of what is not one each time that a trigger is made.
        """
        return f"{type(self).__module__}.{type(self).__qualname__}", {"arguments": json.dumps(self._args.to_json())}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Follow the job, then yield one event."""
        load_hook_class(self._args.hook)  # or raise, before anything else is done
        self._began = time.time()
        if self._args.sent_before:
            self._pause = self._patience
            self._look_for_double_at = self._began + self._pause
        started = asyncio.get_running_loop().time()
        event = await self._follow()
        if (left := started + self._args.quiet - asyncio.get_running_loop().time()) > 0:
            if event.kind in ("succeeded", "failed", "killed"):
                await self._note(event)
            await asyncio.sleep(left)
        yield TriggerEvent(event.to_json())

    async def on_kill(self) -> None:
        """Kill the job if a person has ended the task; not on a takeover, a clear, or when that cannot be told."""
        letting_go = asyncio.create_task(self._let_go_if_unwanted())
        _letting_go.add(letting_go)
        letting_go.add_done_callback(_letting_go.discard)
        await asyncio.shield(letting_go)

    async def _let_go_if_unwanted(self) -> None:
        def try_again(error: BaseException) -> bool:
            return may_be_told_later(error) or isinstance(error, RequestRefused)  # which is not believed at once

        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_delay(_ON_KILL_BOUND),
                wait=pauses(wait_random_exponential(multiplier=0.2, max=5), within=_ON_KILL_BOUND),
                retry=retry_if_exception(try_again),
                reraise=True,
            ):
                with attempt:
                    # Anew each time: it may have been cleared meanwhile, and a new try may follow the job on.
                    if not await self._is_unwanted(said=attempt.retry_state.attempt_number > 1):
                        return
                    await asyncio.wait_for(self._let_go(), _ON_KILL_BOUND)
        except SubmissionUncertain as error:
            token = self._args.submission.token
            self.log.error("Whether a job of token %s still runs cannot be told: %s. %s", token, error, self._way_out)
        except (DurableJobError, asyncio.TimeoutError) as error:
            what = "be killed and may still run" if self._args.kill else "be let go of"
            self.log.error("%s could not %s: %s", self._job, what, str(error) or "no answer in time")

    async def _is_unwanted(self, *, said: bool) -> bool:
        """
        Whether a person has ended the task. ``False`` when that cannot be read.

        :param said: whether the log has it already.
        """
        try:
            state = await self._task_state()
        except Exception as error:
            self.log.warning("Not killing %s: the state of the task could not be read: %r", self._job, error)
            return False
        if state not in ENDED_BY_A_PERSON:
            self.log.info("Not killing %s: its task is %s and goes on elsewhere", self._job, state)
            return False
        if said:
            return True
        if self._args.kill:
            self.log.warning("Killing %s: its task is %s", self._job, state or "gone")
        else:
            self.log.info("Leaving %s alone, as on_kill='keep' asks", self._job)
        return True

    # Following

    @property
    def job(self) -> JobRef:
        """The job that is followed now; the cluster may have started it in place of the one that was submitted."""
        return self._job

    @property
    def taken_over(self) -> bool:
        """Whether another trigger has most likely followed the job before."""
        deferred = self._args.deferred_at
        return deferred is not None and self._began - deferred > _TAKEN_OVER_AFTER

    async def _follow(self) -> JobEvent:
        key, make_hook = _feed_of(self._args.hook, self._args.conn_id, self._args.cluster)
        said = _Narrator(self)
        while True:
            async with join(
                key,
                self._job,
                make_hook=make_hook,
                interval=self._args.interval,
                gauged=not self._args.on_worker,
            ) as subscription:
                event = await self._listen(subscription, said)
            if event is not None:
                return event
            # The cluster relaunched the job and its successor was found: follow that one.

    async def _listen(self, subscription: Subscription, said: _Narrator) -> JobEvent | None:
        """Return the event that ends the task, or ``None`` when another job is to be followed."""
        nothing_since: float | None = None
        untold_since: float | None = None
        looked_at = 0.0
        while True:
            looks_again = nothing_since is not None
            await subscription.changed(self._next_look(subscription, said.links_due, looks_again=looks_again))
            slept = time.time() - looked_at
            said.outage(subscription.outage)
            if (status := subscription.status) is not None:
                if status.state is not JobState.ABSENT:  # of that there is more to say
                    await said.status(status, beside=subscription.beside)
                if status.state.final or status.state is JobState.ABSENT:
                    event, another = await self._end(subscription, status)
                    if event is not None or another:
                        return event
                    untold_since = untold_since or time.time()
                    event, pause = self._wait_for_word(status, untold_since)
                    if event is not None:
                        return event
                    await asyncio.sleep(pause)
                    continue
            untold_since = None
            if status is not None and status.state is JobState.RUNNING:
                await self._forget_vain_kill()
            if (due := self._deadline_due(subscription)) is not None and time.time() >= due:
                if (event := await self._end_at_deadline(subscription.status)) is not None:
                    return event
            else:
                await self._give_up_start(subscription.status)
            if (event := self._outage_event(subscription)) is not None:
                return event
            if status is None or status.state not in _SAYS_NOTHING:
                nothing_since = None
            elif status.state is JobState.RELAUNCHED and await self._found_successor():
                return None
            else:
                looked_at = time.time()
                if nothing_since is None or slept > self._patience + LONGEST_BACKOFF:
                    nothing_since = looked_at  # also when this process was stopped for long: it has not asked meanwhile
                if looked_at - nothing_since >= (patience := self._args.outage_timeout):
                    message = f"{_SAYS_NOTHING[status.state]} for {patience:.0f} s"
                    return self._event("outage", status, message=message)
            if await self._another_is_the_job():
                return None

    async def _end(self, subscription: Subscription, status: JobStatus) -> tuple[JobEvent | None, bool]:
        """
        Return the event that ends the task, and whether another job is to be followed.

        Neither while it cannot be told whether another one of the submission runs, beside which a retry would submit.
        """
        absent = status.state is JobState.ABSENT
        noted = await self._noted_end(status) if absent or status.state is JobState.KILLED else None
        if noted is not None and noted.kind == "succeeded":
            return noted, False
        if absent and await self._found_successor():
            return None, True
        another = await self._another_is_the_job(at_its_end=True)
        if another is not False:
            if another is None and status.state is JobState.SUCCEEDED:
                event = self._event("succeeded", status)
                if self._noted != event:  # it counts, also if it is forgotten meanwhile
                    await self._note(event)
            return None, bool(another)
        if noted is not None:
            return noted, False
        return (self._lost(subscription) if absent else self._event(status.state.value, status)), False

    def _wait_for_word(self, status: JobStatus, since: float) -> tuple[JobEvent | None, float]:
        """
        Return the event of an end that was held back for too long, and the seconds until it is asked again.

        A success counts whatever there is beside it. It waits for a second job that was only queued beside the first,
        and shows whose it is when it gets its place.

        :param since: when it was held back first, in seconds since the epoch.
        """
        now, deadline, patience = time.time(), self._args.deadline, self._args.outage_timeout
        what = "whether its submission has a second job could not be told"
        succeeded = status.state is JobState.SUCCEEDED
        if succeeded:
            patience = min(patience, _SUCCESS_WAITS)
        if deadline is not None:
            deadline = max(deadline, self._dead_by)
        passed = deadline is not None and now >= deadline
        if not passed and now - since < patience:
            pause = min(max(self._patience, (now - since) / 2), LONGEST_BACKOFF)
            return None, pause if deadline is None else min(pause, deadline - now)
        if succeeded:
            self.log.error("%s has succeeded; %s: one may run yet. %s", self._job, what, self._way_out)
            return self._event("succeeded", status), 0.0
        if passed:
            return self._event("timeout", status, message=what), 0.0
        return self._event("outage", status, message=f"{what} for {patience:.0f} s"), 0.0

    @property
    def _way_out(self) -> str:
        """What to do about a job that may run although nobody follows it any more."""
        return f"'airflow durable-spark orphans {self._args.conn_id}' lists what does, and ends it with --kill"

    def _next_look(self, subscription: Subscription, links_due: float | None, *, looks_again: bool) -> float | None:
        """Return the seconds until something is due that no status announces, or ``None``."""
        outage, start = subscription.outage, self._start_due(subscription.status)
        deadline = self._deadline_due(subscription)
        moments = (deadline, self._look_for_double_at, start, links_due)
        due = [moment for moment in moments if moment is not None]
        if outage is not None:
            due.append(max(outage.since, self._began) + self._args.outage_timeout)
        if looks_again:
            due.append(time.time() + self._patience)
        return max(0.0, min(due) - time.time()) if due else None

    @property
    def _patience(self) -> float:
        return self._args.interval or JobHook.default_poll_interval

    def _outage_event(self, subscription: Subscription) -> JobEvent | None:
        outage, patience = subscription.outage, self._args.outage_timeout
        if outage is None or time.time() - max(outage.since, self._began) < patience:
            return None
        return self._event("outage", subscription.status, message=f"no word for {patience:.0f} s: {outage.error}")

    def _start_due(self, status: JobStatus | None) -> float | None:
        """Return when a job that cannot be started is given up, in seconds since the epoch."""
        if self._args.start_timeout is None or status is None or status.held_up_since is None:
            return None
        if self._killed_at_deadline():
            return None
        return max(status.held_up_since + self._args.start_timeout, self._not_given_up_before)

    async def _give_up_start(self, status: JobStatus | None) -> None:
        """Kill a job that the cluster could not start in time. Once it is dead, that is a failure."""
        due = self._start_due(status)
        if status is None or due is None or time.time() < due:
            return
        self._not_given_up_before = time.time() + _KILL_CONFIRMED_WITHIN
        if not await self._is_in_charge():
            return
        waited = f"it could not be started in {self._args.start_timeout:g} s (start_timeout)"
        self.log.warning("Killing %s: %s", self._job, waited)
        why = f"{waited} and was killed" + (f": {status.message}" if status.message else "")
        if (trouble := await self._kill_noted(self._event("failed", status, message=why))) is not None:
            self.log.warning("The kill of %s was not accepted: %s", self._job, trouble)

    async def _found_successor(self) -> bool:
        """Look for the job that the cluster started in place of ours; ``True`` when there is one to follow."""
        try:
            async with self._hook() as hook:
                found = await hook.find(self._args.submission)
        except DurableJobError as error:
            self.log.info("Whether %s has a successor cannot be told: %s", self._job, error)
            return False
        if not isinstance(found, Found) or found.status.job == self._job:
            return False
        if self._args.sent_before and not found.counts:
            return False
        self.log.warning("%s was relaunched by the cluster as %s, which is followed now", self._job, found.status.job)
        self._job = found.status.job
        return True

    def _deadline_due(self, subscription: Subscription) -> float | None:
        """Return when something is to be done about the deadline, in seconds since the epoch."""
        deadline = self._args.deadline
        if deadline is None:
            return None
        if self._killed_at_deadline():
            return self._dead_by
        if subscription.status is None and subscription.outage is None:
            # No triggerer may have run when it passed. A job that has ended since counts by its own end.
            return max(deadline, self._began + _KILL_CONFIRMED_WITHIN)
        return deadline

    def _killed_at_deadline(self) -> bool:
        return self._noted is not None and self._noted.kind == "timeout" and self._noted.job == self._job

    async def _end_at_deadline(self, status: JobStatus | None) -> JobEvent | None:
        """Kill the job, once. Return the event that ends the task, or ``None`` while its death is waited for."""
        if self._killed_at_deadline():
            return self._event("timeout", status, message="killed, not yet seen dead")
        if not self._args.kill_on_timeout:
            return self._event("timeout", status, message="left running, as on_timeout='keep' asks")
        if not await self._is_in_charge():
            return self._event("timeout", status, message="not killed yet: this try may not be in charge")
        self.log.warning("The execution timeout passed: killing %s", self._job)
        self._dead_by = time.time() + 2 * _KILL_CONFIRMED_WITHIN
        dead = dataclasses.replace(self._event("timeout", status, message="killed"), confirmed=True)
        if (trouble := await self._kill_noted(dead)) is not None:
            return self._event("timeout", status, message=f"the kill was not accepted: {trouble}")
        self._dead_by = time.time() + _KILL_CONFIRMED_WITHIN
        return None

    def _lost(self, subscription: Subscription) -> JobEvent:
        """Return the event of a job that the cluster does not know any more, with all that is known of it."""
        if (status := subscription.last_seen) is not None:
            seen, at = f"last seen as {status.raw or status.state.value} at", subscription.last_seen_at
        else:
            seen, at = "not seen since it is followed here,", self._began
        known = f"{seen} {utc(at)}; not known since {utc(subscription.absent_since or time.time())}"
        self.log.warning("The cluster does not know %s any more: %s", self._job, known)
        return self._event("lost", status, message=known)

    def _event(self, kind: str, status: JobStatus | None, *, message: str | None = None) -> JobEvent:
        if message is None:
            message = status.message if status else ""
        return JobEvent(
            kind=kind,
            job=self._job,
            token=self._args.submission.token,
            state=status.raw if status else "",
            message=message,
        )

    # Acting

    def _hook(self) -> JobHook:
        return load_hook_class(self._args.hook)(self._args.conn_id)

    async def _let_go(self) -> None:
        """Kill the job, unless it is to be kept; nobody waits for its end any more."""
        async with self._hook_of_same_cluster() as hook:
            await self._let_go_of(hook, [self._job])
            try:  # whether the cluster has relaunched it, or a late request has made another, unseen as yet
                found = await asyncio.wait_for(hook.find(self._args.submission), _OTHERS_FOUND_WITHIN)
            except (DurableJobError, asyncio.TimeoutError) as error:
                if self._args.sent_before:  # there may well be one
                    raise _uncertain(error) from error
                self.log.warning("Whether %s was the only job of its submission cannot be told: %r", self._job, error)
                return
            others = [job for job in _jobs_of(found) if job != self._job]
            for job in others if self._args.kill else ():
                self.log.warning("Killing %s, too: it carries the token of %s", job, self._job)
            await self._let_go_of(hook, others)
            if self._args.sent_before:
                _expect_no_others(found)

    async def _let_go_of(self, hook: JobHook, jobs: Sequence[JobRef]) -> None:
        """Kill jobs, unless they are to be kept, and release them: each, whatever becomes of the others."""
        troubles: list[DurableJobError] = []
        for job in jobs:
            try:
                if self._args.kill:
                    await hook.kill(job)
                await hook.release(job)
            except DurableJobError as error:
                troubles.append(error)
        if troubles:
            raise max(troubles, key=may_be_told_later)  # one that is no refusal, if there is one

    async def _kill_noted(self, dead: JobEvent) -> str | None:
        """
        Kill the job, and note before what is to be reported when it is dead.

        :return: what was in the way, if the cluster did not accept the kill.
        """

        async def kill() -> None:
            async with self._hook_of_same_cluster() as hook:
                await hook.kill(self._job)

        before = self._noted
        await self._note(dead)
        try:
            await asyncio.wait_for(kill(), _KILL_CONFIRMED_WITHIN)
        except (DurableJobError, asyncio.TimeoutError) as error:
            if not isinstance(error, (ClusterUnreachable, asyncio.TimeoutError)):  # it was not sent, or refused
                await self._note(None)
            elif before is None or before.job != dead.job or before.unanswered:  # else it has answered one
                await self._note(dataclasses.replace(dead, unanswered=True))
            return str(error) or f"no answer within {_KILL_CONFIRMED_WITHIN:.0f} s"
        return None

    async def _forget_vain_kill(self) -> None:
        """Take back the note of a kill that has not arrived: the job runs. If it is gone one day, that was not us."""
        if self._noted is not None and self._noted.unanswered and self._noted.job == self._job:
            await self._note(None)

    @contextlib.asynccontextmanager
    async def _hook_of_same_cluster(self) -> AsyncIterator[JobHook]:
        async with self._hook() as hook:
            names = await hook.cluster()
            if self._args.cluster and not set(names) & set(self._args.cluster):
                raise BadConfiguration(
                    f"connection {self._args.conn_id!r} names another cluster now: {', '.join(names)}"
                )
            yield hook

    async def _another_is_the_job(self, *, at_its_end: bool = False) -> bool | None:
        """
        Look whether a request that was still on its way made a second job for our token.

        Ever more seldom while the job runs, and once more at its end. The oldest stays, unless it was killed as one too
        many; the younger are killed, ours among them if it is one of them.

        :return: whether another job is to be followed now; ``None`` if that cannot be told yet, or a younger one that
            was killed may not be dead yet.
        """
        if self._look_for_double_at is None or (time.time() < self._look_for_double_at and not at_its_end):
            return False
        if at_its_end:
            self._look_for_double_at = time.time()  # `_listen` paces these looks: an end waits for them
        else:
            self._pause = min(4 * self._pause, _DOUBLES_EVERY)
            self._look_for_double_at = time.time() + self._pause
        ours = self._job
        try:
            async with self._hook() as hook:
                found = await hook.find(self._args.submission)
                if not isinstance(found, Found):
                    return False
                if found.counts:
                    self._job = found.status.job
                younger = [job for job in found.younger if job != self._job]
                for job in younger:
                    self.log.error("Killing %s: it carries the token of %s, and only one was meant", job, self._job)
                    await hook.kill(job)
                    await hook.release(job)
        except DurableJobError as error:
            self.log.warning("Whether %s has a double could not be told: %s", self._job, error)
            if self._job == ours:
                untold = may_be_told_later(error) or isinstance(error, (RequestRefused, SubmissionUncertain))
                return None if untold else False
        else:
            if self._job == ours and (younger or found.untold is not None):
                return None
        return self._job != ours

    # Airflow

    async def _is_in_charge(self) -> bool:
        """Whether no later try has taken over. ``False`` when that cannot be read."""
        try:
            value = await self._pushed(TRY_XCOM_KEY)
        except Exception as error:
            self.log.warning("Which try is in charge could not be read: %r", error)
            return False
        return isinstance(value, Mapping) and value.get("ti_id") == self._args.ti_id

    async def _note(self, event: JobEvent | None) -> None:
        """Note what is to be reported of the job, for a trigger of this try that comes after this one."""
        self._noted = event
        value = {} if event is None else {**event.to_json(), "ti_id": self._args.ti_id}
        try:
            await self._push(NOTE_XCOM_KEY, value)
        except Exception as error:
            self.log.warning(
                "What is to come of %s could not be noted for a triggerer that takes over: %r", self._job, error
            )

    async def _noted_end(self, status: JobStatus) -> JobEvent | None:
        """Return the event to report of a job that is dead or gone, if this trigger or one before it has noted one."""
        noted = self._noted
        if noted is None:
            try:
                value = await self._pushed(NOTE_XCOM_KEY)
            except Exception as error:
                self.log.warning("Whether a trigger of this try has killed %s could not be read: %r", self._job, error)
                return None
            noted = noted_end(value, ti_id=self._args.ti_id)
        if noted is None or noted.job != self._job or noted.token != self._args.submission.token:
            return None
        return dataclasses.replace(noted, state=status.raw or noted.state)

    async def _pushed(self, key: str) -> Any:
        """
        Return an XCom of this task instance.

        On a worker, whose loop has nothing else to do, at a stroke: the task talks with Airflow over one socket, and a
        question that is cut off, because Airflow's timer ends the waiting, would keep its lock or leave its answer to
        the next one.
        """
        from airflow.sdk.execution_time.xcom import XCom

        if self._args.on_worker:
            return XCom.get_one(key=key, **self._task_key())
        return await asyncio.wait_for(XCom.aget_one(key=key, **self._task_key()), _AIRFLOW_ANSWERS_WITHIN)

    async def _push(self, key: str, value: Any) -> None:
        """Write an XCom of this task instance; on a worker as :meth:`_pushed` reads it."""
        from airflow.sdk.execution_time.xcom import XCom

        if self._args.on_worker:
            XCom.set(key=key, value=value, **self._task_key())
        else:
            await asyncio.wait_for(XCom.aset(key=key, value=value, **self._task_key()), _AIRFLOW_ANSWERS_WITHIN)

    async def _task_state(self) -> str | None:
        """Return the state of the task instance, as :func:`state_of` does."""
        return await asyncio.wait_for(asyncio.to_thread(state_of, **self._task_key()), _ON_KILL_BOUND)

    async def push_links(self, links: Mapping[Link, str]) -> None:
        """Let Airflow's UI show where the job has come to, for as long as this try is in charge."""

        async def push() -> None:
            if await self._is_in_charge():
                for link, url in links.items():
                    await self._push(link.xcom_key, url)

        with contextlib.suppress(Exception):  # a link is a convenience
            await asyncio.wait_for(push(), _AIRFLOW_ANSWERS_WITHIN)

    def _task_key(self) -> dict[str, Any]:
        args = self._args
        return {"dag_id": args.dag_id, "run_id": args.run_id, "task_id": args.task_id, "map_index": args.map_index}


class SubmissionTrigger(JobTrigger):
    """
    Waits until the cluster can tell whether a submission has become a job. The operator then looks itself.

    :param arguments: :meth:`JobTriggerArguments.to_json`; the job in them is not known and only has a name to be
        called by, the deadline is when the waiting ends.
    """

    async def _follow(self) -> JobEvent:
        backoff = wait_random_exponential(multiplier=self._patience, max=max(LONGEST_BACKOFF, self._patience))
        patience = (self._args.deadline or time.time() + self._args.outage_timeout) - time.time()
        # Not past the end, where Airflow would end the deferral.
        with contextlib.suppress(RetryError, DurableJobError):  # whatever it is, the operator meets it, too
            async for attempt in AsyncRetrying(
                stop=stop_after_delay(patience),
                wait=pauses(backoff, within=patience),
                retry=retry_if_exception(may_be_told_later),
            ):
                with attempt:
                    async with self._hook_of_same_cluster() as hook:
                        await hook.find(self._args.submission)
        return self._event("told", None)

    async def _let_go(self) -> None:
        """Kill whatever has come of the submission, unless it is to be kept; nobody waits for it any more."""
        async with self._hook_of_same_cluster() as hook:
            found = await hook.find(self._args.submission)
            await self._let_go_of(hook, _jobs_of(found))
            _expect_no_others(found)


def _jobs_of(found: Found | Absent) -> Sequence[JobRef]:
    return (found.status.job, *found.younger) if isinstance(found, Found) else ()


def _expect_no_others(found: Found | Absent) -> None:
    """Raise why it cannot be told whether there are others, if it cannot."""
    if isinstance(found, Found) and found.untold is not None:
        raise found.untold


def _uncertain(error: DurableJobError | asyncio.TimeoutError) -> SubmissionUncertain:
    """Return what a look that failed means: that it can be told later, unless it was told that it cannot."""
    if isinstance(error, SubmissionUncertain):
        return error
    return SubmissionUncertain(str(error) or "no answer in time")


class _Narrator:
    """Says each change once in the task's own log, and shows the links in Airflow's UI."""

    __slots__ = ("_links", "_outage", "_said", "_trigger", "links_due")

    def __init__(self, trigger: JobTrigger) -> None:
        self._trigger = trigger
        self._said: JobStatus | None = None
        self._outage: Outage | None = None
        self._links = trigger._args.links
        self.links_due: float | None = None
        """When links are to be pushed that have changed, in seconds since the epoch."""

    async def status(self, status: JobStatus, *, beside: int = 0) -> None:
        """
        Tell a status, if it is new.

        :param beside: how many others are followed beside it.
        """
        why = _why_held_up(status)
        said, self._said = self._said, status
        if said is None:
            new = bool(why) or not (status.state.active and self._trigger.taken_over and beside >= _MANY)
        else:
            new = (said.job, said.raw, _why_held_up(said)) != (status.job, status.raw, why)
        if new:
            links = "".join(f"\n  {link.value}: {url}" for link, url in status.links.items())
            self._trigger.log.info("%s is %s%s%s", status.job, status.raw or status.state.value, why, links)
        if status.links and not self._trigger._args.on_worker:
            await self._show(status, beside)

    async def _show(self, status: JobStatus, beside: int) -> None:
        digest = digest_of_links(status.links)
        if digest == self._links:
            self.links_due = None
            return
        if self.links_due is None:
            apart = _LINKS_APART * beside if self._trigger.taken_over else 0.0
            self.links_due = time.time() + random.uniform(0.0, apart)  # noqa: S311 jitter
        if status.state.final or time.time() >= self.links_due:
            self.links_due, self._links = None, digest
            await self._trigger.push_links(status.links)

    def outage(self, outage: Outage | None) -> None:
        before, self._outage = self._outage, outage
        if outage is not None and before is None:
            self._trigger.log.warning(
                "No word from the cluster: %s. The job is followed on as soon as it answers; given up after %.0f s",
                outage.error,
                self._trigger._args.outage_timeout,
            )
        elif outage is None and before is not None:
            self._trigger.log.info("The cluster answers again after %.0f s", time.time() - before.since)


def _why_held_up(status: JobStatus) -> str:
    """Return the end of a line that says why the cluster cannot start a job; nothing if it can."""
    return f": {status.message}" if status.held_up_since is not None and status.message else ""
