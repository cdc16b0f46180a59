"""The Kubernetes hook against an API server that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from durable_spark.hooks import _http, _kubernetes_watch, kubernetes
from durable_spark.hooks._kubernetes_status import FINALIZER
from durable_spark.jobs import (
    Absent,
    AuthenticationFailed,
    BadArguments,
    BadConfiguration,
    ClusterUnreachable,
    DurableJobError,
    Found,
    InvalidAnswer,
    JobRef,
    JobState,
    JobStatus,
    Link,
    RequestRefused,
    SparkJob,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
    new_token,
)
from durable_spark.operators.spark import SparkJobOperator
from tests.unit.hooks.fake import NOW, Handler, fixed, hang, hang_up, recorded_json
from tests.unit.hooks.fake_kubernetes import (
    CREDENTIAL,
    PROXY_404,
    FakeApi,
    answered,
    event,
    jobs,
    pod,
    ref,
    refused,
    status,
    until,
)
from tests.unit.test_operator import job_of
from tests.unit.tries import TaskInstance, waits

if TYPE_CHECKING:
    from aiohttp import web

    from durable_spark.hooks.kubernetes import KubernetesHook

    Connect = Callable[[dict[str, Any]], KubernetesHook]

IMAGE = {"spark.kubernetes.container.image": "spark:4"}
JOB = SparkJob(application="local:///job.py", conf=IMAGE)
PASSWORD = "the-store's-password"
SECRETIVE = SparkJob(application="local:///job.py", conf=IMAGE | {"spark.hadoop.store.password": PASSWORD})
TOKEN = "ab" * 16
NOBODY = JobRef(f"spark:dag-task-{TOKEN}", "00000000-0000-4000-8000-000000000000")


@pytest.fixture
def hook(kubernetes_hook: KubernetesHook) -> KubernetesHook:
    return kubernetes_hook


def new() -> Submission:
    return Submission(token=new_token(), owner="0" * 32, deployment="prod", name="dag.task")


def name_of(submission: Submission) -> str:
    assert submission.job is not None
    return submission.job.id.partition(":")[2]


def uids(api: FakeApi) -> list[str]:
    return [value["metadata"]["uid"] for value in api.pods.values()]


# --- the connection


async def test_cluster(api: FakeApi, hook: KubernetesHook) -> None:
    assert await hook.cluster() == [f"k8s://{api.url}"]
    assert await hook.poll_interval() == 5.0
    assert api.requests == []


async def test_cluster_of_a_kubeconfig(api: FakeApi, connect_kubernetes: Connect) -> None:
    text = json.dumps(
        {
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "http://api:6443"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": CREDENTIAL}}],
        }
    )
    hook = connect_kubernetes({"conn_type": "durable_spark", "host": "k8s://", "extra": {"kubeconfig": text}})
    assert await hook.cluster() == ["k8s://http://api:6443"]


async def test_the_connections_extras(api: FakeApi, connect_kubernetes: Connect) -> None:
    value = api.put(pod(TOKEN))
    hook = connect_kubernetes(api.connection(**{"poll-interval": "9", "log-url": "https://logs/{namespace}/{pod}"}))
    assert await hook.poll_interval() == 9.0
    links = (await hook.poll([ref(value)]))[ref(value)].links
    assert links == {Link.LOG: f"https://logs/spark/dag-task-{TOKEN}"}


async def test_every_request_is_authenticated_and_wants_json(api: FakeApi, hook: KubernetesHook) -> None:
    await hook.submit(SECRETIVE, await hook.prepare(SECRETIVE, new()))
    assert {headers["Authorization"] for headers in api.headers} == {f"Bearer {CREDENTIAL}"}
    assert {headers["Accept"] for headers in api.headers} == {"application/json"}


# --- credentials that expire


@pytest.fixture
def token_file(tmp_path: Any) -> Any:
    path = tmp_path / "token"
    path.write_text(CREDENTIAL)
    return path


@pytest.fixture
def file_hook(api: FakeApi, connect_kubernetes: Connect, token_file: Any) -> KubernetesHook:
    return connect_kubernetes({**api.connection(**{"token-file": str(token_file)}), "password": ""})


async def test_a_renewed_token_is_taken_up(api: FakeApi, file_hook: KubernetesHook, token_file: Any) -> None:
    job = ref(api.put(pod(TOKEN)))
    await file_hook.poll([job])
    api.token = "renewed"
    token_file.write_text("renewed")
    assert (await file_hook.poll([job]))[job].state is JobState.RUNNING
    assert len(api.requests) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda hook, submission: hook.prepare(JOB, submission),
        lambda hook, submission: hook.submit(JOB, submission),
        lambda hook, submission: hook.find(submission),
        lambda hook, submission: hook.poll([submission.job]),
        lambda hook, submission: hook.kill(submission.job),
        lambda hook, submission: hook.release(submission.job),
        lambda hook, submission: hook.find_owned("prod"),
        lambda hook, submission: hook.check(),
    ],
    ids=["prepare", "submit", "find", "poll", "kill", "release", "find_owned", "check"],
)
async def test_a_token_that_is_not_accepted(
    api: FakeApi, hook: KubernetesHook, call: Callable[[KubernetesHook, Submission], Awaitable[object]]
) -> None:
    submission = await hook.prepare(JOB, new())
    api.token = "another"
    with pytest.raises(AuthenticationFailed, match=r"401: Unauthorized: it does not accept") as caught:
        await call(hook, submission)
    assert CREDENTIAL not in str(caught.value)
    assert api.pods == {}


# --- prepare and submit


async def test_prepare(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    assert submission.job == JobRef(f"spark:dag-task-{submission.token}")
    assert submission.cluster_time == NOW
    assert api.requests == ["get pods"]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (fixed(404, PROXY_404), InvalidAnswer, "404 Not Found"),
        (fixed(404, "404 page not found\n"), InvalidAnswer, "404 page not found"),
        (refused(404, details={}, message="the server could not find the requested resource"), InvalidAnswer, "404"),
        (fixed(503, Retry_After="30"), ClusterUnreachable, "503"),
        (refused(403), RequestRefused, "403"),
        (fixed(403, "<html><title>Blocked by the proxy</title>"), InvalidAnswer, "Blocked by the proxy"),
        (fixed(302, Location="https://login/"), InvalidAnswer, "302"),
        (hang_up, ClusterUnreachable, "closed the connection"),
    ],
)
async def test_prepare_does_not_reach_it(
    api: FakeApi, hook: KubernetesHook, how: Handler, kind: type[DurableJobError], message: str
) -> None:
    api.instead["get pods"] = how
    with pytest.raises(kind, match=message):
        await hook.prepare(JOB, new())


async def test_bad_arguments_ask_nothing(api: FakeApi, hook: KubernetesHook) -> None:
    for job in (SparkJob(application="local:///job.py"), dataclasses.replace(JOB, properties_file="/no/such")):
        with pytest.raises(BadArguments):
            await hook.prepare(job, new())
    assert api.requests == []


async def test_submit(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    job = await hook.submit(JOB, submission)
    assert (job.id, [job.uid]) == (submission.job and submission.job.id, uids(api))
    assert api.requests == ["get pods", "create pods"]
    (body,) = api.sent("create pods")
    assert body["metadata"]["labels"]["durable-spark/token"] == submission.token


async def test_a_hook_that_did_not_prepare_submits_the_same(
    api: FakeApi, hook: KubernetesHook, connect_kubernetes: Connect
) -> None:
    submission = await hook.prepare(SECRETIVE, new())
    await connect_kubernetes(api.connection()).submit(SECRETIVE, submission)
    first = api.sent("create secrets") + api.sent("create pods")
    api.pods.clear()
    api.secrets.clear()
    await hook.submit(SECRETIVE, submission)
    assert (api.sent("create secrets") + api.sent("create pods"))[2:] != []
    assert api.sent("create secrets")[1:] + api.sent("create pods")[1:] == first


async def test_submitted_twice_is_one_pod(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    first, second = await asyncio.gather(*(hook.submit(JOB, submission) for _ in range(2)))
    assert [first.uid, second.uid] == uids(api) * 2


LOST = {
    "hang": hang,
    "hang up": hang_up,
    "5xx": fixed(502, "bad gateway"),
    "garbage": fixed(201, "<html>"),
    "nothing": fixed(200, "{}"),
    "truncated": fixed(201, json.dumps(pod(TOKEN))[:-100]),
    "another pod": answered(pod(TOKEN, name="another"), 201),
    "a pod elsewhere": answered(pod(TOKEN, namespace="elsewhere"), 201),
    "a redirect": fixed(307, Location="https://login/"),
    "too many requests": fixed(429, "Too many requests, please try again later.", Retry_After="1"),
    "a proxy's 404": fixed(404, PROXY_404),
    "a proxy's 403": fixed(403, "<html>"),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.3)


@pytest.mark.parametrize("how", LOST.values(), ids=LOST)
@pytest.mark.parametrize("job", [JOB, SECRETIVE], ids=["plain", "with a Secret"])
async def test_a_lost_answer_is_looked_for(
    api: FakeApi, hook: KubernetesHook, how: Handler, job: SparkJob, impatient: None
) -> None:
    """The pod was created and nobody said so: it is taken up, and it is one."""
    submission = await hook.prepare(job, new())

    async def create_and_answer(request: web.Request) -> web.StreamResponse:
        await api.answer(request)
        return await how(request)

    api.once["create pods"] = [create_and_answer]
    assert [(await hook.submit(job, submission)).uid] == uids(api)


@pytest.mark.parametrize("how", LOST.values(), ids=LOST)
async def test_an_answer_that_is_lost_for_good_is_uncertain(
    api: FakeApi, hook: KubernetesHook, how: Handler, impatient: None
) -> None:
    submission = await hook.prepare(JOB, new())
    api.instead["create pods"] = how
    with pytest.raises(SubmissionUncertain, match="The next try looks for it") as caught:
        await hook.submit(JOB, submission)
    assert not caught.value.permanent
    assert api.asked("create pods") == 3


async def test_a_lost_request_is_sent_again(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    api.once["create pods"] = [hang_up, fixed(503)]
    assert [(await hook.submit(JOB, submission)).uid] == uids(api)


async def test_nothing_was_sent_where_nobody_listens(
    api: FakeApi, connect_kubernetes: Connect, unused_tcp_port: int
) -> None:
    hook = connect_kubernetes(api.connection() | {"host": f"k8s://http://127.0.0.1:{unused_tcp_port}"})
    with pytest.raises(ClusterUnreachable, match="no connection"):
        await hook.submit(JOB, new())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (refused(403, message="pods is forbidden"), r"\(403\): pods is forbidden\. The Test button"),
        (refused(403, message="exceeded quota: compute"), r"\(403\): exceeded quota: compute$"),
        (refused(422, message="Pod is invalid"), r"\(422\): Pod is invalid"),
        (refused(400, message="admission webhook\n denied it"), "admission webhook denied it"),
        (refused(404, message="namespaces not found"), r"\(404\): namespaces not found"),
        (refused(413, message="too large"), "too large"),
    ],
)
@pytest.mark.parametrize("job", [JOB, SECRETIVE], ids=["plain", "with a Secret"])
async def test_refused(api: FakeApi, hook: KubernetesHook, how: Handler, message: str, job: SparkJob) -> None:
    """Nothing is left, and it is not asked again."""
    submission = await hook.prepare(job, new())
    api.instead["create pods"] = how
    with pytest.raises(SubmissionRefused, match=message):
        await hook.submit(job, submission)
    assert (api.pods, api.secrets, api.asked("create pods")) == ({}, {}, 1)


async def test_a_refusal_after_a_lost_answer_is_uncertain(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    api.once["create pods"] = [hang_up, refused(403)]
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.submit(JOB, submission)
    assert not caught.value.permanent


async def test_a_refusal_where_the_pod_is_there_is_none(api: FakeApi, hook: KubernetesHook) -> None:
    """An earlier request has made it, and so used up the quota."""
    submission = await hook.prepare(JOB, new())
    job = ref(api.put(pod(submission.token, name=name_of(submission))))
    api.instead["create pods"] = refused(403, message="exceeded quota: compute")
    assert await hook.submit(JOB, submission) == job


@pytest.mark.parametrize("call", ["submit", "find"])
async def test_a_strangers_pod_of_that_name(api: FakeApi, hook: KubernetesHook, call: str) -> None:
    submission = await hook.prepare(JOB, new())
    api.put(pod("ef" * 16, name=name_of(submission)))
    with pytest.raises(SubmissionRefused, match="none of this submission's"):
        await (hook.submit(JOB, submission) if call == "submit" else hook.find(submission))


async def test_a_pod_that_vanishes_between_two_answers(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    api.instead["create pods"] = refused(409, message="already exists")
    with pytest.raises(SubmissionUncertain, match="somebody has deleted it") as caught:
        await hook.submit(JOB, submission)
    assert caught.value.permanent


@pytest.mark.parametrize("how", [fixed(404, PROXY_404), fixed(200, "<html>"), hang_up])
async def test_a_proxys_404_does_not_make_a_pod_vanish(api: FakeApi, hook: KubernetesHook, how: Handler) -> None:
    submission = await hook.prepare(JOB, new())
    api.put(pod(submission.token, name=name_of(submission)))
    api.instead["get pods"] = how
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.submit(JOB, submission)
    assert not caught.value.permanent


# --- the Secret


async def test_a_secret_belongs_to_its_pod(api: FakeApi, hook: KubernetesHook) -> None:
    job = await hook.submit(SECRETIVE, await hook.prepare(SECRETIVE, new()))
    ((name, secret),) = api.secrets.items()
    (owner,) = secret["metadata"]["ownerReferences"]
    assert (name, owner["name"], owner["uid"]) == (job.id.partition(":")[2], name, job.uid)
    assert PASSWORD in json.dumps(secret)
    assert PASSWORD not in json.dumps(api.sent("create pods"))


async def test_a_secret_of_a_try_that_died_is_taken_up(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(SECRETIVE, new())
    api.instead["create pods"] = hang_up
    with pytest.raises(SubmissionUncertain):
        await hook.submit(SECRETIVE, submission)
    api.instead.clear()
    changed = dataclasses.replace(SECRETIVE, conf={**SECRETIVE.conf, "spark.hadoop.store.password": "new-password"})
    await hook.prepare(changed, submission)
    await hook.submit(changed, submission)
    assert "new-password" in json.dumps(api.secrets[name_of(submission)])


async def test_a_strangers_secret_is_left_alone(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(SECRETIVE, new())
    stranger = {"metadata": {"name": name_of(submission), "labels": {}}}
    api.secrets[name_of(submission)] = stranger
    with pytest.raises(SubmissionRefused, match=r"there is a Secret .* none of this submission's"):
        await hook.submit(SECRETIVE, submission)
    assert (api.secrets[name_of(submission)], api.pods) == (stranger, {})


async def test_no_right_to_make_a_secret(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(SECRETIVE, new())
    api.forbidden.add("create secrets")
    with pytest.raises(SubmissionRefused, match="403"):
        await hook.submit(SECRETIVE, submission)
    assert api.pods == {}


async def test_no_right_to_give_a_secret_away_does_not_lose_the_job(
    api: FakeApi, hook: KubernetesHook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "_log", logging.getLogger("hook"))
    submission = await hook.prepare(SECRETIVE, new())
    api.forbidden.add("patch secrets")
    assert [(await hook.submit(SECRETIVE, submission)).uid] == uids(api)
    assert isinstance(await hook.find(submission), Found)
    assert "stays when its pod is deleted" in caplog.text


async def test_no_error_shows_a_secret(api: FakeApi, hook: KubernetesHook, caplog: pytest.LogCaptureFixture) -> None:
    submission = await hook.prepare(SECRETIVE, new())
    api.instead["create pods"] = fixed(500, "oh")
    with caplog.at_level(logging.DEBUG), pytest.raises(SubmissionUncertain) as caught:
        await hook.submit(SECRETIVE, submission)
    assert not [secret for secret in (PASSWORD, CREDENTIAL) if secret in f"{caught.value!r}{caplog.text}"]


# --- find


@pytest.mark.parametrize("phase", ["Pending", "Running", "Succeeded", "Failed"])
async def test_found(api: FakeApi, hook: KubernetesHook, phase: str) -> None:
    submission = await hook.prepare(JOB, new())
    job = ref(api.put(pod(submission.token, phase, name=name_of(submission))))
    found = await hook.find(submission)
    assert isinstance(found, Found)
    assert (found.status.job, found.status.state, found.younger) == (job, JobState(phase.lower()), ())


async def test_absent(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    api.happened("another-pod", "Scheduled", "yes")
    assert await hook.find(submission) == Absent()
    assert await hook.find(new()) == Absent(), "it was not even prepared"


@pytest.mark.parametrize("how", [*LOST.values(), refused(404, details={}), refused(403)], ids=[*LOST, "no path", "403"])
async def test_nothing_else_proves_an_absence(
    api: FakeApi, hook: KubernetesHook, how: Handler, impatient: None
) -> None:
    submission = await hook.prepare(JOB, new())
    api.instead["get pods"] = how
    with pytest.raises((ClusterUnreachable, RequestRefused)):
        await hook.find(submission)


async def test_events_tell_of_a_pod_that_was_deleted(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(JOB, new())
    api.happened(name_of(submission), "Started", "Started container", at="2026-11-23T03:21:00Z")
    api.happened(name_of(submission), "Scheduled", "Assigned to node-1", at="2026-11-23T03:20:00Z")
    with pytest.raises(SubmissionUncertain, match=r"but it was: Started: Started container\. Somebody") as caught:
        await hook.find(submission)
    assert caught.value.permanent


@pytest.mark.parametrize(("age", "proven"), [(2900, True), (3100, False)])
async def test_expired_events_prove_nothing(api: FakeApi, hook: KubernetesHook, age: float, proven: bool) -> None:
    submission = await hook.prepare(JOB, new())
    api.now += age
    if proven:
        assert await hook.find(submission) == Absent()
        return
    with pytest.raises(SubmissionUncertain, match="have expired") as caught:
        await hook.find(submission)
    assert caught.value.permanent


async def test_events_that_may_not_be_read(
    api: FakeApi, hook: KubernetesHook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "_log", logging.getLogger("hook"))
    submission = await hook.prepare(JOB, new())
    api.forbidden.add("list events")
    assert await hook.find(submission) == Absent()
    assert "deleted or never was is not looked up" in caplog.text


NO_LISTS = [
    fixed(200, text) for text in ("<html>", "{}", '{"kind":"EventList","items":[1]}', '{"kind":"Pod","items":[]}')
]


@pytest.mark.parametrize("how", [fixed(500), fixed(404, PROXY_404), hang_up, *NO_LISTS])
async def test_events_that_cannot_be_read_prove_nothing(api: FakeApi, hook: KubernetesHook, how: Handler) -> None:
    submission = await hook.prepare(JOB, new())
    api.instead["list events"] = how
    with pytest.raises(ClusterUnreachable):
        await hook.find(submission)


async def test_find_owned(api: FakeApi, hook: KubernetesHook, monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(deployment: str | None, owner: str, token: str | None) -> dict[str, str]:
        given = {"durable-spark/deployment": deployment, "durable-spark/owner": owner, "durable-spark/token": token}
        return {key: value for key, value in given.items() if value is not None}

    mine = api.put(pod("a1" * 16, labels=labels("prod", "o1", "a1" * 16)))
    other = api.put(pod("a2" * 16, "Pending", labels=labels("prod", "o2", "a2" * 16)))
    api.put(pod("a3" * 16, labels=labels("test", "o1", "a3" * 16)))
    api.put(pod("a4" * 16, "Failed", labels=labels("prod", "o1", "a4" * 16)))
    api.put(pod("a5" * 16, labels=labels("prod", "o1", None)))
    unnamed = api.put(pod("a6" * 16, labels=labels(None, "o1", "a6" * 16)))
    assert [found.status.job for found in await hook.find_owned("prod")] == jobs([mine, other])
    (found,) = await hook.find_owned("prod", "o1")
    assert (found.status.job, found.token, found.owner) == (ref(mine), "a1" * 16, "o1")
    assert [found.status.job for found in await hook.find_owned("", "o1")] == [ref(unnamed)]


@pytest.mark.parametrize("owner", ["", "a,b", "a=b", "o1)", "x" * 64, "o1\n", "-o"])
async def test_an_owner_that_is_no_label_has_no_jobs(api: FakeApi, hook: KubernetesHook, owner: str) -> None:
    api.put(pod(TOKEN))
    assert await hook.find_owned("prod", owner) == ()
    assert api.requests == []


# --- poll


@pytest.mark.parametrize("phase", ["Pending", "Running", "Succeeded", "Failed"])
async def test_states(api: FakeApi, hook: KubernetesHook, phase: str) -> None:
    job = ref(api.put(pod(TOKEN, phase)))
    polled = (await hook.poll([job]))[job]
    assert (polled.job, polled.state, polled.raw) == (job, JobState(phase.lower()), phase)


async def test_absent_by_the_api_servers_word(hook: KubernetesHook) -> None:
    assert (await hook.poll([NOBODY]))[NOBODY].state is JobState.ABSENT


NO_WORD = {
    **LOST,
    "no path": refused(404, details={}),
    "another's absence": refused(404, details={"kind": "pods", "name": "another"}),
    "another reason": refused(404, details={"name": f"dag-task-{TOKEN}"}, reason="Gone"),
    "a bare 404": fixed(404),
    "another kind": fixed(200, json.dumps(recorded_json("k8s-status-404.json"))),
    "gone": refused(410),
    "forbidden": refused(403),
    "gigantic": fixed(200, " " * (9 << 20)),
    "deep": fixed(200, '{"metadata": ' + "[" * 100_000),
    "a hostile name": answered(pod(TOKEN, name="../../x")),
}


@pytest.mark.parametrize("how", NO_WORD.values(), ids=NO_WORD)
async def test_nothing_else_is_a_status(api: FakeApi, hook: KubernetesHook, how: Handler, impatient: None) -> None:
    """Upstream's operator took a proxy's 404 for a pod that is gone."""
    job = ref(api.put(pod(TOKEN)))
    api.instead["get pods"] = how
    with pytest.raises((ClusterUnreachable, RequestRefused)):
        await hook.poll([job])


async def test_when_to_come_again(api: FakeApi, hook: KubernetesHook) -> None:
    api.instead["get pods"] = fixed(429, "Too many requests, please try again later.", Retry_After="17")
    with pytest.raises(ClusterUnreachable) as caught:
        await hook.poll([NOBODY])
    assert caught.value.retry_after == 17.0


async def test_another_pod_of_that_name(api: FakeApi, hook: KubernetesHook) -> None:
    """By its uid it is not ours; a job whose uid was never stored is taken by its name."""
    new_one = ref(api.put(pod(TOKEN)))
    old, unknown = JobRef(new_one.id, "00000000-0000-4000-8000-000000000000"), JobRef(new_one.id)
    statuses = await hook.poll([old, unknown, new_one])
    assert [statuses[job].state for job in (old, unknown, new_one)] == [
        JobState.ABSENT,
        JobState.RUNNING,
        JobState.RUNNING,
    ]
    assert [statuses[job].job for job in (old, unknown, new_one)] == [old, unknown, new_one]


async def test_a_few_are_asked_for_by_name(api: FakeApi, hook: KubernetesHook) -> None:
    await hook.poll(jobs(api.put(pod(f"{number:032x}")) for number in range(kubernetes.ONE_BY_ONE)))
    assert api.requests == ["get pods"] * kubernetes.ONE_BY_ONE


async def test_many_are_listed_and_those_that_are_missing_asked_for(api: FakeApi, hook: KubernetesHook) -> None:
    """A list is not believed in what it lacks: a pod may not carry the label, or belong to another namespace."""
    listed = jobs(api.put(pod(f"{number:032x}")) for number in range(20))
    adopted = ref(api.put(pod("cd" * 16, name="adopted", labels={})))
    elsewhere = ref(api.put(pod("cd" * 16, "Failed", namespace="elsewhere")))
    statuses = await hook.poll([*listed, adopted, elsewhere, NOBODY])
    assert {statuses[job].state for job in (*listed, adopted)} == {JobState.RUNNING}
    assert (statuses[elsewhere].state, statuses[NOBODY].state) == (JobState.FAILED, JobState.ABSENT)
    assert (api.asked("list pods"), api.asked("get pods")) == (1, 3)


async def test_a_list_of_another_namespace_is_not_believed(api: FakeApi, hook: KubernetesHook) -> None:
    running = jobs(api.put(pod(f"{number:032x}")) for number in range(20))
    page = recorded_json("k8s-page.json") | {"metadata": {"resourceVersion": "1"}}
    api.instead["list pods"] = answered(page | {"items": [pod(f"{0:032x}", "Succeeded", namespace="other")]})
    with pytest.raises(InvalidAnswer, match="no pod of spark"):
        await hook.poll(running)


HOSTILE = [
    *("", ":", "spark:", ":p", "p", "a:b:c", "spark:../x", "spark:p/../q", "spark:p\n", "spark:P", "a/b:p"),
    *("driver-20261123035342-0000", "application_1_2", "spark:p?x=y", "spark:p%2f"),
    *("s" * 64 + ":p", "n:" + "p" * 254),
]


@pytest.mark.parametrize("text", HOSTILE)
async def test_ids_that_are_none_are_never_sent(api: FakeApi, hook: KubernetesHook, text: str) -> None:
    job = JobRef(text, "u")
    assert (await hook.poll([job]))[job].state is JobState.ABSENT
    await hook.kill(job)
    await hook.release(job)
    assert await hook.log_tail(job, 10) == ()
    with pytest.raises(InvalidAnswer, match="which is no pod"):
        await hook.find(dataclasses.replace(new(), job=job))
    assert api.requests == []


async def test_5000_pods(api: FakeApi, hook: KubernetesHook) -> None:
    """Parsed in pieces, so that the event loop turns all the while."""
    values = [api.put(pod(f"{number:032x}")) for number in range(50)]
    page = recorded_json("k8s-page.json") | {"metadata": {"resourceVersion": "1"}}
    many = [{**values[0], "metadata": values[0]["metadata"] | {"name": f"p{number}"}} for number in range(5000)]
    body = json.dumps(page | {"items": many + values})
    api.instead["list pods"] = fixed(200, body)
    polling = asyncio.ensure_future(hook.poll(jobs(values)))
    turns = 0
    while not polling.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert {each.state for each in (await polling).values()} == {JobState.RUNNING}
    assert turns > 5


# --- follow


class Followed:
    """The jobs of a feed whose interval passes when a test says so, and what it was told."""

    def __init__(self, *followed: JobRef) -> None:
        self.followed = list(followed)
        self.rounds = 0
        self.told: dict[JobRef, list[JobStatus]] = {}
        self._next = asyncio.Event()

    def jobs(self) -> list[JobRef]:
        self.rounds += 1
        return self.followed

    async def pause(self) -> None:
        await self._next.wait()
        self._next.clear()

    async def round(self) -> None:
        """Let the interval pass; return when what that told is known."""
        rounds = self.rounds
        self._next.set()
        await until(lambda: self.rounds > rounds)

    def take(self, news: Mapping[JobRef, JobStatus]) -> None:
        assert news
        for job, told in news.items():
            assert told.job == job
            self.told.setdefault(job, []).append(told)

    def states(self, job: JobRef) -> list[JobState]:
        return [told.state for told in self.told.get(job, ())]

    async def until(self, job: JobRef, state: JobState) -> JobStatus:
        await until(lambda: state in self.states(job), f"{job} to be {state}")
        return self.told[job][-1]


@contextlib.asynccontextmanager
async def following(hook: KubernetesHook, *followed: JobRef) -> AsyncIterator[Followed]:
    feed = Followed(*followed)

    async def follow() -> None:
        async for news in hook.follow(feed):
            feed.take(news)

    task = asyncio.ensure_future(follow())
    try:
        yield feed
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def failure(hook: KubernetesHook, *followed: JobRef) -> DurableJobError:
    """Return what ends the following."""
    with pytest.raises(DurableJobError) as caught:
        async for _ in hook.follow(Followed(*followed)):
            pass
    return caught.value


async def test_follow(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN, "Pending"))
    async with following(hook, ref(value)) as feed:
        await feed.until(ref(value), JobState.PENDING)
        for phase in ("Running", "Succeeded"):
            api.becomes(value, phase)
            await feed.until(ref(value), JobState(phase.lower()))
    assert feed.states(ref(value)) == [JobState.PENDING, JobState.RUNNING, JobState.SUCCEEDED]
    assert api.requests == ["list pods", "watch pods"]


async def test_an_interval_costs_nothing_where_there_is_a_watch(api: FakeApi, hook: KubernetesHook) -> None:
    followed = jobs(api.put(pod(f"{number:032x}")) for number in range(50))
    async with following(hook, *followed) as feed:
        await feed.until(followed[-1], JobState.RUNNING)
        for _ in range(3):
            await feed.round()
    assert api.requests == ["list pods", "watch pods"]
    assert {len(told) for told in feed.told.values()} == {1}


async def test_who_joins_late_is_told_at_once(api: FakeApi, hook: KubernetesHook) -> None:
    first, second = api.put(pod("a1" * 16)), api.put(pod("a2" * 16, "Failed"))
    async with following(hook, ref(first)) as feed:
        await feed.until(ref(first), JobState.RUNNING)
        feed.followed.append(ref(second))
        await feed.round()
        await feed.until(ref(second), JobState.FAILED)
    assert api.requests == ["list pods", "watch pods"]


async def test_a_pod_without_our_label_is_polled(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN, name="adopted", labels={}))
    async with following(hook, ref(value)) as feed:
        await feed.until(ref(value), JobState.RUNNING)
        api.becomes(value, "Succeeded")
        await feed.round()
        await feed.until(ref(value), JobState.SUCCEEDED)


async def test_a_label_that_is_taken_away_changes_nothing(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN))
    async with following(hook, ref(value)) as feed:
        await feed.until(ref(value), JobState.RUNNING)
        await until(lambda: api.streams)
        api.say(event("DELETED", value))
        await until(lambda: api.asked("get pods") == 1)
        api.pods["spark", value["metadata"]["name"]] = pod(TOKEN, "Succeeded", uid=ref(value).uid)
        await feed.round()
        await feed.until(ref(value), JobState.SUCCEEDED)
    assert JobState.KILLED not in feed.states(ref(value))


async def test_a_deletion_that_no_watch_saw_is_no_verdict(
    api: FakeApi, hook: KubernetesHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_kubernetes_watch, "SHORTEST_STREAM", 0.0)
    value = api.put(pod(TOKEN))
    async with following(hook, ref(value)) as feed:
        await feed.until(ref(value), JobState.RUNNING)
        await until(lambda: api.streams)
        api.remove(value, told=False)
        api.oldest = api.version  # it was restarted, and has no history
        api.end_streams()
        await until(lambda: api.asked("list pods") == 2)
        await feed.round()
        await feed.until(ref(value), JobState.ABSENT)
    assert set(feed.states(ref(value))) == {JobState.RUNNING, JobState.ABSENT}


async def test_an_end_while_another_namespace_is_listed_is_told(api: FakeApi, hook: KubernetesHook) -> None:
    value, other = api.put(pod("a1" * 16)), api.put(pod("a2" * 16, namespace="other"))
    async with following(hook, ref(value)) as feed:
        await feed.until(ref(value), JobState.RUNNING)
        await until(lambda: api.streams)

        async def slow(request: web.Request) -> web.StreamResponse:
            api.becomes(value, "Succeeded")
            await asyncio.sleep(0.2)  # for the watch to tell it meanwhile
            return await api.answer(request)

        api.once["list pods"] = [slow]
        feed.followed.append(ref(other))
        await feed.round()
        await feed.until(ref(other), JobState.RUNNING)
        await feed.until(ref(value), JobState.SUCCEEDED)


async def test_a_pod_of_another_uid_is_not_followed(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN))
    old = JobRef(ref(value).id, "00000000-0000-4000-8000-000000000000")
    async with following(hook, old, JobRef(old.id)) as feed:
        await feed.until(JobRef(old.id), JobState.RUNNING)
        api.becomes(value, "Succeeded")
        await feed.until(JobRef(old.id), JobState.SUCCEEDED)
    assert set(feed.states(old)) == {JobState.ABSENT}


async def test_ids_that_are_none_open_no_watch(api: FakeApi, hook: KubernetesHook) -> None:
    job = JobRef("../x:p")
    async with following(hook, job) as feed:
        await feed.until(job, JobState.ABSENT)
    assert api.requests == []


async def test_silence_is_an_outage(api: FakeApi, hook: KubernetesHook) -> None:
    hook.bookmark_seconds = 0.2
    with pytest.raises(ClusterUnreachable, match="did not answer"):
        raise await failure(hook, ref(api.put(pod(TOKEN))))


@pytest.mark.parametrize("name", ["list pods", "watch pods"])
@pytest.mark.parametrize("how", [fixed(500), fixed(404, PROXY_404), fixed(200, "<html>\n"), hang_up])
async def test_an_outage_is_said(api: FakeApi, hook: KubernetesHook, name: str, how: Handler) -> None:
    api.instead[name] = how
    assert isinstance(await failure(hook, ref(api.put(pod(TOKEN)))), ClusterUnreachable)


async def test_no_right_to_watch(api: FakeApi, hook: KubernetesHook) -> None:
    api.forbidden.add("watch pods")
    with pytest.raises(RequestRefused, match="403"):
        raise await failure(hook, ref(api.put(pod(TOKEN))))


async def test_a_token_that_expires_while_followed(
    api: FakeApi, file_hook: KubernetesHook, token_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch says so, and whoever follows again does so with the renewed one."""
    monkeypatch.setattr(_kubernetes_watch, "SHORTEST_STREAM", 0.0)
    value = api.put(pod(TOKEN))

    async def expires(request: web.Request) -> web.StreamResponse:
        api.token = "renewed"
        return status(401)

    api.instead["watch pods"] = expires
    assert isinstance(await failure(file_hook, ref(value)), AuthenticationFailed)
    api.instead.clear()
    token_file.write_text("renewed")
    async with following(file_hook, ref(value)) as feed:
        await feed.until(ref(value), JobState.RUNNING)
        await until(lambda: api.streams)


