"""
What is different on CeleryExecutor, with Redis; the rest of the suite runs on LocalExecutor.

There a worker is a process of the scheduler, and its death is the scheduler's to see. Here a message goes through a
broker to a machine of its own: the worker may die with all it runs, be told to shut down and finish what it has begun,
or lose one process of its pool; the message may be lost with the broker, fail to be sent, or be delivered twice. What
becomes of a try, of its job and of the record within the process that runs it is the same code on both, so each
case is told only where Celery has a part in it.

An Airflow of its own: one scheduler, one triggerer, two workers.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis import Redis as Client

from dev.airflow import IMPATIENT, Airflow, connection_text
from dev.postgres import Postgres
from dev.processes import free_port, wait_until
from dev.proxy import Proxy
from dev.redis import Redis
from tests.airflow.backdoor import let_be_given_up
from tests.airflow.collectors import Span, span_collector
from tests.airflow.conftest import ENDED, LAST_LOOK, PodStage, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.test_late_workers import FORGOTTEN
from tests.airflow.together import alone, together

if TYPE_CHECKING:
    from dev.kubernetes import KubernetesCluster

DAGS = Path(__file__).with_name("dags") / "moving.py"
QUEUE = "default"
"""Celery's queue, a list in Redis."""
UNACKED = "unacked"
"""What workers have taken and not acknowledged, a hash in Redis."""


class CeleryStage(PodStage):
    """A stage whose tasks run on Celery's workers."""

    broker: Redis
    spans: list[Span]


@contextlib.contextmanager
def own_stage(kubernetes: KubernetesCluster, dags: Path) -> Iterator[CeleryStage]:
    """Open the stage of this module."""
    (dags / DAGS.name).symlink_to(DAGS)
    port = free_port()
    connection: dict[str, Any] = kubernetes.connection()
    scheduler = {"task_instance_heartbeat_timeout": 60, "task_queued_timeout_check_interval": 1}
    with (
        Redis() as broker,
        Proxy(f"http://127.0.0.1:{port}") as execution_api,
        Postgres() as postgres,
        span_collector() as (spans_port, spans),
        Airflow(
            dags,
            port=port,
            database=postgres.url,
            celery=broker.url,
            workers=2,
            execution_api=execution_api.url,
            connections={"kubernetes": connection_text(connection)},
            config={
                **IMPATIENT,
                "scheduler": {**IMPATIENT["scheduler"], **scheduler},
                "traces": {"otel_on": True},
            },
            env={
                "OTEL_TRACES_EXPORTER": "otlp_proto_http",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{spans_port}/v1/traces",
            },
        ) as airflow,
    ):
        stage = CeleryStage(airflow, execution_api, kubernetes, postgres)
        stage.broker, stage.spans = broker, spans
        yield stage


# --- what is told of it


@together
def test_a_submission_is_a_span_under_that_of_its_task(stage: CeleryStage, run: Callable[..., Run]) -> None:
    job = run("celery_traced")
    pod = job.wait_for_followed_pod()
    open_gate(job)
    assert job.wait(*ENDED).state == "success"

    def of_job() -> Span | None:
        job_id = f"spark:{pod.name}"
        return next((each for each in list(stage.spans) if each.attributes.get("durable_spark.job_id") == job_id), None)

    span = wait_until(of_job, 60, "the span of the submission", interval=0.5)
    assert span.name == "durable_spark.submission"
    told = {name.removeprefix("durable_spark."): value for name, value in span.attributes.items()}
    assert (told["outcome"], told["conn_id"], told["ordinal"]) == ("submitted", "kubernetes", 1)
    assert told["token"] == job.store()["durable_spark"]["submission"]["token"]

    def of_task() -> Span | None:
        return next((each for each in list(stage.spans) if each.id == span.parent), None)

    parent = wait_until(of_task, 60, "the span of the task", interval=0.5)
    assert (parent.name, parent.trace) == ("worker.job", span.trace)
    assert parent.attributes["airflow.dag_id"] == job.dag


