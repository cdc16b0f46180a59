"""What a try makes of the record: each branch of the design's table of decisions."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperatorLink
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowTaskTimeout,
    TaskDeferralTimeout,
    TaskDeferred,
)
from airflow.sdk.execution_time.context import NEVER_EXPIRE

from durable_spark.jobs import (
    AuthenticationFailed,
    ClusterUnreachable,
    JobRef,
    JobState,
    JobStatus,
    Link,
    Record,
    RequestRefused,
    Submission,
    SubmissionUncertain,
)
from durable_spark.operators import _cluster, _ending
from durable_spark.operators._store import Superseded
from durable_spark.operators.job import DurableJobOperator
from durable_spark.triggers import job as trigger_module
from tests.unit import tries
from tests.unit.tries import Died, Job, MemoryHook, Service, TaskInstance, alarm, before_each_poll


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(tries, "service", Service())
    monkeypatch.setattr(_cluster, "_LOOK_AGAIN_AFTER", 0.0)
    return tries.service


@pytest.fixture
def instance() -> TaskInstance:
    return TaskInstance()


def job_of(deferral: Any) -> str:
    assert isinstance(deferral, TaskDeferred), deferral
    return str(deferral.trigger._args.to_json()["job"][0])


def elsewhere(call: Callable[[], Any]) -> Any:
    """Call it as another process would: not in this thread's event loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(10)


def event(instance: TaskInstance, kind: str, **more: Any) -> dict[str, Any]:
    record = instance.store["durable_spark"]
    return {"v": 1, "kind": kind, "job_id": record["job"][0], "token": record["submission"]["token"], **more}