# --- what holds a pod up, by its events


def creating(since: float) -> dict[str, Any]:
    """A pod whose container is being created since so many seconds ago."""
    value = pod(TOKEN, "Pending")
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - since))
    waiting = {"name": "spark-kubernetes-driver", "state": {"waiting": {"reason": "ContainerCreating"}}}
    return {**value, "status": {"phase": "Pending", "startTime": start, "containerStatuses": [waiting]}}


async def test_the_events_explain_what_the_pod_does_not(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(creating(since=60))
    api.happened(value["metadata"]["name"], "FailedMount", 'configmap "c" not found')
    async with following(hook, ref(value)) as feed:
        await until(lambda: feed.told)
        await feed.round()
        assert feed.told[ref(value)][-1].message == 'FailedMount: configmap "c" not found'
        await feed.round()
    assert api.asked("list events") == 1, "not asked again at once"


async def test_a_container_may_take_its_time(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(creating(since=1))
    async with following(hook, ref(value)) as feed:
        await until(lambda: feed.told)
        await feed.round()
    assert api.asked("list events") == 0


@pytest.mark.parametrize("how", [fixed(500), refused(403), fixed(200, "<html>")])
async def test_events_that_cannot_be_read_explain_nothing(api: FakeApi, hook: KubernetesHook, how: Handler) -> None:
    value = api.put(creating(since=60))
    api.instead["list events"] = how
    async with following(hook, ref(value)) as feed:
        await until(lambda: api.asked("list events"))
        await feed.round()
        await until(lambda: api.streams)
        api.becomes(value, "Running")
        await feed.until(ref(value), JobState.RUNNING)


# --- kill


async def test_kill(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN))
    version = value["metadata"]["resourceVersion"]
    await hook.kill(ref(value))
    (body,) = api.sent("delete pods")
    assert body["preconditions"] == {"uid": ref(value).uid, "resourceVersion": version}
    assert "gracePeriodSeconds" not in body
    await hook.kill(ref(value))
    assert api.asked("delete pods") == 1, "it is being deleted"


async def test_a_pod_that_goes_with_its_deletion_was_killed(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN, "Pending"))
    await hook.kill(ref(value))
    assert api.pods == {}
    statuses = await hook.poll([ref(value), NOBODY])
    assert (statuses[ref(value)].state, statuses[NOBODY].state) == (JobState.KILLED, JobState.ABSENT)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_what_has_ended_is_not_killed(api: FakeApi, hook: KubernetesHook, phase: str) -> None:
    await hook.kill(ref(api.put(pod(TOKEN, phase))))
    assert api.asked("delete pods") == 0