# --- one process dies, or is told to end


@together
def test_the_runner_is_killed(stage: Stage, run: Callable[..., Run]) -> None:
    """The process that runs the task's code dies: the pool's process, its supervisor, tells Airflow, and lives."""
    with stage.killed_before_it_defers(run, "celery_runner") as job:
        pod = job.wait_for_pod("Running")
    assert_followed_on(job, pod)


@together
def test_the_process_of_the_pool_is_killed(stage: Stage, run: Callable[..., Run]) -> None:
    """Celery tells of it at once, so that the retry begins beside the orphan; which kills nothing and ends."""
    with stage.about_to_defer("celery_pool") as held:
        job = run("celery_pool")
        held.wait()
        pod = job.wait_for_pod("Running")
        process = stage.airflow.task_process(*job.key)
        os.kill(process.supervisor, signal.SIGKILL)
        held.drop()
    assert_followed_on(job, pod)
    assert not Path(f"/proc/{process.runner}").exists()


def assert_followed_on(run: Run, pod: object) -> None:
    run.wait("deferred", try_number=2)
    run.wait_until_followed()
    assert "Reconnecting to existing job" in run.log(2)
    open_gate(run)
    assert run.wait(*ENDED).state == "success"
    assert run.pods() == [pod]


@together
def test_marked_while_it_waits_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("celery_marked")
    job.wait_for_pod("Running")
    job.wait_until_followed()
    stage.airflow.set_state(*job.key, "failed")
    job.wait_for_pod(None)
    assert len(job.pods()) == job.ti.try_number == 1


@together
def test_cleared_while_it_waits_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("celery_cleared")
    old = job.wait_for_pod("Running")
    job.wait_until_followed()
    stage.airflow.clear(job.dag, job.id, ["job"])
    wait_until(lambda: len(job.pods()) == 2, 60, "the new pod", interval=0.2)
    assert job.phase(old) is None, "never beside the old one"
    job.wait_for_pod("Running")
    open_gate(job)
    assert job.wait(*ENDED).state == "success"
    assert len(job.pods()) == 2


# --- a worker is shut down


@alone
def test_a_warm_shutdown_lets_tasks_end(stage: CeleryStage, run: Callable[..., Run]) -> None:
    """One task waits for its job on the worker, one is about to submit: both do what they have begun."""
    staying, leaving = stage.airflow.workers
    staying.kill()
    waiting, submitting = run("celery_waiting"), run("celery_submitting")
    with stage.execution_api.holding("DELETE", f"/store/.*{submitting.ti.id}/{FORGOTTEN}") as held:
        waiting.wait_for_pod("Running")
        waiting.wait_until_followed()
        held.wait()
        os.kill(leaving.pid, signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in leaving.tail(), 30, "the worker to be told")
    submitting.wait("deferred")
    open_gate(waiting)
    assert waiting.wait(*ENDED).state == "success"
    wait_until(lambda: not leaving.alive, 60, "the worker to end")
    staying.start()
    open_gate(submitting)
    assert submitting.wait(*ENDED).state == "success"
    assert [(len(job.pods()), job.ti.try_number) for job in (waiting, submitting)] == [(1, 1), (1, 1)]
    leaving.start()


# --- the broker dies


@alone
def test_the_job_ends_while_the_broker_is_away(stage: CeleryStage, run: Callable[..., Run]) -> None:
    """Airflow cannot send the task that is to resume, which costs a try: the next one finds the result."""
    broker = stage.broker
    job = run("celery_lost")
    job.wait("deferred")
    pod = job.wait_for_pod("Running")
    job.wait_until_followed()
    broker.server.kill()
    open_gate(job)
    wait_until(lambda: job.state()[1] > 1, 90, "the try to be lost", interval=0.2)
    broker.start()
    assert job.wait(*ENDED).state == "success"
    assert job.pods() == [pod]
    assert job.xcoms()["return_value"] == f"spark:{pod.name}"