class TestFirstTry:
    def test_submits_stores_and_defers(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        assert job_of(first.execute()) == "job-1"
        assert first.record["job"] == ["job-1", ""]
        assert instance.store["durable_job_id"] == "job-1"
        assert service.jobs["job-1"].token == first.record["submission"]["token"]
        assert instance.xcoms["durable_job_id"] == "job-1"
        assert instance.xcoms["durable_spark_job_link"] == "http://service/job-1"

    def test_the_intent_is_stored_before_anything_is_sent(self, instance: TaskInstance, service: Service) -> None:
        service.before_submit = lambda: service.kills.append(json.dumps(instance.store["durable_spark"]["job"]))
        instance.begin().execute()
        assert service.kills == ["null"]

    def test_a_record_of_a_live_job_never_expires(self, instance: TaskInstance) -> None:
        first = instance.begin()
        first.execute()
        keys = ("durable_spark", "durable_job_id")
        assert [instance.retentions[key] for key in keys] == [NEVER_EXPIRE, NEVER_EXPIRE]
        first.complete(event(instance, "succeeded"))
        assert [instance.retentions[key] for key in keys] == [None, None]

    def test_a_job_that_has_ended_already_is_not_deferred(self, instance: TaskInstance, service: Service) -> None:
        def end() -> None:
            service.jobs["job-1"].state = JobState.SUCCEEDED

        service.after_submit = end
        assert instance.begin().execute() == "job-1"
        assert instance.store["durable_spark"]["verdict"]["state"] == "succeeded"

    def test_bad_arguments_are_told_before_anything_is_stored(self, instance: TaskInstance, service: Service) -> None:
        with pytest.raises(AirflowFailException, match="job: not 'bad'"):
            instance.begin(job="bad").execute()
        assert "durable_spark" not in instance.store
        assert not service.jobs

    def test_no_connection_is_told(self, instance: TaskInstance) -> None:
        with pytest.raises(AirflowFailException, match="conn_id"):
            instance.begin(conn_id="").execute()

    @pytest.mark.parametrize("argument", ["on_kill", "on_clear", "on_timeout", "on_lost"])
    def test_a_policy_that_does_not_exist_fails_the_dag(self, argument: str) -> None:
        with pytest.raises(ValueError, match=argument):
            DurableJobOperator(task_id="t", **{argument: "perhaps"})  # type: ignore[arg-type]

    def test_the_trigger_carries_no_argument_of_the_job(self, instance: TaskInstance) -> None:
        deferral = instance.begin(job={"password": "hush"}).execute()
        assert "hush" not in json.dumps(deferral.trigger.serialize())
        assert "hush" not in json.dumps(instance.store)

    def test_the_deadline_is_absolute_and_has_a_backstop(self, instance: TaskInstance) -> None:
        first = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        deferral = first.execute()
        arguments = deferral.trigger._args.to_json()
        assert arguments["deadline"] == pytest.approx(first.start_date.timestamp() + 3600)
        assert 3600 < deferral.timeout <= 3600 + 120

    def test_told_to_stop_before_the_post_submits_nothing(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.operator.on_kill()
        with pytest.raises(AirflowException, match="nothing was submitted"):
            first.execute()
        assert not service.jobs

    def test_upstreams_cached_status_is_deleted(self, instance: TaskInstance) -> None:
        instance.store["k8s_driver_status"] = "Succeeded"
        instance.begin().execute()
        assert "k8s_driver_status" not in instance.store


def test_airflow_does_not_push_our_links_again(service: Service) -> None:
    """When the task defers, its trigger may have pushed newer ones by then. A link of somebody's own it does."""

    class Own(BaseOperatorLink):
        name = "own"

        def get_link(self, operator: Any, *, ti_key: Any) -> str:
            return "http://own"

    class Extended(DurableJobOperator):
        operator_extra_links = (*DurableJobOperator.operator_extra_links, Own())

    first = TaskInstance(Extended).begin()
    assert len(first.operator.operator_extra_links) == 5
    first.execute()
    assert [link.name for link in first.operator.operator_extra_links] == ["own"]
    assert len(Extended.operator_extra_links) == 5, "for the UI"


def test_each_task_instance_pushes_its_own_links() -> None:
    """``dag.test()`` runs them in one process, with copies of one operator."""
    with DAG("dag", schedule=None):
        operator = DurableJobOperator(task_id="task", hook=MemoryHook, conn_id="memory")

    def pushed(copy: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        copy._record = SimpleNamespace(job=JobRef("job-1"))
        copy._status = JobStatus(job=JobRef("job-1"), state=JobState.RUNNING, links={Link.JOB: "http://master"})
        copy._push_job({"ti": SimpleNamespace(xcom_push=lambda key, value: values.update({key: value}))})
        return values

    one, two = operator.prepare_for_execution(), operator.prepare_for_execution()
    assert pushed(one) == pushed(two) != {}


class TestRetry:
    def test_an_active_job_is_followed_on(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        assert job_of(instance.begin().execute()) == "job-1"
        assert service.submissions == 1

    def test_a_succeeded_job_is_the_result(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert instance.begin().execute() == "job-1"
        assert service.submissions == 1
        assert instance.xcoms["durable_job_id"] == "job-1"

    @pytest.mark.parametrize("state", [JobState.FAILED, JobState.KILLED])
    def test_a_failed_job_is_followed_by_a_new_submission(
        self, instance: TaskInstance, service: Service, state: JobState
    ) -> None:
        instance.begin().execute()
        token = service.jobs["job-1"].token
        service.jobs["job-1"].state = state
        second = instance.begin()
        assert job_of(second.execute()) == "job-2"
        assert service.jobs["job-2"].token != token
        assert second.record["submission"]["ordinal"] == 2
        assert second.record["previous"] == [[token, "job-1", state.value]]

    def test_a_verdict_in_the_record_counts_without_asking(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        first.complete(event(instance, "succeeded"))
        service.jobs.clear()
        assert instance.begin().execute() == "job-1"

    def test_died_before_the_post(self, instance: TaskInstance, service: Service) -> None:
        service.die_before_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        token = instance.store["durable_spark"]["submission"]["token"]
        service.die_before_submit = False
        second = instance.begin()
        deferral = second.execute()
        assert job_of(deferral) == "job-1"
        assert service.jobs["job-1"].token == token
        assert second.record["submission"]["ordinal"] == 1
        assert second.record["submission"]["cluster_time"] == 1000.0
        assert deferral.trigger._args.to_json()["sent_before"] is True

    def test_died_between_post_and_store(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        assert instance.store["durable_spark"]["job"] is None
        second = instance.begin()
        assert job_of(second.execute()) == "job-1"
        assert second.record["job"] == ["job-1", ""]
        assert service.submissions == 1

    def test_a_younger_job_of_the_same_token_is_killed(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.add(service.jobs["job-1"].token)
        assert job_of(instance.begin().execute()) == "job-1"
        assert service.kills == ["job-2"]

    def test_one_that_may_not_be_killed_does_not_keep_the_job_from_being_followed(
        self, instance: TaskInstance, service: Service
    ) -> None:
        """Another user may have copied our labels."""
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.add(service.jobs["job-1"].token)

        def refuse() -> None:
            raise RequestRefused("alice may not")

        service.before_kill = refuse
        assert job_of(instance.begin().execute()) == "job-1"
        assert service.running == ["job-1", "job-2"]

    def test_uncertain_is_never_a_second_submission(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.find_error = SubmissionUncertain("forgotten", permanent=True)
        with pytest.raises(AirflowFailException, match="state-store/durable_spark"):
            instance.begin().execute()
        assert service.submissions == 1

    def test_an_unknown_job_is_lost(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        service.jobs.clear()
        with pytest.raises(AirflowFailException, match=r"JobLost.*job-1"):
            instance.begin().execute()
        assert not service.jobs

    def test_a_lost_job_is_resubmitted_if_so_asked(self, instance: TaskInstance, service: Service) -> None:
        instance.begin(on_lost="resubmit").execute()
        service.jobs.clear()
        second = instance.begin(on_lost="resubmit")
        second.execute()
        assert service.submissions == 2
        assert second.record["submission"]["ordinal"] == 2

    def test_an_unreachable_cluster_is_waited_for_in_the_triggerer(
        self, instance: TaskInstance, service: Service
    ) -> None:
        instance.begin().execute()
        service.unreachable = True
        assert job_of(instance.begin().execute()) == "job-1"

    def test_another_cluster_is_an_error_naming_both(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        service.names = ("service://two",)
        with pytest.raises(AirflowException, match=r"service://two.*service://one"):
            instance.begin().execute()
        service.names = ("service://three", "service://one")
        assert job_of(instance.begin().execute()) == "job-1"

    def test_a_relaunched_job_is_found_under_its_new_id(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        token = service.jobs["job-1"].token
        service.jobs["job-1"].state = JobState.RELAUNCHED
        service.add(token)
        second = instance.begin()
        assert job_of(second.execute()) == "job-2"
        assert second.record["job"] == ["job-2", ""]
        assert service.submissions == 1

    def test_changed_arguments_reconnect_with_a_warning(
        self, instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str]
    ) -> None:
        instance.begin(job="old").execute()
        assert job_of(instance.begin(job="new").execute()) == "job-1"
        assert "runs on with the old ones" in capsys.readouterr().out

    def test_not_durable_submits_anew(self, instance: TaskInstance, service: Service) -> None:
        instance.begin(durable=False).execute()
        instance.begin(durable=False).execute()
        assert service.submissions == 2
        assert not instance.store

    @pytest.mark.parametrize("value", ["x", {"version": 99}, {"version": 1}, [1], {"version": 1, "submission": {}}])
    def test_a_record_that_cannot_be_read_is_an_error(
        self, instance: TaskInstance, service: Service, value: Any
    ) -> None:
        instance.store["durable_spark"] = value
        with pytest.raises(AirflowException, match=r"cannot be read.*nothing was submitted"):
            instance.begin().execute()
        assert not service.jobs


class TestClear:
    def test_the_old_job_is_killed_and_seen_dead_first(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        instance.clear()
        service.before_submit = lambda: service.kills.append(f"then submit, {service.running} running")
        second = instance.begin()
        assert job_of(second.execute()) == "job-2"
        assert service.kills == ["job-1", "then submit, [] running"]
        assert second.record["submission"]["ordinal"] == 2

    def test_a_job_that_does_not_die_fails_without_submitting(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        instance.clear()
        service.outlives_kills = True
        with pytest.raises(AirflowException, match=r"not seen dead.*nothing was submitted$"):
            instance.begin(kill_timeout=0.05).execute()
        assert service.submissions == 1

    def test_on_the_last_try_it_says_that_the_old_job_may_still_run(
        self, instance: TaskInstance, service: Service
    ) -> None:
        instance.begin(retries=0).execute()
        instance.clear()
        service.outlives_kills = True
        last = instance.begin(retries=0, kill_timeout=0.05)
        last.max_tries = last.try_number - 1
        with pytest.raises(AirflowException, match=r"not seen dead.* job-1 may still run, and no try is left"):
            last.execute()
        service.outlives_kills = False
        instance.clear()
        assert job_of(instance.begin().execute()) == "job-2"

    def test_out_of_reach_fails_without_submitting(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        instance.clear()
        service.unreachable = True
        with pytest.raises(AirflowException, match=r"does not answer.*nothing was submitted"):
            instance.begin(kill_timeout=0.05).execute()
        service.unreachable = False
        assert service.submissions == 1

    def test_a_lost_job_counts_as_dead(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        instance.clear()
        service.jobs.clear()
        instance.begin().execute()
        assert service.submissions == 2

    def test_a_finished_task_runs_again(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        service.jobs["job-1"].state = JobState.SUCCEEDED
        first.complete(event(instance, "succeeded"))
        instance.clear()
        assert job_of(instance.begin().execute()) == "job-2"
        assert service.kills == []

    def test_reconnects_if_so_asked(self, instance: TaskInstance, service: Service) -> None:
        instance.begin(on_clear="reconnect").execute()
        instance.clear()
        assert job_of(instance.begin(on_clear="reconnect").execute()) == "job-1"
        assert job_of(instance.begin(on_clear="reconnect").execute()) == "job-1"
        assert service.kills == []

    def test_an_intent_without_a_job_is_looked_for(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.die_after_submit = False
        instance.clear()
        second = instance.begin()
        assert job_of(second.execute()) == "job-2"
        assert service.kills == ["job-1"]

    def test_uncertain_fails(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        instance.clear()
        service.find_error = SubmissionUncertain("forgotten", permanent=True)
        with pytest.raises(AirflowFailException, match="way out"):
            instance.begin().execute()


class TestOtherOperators:
    def test_a_live_job_of_upstream_is_adopted(self, instance: TaskInstance, service: Service) -> None:
        instance.store["durable_job_id"] = service.add("theirs")
        assert job_of(instance.begin().execute()) == "job-1"
        assert service.submissions == 0
        assert instance.store["durable_spark"]["job"] == ["job-1", ""]

    def test_a_finished_one_counts_within_the_first_generation(self, instance: TaskInstance, service: Service) -> None:
        instance.store["durable_job_id"] = service.add("theirs", state=JobState.SUCCEEDED)
        assert instance.begin().execute() == "job-1"
        assert service.submissions == 0

    def test_a_finished_one_does_not_count_after_a_clear(self, instance: TaskInstance, service: Service) -> None:
        instance.store["durable_job_id"] = service.add("theirs", state=JobState.SUCCEEDED)
        instance.clear()
        second = instance.begin()
        assert job_of(second.execute()) == "job-2"
        assert second.record["previous"][0][1] == "job-1"

    def test_no_record_on_a_later_try_looks_for_the_label(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        instance.store.clear()
        with pytest.raises(AirflowException, match="deployment is not set"):
            instance.begin().execute()
        assert service.kills == []

    def test_with_a_deployment_the_unrecorded_job_is_killed(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AIRFLOW__DURABLE_SPARK__DEPLOYMENT", "test")
        instance.begin().execute()
        instance.store.clear()
        assert job_of(instance.begin().execute()) == "job-2"
        assert service.kills == ["job-1"]


class TestOldWorker:
    def test_is_stopped_before_it_posts(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        instance.begin()
        with pytest.raises(Superseded):
            first.execute()
        assert not service.jobs

    def test_leaves_its_job_to_the_retry_that_follows_it(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()

        def overtaken() -> None:
            service.after_submit = None
            elsewhere(instance.begin().execute)

        service.after_submit = overtaken
        with pytest.raises(Superseded):
            first.execute()
        assert service.running == ["job-1"]
        assert service.releases == []
        assert instance.store["durable_spark"]["job"] == ["job-1", ""]

    @pytest.mark.parametrize("state", [JobState.RUNNING, JobState.SUCCEEDED])
    def test_kills_its_job_when_the_retry_has_submitted_itself(
        self, instance: TaskInstance, service: Service, state: JobState
    ) -> None:
        first = instance.begin()

        def overtaken() -> None:
            service.before_submit = None
            elsewhere(instance.begin().execute)
            service.jobs["job-1"].state = state

        service.before_submit = overtaken
        with pytest.raises(Superseded):
            first.execute()
        assert service.jobs["job-1"].state is state
        assert service.kills == service.releases == ["job-2"]

    def test_kills_what_is_one_too_many_also_when_it_took_the_retrys_job_for_its_own(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So it is with spark-submit: of the jobs with its token the oldest is seen first."""
        first = instance.begin()
        submit = MemoryHook.submit

        async def overtaken(hook: MemoryHook, job: Any, submission: Submission) -> JobRef:
            monkeypatch.setattr(MemoryHook, "submit", submit)
            elsewhere(instance.begin().execute)
            await submit(hook, job, submission)
            return JobRef("job-1")

        monkeypatch.setattr(MemoryHook, "submit", overtaken)
        with pytest.raises(Superseded):
            first.execute()
        assert service.running == ["job-1"]

    def test_kills_its_job_when_the_try_in_charge_runs_another_submission(
        self, instance: TaskInstance, service: Service
    ) -> None:
        first = instance.begin()

        def cleared() -> None:
            service.after_submit = None
            instance.clear()
            elsewhere(instance.begin().execute)

        service.after_submit = cleared
        with pytest.raises(Superseded):
            first.execute()
        assert service.running == ["job-2"]

    @pytest.mark.parametrize(("policy", "running"), [("kill", []), ("keep", ["job-1"])])
    def test_leaves_its_job_to_nobody_when_the_run_is_gone(
        self,
        instance: TaskInstance,
        service: Service,
        monkeypatch: pytest.MonkeyPatch,
        policy: str,
        running: list[str],
    ) -> None:
        """A person has deleted it while the request was on its way: there is no try in charge, and none will come."""
        only = instance.begin(on_kill=policy)

        def deleted() -> None:
            instance.current = None
            monkeypatch.setattr(trigger_module, "state_of", lambda **_: None)

        service.after_submit = deleted
        with pytest.raises(Superseded):
            only.execute()
        assert service.running == running
        assert service.releases == ["job-1"]


class TestVerdict:
    def test_success_returns_the_id(self, instance: TaskInstance) -> None:
        first = instance.begin()
        first.execute()
        assert first.complete(event(instance, "succeeded", state="DONE")) == "job-1"
        assert first.record["verdict"]["raw"] == "DONE"

    @pytest.mark.parametrize(("kind", "name"), [("failed", "JobFailed"), ("killed", "JobKilled")])
    def test_failure_raises_with_the_clusters_words_and_the_log(
        self, instance: TaskInstance, kind: str, name: str
    ) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowException, match=rf"(?s){name}: job-1 ended as BROKEN: why.*the last line"):
            first.complete(event(instance, kind, state="BROKEN", message="why"))
        assert first.record["verdict"]["state"] == kind

    def test_the_verdict_is_stored_before_anything_is_raised(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowException):
            first.complete(event(instance, "failed"))
        service.jobs["job-1"].state = JobState.RUNNING  # what the cluster says now does not count any more
        assert job_of(instance.begin().execute()) == "job-2"

    def test_lost(self, instance: TaskInstance) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowFailException, match="JobLost"):
            first.complete(event(instance, "lost"))

    def test_lost_and_resubmitted(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(on_lost="resubmit")
        first.execute()
        service.jobs["job-1"] = Job("", "", JobState.ABSENT)
        assert job_of(first.complete(event(instance, "lost"))) == "job-2"
        assert instance.store["durable_job_id"] == "job-2"

    def test_timeout_confirmed_by_the_trigger(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        first.execute()
        with pytest.raises(AirflowTaskTimeout, match="job-1 was killed"):
            first.complete(event(instance, "timeout", confirmed=True))
        assert job_of(instance.begin().execute()) == "job-2"

    def test_timeout_not_confirmed_is_killed_here(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        first.execute()
        with pytest.raises(AirflowTaskTimeout, match="job-1 was killed and is KILLED"):
            first.complete(event(instance, "timeout"))
        assert service.kills == ["job-1"]

    def test_the_backstop_kills(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(execution_timeout=datetime.timedelta(hours=1))
        first.execute()
        with pytest.raises(AirflowTaskTimeout, match="job-1 was killed"):
            first.operator.resume_execution("__fail__", {"error": "Trigger timeout"}, first.context)
        assert service.kills == ["job-1"]

    def test_a_crash_of_the_trigger_kills_nothing(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(Exception) as caught:
            first.operator.resume_execution("__fail__", {"error": "Trigger failure"}, first.context)
        assert not isinstance(caught.value, TaskDeferralTimeout)
        assert service.kills == []

    def test_kept_on_timeout_if_so_asked(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(execution_timeout=datetime.timedelta(hours=1), on_timeout="keep")
        first.execute()
        with pytest.raises(AirflowTaskTimeout, match="left running"):
            first.complete(event(instance, "timeout"))
        assert service.kills == []

    def test_an_outage_is_no_verdict(self, instance: TaskInstance) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowException, match="OutageTooLong"):
            first.complete(event(instance, "outage"))
        assert first.record["verdict"] is None
        assert job_of(instance.begin().execute()) == "job-1"

    @pytest.mark.parametrize("value", [None, "success", {"kind": "succeeded"}, {"kind": 1}, {"kind": "fine"}])
    def test_no_success_out_of_garbage(self, instance: TaskInstance, value: Any) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowException):
            first.complete(value)

    def test_an_event_about_another_submission_is_no_verdict(self, instance: TaskInstance) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowException, match="earlier submission"):
            first.complete(event(instance, "succeeded", token="0" * 32))
        assert first.record["verdict"] is None


class TestWaitingOnTheWorker:
    def test_returns_when_the_job_ends(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = instance.begin(deferrable=False, poll_interval=0.01)

        def end(number: int, _: object) -> None:
            if number == 3:
                service.jobs["job-1"].state = JobState.SUCCEEDED

        before_each_poll(monkeypatch, end)
        assert first.execute() == "job-1"
        assert first.record["verdict"]["state"] == "succeeded"

    def test_on_kill_kills_the_job(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(deferrable=False, poll_interval=0.01)
        service.after_submit = first.operator.on_kill
        with pytest.raises(AirflowException, match="Told to stop"):
            first.execute()
        assert service.kills == ["job-1"]

    def test_on_kill_kills_the_job_that_is_followed_by_now(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The cluster has started it in place of the one that was submitted."""
        first = instance.begin(deferrable=False, poll_interval=0.01)

        def relaunch(number: int, jobs: Collection[JobRef]) -> None:
            if JobRef("job-2") in jobs:
                first.operator.on_kill()
            elif number == 3:
                service.jobs["job-1"].state = JobState.RELAUNCHED
                service.add(service.jobs["job-1"].token)

        before_each_poll(monkeypatch, relaunch)
        with alarm(10), pytest.raises(AirflowException, match="Told to stop while waiting for job-2"):
            first.execute()
        assert (service.kills, first.record["job"]) == (["job-2"], ["job-2", ""])

    @pytest.mark.parametrize(("state", "running"), [(None, []), ("running", ["job-1"])])
    def test_on_kill_when_the_store_is_not_its_own_any_more(
        self,
        instance: TaskInstance,
        service: Service,
        monkeypatch: pytest.MonkeyPatch,
        state: str | None,
        running: list[str],
    ) -> None:
        """Found by the model: the run was deleted, and nobody else will kill the job. Or a later try follows it."""
        first = instance.begin(deferrable=False, poll_interval=0.01)

        def overtaken(number: int, _: object) -> None:
            if number == 3:
                instance.current = None
                first.operator.on_kill()

        before_each_poll(monkeypatch, overtaken)
        monkeypatch.setattr(trigger_module, "state_of", lambda **_: state)
        with alarm(10), pytest.raises(Superseded):
            first.execute()
        assert service.running == running

    def test_on_kill_that_came_before_the_wait(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        second = instance.begin(deferrable=False, poll_interval=0.01)
        second.operator.on_kill()
        with alarm(10), pytest.raises(AirflowException, match="Told to stop"):
            second.execute()
        assert service.kills == ["job-1"]

    def test_on_kill_of_an_old_try_kills_nothing(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(deferrable=False, poll_interval=0.01)
        original = tries.MemoryHook.poll

        async def poll(self: Any, jobs: Any) -> Any:
            if not first.fenced:
                instance.begin()
                first.operator.on_kill()
            return await original(self, jobs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tries.MemoryHook, "poll", poll)
            with pytest.raises(Superseded):
                first.execute()
        assert service.kills == []


HOUR = datetime.timedelta(hours=1)


class TestRelease:
    """A job is let go of when its end is recorded or nobody waits for it any more; not before, and not otherwise."""

    @pytest.fixture(autouse=True)
    def recorded(self, instance: TaskInstance, service: Service) -> list[str | None]:
        """What the record says of the job's end at each release."""
        seen: list[str | None] = []

        def look() -> None:
            verdict = instance.store["durable_spark"]["verdict"]
            seen.append(verdict and verdict["state"])

        service.before_release = look
        return seen

    @pytest.fixture
    def died_before_it(self, instance: TaskInstance, service: Service) -> None:
        """A try recorded a success and died."""
        first = instance.begin()
        first.execute()
        service.before_release = die
        with pytest.raises(Died):
            first.complete(event(instance, "succeeded"))
        service.before_release = None

    @pytest.mark.parametrize(
        ("kind", "more", "state"),
        [
            ("succeeded", {}, "succeeded"),
            ("failed", {}, "failed"),
            ("killed", {}, "killed"),
            ("timeout", {"confirmed": True}, "killed"),
            ("timeout", {"confirmed": False}, "killed"),
        ],
    )
    def test_when_the_end_is_recorded(
        self,
        instance: TaskInstance,
        service: Service,
        recorded: list[str | None],
        kind: str,
        more: dict[str, Any],
        state: str,
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        assert service.releases == [], "it goes on"
        with ended():
            first.complete(event(instance, kind, **more))
        assert (service.releases, recorded) == (["job-1"], [state])

    def test_after_the_backstop(self, instance: TaskInstance, service: Service, recorded: list[str | None]) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        with ended():
            first.operator.resume_execution("__fail__", {"error": "Trigger timeout"}, first.context)
        assert (service.releases, recorded) == (["job-1"], ["killed"])

    def test_when_it_had_ended_before_the_deferral(
        self, instance: TaskInstance, service: Service, recorded: list[str | None]
    ) -> None:
        service.after_submit = lambda: setattr(service.jobs["job-1"], "state", JobState.FAILED)
        with ended():
            instance.begin().execute()
        assert (service.releases, recorded) == (["job-1"], ["failed"])

    @pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
    def test_when_it_ended_on_the_worker(
        self, instance: TaskInstance, service: Service, recorded: list[str | None], state: JobState
    ) -> None:
        service.after_submit = lambda: setattr(service.jobs["job-1"], "state", state)
        with ended():
            instance.begin(deferrable=False).execute()
        assert (service.releases, recorded) == (["job-1"], [state.value])

    @pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.KILLED])
    def test_when_a_retry_finds_it_ended(
        self, instance: TaskInstance, service: Service, recorded: list[str | None], state: JobState
    ) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state = state
        instance.begin().execute()
        assert (service.releases, recorded) == (["job-1"], [state.value])

    def test_again_when_the_try_that_recorded_the_end_died(
        self, instance: TaskInstance, service: Service, died_before_it: None
    ) -> None:
        assert instance.begin().execute() == "job-1"
        assert service.releases == ["job-1"]

    def test_when_it_is_lost(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowFailException, match="JobLost"):
            first.complete(event(instance, "lost"))
        assert service.releases == ["job-1"]

    def test_when_a_retry_finds_it_lost(self, instance: TaskInstance, service: Service) -> None:
        instance.begin().execute()
        service.jobs.clear()
        with pytest.raises(AirflowFailException, match="JobLost"):
            instance.begin().execute()
        assert service.releases == ["job-1"]

    def test_when_a_lost_job_is_resubmitted(
        self, instance: TaskInstance, service: Service, recorded: list[str | None]
    ) -> None:
        first = instance.begin(on_lost="resubmit")
        first.execute()
        service.jobs["job-1"] = Job("", "", JobState.ABSENT)
        assert job_of(first.complete(event(instance, "lost"))) == "job-2"
        assert (service.releases, recorded) == (["job-1"], ["absent"])

    def test_when_this_process_is_told_to_stop(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(deferrable=False)
        service.after_submit = first.operator.on_kill
        with pytest.raises(AirflowException, match="Told to stop"):
            first.execute()
        assert (service.kills, service.releases) == (["job-1"], ["job-1"])

    @pytest.mark.parametrize(
        ("state", "try_number", "releases"),
        [("failed", 1, ["job-1"]), (None, 1, ["job-1"]), ("running", 1, []), ("running", 2, ["job-1"])],
    )
    def test_when_this_process_is_told_to_stop_and_to_keep_it(
        self,
        instance: TaskInstance,
        service: Service,
        monkeypatch: pytest.MonkeyPatch,
        state: str | None,
        try_number: int,
        releases: list[str],
    ) -> None:
        """A deploy stops it, too: then the retry waits for the job, if there is one."""
        instance.begin().execute()
        monkeypatch.setattr(trigger_module, "state_of", lambda **_: state)
        for _ in range(try_number):
            last = instance.begin(deferrable=False, on_kill="keep")
            last.operator.on_kill()
            with ended():
                last.execute()
        assert (service.kills, service.releases, service.running) == ([], releases, ["job-1"])

    @pytest.mark.parametrize("state", ["failed", "success", None])
    @pytest.mark.parametrize(("policy", "kills"), [("kill", ["job-1"]), ("keep", [])])
    def test_when_a_person_ended_the_task_while_it_submitted(
        self,
        instance: TaskInstance,
        service: Service,
        monkeypatch: pytest.MonkeyPatch,
        state: str | None,
        policy: str,
        kills: list[str],
    ) -> None:
        monkeypatch.setattr(trigger_module, "state_of", lambda **_: state)
        with pytest.raises(AirflowException, match="set to"):
            instance.begin(on_kill=policy).execute()
        assert (service.kills, service.releases) == (kills, ["job-1"])

    def test_when_a_person_ended_the_task_and_little_time_is_left(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SIGKILL follows SIGTERM after five seconds: the job is killed before anything else is told."""
        only = instance.begin()

        def marked() -> None:
            monkeypatch.setattr(trigger_module, "state_of", lambda **_: "failed")
            only.operator.on_kill()

        service.after_submit = marked
        with pytest.raises(AirflowException, match="set to failed"):
            only.execute()
        assert service.kills == service.releases == ["job-1"]
        assert "durable_job_id" not in instance.xcoms

    @pytest.mark.parametrize("state", [JobState.RUNNING, JobState.FAILED, JobState.ABSENT])
    def test_when_the_task_was_cleared(self, instance: TaskInstance, service: Service, state: JobState) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state = state
        instance.clear()
        assert job_of(instance.begin().execute()) == "job-2"
        assert service.releases == ["job-1"]

    def test_when_the_task_was_cleared_after_its_end(
        self, instance: TaskInstance, service: Service, died_before_it: None
    ) -> None:
        instance.clear()
        assert job_of(instance.begin().execute()) == "job-2"
        assert service.releases == ["job-1"]

    def test_what_a_submission_that_never_was_may_have_left(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        foresee(monkeypatch, "job-1")
        service.die_before_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.die_before_submit = False
        instance.clear()
        instance.begin().execute()
        assert service.releases == ["job-1"]

    def test_a_double(self, instance: TaskInstance, service: Service) -> None:
        service.die_after_submit = True
        with pytest.raises(Died):
            instance.begin().execute()
        service.add(service.jobs["job-1"].token)
        assert job_of(instance.begin().execute()) == "job-1"
        assert service.releases == ["job-2"]

    def test_an_unrecorded_job(self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AIRFLOW__DURABLE_SPARK__DEPLOYMENT", "test")
        service.before_release = None
        instance.begin().execute()
        instance.store.clear()
        assert job_of(instance.begin().execute()) == "job-2"
        assert service.releases == ["job-1"]

    @pytest.mark.parametrize(
        ("arguments", "reported"),
        [
            ({"on_timeout": "keep"}, {"kind": "timeout"}),
            ({}, {"kind": "outage"}),
        ],
    )
    @pytest.mark.parametrize(("try_number", "releases"), [(2, []), (3, ["job-1"])])
    def test_of_a_job_that_goes_on_only_when_no_retry_follows(
        self,
        instance: TaskInstance,
        service: Service,
        arguments: dict[str, Any],
        reported: dict[str, Any],
        try_number: int,
        releases: list[str],
    ) -> None:
        for _ in range(try_number):
            last = instance.begin(execution_timeout=HOUR, **arguments)
            last.execute()
        with ended():
            last.complete(event(instance, **reported))
        assert service.releases == releases
        assert service.running == ["job-1"]

    def test_not_when_the_deadlines_kill_failed_and_a_retry_follows(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        service.unreachable = True
        monkeypatch.setattr(_ending, "_KILL_CONFIRMED_WITHIN", 0.1)
        with pytest.raises(AirflowTaskTimeout, match="may still run"):
            first.complete(event(instance, "timeout"))
        service.unreachable = False
        assert service.releases == []
        assert job_of(instance.begin().execute()) == "job-1"

    def test_of_a_task_that_is_not_durable_no_retry_follows(self, instance: TaskInstance, service: Service) -> None:
        service.before_release = None
        first = instance.begin(durable=False, execution_timeout=HOUR, on_timeout="keep")
        first.execute()
        with ended():
            first.complete({"v": 1, "kind": "timeout", "job_id": "job-1", "token": service.jobs["job-1"].token})
        assert service.releases == ["job-1"]

    def test_not_while_it_is_followed_on(self, instance: TaskInstance, service: Service) -> None:
        instance.begin(on_clear="reconnect").execute()
        instance.begin(on_clear="reconnect").execute()
        service.unreachable = True
        instance.begin(on_clear="reconnect").execute()
        service.unreachable = False
        instance.clear()
        assert job_of(instance.begin(on_clear="reconnect").execute()) == "job-1"
        assert service.releases == []

    def test_not_by_an_older_try(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin()
        first.execute()
        told = event(instance, "succeeded")
        instance.begin()
        with pytest.raises(AirflowException):
            first.complete(told)
        assert service.releases == []

    @pytest.mark.parametrize("error", [RequestRefused("no"), ClusterUnreachable("away"), KeyError("a bug")])
    @pytest.mark.parametrize(
        ("kind", "outcome"),
        [("succeeded", "job-1"), ("failed", "JobFailed"), ("lost", "JobLost"), ("timeout", "job-1 was killed")],
    )
    def test_that_fails_changes_no_result(
        self,
        instance: TaskInstance,
        service: Service,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        kind: str,
        outcome: str,
    ) -> None:
        let_go = DurableJobOperator._release
        monkeypatch.setattr(DurableJobOperator, "_release", lambda task, job: let_go(task, job, within=0.0))
        service.release_error = error
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        assert outcome in result_of(lambda: first.complete(event(instance, kind)))
        assert "job-1 could not be let go of" in capsys.readouterr().out

    @pytest.mark.parametrize("error", [ClusterUnreachable("away"), RequestRefused("its roles are not read yet")])
    @pytest.mark.parametrize("kind", ["succeeded", "failed", "lost", "timeout"])
    def test_waits_for_a_cluster_that_is_away_for_a_moment(
        self, instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str], error: Exception, kind: str
    ) -> None:
        """Nobody lets go of the job afterwards: the verdict is in the record."""

        def back() -> None:
            if len(service.releases) == 2:
                service.release_error = None

        service.release_error, service.before_release = error, back
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        result_of(lambda: first.complete(event(instance, kind)))
        assert service.releases == ["job-1"] * 3
        assert "could not be let go of" not in capsys.readouterr().out

    def test_leaves_a_cluster_alone_that_asks_for_it(self, instance: TaskInstance, service: Service) -> None:
        asked: list[float] = []

        def note() -> None:
            asked.append(time.monotonic())
            if len(asked) == 2:
                service.release_error = None

        service.release_error, service.before_release = ClusterUnreachable("busy", retry_after=1.5), note
        first = instance.begin()
        first.execute()
        assert first.complete(event(instance, "succeeded")) == "job-1"
        assert asked[1] - asked[0] >= 1.5

    def test_that_fails_does_not_keep_a_retry_from_its_result(self, instance: TaskInstance, service: Service) -> None:
        service.release_error = KeyError("a bug")
        instance.begin().execute()
        service.jobs["job-1"].state = JobState.FAILED
        assert job_of(instance.begin().execute()) == "job-2"
        service.jobs["job-2"].state = JobState.SUCCEEDED
        assert instance.begin().execute() == "job-2"
        assert instance.begin().execute() == "job-2"
        assert service.releases == ["job-1", "job-2", "job-2"]

    def test_comes_after_the_log_was_read(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def log_tail(*_: Any) -> list[str]:
            return [f"let go of: {service.releases}"]

        monkeypatch.setattr(tries.MemoryHook, "log_tail", log_tail)
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowException, match=r"let go of: \[\]"):
            first.complete(event(instance, "failed"))
        assert service.releases == ["job-1"]

    @pytest.mark.parametrize("error", [ClusterUnreachable("away"), KeyError("a bug")])
    def test_a_log_that_cannot_be_read_hides_no_failure(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        async def log_tail(*_: Any) -> list[str]:
            raise error

        monkeypatch.setattr(tries.MemoryHook, "log_tail", log_tail)
        first = instance.begin()
        first.execute()
        with pytest.raises(AirflowException, match="JobFailed: job-1 ended as BROKEN"):
            first.complete(event(instance, "failed", state="BROKEN"))
        assert service.releases == ["job-1"]


class TestKilledByUs:
    """What is gone after this task has asked for its kill was killed, not lost."""

    @pytest.fixture
    def killed(self, instance: TaskInstance, service: Service) -> None:
        """A try that was told to stop has sent a kill; the job has not ended yet."""
        service.outlives_kills = True
        first = instance.begin(deferrable=False)
        service.after_submit = first.operator.on_kill
        service.before_kill = lambda: seen.append(instance.store["durable_spark"]["killing"])
        seen: list[bool] = []
        with pytest.raises(AirflowException, match="Told to stop"):
            first.execute()
        service.after_submit = service.before_kill = None
        assert seen == [True], "it is noted before the kill is sent"

    def test_a_retry_submits_anew(self, instance: TaskInstance, service: Service, killed: None) -> None:
        service.jobs["job-1"] = Job("", "", JobState.ABSENT)
        second = instance.begin()
        assert job_of(second.execute()) == "job-2"
        assert second.record["previous"][0][1:] == ["job-1", "killed"]
        assert second.record["killing"] is False

    def test_a_retry_that_sees_it_alive_waits_for_its_end(
        self, instance: TaskInstance, service: Service, killed: None
    ) -> None:
        second = instance.begin()
        assert job_of(second.execute()) == "job-1"
        with pytest.raises(AirflowException, match="JobKilled") as caught:
            second.complete(event(instance, "lost"))
        assert not isinstance(caught.value, AirflowFailException), "the next try submits anew"
        assert second.record["verdict"]["state"] == "killed"
        assert job_of(instance.begin().execute()) == "job-2"

    def test_one_that_succeeded_all_the_same_has_succeeded(
        self, instance: TaskInstance, service: Service, killed: None
    ) -> None:
        service.jobs["job-1"].state = JobState.SUCCEEDED
        assert instance.begin().execute() == "job-1"

    def test_a_deadlines_kill_that_was_not_seen_to_the_end(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_ending, "_KILL_CONFIRMED_WITHIN", 0.0)
        service.outlives_kills = True
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        with pytest.raises(AirflowTaskTimeout, match="not seen dead yet"):
            first.complete(event(instance, "timeout"))
        service.jobs["job-1"] = Job("", "", JobState.ABSENT)
        assert job_of(instance.begin().execute()) == "job-2"

    def test_a_kill_that_never_arrived_does_not_make_a_loss_a_kill(
        self, instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_ending, "_KILL_CONFIRMED_WITHIN", 0.0)
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        service.unreachable = True
        with pytest.raises(AirflowTaskTimeout):
            first.complete(event(instance, "timeout"))
        assert service.kills == []
        assert instance.store["durable_spark"]["killing"], "it may have arrived"
        service.unreachable = False
        second = instance.begin()
        assert job_of(second.execute()) == "job-1"
        del service.jobs["job-1"]
        with pytest.raises(AirflowFailException, match="JobLost"):
            second.complete(event(instance, "lost"))

    @pytest.mark.parametrize("answers", [[True, False], [False, True]])
    def test_one_answer_is_enough(self, instance: TaskInstance, service: Service, answers: list[bool]) -> None:
        service.outlives_kills = True
        first = instance.begin(execution_timeout=HOUR)
        first.execute()

        def answer() -> None:
            if not answers:
                raise Died
            if not answers.pop(0):
                raise ClusterUnreachable("failing over")

        service.before_kill = answer
        with pytest.raises(Died):
            first.complete(event(instance, "timeout"))
        assert service.kills == ["job-1"]
        second = instance.begin()
        assert job_of(second.execute()) == "job-1"
        with pytest.raises(AirflowException, match="JobKilled"):
            second.complete(event(instance, "lost"))

    def test_no_kill_is_noted_for_another_cluster(self, instance: TaskInstance, service: Service) -> None:
        first = instance.begin(execution_timeout=HOUR)
        first.execute()
        service.names = ("service://two",)
        with pytest.raises(AirflowTaskTimeout, match="could not be killed"):
            first.complete(event(instance, "timeout"))
        assert first.record["killing"] is False

    @pytest.mark.parametrize("error", [RequestRefused("403"), AuthenticationFailed("401")])
    def test_a_kill_that_the_cluster_refused_is_none(
        self, instance: TaskInstance, service: Service, error: Exception
    ) -> None:
        """The job goes on; gone later, it is lost."""

        def refuse() -> None:
            raise error

        first = instance.begin(deferrable=False)
        service.after_submit, service.before_kill = first.operator.on_kill, refuse
        with pytest.raises(AirflowException, match=type(error).__name__):
            first.execute()
        assert first.record["killing"] is False
        service.jobs["job-1"] = Job("", "", JobState.ABSENT)
        with pytest.raises(AirflowFailException, match="JobLost"):
            instance.begin().execute()
        assert service.submissions == 1

    def test_a_refused_stop_is_no_kill(self, instance: TaskInstance, service: Service) -> None:
        """The fence: an older try notes nothing and kills nothing."""
        first = instance.begin(deferrable=False)

        def overtaken() -> None:
            instance.begin()
            first.operator.on_kill()

        service.after_submit = overtaken
        with pytest.raises(Superseded):
            first.execute()
        assert service.kills == []

    @pytest.mark.parametrize(
        ("change", "killing"),
        [
            ({}, True),
            ({"killing": False}, False),
            ({"killing": "true"}, False),
            ({"killing": None}, False),
            ({"unanswered": True}, True),
            ({"surprise": [1]}, True),
        ],
    )
    def test_the_record_of_it(
        self, instance: TaskInstance, killed: None, change: dict[str, Any], killing: bool
    ) -> None:
        value = json.loads(json.dumps(instance.store["durable_spark"]))
        assert Record.from_json(value).to_json() == value
        assert Record.from_json({**value, **change}).killing is killing

    @pytest.mark.parametrize(
        "change",
        [{"intended_at": float("inf")}, {"previous": [None]}, {"previous": [["token"]]}, {"job": ["a", "b", "c"]}],
        ids=str,
    )
    def test_what_is_no_record(self, instance: TaskInstance, killed: None, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"is not|are not"):
            Record.from_json({**instance.store["durable_spark"], **change})

    def test_a_record_of_it_that_knows_no_answers(self, instance: TaskInstance, killed: None) -> None:
        del instance.store["durable_spark"]["unanswered"], instance.store["durable_spark"]["resent"]
        record = Record.from_json(instance.store["durable_spark"])
        assert (record.unanswered, record.resent) == (False, False)

    def test_a_record_of_an_older_version(self, instance: TaskInstance, killed: None) -> None:
        del instance.store["durable_spark"]["killing"]
        assert Record.from_json(instance.store["durable_spark"]).killing is False
        assert job_of(instance.begin().execute()) == "job-1"


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Let a task end in any way but by our mistake."""
    with contextlib.suppress(AirflowException, AirflowTaskTimeout):
        yield


def result_of(call: Callable[[], Any]) -> str:
    try:
        return str(call())
    except (AirflowException, AirflowTaskTimeout) as error:
        return str(error)


def die() -> None:
    raise Died


def foresee(monkeypatch: pytest.MonkeyPatch, job_id: str) -> None:
    """Let the service be one that names its jobs beforehand."""
    original = tries.MemoryHook.prepare

    async def prepare(self: Any, job: Any, submission: Any) -> Any:
        return dataclasses.replace(await original(self, job, submission), job=JobRef(job_id))

    monkeypatch.setattr(tries.MemoryHook, "prepare", prepare)
