"""
The protocol as a state machine: the product's own operator and triggers, and all that can happen around them.

Hypothesis chooses what happens next, in whatever order: a worker runs on for so many effects, is killed, is cut off and
wakes up late; a triggerer dies, or its triggers move; a person clears or marks; the cluster restarts, forgets, answers
late, or not at all, or what is not true any more. After each step the promises of ``docs/reliability.md`` are checked,
and at the end everything heals and the task must come to its end. What fails is shrunk to a short story.

A try may fail, too, only for a reason that the services have given (:meth:`Protocol.expect_a_reason`): a product that
ends as failed what it could have followed loses jobs. What the documentation names as limits is exempt, and nothing
else; each exemption is a line of that, of :meth:`Protocol.on_send`, :meth:`Protocol.on_kill` or
:meth:`Protocol.expect_nothing_left`.

The services are wrong within the contract of a hook. What a hook must see through so that it holds is tested below it:
answers of a standby and of a manager that has not read its state yet in ``tests/unit/hooks/test_standalone.py`` and
``test_yarn.py``, and on real ones in ``tests/cluster``; watches that go stale (410) or silent in
``tests/unit/hooks/test_kubernetes_watch.py``; garbage in ``tests/model/test_parsers.py`` and ``test_answers.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import tenacity
from airflow.sdk.bases.operator import TriggerFailureReason
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout, TaskDeferred
from airflow.sdk.execution_time.xcom import XCom
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from durable_spark.jobs import (
    AuthenticationFailed,
    ClusterError,
    ClusterUnreachable,
    DeadlinePassed,
    DurableJobError,
    Generation,
    JobEnded,
    JobFailed,
    JobKilled,
    JobLost,
    JobState,
    OutageTooLong,
    Record,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
)
from durable_spark.operators import _cluster, _ending, _recorded
from durable_spark.operators import job as operator_module
from durable_spark.operators.job import DurableJobOperator
from durable_spark.triggers import feed as feed_module
from durable_spark.triggers import job as trigger_module
from durable_spark.triggers.job import may_be_told_later
from tests.model.clock import Clock, Loop
from tests.model.cluster import NEIGHBOUR, Cluster, Job, SimulatedHook
from tests.model.processes import ModelInstance, Neighbour, Processes, Triggerer, Until, Worker
from tests.unit.tries import Died

if TYPE_CHECKING:
    from durable_spark.triggers.feed import Subscription

STEPS, A_FEW_STEPS = 100_000, 1_500
STORIES, A_FEW_STORIES = 500, 50
"""In a chunk, which has a seed of its own."""
CPU_SECONDS = 300
"""That a full run takes, at most."""
LONG = 50
"""Steps of a story."""
HOOK = f"{SimulatedHook.__module__}.{SimulatedHook.__qualname__}"
HOUR = 3600.0
PATIENCE = 900.0
"""``outage_timeout`` of the task."""

PLACES = ["send", "arrive", "answer", "write durable_spark", "find", "poll", "kill", "killed", "push durable_spark_try"]
ENDS = st.sampled_from(["", "", "dies", "is cut off"])
TROUBLES = ["out of reach", "locked", "recovering", "uncertain", "stale", "lagging", "flickering"]
effects = st.sampled_from([None, None, None, None, *PLACES, "report", "read the state", *range(1, 30, 3)])
"""How far a process runs: to its end, to before an effect, or for so many."""
clock: Clock
protocol: Protocol


class Protocol(RuleBasedStateMachine):
    """One task instance, with all that may befall it."""

    steps = 0
    examples = 0

    def __init__(self) -> None:
        global protocol
        super().__init__()
        type(self).examples += 1
        protocol = self
        self.airflow = Processes(clock)
        self.tokens: dict[str, int] = {}
        """The generation of each submission that was sent."""
        self.order: list[str] = []
        self.generation = 0
        self.state: str | None = "scheduled"
        self.person_came = False
        self.excused = False
        """Whether what is left running is left by one of the limits, or as it was asked for."""
        self.healed_at = math.inf
        self.resume: tuple[str, Any] | None = None
        self.deferral: TaskDeferred | None = None
        self.deferred_at = 0.0
        self.worker: Worker | None = None
        self.late: list[Worker] = []
        self.neighbour: Neighbour | None = None
        self.triggerer = Triggerer(self.airflow)
        self.others: list[Triggerer] = []
        self.last_error: BaseException | None = None
        self.names = itertools.count(1)
        self.since_start = 0

    @initialize(
        names_jobs=st.booleans(),
        watched=st.booleans(),
        alone=st.booleans(),
        on_clear=st.sampled_from(["kill", "reconnect"]),
        on_timeout=st.sampled_from(["kill", "kill", "keep"]),
        on_kill=st.sampled_from(["kill", "kill", "keep"]),
        on_lost=st.sampled_from(["fail", "fail", "resubmit"]),
        deferrable=st.sampled_from([True, True, True, False]),
        hours=st.sampled_from([None, None, 1]),
    )
    def a_task(
        self,
        names_jobs: bool,
        watched: bool,
        alone: bool,
        on_clear: str,
        on_timeout: str,
        on_kill: str,
        on_lost: str,
        deferrable: bool,
        hours: int | None,
    ) -> None:
        self.cluster = SimulatedHook.world = Cluster(clock, names_jobs=names_jobs, watched=watched)
        self.cluster.on_effect, self.cluster.on_send = self.airflow.effect, self.on_send
        self.cluster.on_kill, self.cluster.is_late = self.on_kill, self.is_late
        self.cluster.asker = lambda: self.airflow.current
        self.cluster.may_act = self.may_act
        self.on_clear, self.on_timeout, self.on_lost, self.deferrable = on_clear, on_timeout, on_lost, deferrable
        self.neighbour = None if alone else _follow_neighbour
        self._new_triggerer().kill()
        self.kept = on_kill == "keep"
        self.hours = hours
        self.ti = ModelInstance(
            self.airflow,
            DurableJobOperator,
            hook=HOOK,
            conn_id="cluster",
            job="job",
            retries=2,
            on_clear=on_clear,
            on_timeout=on_timeout,
            on_kill=on_kill,
            on_lost=on_lost,
            deferrable=deferrable,
            kill_timeout=5.0,
            outage_timeout=PATIENCE,
            execution_timeout=datetime.timedelta(hours=hours) if hours else None,
        )

    # --- Airflow

    @precondition(lambda self: self.state in ("scheduled", "up_for_retry"))
    @rule(run=effects, then=ENDS)
    def a_worker_begins(self, run: Until, then: str) -> None:
        """A try begins, or goes on after its deferral; and perhaps that was all."""
        self._begin(run)
        self._then(then)

    def _begin(self, run: Until) -> None:
        event = ""
        if self.resume is None:
            attempt = self.ti.begin()
            attempt.generation = self.generation
            call = attempt.execute
        else:
            attempt = self.ti.current  # type: ignore[assignment]
            method, value = self.resume
            event = value["kind"] if isinstance(value, dict) else value
            call = {
                "execute_complete": lambda: attempt.complete(value),
                "execute_again": lambda: attempt.again(),
                "__fail__": lambda: attempt.fail(value),
            }[method]
        if self.resume is None:
            self.last_error = None
        self.resume, self.deferral, self.state = None, None, "running"
        self.worker = Worker(self.airflow, attempt, call, event=event)
        self._run(self.worker, run)

    @precondition(lambda self: self.worker is not None)
    @rule(run=effects, told=st.sampled_from([False, False, True]), then=ENDS)
    def the_worker_goes_on(self, run: Until, told: bool, then: str) -> None:
        """It is told to stop before (a deploy's SIGTERM), or not; and perhaps that was all."""
        assert self.worker is not None
        if told:
            self.worker.stop()
        self._run(self.worker, run)
        self._then(then)

    def _then(self, then: str) -> None:
        if self.worker is None or not then:
            return
        if then == "dies":
            self.worker.kill()
            self._ended(self.worker)
        else:  # its heartbeat is missed, and Airflow takes it for dead; it is not
            self._leave_worker()
            self._failed(dead=True)

    @precondition(lambda self: self.late)
    @rule(run=effects, which=st.integers(0, 3), dies=st.booleans())
    def a_late_worker_goes_on(self, run: Until, which: int, dies: bool) -> None:
        worker = self.late[which % len(self.late)]
        self._run(worker, run)
        if dies and not worker.ended:
            self.late.remove(worker)
            worker.kill()
            self.excused = self.excused or self.person_came  # it was to kill its job, as a triggerer that dies was

    @precondition(lambda self: self.state == "deferred")
    @rule(seconds=st.sampled_from([1.0, 6.0, 12.0, 30.0, 90.0, 700.0]), fuse=st.sampled_from([None] * 5 + [*range(12)]))
    def the_triggerer_runs(self, seconds: float, fuse: int | None) -> None:
        """It runs for some time; perhaps it is killed after so many effects."""
        self._run_triggerer(seconds, fuse)

    @precondition(lambda self: self.state == "deferred")
    @rule(old=st.sampled_from([None, 0.0, 1.5, 2.5]), ends=st.booleans())
    def a_person_clears_what_is_followed(self, old: float | None, ends: bool) -> None:
        """
        The triggerer that has the old try's trigger gets the new one's.

        :param old: seconds for which it runs the old one, and lets go of it, before it takes up the new one; ``None``:
            it runs both.
        :param ends: whether the job ends meanwhile.
        """
        self._run_triggerer(6.0)
        if self.state != "deferred":
            return
        self._clear(moves=False)
        self._begin(None)
        if self.state != "deferred" or old is None:
            return
        for job in self.cluster.running if ends else ():
            self.cluster.end(job, JobState.SUCCEEDED)
        self.triggerer.run_for(old)
        self.triggerer.let_go()
        self._run_triggerer(120.0)
        waits = any(job.runs or job.state is JobState.RELAUNCHED for job in self.cluster.jobs)
        if self._is_well() and not waits:
            assert self.state != "deferred", "an end that the cluster tells is not heard"

    def _run_triggerer(self, seconds: float, fuse: int | None = None) -> None:
        assert self.deferral is not None
        if self.triggerer.trigger is None:
            self.triggerer.start(self.deferral)
        self.triggerer.fuse = fuse
        payload = self.triggerer.run_for(seconds)
        if self.triggerer.dead:
            self._new_triggerer().kill()
        else:
            self.triggerer.fuse = None
        if payload is not None:
            if payload["kind"] == "outage":
                self.expect_an_outage(self.triggerer)
            self.triggerer.trigger = None
            self.state, self.resume = "scheduled", (self.deferral.method_name, payload)
        elif (timeout := self.deferral.timeout) is not None:
            due = self.deferred_at + float(getattr(timeout, "total_seconds", lambda: timeout)())
            if clock.now > due + 15:
                self._new_triggerer().kill()  # its trigger is cancelled, and nothing more
                self.state, self.resume = "scheduled", ("__fail__", TriggerFailureReason.TRIGGER_TIMEOUT.value)

    @precondition(lambda self: self.state == "deferred")
    @rule(dies=st.booleans())
    def the_trigger_moves(self, dies: bool) -> None:
        """Another triggerer takes over. The one before is dead, or lives and does not know it yet."""
        assert self.deferral is not None
        if self.triggerer.trigger is None:
            self.triggerer.start(self.deferral)
        if dies:
            self._new_triggerer().kill()
        else:
            self._leave_trigger(moves=True)

    @precondition(lambda self: self.others or self.triggerer.unwanted)
    @rule(which=st.integers(0, 3))
    def a_triggerer_lets_go(self, which: int) -> None:
        """It learns that a trigger is none of its business any more, and calls ``on_kill``."""
        waiting = [each for each in (*self.others, self.triggerer) if each.unwanted]
        triggerer = waiting[which % len(waiting)]
        well = self._is_well()
        record, ended = self._record(), self.state in ("failed", "success", None)
        tokens = triggerer.let_go()
        if self.person_came and not well:
            self.excused = True  # "A triggerer that dies while it kills"
        if triggerer in self.others:
            self.others.remove(triggerer)
            triggerer.kill()
        ends_it = ended and self.person_came and self.state is not None and not self.kept
        if well and ends_it and record is not None and record.job and record.submission.token in tokens:
            left = [job for job in self.cluster.running if job.ref.id == record.job.id and job.dies_at is None]
            assert not left or self.excused, f"{left} runs on, although its task was ended while it was followed"

    @precondition(lambda self: self.state not in ("failed", "success", None) and self.since_start > 5)
    @rule(state=st.sampled_from(["failed", "success", "failed", "success", "failed", None]), seldom=st.integers(0, 2))
    def a_person_ends_it(self, state: str | None, seldom: int) -> None:
        """It is marked, or deleted with its run."""
        if seldom:
            return
        works = self.worker is not None and self.worker.at != "report"  # else it has had its last look
        if self.triggerer.trigger is None and not works:
            self.excused = True  # "Nothing runs between tries"
        self.state, self.person_came = state, True
        self._leave_worker(told=True)
        self._leave_trigger(moves=False)
        self.deferral = self.resume = None
        if state is None:
            self.ti.current = None

    @precondition(lambda self: self.state is not None)
    @rule(moves=st.booleans())
    def a_person_clears_it(self, moves: bool) -> None:
        """Another triggerer, or the one that still has the old trigger, is to run the new try's."""
        self._clear(moves=moves)

    def _clear(self, *, moves: bool) -> None:
        self.ti.clear()
        self.generation += 1
        self.person_came = False
        self.excused = False
        self._leave_worker(told=True)
        self._leave_trigger(moves=moves)
        self.state, self.deferral, self.resume = "scheduled", None, None

    @precondition(lambda self: self.state is not None)
    @rule(run=st.sampled_from(["find", "poll", "kill", "killed", "prepare"]), how=st.sampled_from(TROUBLES))
    def a_person_clears_it_in_bad_times(self, run: str, how: str) -> None:
        """The cluster is not well any more when the new try is halfway, and kills take their time."""
        self._clear(moves=True)
        self._begin(run)
        self.what_is_sent_is("taken", "taken", 60.0)
        self.the_cluster_is(how)

    @rule(seconds=st.sampled_from([1.0, 10.0, 300.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        clock.now += seconds

    # --- the cluster

    @precondition(lambda self: self.cluster.running)
    @rule(
        state=st.sampled_from([JobState.SUCCEEDED, JobState.FAILED, JobState.KILLED]),
        which=st.integers(0, 3),
        forgotten=st.booleans(),
    )
    def a_job_ends(self, state: JobState, which: int, forgotten: bool) -> None:
        """By itself, or by somebody else; perhaps its end is forgotten before anybody has seen it."""
        running = self.cluster.running
        job = running[which % len(running)]
        self.cluster.end(job, state)
        job.listed = job.listed and not forgotten

    @precondition(lambda self: self.cluster.jobs)
    @rule(how=st.sampled_from(["forgotten", "evicted", "lost", "relaunched"]))
    def a_job_is(self, how: str) -> None:
        """
        Something befalls one.

        Forgotten: what has ended is not listed any more. Evicted: nor is one that runs on. Lost: the one who accepted
        it died before it had written it down, and it never ran. Relaunched: the cluster starts it anew, under another
        ID.
        """
        cluster, running = self.cluster, self.cluster.running
        if how == "forgotten":
            for job in cluster.jobs:
                job.listed = job.listed and job.runs
        elif running and how == "evicted":
            running[-1].listed = False
        elif running and how == "lost":
            running[-1].state, running[-1].listed, running[-1].vanished = JobState.ABSENT, False, True
        elif running and running[-1].listed and not cluster.names_jobs and len(cluster.jobs) < 5:
            cluster.relaunch(running[-1])

    @rule(how=st.sampled_from(["well"] * 6 + TROUBLES))
    def the_cluster_is(self, how: str) -> None:
        """
        What it can say from now on.

        Out of reach: 5xx. Locked: it takes no credentials. Recovering: it knows nothing until it has read its state.
        Uncertain: a worker's page is out of reach, a driver queued. Stale: it shows what was. Lagging: a watch does.
        Flickering: it says that it does not know a job, and takes it back when it is asked again.
        """
        cluster = self.cluster
        cluster.away = {"out of reach": ClusterUnreachable, "locked": AuthenticationFailed}.get(how)
        cluster.recovering, cluster.uncertain = how == "recovering", how == "uncertain"
        cluster.stale, cluster.lags, cluster.flickers = how == "stale", how == "lagging", how == "flickering"
        for job in cluster.jobs:
            job.told = job.state

    @precondition(lambda self: self.state == "deferred")
    @rule(fate=st.sampled_from(["breaks", "ends"]))
    def the_stream(self, fate: str) -> None:
        """It will, at the next word."""
        self.cluster.stream_fate = fate

    @rule(
        submission=st.sampled_from(["taken", "taken", "refused", "late", "dropped", "unanswered"]),
        kill=st.sampled_from(["taken", "taken", "taken", "refused", "unanswered"]),
        takes=st.sampled_from([0.0, 0.0, 3.0, 60.0]),
    )
    def what_is_sent_is(self, submission: str, kill: str, takes: float) -> None:
        """What becomes of the next submission, and of kills from now on."""
        self.cluster.submit_fate, self.cluster.kill_fate, self.cluster.kill_takes = submission, kill, takes

    @precondition(lambda self: self.cluster.on_their_way)
    @rule(which=st.integers(0, 3), arrives=st.booleans())
    def a_late_request(self, which: int, arrives: bool) -> None:
        """It arrives after all, or never."""
        requests = self.cluster.on_their_way
        request = requests[which % len(requests)]
        if arrives:
            self.cluster.arrive(request, late=True)
        else:
            requests.remove(request)

    # --- what is promised

    def on_send(self, submission: Submission) -> None:
        """See that a submission may be sent."""
        sender = self.airflow.current
        assert isinstance(sender, Worker)
        token = submission.token
        new = token not in self.tokens
        before = self.order[-1] if self.order else None
        if new:
            self.tokens[token] = sender.attempt.generation
            self.order.append(token)
        if self.is_late():
            return  # it was stopped after it had passed the fence: "A request still on its way"
        record = self._record()
        assert record is not None, "sent without an intent"
        assert (record.submission.token, record.job, record.verdict) == (token, None, None), "sent without its intent"
        running = [job for job in self.cluster.running if not self._is_out_of_sight(job)]
        if self.cluster.names_jobs:
            running = [job for job in running if job.token != token]  # it refuses the second one itself
        assert not running, f"sent beside {running}"
        if new and before is not None and self.tokens[before] == self.generation:
            jobs = self._jobs_of(before)  # of a late request's the end counts if it is the older one
            ended = [job for job in jobs if not job.late or (job.seen and job is jobs[0])]
            ends = {job.state for job in ended}
            if any(old.token == before and old.state == JobState.KILLED.value for old in record.previous):
                # "A job that is gone after a kill": whatever it has come to, nobody can tell any more.
                ends = {job.state for job in ended if job.listed}
                ends.add(JobState.KILLED)
            assert JobState.SUCCEEDED not in ends or self.on_lost == "resubmit", "sent although one has succeeded"
            assert ends & {JobState.FAILED, JobState.KILLED} or self.on_lost == "resubmit", "sent although one is lost"

    def expect_a_reason(self, worker: Worker, error: BaseException) -> None:
        """See that a try has failed for a reason that the services have given."""
        cause = error.__cause__ if isinstance(error.__cause__, DurableJobError) else error
        record, told = self._record(), f"it fails for no reason: {error!r}"
        job = self._recorded_job()
        jobs = self._jobs_of(record.submission.token) if record else []
        this_life = record is not None and record.generation == self._generation()
        vouched = this_life and job is not None and job.state is JobState.SUCCEEDED and job.listed
        in_vain = self._meets_trouble(worker)
        late = self.hours is not None and clock.now >= self._begun() + HOUR
        if isinstance(cause, (JobFailed, JobKilled)):
            assert job is not None, told
            verdict = record.verdict if record else None
            assert verdict is not None, told
            assert verdict.state in (JobState.FAILED, JobState.KILLED), told
            self._expect_none_beside(job, jobs, told)
        elif isinstance(cause, JobLost):
            assert job is not None, told
            assert not job.listed, told
            self._expect_none_beside(job, jobs, told)
        elif isinstance(cause, (DeadlinePassed, AirflowTaskTimeout)):
            assert late, told
            assert not vouched or in_vain, told
        elif isinstance(cause, OutageTooLong):
            if worker.event == TriggerFailureReason.TRIGGER_TIMEOUT:  # no triggerer ran for as long
                assert job is None, told
                assert clock.now >= self._begun() + PATIENCE, told
            elif worker.event != "outage":  # that was judged when it was fired
                self.expect_an_outage(worker)
        elif isinstance(cause, SubmissionUncertain) and cause.permanent:
            assert any(not each.listed and not each.vanished for each in jobs), told
        elif isinstance(cause, (ClusterError, SubmissionUncertain, SubmissionRefused)):
            raised = [each for asker, each in self.cluster.errors if asker is worker]
            beside = any(each.runs and each.listed for each in jobs)
            assert cause in raised or (isinstance(cause, SubmissionUncertain) and beside), told
            if record is not None and record.job is None and may_be_told_later(cause):
                waited = late or clock.now >= self._begun() + PATIENCE
                resubmits = worker.event == "lost"  # hours after the try has begun, most often
                assert waited or resubmits or not this_life, told
        elif type(cause) is JobEnded:  # after a clear
            old = [each for each in self.cluster.running if self.tokens.get(each.token) != self.generation]
            assert old or in_vain or self._successor_is_gone(jobs), told
        else:
            assert worker.told, told

    def _expect_none_beside(self, job: Job, jobs: list[Job], told: str) -> None:
        """See that there is no other job of a submission that counts, or may yet."""
        others = [each for each in jobs if each is not job and not self._is_out_of_sight(each) and not each.spared]
        for each in others:
            counts = each.runs or (each.state is JobState.SUCCEEDED and jobs.index(each) < jobs.index(job))
            assert not counts, f"{told}, beside {each}"

    def expect_an_outage(self, process: object) -> None:
        """See that the cluster has kept a process in the dark, or a successor that it has started."""
        record = self._record()
        jobs = self._jobs_of(record.submission.token) if record else []
        reason = self._meets_trouble(process) or self._successor_is_gone(jobs)
        assert reason, "it is given up, and the cluster has told all that there is"

    def expect_no_bugs(self) -> None:
        """See that nothing has only been logged."""
        if self.airflow.bugs:
            raise AssertionError(f"{self.airflow.bugs[0]!r} was only logged") from self.airflow.bugs[0]

    def may_act(self) -> bool:
        """Whether the process that runs may do something about a job of the task that it sees."""
        process = self.airflow.current
        return process is self.worker or not isinstance(process, Worker)

    def is_late(self) -> bool:
        """Whether the worker that runs is not the one that is in charge of the task."""
        worker = self.airflow.current
        return worker is not self.worker or not isinstance(worker, Worker) or self.state != "running"

    def on_kill(self, job: Job) -> None:
        """See that there is a reason to kill a job that runs."""
        record = self._record()
        reasons = {
            "its task was ended": not self.kept and (self.person_came or self.state in ("failed", "success", None)),
            "its task was cleared": self.tokens.get(job.token) != self.generation,
            "its deadline passed": self.hours is not None and clock.now >= self._begun() + HOUR,
            "it is one of two": len([each for each in self.cluster.jobs if each.token == job.token]) > 1,
            "another submission is the task's": record is not None and record.submission.token != job.token,
            "its worker was told to stop": self._is_told() and not self.deferrable and not self.kept,
        }
        assert any(reasons.values()), f"{job} is killed for nothing"

    @invariant()
    def the_record_is_true(self) -> None:
        type(self).steps += 1
        self.since_start += 1
        self.expect_no_bugs()
        record = self._record() if hasattr(self, "ti") else None
        if record is None:
            return
        jobs = [job for job in self.cluster.jobs if job.token == record.submission.token]
        if record.job is None:
            assert record.verdict is None
            return
        named = [job for job in jobs if job.ref.id == record.job.id and record.job.uid in ("", job.ref.uid)]
        assert named, f"the record names {record.job}, which was never a job of {record.submission.token}"
        if record.verdict is None:
            return
        job, state = named[0], record.verdict.state
        if state in (JobState.KILLED, JobState.ABSENT):
            assert not job.runs or not job.listed, f"{job} is neither dead nor lost"
        else:
            assert job.state is state, f"{job} has not ended as {state}"

    # --- how it goes on

    def _run(self, worker: Worker, run: Until) -> None:
        if worker.go_on(run):
            self._ended(worker)

    def _ended(self, worker: Worker) -> None:
        """Do what Airflow does when a task's process has ended."""
        in_charge = worker is self.worker
        if in_charge:
            self.worker = None
        else:
            self.late.remove(worker)
        error = worker.error
        if error is not None and not isinstance(error, (Died, AirflowException, AirflowTaskTimeout)):
            raise error
        if not in_charge or self.state != "running":  # Airflow takes no word of it any more
            if self.person_came and self._meets_trouble(worker):
                self.excused = True  # the cluster was away when its job was to be killed
            return
        if isinstance(worker.result, TaskDeferred):
            self.state, self.deferral, self.deferred_at = "deferred", worker.result, clock.now
        elif error is None:
            self._succeeded(worker.result)
        elif isinstance(error, Died):
            self._failed(dead=True)
        else:
            self.expect_a_reason(worker, error)
            self.last_error = error
            if isinstance(error, AirflowFailException):
                self.state = "failed"
            else:
                self._failed(dead=False)

    def _succeeded(self, job_id: Any) -> None:
        jobs = [job for job in self.cluster.jobs if job.ref.id == job_id]
        assert any(job.state is JobState.SUCCEEDED for job in jobs), f"a success that nobody vouched for: {job_id}"
        if self.on_clear != "reconnect":
            assert any(self.tokens[job.token] == self.generation for job in jobs), f"{job_id} is of before the clear"
        self.state = "success"

    def _failed(self, *, dead: bool) -> None:
        attempt = self.ti.current
        assert attempt is not None
        if dead and attempt.try_number > attempt.max_tries:
            self.excused = True  # "No try left"
        self.state = "up_for_retry" if attempt.try_number <= attempt.max_tries else "failed"

    def _leave_worker(self, *, told: bool = False) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            if told:
                worker.stop()
            self.late.append(worker)

    def _leave_trigger(self, *, moves: bool) -> None:
        """Have the trigger, if there is one, be none of its triggerer's business any more."""
        self.triggerer.set_aside()
        if moves and self.triggerer.unwanted:
            self.others.append(self._new_triggerer())

    def _new_triggerer(self) -> Triggerer:
        old, self.triggerer = self.triggerer, Triggerer(self.airflow, self.neighbour)
        return old

    def _record(self) -> Record | None:
        value = self.ti.store.get("durable_spark")
        return None if value is None else Record.from_json(value)

    def _recorded_job(self) -> Job | None:
        record = self._record()
        named = record.job if record else None
        return next((job for job in self.cluster.jobs if named and job.ref.id == named.id), None)

    def _generation(self) -> Generation:
        attempt = self.ti.current
        assert attempt is not None
        return Generation(max_tries=attempt.max_tries, traceparent=attempt.context_carrier["traceparent"])

    def _begun(self) -> float:
        return self.ti.current.start_date.timestamp() if self.ti.current else 0.0

    def _is_well(self) -> bool:
        cluster = self.cluster
        wrong = (cluster.recovering, cluster.uncertain, cluster.stale, cluster.lags, cluster.flickers)
        return cluster.away is None and not any(wrong) and cluster.kill_fate == "taken"

    def _is_told(self) -> bool:
        return isinstance(self.airflow.current, Worker) and self.airflow.current.told

    def _is_out_of_sight(self, job: Job) -> bool:
        """
        Whether nobody can be blamed for what a job does.

        Its request was late, and nobody who looked was shown it ("A request still on its way"); or the cluster has
        forgotten it, though it runs on.
        """
        return (job.late and not job.seen) or not job.listed

    def _jobs_of(self, token: str) -> list[Job]:
        return [job for job in self.cluster.jobs if job.token == token]

    def _successor_is_gone(self, jobs: list[Job]) -> bool:
        """Whether a job was relaunched, and the cluster does not know as what: "Supervised drivers"."""
        listed = [job for job in jobs if job.listed]
        return bool(listed) and all(job.state is JobState.RELAUNCHED for job in listed)

    def _meets_trouble(self, process: object) -> bool:
        """Whether a process has been told what is not true, or nothing, and the truth at most once since."""
        return any(truths < 2 for (asker, _), truths in self.cluster.truths.items() if asker is process)

    def teardown(self) -> None:
        """Heal everything, and see the task to its end."""
        try:
            if hasattr(self, "cluster"):
                self._heal()
                self._finish()
        finally:
            for worker in (*self.late, *([self.worker] if self.worker else [])):
                worker.kill()
            for triggerer in (*self.others, self.triggerer):
                triggerer.kill()
        gc.collect(0)  # a loop is told of an error that nobody has looked at when its task goes
        self.expect_no_bugs()

    def _heal(self) -> None:
        cluster = self.cluster
        cluster.away, cluster.recovering, cluster.uncertain = None, False, False
        cluster.stale, cluster.lags, cluster.flickers, cluster.stream_fate = False, False, False, "goes on"
        cluster.submit_fate, cluster.kill_fate, cluster.kill_takes = "taken", "taken", 0.0
        for request in list(cluster.on_their_way):
            cluster.arrive(request, late=True)
        self.healed_at = clock.now
        for worker in list(self.late):
            self._run(worker, None)
            if not worker.ended:
                self.late.remove(worker)
                worker.kill()
        self.triggerer.let_go()
        while self.others:
            triggerer = self.others.pop()
            triggerer.let_go()
            triggerer.kill()

    def _finish(self) -> None:
        for step in range(200):
            if self.state in ("failed", "success", None):
                break
            if self.worker is not None:
                self._all_succeed()
                self._run(self.worker, None)
            elif self.state == "deferred":
                self._run_triggerer(30.0 if step < 40 else 1000.0)  # a try may wait for as long as an outage
                self._all_succeed()
            else:
                self._begin(None)
        assert self.state in ("failed", "success", None), f"it is {self.state} for ever"
        self.expect_nothing_left()

    def _all_succeed(self) -> None:
        for job in self.cluster.running:
            self.cluster.end(job, JobState.SUCCEEDED)

    def expect_nothing_left(self) -> None:
        """See that no job runs on, unless the task says so, or a limit does."""
        clock.now += 120
        self.cluster.settle()
        record, said = self._record(), str(self.last_error) if self.state == "failed" else ""
        told = record is not None and (
            f"{record.job} may still run" in said or "whether the submission has become a job is not known" in said
        )
        if self.excused or (self.person_came and self.kept):
            return
        for job in self.cluster.running:
            of_record = record is not None and job.token == record.submission.token
            excused = self._is_out_of_sight(job) or job.spared or (told and of_record)
            if excused and of_record and job.late and job.listed:
                excused = not self._is_looked_for(job)
            assert excused, f"{job} runs on, and the task is {self.state}: {said}"

    def _is_looked_for(self, job: Job) -> bool:
        """Whether it must have been seen at the end of the job that is followed, since everything was well then."""
        record, followed = self._record(), self._recorded_job()
        ended_at = followed.ended_at if followed else None
        if record is None or not record.resent or record.verdict is None or ended_at is None:
            return False
        return ended_at > max(self.healed_at, job.born)


def _follow_neighbour() -> contextlib.AbstractAsyncContextManager[Subscription]:
    """Follow somebody else's job on the feed of the task's cluster."""
    key, make_hook = trigger_module._feed_of(HOOK, "cluster", ("cluster://one",))
    return feed_module.join(key, NEIGHBOUR, make_hook=make_hook)


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Put the clock, the cluster and Airflow's answers where the product looks for them."""
    global clock
    clock = Clock()

    def get(*, key: str, **_: Any) -> Any:
        protocol.airflow.effect("pull")
        return protocol.ti.xcoms.get(key)

    def push(*, key: str, value: Any, **_: Any) -> None:
        protocol.airflow.effect(f"push {key}")
        protocol.ti.xcoms[key] = value

    async def aget(**asked: Any) -> Any:
        return get(**asked)

    async def apush(**asked: Any) -> None:
        push(**asked)

    def state_of(**_: Any) -> str | None:
        protocol.airflow.effect("read the state")
        return protocol.state

    def token() -> str:
        return f"{next(protocol.names):032x}"

    def new_event_loop() -> Loop:
        process = protocol.airflow.current
        return Loop(clock, process.loop_tells) if process else Loop(clock)

    def only_logged(*_: Any) -> None:
        process, error = protocol.airflow.current, sys.exc_info()[1]
        if process is not None and error is not None:
            process.loop_tells({"exception": error})

    gc.disable()  # what a story leaves is all young when it is over, and takes no time to collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XCom, "get_one", get)
        patch.setattr(XCom, "set", push)
        patch.setattr(XCom, "aget_one", aget)
        patch.setattr(XCom, "aset", apush)
        patch.setattr(trigger_module, "state_of", state_of)
        for module in (_recorded, _ending):
            patch.setattr(module, "new_token", token)
        patch.setattr(asyncio, "new_event_loop", new_event_loop)
        patch.setattr(feed_module.log, "exception", only_logged)
        for module in (_recorded, _cluster, _ending, operator_module, trigger_module, feed_module, tenacity):
            patch.setattr(module, "time", clock.module)
        logging.disable(logging.CRITICAL)
        before = structlog.get_config()
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        try:
            yield
        finally:
            structlog.configure(**before)
            gc.enable()
            logging.disable(logging.NOTSET)


def test_protocol(full: bool, model_seed: int, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    wanted, stories = (STEPS, STORIES) if full else (A_FEW_STEPS, A_FEW_STORIES)
    begun, cpu, number = time.monotonic(), time.process_time(), model_seed
    Protocol.steps = Protocol.examples = 0
    options = settings(
        max_examples=stories,
        stateful_step_count=LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=True,
        report_multiple_bugs=False,
    )
    try:
        with simulated():
            while Protocol.steps < wanted:
                with capsys.disabled():  # a run that is stopped, or fails, has said what it was at
                    print(f"\nmodel: --model-seed {number}{' --full' * full}, after {Protocol.steps} steps", end="")
                run_state_machine_as_test(seed(number)(Protocol), settings=options)
                gc.collect()
                number += 1
            number -= 1
    finally:
        summary.update(
            steps=Protocol.steps,
            examples=Protocol.examples,
            model_seconds=round(time.monotonic() - begun, 1),
            model_cpu_seconds=round(spent := time.process_time() - cpu, 1),
            seeds=[model_seed, number],
        )
    assert Protocol.steps >= wanted
    assert not full or spent < CPU_SECONDS, f"{spent:.0f} s of CPU"