async def test_nobody_and_another_pod_are_not_killed(api: FakeApi, hook: KubernetesHook) -> None:
    await hook.kill(NOBODY)
    await hook.kill(JobRef(ref(api.put(pod(TOKEN))).id, "00000000-0000-4000-8000-000000000000"))
    assert api.asked("delete pods") == 0


async def test_an_end_that_comes_before_the_deletion_is_kept(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN))

    async def ends_first(request: web.Request) -> web.StreamResponse:
        api.becomes(value, "Succeeded")
        return await api.answer(request)

    api.once["delete pods"] = [ends_first]
    await hook.kill(ref(value))
    assert (await hook.poll([ref(value)]))[ref(value)].state is JobState.SUCCEEDED


async def test_a_pod_that_changes_all_the_time(api: FakeApi, hook: KubernetesHook) -> None:
    api.instead["delete pods"] = refused(409)
    with pytest.raises(ClusterUnreachable, match="changes faster than it can be deleted"):
        await hook.kill(ref(api.put(pod(TOKEN))))


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (refused(403), RequestRefused),
        (refused(401), AuthenticationFailed),
        (fixed(404, PROXY_404), InvalidAnswer),
        (fixed(403, "<html>"), InvalidAnswer),
        (fixed(500), ClusterUnreachable),
        (hang_up, ClusterUnreachable),
    ],
)
async def test_a_kill_that_is_not_accepted(
    api: FakeApi, hook: KubernetesHook, how: Handler, kind: type[DurableJobError]
) -> None:
    job = ref(api.put(pod(TOKEN)))
    api.instead["delete pods"] = how
    with pytest.raises(kind):
        await hook.kill(job)
    api.pods.clear()
    assert (await hook.poll([job]))[job].state is JobState.ABSENT, "nobody has killed it"


