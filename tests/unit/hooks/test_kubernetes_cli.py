"""The Kubernetes hook and the pods that ``spark-submit`` makes, against an API server that misbehaves."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest

from durable_spark.hooks import _kubernetes_cli, kubernetes
from durable_spark.hooks._kubernetes_plan import deployment_label
from durable_spark.jobs import (
    Absent,
    AuthenticationFailed,
    BadArguments,
    BadConfiguration,
    ClusterUnreachable,
    Found,
    InvalidAnswer,
    JobRef,
    JobState,
    RequestRefused,
    SparkJob,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
    new_token,
)
from tests.unit.hooks.fake import NOW, Handler, fixed, hang_up
from tests.unit.hooks.fake_kubernetes import PROXY_404, FakeApi, pod, ref, refused
from tests.unit.hooks.fake_kubernetes import status as error

if TYPE_CHECKING:
    from aiohttp import web

    from durable_spark.hooks.cli import CliSubmission
    from durable_spark.hooks.kubernetes import KubernetesHook

TOKEN, OWNER, DEPLOYMENT, TASK = (f"durable-spark/{name}" for name in ("token", "owner", "deployment", "task"))
NAMESPACE = "spark.kubernetes.namespace"
POD_NAME = "spark.kubernetes.driver.pod.name"
WAIT = "spark.kubernetes.submission.waitAppCompletion"
CONF_MAP = "spark-drv-d129e7a205fe848d-conf-map"
CONF_VOLUME = "spark-conf-volume-driver"
GRACE = 10.0
NAMED = "my.pod"


@pytest.fixture
def hook(kubernetes_hook: KubernetesHook, monkeypatch: pytest.MonkeyPatch) -> KubernetesHook:
    monkeypatch.setattr(kubernetes_hook, "_log", logging.getLogger("hook"))
    monkeypatch.setattr(kubernetes, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(_kubernetes_cli, "_LOOK_EVERY", 0.01)
    return kubernetes_hook


def new(**changes: Any) -> Submission:
    given = {"token": new_token(), "owner": "cd" * 16, "deployment": "prod", "name": "sales.daily"}
    return Submission(**{**given, **changes})


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def made(
    api: FakeApi,
    submission: Submission,
    *,
    age: float = 60.0,
    phase: str = "Pending",
    maps: Mapping[str, str] = {CONF_VOLUME: CONF_MAP},
    container: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    """Put the pod that spark-submit has made for a submission; its config maps are not there."""
    assert submission.job is not None
    value = pod(submission.token, phase, name=submission.job.id.partition(":")[2], creationTimestamp=rfc3339(NOW - age))
    value["metadata"] |= metadata
    value["spec"]["volumes"] = [{"name": volume, "configMap": {"name": name}} for volume, name in maps.items()]
    if phase == "Pending":
        value["status"] = {"phase": "Pending"}
    if status is not None:
        value["status"] = dict(status)
    if container is not None:
        value["status"]["containerStatuses"] = [{"name": "driver", **container}]
    return api.put(value)


def place(submission: Submission) -> str:
    assert submission.job is not None
    return submission.job.id.partition(":")[2]


async def prepare(
    hook: KubernetesHook, conf: Mapping[str, str] | None = None, submission: Submission | None = None
) -> Submission:
    return (await hook.prepare_cli(conf or {}, submission or new())).submission


# --- how a pod is marked


async def test_properties(api: FakeApi, hook: KubernetesHook) -> None:
    submission = new()
    plan: CliSubmission = await hook.prepare_cli({"spark.executor.memory": "1g"}, submission)
    name = f"sales-daily-{submission.token}"
    assert plan.conf == {
        NAMESPACE: "spark",
        POD_NAME: name,
        WAIT: "false",
        f"spark.kubernetes.driver.label.{TOKEN}": submission.token,
        f"spark.kubernetes.driver.label.{OWNER}": submission.owner,
        f"spark.kubernetes.driver.label.{DEPLOYMENT}": "prod",
        f"spark.kubernetes.driver.annotation.{TASK}": "sales.daily",
    }
    assert plan.submission == dataclasses.replace(
        submission, job=JobRef(f"spark:{name}"), cluster_time=NOW, evidence={"by": "spark-submit"}
    )
    assert Submission.from_json(plan.submission.to_json()) == plan.submission
    assert plan.environment_stays
    assert api.requests == ["get pods"], "nothing is made"


async def test_what_was_sent_before_keeps_its_name(hook: KubernetesHook) -> None:
    """Only under that name does the API server refuse the first one, should it come late."""
    first = await prepare(hook, {POD_NAME: "job-1"})
    plan = await hook.prepare_cli({POD_NAME: "job-2", NAMESPACE: "elsewhere"}, first)
    assert (plan.submission.job, plan.conf[POD_NAME], plan.conf[NAMESPACE]) == (first.job, "job-1", "spark")


async def test_the_name_is_that_of_a_native_submission(hook: KubernetesHook) -> None:
    submission = new()
    conf = {"spark.kubernetes.container.image": "i"}
    native = await hook.prepare(SparkJob(application="local:///a.py", conf=conf), submission)
    assert (await prepare(hook, submission=submission)).job == native.job


async def test_labels_that_are_no_labels(hook: KubernetesHook) -> None:
    plan = await hook.prepare_cli({}, new(deployment="Prod EU"))
    assert plan.conf[f"spark.kubernetes.driver.label.{DEPLOYMENT}"] == deployment_label("Prod EU")
    bare = await hook.prepare_cli({}, new(deployment="", owner="", name=""))
    assert {key for key in bare.conf if "label" in key or "annotation" in key} == {
        f"spark.kubernetes.driver.label.{TOKEN}"
    }


@pytest.mark.parametrize("kind", ["label", "annotation"])
async def test_our_labels_are_not_the_users(api: FakeApi, hook: KubernetesHook, kind: str) -> None:
    with pytest.raises(BadArguments, match=rf"spark\.kubernetes\.driver\.{kind}\.\* must not set {TOKEN}"):
        await prepare(hook, {f"spark.kubernetes.driver.{kind}.{TOKEN}": "x"})
    assert not api.requests
    await prepare(hook, {f"spark.kubernetes.driver.{kind}.team": "x"})


async def test_namespace(api: FakeApi, hook: KubernetesHook) -> None:
    submission = new()
    plan = await hook.prepare_cli({NAMESPACE: "other"}, submission)
    assert plan.conf[NAMESPACE] == "other"
    assert plan.submission.job == JobRef(f"other:sales-daily-{submission.token}")
    assert api.paths[-1].startswith("/api/v1/namespaces/other/pods/")


@pytest.mark.parametrize("text", ["Spark", " spark", "a/b", "a.b", "../kube-system", "a" * 64])
async def test_what_is_no_namespace(api: FakeApi, hook: KubernetesHook, text: str) -> None:
    with pytest.raises(BadArguments, match=r"spark\.kubernetes\.namespace is"):
        await prepare(hook, {NAMESPACE: text})
    assert not api.requests


@pytest.mark.parametrize("text", ["Pod", "a_b", "a/b", "../x", " a", "a" * 254, "a..b"])
async def test_what_is_no_pod_name(api: FakeApi, hook: KubernetesHook, text: str) -> None:
    with pytest.raises(BadArguments, match=r"spark\.kubernetes\.driver\.pod\.name is .*leave it out"):
        await prepare(hook, {POD_NAME: text})
    assert not api.requests


@pytest.mark.parametrize(("value", "told"), [("true", True), (" TRUE", True), ("false", False), ("", False)])
async def test_spark_submit_does_not_wait(
    hook: KubernetesHook, caplog: pytest.LogCaptureFixture, value: str, told: bool
) -> None:
    caplog.set_level(logging.INFO)
    plan = await hook.prepare_cli({WAIT: value}, new())
    assert plan.conf[WAIT] == "false"
    assert (f"{WAIT} is set to false" in caplog.text) == told


# --- whether the job can be followed


async def test_pods_that_may_not_be_read(api: FakeApi, hook: KubernetesHook) -> None:
    api.forbidden.add("get pods")
    with pytest.raises(BadConfiguration, match=r"connection 'cluster' do not let pods.*'spark'.*'kubeconfig'"):
        await prepare(hook)


async def test_credentials_that_are_not_accepted(api: FakeApi, hook: KubernetesHook) -> None:
    api.token = "another"
    with pytest.raises(AuthenticationFailed):
        await prepare(hook)


@pytest.mark.parametrize("how", [fixed(500), fixed(404, PROXY_404), hang_up])
async def test_what_answers_is_no_api_server(api: FakeApi, hook: KubernetesHook, how: Handler) -> None:
    api.instead["get pods"] = how
    with pytest.raises(ClusterUnreachable):
        await prepare(hook)


async def test_no_credentials_at_all(
    api: FakeApi, connect_kubernetes: Callable[[dict[str, Any]], KubernetesHook], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection as upstream's users have it, and neither a kubeconfig nor a pod around."""
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    hook = connect_kubernetes({"conn_type": "spark", "host": f"k8s://{api.url}"})
    with pytest.raises(BadConfiguration, match=r"'cluster' has no credentials.*'kubeconfig'"):
        await prepare(hook)
    assert not api.requests


