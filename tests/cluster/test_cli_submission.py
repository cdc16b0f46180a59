"""
Jobs that the real ``spark-submit`` submits: what it leaves when it ends well, and when it dies half-way.

The witness is the API server's audit log, and what the master lists; both are read without the hook.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import ssl
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from dev.processes import wait_until_async
from dev.proxy import Proxy
from dev.spark import SMALL_JVM, ensure_spark
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.jobs import (
    Absent,
    BadArguments,
    BadConfiguration,
    Found,
    JobRef,
    JobState,
    Submission,
    SubmissionUncertain,
    new_token,
)
from tests.cluster.test_standalone import processes_of
from tests.submitting import new_submission, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from dev.kubernetes import KubernetesCluster
    from dev.proxy import Hold
    from dev.spark import StandaloneCluster
    from durable_spark.hooks.cli import CliSubmission, SparkCliHook
    from tests.cluster.conftest import Connect

APPS = Path(__file__).parents[1] / "apps"
POD_NAME = "spark.kubernetes.driver.pod.name"
TOKEN, OWNER = "durable-spark/token", "durable-spark/owner"
_SCRIPT = 'shift $(($# - 2)); sleep "$1"; exit "$2"'

_WARNINGS_ALONE = """
rootLogger.level = warn
rootLogger.appenderRef.stderr.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
"""

FOLLOWING = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "delete"]}
EVENTS = {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]}
CONFIG_MAPS = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}
SUBMITTING = [
    {"apiGroups": [""], "resources": ["pods", "services", "configmaps"], "verbs": ["create", "get", "patch", "delete"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["create", "get", "patch"]},
]


class SparkSubmit:
    """
    A ``spark-submit`` that runs.

    :ivar lines: what it has printed up to now.
    :ivar job: what the hook has read in the lines.
    """

    def __init__(self, process: asyncio.subprocess.Process, hook: SparkCliHook, submission: Submission) -> None:
        self.process = process
        self.lines: list[str] = []
        self.job: JobRef | None = None
        self._hook, self._submission = hook, submission
        self._reading = asyncio.create_task(self._read())

    @classmethod
    @contextlib.asynccontextmanager
    async def started(
        cls,
        hook: SparkCliHook,
        plan: CliSubmission,
        *arguments: str,
        conf: Mapping[str, str],
        **variables: str,
    ) -> AsyncIterator[SparkSubmit]:
        """Start one with the plan's properties, and kill it at the end of the block."""
        spark = ensure_spark()
        environment = {name: value for name, value in spark.environment().items() if name != "PYSPARK_PYTHON"}
        environment["SPARK_LAUNCHER_OPTS"] = SMALL_JVM
        properties = {**conf, **plan.conf}
        process = await asyncio.create_subprocess_exec(
            f"{spark.home}/bin/spark-submit",
            *("--deploy-mode", "cluster"),
            *(part for name, value in properties.items() for part in ("--conf", f"{name}={value}")),
            *arguments,
            env=environment | variables,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        submit = cls(process, hook, plan.submission)
        try:
            yield submit
        finally:
            await submit.kill()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().rstrip("\n"))
            self.job = self.job or self._hook.job_in(self.lines[-1], self._submission)

    async def leaves(self, code: int = 0) -> None:
        """Wait for it to end with an exit code."""
        found = await asyncio.wait_for(self.process.wait(), 90)
        await self._reading
        assert found == code, "\n".join(self.lines)

    async def kill(self) -> None:
        """Kill it, as the kernel does when its parent has died."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        await self._reading


async def glimpsed(hook: SparkCliHook, submission: Submission, deadline: float = 60) -> JobRef:
    async def look() -> JobRef | None:
        return await hook.glimpse(submission)

    return await wait_until_async(look, deadline, "a glimpse of the job", interval=0.2)


async def found(hook: SparkCliHook, submission: Submission) -> JobRef:
    answer = await hook.find(submission)
    assert isinstance(answer, Found)
    assert not answer.younger
    return answer.status.job


# --- Kubernetes


@dataclasses.dataclass(frozen=True)
class Namespace:
    """The namespace of a Kubernetes cluster, as a worker with ``spark-submit`` sees it."""

    cluster: KubernetesCluster
    connect: Connect
    template: Path

    def hook(self, *rules: Mapping[str, Any]) -> KubernetesHook:
        """Return a hook whose connection has these rights."""
        token = self.cluster.token_for(f"follower-{len(rules)}", rules or [FOLLOWING, EVENTS, CONFIG_MAPS])
        hook: KubernetesHook = self.connect({**self.cluster.connection(), "password": token}, KubernetesHook)
        return hook

    def conf(self, **changes: str) -> dict[str, str]:
        return {
            **self.cluster.conf(),
            "spark.kubernetes.namespace": self.cluster.namespace,
            "spark.kubernetes.driver.podTemplateFile": str(self.template),
            **changes,
        }

    def submit(
        self,
        hook: KubernetesHook,
        plan: CliSubmission,
        *,
        seconds: float = 600,
        code: int = 0,
        master: str | None = None,
    ) -> contextlib.AbstractAsyncContextManager[SparkSubmit]:
        """Start a ``spark-submit`` that has credentials of its own, for a driver that is a shell script."""
        token = self.cluster.token_for("spark-submit", SUBMITTING)
        access = {
            "spark.kubernetes.authenticate.submission.caCertFile": str(self.cluster.ca),
            "spark.kubernetes.authenticate.submission.oauthToken": token,
        }
        application = ("--class", "Nothing", "local:///nothing.jar", str(seconds), str(code))
        return SparkSubmit.started(
            hook,
            plan,
            *("--master", f"k8s://{master or self.cluster.url}"),
            *application,
            conf={**self.conf(), **access},
            KUBECONFIG="/nonexistent",
        )

    def created(self, submission: Submission) -> list[str]:
        """Return the uids of all pods that ever carried the submission's token, by the audit log."""
        return [
            entry["responseObject"]["metadata"]["uid"]
            for entry in self.cluster.audit()
            if entry["verb"] == "create"
            and entry["objectRef"]["resource"] == "pods"
            and entry["responseStatus"]["code"] == 201
            and entry["responseObject"]["metadata"].get("labels", {}).get(TOKEN) == submission.token
        ]

    def there(self, submission: Submission) -> list[str]:
        """Return the uids of the pods that carry the token now."""
        return [pod["metadata"]["uid"] for pod in self.cluster.pods(f"{TOKEN}={submission.token}")]

    def config_maps(self) -> set[str]:
        path = f"/api/v1/namespaces/{self.cluster.namespace}/configmaps"
        return {each["metadata"]["name"] for each in self.cluster.request("GET", path)["items"]}

    @contextlib.contextmanager
    def proxy(self) -> Any:
        """Stand between ``spark-submit`` and the API server."""
        tls = ssl.create_default_context(cafile=str(self.cluster.ca))
        with Proxy(self.cluster.url, tls=tls) as proxy:
            yield proxy