# --- release


async def test_release_takes_our_finalizer_alone(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN, "Succeeded", finalizers=["other/one", FINALIZER]))
    await hook.release(ref(value))
    (now,) = api.pods.values()
    assert now["metadata"]["finalizers"] == ["other/one"]
    await hook.release(ref(value))
    assert (api.asked("patch pods"), api.asked("delete pods")) == (1, 0)


async def test_release_patches_the_pod_that_it_has_read(api: FakeApi, hook: KubernetesHook) -> None:
    """Another one's finalizer that is added meanwhile stays."""
    value = api.put(pod(TOKEN, "Succeeded", finalizers=[FINALIZER]))

    async def added_first(request: web.Request) -> web.StreamResponse:
        api.put({**value, "metadata": value["metadata"] | {"finalizers": [FINALIZER, "other/one"]}})
        return await api.answer(request)

    api.once["patch pods"] = [added_first]
    await hook.release(ref(value))
    (now,) = api.pods.values()
    assert now["metadata"]["finalizers"] == ["other/one"]


@pytest.mark.parametrize(("phase", "gone"), [("Succeeded", True), ("Failed", True), ("Running", False)])
async def test_release_deletes_at_the_end_if_asked(api: FakeApi, hook: KubernetesHook, phase: str, gone: bool) -> None:
    value = api.put(pod(TOKEN, phase, annotations={"durable-spark/at-end": "delete"}))
    await hook.release(ref(value))
    assert (api.pods == {}) is gone