@alone
def test_workers_and_messages_are_lost_and_messages_come_twice(stage: CeleryStage, run: Callable[..., Run]) -> None:
    """
    The three cases of a retry, and the end of a deferred job, when all workers have died.

    What is sent to them is lost with the broker. It is sent again, and then each message is delivered twice, as a
    broker does when an acknowledgement is late: Airflow runs one of the two.
    """
    broker = stage.broker
    cases = ["celery_active", "celery_succeeded", "celery_failed"]
    resumed = run("celery_twice")
    resumed.wait("deferred")
    resumed.wait_for_pod("Running")
    resumed.wait_until_followed()
    with stage.about_to_defer(f"({'|'.join(cases)})") as held:
        active, succeeded, failed = jobs = [run(dag) for dag in cases]
        first = [job.wait_for_pod("Running") for job in jobs]
        tries = [job.ti for job in jobs]
        for job in jobs:
            wait_until(partial(looks, stage, job.dag), 60, f"{job.dag} to be about to defer", interval=0.1)
        for worker in stage.airflow.workers:
            worker.kill()
        held.drop()
    for job in (resumed, succeeded, failed):
        open_gate(job)
    succeeded.wait_for_pod("Succeeded")
    failed.wait_for_pod("Failed")
    for job, ti in zip(jobs, tries, strict=True):
        let_be_given_up(job, ti)

    every = [resumed, *jobs]
    wait_until(lambda: queued(broker) == len(every), 60, "all to be sent", interval=0.2)
    broker.server.kill()
    broker.start()
    assert queued(broker) == 0
    for job in every:
        long_ago = "UPDATE task_instance SET queued_dttm = now() - interval '1 hour' WHERE id = %(id)s"
        stage.postgres.query(long_ago, id=job.ti.id)
    wait_until(lambda: queued(broker) == len(every), 60, "all to be sent again", interval=0.2)
    deliver_twice(broker)
    for worker in stage.airflow.workers:
        worker.start()

    active.wait("deferred", try_number=2)
    active.wait_until_followed()
    open_gate(active)
    assert [job.wait(*ENDED, deadline=120).state for job in every] == ["success", "success", "success", "failed"]
    wait_until(lambda: acknowledged(broker), 60, "all messages to be acknowledged", interval=0.2)
    assert [job.ti.try_number for job in every] == [1, 2, 2, 3]
    assert [len(job.pods()) for job in every] == [1, 1, 1, 3]
    assert [job.pods()[0] for job in jobs] == first
    assert "Reconnecting to existing job" in active.log(2)
    assert "already completed successfully" in succeeded.log(2)
    assert "Prior job in terminal state" in failed.log(2)
    assert begun(resumed, try_number=1) == begun(active, try_number=2) == 2, "a start and a resume, none of them twice"
    assert begun(succeeded, try_number=2) == 1


def looks(stage: CeleryStage, dag: str) -> int:
    return stage.execution_api.count("GET", LAST_LOOK + rf".*dag_id={dag}&")


def begun(run: Run, *, try_number: int) -> int:
    """Return how often a process was let run a try, by the audit log."""
    events = run.stage.airflow.events(*run.key)
    return sum((event["event"], event["try_number"]) == ("running", try_number) for event in events)


def queued(broker: Redis) -> int:
    with Client.from_url(broker.url) as client:
        return int(client.llen(QUEUE))


def deliver_twice(broker: Redis) -> None:
    with Client.from_url(broker.url) as client:
        client.rpush(QUEUE, *client.lrange(QUEUE, 0, -1))


def acknowledged(broker: Redis) -> bool:
    with Client.from_url(broker.url) as client:
        return not client.llen(QUEUE) and not client.hlen(UNACKED)
