"""What a try tells those who look from outside: lines in its log, an XCom, counters, a span."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout
from airflow.sdk.log import mask_secret
from airflow.sdk.observability import stats
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from durable_spark import _metrics
from durable_spark.jobs import ClusterUnreachable, JobState, SubmissionRefused, SubmissionUncertain
from durable_spark.operators import _telling
from durable_spark.operators._telling import DECISION_XCOM_KEY
from durable_spark.triggers import job as trigger_module
from tests.unit.test_operator import elsewhere, event, instance, service
from tests.unit.tries import Died, MemoryHook, Service, TaskInstance

__all__ = ["instance", "service"]  # fixtures

TAGS = {"operator": "DurableJobOperator", "conn_id": "memory"}
SECRET = "https://user:hush@host/"


@pytest.fixture(autouse=True)
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has ended the task."""
    monkeypatch.setattr(trigger_module, "state_of", lambda **_: "running")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was counted, and always with the same tags."""
    names: list[str] = []

    def incr(name: str, tags: dict[str, str]) -> None:
        assert tags == TAGS
        names.append(name)

    monkeypatch.setattr(stats, "incr", incr)
    return names


def died(instance: TaskInstance, service: Service, *, submitted: bool) -> None:
    service.die_after_submit, service.die_before_submit = submitted, not submitted
    with pytest.raises(Died):
        instance.begin().execute()
    service.die_after_submit = service.die_before_submit = False


def first(instance: TaskInstance, service: Service) -> None:
    instance.begin().execute()


def retried(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    instance.begin().execute()


def out_of_reach(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    service.unreachable = True
    instance.begin().execute()


def succeeded(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    service.jobs["job-1"].state = JobState.SUCCEEDED
    instance.begin().execute()


def failed(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    service.jobs["job-1"].state = JobState.FAILED
    instance.begin().execute()


def found(instance: TaskInstance, service: Service) -> None:
    died(instance, service, submitted=True)
    instance.begin().execute()


def resent(instance: TaskInstance, service: Service) -> None:
    died(instance, service, submitted=False)
    instance.begin().execute()


def of_upstream(instance: TaskInstance, service: Service) -> None:
    instance.store["durable_job_id"] = service.add("theirs")
    instance.begin().execute()


def labelled(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    instance.store.clear()
    instance.begin(on_clear="reconnect").execute()


def cleared(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    instance.clear()
    instance.begin().execute()


def cleared_to_reconnect(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    instance.clear()
    instance.begin(on_clear="reconnect").execute()


def lost(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    service.jobs.clear()
    with pytest.raises(AirflowFailException):
        instance.begin().execute()


def lost_while_deferred(instance: TaskInstance, service: Service) -> None:
    one = instance.begin()
    one.execute()
    with pytest.raises(AirflowFailException):
        one.complete(event(instance, "lost"))


def resubmitted(instance: TaskInstance, service: Service) -> None:
    first(instance, service)
    service.jobs.clear()
    instance.begin(on_lost="resubmit").execute()


def untold(instance: TaskInstance, service: Service) -> None:
    died(instance, service, submitted=True)
    service.find_error = SubmissionUncertain("still queued")
    instance.begin().execute()


def untold_for_ever(instance: TaskInstance, service: Service) -> None:
    died(instance, service, submitted=True)
    service.find_error = SubmissionUncertain("forgotten", permanent=True)
    with pytest.raises(AirflowFailException):
        instance.begin().execute()


def bad(instance: TaskInstance, service: Service) -> None:
    with pytest.raises(AirflowFailException):
        instance.begin(job="bad").execute()


@pytest.mark.parametrize(
    ("story", "decision", "job", "ordinal", "why", "counters"),
    [
        (first, "fresh_submit", "job-1", 1, "no earlier submission", ["submissions"]),
        (retried, "reconnect", "job-1", 1, "the cluster says RUNNING", ["submissions", "reconnects"]),
        (out_of_reach, "reconnect", "job-1", 1, "out of reach", ["submissions", "reconnects"]),
        (succeeded, "already_succeeded", "job-1", 1, "SUCCEEDED", ["submissions"]),
        (failed, "terminal_resubmit", "job-2", 2, "job-1 has ended: .*FAILED", ["submissions", "submissions"]),
        (found, "adopt_found", "job-1", 1, "which had no job yet", ["adoptions.found"]),
        (resent, "resend", "job-1", 1, "does not exist on the cluster", ["submissions"]),
        (of_upstream, "adopt_stored", "job-1", 1, "another operator stored it", ["adoptions.stored"]),
        (labelled, "adopt_labelled", "job-1", 1, "carries the label", ["submissions", "adoptions.labelled"]),
        (cleared, "clear_resubmit", "job-2", 2, "cleared, and job-1 is dead", ["submissions", "submissions"]),
        (cleared_to_reconnect, "reconnect", "job-1", 1, "RUNNING", ["submissions", "reconnects"]),
        (lost, "lost", "job-1", 1, "does not know job-1 any more", ["submissions", "lost_jobs"]),
        (lost_while_deferred, "lost", "job-1", 1, "does not know job-1", ["submissions", "lost_jobs"]),
        (
            resubmitted,
            "lost_resubmit",
            "job-1",
            2,
            "job-1 is lost",
            ["submissions", "lost_jobs", "submissions"],
        ),
        (untold, "wait", None, 1, "still queued", []),
        (untold_for_ever, "fail", None, 1, "SubmissionUncertain: forgotten", []),
        (bad, "fail", None, None, "BadArguments: job", []),
    ],
)
def test_each_decision(
    instance: TaskInstance,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    counted: list[str],
    story: Callable[[TaskInstance, Service], None],
    decision: str,
    job: str | None,
    ordinal: int | None,
    why: str,
    counters: list[str],
) -> None:
    monkeypatch.setenv("AIRFLOW__DURABLE_SPARK__DEPLOYMENT", "production")
    story(instance, service)
    told = instance.xcoms[DECISION_XCOM_KEY]
    assert json.loads(json.dumps(told)) == told
    assert (told["decision"], told["job_id"], told["submission"]) == (decision, job, ordinal)
    assert instance.current is not None
    assert told["try_number"] == instance.current.try_number
    assert re.search(why, told["why"]), told
    if ordinal is not None:
        assert told["token"] == instance.store["durable_spark"]["submission"]["token"]
    ours = [name.removeprefix("durable_spark.") for name in counted if name.startswith("durable_spark.")]
    assert ours == counters


def test_the_log_tells_the_whole_story(
    instance: TaskInstance, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    instance.begin().execute()
    token = instance.store["durable_spark"]["submission"]["token"]
    where = f"submission 1 (token {token}) to service://one by connection 'memory' at "
    said = capsys.readouterr().out
    assert said.count(f"Submitted as job-1 in {where}") == 1
    assert "because there is no earlier submission" in said
    service.jobs["job-1"].state = JobState.FAILED
    instance.begin().execute()
    said = capsys.readouterr().out
    assert said.count(f"The record names job-1, {where}") == 1
    assert "the cluster says FAILED" in said
    assert "because job-1 has ended: the cluster says FAILED" in said


def test_the_decision_is_pushed_without_the_result(instance: TaskInstance) -> None:
    """do_xcom_push=False is about what a task returns."""
    instance.begin(do_xcom_push=False).execute()
    assert instance.xcoms[DECISION_XCOM_KEY]["decision"] == "fresh_submit"
    assert "durable_job_id" not in instance.xcoms


def test_an_old_try_does_not_speak_for_the_new_one(instance: TaskInstance, service: Service) -> None:
    died(instance, service, submitted=True)
    old = instance.begin()
    newer: list[Any] = []

    async def find(*_: Any) -> Any:
        if not newer:
            newer.append(instance.begin())
            elsewhere(lambda: instance.xcoms.update({DECISION_XCOM_KEY: "the new one's"}))
        raise SubmissionRefused("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryHook, "find", find)
        with contextlib.suppress(AirflowException):
            old.execute()
    assert instance.xcoms[DECISION_XCOM_KEY] == "the new one's"


def test_a_decision_that_cannot_be_pushed_stops_nothing(
    instance: TaskInstance, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = instance.begin()
    push = one.xcom_push

    def deaf(key: str, value: Any) -> None:
        if key == DECISION_XCOM_KEY:
            raise RuntimeError("the API server is away")
        push(key, value)

    monkeypatch.setattr(one, "xcom_push", deaf)
    one.execute()
    assert one.record["job"] == ["job-1", ""]


def test_a_team_is_a_tag(instance: TaskInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(stats, "incr", lambda name, tags: seen.append(tags) if "durable" in name else None)
    one = instance.begin()
    one.stats_tags = {"team_name": "blue", "dag_id": "dag"}
    one.execute()
    assert seen == [{**TAGS, "team_name": "blue"}]


class TestStatsd:
    """Airflow's own client, and what arrives."""

    @pytest.fixture
    def arrived(self) -> Iterator[Callable[[dict[str, str]], list[str]]]:
        """Send a count and a gauge under a configuration; return what a statsd server gets."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            server.settimeout(5)

            def send(options: dict[str, str]) -> list[str]:
                from airflow.sdk.observability.metrics.statsd_logger import get_statsd_logger

                make: Any = get_statsd_logger
                with pytest.MonkeyPatch.context() as patch:
                    ours = {"statsd_on": "True", "statsd_host": "127.0.0.1", "statsd_port": server.getsockname()[1]}
                    for option, value in {**ours, **options}.items():
                        patch.setenv(f"AIRFLOW__METRICS__{option.upper()}", str(value))
                    patch.setattr(_metrics, "_hostname", lambda: "host.example")
                    stats.initialize(factory=make, export_legacy_names=True)
                    _metrics.count("submissions", TAGS)
                    _metrics.followed_jobs(7, conn_id="memory")
                    stats.incr("last")
                lines: list[str] = []
                while not lines or "last" not in lines[-1]:
                    lines += server.recv(65535).decode().splitlines()
                return lines[:-1]

            yield send
            from airflow.sdk.observability.metrics.stats_utils import get_stats_factory

            stats.initialize(factory=get_stats_factory(), export_legacy_names=True)

    def test_without_tags(self, arrived: Callable[[dict[str, str]], list[str]]) -> None:
        assert arrived({}) == [
            "airflow.durable_spark.submissions:1|c",
            "airflow.durable_spark.followed_jobs.host__example.memory:7|g",
            "airflow.durable_spark.followed_jobs:7|g",
        ]

    def test_with_tags(self, arrived: Callable[[dict[str, str]], list[str]]) -> None:
        assert arrived({"statsd_influxdb_enabled": "True", "legacy_names_on": "False"}) == [
            "airflow.durable_spark.submissions,operator=DurableJobOperator,conn_id=memory:1|c",
            "airflow.durable_spark.followed_jobs,conn_id=memory,hostname=host.example:7|g",
        ]


class TestSpan:
    @pytest.fixture
    def spans(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[ReadableSpan]]:
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(_telling, "tracer", provider.get_tracer("durable_spark"))
        return lambda: list(exporter.get_finished_spans())

    def test_of_a_submission(self, instance: TaskInstance, spans: Callable[[], list[ReadableSpan]]) -> None:
        instance.begin().execute()
        instance.begin().execute()
        (span,) = spans()
        assert span.name == "durable_spark.submission"
        assert dict(span.attributes or {}) == {
            "durable_spark.conn_id": "memory",
            "durable_spark.cluster": ("service://one",),
            "durable_spark.token": instance.store["durable_spark"]["submission"]["token"],
            "durable_spark.ordinal": 1,
            "durable_spark.job_id": "job-1",
            "durable_spark.outcome": "submitted",
        }
        assert span.status.is_unset

    @pytest.mark.parametrize(
        ("error", "outcome", "said"),
        [
            (SubmissionRefused("the queue is full"), "refused", "SubmissionRefused: the queue is full"),
            (SubmissionUncertain("lost"), "uncertain", "SubmissionUncertain: lost"),
            (ClusterUnreachable("down"), "unreachable", "ClusterUnreachable: down"),
            (KeyError(SECRET), "failed", "KeyError"),
            (AirflowTaskTimeout("Timeout"), "failed", "AirflowTaskTimeout"),
        ],
    )
    def test_of_one_that_went_wrong(
        self,
        instance: TaskInstance,
        service: Service,
        spans: Callable[[], list[ReadableSpan]],
        error: BaseException,
        outcome: str,
        said: str,
    ) -> None:
        def fail() -> None:
            raise error from ValueError(SECRET)

        service.before_submit = fail
        with contextlib.suppress(AirflowException, AirflowTaskTimeout, KeyError, BaseException):
            instance.begin().execute()
        (span,) = spans()
        attributes = dict(span.attributes or {})
        assert (attributes["durable_spark.outcome"], attributes["error.type"]) == (outcome, type(error).__name__)
        assert (span.status.is_ok, span.status.description) == (False, said)
        assert "durable_spark.job_id" not in attributes
        assert "hush" not in span.to_json()

    def test_holds_nothing_that_airflow_masks(
        self, instance: TaskInstance, service: Service, spans: Callable[[], list[ReadableSpan]]
    ) -> None:
        mask_secret("masked-by-airflow")

        def fail() -> None:
            raise SubmissionRefused("spark-submit --token masked-by-airflow ended with 3")

        service.before_submit = fail
        with pytest.raises(AirflowException):
            instance.begin().execute()
        (span,) = spans()
        for told in (str(span.status.description), instance.xcoms[DECISION_XCOM_KEY]["why"]):
            assert told == "SubmissionRefused: spark-submit --token *** ended with 3"

    def test_of_one_by_an_old_worker(
        self, instance: TaskInstance, service: Service, spans: Callable[[], list[ReadableSpan]]
    ) -> None:
        old = instance.begin()
        service.after_submit = lambda: elsewhere(instance.begin) and None
        with contextlib.suppress(AirflowException):
            old.execute()
        (span,) = spans()
        assert dict(span.attributes or {})["durable_spark.outcome"] == "superseded"
        assert dict(span.attributes or {})["durable_spark.job_id"] == "job-1"