async def test_release_of_another_pod_touches_nothing(api: FakeApi, hook: KubernetesHook) -> None:
    value = api.put(pod(TOKEN, "Succeeded", finalizers=[FINALIZER]))
    await hook.release(JobRef(ref(value).id, "00000000-0000-4000-8000-000000000000"))
    assert set(api.requests) == {"get pods"}


async def test_release_of_what_never_was_removes_its_secret(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await hook.prepare(SECRETIVE, new())
    api.instead["create pods"] = hang_up
    with pytest.raises(SubmissionUncertain):
        await hook.submit(SECRETIVE, submission)
    assert submission.job is not None
    await hook.release(submission.job)
    assert api.secrets == {}


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        (f"dag-task-{TOKEN}", {"labels": {}}),
        (f"dag-task-{TOKEN}", {"labels": {"durable-spark/token": TOKEN}, "ownerReferences": [{"uid": "u"}]}),
        ("stranger", {"labels": {"durable-spark/token": TOKEN}}),
    ],
    ids=["a stranger's", "owned", "of another name"],
)
async def test_release_leaves_other_secrets(
    api: FakeApi, hook: KubernetesHook, name: str, metadata: dict[str, Any]
) -> None:
    api.secrets[name] = {"metadata": {"name": name, **metadata}}
    await hook.release(JobRef(f"spark:{name}"))
    assert list(api.secrets) == [name]


