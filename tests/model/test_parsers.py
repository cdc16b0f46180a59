"""
Every parser of what comes from outside, against recordings that were tampered with.

What is promised: no exception but ours, no end of a job that the answer does not spell out, no URL made of what nobody
has checked, no time and no memory without a bound. A slice by default; ``--full`` for 200,000 inputs. Whatever fails is
shrunk, and is the same again with the seed that was printed.

In: ``tests/unit/hooks/recorded``. What people and this package itself have written: :mod:`tests.model.test_stored`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import strategies as st

from durable_spark.hooks import _kubernetes_api, _kubernetes_watch
from durable_spark.hooks._http import Answer, whole_characters
from durable_spark.hooks._kubernetes_links import LinkTemplates
from durable_spark.hooks._kubernetes_status import read_pod
from durable_spark.hooks._standalone_pages import (
    PageReader,
    View,
    is_driver_id,
    labels_of,
    listed_drivers,
    log_text,
    tail,
)
from durable_spark.hooks._yarn_apps import is_application_id, parse_app, parse_past_app
from durable_spark.hooks._yarn_logs import contents_of
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.hooks.yarn import YarnHook
from durable_spark.jobs import (
    DurableJobError,
    InvalidAnswer,
    JobRef,
    JobState,
    JobStatus,
    Link,
    Submission,
)
from durable_spark.operators._spark_submit import SparkSubmitRun
from tests.model.feeding import URL, Parser, expect_harmless, fed, loop, recordings
from tests.model.mutations import answers, changed, lines
from tests.model.wire import DATE
from tests.unit.hooks.fake import recorded

__all__ = ["fed"]  # a fixture

TOKEN = "a1" * 16


def answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(url="http://h/x", status=status, headers={"Date": DATE} if headers is None else headers, body=body)


# --- HTTP

HEADERS = [
    "",
    DATE,
    "-1",
    "5",
    "²",
    "१",
    "9" * 400,
    "1e5",
    "Mon, 23 Nov 99999999999 03:55:00 GMT",
    "\0",
    "Mon, 23 Nov 2026",
]
HEADERS += [
    "Mon, 23 Nov 2026 03:55:00 +99999999",
    "Mon, 01 Jan 0001 00:00:00 -0000",
    "x" * 70_000,
    " ",
    ",",
    "a, b c d e f",
]
HEADERS += [
    "Thu, 01 Jan 1970 00:00:00 +9999",
    "Mon, 23 Nov 2026 99:55:00 GMT",
    "31 Feb 2026 00:00:00 GMT",
    "Mon,",
    "23 Nov",
]


def check_http(value: tuple[bytes, int, str, str]) -> None:
    body, status, date, after = value
    got = answer(body, status, {"Date": date, "Retry-After": after, "Location": date})
    assert got.date is None or isinstance(got.date, float)
    assert got.retry_after is None or got.retry_after >= 0
    assert len(got.excerpt) <= 200
    with contextlib.suppress(DurableJobError):
        got.expect_ok()
    with contextlib.suppress(DurableJobError):
        assert isinstance(loop.complete(got.json()), dict)


headers = st.sampled_from(HEADERS) | st.text(max_size=40)
http = st.tuples(
    answers(recordings("")), st.sampled_from([200, 201, 204, 301, 400, 401, 404, 429, 500, 503]), headers, headers
)

# --- standalone

SPARK_WORDS = ["FINISHED", "ERROR", "UNKNOWN", "worker-20261123035333-127.0.0.1-28435", "STANDBY", "DEAD", "None"]
PAGE = json.loads(recorded("page.json"))


OF_SPARK = {
    "FINISHED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "ERROR": JobState.FAILED,
    "KILLED": JobState.KILLED,
}
FINAL = {
    "SUCCEEDED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "KILLED": JobState.KILLED,
    "UNDEFINED": JobState.FAILED,
    "ENDED": JobState.FAILED,
}


def expect_end(status: JobStatus, end: JobState | None) -> None:
    """See that it is the end that the answer spells out, and none if it spells out none."""
    assert status.state is end if end else not status.state.final and status.state is not JobState.ABSENT, status


def read_page(body: bytes, before: View | None) -> View:
    reader = PageReader("http://m:8080", before)
    return loop.complete(answer(body).parse(lambda page: reader.view(page, time=1.0), element=reader.element))


def check_page(body: bytes) -> None:
    try:
        view = read_page(body, None)
    except DurableJobError:
        return
    again = read_page(body, view)
    assert again == view
    assert all(again.drivers[driver_id] is driver for driver_id, driver in view.drivers.items())
    value = json.loads(whole_characters(body.decode()))
    told = {
        (each["id"], str(each["state"])[:40], each["worker"])
        for each in value["activedrivers"] + value["completeddrivers"]
    }
    assert view.leading == (value["status"] == "ALIVE")
    _ = view.fleet, view.newest
    for driver in view.drivers.values():
        assert is_driver_id(driver.id)
        status = view.status(driver)
        expect_harmless(status)
        assert (driver.id, status.raw, driver.worker or "None") in told
        expect_end(status, OF_SPARK.get(status.raw))
        assert status.links[Link.JOB].startswith("http://m:8080/")


LOGS = [
    "==== Bytes 0-9 of 9 of /x ====\n",
    "Launch Command: ",
    '"-Dspark.airflow.submission=',
    "=" * 40,
    TOKEN,
    "Error: invalid",
]
LOGS += [
    "LogContents:\n",
    "End of LogType:",
    "*" * 80,
    "driver-20261123035342-0000",
    "Submitted application ",
    "application_",
]


def check_log(body: bytes) -> None:
    text = answer(body).text
    with contextlib.suppress(InvalidAnswer):
        found = log_text(text)
        assert found is None or (len(found[0]) <= len(text) and found[1] >= 0)
    labels = labels_of(text)
    assert labels is None or text.startswith("Launch Command: ")
    assert labels is None or all(f'={value}"' in text for value in labels.values())
    assert len(tail(text, 5)) <= 5
    assert all(map(is_driver_id, listed_drivers(text)))
    assert len(contents_of(text)) <= len(text)


# --- YARN


def check_app(value: Any) -> None:
    entry = value.get("app", value) if isinstance(value, dict) else value
    with contextlib.suppress(InvalidAnswer):
        app = parse_app(entry, page="http://rm:8088/cluster/app/", history="http://h/history/{app_id}")
        _expect_app(app, entry, entry.get("state"), entry.get("finalStatus"))
        assert app.status.links[Link.JOB] == f"http://rm:8088/cluster/app/{app.id}"
    with contextlib.suppress(InvalidAnswer):
        app = parse_past_app(entry, history=None)
        _expect_app(app, entry, entry.get("appState"), entry.get("finalAppStatus"))


def _expect_app(app: Any, entry: Any, state: Any, final: Any) -> None:
    assert is_application_id(app.id)
    assert app.id in (entry.get("id"), entry.get("appId"))
    expect_harmless(app.status)
    _ = app.age, app.labels
    words = {"FINISHED": FINAL.get(final or ""), "FAILED": JobState.FAILED, "KILLED": JobState.KILLED}
    expect_end(app.status, words.get(state))
    assert app.logs is None or all(URL.fullmatch(f"{app.logs[0]}/{app.logs[1]}") for _ in "1")


# --- Kubernetes

LINKS = LinkTemplates({Link.LOG: "https://logs/{namespace}/{pod}?uid={uid}&app={app_id}"})
PODS = recordings("k8s-pod")
EVENTS = [line for line in recorded("k8s-watch.jsonl").splitlines() if line]
EVENTS += ['{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}']
EVENTS += ['{"type":"ERROR","object":{"kind":"Status","code":429,"details":{"retryAfterSeconds":1}}}']
WORDS = [
    "Succeeded",
    "Failed",
    "DELETED",
    "ERROR",
    "BOOKMARK",
    "2026-11-25T23:58:15Z",
    "137",
    "Unschedulable",
    "Evicted",
]


def check_pod(value: tuple[Any, bool]) -> None:
    pod, deleted = value
    pod = json.loads(whole_characters(json.dumps(pod)))  # as the API server's answers are read
    with contextlib.suppress(InvalidAnswer):
        read = read_pod(pod, namespace="spark", deleted=deleted, links=LINKS)
        _expect_pod(read.status, pod, deleted=deleted)


def _expect_pod(status: JobStatus, pod: Mapping[str, Any], *, deleted: bool) -> None:
    expect_harmless(status)
    phase = pod["status"].get("phase") if isinstance(pod.get("status"), dict) else None
    assert re.fullmatch(r"spark:[a-z0-9]([-a-z0-9.]*[a-z0-9])?", status.job.id), status.job
    assert status.job == (f"spark:{pod['metadata']['name']}", pod["metadata"]["uid"])
    if status.state is JobState.KILLED:
        asked = re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", str(pod["metadata"].get("deletionTimestamp")))
        assert (
            asked if phase == "Failed" else deleted or (phase == "Pending" and asked and "nodeName" not in pod["spec"])
        )
    else:
        expect_end(status, {"Succeeded": JobState.SUCCEEDED, "Failed": JobState.FAILED}.get(str(phase)))


def check_event(line: bytes) -> None:
    with contextlib.suppress(DurableJobError):
        kind, value = _kubernetes_watch._event(line)
        assert kind in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK")
        _kubernetes_watch._version(value)
        read_pod(value, namespace="spark", links=LINKS)


def check_api(value: tuple[bytes, int]) -> None:
    body, status = value
    got = answer(body, status)

    async def read() -> None:
        for use in (_kubernetes_api._expect, _kubernetes_api.said, _kubernetes_api.is_status):
            with contextlib.suppress(DurableJobError):
                await use(got)
        with contextlib.suppress(DurableJobError):
            assert not await _kubernetes_api._not_found(got, "nobody") or b"nobody" in body
        with contextlib.suppress(DurableJobError):
            events = await got.parse(_kubernetes_api._events)
            assert b'List"' in body, "no events, and from what is no list of them"
            assert all(len(str(event)) <= 600 for event in events)
        with contextlib.suppress(DurableJobError):
            await got.parse(_kubernetes_api._page, element=lambda pod, _: read_pod(pod, namespace="spark", links=LINKS))

    loop.complete(read())


api = st.tuples(answers(recordings("k8s-"), WORDS), st.sampled_from([200, 400, 401, 403, 404, 409, 410, 422, 429, 500]))

# --- what spark-submit prints

OUTPUT = [
    "26/11/23 03:54:11 INFO ClientEndpoint: Driver successfully submitted as driver-20261123035411-0004\nmore\n",
    "INFO RestSubmissionClient: Submission successfully created as driver-20261123035411-0004. Polling\n",
    "INFO YarnClientImpl: Submitted application application_1795664117779_0006\nINFO Client: report\n",
    "Client: Deployed Spark application pi1 with application ID spark-a1 and submission ID spark:pi1 into Kubernetes\n",
]


def check_output(data: bytes) -> None:
    import asyncio

    class Output:
        def __init__(self) -> None:
            self.rest = data

        async def read(self, size: int) -> bytes:
            part, self.rest = self.rest[: size // 7], self.rest[size // 7 :]
            return part

    submission = Submission(token=TOKEN, job=JobRef("spark:pi1"))
    hooks = (StandaloneHook("c"), YarnHook("c"), KubernetesHook("c"))
    for hook in hooks:
        seen: list[str] = []
        jobs: list[JobRef] = []

        async def run(hook: Any = hook, seen: list[str] = seen, jobs: list[JobRef] = jobs) -> None:
            tool = SparkSubmitRun(
                ["x"], env={}, hook=hook, submission=submission, on_line=seen.append, on_job=jobs.append
            )
            await tool._read(Output())  # type: ignore[arg-type]
            assert isinstance(tool._hint, asyncio.Event)

        loop.complete(run())
        assert all(len(line) <= 2 << 16 for line in seen)
        for job in jobs:
            assert is_driver_id(job.id) or is_application_id(job.id) or job == submission.job
            assert job.id.encode() in data


PARSERS: dict[str, Parser] = {
    "http": Parser(http, check_http),
    "standalone page": Parser(answers([recorded("page.json")], SPARK_WORDS), check_page, 2),
    "logs and pages": Parser(
        lines([*recordings("log-", ".txt"), *recordings("yarn-log", ".txt"), recorded("worker.html")], LOGS), check_log
    ),
    "yarn application": Parser(changed([*recordings("yarn-app-"), *recordings("yarn-timeline-app")]), check_app, 3),
    "pod": Parser(st.tuples(changed(PODS, WORDS), st.booleans()), check_pod, 3),
    "watch event": Parser(answers(EVENTS, WORDS), check_event, 2),
    "kubernetes api": Parser(api, check_api),
    "spark-submit": Parser(lines(OUTPUT, LOGS), check_output, 0.5),
}


@pytest.mark.parametrize("name", PARSERS)
def test_parsers(name: str, fed: Callable[..., None]) -> None:
    fed(name, PARSERS[name])
