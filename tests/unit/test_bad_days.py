"""Deadlines, losses, outages, last tries, changed code, workers that wake up late: what a task makes of a bad day."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowTaskTimeout,
    TaskDeferralError,
)

from durable_spark.jobs import (
    AuthenticationFailed,
    BadArguments,
    ClusterUnreachable,
    JobRef,
    JobState,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
)
from durable_spark.operators import _ending, _recorded
from durable_spark.operators._store import Superseded
from durable_spark.operators.job import DurableJobOperator
from durable_spark.triggers import job as trigger_module
from durable_spark.triggers.job import NOTE_XCOM_KEY, JobEvent
from tests.unit.test_hard_cases import relaunch
from tests.unit.test_operator import HOUR, elsewhere, event, instance, job_of, service
from tests.unit.tries import Died, Job, MemoryHook, Service, TaskInstance, Try, alarm, waits

__all__ = ["instance", "service"]  # fixtures

DEPLOYMENT = "AIRFLOW__DURABLE_SPARK__DEPLOYMENT"


@pytest.fixture
def died(instance: TaskInstance, service: Service) -> TaskInstance:
    """A worker died between its request and its store."""
    service.die_after_submit = True
    with pytest.raises(Died):
        instance.begin().execute()
    service.die_after_submit = False
    return instance


@pytest.fixture(autouse=True)
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has ended the task."""
    monkeypatch.setattr(trigger_module, "state_of", lambda **_: "running")


def note(of: Try, **event: Any) -> None:
    """Note what a trigger of this try would note before its kill."""
    job, token = JobRef(*of.record["job"]), of.record["submission"]["token"]
    told = JobEvent(**{"kind": "timeout", "job": job, "token": token, "confirmed": True, **event})
    of.instance.xcoms[NOTE_XCOM_KEY] = {**told.to_json(), "ti_id": str(of.id)}


def is_gone(service: Service, job: str = "job-1") -> None:
    service.jobs[job] = Job("", "", JobState.ABSENT)