@pytest.fixture
def namespace(kubernetes_cluster: KubernetesCluster, connect: Connect, tmp_path: Path) -> Namespace:
    template = tmp_path / "driver.yaml"
    spec = {
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "driver", "command": ["sh", "-c", _SCRIPT, "-"]}],
    }
    template.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "spec": spec}))
    return Namespace(kubernetes_cluster, connect, template)


async def test_pod_of_spark_submit_from_its_making_to_its_end(namespace: Namespace) -> None:
    hook = namespace.hook()
    plan = await hook.prepare_cli(namespace.conf(), new_submission())
    submission = plan.submission
    assert await hook.glimpse(submission) is None
    async with namespace.submit(hook, plan) as submit:
        seen = await glimpsed(hook, submission)
        await submit.leaves()
    assert submission.job is not None
    assert submit.job == submission.job, "\n".join(submit.lines)
    retry = namespace.hook()
    assert await found(retry, submission) == seen
    assert namespace.created(submission) == namespace.there(submission) == [seen.uid]
    (owned,) = [job for job in await retry.find_owned("tests") if job.token == submission.token]
    assert (owned.status.job, owned.owner) == (seen, submission.owner)
    await until(retry, submit.job, JobState.RUNNING)
    await retry.kill(seen)
    await until(retry, submit.job, JobState.KILLED, JobState.ABSENT)


