"""
``airflow durable-spark orphans``: which of this deployment's jobs no task instance follows, and their end if asked.

What flows in: connections, the labels that hooks show, Airflow's metadata database. What flows out: a list on standard
output; everything else that is said goes to standard error.

The trap: cluster and database are not read at one moment. So the cluster is read, then the database, then the cluster
again. A job that the first look saw has its intent in the database by then, because that is written before anything is
sent; a job that has ended since then, which is why its task follows it no more, is missing from the second look. And
before a job is ended, the database is read once more: its task may have been cleared.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from airflow.cli.simple_table import AirflowConsole
from airflow.sdk.exceptions import AirflowException
from airflow.utils.cli import action_cli
from airflow.utils.helpers import ask_yesno
from airflow.utils.providers_configuration_loader import providers_configuration_loaded

from durable_spark.cli._tasks import Task, TaskKey, keys_of, note_job, read
from durable_spark.hooks.job import load_hook_class
from durable_spark.jobs import BadConfiguration, DurableJobError, OwnedJob
from durable_spark.operators._conversation import Conversation
from durable_spark.operators._store import deployment

if TYPE_CHECKING:
    from argparse import Namespace

    from durable_spark.hooks.job import JobHook
    from durable_spark.jobs import JobRef

__all__ = ["Finding", "examine", "orphans"]

SEEN_DEAD_WITHIN = 60.0
"""Seconds within which a job that was killed must be seen dead."""
LOOK_EVERY = 1.0

_NOBODY = "no unfinished task instance and no record has its label: its run or its record is gone"
_GONE = "its task instance is gone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """
    A job of this deployment, and whether anybody follows it.

    :param job: as its cluster shows it.
    :param task: its task instance, if that can be told.
    :param orphan: whether no task instance follows it.
    :param reason: why.
    """

    job: OwnedJob
    task: Task | None
    orphan: bool
    reason: str

    def row(self, conn_id: str) -> dict[str, Any]:
        """Return what is printed."""
        status = self.job.status
        state = status.raw or status.state.value
        key = self.task.key if self.task else TaskKey("", "", "", -1)
        return {
            "conn_id": conn_id,
            "job_id": status.job.id,
            "state": state if status.state.active else f"{state}, kept",
            "dag_id": key.dag_id,
            "run_id": key.run_id,
            "task_id": key.task_id,
            "map_index": key.map_index,
            "verdict": "orphan" if self.orphan else "followed",
            "reason": self.reason,
        }


def examine(jobs: Sequence[OwnedJob], *, named: str) -> Sequence[Finding]:
    """
    Return for each job whether a task instance follows it, by the database as it is now.

    :param jobs: jobs that were seen on a cluster before.
    :param named: the name of this deployment.
    """
    keys = keys_of({job.owner for job in jobs}, deployment=named)
    tasks = read(set(keys.values()))
    found = []
    for job in jobs:
        task = tasks[keys[job.owner]] if job.owner in keys else None
        orphan, reason = _judged(job, task)
        found.append(Finding(job=job, task=task, orphan=orphan, reason=reason))
    return found


def _judged(job: OwnedJob, task: Task | None) -> tuple[bool, str]:
    """Return whether a job is an orphan, and why. What is not known of a task that is not finished speaks for it."""
    if task is None:
        return True, _NOBODY
    if not task.exists:
        return True, _GONE
    another = bool(task.token) and task.token != job.token
    what = f"its task instance is {task.state or 'not scheduled yet'}"
    if not task.finished:
        return (True, f"{what}, with another submission") if another else (False, what)
    if another or not job.status.state.active:
        return True, what
    return True, f"{what}; a clear would end this job, or follow it on with on_clear='reconnect'"


@action_cli  # type: ignore[untyped-decorator]
@providers_configuration_loaded
def orphans(args: Namespace) -> None:
    """List the jobs of this deployment that no task instance follows; end them, if so asked."""
    os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "server"  # as Airflow's commands on connections do: else none are found
    named = deployment()
    if not named:
        raise SystemExit(
            "[durable_spark] deployment is not set (AIRFLOW__DURABLE_SPARK__DEPLOYMENT): without the name that this "
            "deployment's jobs are labelled with, they cannot be told from others"
        )
    try:
        hook_class = load_hook_class(args.hook)
    except BadConfiguration as error:
        raise SystemExit(str(error)) from None
    clusters = [_Cluster(hook_class(conn_id), named=named) for conn_id in dict.fromkeys(args.conn_ids)]
    with contextlib.ExitStack() as stack:
        with _logs_aside():
            for cluster in clusters:
                stack.enter_context(contextlib.closing(cluster))
                cluster.look(followed=args.all)
        rows = [finding.row(cluster.conn_id) for cluster in clusters for finding in cluster.findings]
        if not all(cluster.failed for cluster in clusters):  # an empty list would say that there are none
            AirflowConsole().print_as(data=rows, output=args.output)
        if args.kill:
            with _logs_aside():
                _end(clusters, ask=not args.yes)
    if any(cluster.failed for cluster in clusters):
        raise SystemExit(1)


def _logs_aside() -> contextlib.AbstractContextManager[Any]:
    """Keep standard output for the list: the loggers of hooks and of connections write there (3.3.2)."""
    return contextlib.redirect_stdout(sys.stderr)


def _end(clusters: Sequence[_Cluster], *, ask: bool) -> None:
    count = sum(finding.orphan for cluster in clusters for finding in cluster.findings)
    if not count:
        return
    if ask:
        try:
            agreed = ask_yesno(f"End {count} orphan{'s' if count > 1 else ''}? [y/n]", output_fn=_say)
        except EOFError:
            raise SystemExit("There is nobody to ask: give --yes. Nothing was ended") from None
        if not agreed:
            raise SystemExit("Nothing was ended")
    for cluster in clusters:
        cluster.end()


class _Cluster:
    """One connection's cluster, and what was found there."""

    def __init__(self, hook: JobHook, *, named: str) -> None:
        self.conn_id = hook.conn_id
        self.findings: Sequence[Finding] = ()
        self.failed = False
        self._hook = hook
        self._named = named
        self._talk = Conversation(hook)

    def close(self) -> None:
        self._talk.close()

    def look(self, *, followed: bool) -> None:
        """
        Find the jobs that nobody follows.

        :param followed: whether those that are followed are to be shown, too.
        """
        with self._trouble():
            findings = examine(self._owned(), named=self._named)
            if any(finding.orphan for finding in findings):
                seen_again = {job.status.job: job for job in self._owned()}
                findings = [
                    dataclasses.replace(finding, job=seen_again[finding.job.status.job])
                    for finding in findings
                    if finding.job.status.job in seen_again
                ]
            self.findings = [finding for finding in findings if finding.orphan or followed]

    def end(self) -> None:
        """Kill the orphans, let go of what is kept of them, and see them dead."""
        killed: list[JobRef] = []
        for finding in self.findings:
            if finding.orphan:
                with self._trouble(f"{finding.job.status.job} could not be ended: "):
                    killed += self._end(finding.job)
        with self._trouble("Whether they are dead cannot be told: "):
            self._see_dead(killed)

    def _end(self, job: OwnedJob) -> Sequence[JobRef]:
        """Return the job if it was killed."""
        ref, active = job.status.job, job.status.state.active
        (now,) = examine([job], named=self._named)
        if not now.orphan:
            self._say(f"{ref} is left alone: {now.reason}")
            return ()
        stored = now.task.stored if now.task else None
        if stored and stored.record.job is None and stored.record.submission.token == job.token:  # noqa: SIM102
            if not note_job(stored, ref):
                raise BadConfiguration("its record has just been changed. Look again")
        if active:
            self._talk.run(self._hook.kill(ref))
        self._talk.run(self._hook.release(ref))
        self._say(f"{ref} {'was killed' if active else 'was let go of'}")
        return [ref] if active else ()

    def _see_dead(self, jobs: Sequence[JobRef]) -> None:
        until = time.monotonic() + SEEN_DEAD_WITHIN
        while jobs:
            statuses = self._talk.run(self._hook.poll(jobs))
            jobs = [job for job in jobs if statuses[job].state.active]
            if not jobs or time.monotonic() > until:
                break
            self._talk.run(asyncio.sleep(LOOK_EVERY))
        for job in jobs:
            self.failed = True
            self._say(f"{job} is not seen dead within {SEEN_DEAD_WITHIN:.0f} s: it is {statuses[job].raw}")

    def _owned(self) -> Sequence[OwnedJob]:
        return self._talk.run(self._hook.find_owned(self._named))

    @contextlib.contextmanager
    def _trouble(self, what: str = "") -> Iterator[None]:
        """Say what is wrong with this connection or job, and go on with the next."""
        try:
            yield
        except (DurableJobError, AirflowException, NotImplementedError) as error:
            self.failed = True
            self._say(f"{what}{error}")

    def _say(self, text: str) -> None:
        _say(f"{self.conn_id}: {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