# --- the user's own name of a pod


def named(api: FakeApi, phase: str, *, token: str = "", **labels: str) -> dict[str, Any]:
    """Put a pod that has the name already."""
    value = pod(token or new_token(), phase, name=NAMED, annotations={TASK: "sales.daily"})
    labels = {**value["metadata"]["labels"], OWNER: "cd" * 16, DEPLOYMENT: "prod", **labels}
    value["metadata"]["labels"] = {key: value for key, value in labels.items() if value}
    return api.put(value)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_ended_pod_of_the_same_task_makes_room(
    api: FakeApi, hook: KubernetesHook, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    caplog.set_level(logging.INFO)
    old = named(api, phase)
    submission = await prepare(hook, {POD_NAME: NAMED})
    assert submission.job == JobRef(f"spark:{NAMED}")
    assert submission.evidence == {"by": "spark-submit", "before": old["metadata"]["uid"]}
    assert not api.pods
    (deletion,) = api.sent("delete pods")
    assert deletion["preconditions"] == {
        "uid": old["metadata"]["uid"],
        "resourceVersion": old["metadata"]["resourceVersion"],
    }
    assert f"Deleting the pod {NAMED} in spark: it has ended, and its name is wanted" in caplog.text


@pytest.mark.parametrize(
    ("phase", "labels", "message"),
    [
        ("Running", {}, "an earlier submission of this task made it, and it has not ended"),
        ("Pending", {}, "an earlier submission of this task made it, and it has not ended"),
        ("Succeeded", {OWNER: "ef" * 16}, r"another task made it \(sales\.daily, or this one in another run\)"),
        ("Succeeded", {DEPLOYMENT: "test"}, "another task made it"),
        ("Succeeded", {DEPLOYMENT: ""}, "another task made it"),
        ("Succeeded", {OWNER: ""}, "another task made it"),
        ("Running", {OWNER: "ef" * 16}, "another task made it"),
    ],
)
async def test_pod_that_keeps_its_name(
    api: FakeApi, hook: KubernetesHook, phase: str, labels: dict[str, str], message: str
) -> None:
    named(api, phase, **labels)
    with pytest.raises(BadArguments, match=rf"^{POD_NAME} is '{NAMED}'.*{message}.*\. Leave the property out"):
        await prepare(hook, {POD_NAME: NAMED})
    assert api.asked("delete pods") == 0


async def test_pod_of_a_stranger(api: FakeApi, hook: KubernetesHook) -> None:
    value = named(api, "Succeeded", **{OWNER: "", DEPLOYMENT: ""})
    del value["metadata"]["labels"][TOKEN]
    with pytest.raises(BadArguments, match="it is none of this package's"):
        await prepare(hook, {POD_NAME: NAMED})
    with pytest.raises(BadArguments, match="it is none of this package's"):
        await prepare(hook, {POD_NAME: NAMED}, new(owner="", deployment=""))
    assert api.asked("delete pods") == 0


@pytest.mark.parametrize("phase", ["Running", "Succeeded"])
async def test_pod_of_the_submission_itself(api: FakeApi, hook: KubernetesHook, phase: str) -> None:
    """It is sent again: what it has made is no obstacle."""
    submission = new()
    named(api, phase, token=submission.token)
    assert (await prepare(hook, {POD_NAME: NAMED}, submission)).evidence == {"by": "spark-submit"}
    assert api.asked("delete pods") == 0


@pytest.mark.parametrize("phase", ["Running", "Failed"])
async def test_pod_that_is_being_deleted_is_waited_for(api: FakeApi, hook: KubernetesHook, phase: str) -> None:
    value = named(api, phase)
    value["metadata"]["deletionTimestamp"] = "2026-11-23T03:20:30Z"
    preparing = asyncio.create_task(prepare(hook, {POD_NAME: NAMED}))
    await asyncio.sleep(0.1)
    assert not preparing.done()
    api.remove(value)
    assert (await preparing).evidence["before"] == value["metadata"]["uid"]
    assert api.asked("delete pods") == 0


async def test_pod_that_does_not_go(api: FakeApi, hook: KubernetesHook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kubernetes_cli, "GONE_WITHIN", 0.05)
    value = named(api, "Failed")
    value["metadata"]["finalizers"] = ["somebody/else"]
    with pytest.raises(ClusterUnreachable, match=r"my\.pod in spark is being deleted, but does not go"):
        await prepare(hook, {POD_NAME: NAMED})


async def test_pod_that_may_not_be_deleted(api: FakeApi, hook: KubernetesHook) -> None:
    named(api, "Failed")
    api.forbidden.add("delete pods")
    with pytest.raises(BadArguments, match=rf"{POD_NAME}.*may not be deleted.*grant the right"):
        await prepare(hook, {POD_NAME: NAMED})


async def test_pod_that_changes_before_it_is_deleted(api: FakeApi, hook: KubernetesHook) -> None:
    """Its name is another one's in the moment between look and deletion."""

    async def replaced(request: web.Request) -> web.StreamResponse:
        api.remove(value)
        named(api, "Running", **{OWNER: "ef" * 16})
        return await api.answer(request)

    value = named(api, "Failed")
    api.once["delete pods"] = [replaced]
    with pytest.raises(BadArguments, match="another task made it"):
        await prepare(hook, {POD_NAME: NAMED})
    assert api.pods[("spark", NAMED)]["status"]["phase"] == "Running"


async def test_pod_that_only_changes_is_deleted_in_the_end(api: FakeApi, hook: KubernetesHook) -> None:
    async def changed(request: web.Request) -> web.StreamResponse:
        api.put(value)
        return error(409)

    value = named(api, "Failed")
    api.once["delete pods"] = [changed]
    await prepare(hook, {POD_NAME: NAMED})
    assert not api.pods


# --- what spark-submit says


@pytest.mark.parametrize(
    ("line", "known"),
    [
        (
            "26/11/26 INFO Client: Deployed Spark application a b and submission ID {job} into Kubernetes",
            True,
        ),
        ("INFO Client: Deployed Spark application a with submission ID {job} into Kubernetes", True),
        ("Deployed Spark application a with application ID b and submission ID {job} into Kubernetes\r", True),
        ("Deployed Spark application a with application ID b and submission ID {job}x into Kubernetes", False),
        ("Deployed Spark application a with application ID b and submission ID spark:x into Kubernetes", False),
        ("Deployed Spark application a into Kubernetes.", False),
        ("INFO ShutdownHookManager: {job}", False),
        ('Message: pods "{job}" already exists', False),
        ("Application status for {job} (phase: Pending)", False),
        ("", False),
    ],
)
async def test_job_in(hook: KubernetesHook, line: str, known: bool) -> None:
    submission = await prepare(hook)
    assert submission.job is not None
    assert hook.job_in(line.format(job=submission.job.id), submission) == (submission.job if known else None)
    assert hook.job_in(line, new()) is None


# --- a look while it runs


async def test_glimpse(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    assert await hook.glimpse(new()) is None
    assert await hook.glimpse(submission) is None
    value = made(api, submission, age=0)
    before = len(api.requests)
    assert await hook.glimpse(submission) is None, "its config map is not there yet"
    assert api.requests[before:] == ["get pods", "get configmaps"]
    api.config_maps.add(CONF_MAP)
    assert await hook.glimpse(submission) == ref(value)


async def test_glimpse_of_a_pod_that_has_started(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    value = made(api, submission, phase="Running")
    assert await hook.glimpse(submission) == ref(value)
    assert api.asked("get configmaps") == 0


@pytest.mark.parametrize("change", [{"labels": {TOKEN: "ef" * 16}}, {"deletionTimestamp": "2026-11-23T03:20:30Z"}])
async def test_glimpse_of_what_is_not_the_job(api: FakeApi, hook: KubernetesHook, change: dict[str, Any]) -> None:
    submission = await prepare(hook)
    made(api, submission, phase="Running", **change)
    assert await hook.glimpse(submission) is None


async def test_glimpse_without_the_right_to_config_maps(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    api.forbidden.add("get configmaps")
    made(api, submission, age=1000)
    assert await hook.glimpse(submission) is None


# --- find: whole


WHOLE: Mapping[str, dict[str, Any]] = {
    "running": {"phase": "Running"},
    "succeeded": {"phase": "Succeeded"},
    "failed": {"phase": "Failed"},
    "evicted": {"status": {"phase": "Failed", "reason": "Evicted"}},
    "on a node that is lost": {"status": {"phase": "Unknown"}},
    "of no phase": {"status": {}},
    "a container runs": {"container": {"state": {"running": {"startedAt": rfc3339(NOW)}}}},
    "a container has ended": {"container": {"state": {"terminated": {"exitCode": 1}}}},
    "a container ran before": {"container": {"state": {"waiting": {}}, "lastState": {"terminated": {"exitCode": 1}}}},
    "a container counts as started": {"container": {"started": True}},
    "another tool's pod": {"maps": {}},
    "a volume of another name": {"maps": {"my-volume": CONF_MAP}},
    "a config map of the user's": {"maps": {"hadoop-properties": "my-hadoop"}},
}


@pytest.mark.parametrize("how", WHOLE.values(), ids=list(WHOLE))
async def test_what_may_have_started_is_never_half_made(
    api: FakeApi, hook: KubernetesHook, how: dict[str, Any]
) -> None:
    """Its config maps are gone, or were never spark-submit's."""
    submission = await prepare(hook)
    value = made(api, submission, age=1000, **how)
    found = await hook.find(submission)
    assert isinstance(found, Found)
    assert found.status.job == ref(value)
    assert api.asked("delete pods") == api.asked("get configmaps") == 0


async def test_pod_that_waits_for_a_node_is_whole(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    made(api, submission, age=1000)
    api.config_maps.add(CONF_MAP)
    found = await hook.find(submission)
    assert isinstance(found, Found)
    assert found.status.state is JobState.PENDING
    asked = api.headers[api.requests.index("get configmaps")]["Accept"]
    assert "PartialObjectMetadata" in asked, "what is in it is not ours to read"


async def test_native_submission_has_no_config_map(api: FakeApi, hook: KubernetesHook) -> None:
    conf = {"spark.kubernetes.container.image": "i"}
    submission = await hook.prepare(SparkJob(application="local:///a.py", conf=conf), new())
    made(api, submission, age=1000)
    assert isinstance(await hook.find(submission), Found)
    assert api.asked("get configmaps") == 0


# --- find: half-made


@pytest.mark.parametrize(
    "maps",
    [
        {CONF_VOLUME: CONF_MAP},
        {CONF_VOLUME: CONF_MAP, "hadoop-properties": "my-app-1a2b-hadoop-config"},
        {"pod-template-volume": "my-app-1a2b-driver-podspec-conf-map"},
        {"krb5-file": "my-app-1a2b-krb5-file"},
    ],
)
async def test_half_made_pod_is_deleted(
    api: FakeApi, hook: KubernetesHook, caplog: pytest.LogCaptureFixture, maps: dict[str, str]
) -> None:
    submission = await prepare(hook)
    value = made(api, submission, maps=maps)
    api.config_maps |= set(list(maps.values())[:-1])
    assert await hook.find(submission) == Absent()
    (deletion,) = api.sent("delete pods")
    assert deletion["preconditions"]["uid"] == value["metadata"]["uid"]
    assert deletion["preconditions"]["resourceVersion"] == value["metadata"]["resourceVersion"]
    assert "left half-made" in caplog.text


async def test_absence_is_told_when_the_half_made_pod_is_gone(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    value = made(api, submission, finalizers=["somebody/else"])
    finding = asyncio.create_task(hook.find(submission))
    await asyncio.sleep(0.2)
    assert not finding.done()
    assert api.asked("delete pods") == 1, "it is deleted once"
    api.remove(value)
    assert await finding == Absent()


async def test_young_pod_is_left_time(api: FakeApi, hook: KubernetesHook) -> None:
    """By the API server's clock, which stands still here until it is told otherwise."""
    submission = await prepare(hook)
    made(api, submission, age=0)
    finding = asyncio.create_task(hook.find(submission))
    await asyncio.sleep(0.1)
    api.now = NOW + GRACE - 1
    await asyncio.sleep(0.1)
    assert not finding.done()
    assert api.asked("delete pods") == 0
    api.now = NOW + GRACE
    assert await finding == Absent()


async def test_config_map_that_comes_in_between(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    made(api, submission, age=0)
    finding = asyncio.create_task(hook.find(submission))
    await asyncio.sleep(0.1)
    api.config_maps.add(CONF_MAP)
    api.now = NOW + 2 * GRACE
    assert isinstance(await finding, Found)
    assert api.asked("delete pods") == 0


async def test_no_clock_is_told(api: FakeApi, hook: KubernetesHook) -> None:
    hook.half_submitted_after = 0.3
    submission = await prepare(hook)
    made(api, submission, age=1000)

    async def without_date(request: web.Request) -> web.StreamResponse:
        response = await api.answer(request)
        response.headers["Date"] = ""
        return response

    api.instead["get pods"] = without_date
    began = time.monotonic()
    assert await hook.find(submission) == Absent()
    assert time.monotonic() - began >= 0.3


async def test_pod_that_starts_before_it_is_deleted(api: FakeApi, hook: KubernetesHook) -> None:
    """The config map comes between the look at it and the deletion, and so does the kubelet."""

    async def started(request: web.Request) -> web.StreamResponse:
        api.becomes(value, "Running")
        return await api.answer(request)

    submission = await prepare(hook)
    value = made(api, submission)
    api.once["delete pods"] = [started]
    found = await hook.find(submission)
    assert isinstance(found, Found)
    assert found.status.state is JobState.RUNNING
    assert ref(api.pods[("spark", place(submission))]) == ref(value)


async def test_half_made_pod_that_may_not_be_deleted(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    made(api, submission)
    api.forbidden.add("delete pods")
    with pytest.raises(SubmissionUncertain, match=r"left half-made.*may not be deleted.*grant the right") as caught:
        await hook.find(submission)
    assert not caught.value.permanent


async def test_half_made_pod_that_does_not_go(
    api: FakeApi, hook: KubernetesHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "GONE_WITHIN", 0.1)
    hook.half_submitted_after = hook.untold_patience = 0.0
    submission = await prepare(hook)
    made(api, submission, finalizers=["somebody/else"])
    with pytest.raises(SubmissionUncertain, match="deletion does not come to an end") as caught:
        await hook.find(submission)
    assert not caught.value.permanent


async def test_pod_of_somebody_else_is_not_deleted(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    made(api, submission, labels={TOKEN: "ef" * 16})
    with pytest.raises(SubmissionRefused, match="none of this submission's"):
        await hook.find(submission)
    assert api.asked("delete pods") == 0


@pytest.mark.parametrize(
    "how", [fixed(500), fixed(404, PROXY_404), fixed(404, "{}"), hang_up, refused(404, details={})]
)
async def test_only_the_api_servers_word_makes_a_config_map_missing(
    api: FakeApi, hook: KubernetesHook, how: Handler
) -> None:
    submission = await prepare(hook)
    made(api, submission)
    api.instead["get configmaps"] = how
    with pytest.raises((ClusterUnreachable, InvalidAnswer)):
        await hook.find(submission)
    assert api.asked("delete pods") == 0


# --- find: without the right to config maps


def failed_mount(api: FakeApi, value: Mapping[str, Any], *, after: float, **changes: Any) -> None:
    """The kubelet tells that the pod's config map was missing, some time after the pod was made."""
    metadata = value["metadata"]
    told = {
        "reason": "FailedMount",
        "message": f'MountVolume.SetUp failed for volume "{CONF_VOLUME}" : configmap "{CONF_MAP}" not found',
        "uid": metadata["uid"],
        "at": rfc3339(NOW - 60 + after),
    }
    api.happened(metadata["name"], **told | changes)


async def test_the_kubelet_tells_that_it_is_half_made(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    api.forbidden.add("get configmaps")
    failed_mount(api, made(api, submission), after=GRACE)
    assert await hook.find(submission) == Absent()
    assert api.asked("delete pods") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"after": GRACE - 1},
        {"after": 20, "uid": "of-another-pod"},
        {"after": 20, "reason": "FailedScheduling"},
        {"after": 20, "message": 'MountVolume.SetUp failed for volume "mine" : configmap "mine" not found'},
        {"after": 20, "message": f'failed to sync configmap cache: timed out: "{CONF_MAP}"'},
        {"after": 20, "at": ""},
    ],
    ids=["too early", "another pod", "another reason", "another map", "another trouble", "no time"],
)
async def test_what_the_kubelet_says_is_not_enough(
    api: FakeApi, hook: KubernetesHook, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    submission = await prepare(hook)
    api.forbidden.add("get configmaps")
    failed_mount(api, made(api, submission), **changes)
    assert isinstance(await hook.find(submission), Found)
    assert api.asked("delete pods") == 0
    assert "grant the right to get config maps" in caplog.text


async def test_without_any_right_a_sign_is_waited_for(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    api.forbidden |= {"get configmaps", "list events"}
    value = made(api, submission, age=0)
    finding = asyncio.create_task(hook.find(submission))
    await asyncio.sleep(0.1)
    api.now = NOW + hook.untold_patience - 1
    await asyncio.sleep(0.1)
    assert not finding.done()
    api.becomes(value, "Running")
    assert isinstance(await finding, Found)


# --- find: what was deleted


STARTED = ("Scheduled", "Pulled", "Created", "Started")
HALF = ("Scheduled", "FailedMount")


def tell(api: FakeApi, submission: Submission, reasons: tuple[str, ...], **about: str) -> None:
    for reason in reasons:
        api.happened(place(submission), reason, "message", **about)


async def test_what_started_was_deleted_by_somebody(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    tell(api, submission, HALF, uid="first")
    tell(api, submission, STARTED, uid="second")
    with pytest.raises(SubmissionUncertain, match="Somebody has deleted it") as caught:
        await hook.find(submission)
    assert caught.value.permanent


@pytest.mark.parametrize("reasons", [HALF, ("FailedScheduling",), ("Scheduled",)])
async def test_what_never_started_is_no_obstacle(api: FakeApi, hook: KubernetesHook, reasons: tuple[str, ...]) -> None:
    """A half-made pod that was deleted by a try that died, or by spark-submit when it might not make the rest."""
    submission = await prepare(hook)
    tell(api, submission, reasons)
    assert await hook.find(submission) == Absent()


async def test_what_happened_is_not_understood(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    tell(api, submission, ("Scheduled", "SomethingNew"))
    with pytest.raises(SubmissionUncertain):
        await hook.find(submission)


async def test_events_of_the_pod_that_had_the_name(api: FakeApi, hook: KubernetesHook) -> None:
    old = named(api, "Failed")
    submission = await prepare(hook, {POD_NAME: NAMED})
    tell(api, submission, STARTED, uid=old["metadata"]["uid"])
    tell(api, submission, STARTED, uid="older", made=rfc3339(NOW - 61))
    assert await hook.find(submission) == Absent()
    tell(api, submission, STARTED, uid="unknown", made=rfc3339(NOW - 59))
    with pytest.raises(SubmissionUncertain):
        await hook.find(submission)


async def test_events_have_expired(api: FakeApi, hook: KubernetesHook) -> None:
    submission = await prepare(hook)
    api.now += 3100
    with pytest.raises(SubmissionUncertain, match="have expired"):
        await hook.find(submission)


# --- errors while it is looked at


@pytest.mark.parametrize("look", ["find", "glimpse"])
async def test_an_api_server_out_of_reach_says_nothing(api: FakeApi, hook: KubernetesHook, look: str) -> None:
    submission = await prepare(hook)
    api.instead["get pods"] = fixed(503)
    call: Callable[[Submission], Awaitable[object]] = getattr(hook, look)
    with pytest.raises(ClusterUnreachable):
        await call(submission)
    api.instead["get pods"] = refused(403)
    with pytest.raises(RequestRefused):
        await call(submission)


async def test_the_pod_that_had_the_name_is_remembered_when_it_is_sent_again(
    api: FakeApi, hook: KubernetesHook
) -> None:
    """A short run, retried at once: its events are as young as the intent."""
    old = named(api, "Failed")
    first = await prepare(hook, {POD_NAME: NAMED})
    tell(api, first, STARTED, uid=old["metadata"]["uid"], made=rfc3339(NOW - 20))
    assert await hook.find(first) == Absent(), "its worker died before spark-submit had sent anything"
    again = await prepare(hook, {POD_NAME: NAMED}, first)
    assert await hook.find(again) == Absent(), "and so did this one's"