async def test_pod_that_was_left_half_made_is_deleted_and_made_again(
    namespace: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    hook = namespace.hook()
    plan = await hook.prepare_cli(namespace.conf(), new_submission())
    submission = plan.submission
    with namespace.proxy() as proxy:
        hold: Hold = proxy.hold("PATCH", r"/configmaps/spark-drv-")
        async with namespace.submit(hook, plan, master=proxy.url) as submit:
            held = await asyncio.to_thread(hold.wait)
            made = time.monotonic()
            assert await hook.glimpse(submission) is None, "a half-made pod was taken for the job"
            await submit.kill()
    (half,) = namespace.there(submission)
    retry = namespace.hook()
    assert await retry.find(submission) == Absent()
    assert time.monotonic() - made > retry.half_submitted_after - 2, "its spark-submit might still have been at it"
    assert "left half-made" in caplog.text
    assert namespace.there(submission) == []
    assert await namespace.hook().find(submission) == Absent(), "the traces of what was deleted prove nothing"

    async with namespace.submit(retry, plan, seconds=0, code=3) as submit:
        await submit.leaves()
    again = await found(retry, submission)
    assert namespace.created(submission) == [half, again.uid]
    assert (await until(retry, again, JobState.FAILED)).raw == "Failed"
    (now,) = namespace.cluster.pods(f"{TOKEN}={submission.token}")
    mounted = {volume["configMap"]["name"] for volume in now["spec"]["volumes"] if "configMap" in volume}
    assert held.path.partition("?")[0].rpartition("/")[2] not in mounted, "a late PATCH would meet the new pod"


async def test_half_made_pod_is_told_by_the_kubelet_where_config_maps_may_not_be_read(namespace: Namespace) -> None:
    hook = namespace.hook(FOLLOWING, EVENTS)
    hook.half_submitted_after = 3.0
    submission = await _half_made(namespace, hook)
    assert await hook.find(submission) == Absent()
    assert namespace.there(submission) == []


async def test_half_made_pod_is_not_deleted_on_suspicion(
    namespace: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither config maps nor events may be read: it is taken for whole, and a person is told."""
    hook = namespace.hook(FOLLOWING)
    hook.half_submitted_after, hook.untold_patience = 1.0, 3.0
    submission = await _half_made(namespace, hook)
    job = await found(hook, submission)
    assert namespace.there(submission) == [job.uid]
    assert "grant the right to get config maps" in capsys.readouterr().out
    await hook.kill(job)


async def test_config_map_that_comes_late_makes_the_pod_whole(namespace: Namespace) -> None:
    hook = namespace.hook()
    submission = await _half_made(namespace, hook)
    finding = asyncio.create_task(hook.find(submission))
    await asyncio.sleep(1.5)
    assert not finding.done()
    (pod,) = namespace.cluster.pods(f"{TOKEN}={submission.token}")
    maps = f"/api/v1/namespaces/{namespace.cluster.namespace}/configmaps"
    (name,) = [volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume]
    namespace.cluster.request("POST", maps, {"metadata": {"name": name}, "data": {"spark.properties": ""}})
    answer = await finding
    assert isinstance(answer, Found)
    await until(hook, answer.status.job, JobState.RUNNING)
    await hook.kill(answer.status.job)


async def test_what_was_deleted_after_it_ran_is_no_absence(namespace: Namespace) -> None:
    hook = namespace.hook()
    submission = await _half_made(namespace, hook)
    (pod,) = namespace.cluster.pods(f"{TOKEN}={submission.token}")
    name = next(volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume)
    maps = f"/api/v1/namespaces/{namespace.cluster.namespace}/configmaps"
    namespace.cluster.request("POST", maps, {"metadata": {"name": name}, "data": {"spark.properties": ""}})
    job = JobRef(f"{namespace.cluster.namespace}:{pod['metadata']['name']}", pod["metadata"]["uid"])
    await until(hook, job, JobState.RUNNING)
    namespace.cluster.delete_pod(pod["metadata"]["name"], 0)
    with pytest.raises(SubmissionUncertain, match="Somebody has deleted it"):
        await hook.find(submission)


async def _half_made(namespace: Namespace, hook: KubernetesHook) -> Submission:
    """Leave a pod as a ``spark-submit`` does that dies before it has made the config map."""
    plan = await hook.prepare_cli(namespace.conf(), new_submission())
    assert plan.submission.job is not None
    labels = {
        key.removeprefix("spark.kubernetes.driver.label."): value
        for key, value in plan.conf.items()
        if key.startswith("spark.kubernetes.driver.label.")
    }
    volume = "spark-conf-volume-driver"
    container = {"command": ["sleep", "600"], "volumeMounts": [{"name": volume, "mountPath": "/opt/spark/conf"}]}
    spec = {
        "containers": [container],
        "volumes": [{"name": volume, "configMap": {"name": f"spark-drv-{new_token()[:16]}-conf-map"}}],
        "terminationGracePeriodSeconds": 1,
    }
    namespace.cluster.create_pod(plan.submission.job.id.partition(":")[2], spec, labels=labels)
    return plan.submission


# --- the user's own name of a pod


async def test_own_pod_name_is_free_again_when_the_task_runs_again(
    namespace: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    name = f"reports.{'nightly-' * 8}{new_token()[:8]}.driver"
    hook, conf = namespace.hook(), namespace.conf(**{POD_NAME: name})
    first = dataclasses.replace(new_submission(), cluster_time=None)
    plan = await hook.prepare_cli(conf, first)
    assert plan.submission.job == JobRef(f"{namespace.cluster.namespace}:{name}")
    async with namespace.submit(hook, plan, seconds=0, code=3) as submit:
        await submit.leaves()
    ended = await found(hook, plan.submission)
    await until(hook, ended, JobState.FAILED)

    second = dataclasses.replace(first, token=new_token(), ordinal=2)
    stranger = dataclasses.replace(second, owner=new_token())
    with pytest.raises(BadArguments, match=rf"(?s){POD_NAME}.*another task made it \(tests\.task"):
        await hook.prepare_cli(conf, stranger)
    plan = await hook.prepare_cli(conf, second)
    assert "it has ended, and its name is wanted" in caplog.text
    assert await hook.find(plan.submission) == Absent(), "the events of the first pod are not of the second"
    async with namespace.submit(hook, plan) as submit:
        await submit.leaves()
    running = await found(hook, plan.submission)
    assert running.uid != ended.uid
    with pytest.raises(BadArguments, match="has not ended"):
        await hook.prepare_cli(conf, dataclasses.replace(second, token=new_token()))
    assert (await hook.prepare_cli(conf, second)).submission.job == plan.submission.job
    await hook.kill(running)


async def test_own_pod_name_that_somebody_else_has(namespace: Namespace) -> None:
    name = f"theirs-{new_token()[:8]}"
    pod = namespace.cluster.create_pod(name, {"containers": [{"command": ["true"]}]}, labels={OWNER: "x"})
    hook = namespace.hook()
    await until(hook, JobRef(f"spark:{name}"), JobState.SUCCEEDED)
    with pytest.raises(BadArguments, match=rf"{POD_NAME} is '{name}'.*none of this package's"):
        await hook.prepare_cli(namespace.conf(**{POD_NAME: name}), new_submission())
    assert namespace.cluster.pod(name)["metadata"]["uid"] == pod["metadata"]["uid"]
    namespace.cluster.delete_pod(name, 0)


async def test_connection_that_may_not_read_pods_is_named_before_anything_is_submitted(namespace: Namespace) -> None:
    hook = namespace.hook(EVENTS)
    with pytest.raises(BadConfiguration, match=r"do not let pods be read in namespace 'spark'.*'kubeconfig'"):
        await hook.prepare_cli(namespace.conf(), new_submission())


# --- standalone


@pytest.fixture
def jar(tmp_path: Path) -> Path:
    path = tmp_path / "nothing.jar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nothing", "")
    return path


def driver(jar: Path, seconds: float, code: int = 0) -> Sequence[str]:
    compiler = ("--class", "org.codehaus.janino.SimpleCompiler", "--driver-memory", "128m")
    return (*compiler, str(jar), str(APPS / "Driver.java"), "Driver", str(seconds), str(code))


QUICK = {"spark.driver.extraJavaOptions": SMALL_JVM}
WAIT = {"spark.standalone.submit.waitAppCompletion": "true"}


async def test_driver_of_spark_submit_from_its_launch_to_its_end(
    standalone_cluster: StandaloneCluster, connect: Connect, jar: Path
) -> None:
    hook = connect(standalone_cluster.connection(), StandaloneHook)
    before = {each.id for each in standalone_cluster.drivers()}
    plan = await hook.prepare_cli(QUICK | WAIT, new_submission())
    never = await hook.prepare_cli(QUICK, new_submission())
    async with SparkSubmit.started(
        hook, plan, "--master", standalone_cluster.url, *driver(jar, 600), conf=QUICK | WAIT, SPARK_MINE="seen"
    ) as submit:
        seen = await glimpsed(hook, plan.submission)
        assert submit.process.returncode is None, "spark-submit stays for seconds: it is to be seen before"
        retry = connect(standalone_cluster.connection(), StandaloneHook)
        assert await found(retry, plan.submission) == seen
        await submit.leaves()
    assert submit.job == seen, "\n".join(submit.lines)
    assert await retry.find(never.submission) == Absent()
    assert await retry.glimpse(never.submission) is None
    assert {each.id for each in standalone_cluster.drivers()} - before == {seen.id}
    (owned,) = [job for job in await retry.find_owned("tests") if job.token == plan.submission.token]
    assert owned.owner == plan.submission.owner
    assert await _environment_of(seen, "SPARK_MINE") == "seen", "the environment of spark-submit stays where it is"
    await retry.kill(seen)
    await until(retry, seen, JobState.KILLED)


async def _environment_of(job: JobRef, name: str) -> str | None:
    async def started() -> list[Path]:
        return processes_of(job.id)

    path, *_ = await wait_until_async(started, 30, "the driver's process")
    variables = dict(line.partition("=")[::2] for line in path.with_name("environ").read_text().split("\0"))
    return variables.get(name)


async def test_driver_by_rest_and_one_that_nobody_tells_of(
    standalone_cluster: StandaloneCluster, connect: Connect, jar: Path, tmp_path: Path
) -> None:
    """With a log level above INFO, spark-submit does not say what the master answered."""
    hook = connect(standalone_cluster.connection(), StandaloneHook)
    rest = {"spark.master.rest.enabled": "true", **QUICK}
    spoken = await hook.prepare_cli(rest, new_submission())
    master = f"spark://127.0.0.1:{standalone_cluster.master.rest_port}"
    async with SparkSubmit.started(hook, spoken, "--master", master, *driver(jar, 0, 3), conf=rest) as submit:
        await submit.leaves()
    assert submit.job is not None, "\n".join(submit.lines)
    assert await found(hook, spoken.submission) == submit.job
    await until(hook, submit.job, JobState.FAILED)

    (tmp_path / "log4j2.properties").write_text(_WARNINGS_ALONE)
    silent = await hook.prepare_cli(QUICK, new_submission())
    async with SparkSubmit.started(
        hook,
        silent,
        *("--master", standalone_cluster.url, *driver(jar, 0)),
        conf=QUICK,
        SPARK_CONF_DIR=str(tmp_path),
    ) as submit:
        seen = await glimpsed(hook, silent.submission)
        await submit.leaves()
    assert submit.job is None
    assert await found(hook, silent.submission) == seen
    await until(hook, seen, JobState.SUCCEEDED)