class TestLostButNoted:
    """A trigger reports a job as lost, whose end one before it had seen and noted: Airflow gave it no answer."""

    def test_a_success_that_was_noted_counts(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        note(first, kind="succeeded", state="SUCCEEDED", confirmed=False)
        is_gone(service)
        assert first.complete(event(instance, "lost")) == "job-1"
        assert first.record["verdict"]["state"] == "succeeded"

    def test_a_kill_that_was_noted_counts(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        note(first, kind="killed", state="KILLED", confirmed=False)
        is_gone(service)
        with pytest.raises(AirflowException, match="JobKilled: job-1 ended as KILLED"):
            first.complete(event(instance, "lost"))

    @pytest.mark.parametrize("other", [{"ti_id": "another"}, {"token": "0" * 32}, {"job_id": "job-9"}])
    def test_not_that_of_another_try_or_submission_or_job(
        self, instance: TaskInstance, service: Service, other: dict[str, str]
    ) -> None:
        first = instance.begin()
        first.execute()
        note(first, kind="succeeded", state="SUCCEEDED", confirmed=False)
        instance.xcoms[NOTE_XCOM_KEY].update(other)
        is_gone(service)
        with pytest.raises(AirflowFailException, match="JobLost"):
            first.complete(event(instance, "lost"))


class TestDeadline:
    """It passed, and no trigger has seen the job dead."""

    @pytest.fixture(params=["event", "backstop"])
    def end(self, request: pytest.FixtureRequest, instance: TaskInstance) -> Callable[[Try], Any]:
        if request.param == "event":
            return lambda of: of.complete(event(instance, "timeout"))
        return lambda of: of.fail("Trigger timeout")

    def test_a_job_that_succeeded_by_itself_has_succeeded(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert end(first) == "job-1"
        assert first.record["verdict"]["state"] == "succeeded"
        assert service.kills == []

    @pytest.mark.parametrize(("state", "name"), [(JobState.FAILED, "JobFailed"), (JobState.KILLED, "JobKilled")])
    def test_one_that_failed_by_itself_has_failed(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any], state: JobState, name: str
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        service.jobs["job-1"].state = state
        with pytest.raises(AirflowException, match=f"{name}: job-1 ended as {state.name}"):
            end(first)
        assert service.kills == []

    @pytest.mark.parametrize(
        ("state", "result"), [(JobState.SUCCEEDED, "job-1"), (JobState.FAILED, "JobFailed: job-1 ended as FAILED")]
    )
    def test_also_in_the_second_in_which_it_is_killed(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any], state: JobState, result: str
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        service.before_kill = lambda: setattr(service.jobs["job-1"], "state", state)
        assert result in result_of(lambda: end(first))
        assert first.record["verdict"]["state"] == state.value

    def test_one_that_was_lost_before_was_not_killed(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]
    ) -> None:
        """It may have succeeded: no retry submits it again."""
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        is_gone(service)
        with pytest.raises(AirflowFailException, match="JobLost"):
            end(first)
        assert service.kills == []

    def test_one_that_is_gone_after_the_triggers_kill_was_killed(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        note(first)
        is_gone(service)
        with pytest.raises(AirflowTaskTimeout, match=r"1:00:00 passed: job-1 was killed"):
            end(first)
        assert first.record["verdict"]["state"] == "killed"
        assert job_of(instance.begin().execute()) == "job-2"

    def test_a_note_of_another_try_is_none(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        note(first)
        instance.xcoms[NOTE_XCOM_KEY]["ti_id"] = "another"
        is_gone(service)
        with pytest.raises(AirflowFailException, match="JobLost"):
            end(first)

    def test_kept_it_counts_by_its_own_end(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]
    ) -> None:
        first = instance.begin(execution_timeout=HOUR, on_timeout="keep")
        first.execute()
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert end(first) == "job-1"

    def test_kept_it_is_followed_on(self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]) -> None:
        first = instance.begin(execution_timeout=HOUR, on_timeout="keep")
        first.execute()
        with pytest.raises(AirflowTaskTimeout, match=r"job-1 was left running.*the next try follows it on"):
            end(first)
        assert service.kills == []
        assert job_of(instance.begin(on_timeout="keep").execute()) == "job-1"

    def test_its_successor_is_killed(self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        relaunch(service, "job-1")
        with pytest.raises(AirflowTaskTimeout, match="job-2 was killed and is KILLED"):
            end(first)
        assert (service.kills, first.record["job"][0]) == (["job-2"], "job-2")

    def test_that_is_relaunched_in_that_second_it_is_killed_too(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()

        def and_relaunched() -> None:
            service.before_kill, service.outlives_kills = dies, True
            relaunch(service, "job-1")

        def dies() -> None:
            service.outlives_kills = False

        service.before_kill = and_relaunched
        with pytest.raises(AirflowTaskTimeout, match="job-2 was killed and is KILLED"):
            end(first)
        assert service.kills == ["job-1", "job-2"]

    def test_a_cluster_that_answers_again_is_asked_again(
        self, instance: TaskInstance, service: Service, end: Callable[[Try], Any]
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        errors: list[Exception] = [ClusterUnreachable("failing over"), AuthenticationFailed("expired")]

        def fail_twice() -> None:
            if errors:
                raise errors.pop()

        service.before_kill = fail_twice
        with pytest.raises(AirflowTaskTimeout, match="job-1 was killed"):
            end(first)
        assert not errors

    def test_each_try_has_its_own(self, instance: TaskInstance) -> None:
        deadlines = []
        for hours_ago in (2, 1):
            one = instance.begin(execution_timeout=datetime.timedelta(hours=3))
            one.start_date -= datetime.timedelta(hours=hours_ago)
            deadlines.append(one.execute().trigger._args.to_json()["deadline"] - time.time())
        assert deadlines == pytest.approx([3600, 7200], abs=10)

    def test_nothing_is_submitted_after_it(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.start_date -= 2 * HOUR
        with pytest.raises(AirflowTaskTimeout, match="nothing was submitted"):
            first.execute()
        assert service.submissions == 0


class TestLost:
    def test_says_what_is_known_and_how_to_go_on(self, instance: TaskInstance) -> None:
        first = instance.begin()
        first.execute()
        instance.xcoms["durable_spark_log_link"] = "http://worker/log"
        told = event(instance, "lost", state="RUNNING", message="last seen as RUNNING at noon; not known since one")
        with pytest.raises(AirflowFailException) as caught:
            first.complete(told)
        token = first.record["submission"]["token"]
        for part in (
            "JobLost: the cluster does not know job-1 any more",
            f"submission 1 (token {token}) to service://one by connection 'memory' at ",
            "last seen as RUNNING at noon; not known since one",
            "its log was at http://worker/log",
            "clear the task to run it again, or mark it as succeeded",
        ):
            assert part in str(caught.value)
        assert "may still run" not in str(caught.value)

    def test_an_end_that_comes_to_light_counts(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(on_lost="resubmit")
        first.execute()
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert first.complete(event(instance, "lost")) == "job-1"
        assert service.submissions == 1

    def test_what_the_trigger_has_killed_is_not_lost(self, instance: TaskInstance, service: Service) -> None:
        """The trigger could not read its predecessor's note."""
        first = instance.begin()
        first.execute()
        note(first, kind="failed", confirmed=False)
        with pytest.raises(AirflowException, match="JobKilled") as caught:
            first.complete(event(instance, "lost"))
        assert not isinstance(caught.value, AirflowFailException)


class TestOutage:
    def test_at_the_first_look_it_is_waited_for_without_a_second_look(
        self, instance: TaskInstance, service: Service
    ) -> None:
        instance.begin().execute()
        service.unreachable, service.looks = True, 0
        assert job_of(instance.begin().execute()) == "job-1"
        assert service.looks == 1
        assert instance.xcoms["durable_job_id"] == "job-1"

    @pytest.mark.parametrize("error", [SubmissionUncertain("queued"), AuthenticationFailed("expired"), None])
    def test_of_a_job_that_may_exist_burns_no_try(
        self, died: TaskInstance, service: Service, error: Exception | None
    ) -> None:
        service.find_error, service.unreachable = error, error is None
        second = died.begin()
        for _ in range(3):
            assert waits(second.execute() if _ == 0 else second.again())
        service.find_error, service.unreachable = None, False
        assert job_of(second.again()) == "job-1"
        assert service.submissions == 1

    def test_of_a_job_that_does_not_exist_ends_in_its_submission(
        self, instance: TaskInstance, service: Service
    ) -> None:
        service.die_before_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.die_before_submit, service.unreachable = False, True
        second = instance.begin()
        assert waits(second.execute())
        service.unreachable = False
        deferral = second.again()
        assert job_of(deferral) == "job-1"
        assert deferral.trigger._args.to_json()["sent_before"] is True

    @pytest.mark.parametrize("arrived", [True, False])
    def test_at_the_request_itself_takes_no_retry(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch, arrived: bool
    ) -> None:
        instance.max_tries = 0
        submit = MemoryHook.submit

        async def cut_off(hook: MemoryHook, job: Any, submission: Submission) -> JobRef:
            monkeypatch.setattr(MemoryHook, "submit", submit)
            if arrived:
                await submit(hook, job, submission)
            raise SubmissionUncertain("the answer was lost")

        monkeypatch.setattr(MemoryHook, "submit", cut_off)
        only = instance.begin(retries=0)
        assert waits(only.execute())
        assert job_of(only.again()) == "job-1"
        assert service.submissions == 1

    def test_is_waited_for_by_the_trigger_in_its_name(self, died: TaskInstance, service: Service) -> None:
        service.unreachable = True
        second = died.begin(outage_timeout=600.0, execution_timeout=HOUR, on_kill="keep")
        deferral = second.execute()
        arguments = deferral.trigger._args.to_json()
        assert arguments["submission"]["token"] == second.record["submission"]["token"]
        assert arguments["deadline"] == pytest.approx(second.start_date.timestamp() + 600)
        assert (arguments["kill"], arguments["quiet"] > 0) == (False, True)
        assert 600 < deferral.timeout <= 720

    @pytest.mark.parametrize(
        ("waited", "asked", "quiet"),
        [(0, None, 10), (0, 90, 90), (0, 1e9, 600), (120, None, 30), (1000, None, 60), (3560, None, 40)],
    )
    def test_in_which_nothing_can_be_sent_is_looked_at_ever_more_seldom(
        self, instance: TaskInstance, monkeypatch: pytest.MonkeyPatch, waited: float, asked: float | None, quiet: float
    ) -> None:
        """There is no job, which the trigger is told at once."""

        async def submit(*_: Any) -> JobRef:
            raise ClusterUnreachable("POST answered 503", retry_after=asked)

        monkeypatch.setattr(MemoryHook, "submit", submit)
        first = instance.begin(outage_timeout=3600.0)
        first.start_date -= datetime.timedelta(seconds=waited)
        deferral = first.execute()
        assert waits(deferral)
        assert deferral.trigger._args.to_json()["quiet"] == pytest.approx(quiet, abs=2)

    def test_is_given_up_after_its_time_and_the_next_try_looks_again(
        self, died: TaskInstance, service: Service
    ) -> None:
        service.unreachable = True
        second = died.begin(outage_timeout=600.0)
        assert waits(second.execute())
        second.start_date -= datetime.timedelta(seconds=700)
        with pytest.raises(AirflowException, match=r"ClusterUnreachable: .*not known: the next try looks for it"):
            second.again()
        service.unreachable = False
        assert job_of(died.begin().execute()) == "job-1"

    def test_is_ended_by_the_deadline(self, died: TaskInstance, service: Service) -> None:
        service.unreachable = True
        second = died.begin(execution_timeout=HOUR)
        assert waits(second.execute())
        second.start_date -= 2 * HOUR
        with pytest.raises(AirflowTaskTimeout, match=r"DeadlinePassed: .*not known: the next try looks for it"):
            second.again()

    def test_is_ended_by_the_backstop(self, died: TaskInstance, service: Service) -> None:
        service.unreachable = True
        second = died.begin(execution_timeout=HOUR)
        second.execute()
        with pytest.raises(AirflowTaskTimeout, match="no job is known"):
            second.fail("Trigger timeout")

    @pytest.mark.parametrize("timeout", [None, 2 * HOUR])
    def test_is_ended_by_the_backstop_before_the_deadline(
        self, died: TaskInstance, service: Service, timeout: datetime.timedelta | None
    ) -> None:
        service.unreachable = True
        second = died.begin(execution_timeout=timeout)
        assert waits(second.execute())
        with pytest.raises(AirflowException, match="OutageTooLong: no job is known: no word for 3600 s"):
            second.fail("Trigger timeout")

    def test_after_a_clear_is_waited_for_too(self, died: TaskInstance, service: Service) -> None:
        died.clear()
        service.unreachable = True
        second = died.begin()
        assert waits(second.execute())
        service.unreachable = False
        assert job_of(second.again()) == "job-2"
        assert service.kills == ["job-1"]

    def test_on_the_worker_is_waited_for_there(self, died: TaskInstance, service: Service) -> None:
        errors = [SubmissionUncertain("queued")]
        find = MemoryHook.find

        async def pass_by(hook: MemoryHook, submission: Submission) -> Any:
            if errors:
                raise errors.pop()
            return await find(hook, submission)

        service.jobs["job-1"].state = JobState.SUCCEEDED
        with pytest.MonkeyPatch.context() as patch, alarm(10):
            patch.setattr(MemoryHook, "find", pass_by)
            assert died.begin(deferrable=False, poll_interval=0.01).execute() == "job-1"
        assert service.submissions == 1

    def test_on_the_worker_a_sending_that_fails_is_not_repeated_at_once(
        self, instance: TaskInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whether there is a job can be told, and nothing can be sent: the trigger would be told each time."""
        sent = []

        async def submit(self: MemoryHook, job: Any, submission: Submission) -> JobRef:
            sent.append(submission.token)
            raise ClusterUnreachable("POST answered 503")

        monkeypatch.setattr(MemoryHook, "submit", submit)
        with pytest.raises(AirflowException):
            instance.begin(deferrable=False, outage_timeout=2).execute()
        assert 2 <= len(sent) < 10
        assert len(set(sent)) == 1

    def test_on_the_worker_a_server_that_asks_to_be_left_alone_is(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.die_before_submit = True
        with pytest.raises(Died):
            instance.begin(deferrable=False).execute()
        prepared = []

        async def prepare(self: MemoryHook, job: Any, submission: Submission) -> Submission:
            prepared.append(submission)
            raise ClusterUnreachable("the leader is away", retry_after=60)

        monkeypatch.setattr(MemoryHook, "prepare", prepare)
        with pytest.raises(AirflowException):
            instance.begin(deferrable=False, outage_timeout=2).execute()
        assert len(prepared) <= 3

    def test_on_the_worker_a_stop_ends_it(self, died: TaskInstance, service: Service) -> None:
        service.unreachable = True
        second = died.begin(deferrable=False, poll_interval=0.01)
        second.operator.on_kill()
        with alarm(10), pytest.raises(AirflowException, match="Told to stop while"):
            second.execute()

    @pytest.mark.parametrize(
        "error", [SubmissionUncertain("forgotten", permanent=True), SubmissionRefused("no"), BadArguments("no")]
    )
    def test_is_not_what_will_not_pass(self, died: TaskInstance, service: Service, error: Exception) -> None:
        service.find_error = error
        with pytest.raises(AirflowException, match=type(error).__name__):
            died.begin().execute()

    def test_before_anything_was_intended_is_a_failure(self, instance: TaskInstance, service: Service) -> None:
        service.unreachable = True
        with pytest.raises(AirflowException, match="ClusterUnreachable") as caught:
            instance.begin().execute()
        assert "may still run" not in str(caught.value)


class TestLastTry:
    """A try that ends without a verdict says what it leaves behind, and kills nothing that a clear could take up."""

    @pytest.fixture(params=["outage", "crash", "kept", "unreachable", "changed"])
    def leave(
        self, request: pytest.FixtureRequest, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[..., str]]:
        """End a try with a job that may be alive. Returns what is raised."""
        monkeypatch.setattr(_ending, "_KILL_CONFIRMED_WITHIN", 0.05)

        def end(**arguments: Any) -> str:
            one = instance.begin(**arguments)
            one.execute()
            if request.param == "outage":
                return result_of(lambda: one.complete(event(instance, "outage", message="no word for 5 s: down")))
            if request.param == "crash":
                return result_of(lambda: one.fail("Trigger failure"))
            if request.param == "kept":
                one.instance.defaults["on_timeout"] = "keep"
                return result_of(lambda: one.complete(event(instance, "timeout")))
            if request.param == "unreachable":
                service.unreachable = True
                return result_of(lambda: one.complete(event(instance, "timeout")))
            service.names = ("service://two",)
            return result_of(instance.begin(**arguments).execute)

        yield end
        assert service.running == ["job-1"]
        assert service.kills == []

    def test_with_a_retry_to_come(self, leave: Callable[..., str]) -> None:
        assert leave().endswith("job-1 may still run: the next try follows it on")

    def test_without_one(self, leave: Callable[..., str], instance: TaskInstance) -> None:
        instance.max_tries = 0
        assert leave(retries=0).endswith(
            "job-1 may still run, and no try is left. The way out: clear the task, which kills it and runs again; "
            "with on_clear='reconnect' in the Dag, a clear follows it on"
        )

    def test_without_one_where_a_clear_reconnects(
        self, leave: Callable[..., str], instance: TaskInstance, service: Service
    ) -> None:
        instance.max_tries = 0
        said = leave(retries=0, on_clear="reconnect")
        assert said.endswith("and no try is left. The way out: clear the task, which follows it on")
        service.unreachable, service.names = False, ("service://one",)
        instance.clear()
        assert job_of(instance.begin(on_clear="reconnect").execute()) == "job-1"

    def test_shows_the_id(self, leave: Callable[..., str], instance: TaskInstance) -> None:
        leave()
        assert instance.xcoms["durable_job_id"] == "job-1"

    def test_a_crash_is_still_one(self, instance: TaskInstance) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(TaskDeferralError, match="Trigger failure"):
            first.fail("Trigger failure")

    def test_a_kill_before_the_crash_is_in_the_record(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        note(first, kind="failed", confirmed=False)
        is_gone(service)
        with pytest.raises(TaskDeferralError):
            first.fail("Trigger failure")
        assert job_of(instance.begin().execute()) == "job-2", "killed, not lost"

    def test_uncertain_for_ever_names_the_way_out(self, died: TaskInstance, service: Service) -> None:
        service.find_error = SubmissionUncertain("forgotten", permanent=True)
        with pytest.raises(AirflowFailException, match=r"forgotten\. The way out: .*state-store/durable_spark"):
            died.begin().execute()

    def test_uncertain_on_the_last_try_does_too(self, died: TaskInstance, service: Service) -> None:
        died.max_tries = 1
        service.unreachable = True
        last = died.begin()
        last.start_date -= 2 * HOUR
        with pytest.raises(AirflowException, match=r"no try is left\. The way out: .*state-store/durable_spark"):
            last.execute()

    def test_airflows_own_timer_says_it_too(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def timer() -> None:
            raise AirflowTaskTimeout("Timeout, PID: 1")

        service.after_submit = timer
        with pytest.raises(AirflowTaskTimeout, match=r"Timeout, PID: 1\. whether .* not known: the next try looks"):
            instance.begin(execution_timeout=HOUR).execute()
        service.after_submit = None
        assert job_of(instance.begin().execute()) == "job-1"

    def test_a_verdict_leaves_nothing_to_say(self, instance: TaskInstance) -> None:
        instance.max_tries = 0
        only = instance.begin(retries=0)
        only.execute()
        with pytest.raises(AirflowException) as caught:
            only.complete(event(instance, "failed"))
        assert "may still run" not in str(caught.value)

    def test_no_record_nobody_looks(self, instance: TaskInstance, service: Service) -> None:
        only = instance.begin(durable=False)
        only.execute()
        told = {"v": 1, "kind": "outage", "job_id": "job-1", "token": service.jobs["job-1"].token}
        with pytest.raises(AirflowException, match="job-1 may still run: without a record nobody looks for it"):
            only.complete(told)

    def test_is_warned_of_once(
        self, instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: Any
    ) -> None:
        instance.max_tries = 0
        submit = MemoryHook.submit

        async def cut_off(hook: MemoryHook, job: Any, submission: Submission) -> JobRef:
            await submit(hook, job, submission)
            raise SubmissionUncertain("the answer was lost")

        monkeypatch.setattr(MemoryHook, "submit", cut_off)
        only = instance.begin(retries=0)
        only.execute()
        only.again()
        instance.clear()
        instance.begin(retries=0).execute()
        assert capsys.readouterr().out.count("retries=0") == 1


class TestChangedCode:
    @pytest.mark.parametrize(
        "change",
        [
            {"job": {"application": "new.py", "args": ["1"]}},
            {"job": {"application": "old.py", "args": ["2"]}},
            {"job": "bad"},
        ],
        ids=["application", "arguments", "bad"],
    )
    def test_the_old_job_is_followed_on_and_the_new_one_comes_after_it(
        self, instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
    ) -> None:
        old = {"application": "old.py", "args": ["1"]}
        instance.begin(job=old).execute()
        second = instance.begin(**change)
        assert job_of(second.execute()) == "job-1"
        assert "have changed; job-1 runs on with the old ones" in capsys.readouterr().out
        with pytest.raises(AirflowException, match="JobFailed"):
            second.complete(event(instance, "failed"))
        third = instance.begin(**change)
        if change["job"] == "bad":
            with pytest.raises(AirflowFailException, match="BadArguments"):
                third.execute()
            assert service.descriptions == [old]
        else:
            assert job_of(third.execute()) == "job-2"
            assert service.descriptions == [old, change["job"]]

    def test_arguments_that_cannot_even_be_described(
        self, instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: Any
    ) -> None:
        def refuse(_: Any) -> Any:
            raise BadArguments("application_args: a list of arguments, not str")

        instance.begin().execute()
        monkeypatch.setattr(DurableJobOperator, "describe_job", refuse)
        assert job_of(instance.begin().execute()) == "job-1"
        assert "are wrong by now, but job-1 runs on with the old ones: application_args" in capsys.readouterr().out

    def test_another_connection_to_the_same_cluster(
        self, instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str]
    ) -> None:
        instance.begin().execute()
        deferral = instance.begin(conn_id="other").execute()
        assert job_of(deferral) == "job-1"
        assert deferral.trigger._args.to_json()["conn_id"] == "other"
        assert "have changed" not in capsys.readouterr().out

    def test_a_success_of_the_old_ones_is_said_to_be_one(
        self, instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str]
    ) -> None:
        instance.begin(job="old").execute()
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert instance.begin(job="new").execute() == "job-1"
        assert "have changed; job-1 ran with the old ones" in capsys.readouterr().out


class TestWokenLate:
    """A worker that was stopped goes on when another try is in charge: one job, one result, one record."""

    @pytest.fixture(params=[False, True], ids=["retried", "cleared"])
    def overtake(self, request: pytest.FixtureRequest, instance: TaskInstance) -> Callable[[], Try]:
        def run() -> Try:
            if request.param:
                instance.clear()
            newer = instance.begin()
            elsewhere(newer.execute)
            return newer

        return run

    @pytest.mark.parametrize("told_to_stop", [False, True])
    @pytest.mark.parametrize(
        ("phase", "time"),
        [("_push_try", 1), ("_push_try", 2), ("_save", 1), ("_send", 1), ("_save", 2), ("_push_job", 2), ("_defer", 1)],
    )
    def test_in_each_phase_of_a_submission(
        self,
        instance: TaskInstance,
        service: Service,
        overtake: Callable[[], Try],
        monkeypatch: pytest.MonkeyPatch,
        phase: str,
        time: int,
        told_to_stop: bool,
    ) -> None:
        old = instance.begin()
        kind = DurableJobOperator
        original = getattr(kind, phase)
        calls: list[str] = []
        newer: list[Try] = []

        def stopped(operator: Any, *arguments: Any, **more: Any) -> Any:
            if operator is old.operator:
                calls.append(phase)
                if len(calls) == time:
                    newer.append(overtake())
                    if told_to_stop:
                        operator.on_kill()
            return original(operator, *arguments, **more)

        monkeypatch.setattr(kind, phase, stopped)
        result = result_of(old.execute)
        (current,) = newer
        (running,) = service.running
        assert current.record["job"] == [running, ""]
        if phase not in ("_push_job", "_defer"):  # Airflow itself refuses that deferral
            assert "Another try of this task has begun" in result or "nothing was submitted" in result

    @pytest.mark.parametrize("kind", ["succeeded", "failed", "lost", "timeout", "outage"])
    def test_in_execute_complete(self, instance: TaskInstance, service: Service, kind: str) -> None:
        old = instance.begin(execution_timeout=HOUR)
        old.execute()
        told = event(instance, kind)
        elsewhere(instance.begin().execute)
        record = dict(instance.store["durable_spark"])
        result_of(lambda: old.complete(told))
        assert instance.store["durable_spark"] == record
        assert (service.running, service.kills, service.releases) == (["job-1"], [], [])

    def test_the_last_try_lets_go_of_nothing_that_a_clear_follows(
        self, instance: TaskInstance, service: Service
    ) -> None:
        instance.max_tries = 0
        old = instance.begin()
        old.execute()
        told = event(instance, "outage")
        instance.clear()
        elsewhere(instance.begin(on_clear="reconnect").execute)
        result_of(lambda: old.complete(told))
        assert service.releases == []

    def test_kills_nothing_by_a_label_that_a_newer_job_carries(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was stopped between its look at the record and its look at the cluster."""
        monkeypatch.setenv(DEPLOYMENT, "production")
        instance.begin().execute()
        service.jobs["job-1"].state = JobState.FAILED
        instance.store.clear()
        find_owned = MemoryHook.find_owned

        async def stopped(hook: Any, deployment: str, owner: str | None = None) -> Any:
            monkeypatch.setattr(MemoryHook, "find_owned", find_owned)
            elsewhere(instance.begin().execute)
            return await find_owned(hook, deployment, owner)

        monkeypatch.setattr(MemoryHook, "find_owned", stopped)
        with pytest.raises(Superseded):
            instance.begin().execute()
        assert (service.running, service.kills) == (["job-2"], [])

    def test_kills_its_job_when_a_cleared_task_has_looked_already(
        self, instance: TaskInstance, service: Service
    ) -> None:
        """The new try has proven that there is no job, and has not submitted its own yet."""
        old = instance.begin()
        find = MemoryHook.find
        woken: list[str] = []

        async def late(hook: Any, submission: Submission) -> Any:
            found = await find(hook, submission)
            if instance.current is not old and not woken:
                woken.append("now")
                go_on()
            return found

        def go_on() -> None:
            """Let the old request arrive, and its sender look who is in charge."""
            token = instance.store["durable_spark"]["submission"]["token"]
            job = JobRef(service.add(token))
            operator = old.operator

            def give_way() -> None:
                with operator._conversation():
                    operator._give_way(old.context, job, Submission(token=token))

            elsewhere(give_way)

        service.die_before_submit = True
        with pytest.raises(Died):
            old.execute()
        service.die_before_submit = False
        instance.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryHook, "find", late)
            assert job_of(instance.begin().execute()) == "job-2"
        assert (service.running, woken) == (["job-2"], ["now"])

    def test_does_not_say_that_it_is_in_charge(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """XCom has no fence, and the trigger of the newer try kills nothing if it is not in charge."""
        old = instance.begin()
        describe = DurableJobOperator.build_job

        def stopped(operator: Any, context: Any) -> Any:
            if operator is old.operator:
                elsewhere(instance.begin().execute)
            return describe(operator, context)

        monkeypatch.setattr(DurableJobOperator, "build_job", stopped)
        with pytest.raises(Superseded):
            old.execute()
        assert instance.current is not None
        assert instance.xcoms["durable_spark_try"]["ti_id"] == str(instance.current.id)

    def test_of_a_mapped_task_it_knows_who_is_in_charge(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Airflow answers a pull without a map index with what all items have pushed."""
        monkeypatch.setattr(_recorded, "fingerprint_of", lambda _: "item")
        monkeypatch.setattr(Try, "map_index", 3)
        old = instance.begin()

        def cleared() -> None:
            service.before_submit = None
            instance.clear()
            elsewhere(instance.begin().execute)

        service.before_submit = cleared
        with pytest.raises(Superseded):
            old.execute()
        assert service.running == ["job-1"]


def test_the_fingerprint_is_made_once_a_try(
    instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the list of an XCom it is a request."""
    made: list[Any] = []

    def make(context: Any) -> str:
        made.append(context)
        return ""

    monkeypatch.setattr(_recorded, "fingerprint_of", make)
    instance.begin().execute()
    assert len(made) == 1
    service.jobs["job-1"].state = JobState.FAILED
    instance.clear()
    instance.begin().execute()
    assert len(made) == 2


def result_of(call: Callable[[], Any]) -> str:
    try:
        return str(call())
    except (AirflowException, AirflowTaskTimeout) as error:
        return str(error)