async def test_no_right_to_patch(api: FakeApi, hook: KubernetesHook) -> None:
    api.forbidden.add("patch pods")
    with pytest.raises(RequestRefused, match="403"):
        await hook.release(ref(api.put(pod(TOKEN, "Failed", finalizers=[FINALIZER]))))


async def test_a_pod_that_cannot_be_let_go_of(api: FakeApi, hook: KubernetesHook) -> None:
    api.instead["patch pods"] = refused(409)
    with pytest.raises(ClusterUnreachable, match="changes faster than it can be let go of"):
        await hook.release(ref(api.put(pod(TOKEN, "Failed", finalizers=[FINALIZER]))))


# --- log_tail


async def test_log_tail(api: FakeApi, hook: KubernetesHook) -> None:
    job = ref(api.put(pod(TOKEN, "Failed")))
    assert await hook.log_tail(job, 2) == ["line 2", "line 3"]
    assert "container=spark-kubernetes-driver" in api.paths[-1]
    assert await hook.log_tail(job, 0) == ()


async def test_the_end_of_a_log_of_long_lines_is_its_end(
    api: FakeApi, hook: KubernetesHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``limitBytes`` cuts the end off, not the beginning."""
    monkeypatch.setattr(kubernetes, "LOG_BYTES", 1000)
    api.log = "".join(f"{'x' * 90} {number}\n" for number in range(100)) + "ValueError: why\n"
    tail = await hook.log_tail(ref(api.put(pod(TOKEN, "Failed"))), 50)
    assert tail[-1] == "ValueError: why"


@pytest.mark.parametrize(
    "how", [fixed(404, PROXY_404), refused(400, message="container not found"), refused(403), fixed(500), hang_up]
)
async def test_a_log_that_cannot_be_read_is_empty(api: FakeApi, hook: KubernetesHook, how: Handler) -> None:
    api.instead["get pods/log"] = how
    assert await hook.log_tail(ref(api.put(pod(TOKEN, "Failed"))), 10) == ()


async def test_no_log_of_another_pod(api: FakeApi, hook: KubernetesHook) -> None:
    job = ref(api.put(pod(TOKEN, "Failed")))
    assert await hook.log_tail(JobRef(job.id, "00000000-0000-4000-8000-000000000000"), 10) == ()
    assert await hook.log_tail(NOBODY._replace(id="spark:nobody"), 10) == ()
    assert api.asked("get pods/log") == 0


# --- check


async def test_check(api: FakeApi, hook: KubernetesHook) -> None:
    api.instead["get namespaces"] = answered({"kind": "Namespace"})
    assert await hook.check() == f"Kubernetes v1.34.4 at {api.url}: drivers may run in namespace 'spark'"


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("create pods", "may not create pods in namespace 'spark': grant it with a Role"),
        ("watch pods", "may not watch pods in"),
        ("get pods/log", "may not get pods/log in"),
    ],
)
async def test_check_names_the_rights_that_are_missing(
    api: FakeApi, hook: KubernetesHook, lacking: str, message: str
) -> None:
    api.instead["get namespaces"] = refused(403)
    api.forbidden.add(lacking)
    with pytest.raises(BadConfiguration, match=message):
        await hook.check()


async def test_check_says_what_does_without(api: FakeApi, hook: KubernetesHook) -> None:
    api.instead["get namespaces"] = refused(403)
    api.forbidden |= {"patch pods", "create secrets", "delete secrets", "list events"}
    assert (await hook.check()).endswith(
        "namespace 'spark'; without holding pods (patch pods), secret settings (create secrets, delete secrets), "
        "telling a deleted pod from one that never was (list events)"
    )


async def test_check_of_a_namespace_that_is_not_there(hook: KubernetesHook) -> None:
    with pytest.raises(BadConfiguration, match="no namespace 'spark': set the extra 'namespace' of connection"):
        await hook.check()


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (fixed(200, "<html>hello</html>"), InvalidAnswer, "JSON"),
        (fixed(200, '{"version": 3}'), InvalidAnswer, "no Kubernetes API server"),
        (fixed(404, PROXY_404), InvalidAnswer, "404 Not Found"),
        (fixed(503), ClusterUnreachable, "503"),
    ],
)
async def test_check_of_something_else(
    api: FakeApi, hook: KubernetesHook, how: Handler, kind: type[DurableJobError], message: str
) -> None:
    api.instead["get version"] = how
    with pytest.raises(kind, match=message):
        await hook.check()


async def test_closed_and_used_again(api: FakeApi, hook: KubernetesHook) -> None:
    job = ref(api.put(pod(TOKEN)))
    await hook.poll([job])
    await hook.aclose()
    await hook.aclose()
    assert (await hook.poll([job]))[job].state is JobState.RUNNING


# --- a refusal


@pytest.fixture
def task(api: FakeApi, connect_kubernetes: Any) -> TaskInstance:
    connect_kubernetes(api.connection())
    task = TaskInstance(
        SparkJobOperator,
        hook="durable_spark.hooks.kubernetes.KubernetesHook",
        conn_id="cluster",
        application="local:///job.py",
        retries=20,
        conf={"spark.kubernetes.container.image": "spark"},
    )
    task.max_tries = 20
    return task


async def test_a_quota_that_is_used_up_for_an_hour_is_only_a_refusal(api: FakeApi, task: TaskInstance) -> None:
    """There are no events so old, but neither has any of these requests made a pod: the API server has said so."""
    api.instead["create pods"] = refused(403, message="exceeded quota: compute")
    for _ in range(14):
        with pytest.raises(AirflowException, match="SubmissionRefused") as caught:
            await asyncio.to_thread(task.begin().execute)
        assert not isinstance(caught.value, AirflowFailException)
        api.now += 300.0
    del api.instead["create pods"]
    deferral = await asyncio.to_thread(task.begin().execute)
    assert job_of(deferral).startswith("spark:")
    assert deferral.trigger._args.to_json()["sent_before"] is False


async def test_a_refusal_after_a_request_that_may_yet_arrive_proves_nothing(api: FakeApi, task: TaskInstance) -> None:
    api.instead["create pods"] = hang_up
    assert waits(await asyncio.to_thread(task.begin().execute))
    api.instead["create pods"] = refused(403, message="exceeded quota: compute")
    with pytest.raises(AirflowException, match="SubmissionRefused"):
        await asyncio.to_thread(task.begin().execute)
    api.now += 3600.0
    with pytest.raises(AirflowFailException, match="its events have expired"):
        await asyncio.to_thread(task.begin().execute)
