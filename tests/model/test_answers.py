"""
The hooks themselves against answers that were tampered with, over a network that is not there.

What the parsers alone cannot show: which URL is asked next, who is sent the password, what a hook concludes from
several answers of which one is wrong. Of the answers that a question takes, each is as it was recorded, but for one, or
all.

In: ``tests/unit/hooks/recorded``. Out: ours are the only exceptions; each job that was asked about has a status; a
success was spelled out by an answer; a job that was found was named by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from hypothesis import strategies as st

from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.hooks.yarn import YarnHook
from durable_spark.jobs import (
    DurableJobError,
    Found,
    JobRef,
    JobState,
    JobStatus,
    SparkJob,
    Submission,
)
from tests.model.clock import Stuck
from tests.model.feeding import Parser, expect_harmless, fed, loop, recordings
from tests.model.mutations import answers, lines
from tests.model.test_parsers import EVENTS, LOGS, PODS, TOKEN
from tests.model.wire import DATE, NEVER, Wire, hook_on, wire
from tests.unit.hooks.fake import driver, launch_command, recorded, recorded_json

__all__ = ["fed", "wire"]  # fixtures

DRIVER = driver(2, "FINISHED")["id"]
APP = "application_1795664117779_0002"
POD = json.loads(recorded("k8s-pod-succeeded.json"))
NAME = POD["metadata"]["name"]
POD_TOKEN = POD["metadata"]["labels"]["durable-spark/token"]
UID = POD["metadata"]["uid"]

Route = tuple[str, list[str]]
"""A pattern of method and URL, and the answers that were recorded to it."""


def page() -> str:
    value = recorded_json("page.json")
    ended = [driver(1, "FAILED"), driver(2, "FINISHED")]
    return json.dumps(value | {"activedrivers": [driver(3, "RUNNING")], "completeddrivers": ended})


def rest(name: str, driver_id: str = DRIVER) -> str:
    return json.dumps(recorded_json(name) | {"submissionId": driver_id})


STANDALONE: list[Route] = [
    (r"GET .*/json/", [page()]),
    (r"GET .*/status/driver-0", [rest("status-unknown.json", "driver-00000000000000-0000")]),
    (r"GET .*/status/", [rest("status-finished.json"), rest("status-error.json"), rest("status-unknown.json")]),
    (r"POST .*/create", recordings("create")),
    (r"POST .*/kill/", recordings("kill")),
    (
        r"GET .*/log/",
        ["==== Bytes 0-9 of 900 of /x/stderr ====\n" + launch_command(TOKEN), recorded("log-missing.txt")],
    ),
    (r"GET .*:8081/", [recorded("worker.html")]),
]
YARN: list[Route] = [
    (r"GET .*/info", [recorded("yarn-info.json")]),
    (r"GET .*/apps\?", [recorded("yarn-apps.json"), recorded("yarn-apps-none.json")]),
    (r"GET .*/apps/", [recorded("yarn-app-finished.json"), recorded("yarn-app-unknown.json")]),
    (r"GET .*/appstatistics", [recorded("yarn-statistics.json")]),
    (r"GET .*/conf", ['{"property":{"key":"yarn.resourcemanager.max-completed-applications","value":"1000"}}']),
    (r"GET .*containerlogs", recordings("yarn-log", ".txt")),
    (r"PUT .*/state", [json.loads(text)["body"] for text in recordings("yarn-kill")]),
    (r"POST .*", [recorded("yarn-new-application.json")]),
]
KUBERNETES: list[Route] = [
    (r"GET .*/pods\?watch", ["\n".join(EVENTS[:9]) + "\n"]),
    (r"GET .*/pods\?", [recorded("k8s-page.json")]),
    (r"GET .*/log\?", ["a line\n"]),
    (r"GET .*/events", [recorded("k8s-events.json")]),
    (r"(GET|DELETE) .*/pods/", [*PODS, recorded("k8s-status-404.json").replace("nobody", NAME)]),
    (r"PATCH .*", PODS),
    (r"(GET|DELETE) .*/(secrets|configmaps)/", recordings("k8s-status")),
    (r"POST .*selfsubject", [recorded("k8s-review.json")]),
    (r"POST .*/pods", [*PODS, *recordings("k8s-status")]),
    (r"GET .*/version", [recorded("k8s-version.json")]),
    (r"GET .*", recordings("k8s-status")),
]
NOT_FOUND = re.compile(r"NotFound|not found")
words = ["FINISHED", "Succeeded", "SUCCEEDED", "ALIVE", "ACTIVE", "http://evil:80", "worker-1", TOKEN, DRIVER, APP]


class Told:
    """
    Answers what was recorded to a question, or what is left of it.

    :param draw: of the strategy.
    :param broken: which answer is tampered with; ``None``: each.
    """

    def __init__(self, draw: Callable[[Any], Any], routes: list[Route], broken: int | None) -> None:
        self.draw = draw
        self.routes = routes
        self.broken = broken
        self.asked = 0

    def __call__(self, method: str, url: str) -> tuple[int, Mapping[str, str], bytes]:
        number, self.asked = self.asked, self.asked + 1
        texts = next(texts for pattern, texts in self.routes if re.match(pattern, f"{method} {url}"))
        if number > 40:  # a loop that waits for better news
            raise Stuck(url)
        headers = {"Date": DATE, "Content-Type": "application/json"}
        if self.broken not in (None, number):
            text = texts[number % len(texts)]
            return (404 if NOT_FOUND.search(text[:400]) else 200), headers, text.encode()
        text = self.draw(st.sampled_from(texts))
        body = self.draw(answers([text], words) if _is_json(text) else lines([text], [*LOGS, *words]))
        status = self.draw(st.sampled_from([200] * 8 + [404, 404, 201, 202, 307, 400, 401, 403, 409, 429, 500, 503]))
        if self.draw(st.integers(0, 15)) == 0:
            headers["Date"] = self.draw(st.sampled_from(["", "x", "Mon, 23 Nov 99999999999 03:55:00 GMT"]))
        return status, headers, body


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class Enough(Exception):
    """It was followed for long enough."""


class Once:
    """What a feed is to :meth:`JobHook.follow`: two looks, then it is over."""

    def __init__(self, *jobs: JobRef) -> None:
        self.followed = jobs
        self.looks = 0

    def jobs(self) -> tuple[JobRef, ...]:
        return self.followed

    async def pause(self) -> None:
        self.looks += 1
        if self.looks > 2:
            raise Enough


def expect_told(wire: Wire, status: JobStatus, spelt: Callable[[dict[str, Any], str], bool]) -> None:
    """See that a success was spelled out."""
    expect_harmless(status)
    if status.state is JobState.SUCCEEDED:
        assert any(spelt(told, status.job.id) for told in wire.objects), status


def spelt_by_spark(told: dict[str, Any], job_id: str) -> bool:
    if told.get("submissionId") == job_id:
        return told.get("success") is True and told.get("driverState") == "FINISHED"
    return told.get("id") == job_id and told.get("state") == "FINISHED"


def spelt_by_yarn(told: dict[str, Any], job_id: str) -> bool:
    return told.get("id") == job_id and (told.get("state"), told.get("finalStatus")) == ("FINISHED", "SUCCEEDED")


def spelt_by_kubernetes(told: dict[str, Any], job_id: str) -> bool:
    metadata, status = told.get("metadata"), told.get("status")
    if not isinstance(metadata, dict) or not isinstance(status, dict):
        return False
    return f"{metadata.get('namespace')}:{metadata.get('name')}" == job_id and status.get("phase") == "Succeeded"


@dataclasses.dataclass
class Cluster:
    """One kind of cluster: how to reach it, what it was recorded to say, how it spells a success."""

    kind: Any
    host: str
    extra: dict[str, str]
    known: frozenset[str]
    routes: list[Route]
    spelt: Callable[[dict[str, Any], str], bool]
    jobs: tuple[JobRef, ...]
    job: SparkJob | None
    submission: Submission


CLUSTERS = {
    "standalone": Cluster(
        kind=StandaloneHook,
        host="spark://m1:7077",
        extra={},
        known=frozenset({"m1:6066", "m1:8080"}),
        routes=STANDALONE,
        spelt=spelt_by_spark,
        jobs=(
            JobRef(DRIVER),
            JobRef(driver(3, "RUNNING")["id"]),
            JobRef("driver-20260101000000-0001"),
            JobRef(f"../{NEVER}"),
        ),
        job=SparkJob(application="local:///x.py"),
        submission=Submission(
            token=TOKEN, cluster_time=1795406000.0, evidence={"last_completed": DRIVER, "newest": "1"}
        ),
    ),
    "yarn": Cluster(
        kind=YarnHook,
        host="yarn",
        extra={"yarn_resourcemanager_webapp_address": "http://rm:8088", "history-url": "http://h/{app_id}"},
        known=frozenset({"rm:8088"}),
        routes=YARN,
        spelt=spelt_by_yarn,
        jobs=(JobRef(APP), JobRef("application_1795664117779_0006"), JobRef(f"application_1/{NEVER}")),
        job=None,
        submission=Submission(token=TOKEN, cluster_time=1795406000.0, evidence={"last_ended": APP, "started": "1"}),
    ),
    "kubernetes": Cluster(
        kind=KubernetesHook,
        host="k8s://https://api:6443",
        extra={"namespace": "spark", "log-url": "https://logs/{namespace}/{pod}?uid={uid}&app={app_id}"},
        known=frozenset({"api:6443"}),
        routes=KUBERNETES,
        spelt=spelt_by_kubernetes,
        jobs=(JobRef(f"spark:{NAME}", UID), JobRef(f"spark:{NAME}"), JobRef(f"spark:../{NEVER}")),
        job=SparkJob(application="local:///x.py", conf={"spark.kubernetes.container.image": "i"}),
        submission=Submission(token=POD_TOKEN, name="dag.task", cluster_time=1795406000.0, job=JobRef(f"spark:{NAME}")),
    ),
}


async def _poll(hook: Any, cluster: Cluster, wire: Wire) -> None:
    statuses = await hook.poll(cluster.jobs)
    assert set(statuses) == set(cluster.jobs)
    for job, status in statuses.items():
        assert status.job == job
        expect_told(wire, status, cluster.spelt)


async def _follow(hook: Any, cluster: Cluster, wire: Wire) -> None:
    async with contextlib.aclosing(hook.follow(Once(*cluster.jobs))) as stream:
        async for statuses in stream:
            for job, status in statuses.items():
                assert status.job == job
                expect_told(wire, status, cluster.spelt)


async def _find(hook: Any, cluster: Cluster, wire: Wire) -> None:
    found = await hook.find(cluster.submission)
    if isinstance(found, Found):
        expect_told(wire, found.status, cluster.spelt)
        assert any(cluster.submission.token.encode() in body for body in wire.told), "found, but never named"
        assert found.status.job not in found.younger


async def _submit(hook: Any, cluster: Cluster, wire: Wire) -> None:
    if cluster.job is not None:
        prepared = await hook.prepare(cluster.job, cluster.submission)
        job = await hook.submit(cluster.job, prepared)
        assert any(job.id.rpartition(":")[2].encode() in body for body in wire.told)
    else:
        await hook.prepare_cli({}, cluster.submission)


async def _others(hook: Any, cluster: Cluster, wire: Wire) -> None:
    job = cluster.jobs[0]
    uses: list[Callable[[], Awaitable[Any]]] = [
        lambda: hook.kill(job),
        lambda: hook.release(job),
        lambda: hook.glimpse(cluster.submission),
        lambda: hook.log_tail(job, 7),
        lambda: hook.find_owned("d", "o"),
        hook.check,
    ]
    for use in uses:
        with contextlib.suppress(DurableJobError, Stuck):
            result = await use()
            assert result is None or len(str(result)) < 5_000_000


QUESTIONS: dict[str, Any] = {"poll": _poll, "follow": _follow, "find": _find, "submit": _submit, "others": _others}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", CLUSTERS)
def test_answers(name: str, question: str, fed: Callable[..., None], wire: Wire) -> None:
    cluster = CLUSTERS[name]
    wire.known = cluster.known

    def check(drawn: tuple[Any, int]) -> None:
        data, broken = drawn
        wire.answer = Told(data.draw, cluster.routes, None if broken == 7 else broken)
        wire.told = []
        hook = hook_on(wire, cluster.kind, cluster.host, **cluster.extra)
        with contextlib.suppress(DurableJobError, Stuck, Enough):
            loop.complete(QUESTIONS[question](hook, cluster, wire))

    fed(f"{name} {question}", Parser(st.tuples(st.data(), st.integers(0, 7)), check, 0.3))
