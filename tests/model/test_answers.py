"""
The hooks themselves against answers that were tampered with, over a network that is not there.

What the parsers alone cannot show: which URL is asked next, who is sent the password, what a hook concludes from
several answers of which one is wrong. Of the answers that a question takes, each is as it was recorded, but for one, or
all.

In: ``tests/unit/hooks/recorded``. Out: ours are the only exceptions; each job that was asked about has a status; an
end, or an absence, was spelled out by an answer (:mod:`tests.model.spelt`); a job that was found was named by one, and
one that was not found is proven not to be there; and nobody asks again and again without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import strategies as st

from durable_spark.hooks._kubernetes_cli import BY_CLI
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.hooks.yarn import YarnHook
from durable_spark.jobs import (
    Absent,
    DurableJobError,
    JobRef,
    JobState,
    JobStatus,
    SparkJob,
    Submission,
)
from durable_spark.triggers.feed import FeedKey, join
from tests.model.feeding import Parser, expect_harmless, fed, loop, recordings
from tests.model.mutations import answers, lines
from tests.model.spelt import (
    no_proof_by_kubernetes,
    no_proof_by_spark,
    no_proof_by_yarn,
    spelt_by_kubernetes,
    spelt_by_spark,
    spelt_by_yarn,
)
from tests.model.test_parsers import EVENTS, LOGS, PODS, TOKEN
from tests.model.wire import DATE, NEVER, Said, Wire, hook_on, wire
from tests.unit.hooks.fake import WORKER, driver, launch_command, recorded, recorded_json

__all__ = ["fed", "wire"]  # fixtures

DRIVER = driver(2, "FINISHED")["id"]
APP = "application_1795664117779_0002"
POD = json.loads(recorded("k8s-pod-succeeded.json"))
NAME = POD["metadata"]["name"]
POD_TOKEN = POD["metadata"]["labels"]["durable-spark/token"]
UID = POD["metadata"]["uid"]
FLEET = hashlib.sha256(WORKER.encode()).hexdigest()[:32]

ASKED = "asked-for"
"""Stands in a recording for what the URL asks about."""

Route = tuple[str, list[str]]
"""A pattern of method and URL, and the answers that were recorded to it."""


def page() -> str:
    value = recorded_json("page.json")
    ended = [driver(1, "FAILED"), driver(2, "FINISHED")]
    return json.dumps(value | {"activedrivers": [driver(3, "RUNNING")], "completeddrivers": ended})


def rest(name: str) -> str:
    return json.dumps(recorded_json(name) | {"submissionId": ASKED})


def shown(command: str) -> str:
    return f"==== Bytes 0-9 of 900 of /x/stderr ====\n{command}"


def conf(name: str, value: str) -> str:
    return json.dumps({"property": {"key": name, "value": value}})


STANDALONE: list[Route] = [
    (r"GET .*/json/", [page()]),
    (r"GET .*/status/driver-0{14}-", [rest("status-unknown.json")]),
    (r"GET .*/status/", [rest("status-finished.json"), rest("status-error.json"), rest("status-unknown.json")]),
    (r"POST .*/create", recordings("create")),
    (r"POST .*/kill/", recordings("kill")),
    (
        r"GET .*/log/",
        [
            *(shown(launch_command(token)) for token in ("b2" * 16, TOKEN, "b2" * 16)),
            *(recorded("log-missing.txt"), recorded("log-error.txt")),
        ],
    ),
    (r"GET .*:8081/", [recorded("worker.html")]),
]
UNKNOWN = recorded("yarn-app-unknown.json").replace("application_1111111111111_0001", ASKED)
STARTED = "1795400000000"  # before DATE, or nobody vouches for an absence
INFO = recorded("yarn-info.json").replace("1795663815040", STARTED)
APPS = recorded("yarn-apps.json").replace("1f0c7a2e9b5d4c63", TOKEN)
YARN: list[Route] = [
    (r"GET .*/info", [INFO]),
    (r"GET .*/apps\?", [APPS, recorded("yarn-apps-none.json"), recorded("yarn-apps-none.json")]),
    (r"GET .*/apps/", [recorded("yarn-app-finished.json"), UNKNOWN, UNKNOWN, recorded("yarn-app-failed.json")]),
    (r"GET .*/appstatistics", [recorded("yarn-statistics.json")]),
    (r"GET .*/conf\?name=.*completed", [conf("yarn.resourcemanager.max-completed-applications", "1000")]),
    (r"GET .*/conf", [conf("yarn.webapp.filter-entity-list-by-user", "false")]),
    (r"GET .*containerlogs", recordings("yarn-log", ".txt")),
    (r"PUT .*/state", [json.loads(text)["body"] for text in recordings("yarn-kill")]),
    (r"POST .*", [recorded("yarn-new-application.json")]),
]
NO_EVENTS = json.dumps(recorded_json("k8s-events.json") | {"items": []})
LAST_PAGE = json.dumps(recorded_json("k8s-page.json") | {"metadata": {"resourceVersion": "257"}})
OURS = [re.sub("([a-d]1){16}", POD_TOKEN, pod).replace(json.loads(pod)["metadata"]["uid"], UID) for pod in PODS]
KUBERNETES: list[Route] = [
    (r"GET .*/pods\?watch", ["\n".join(EVENTS[:9]) + "\n"]),
    (r"GET .*/pods\?.*continue=", [LAST_PAGE, LAST_PAGE, recorded("k8s-page.json")]),
    (r"GET .*/pods\?", [recorded("k8s-page.json")]),
    (r"GET .*/log\?", ["a line\n"]),
    (r"GET .*/events", [recorded("k8s-events.json"), NO_EVENTS, NO_EVENTS]),
    (r"(GET|DELETE) .*/pods/", [*OURS, *[recorded("k8s-status-404.json").replace("nobody", ASKED)] * 3]),
    (r"PATCH .*", OURS),
    (r"(GET|DELETE) .*/(secrets|configmaps)/", recordings("k8s-status")),
    (r"POST .*selfsubject", [recorded("k8s-review.json")]),
    (r"POST .*/pods", [*OURS, *recordings("k8s-status")]),
    (r"GET .*/version", [recorded("k8s-version.json")]),
    (r"GET .*", recordings("k8s-status")),
]
AT_ONCE = 60
"""Requests that a question may take without a pause: ten times two for a pod that changes, and as many to let it go."""
NOT_FOUND = re.compile(r"NotFound|not found")
words = ["FINISHED", "Succeeded", "SUCCEEDED", "ALIVE", "ACTIVE", "http://evil:80", "worker-1", TOKEN, DRIVER, APP]


class Enough(BaseException):
    """It was followed for long enough, or it waits for better news."""


class Told:
    """
    Answers what was recorded to a question, or what is left of it.

    :param draw: of the strategy.
    :param broken: which answer is tampered with; ``None``: each. The others are the same for the same question, or not.
    """

    def __init__(self, draw: Callable[[Any], Any], routes: list[Route], broken: int | None) -> None:
        self.draw = draw
        self.routes = routes
        self.broken = broken
        self.first, self.steady = draw(st.integers(0, 7)), draw(st.booleans())
        self.asked: dict[str, int] = {}
        self.times: list[float] = []

    def __call__(self, method: str, url: str) -> tuple[int, Mapping[str, str], bytes]:
        number, now = len(self.times), loop.time()
        self.times.append(now)
        texts = next(texts for pattern, texts in self.routes if re.match(pattern, f"{method} {url}"))
        if number >= AT_ONCE:
            assert now - self.times[number - AT_ONCE] >= 1.0, f"{AT_ONCE} requests without a pause, and another: {url}"
        if number >= 2 * AT_ONCE:
            raise Enough(url)
        headers = {"Date": DATE, "Content-Type": "application/json"}
        asked = urlsplit(url).path.rpartition("/")[2]
        same = self.asked.setdefault(url, len(self.asked))
        if self.broken not in (None, number):
            text = texts[(self.first + (same if self.steady else number)) % len(texts)].replace(ASKED, asked)
            return (404 if NOT_FOUND.search(text[:400]) else 200), headers, text.encode()
        text = self.draw(st.sampled_from(texts)).replace(ASKED, asked)
        body = self.draw(answers([text], words) if _is_json(text) else lines([text], [*LOGS, *words]))
        usual = [404 if NOT_FOUND.search(text[:400]) else 200] * 8
        status = self.draw(st.sampled_from([*usual, 200, 404, 404, 201, 202, 307, 400, 401, 403, 409, 429, 500, 503]))
        if self.draw(st.integers(0, 15)) == 0:
            headers["Date"] = self.draw(st.sampled_from(["", "x", "Mon, 23 Nov 99999999999 03:55:00 GMT"]))
        return status, headers, body


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


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


def expect_told(wire: Wire, status: JobStatus, cluster: Cluster) -> None:
    """See that an end, or an absence, was spelled out."""
    expect_harmless(status)
    if status.state.final or status.state is JobState.ABSENT:
        assert status.state in cluster.spelt(wire.told, status.job), status


@dataclasses.dataclass
class Cluster:
    """One kind of cluster: how to reach it, what it was recorded to say, how it spells out ends and absences."""

    kind: Any
    host: str
    extra: dict[str, str]
    known: frozenset[str]
    routes: list[Route]
    spelt: Callable[[Sequence[Said], JobRef], Iterator[JobState]]
    no_proof: Callable[[Sequence[Said], Submission], str]
    jobs: tuple[JobRef, ...]
    job: SparkJob | None
    submissions: tuple[Submission, ...]


CLUSTERS = {
    "standalone": Cluster(
        kind=StandaloneHook,
        host="spark://m1:7077",
        extra={},
        known=frozenset({"m1:6066", "m1:8080"}),
        routes=STANDALONE,
        spelt=spelt_by_spark,
        no_proof=no_proof_by_spark,
        jobs=(
            JobRef(DRIVER),
            JobRef(driver(3, "RUNNING")["id"]),
            JobRef("driver-20260101000000-0001"),
            JobRef(f"../{NEVER}"),
        ),
        job=SparkJob(application="local:///x.py"),
        submissions=(
            Submission(token=TOKEN, cluster_time=1795406000.0, evidence={"last_completed": DRIVER, "newest": "1"}),
            Submission(token=TOKEN, cluster_time=1795406000.0, evidence={"last_completed": "", "workers": FLEET}),
        ),
    ),
    "yarn": Cluster(
        kind=YarnHook,
        host="yarn",
        extra={"yarn_resourcemanager_webapp_address": "http://rm:8088", "history-url": "http://h/{app_id}"},
        known=frozenset({"rm:8088"}),
        routes=YARN,
        spelt=spelt_by_yarn,
        no_proof=no_proof_by_yarn,
        jobs=(JobRef(APP), JobRef("application_1795664117779_0006"), JobRef(f"application_1/{NEVER}")),
        job=None,
        submissions=(
            Submission(token=TOKEN, cluster_time=1795406000.0, evidence={"last_ended": APP, "started": "1"}),
            Submission(
                token=TOKEN,
                cluster_time=1795406000.0,
                evidence={"last_ended": "", "manager": "http://rm:8088", "started": STARTED},
            ),
        ),
    ),
    "kubernetes": Cluster(
        kind=KubernetesHook,
        host="k8s://https://api:6443",
        extra={"namespace": "spark", "log-url": "https://logs/{namespace}/{pod}?uid={uid}&app={app_id}"},
        known=frozenset({"api:6443"}),
        routes=KUBERNETES,
        spelt=spelt_by_kubernetes,
        no_proof=no_proof_by_kubernetes,
        jobs=(JobRef(f"spark:{NAME}", UID), JobRef(f"spark:{NAME}"), JobRef(f"spark:../{NEVER}")),
        job=SparkJob(application="local:///x.py", conf={"spark.kubernetes.container.image": "i"}),
        submissions=tuple(
            Submission(
                token=POD_TOKEN,
                name="dag.task",
                cluster_time=1795406000.0,
                job=JobRef(f"spark:{NAME}"),
                evidence=evidence,
            )
            for evidence in ({}, BY_CLI)
        ),
    ),
}


async def _poll(hook: Any, cluster: Cluster, submission: Submission, wire: Wire) -> None:
    statuses = await hook.poll(cluster.jobs)
    assert set(statuses) == set(cluster.jobs)
    for job, status in statuses.items():
        assert status.job == job
        expect_told(wire, status, cluster)


async def _follow(hook: Any, cluster: Cluster, submission: Submission, wire: Wire) -> None:
    async with contextlib.aclosing(hook.follow(Once(*cluster.jobs))) as stream:
        async for statuses in stream:
            for job, status in statuses.items():
                assert status.job == job
                expect_told(wire, status, cluster)


async def _feed(hook: Any, cluster: Cluster, submission: Submission, wire: Wire) -> None:
    """Through the feed, which takes any exception for an outage: one that it did not expect, it logs."""
    async with contextlib.AsyncExitStack() as stack:
        key = FeedKey("hook", "cluster", ())
        seats = [await stack.enter_async_context(join(key, job, make_hook=lambda: hook)) for job in cluster.jobs]
        await asyncio.sleep(12.0)
        for seat in seats:
            if seat.status is not None:
                assert seat.status.job == seat.job
                expect_told(wire, seat.status, cluster)


async def _find(hook: Any, cluster: Cluster, submission: Submission, wire: Wire) -> None:
    found = await hook.find(submission)
    if isinstance(found, Absent):
        assert not (why := cluster.no_proof(wire.told, submission)), f"absent, but {why}"
    else:
        expect_told(wire, found.status, cluster)
        assert any(submission.token.encode() in said.answer.body for said in wire.told), "found, but never named"
        assert found.status.job not in found.younger


async def _submit(hook: Any, cluster: Cluster, submission: Submission, wire: Wire) -> None:
    if cluster.job is not None:
        prepared = await hook.prepare(cluster.job, submission)
        job = await hook.submit(cluster.job, prepared)
        assert any(job.id.rpartition(":")[2].encode() in said.answer.body for said in wire.told)
    else:
        await hook.prepare_cli({}, submission)


async def _others(hook: Any, cluster: Cluster, submission: Submission, wire: Wire) -> None:
    job = cluster.jobs[0]
    uses: list[Callable[[], Awaitable[Any]]] = [
        lambda: hook.kill(job),
        lambda: hook.release(job),
        lambda: hook.glimpse(submission),
        lambda: hook.log_tail(job, 7),
        lambda: hook.find_owned("d", "o"),
        hook.check,
    ]
    for use in uses:
        with contextlib.suppress(DurableJobError):
            result = await use()
            assert result is None or len(str(result)) < 5_000_000
        await asyncio.sleep(1.0)  # each by itself: see AT_ONCE


QUESTIONS: dict[str, Any] = {
    "poll": _poll,
    "follow": _follow,
    "feed": _feed,
    "find": _find,
    "submit": _submit,
    "others": _others,
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", CLUSTERS)
def test_answers(name: str, question: str, fed: Callable[..., None], wire: Wire) -> None:
    cluster = CLUSTERS[name]
    wire.known = cluster.known

    def check(drawn: tuple[Any, int, Submission]) -> None:
        data, broken, submission = drawn
        wire.answer = Told(data.draw, cluster.routes, None if broken == 7 else broken)
        wire.told, wire.broken = [], []
        hook = hook_on(wire, cluster.kind, cluster.host, **cluster.extra)
        with contextlib.suppress(DurableJobError, Enough):
            loop.complete(QUESTIONS[question](hook, cluster, submission, wire))
        for error in wire.broken:
            raise error

    inputs = st.tuples(st.data(), st.integers(0, 7), st.sampled_from(cluster.submissions))
    fed(f"{name} {question}", Parser(inputs, check, 0.1 if question == "feed" else 0.3))
