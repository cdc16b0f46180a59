"""Stories in which a job was nearly run twice, lost, killed by mistake, or followed for ever."""

from __future__ import annotations

import asyncio
import datetime
import math
import time
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, task_group
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout
from airflow.sdk.execution_time.timeout import timeout

from dev.processes import wait_until_async
from durable_spark.jobs import ClusterUnreachable, JobRef, JobState, JobStatus, SubmissionRefused, SubmissionUncertain
from durable_spark.operators import _cluster, _ending, _recorded
from durable_spark.operators import job as operator_module
from durable_spark.operators._store import Superseded, fingerprint_of
from durable_spark.operators.job import DurableJobOperator
from durable_spark.operators.spark import SparkJobOperator
from durable_spark.triggers import job as trigger_module
from durable_spark.triggers.feed import FeedKey, join
from durable_spark.triggers.job import NOTE_XCOM_KEY, JobTrigger
from tests.unit import tries
from tests.unit.test_feed import PolledHook, follow, hook, state
from tests.unit.test_operator import elsewhere, event, instance, job_of, service
from tests.unit.test_trigger import TOKEN, airflow, trigger
from tests.unit.test_trigger import event as fired
from tests.unit.tries import Died, Job, MemoryHook, Service, TaskInstance, alarm, before_each_poll

__all__ = ["airflow", "hook", "instance", "service"]  # fixtures


@pytest.fixture
def production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DURABLE_SPARK__DEPLOYMENT", "production")


def relaunch(service: Service, job: str) -> str:
    service.jobs[job].state = JobState.RELAUNCHED
    return service.add(service.jobs[job].token)


def evict(service: Service, job: str) -> None:
    service.jobs[job] = Job("", "", JobState.ABSENT)


