"""What happens when a cluster, or a person, changes its mind: kills and waits that are looked at once more."""

from __future__ import annotations

import asyncio
import datetime
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.bases.operator import TriggerFailureReason
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout, TaskDeferred

from dev.processes import wait_until_async
from durable_spark import _metrics
from durable_spark.jobs import (
    ClusterUnreachable,
    JobRef,
    JobState,
    JobStatus,
    Link,
    RequestRefused,
    Submission,
    SubmissionUncertain,
)
from durable_spark.operators import _telling
from durable_spark.operators import job as operator_module
from durable_spark.operators.job import DurableJobOperator
from durable_spark.triggers import feed as feed_module
from durable_spark.triggers import job as trigger_module
from durable_spark.triggers.feed import FeedKey, join
from durable_spark.triggers.job import SubmissionTrigger
from tests.unit import tries
from tests.unit.test_trigger import TOKEN, airflow, event, trigger  # noqa: F401 a fixture
from tests.unit.tries import MemoryHook, Service, TaskInstance


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(tries, "service", Service())
    monkeypatch.setattr(operator_module, "_LOOK_AGAIN_AFTER", 0.0)
    monkeypatch.setattr(feed_module, "_NEWCOMER_PAUSE", 0.01)
    return tries.service


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> TaskInstance:
    monkeypatch.setattr(trigger_module, "state_of", lambda **_: "running")
    return TaskInstance()


# --- sending again


