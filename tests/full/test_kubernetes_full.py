"""
What only containers show: a real kubelet's words for a driver that needs too much memory, and what outlives whom.

Run with ``scripts/test --full-kubernetes``. What holds on any node is in the suites ``contract`` and ``cluster``, which
that switch gives the same kubelet.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dev.processes import wait_until
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.jobs import JobState
from tests.conftest import FULL_KUBERNETES
from tests.kubernetes import shell_job, spark_job
from tests.submitting import following, submit, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from dev.kubernetes import KubernetesCluster
    from durable_spark.jobs import JobRef

    MakeHook = Callable[[], KubernetesHook]

pytestmark = pytest.mark.skipif(not FULL_KUBERNETES, reason="only with scripts/test --full-kubernetes")


@pytest.fixture
def make_hook(kubernetes_cluster: KubernetesCluster, monkeypatch: pytest.MonkeyPatch) -> MakeHook:
    monkeypatch.setenv("AIRFLOW_CONN_FULL", json.dumps(kubernetes_cluster.connection()))
    return lambda: KubernetesHook("full")


def container(cluster: KubernetesCluster, job: JobRef) -> dict[str, Any]:
    state: dict[str, Any] = cluster.pod(job.id.partition(":")[2])["status"]["containerStatuses"][0]["state"]
    return state


def machine(pid: int) -> list[str]:
    """Return the names of the namespaces that a process is in."""
    return [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "net", "pid")]


def descendants(pid: int) -> dict[int, str]:
    """Return the processes that a process has started, and those that they have, with their names."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found[int(child)] = Path(f"/proc/{child}/comm").read_text().strip()
        found |= descendants(int(child))
    return found


async def test_spark_runs_with_an_executor(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    conf = kubernetes_cluster.conf()
    hook = make_hook()
    submission, job = await submit(hook, spark_job(0, conf=conf))
    async with following(make_hook, job) as (follower,):
        await follower.until(JobState.RUNNING, deadline=120)
        await follower.until(JobState.SUCCEEDED, deadline=120)
    log = "\n".join(await hook.log_tail(job, 500))
    assert f"app=spark-{submission.token} total=4950" in log
    selector = f"spark-app-selector=spark-{submission.token}"
    assert [pod["metadata"]["labels"]["spark-role"] for pod in kubernetes_cluster.pods(selector)] == ["driver"]
    await hook.aclose()


async def test_exit_code_and_last_words(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    async with make_hook() as hook:
        _, job = await submit(hook, shell_job("echo first; echo last; exit 7"))
        status = await until(hook, job, JobState.FAILED)
        assert "exit code 7" in status.message
        assert await hook.log_tail(job, 1) == ["last"]
        assert container(kubernetes_cluster, job)["terminated"]["containerID"].startswith("containerd://")


async def test_driver_that_needs_too_much_memory(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    conf = {"spark.driver.memory": "32m", "spark.driver.memoryOverhead": "32m"}
    async with make_hook() as hook:
        _, job = await submit(hook, shell_job("head -c 500m /dev/zero | tail -c 500m >/dev/null", conf=conf))
        status = await until(hook, job, JobState.FAILED)
        ended = container(kubernetes_cluster, job)["terminated"]
        assert ended["reason"] == "OOMKilled"
        assert "OOMKilled" in status.message


@pytest.mark.parametrize(("answer", "code"), [("echo bye; exit 143", 143), ("", 137)], ids=["obeyed", "ignored"])
async def test_kill_sends_sigterm_and_then_sigkill(
    kubernetes_cluster: KubernetesCluster, make_hook: MakeHook, answer: str, code: int
) -> None:
    script = f"trap '{answer}' TERM; echo up; while :; do sleep 0.05; done"
    async with make_hook() as hook:
        _, job = await submit(hook, shell_job(script, options={"hold_pod": True}))
        wait_until(lambda: kubernetes_cluster.log(job.id.partition(":")[2]) == "up\n", 30, "the driver")
        await hook.kill(job)
        status = await until(hook, job, JobState.KILLED)
        assert f"exit code {code}" in status.message
        assert await hook.log_tail(job, 5) == (["up", "bye"] if answer else ["up"])
        await hook.release(job)


async def test_driver_outlives_the_kubelet(kubernetes_cluster: KubernetesCluster, make_hook: MakeHook) -> None:
    """The node's init starts the kubelet again, and it takes over the container that it finds."""
    async with make_hook() as hook:
        _, job = await submit(hook, shell_job("sleep 8; exit 3"))
        await until(hook, job, JobState.RUNNING)
        began = container(kubernetes_cluster, job)["running"]["startedAt"]
        (kubelet,) = (pid for pid, name in descendants(kubernetes_cluster.node.pid).items() if name == "kubelet")
        os.kill(kubelet, signal.SIGKILL)
        status = await until(hook, job, JobState.FAILED)
        assert "exit code 3" in status.message
        assert container(kubernetes_cluster, job)["terminated"]["startedAt"] == began


def test_the_node_is_a_machine_of_its_own(kubernetes_cluster: KubernetesCluster) -> None:
    inside = {name: pid for pid, name in descendants(kubernetes_cluster.node.pid).items()}
    for name in ("containerd", "kubelet"):
        assert not set(machine(inside[name])) & set(machine(os.getpid()))
    assert str(kubernetes_cluster.directory) not in Path("/proc/mounts").read_text()
    assert "pods" not in os.listdir("/sys/class/net")