class TestRelaunchedByTheCluster:
    def test_every_later_try_follows_the_successor(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        relaunch(service, "job-1")
        assert job_of(instance.begin().execute()) == "job-2"
        assert job_of(instance.begin().execute()) == "job-2"
        assert instance.store["durable_job_id"] == "job-2"

    def test_also_when_the_old_id_is_forgotten_and_the_task_cleared(
        self, instance: TaskInstance, service: Service
    ) -> None:
        instance.begin().execute()
        relaunch(service, "job-1")
        instance.begin().execute()
        evict(service, "job-1")
        instance.clear()
        instance.begin().execute()
        assert service.running == ["job-3"]

    def test_a_stored_success_outlives_a_kill_before_the_mirror(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = instance.begin()
        first.execute()
        relaunch(service, "job-1")
        service.jobs["job-2"].state = JobState.SUCCEEDED

        def die(*_: Any) -> None:
            raise Died

        with monkeypatch.context() as patch:
            patch.setattr(DurableJobOperator, "mirror", die)
            with pytest.raises(Died):
                first.complete({**event(instance, "succeeded"), "job_id": "job-2"})
        assert instance.begin().execute() == "job-2"
        assert instance.store["durable_job_id"] == "job-2"

    def test_an_unknown_job_may_have_a_successor(self, instance: TaskInstance, service: Service) -> None:
        instance.begin(on_lost="resubmit").execute()
        relaunch(service, "job-1")
        evict(service, "job-1")
        assert job_of(instance.begin(on_lost="resubmit").execute()) == "job-2"
        assert service.running == ["job-2"]

    def test_after_a_clear_the_successor_is_killed(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        relaunch(service, "job-1")
        evict(service, "job-1")
        instance.clear()
        instance.begin().execute()
        assert service.running == ["job-3"]

    def test_after_a_clear_a_successor_that_cannot_be_told_is_not_submitted_beside(
        self, instance: TaskInstance, service: Service
    ) -> None:
        """Found by the model."""
        instance.begin().execute()
        relaunch(service, "job-1")
        evict(service, "job-1")
        instance.clear()
        service.find_error = SubmissionUncertain("a worker's page is out of reach")
        with pytest.raises(AirflowException, match="SubmissionUncertain: a worker's page"):
            instance.begin().execute()
        assert service.running == ["job-2"]
        service.find_error = None
        instance.begin().execute()
        assert (service.running, service.kills) == (["job-3"], ["job-2"])

    @pytest.mark.parametrize("end", ["cleared", "overdue"])
    def test_relaunched_and_forgotten_while_it_is_killed_the_successor_is_killed_too(
        self, instance: TaskInstance, service: Service, end: str
    ) -> None:
        first = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        first.execute()

        def relaunched() -> None:
            service.before_kill = None
            relaunch(service, "job-1")
            evict(service, "job-1")

        service.before_kill = relaunched
        if end == "cleared":
            instance.clear()
            instance.begin().execute()
            assert service.running == ["job-3"]
        else:
            with pytest.raises(AirflowTaskTimeout, match="job-2 was killed and is KILLED"):
                first.complete({**event(instance, "timeout"), "confirmed": False})
            assert service.running == []
        assert service.kills == ["job-1", "job-2"]

    def test_one_that_can_never_be_told_is_taken_for_dead_with_the_old_job(
        self, instance: TaskInstance, service: Service
    ) -> None:
        instance.begin().execute()
        evict(service, "job-1")
        instance.clear()
        service.find_error = SubmissionUncertain("forgotten", permanent=True)
        instance.begin().execute()
        assert service.running == ["job-2"]

    async def test_the_trigger_looks_for_it_before_it_says_lost(self, service: Service, airflow: Any) -> None:
        service.add(TOKEN)
        evict(service, "job-1")
        service.add(TOKEN, state=JobState.SUCCEEDED)
        assert (await asyncio.wait_for(fired(trigger()), 5)).kind == "succeeded"


class TestTwoOfOneToken:
    """A request that was still on its way made a job beside ours. The older one is the one that is meant."""

    @pytest.fixture(autouse=True)
    def resent(self, instance: TaskInstance, service: Service) -> None:
        """The first try died before its request left; it left all the same, and arrived before the second try's."""
        service.die_before_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.die_before_submit = False
        token = instance.store["durable_spark"]["submission"]["token"]

        def late() -> None:
            service.before_submit = None
            service.add(token)

        service.before_submit = late

    @pytest.fixture
    def killed(self, instance: TaskInstance, service: Service) -> None:
        """Ours was killed as one too many by the worker whose request was late."""
        assert job_of(instance.begin().execute()) == "job-2"
        service.jobs["job-2"].state = JobState.KILLED

    def test_ours_ends_at_once(self, instance: TaskInstance, service: Service) -> None:
        def killed() -> None:
            service.jobs["job-2"].state = JobState.KILLED

        service.after_submit = killed
        deferral = instance.begin().execute()
        assert job_of(deferral) == "job-1"
        assert deferral.trigger._args.to_json()["sent_before"] is True

    def test_a_retry_follows_the_older_one(self, instance: TaskInstance, service: Service, killed: None) -> None:
        deferral = instance.begin().execute()
        assert job_of(deferral) == "job-1"
        assert deferral.trigger._args.to_json()["sent_before"] is True
        assert service.running == ["job-1"]

    def test_its_success_is_the_tasks(self, instance: TaskInstance, service: Service, killed: None) -> None:
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert instance.begin().execute() == "job-1"

    def test_nothing_is_submitted_while_it_cannot_be_told(
        self, instance: TaskInstance, service: Service, killed: None
    ) -> None:
        service.find_error = SubmissionUncertain("queued")
        with pytest.raises(AirflowException, match="SubmissionUncertain: queued"):
            instance.begin().execute()
        assert service.running == ["job-1"]

    def test_after_a_clear_both_are_dead(self, instance: TaskInstance, service: Service, killed: None) -> None:
        instance.clear()
        assert job_of(instance.begin().execute()) == "job-3"
        assert (service.running, service.kills) == (["job-3"], ["job-1"])

    def test_both_have_failed(self, instance: TaskInstance, service: Service, killed: None) -> None:
        service.jobs["job-1"].state = JobState.FAILED
        assert job_of(instance.begin().execute()) == "job-3"
        assert instance.store["durable_spark"]["resent"] is False

    def test_a_success_is_not_undone_by_one_too_many(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state, service.jobs["job-2"].state = JobState.KILLED, JobState.SUCCEEDED
        assert instance.begin().execute() == "job-2"

    @pytest.mark.parametrize("recorded", [False, True])
    def test_after_a_success_and_a_clear_nothing_is_submitted_beside_it(
        self, instance: TaskInstance, service: Service, recorded: bool
    ) -> None:
        second = instance.begin()
        assert job_of(second.execute()) == "job-2"
        service.jobs["job-2"].state = JobState.SUCCEEDED
        service.find_error = SubmissionUncertain("a worker's page is out of reach")
        if recorded:  # a success counts, whatever there is beside it
            assert second.complete(event(instance, "succeeded")) == "job-2"
        instance.clear()
        with pytest.raises(AirflowException, match="SubmissionUncertain: a worker's page"):
            instance.begin().execute()
        assert service.running == ["job-1"]
        service.find_error = None
        assert job_of(instance.begin().execute()) == "job-3"
        assert service.running == ["job-3"]

    def test_after_a_success_and_a_clear_a_younger_one_is_seen_dead_first(
        self, instance: TaskInstance, service: Service
    ) -> None:
        service.before_submit = None
        assert job_of(instance.begin().execute()) == "job-1"
        service.add(service.jobs["job-1"].token)
        service.jobs["job-1"].state = JobState.SUCCEEDED
        service.outlives_kills = True
        instance.clear()
        with pytest.raises(AirflowException, match="job-2, of the same submission as job-1, may not be dead yet"):
            instance.begin(kill_timeout=0.05).execute()
        assert service.running == ["job-2"]

    def test_ours_is_not_lost_while_the_older_one_may_run(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        service.jobs["job-2"] = Job("", "", JobState.ABSENT)
        service.find_error = SubmissionUncertain("a worker's page is out of reach")
        with pytest.raises(AirflowException, match="SubmissionUncertain: a worker's page"):
            instance.begin().execute()
        service.find_error = None
        assert job_of(instance.begin().execute()) == "job-1"

    def test_what_can_never_be_told_is_for_a_person(
        self, instance: TaskInstance, service: Service, killed: None
    ) -> None:
        service.find_error = SubmissionUncertain("its worker is gone", permanent=True)
        with pytest.raises(AirflowFailException, match="its worker is gone"):
            instance.begin().execute()
        assert service.running == ["job-1"]

    def test_a_younger_one_is_seen_dead_first(self, instance: TaskInstance, service: Service) -> None:
        service.before_submit = None
        assert job_of(instance.begin().execute()) == "job-1"
        service.add(service.jobs["job-1"].token)
        service.jobs["job-1"].state = JobState.FAILED
        service.outlives_kills = True
        with pytest.raises(AirflowException, match="job-2, of the same submission as job-1, may not be dead yet"):
            instance.begin(kill_timeout=0.05).execute()
        assert service.running == ["job-2"]
        service.outlives_kills = False
        assert job_of(instance.begin().execute()) == "job-3"
        assert service.running == ["job-3"]

    def test_the_one_that_is_followed_now_was_not_killed(self, instance: TaskInstance, service: Service) -> None:
        """A kill that was noted was that of the other one: if this one is gone, it is lost."""
        instance.begin().execute()
        instance.store["durable_spark"]["killing"] = True
        service.jobs["job-2"].state = JobState.KILLED
        assert job_of(instance.begin().execute()) == "job-1"
        service.jobs["job-1"] = Job("", "", JobState.ABSENT)
        with pytest.raises(AirflowFailException, match="JobLost"):
            instance.begin().execute()

    def test_whose_name_is_another_tasks_by_now_is_gone(self, instance: TaskInstance, service: Service) -> None:
        second = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        second.execute()

        def gone() -> None:
            service.jobs["job-2"] = Job("", "", JobState.ABSENT)
            service.find_error = SubmissionRefused("a pod of that name is another task's")

        service.before_kill = gone
        with pytest.raises(AirflowTaskTimeout, match="job-2 was killed"):
            second.complete({**event(instance, "timeout"), "job_id": "job-2", "confirmed": False})

    def test_an_overdue_one_does_not_outlive_ours(self, instance: TaskInstance, service: Service) -> None:
        second = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        second.execute()
        with pytest.raises(AirflowTaskTimeout, match="job-1 was killed and is KILLED"):
            second.complete({**event(instance, "timeout"), "confirmed": False})
        assert service.running == []


class TestAVainKill:
    def test_of_the_trigger_does_not_make_a_loss_a_kill(
        self, instance: TaskInstance, service: Service, airflow: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The cluster is away when the deadline passes; the retry follows the job, which is lost one day."""
        monkeypatch.setenv("AIRFLOW__DURABLE_SPARK__EARLIEST_EVENT", "0")
        monkeypatch.setattr(_ending, "_KILL_CONFIRMED_WITHIN", 0.1)
        limit = datetime.timedelta(hours=1)
        first = instance.begin(execution_timeout=datetime.timedelta(seconds=0.3))
        deferral = first.execute()
        airflow["try"] = {"ti_id": str(first.id)}
        service.unreachable = True
        overdue = asyncio.run(asyncio.wait_for(fired(deferral.trigger), 10))
        assert (overdue.kind, overdue.confirmed) == ("timeout", False)
        instance.xcoms.update(airflow["pushed"])
        with pytest.raises(AirflowTaskTimeout):
            first.complete(overdue.to_json())
        assert service.kills == []
        service.unreachable = False
        assert job_of(instance.begin(execution_timeout=limit).execute()) == "job-1"
        service.jobs["job-1"] = Job("", "", JobState.ABSENT)
        with pytest.raises(AirflowFailException, match="JobLost"):
            instance.begin(execution_timeout=limit).execute()


class TestTakenForDead:
    def test_not_by_an_absence_that_is_taken_back(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Found by the model: the old job takes its time to die, and the cluster once does not know it."""
        instance.begin().execute()
        instance.clear()
        service.outlives_kills = True
        monkeypatch.setattr(_cluster, "_LOOK_AGAIN_AFTER", 0.01)
        poll, blind = MemoryHook.poll, [True]

        async def blind_once(self: MemoryHook, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
            if service.kills and blind:
                blind.clear()
                return {job: JobStatus(job=job, state=JobState.ABSENT) for job in jobs}
            return await poll(self, jobs)

        monkeypatch.setattr(MemoryHook, "poll", blind_once)
        with pytest.raises(AirflowException, match=r"not seen dead within 0 s \(job-1 is still RUNNING\)"):
            instance.begin(kill_timeout=0.05).execute()
        assert (service.running, blind) == (["job-1"], [])

    def test_what_has_ended_in_its_place_is_dead_whatever_the_time(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Found by the model: as the time was up, a job that had succeeded was "still SUCCEEDED"."""
        instance.begin().execute()
        instance.clear()
        poll = MemoryHook.poll

        async def relaunched(self: MemoryHook, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
            if service.kills == ["job-1"] and "job-2" not in service.jobs:
                relaunch(service, "job-1")
                service.jobs["job-2"].state = JobState.SUCCEEDED
            return await poll(self, jobs)

        monkeypatch.setattr(MemoryHook, "poll", relaunched)
        assert job_of(instance.begin(kill_timeout=1e-9).execute()) == "job-3"


class TestDeleted:
    def test_while_it_looks_at_its_job_it_leaves_none(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Found by the model: the cluster has relaunched the job, and where that is to be noted the store is gone."""
        only = instance.begin()

        def deleted(number: int, _: object) -> None:
            if number == 1:
                relaunch(service, "job-1")
                instance.current = None

        before_each_poll(monkeypatch, deleted)
        monkeypatch.setattr(trigger_module, "state_of", lambda **_: None)
        with pytest.raises(Superseded):
            only.execute()
        assert service.jobs["job-2"].state is JobState.KILLED


class TestLateWorkers:
    def test_kill_nothing_by_its_label(self, instance: TaskInstance, service: Service, production: None) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state = JobState.FAILED
        late = instance.begin()
        assert job_of(instance.begin().execute()) == "job-2"
        with pytest.raises(Superseded):
            late.execute()
        assert service.kills == []

    def test_do_not_say_that_they_are_in_charge(self, instance: TaskInstance, service: Service) -> None:
        oldest, second = instance.begin(), instance.begin()

        def overtaken() -> None:
            service.after_submit = None
            elsewhere(instance.begin().execute)
            with pytest.raises(Superseded):
                elsewhere(oldest.execute)

        service.after_submit = overtaken
        with pytest.raises(Superseded):
            second.execute()
        assert service.running == ["job-1"]
        assert instance.current is not None
        assert instance.xcoms["durable_spark_try"]["ti_id"] == str(instance.current.id)

    async def test_a_request_that_came_late_made_the_older_job(self, service: Service, airflow: Any) -> None:
        service.add(TOKEN)
        service.add(TOKEN)

        async def killed() -> list[str]:
            return service.kills

        async def end() -> None:
            await wait_until_async(killed, 5, "a kill", interval=0.01)
            service.jobs["job-1"].state = JobState.SUCCEEDED

        ending = asyncio.create_task(end())
        told = await asyncio.wait_for(fired(trigger(job=JobRef("job-2"), sent_before=True)), 5)
        await ending
        assert (told.kind, told.job.id, service.kills) == ("succeeded", "job-1", ["job-2"])


class TestEditedConnection:
    def test_a_deadline_stores_no_verdict_of_another_cluster(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        first.execute()
        service.jobs.clear()
        service.names = ("service://two",)
        with pytest.raises(AirflowTaskTimeout, match=r"service://two.*may still run"):
            first.complete(event(instance, "timeout"))
        with pytest.raises(AirflowException, match="ClusterChanged"):
            instance.begin().execute()
        assert service.submissions == 1


class TestUpstream:
    def test_what_ended_before_a_clear_is_no_success_after_an_outage(
        self, instance: TaskInstance, service: Service
    ) -> None:
        instance.store["durable_job_id"] = service.add("theirs", state=JobState.SUCCEEDED)
        instance.clear()
        service.unreachable = True
        with pytest.raises(AirflowException, match="nothing was submitted"):
            instance.begin().execute()

    def test_a_job_that_was_found_is_mirrored(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        instance.begin().execute()
        assert instance.store["durable_job_id"] == "job-1"

    def test_also_if_it_has_ended_when_the_next_try_looks(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert instance.begin().execute() == "job-1"
        assert instance.store["durable_job_id"] == "job-1"


class TestReconnectAfterAClear:
    def test_also_without_a_record(self, instance: TaskInstance, service: Service, production: None) -> None:
        instance.begin(on_clear="reconnect").execute()
        instance.store.clear()
        assert job_of(instance.begin(on_clear="reconnect").execute()) == "job-1"

    def test_but_never_to_another_items_job(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_recorded, "fingerprint_of", lambda _: "A")
        instance.begin(on_clear="reconnect").execute()
        monkeypatch.setattr(_recorded, "fingerprint_of", lambda _: "B")
        assert job_of(instance.begin(on_clear="reconnect").execute()) == "job-2"
        assert service.kills == ["job-1"]


def waiting_for(instance: TaskInstance, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> tries.Try:
    """Begin a try that waits on its worker for so long at most."""
    monkeypatch.setattr(operator_module, "_TIMER_MARGIN", 0.1)
    limit = datetime.timedelta(seconds=seconds)
    return instance.begin(deferrable=False, poll_interval=0.01, execution_timeout=limit)


class TestTheWorkersOwnLife:
    @pytest.mark.parametrize("name", ["poll_interval", "start_timeout", "kill_timeout", "outage_timeout", "log_lines"])
    @pytest.mark.parametrize("value", ["5", 0, -1, True, math.nan, math.inf, datetime.timedelta(1)])
    def test_bad_numbers_fail_the_dag(self, instance: TaskInstance, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=name):
            instance.begin(**{name: value})

    @pytest.mark.parametrize("name", ["kill_timeout", "outage_timeout", "log_lines"])
    def test_what_has_no_end_must_not_be_waited_for(self, instance: TaskInstance, name: str) -> None:
        with pytest.raises(ValueError, match=name):
            instance.begin(**{name: None})

    @pytest.mark.parametrize(("arguments", "expected"), [({}, 1800.0), ({"start_timeout": None}, None)])
    def test_how_long_a_start_may_take(self, instance: TaskInstance, arguments: Any, expected: float | None) -> None:
        deferral = instance.begin(**arguments).execute()
        assert deferral.trigger._args.to_json()["start_timeout"] == expected

    def test_a_job_that_never_starts_fails_with_its_cause(
        self, instance: TaskInstance, service: Service, airflow: dict[str, Any]
    ) -> None:
        first = instance.begin(deferrable=False, poll_interval=0.01, start_timeout=900)
        airflow["try"] = {"ti_id": str(first.id)}

        def get_stuck() -> None:
            service.jobs["job-1"] = Job("", "", JobState.PENDING, "no such image", time.time() - 1000)

        service.after_submit = get_stuck
        with pytest.raises(AirflowException, match=r"JobFailed: job-1 .*900 s \(start_timeout\).*no such image"):
            first.execute()
        assert (service.kills, service.releases) == (["job-1"], ["job-1"])
        assert first.record["verdict"]["state"] == "failed"
        assert set(airflow["pushed"]) == {NOTE_XCOM_KEY}
        assert "cut_off_able" not in airflow, "a question to Airflow that the timer interrupts keeps its lock"

    def test_what_the_timer_interrupts_does_not_go_on(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What Airflow's timer raises leaves the loop in the midst of the waiting."""
        first = instance.begin(deferrable=False, poll_interval=0.01, execution_timeout=datetime.timedelta(hours=1))
        original, followed = JobTrigger._follow, []

        async def follow(self: Any) -> Any:
            try:
                return await original(self)
            finally:
                followed.append(list(service.kills))

        monkeypatch.setattr(JobTrigger, "_follow", follow)
        with alarm(10), timeout(0.3), pytest.raises(AirflowTaskTimeout, match="job-1 was killed"):
            first.execute()
        assert (followed, service.kills) == ([[]], ["job-1"]), "it was over before the kill"

    def test_a_hook_that_cannot_close_hides_no_deferral(
        self, instance: TaskInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def aclose(_: Any) -> None:
            raise OSError("socket")

        monkeypatch.setattr(tries.MemoryHook, "aclose", aclose)
        assert job_of(instance.begin().execute()) == "job-1"

    def test_a_description_with_any_keys(self, instance: TaskInstance) -> None:
        assert job_of(instance.begin(job={1: "a", "b": 2, None: {3}}).execute()) == "job-1"

    def test_a_timeout_that_lands_in_the_feed_is_not_lost(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Airflow's timer raises from a signal handler, in whatever code happens to run."""
        first = waiting_for(instance, monkeypatch, seconds=0.5)
        original, polls = tries.MemoryHook.poll, 0

        async def poll(self: Any, jobs: Any) -> Any:
            nonlocal polls
            polls += 1
            if polls == 4:
                raise AirflowTaskTimeout("SIGALRM arrived while this code ran")
            return await original(self, jobs)

        monkeypatch.setattr(tries.MemoryHook, "poll", poll)
        with alarm(10), pytest.raises(AirflowTaskTimeout, match="job-1 was killed"):
            first.execute()
        assert service.kills == ["job-1"]

    def test_a_timer_that_begins_late_does_not_interrupt_the_kill(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Airflow sets it when the Dag has been read, while the try begins with the task's process."""
        first = waiting_for(instance, monkeypatch, seconds=0.3)
        original = tries.MemoryHook.kill

        async def kill(self: Any, job: Any) -> None:
            await asyncio.sleep(0.8)
            await original(self, job)

        monkeypatch.setattr(tries.MemoryHook, "kill", kill)
        with alarm(10), timeout(1), pytest.raises(AirflowTaskTimeout, match="job-1 was killed"):
            first.execute()
        assert service.kills == ["job-1"]


class TestTheSharedFeed:
    async def test_an_outage_counts_from_the_try(self, service: Service, airflow: Any) -> None:
        service.unreachable = True
        key = FeedKey(hook="tests.unit.tries.MemoryHook", conn_id="memory", cluster=("service://one",))
        make = lambda: tries.MemoryHook("memory")  # noqa: E731
        async with join(key, JobRef("other"), make_hook=make, interval=0.01) as other:
            await other.changed(5)
            await asyncio.sleep(0.4)  # the outage grows older than the next try's patience
            began = time.monotonic()
            assert (await asyncio.wait_for(fired(trigger(outage_timeout=0.3)), 5)).kind == "outage"
            assert time.monotonic() - began >= 0.25

    async def test_one_bad_interval_does_not_starve_the_others(self, hook: type[PolledHook]) -> None:
        hook.states = {"job": JobState.RUNNING, "bad": JobState.RUNNING}
        bad: Any = "5"
        async with follow(hook, "job") as good, follow(hook, "bad", interval=bad):
            assert await state(good) is JobState.RUNNING
            hook.states = {"job": JobState.SUCCEEDED}
            assert await state(good) is JobState.SUCCEEDED
            assert good.outage is None

    async def test_no_interval_is_no_storm(self, hook: type[PolledHook]) -> None:
        hook.states = {"job": JobState.RUNNING}
        async with follow(hook, "job", interval=0) as subscription:
            await state(subscription)
            await asyncio.sleep(0.2)
        assert len(hook.polls) < 50

    async def test_the_last_leaves_in_the_moment_in_which_another_joins(self, hook: type[PolledHook]) -> None:
        """asyncio.wait_for may swallow a cancellation before Python 3.12."""
        hook.states = {"job": JobState.RUNNING}

        async def come_and_go() -> None:
            async with follow(hook, "job", interval=60) as subscription:
                await state(subscription)
                await asyncio.sleep(0.1)
                async with follow(hook, "new", interval=60):
                    pass

        await asyncio.wait_for(come_and_go(), 5)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_on_kill_tries_again_within_its_time(
        self, service: Service, airflow: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.add(TOKEN)
        airflow["state"] = "failed"
        attempts = 0
        original = tries.MemoryHook.kill

        async def kill(self: Any, job: JobRef) -> None:
            nonlocal attempts
            attempts += 1
            if attempts < 3:
                raise ClusterUnreachable("failing over")
            await original(self, job)

        monkeypatch.setattr(tries.MemoryHook, "kill", kill)
        await trigger().on_kill()
        assert service.kills == ["job-1"]


class TestFingerprint:
    """Of the mapped item alone, whatever else of the task is edited."""

    @staticmethod
    def mapped(values: Any, index: int, *, kwargs: bool = False, **partial: Any) -> str:
        with DAG("d", schedule=None) as dag:
            partially = SparkJobOperator.partial(task_id="t", application="a.py", **partial)
            if kwargs:
                partially.expand_kwargs(values)
            else:
                partially.expand(application_args=values)
        return TestFingerprint.of(dag, "t", index)

    @staticmethod
    def of(dag: DAG, task_id: str, index: int) -> str:
        ti = SimpleNamespace(map_index=index, task_id=task_id, dag_id="d", run_id="r")
        context: Any = {"ti": ti, "task_instance": ti, "dag": dag, "task": dag.get_task(task_id)}
        return fingerprint_of(context)

    def test_tells_items_apart(self) -> None:
        both = [["a"], ["b"]]
        assert self.mapped(both, 0) == self.mapped(both, 0) != self.mapped(both, 1)
        assert self.mapped(both, 0) == self.mapped(both[::-1], 1)

    def test_of_expand_kwargs(self) -> None:
        both = [{"application_args": ["a"]}, {"application_args": ["b"]}]
        assert self.mapped(both, 0, kwargs=True) != self.mapped(both, 1, kwargs=True)

    def test_of_dates(self) -> None:
        both = [[datetime.date(2026, 1, 1)], [datetime.date(2026, 1, 2)]]
        assert self.mapped(both, 0) == self.mapped(both, 0) != self.mapped(both, 1)

    @pytest.mark.parametrize(
        "edited",
        [
            {"conn_id": "spark_default"},
            {"poll_interval": 10.0},
            {"durable": True},
            {"retries": 5},
            {"params": {"x": 1}},
        ],
    )
    def test_is_not_touched_by_the_rest_of_the_task(self, edited: dict[str, Any]) -> None:
        assert self.mapped([["a"]], 0) == self.mapped([["a"]], 0, **edited)

    def test_of_a_mapped_task_group(self) -> None:
        def group(values: list[str], index: int, **more: Any) -> str:
            with DAG("d", schedule=None) as dag:

                @task_group
                def each(x: str) -> None:
                    SparkJobOperator(task_id="t", application="a.py", application_args=[x], **more)

                each.expand(x=values)
            return self.of(dag, "each.t", index)

        assert group(["a", "b"], 0) == group(["b", "a"], 1) != group(["a", "b"], 1)
        assert group(["a", "b"], 0) == group(["a", "b"], 0, retries=5, driver_memory="2g")


def test_default_args_reach_the_operator() -> None:
    with DAG("d", schedule=None, default_args={"durable": False, "poll_interval": 7.0, "on_kill": "keep"}):
        task = SparkJobOperator(task_id="t", application="a.py")
    assert (task.durable, task.poll_interval, task.kill_jobs) == (False, 7.0, False)