def test_a_sending_that_fails_is_not_repeated_at_once(
    instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
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


def test_a_server_that_asks_to_be_left_alone_is(
    instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.die_before_submit = True
    with pytest.raises(tries.Died):
        instance.begin(deferrable=False).execute()
    prepared = []

    async def prepare(self: MemoryHook, job: Any, submission: Submission) -> Submission:
        prepared.append(submission)
        raise ClusterUnreachable("the leader is away", retry_after=60)

    monkeypatch.setattr(MemoryHook, "prepare", prepare)
    with pytest.raises(AirflowException):
        instance.begin(deferrable=False, outage_timeout=2).execute()
    assert len(prepared) <= 3


# --- waiting until it can be told


async def test_a_pause_ends_with_the_waiting(service: Service, airflow: dict[str, Any]) -> None:  # noqa: F811
    service.find_error = ClusterUnreachable("busy", retry_after=600)
    waiting = event(trigger(SubmissionTrigger, deadline=time.time() + 0.5, interval=None))
    assert (await asyncio.wait_for(waiting, 10)).kind == "told"


def test_no_timeout_passed_where_there_is_none(instance: TaskInstance, service: Service) -> None:
    service.die_after_submit = True
    with pytest.raises(tries.Died):
        instance.begin().execute()
    service.unreachable = True
    second = instance.begin()
    assert tries.waits(second.execute())
    with pytest.raises(AirflowException, match="OutageTooLong: no job is known: no word for"):
        second.fail(TriggerFailureReason.TRIGGER_TIMEOUT)


# --- killing


async def test_a_task_that_was_cleared_while_its_kill_is_tried_keeps_its_job(
    service: Service,
    airflow: dict[str, Any],  # noqa: F811
) -> None:
    service.add(TOKEN)
    airflow["state"] = "failed"

    def cleared_meanwhile() -> None:
        airflow["state"] = "deferred"  # with on_clear="reconnect": a new try follows the job on
        service.before_kill = None
        raise ClusterUnreachable("failing over")

    service.before_kill = cleared_meanwhile
    await trigger().on_kill()
    assert service.before_kill is None, "it was tried once"
    assert service.kills == []


async def test_what_cannot_be_told_yet_is_killed_when_it_can(
    service: Service,
    airflow: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service.add(TOKEN)
    airflow["state"] = "failed"
    find = MemoryHook.find

    async def not_yet(self: MemoryHook, submission: Submission) -> Any:
        monkeypatch.setattr(MemoryHook, "find", find)
        raise SubmissionUncertain("a driver is still queued", permanent=False)

    monkeypatch.setattr(MemoryHook, "find", not_yet)
    await trigger(SubmissionTrigger).on_kill()
    assert service.kills == ["job-1"]


async def test_a_kill_that_is_refused_does_not_spare_the_other_job(
    service: Service,
    airflow: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service.add(TOKEN)
    service.add(TOKEN)
    airflow["state"] = "failed"
    kill = MemoryHook.kill

    async def refuse(self: MemoryHook, job: JobRef) -> None:
        if job.id == "job-1":
            raise RequestRefused("it is another user's, who has copied our labels")
        await kill(self, job)

    monkeypatch.setattr(MemoryHook, "kill", refuse)
    await trigger(SubmissionTrigger).on_kill()
    assert service.kills == ["job-2"]


async def test_a_kill_that_is_refused_does_not_keep_the_other_from_a_second_one(
    service: Service,
    airflow: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service.add(TOKEN)
    service.add(TOKEN)
    airflow["state"] = "failed"
    kill = MemoryHook.kill
    errors: dict[str, list[Exception]] = {
        "job-1": [ClusterUnreachable("failing over")],
        "job-2": [RequestRefused("no"), RequestRefused("no")],
    }

    async def fail(self: MemoryHook, job: JobRef) -> None:
        if errors[job.id]:
            raise errors[job.id].pop()
        await kill(self, job)

    monkeypatch.setattr(MemoryHook, "kill", fail)
    await trigger(SubmissionTrigger).on_kill()
    assert service.kills == ["job-1"]


def test_a_kill_that_never_arrived_does_not_make_a_loss_a_kill(
    instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_module, "_KILL_CONFIRMED_WITHIN", 0.0)
    first = instance.begin(execution_timeout=datetime.timedelta(hours=1))
    first.execute()
    token = instance.store["durable_spark"]["submission"]["token"]
    service.unreachable = True
    with pytest.raises(AirflowTaskTimeout):
        first.complete({"v": 1, "kind": "timeout", "job_id": "job-1", "token": token})
    assert service.kills == []
    assert instance.store["durable_spark"]["killing"], "it may have arrived"
    service.unreachable = False
    second = instance.begin()
    assert isinstance(second.execute(), TaskDeferred)
    del service.jobs["job-1"]
    with pytest.raises(AirflowFailException, match="JobLost"):
        second.complete({"v": 1, "kind": "lost", "job_id": "job-1", "token": token})


# --- telling


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


def test_a_decision_holds_nothing_that_airflow_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_telling, "redact", lambda text: text.replace("hush-hush", "***"))
    values: dict[str, Any] = {}
    ti = SimpleNamespace(try_number=1, xcom_push=lambda key, value: values.update({key: value}))
    _telling.push_decision(
        {"ti": ti},  # type: ignore[typeddict-item]
        "fail",
        why="spark-submit --token hush-hush ended with 3",
        job=None,
        submission=None,
    )
    assert "--token ***" in json.dumps(values)
    assert "hush-hush" not in json.dumps(values)


async def test_one_gauge_for_the_two_feeds_of_a_connection_that_was_edited(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, int] = {}
    monkeypatch.setattr(_metrics, "followed_jobs", lambda number, *, conn_id: told.update({conn_id: number}))
    service.names = ("service://one", "service://two")
    jobs = [JobRef(service.add(token)) for token in (TOKEN, "f" * 32)]
    keys = [FeedKey(hook="hook", conn_id="memory", cluster=service.names[:count]) for count in (1, 2)]
    first, second = (
        join(key, job, make_hook=lambda: MemoryHook("memory"), interval=0.01, gauged=True)
        for key, job in zip(keys, jobs, strict=True)
    )
    async with first, second:
        await wait_until_async(lambda: asyncio.sleep(0, told.get("memory") == 2), 5, "the sum of both")
