"""
What happens to a hook when real pods run, and when people and API servers interfere.

The witness is the API server's audit log and what it shows, read without the hook.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dev.kubernetes import RequestFailed
from dev.processes import free_port, wait_until
from durable_spark.hooks import _http, _kubernetes_access
from durable_spark.hooks import kubernetes as kubernetes_hook
from durable_spark.hooks._kubernetes_api import Api
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.jobs import (
    Absent,
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    DurableJobError,
    Found,
    JobRef,
    JobState,
    SubmissionRefused,
    SubmissionUncertain,
)
from tests.kubernetes import shell_job, spark_job
from tests.submitting import following, new_submission, submit, until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dev.kubernetes import KubernetesCluster
    from durable_spark.jobs import SparkJob
    from tests.cluster.conftest import Connect

    MakeHook = Callable[..., KubernetesHook]

PASSWORD = "hush-hush-hush"
SECRETIVE: Mapping[str, Any] = {
    "conf": {"spark.hadoop.store.password": PASSWORD},
    "env_vars": {"STORE_TOKEN": PASSWORD, "PLAIN": "plain"},
}


@pytest.fixture
def make_hook(kubernetes_cluster: KubernetesCluster, connect: Connect) -> MakeHook:
    """Return what makes a hook, of a connection that differs as it is told."""

    def make(**change: Any) -> KubernetesHook:
        connection = kubernetes_cluster.connection()
        extra = {**connection["extra"], **change.pop("extra", {})}
        hook: KubernetesHook = connect({**connection, **change, "extra": extra}, KubernetesHook)
        return hook

    return make


@pytest.fixture
def hook(make_hook: MakeHook) -> KubernetesHook:
    return make_hook()


def name_of(job: JobRef) -> str:
    return job.id.partition(":")[2]


def created(cluster: KubernetesCluster, job: JobRef) -> list[str]:
    """Return the uids of all pods of that name that ever were."""
    return [pod.uid for pod in cluster.created_pods() if f"{pod.namespace}:{pod.name}" == job.id]


def secret(cluster: KubernetesCluster, job: JobRef) -> dict[str, Any] | None:
    try:
        return cluster.request("GET", f"/api/v1/namespaces/{cluster.namespace}/secrets/{name_of(job)}")
    except RequestFailed as error:
        if error.status != 404:
            raise
        return None


def quota_is_known(cluster: KubernetesCluster) -> bool:
    """Whether a pod would be refused."""
    container = {"name": "main", "image": "i"}
    pod = {"metadata": {"name": "trial"}, "spec": {"containers": [container]}}
    try:
        cluster.request("POST", f"/api/v1/namespaces/{cluster.namespace}/pods?dryRun=All", pod)
    except RequestFailed as error:
        if error.status != 403:
            raise
        return True
    return False


def exists(cluster: KubernetesCluster, job: JobRef) -> bool:
    return name_of(job) in {pod["metadata"]["name"] for pod in cluster.pods()}


def delete(cluster: KubernetesCluster, job: JobRef, grace: int | None = None) -> None:
    """Delete a pod behind the hook's back; return when it is gone."""
    cluster.delete_pod(name_of(job), grace)
    wait_until(lambda: not exists(cluster, job), 30, f"{job} to go")


# --- Spark


async def test_spark_runs_with_an_executor_and_its_end_is_told(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    hook, conf = make_hook(), kubernetes_cluster.conf()
    submitted = [await submit(hook, spark_job(0, end, conf=conf)) for end in ("0", "raise")]
    async with following(make_hook, *(job for _, job in submitted)) as (success, failure):
        await success.until(JobState.SUCCEEDED, deadline=120)
        assert "exit code 1" in (await failure.until(JobState.FAILED, deadline=120)).message
    made = [
        entry.get("responseObject", {}).get("metadata", {}).get("labels", {}) for entry in kubernetes_cluster.audit()
    ]
    for submission, job in submitted:
        log = "\n".join(await hook.log_tail(job, 500))
        app_id = f"spark-{submission.token}"
        assert f"app={app_id} total=4950" in log
        assert ("RuntimeError: raised as told" in log) == (job == submitted[1][1])
        roles = [labels["spark-role"] for labels in made if labels.get("spark-app-selector") == app_id]
        assert "executor" in roles


async def test_log_tail_is_the_drivers(hook: KubernetesHook) -> None:
    """Of a pod with several containers, too."""
    sidecar = {"name": "sidecar", "image": "localhost/busybox:test", "command": ["true"]}
    job = shell_job("for i in 1 2 3 4 5; do echo line $i; done", pod={"spec": {"containers": [sidecar]}})
    _, ref = await submit(hook, job)
    await until(hook, ref, JobState.SUCCEEDED)
    assert await hook.log_tail(ref, 2) == ["line 4", "line 5"]


# --- one submission, one pod


@pytest.mark.parametrize("options", [{}, SECRETIVE], ids=["plain", "with a Secret"])
async def test_twelve_at_once_leave_one_pod(
    options: dict[str, Any], kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    job = shell_job("exit 0", **options)
    submission = await make_hook().prepare(job, new_submission())
    jobs = await asyncio.gather(*(make_hook().submit(job, submission) for _ in range(12)))
    (ref,) = set(jobs)
    assert wait_until(lambda: created(kubernetes_cluster, ref), 10, "the audit log") == [ref.uid]


async def test_somebody_elses_pod_of_that_name_is_left_alone(
    kubernetes_cluster: KubernetesCluster, hook: KubernetesHook
) -> None:
    job = shell_job("exit 0")
    submission = await hook.prepare(job, new_submission())
    assert submission.job is not None
    other = kubernetes_cluster.create_pod(name_of(submission.job), {"containers": [{"command": ["sleep", "600"]}]})
    for attempt in (hook.submit(job, submission), hook.find(submission)):
        with pytest.raises(SubmissionRefused, match="none of this submission's"):
            await attempt
    now = kubernetes_cluster.pod(name_of(submission.job))
    assert now["metadata"]["uid"] == other["metadata"]["uid"]
    assert "deletionTimestamp" not in now["metadata"]
    delete(kubernetes_cluster, submission.job, 0)


async def test_late_request_is_no_second_pod(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API server hangs: the request is in its socket, and is served when nobody waits for it any more, or never."""
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.5)
    hook, job = make_hook(), shell_job("exit 0")
    submission = await hook.prepare(job, new_submission())
    kubernetes_cluster.api_server.suspend()
    try:
        with pytest.raises(SubmissionUncertain) as uncertain:
            await hook.submit(job, submission)
        assert not uncertain.value.permanent
    finally:
        kubernetes_cluster.api_server.resume()
    monkeypatch.undo()
    retry = make_hook()
    ref = await retry.submit(job, submission)
    await until(retry, ref, JobState.SUCCEEDED)
    assert created(kubernetes_cluster, ref) == [ref.uid]


@pytest.mark.parametrize("options", [{}, SECRETIVE], ids=["plain", "with a Secret"])
async def test_refusal_of_a_second_request_is_none_of_the_first(
    options: dict[str, Any], kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    """Admission comes before the name is looked at: the pod that is there may have used up the quota itself."""
    job, secretive = shell_job("exit 0", **options), shell_job("exit 0", **SECRETIVE)
    submission = await make_hook().prepare(job, new_submission())
    ref = await make_hook().submit(job, submission)
    path = f"/api/v1/namespaces/{kubernetes_cluster.namespace}/resourcequotas"
    hard = {"pods": "1", "secrets": "1"}
    full = {"metadata": {"name": "full"}, "spec": {"hard": hard}}
    kubernetes_cluster.request("POST", path, full)
    try:
        used = {"status": {"hard": hard, "used": hard}}
        merge = "application/merge-patch+json"
        kubernetes_cluster.request("PATCH", f"{path}/full/status", used, content_type=merge)
        wait_until(lambda: quota_is_known(kubernetes_cluster), 30, "the quota to be known to admission")
        other = await make_hook().prepare(secretive, new_submission())
        with pytest.raises(SubmissionRefused, match="quota"):
            await make_hook().submit(secretive, other)
        assert await make_hook().submit(job, submission) == ref
    finally:
        kubernetes_cluster.request("DELETE", f"{path}/full")
    assert other.job is not None
    assert secret(kubernetes_cluster, other.job) is None


async def test_refused_by_admission(kubernetes_cluster: KubernetesCluster, hook: KubernetesHook) -> None:
    """What the API server's admission says is the error, and nothing is left."""
    job = shell_job("exit 0", pod={"spec": {"serviceAccountName": "nobody"}}, **SECRETIVE)
    submission = await hook.prepare(job, new_submission())
    with pytest.raises(SubmissionRefused, match='serviceaccount "nobody" not found'):
        await hook.submit(job, submission)
    assert submission.job is not None
    assert secret(kubernetes_cluster, submission.job) is None


# --- secrets


async def test_secret_settings_are_in_a_secret_alone(
    kubernetes_cluster: KubernetesCluster, hook: KubernetesHook
) -> None:
    script = 'cat "$SPARK_CONF_DIR/spark.properties"; echo "token=$STORE_TOKEN plain=$PLAIN"'
    _, ref = await submit(hook, shell_job(script, **SECRETIVE))
    pod = kubernetes_cluster.pod(name_of(ref))
    assert PASSWORD not in str(pod)
    assert PASSWORD not in str([entry.get("requestObject") for entry in kubernetes_cluster.audit()])
    kept = secret(kubernetes_cluster, ref)
    assert kept is not None
    assert [(owner["kind"], owner["uid"]) for owner in kept["metadata"]["ownerReferences"]] == [("Pod", ref.uid)]
    await until(hook, ref, JobState.SUCCEEDED)
    log = await hook.log_tail(ref, 10)
    assert f"spark.hadoop.store.password={PASSWORD}" in log
    assert f"token={PASSWORD} plain=plain" in log


async def _die_between(make_hook: MakeHook, job: SparkJob, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a submission whose worker died when the Secret was there and the pod was not yet sent."""
    hook = make_hook()
    submission = await hook.prepare(job, new_submission())
    create = Api.create

    async def die(self: Api, kind: str, namespace: str, body: Mapping[str, Any]) -> Any:
        if kind == "pods":
            raise asyncio.CancelledError
        return await create(self, kind, namespace, body)

    with monkeypatch.context() as patch:
        patch.setattr(Api, "create", die)
        with pytest.raises(asyncio.CancelledError):
            await hook.submit(job, submission)
    return submission


async def test_secret_of_a_dead_try_is_taken_up(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = shell_job("exit 0", **SECRETIVE)
    submission = await _die_between(make_hook, job, monkeypatch)
    orphan = secret(kubernetes_cluster, submission.job)
    assert orphan is not None
    retry = make_hook()
    assert await retry.find(submission) == Absent()
    ref = await retry.submit(job, submission)
    now = secret(kubernetes_cluster, ref)
    assert now is not None
    assert now["metadata"]["uid"] == orphan["metadata"]["uid"]
    assert now["metadata"]["ownerReferences"][0]["uid"] == ref.uid


async def test_secret_of_a_submission_that_is_given_up_is_deleted(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = await _die_between(make_hook, shell_job("exit 0", **SECRETIVE), monkeypatch)
    assert secret(kubernetes_cluster, submission.job) is not None
    await make_hook().release(submission.job)
    assert secret(kubernetes_cluster, submission.job) is None


async def test_secret_of_others_is_left_alone(kubernetes_cluster: KubernetesCluster, hook: KubernetesHook) -> None:
    job = shell_job("exit 0", **SECRETIVE)
    submission = await hook.prepare(job, new_submission())
    assert submission.job is not None
    path = f"/api/v1/namespaces/{kubernetes_cluster.namespace}/secrets"
    kubernetes_cluster.request("POST", path, {"metadata": {"name": name_of(submission.job)}})
    with pytest.raises(SubmissionRefused, match="Secret"):
        await hook.submit(job, submission)
    await hook.release(submission.job)
    assert secret(kubernetes_cluster, submission.job) is not None
    assert not exists(kubernetes_cluster, submission.job)


# --- deletion


async def test_deleted_by_somebody_is_killed(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    hook = make_hook()
    jobs = [(await submit(hook, shell_job("exec sleep 600")))[1] for _ in range(2)]
    for job in jobs:
        await until(hook, job, JobState.RUNNING)
    async with following(make_hook, *jobs) as (graceful, forced):
        await forced.until(JobState.RUNNING)
        kubernetes_cluster.delete_pod(name_of(jobs[0]))
        kubernetes_cluster.delete_pod(name_of(jobs[1]), 0)
        for follower in (graceful, forced):
            assert "deleted" in (await follower.until(JobState.KILLED, JobState.ABSENT)).message


async def test_deletion_does_not_hide_the_end(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    hook = make_hook()
    ended = {}
    for code, state in ((0, JobState.SUCCEEDED), (3, JobState.FAILED)):
        _, job = await submit(hook, shell_job(f"exit {code}"))
        await until(hook, job, state)
        ended[job] = state
    async with following(make_hook, *ended) as followers:
        for follower in followers:
            await follower.until(ended[follower.subscription.job])
            delete(kubernetes_cluster, follower.subscription.job)
            assert (await follower.until(*JobState)).state is ended[follower.subscription.job]


async def test_pod_that_vanished_is_no_success(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    """It ended, or not, while nobody looked. Upstream's operator takes the 404 that follows for a success."""
    hook = make_hook()
    submission, job = await submit(hook, shell_job("exec sleep 600"))
    await until(hook, job, JobState.RUNNING)
    delete(kubernetes_cluster, job, 0)
    assert (await hook.poll([job]))[job].state is JobState.ABSENT
    async with following(make_hook, job, interval=0.1) as (follower,):
        await follower.until(JobState.ABSENT)
    assert {status.state for status in follower.told} == {JobState.ABSENT}
    with pytest.raises(SubmissionUncertain, match="Somebody has deleted it") as uncertain:
        await hook.find(submission)
    assert uncertain.value.permanent, "its events tell that it was"


async def test_another_pod_of_that_name_is_not_the_job(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    hook = make_hook()
    _, job = await submit(hook, shell_job("exec sleep 600"))
    await until(hook, job, JobState.RUNNING)
    delete(kubernetes_cluster, job, 0)
    labels = {"durable-spark/token": name_of(job).rpartition("-")[2]}
    other = kubernetes_cluster.create_pod(name_of(job), {"containers": [{"command": ["true"]}]}, labels=labels)
    wait_until(
        lambda: kubernetes_cluster.pod(name_of(job))["status"]["phase"] == "Succeeded", 30, "the other pod to succeed"
    )
    async with following(make_hook, job, interval=0.1) as (follower,):
        await follower.until(JobState.ABSENT)
    assert {status.state for status in follower.told} == {JobState.ABSENT}
    await hook.kill(job)
    await hook.release(job)
    assert list(await hook.log_tail(job, 5)) == []
    assert kubernetes_cluster.pod(name_of(job))["metadata"]["uid"] == other["metadata"]["uid"]


async def test_held_pod_keeps_its_end_until_it_is_released(
    kubernetes_cluster: KubernetesCluster, hook: KubernetesHook
) -> None:
    """Deleted by whomever while nobody follows it, it stays to tell how it ended."""
    jobs = {}
    for script, state in (("exit 0", JobState.SUCCEEDED), ("exit 3", JobState.FAILED), ("exec sleep 600", None)):
        _, job = await submit(hook, shell_job(script, options={"hold_pod": True}))
        await until(hook, job, state or JobState.RUNNING)
        jobs[job] = state or JobState.KILLED
    for job, state in jobs.items():
        kubernetes_cluster.delete_pod(name_of(job))
        await until(hook, job, state)
        assert exists(kubernetes_cluster, job)
    for job in jobs:
        await hook.release(job)
        await hook.release(job)
        wait_until(lambda job=job: not exists(kubernetes_cluster, job), 30, f"{job} to go")  # type: ignore[misc]


async def test_held_pod_that_no_node_took_is_killed(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    """Held, it stays Pending for ever: nobody is left to give it another phase."""
    hook = make_hook()
    conf = {"spark.kubernetes.driver.node.selector.disk": "fast"}
    _, job = await submit(hook, shell_job("exit 0", conf=conf, options={"hold_pod": True}))
    await hook.kill(job)
    async with following(make_hook, job) as (follower,):
        assert "before it was given a node" in (await follower.until(JobState.KILLED)).message
    assert kubernetes_cluster.pod(name_of(job))["status"]["phase"] == "Pending"
    await hook.release(job)
    wait_until(lambda: not exists(kubernetes_cluster, job), 30, f"{job} to go")


async def test_pod_is_deleted_at_its_end_if_so_asked(
    kubernetes_cluster: KubernetesCluster, hook: KubernetesHook
) -> None:
    _, running = await submit(hook, shell_job("exec sleep 600", options={"pod_at_end": "delete"}))
    _, ended = await submit(hook, shell_job("exit 3", options={"pod_at_end": "delete", "hold_pod": True}))
    _, kept = await submit(hook, shell_job("exit 3"))
    await until(hook, running, JobState.RUNNING)
    for job in (ended, kept):
        await until(hook, job, JobState.FAILED)
    for job in (running, ended, kept):
        await hook.release(job)
    wait_until(lambda: not exists(kubernetes_cluster, ended), 30, f"{ended} to go")
    assert (await until(hook, running, *JobState)).state is JobState.RUNNING
    assert exists(kubernetes_cluster, kept)
    await hook.kill(running)


# --- kill


async def test_kill_leaves_the_driver_its_grace(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    hook = make_hook()
    script = "trap 'echo cleaning up; sleep 1; echo clean; exit 143' TERM; echo ready; while :; do sleep 0.1; done"
    _, job = await submit(
        hook, shell_job(script, pod={"spec": {"terminationGracePeriodSeconds": 30}}, options={"hold_pod": True})
    )
    wait_until(lambda: kubernetes_cluster.log(name_of(job)) == "ready\n", 30, "the trap to be set")
    began = time.monotonic()
    await hook.kill(job)
    assert time.monotonic() - began < 1, "kill does not wait for the end"
    status = await until(hook, job, JobState.KILLED)
    assert "exit code 143" in status.message
    assert list(await hook.log_tail(job, 5)) == ["ready", "cleaning up", "clean"]
    await hook.release(job)


async def test_kill_is_by_uid_and_spares_an_end(
    kubernetes_cluster: KubernetesCluster, hook: KubernetesHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pod ends between the look and the deletion: its end is not thrown away."""
    _, job = await submit(hook, shell_job("exec sleep 600"))
    await until(hook, job, JobState.RUNNING)
    look = Api.pod
    looks = 0

    async def look_then_end(self: Api, namespace: str, name: str) -> Any:
        nonlocal looks
        looks += 1
        pod = await look(self, namespace, name)
        if looks == 1:
            kubernetes_cluster.patch_status(name, {"phase": "Succeeded"})
        return pod

    with monkeypatch.context() as patch:
        patch.setattr(Api, "pod", look_then_end)
        await hook.kill(job)
    pod = kubernetes_cluster.pod(name_of(job))
    assert looks > 1
    assert "deletionTimestamp" not in pod["metadata"]
    delete(kubernetes_cluster, job, 0)


# --- pods that never start


@pytest.mark.parametrize(
    ("conf", "pod", "raw", "message"),
    [
        pytest.param({"spark.kubernetes.container.image": "no/such:image"}, {}, "ErrImageNeverPull", "no/such:image"),
        pytest.param(
            {
                "spark.kubernetes.container.image": "no/such:image",
                "spark.kubernetes.container.image.pullPolicy": "Always",
            },
            {},
            "ErrImagePull",
            "no/such:image",
        ),
        pytest.param({"spark.kubernetes.driver.node.selector.disk": "fast"}, {}, "Unschedulable", "node affinity"),
        pytest.param(
            {"spark.kubernetes.driver.secrets.no-such-secret": "/mnt/secret"},
            {},
            "ContainerCreating",
            'secret "no-such-secret" not found',
        ),
        pytest.param(
            {"spark.kubernetes.driver.secretKeyRef.KEY": "no-such-secret:key"},
            {},
            "CreateContainerConfigError",
            'secret "no-such-secret" not found',
        ),
    ],
)
async def test_pod_that_cannot_start_says_why(
    conf: dict[str, str],
    pod: dict[str, Any],
    raw: str,
    message: str,
    make_hook: MakeHook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kubernetes_hook, "EXPLAIN_AFTER", -1.0)
    monkeypatch.setattr(kubernetes_hook, "EXPLAIN_EVERY", 0.1)
    hook, began = make_hook(), time.time()
    _, job = await submit(hook, shell_job("exit 0", conf=conf, pod={"spec": pod}))
    async with following(make_hook, job, interval=0.2) as (follower,):
        deadline = time.monotonic() + 30
        status = await follower.until(JobState.PENDING)
        while raw not in status.raw or message not in status.message:
            assert await follower.subscription.changed(deadline - time.monotonic()), f"it says only {status}"
            status = await follower.until(JobState.PENDING)
    assert status.held_up_since == pytest.approx(began, abs=30)
    await hook.kill(job)
    await until(hook, job, JobState.KILLED)


# --- pods of others


async def test_pods_without_our_label_are_followed_by_name(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    """As they are adopted from upstream's operator: an absence from the labelled list says nothing about them."""
    refs = []
    for number in range(12):
        script = "exit 3" if number % 3 == 0 else "exec sleep 600"
        pod = kubernetes_cluster.create_pod(
            f"theirs-{number}-{new_submission().token[:8]}",
            {"containers": [{"command": ["sh", "-c", script]}], "terminationGracePeriodSeconds": 0},
            labels={"spark-role": "driver"} if number % 2 else {},
        )
        refs.append(JobRef(f"spark:{pod['metadata']['name']}"))
    async with following(make_hook, *refs) as followers:
        for number, follower in enumerate(followers):
            await follower.until(JobState.FAILED if number % 3 == 0 else JobState.RUNNING)
            assert JobState.ABSENT not in {status.state for status in follower.told}
    for ref in refs:
        kubernetes_cluster.delete_pod(name_of(ref), 0)


@pytest.mark.parametrize(
    "name", ["reports.nightly.driver", "long-" * 20 + "driver", "a." * 80 + "driver"], ids=["dots", "long", "both"]
)
async def test_pod_whose_name_is_no_label(
    name: str, kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    """As upstream's operator lets a user call it. Not to ask for it would be to call it absent."""
    name = f"{name}.{new_submission().token[:8]}"
    kubernetes_cluster.create_pod(
        name, {"containers": [{"command": ["sleep", "600"]}], "terminationGracePeriodSeconds": 0}
    )
    hook, job = make_hook(), JobRef(f"{kubernetes_cluster.namespace}:{name}")
    await until(hook, job, JobState.RUNNING)
    async with following(make_hook, job) as (follower,):
        await follower.until(JobState.RUNNING)
        await hook.kill(job)
        assert (await hook.poll([job]))[job].state is not JobState.RUNNING
        await follower.until(JobState.KILLED, JobState.ABSENT)
    assert not exists(kubernetes_cluster, job)


# --- credentials, rights and wrong connections

DRIVERS = {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "get", "list", "watch", "delete"]}
LOGS = {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]}


@pytest.mark.parametrize("user", ["token", "certificate", "exec"])
async def test_kubeconfig(user: Any, kubernetes_cluster: KubernetesCluster, connect: Connect) -> None:
    """Given by its path, or as its text."""
    path = kubernetes_cluster.kubeconfig(user=user)
    for kubeconfig in (str(path), path.read_text()):
        connection = {"conn_type": "durable_spark", "host": "k8s://", "extra": {"kubeconfig": kubeconfig}}
        hook = connect(connection, KubernetesHook)
        assert await hook.cluster() == [f"k8s://{kubernetes_cluster.url}"]
        assert "namespace 'spark'" in await hook.check()
        _, job = await submit(hook, shell_job("exit 0"))
        async with following(lambda: connect(connection, KubernetesHook), job) as (follower,):  # noqa: B023 used here
            await follower.until(JobState.SUCCEEDED)


async def test_rotated_token_is_read_anew(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook, tmp_path: Path
) -> None:
    """Projected tokens are replaced on disk; the old one is refused at some time."""
    file = tmp_path / "token"
    file.write_text(kubernetes_cluster.token)
    hook = make_hook(password=None, extra={"token-file": str(file)})
    _, job = await submit(hook, shell_job("exec sleep 600"))
    late = make_hook(password=None, extra={"token-file": str(file)})
    file.write_text("expired")
    with pytest.raises(AuthenticationFailed):
        await late.poll([job])
    file.write_text(kubernetes_cluster.token)
    await until(late, job, JobState.RUNNING)
    await hook.kill(job)


async def test_service_account_of_the_pod_that_airflow_runs_in(
    kubernetes_cluster: KubernetesCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its folder and its variables are all that a pod has of the cluster."""
    (tmp_path / "token").write_text(kubernetes_cluster.token)
    (tmp_path / "ca.crt").write_text(kubernetes_cluster.ca.read_text())
    (tmp_path / "namespace").write_text(kubernetes_cluster.namespace)
    monkeypatch.setattr(_kubernetes_access, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(kubernetes_cluster.port))
    hook = connect({"conn_type": "durable_spark", "host": "k8s://", "extra": {"in-cluster": True}})
    assert "namespace 'spark'" in await hook.check()
    _, job = await submit(hook, shell_job("exit 0"))
    await until(hook, job, JobState.SUCCEEDED)


async def test_connection_as_upstreams_operator_has_it(
    kubernetes_cluster: KubernetesCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type ``spark``, without credentials: they are those of the default kubeconfig, as for spark-submit."""
    monkeypatch.setenv("KUBECONFIG", str(kubernetes_cluster.kubeconfig()))
    upstream = {"conn_type": "spark", "host": "k8s://https://127.0.0.1", "port": kubernetes_cluster.port}
    hook = connect({**upstream, "extra": {"namespace": "spark", "deploy-mode": "cluster"}})
    assert "namespace 'spark'" in await hook.check()
    _, job = await submit(hook, shell_job("exit 0"))
    await until(hook, job, JobState.SUCCEEDED)


async def test_wrong_token_is_refused_and_is_not_shown(make_hook: MakeHook) -> None:
    hook = make_hook(password=PASSWORD)
    for attempt in (hook.check(), hook.prepare(shell_job("exit 0"), new_submission())):
        with pytest.raises(AuthenticationFailed, match="does not accept") as refused:
            await attempt
        assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize(
    ("rules", "missing"),
    [
        ([], ["create pods", "get pods", "list pods", "watch pods", "delete pods", "get pods/log"]),
        ([{**DRIVERS, "verbs": ["create", "get", "list", "delete"]}], ["watch pods", "get pods/log"]),
        ([DRIVERS, LOGS], []),
    ],
    ids=["none", "some", "all"],
)
async def test_check_names_the_rights_that_are_missing(
    rules: list[Any], missing: list[str], kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    token = kubernetes_cluster.token_for(f"rights-{len(rules)}-{len(missing)}", rules)
    hook = make_hook(password=token)
    if not missing:
        assert "without holding pods (patch pods), secret settings (create secrets" in await hook.check()
        return
    with pytest.raises(BadConfiguration) as caught:
        await hook.check()
    assert f"may not {', '.join(missing)} in namespace 'spark'" in str(caught.value)


async def test_without_the_right_to_create_nothing_is_submitted(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook
) -> None:
    token = kubernetes_cluster.token_for("reader", [{**DRIVERS, "verbs": ["get", "list", "watch"]}])
    hook, job = make_hook(password=token), shell_job("exit 0")
    submission = await hook.prepare(job, new_submission())
    with pytest.raises(SubmissionRefused, match="Test button"):
        await hook.submit(job, submission)
    assert await make_hook().find(submission) == Absent()


async def test_without_the_right_to_events_an_absence_is_believed_with_a_warning(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = make_hook(password=kubernetes_cluster.token_for("no-events", [DRIVERS]))
    submission, job = await submit(hook, shell_job("exit 0"))
    found = await hook.find(submission)
    assert isinstance(found, Found)
    assert found.status.job == job
    never = await hook.prepare(shell_job("exit 0"), new_submission())
    assert await hook.find(never) == Absent()
    assert "is not looked up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        pytest.param({"port": "free"}, ClusterUnreachable, "127.0.0.1", id="nothing at the port"),
        pytest.param({"port": "etcd"}, ClusterUnreachable, "no connection", id="no TLS at the port"),
        pytest.param({"host": "k8s://https://no-such-host.invalid"}, ClusterUnreachable, "no-such-host", id="host"),
        pytest.param({"host": "k8s://http://127.0.0.1"}, DurableJobError, "http", id="plain http where TLS is spoken"),
        pytest.param({"extra": {"ca": None}}, BadConfiguration, "'ca'", id="unknown authority"),
        pytest.param({"extra": {"ca": "/nowhere/ca.pem"}}, BadConfiguration, "'ca'", id="no such file"),
        pytest.param({"extra": {"namespace": "No_Namespace"}}, BadConfiguration, "'namespace'", id="no name"),
        pytest.param({"extra": {"kubeconfig": "/nowhere"}}, BadConfiguration, "kubeconfig", id="no kubeconfig"),
    ],
)
async def test_wrong_connection_is_named_before_anything_is_submitted(
    change: dict[str, Any],
    error: type[DurableJobError],
    named: str,
    kubernetes_cluster: KubernetesCluster,
    make_hook: MakeHook,
) -> None:
    etcd = next(part for part in kubernetes_cluster.etcd.command if "listen-client-urls" in part).rpartition(":")[2]
    ports = {"free": free_port(), "etcd": int(etcd)}
    if "port" in change:
        change = {**change, "port": ports[change["port"]]}
    hook = make_hook(**change)
    before = kubernetes_cluster.created_pods()
    for attempt in (hook.check(), hook.prepare(shell_job("exit 0"), new_submission())):
        with pytest.raises(error, match=named) as caught:
            await attempt
        assert kubernetes_cluster.token not in str(caught.value)
    assert kubernetes_cluster.created_pods() == before


async def test_namespace_that_does_not_exist_is_named(kubernetes_cluster: KubernetesCluster, connect: Connect) -> None:
    connection = kubernetes_cluster.connection()
    extra = {**connection["extra"], "namespace": "nowhere"}
    hook = connect({**connection, "password": kubernetes_cluster.admin_token, "extra": extra}, KubernetesHook)
    with pytest.raises(BadConfiguration, match="no namespace 'nowhere'"):
        await hook.check()
    job = shell_job("exit 0")
    submission = await hook.prepare(job, new_submission())
    with pytest.raises(SubmissionRefused, match='namespaces "nowhere" not found'):
        await hook.submit(job, submission)
