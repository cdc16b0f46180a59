"""
The cluster of tests does what a real one does, where tests rely on it.

With ``scripts/test --full-kubernetes cluster`` these run on a real kubelet: what holds on one node must hold on the
other.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dev.kubernetes import KubernetesCluster, RequestFailed
from dev.processes import wait_until
from tests.conftest import FULL_KUBERNETES

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., str]


@pytest.fixture
def run(kubernetes_cluster: KubernetesCluster) -> Iterator[Run]:
    """Return a function that creates a pod, of a shell script or of a whole container, and returns its name."""
    names = []

    def run(container: str | dict[str, Any], /, *, finalizers: list[str] | None = None, **spec: Any) -> str:
        name = f"pod-{secrets.token_hex(4)}"
        if isinstance(container, str):
            container = {"command": ["sh", "-c", container]}
        metadata = {"finalizers": finalizers} if finalizers else {}
        kubernetes_cluster.create_pod(name, {**spec, "containers": [container]}, **metadata)
        names.append(name)
        return name

    yield run
    for name in names:
        with contextlib.suppress(RequestFailed):  # it may have gone
            kubernetes_cluster.delete_pod(name, grace=0)


@pytest.fixture
def until(kubernetes_cluster: KubernetesCluster) -> Callable[..., dict[str, Any]]:
    """Return a function that waits until a pod meets a condition, and returns it then."""

    def until(name: str, meets: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        def pod() -> dict[str, Any] | None:
            seen = kubernetes_cluster.pod(name)
            return seen if meets(seen) else None

        return wait_until(pod, 30, name)

    return until


def phase(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda pod: pod["status"].get("phase") in names


def container(pod: dict[str, Any]) -> dict[str, Any]:
    statuses = pod["status"].get("containerStatuses") or [{}]
    state: dict[str, Any] = statuses[0].get("state", {})
    return state


def waits(*reasons: str) -> Callable[[dict[str, Any]], bool]:
    return lambda pod: container(pod).get("waiting", {}).get("reason") in reasons


def names_of(cluster: KubernetesCluster) -> list[str]:
    return [pod["metadata"]["name"] for pod in cluster.pods()]


def reasons(cluster: KubernetesCluster, name: str) -> dict[str, str]:
    """Return the messages of a pod's events by their reasons."""
    return {event["reason"]: event["message"] for event in cluster.events(name)}


@pytest.mark.parametrize(("code", "ending", "why"), [(0, "Succeeded", "Completed"), (7, "Failed", "Error")])
def test_exit_code(run: Run, until: Callable[..., Any], code: int, ending: str, why: str) -> None:
    pod = until(run(f"exit {code}"), phase("Succeeded", "Failed"))
    assert pod["status"]["phase"] == ending
    ended = container(pod)["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (code, why)
    assert ended["startedAt"] <= ended["finishedAt"]


def test_log(kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]) -> None:
    name = run("for i in 1 2 3 4; do echo line $i; done; sleep 0.3; echo to stderr >&2")  # two pipes have no order
    until(name, phase("Succeeded"))
    assert kubernetes_cluster.log(name).startswith("line 1\nline 2\n")
    assert kubernetes_cluster.log(name, "tailLines=2") == "line 4\nto stderr\n"
    assert kubernetes_cluster.log(name, "limitBytes=6") == "line 1"


def test_last_words_in_the_status(run: Run, until: Callable[..., Any]) -> None:
    container_of = {"command": ["sh", "-c", "echo why; exit 1"], "terminationMessagePolicy": "FallbackToLogsOnError"}
    assert container(until(run(container_of), phase("Failed")))["terminated"]["message"] == "why\n"


def test_deletion_sends_sigterm_and_a_finalizer_keeps_the_outcome(
    kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]
) -> None:
    name = run("trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done", finalizers=["example.com/test"])
    wait_until(lambda: "up" in kubernetes_cluster.log(name), 30, "the container")
    kubernetes_cluster.delete_pod(name)
    pod = until(name, phase("Succeeded", "Failed"))
    assert container(pod)["terminated"]["exitCode"] == 5
    assert pod["metadata"]["deletionTimestamp"]
    assert kubernetes_cluster.log(name) == "up\nbye\n"
    path = f"/api/v1/namespaces/spark/pods/{name}"
    nothing = {"metadata": {"finalizers": None}}
    kubernetes_cluster.request("PATCH", path, nothing, content_type="application/merge-patch+json")
    wait_until(lambda: name not in names_of(kubernetes_cluster), 10, "the pod to go")


def test_deletion_sends_sigkill_when_the_grace_period_is_over(
    kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]
) -> None:
    name = run("trap '' TERM; echo up; while :; do sleep 0.05; done", finalizers=["example.com/test"])
    wait_until(lambda: "up" in kubernetes_cluster.log(name), 30, "the container")
    began = time.monotonic()
    kubernetes_cluster.delete_pod(name, grace=1)
    pod = until(name, phase("Failed"))
    assert container(pod)["terminated"]["exitCode"] == 128 + signal.SIGKILL
    assert 0.9 < time.monotonic() - began < 20
    path = f"/api/v1/namespaces/spark/pods/{name}"
    nothing = {"metadata": {"finalizers": None}}
    kubernetes_cluster.request("PATCH", path, nothing, content_type="application/merge-patch+json")


def test_unknown_image(kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]) -> None:
    image = "localhost:1/never:was"
    pulled = run({"image": image, "imagePullPolicy": "IfNotPresent", "command": ["true"]})
    local = run({"image": image, "imagePullPolicy": "Never", "command": ["true"]})
    until(pulled, waits("ErrImagePull", "ImagePullBackOff"))
    assert phase("Pending")(until(pulled, waits("ImagePullBackOff")))
    wait_until(lambda: {"Failed", "BackOff"} <= reasons(kubernetes_cluster, pulled).keys(), 10, "the events")
    assert image in reasons(kubernetes_cluster, pulled)["BackOff"]
    assert phase("Pending")(until(local, waits("ErrImageNeverPull")))


def test_no_node_fits(kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]) -> None:
    name = run("exit 0", nodeSelector={"example.com/disk": "big"})
    pod = until(name, lambda pod: pod["status"].get("conditions"))
    condition = pod["status"]["conditions"][0]
    assert (condition["type"], condition["status"], condition["reason"]) == ("PodScheduled", "False", "Unschedulable")
    assert condition["message"].startswith(
        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector"
    )
    assert phase("Pending")(pod)
    assert "containerStatuses" not in pod["status"]
    wait_until(lambda: "FailedScheduling" in reasons(kubernetes_cluster, name), 10, "the event")


def test_config_map_that_comes_late(kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]) -> None:
    late = f"late-{secrets.token_hex(4)}"
    name = run(
        {"command": ["cat", "/mnt/late/key"], "volumeMounts": [{"name": "late", "mountPath": "/mnt/late"}]},
        volumes=[{"name": "late", "configMap": {"name": late}}],
    )
    assert phase("Pending")(until(name, waits("ContainerCreating")))
    wait_until(lambda: "FailedMount" in reasons(kubernetes_cluster, name), 30, "the event")
    assert f'configmap "{late}" not found' in reasons(kubernetes_cluster, name)["FailedMount"]

    def told_again() -> bool:
        (event,) = [each for each in kubernetes_cluster.events(name) if each["reason"] == "FailedMount"]
        return bool(event["count"] > 1)

    wait_until(told_again, 30, "the event to be counted")
    body = {"metadata": {"name": late}, "data": {"key": "at last\n"}}
    kubernetes_cluster.request("POST", "/api/v1/namespaces/spark/configmaps", body)
    until(name, phase("Succeeded"))
    assert kubernetes_cluster.log(name) == "at last\n"


def test_volume_that_nobody_mounts_may_be_missing(run: Run, until: Callable[..., Any]) -> None:
    absent = {"name": "absent", "configMap": {"name": "never-was"}}
    until(run({"command": ["true"]}, volumes=[absent]), phase("Succeeded"))


def test_secret_that_is_missing(run: Run, until: Callable[..., Any]) -> None:
    variable = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "never-was", "key": "key"}}}
    pod = until(run({"command": ["true"], "env": [variable]}), waits("CreateContainerConfigError"))
    assert container(pod)["waiting"]["message"] == 'secret "never-was" not found'


def test_command_that_is_missing(run: Run, until: Callable[..., Any]) -> None:
    ended = container(until(run({"command": ["never-was"]}), phase("Failed")))["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert 'exec: "never-was": executable file not found in $PATH' in ended["message"]


def test_deadline(run: Run, until: Callable[..., Any]) -> None:
    pod = until(run("exec sleep 600", activeDeadlineSeconds=1, terminationGracePeriodSeconds=1), phase("Failed"))
    assert pod["status"]["reason"] == "DeadlineExceeded"


def test_what_a_container_sees(kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]) -> None:
    service_account = "/var/run/secrets/kubernetes.io/serviceaccount"
    script = f"""
        cat {service_account}/namespace; echo
        echo $NAME $BOTH $IP $(cat /data/file) $$ $KUBERNETES_SERVICE_PORT_HTTPS
        hostname
    """
    name = run(
        {
            "command": ["sh", "-c", script],
            "env": [
                {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "BOTH", "value": "$(NAME)-$$(NAME)"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            ],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        },
        volumes=[{"name": "data", "secret": {"secretName": f"data-{kubernetes_cluster.port}"}}],
    )
    secret = {"metadata": {"name": f"data-{kubernetes_cluster.port}"}, "stringData": {"file": "content"}}
    kubernetes_cluster.request("POST", "/api/v1/namespaces/spark/secrets", secret)
    pod = until(name, phase("Succeeded", "Failed"))
    namespace, line, *_ = kubernetes_cluster.log(name).splitlines()
    assert namespace == "spark"
    assert line.split()[:4] == [name, f"{name}-$(NAME)", pod["status"]["podIP"], "content"]


def test_pods_outlive_the_api_server(
    kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any], tmp_path: Path
) -> None:
    go_on = tmp_path / "go-on"
    mount = {"name": "shared", "mountPath": "/shared"}
    script = f"echo up; while [ ! -e /shared/{go_on.name} ]; do sleep 0.05; done; exit 3"
    shared = {"name": "shared", "hostPath": {"path": str(tmp_path)}}
    name = run({"command": ["sh", "-c", script], "volumeMounts": [mount]}, volumes=[shared])
    wait_until(lambda: "up" in kubernetes_cluster.log(name), 30, "the container")
    before = container(until(name, phase("Running")))["running"]
    kubernetes_cluster.api_server.kill()
    with pytest.raises(OSError, match="refused"):
        kubernetes_cluster.ready()
    kubernetes_cluster.api_server.start()
    wait_until(kubernetes_cluster.ready, 30, "the API server")
    assert container(until(name, phase("Running")))["running"] == before
    go_on.touch()
    assert container(until(name, phase("Failed")))["terminated"]["exitCode"] == 3


def test_pods_do_not_outlive_the_node(
    kubernetes_cluster: KubernetesCluster, run: Run, until: Callable[..., Any]
) -> None:
    name = run("exec sleep 600")
    until(name, phase("Running"))
    kubernetes_cluster.restart_node()
    assert not abandoned_cgroups()
    until(name, phase("Failed"))
    until(run("exit 0"), phase("Succeeded"))


def allowed(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """Return what rules allow, as (API group, resource, verb), without what anybody may."""
    anybody = {"authorization.k8s.io", "authentication.k8s.io"}
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule.get("apiGroups", [])
        for resource in rule.get("resources", [])
        for verb in rule["verbs"]
        if group not in anybody
    }


def test_the_submitter_may_do_what_the_documentation_grants(kubernetes_cluster: KubernetesCluster) -> None:
    manifests = yaml.safe_load_all((ROOT / "docs" / "kubernetes" / "rbac.yaml").read_text())
    roles = {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == "Role"}

    def rights(namespace: str, token: str) -> set[tuple[str, str, str]]:
        path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
        review = {"spec": {"namespace": namespace}}
        return allowed(kubernetes_cluster.request("POST", path, review, token=token)["status"]["resourceRules"])

    assert rights("spark", kubernetes_cluster.token) == allowed(roles["airflow"]["rules"])
    assert rights("default", kubernetes_cluster.token) == set()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/api/v1/namespaces/spark/pods/any"),
        ("DELETE", "/api/v1/namespaces/spark/pods"),
        ("GET", "/api/v1/namespaces/spark/secrets"),
        ("GET", "/api/v1/namespaces/spark/configmaps"),
        ("GET", "/api/v1/namespaces/default/pods"),
        ("GET", "/api/v1/pods"),
        ("GET", "/api/v1/nodes"),
    ],
)
def test_the_submitter_may_not_do_more(kubernetes_cluster: KubernetesCluster, method: str, path: str) -> None:
    with pytest.raises(RequestFailed) as refused:
        kubernetes_cluster.request(method, path, {} if method == "PUT" else None, token=kubernetes_cluster.token)
    assert refused.value.status == 403


def test_a_token_that_nobody_has(kubernetes_cluster: KubernetesCluster) -> None:
    with pytest.raises(RequestFailed) as refused:
        kubernetes_cluster.request("GET", "/api/v1/namespaces/spark/pods", token="hush")
    assert refused.value.status == 401


def mentioning(text: str) -> list[int]:
    """Return the processes whose command line or environment mentions this text."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            about = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
        except OSError:
            continue  # it has ended just now
        if text.encode() in about:
            found.append(int(directory.name))
    return found


def abandoned_cgroups() -> list[Path]:
    """Return the cgroups of nodes that do not live."""
    cgroups = [path for pattern in ("", "*/") for path in Path("/sys/fs/cgroup").glob(f"{pattern}durable-spark-*")]
    return [path for path in cgroups if not Path("/proc", path.name.rpartition("-")[2]).exists()]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_nothing_is_left_running(tmp_path: Path, how: str) -> None:
    script = """
        import sys
        from pathlib import Path
        from dev.kubernetes import KubernetesCluster
        with KubernetesCluster(directory=Path(sys.argv[1]), full=sys.argv[2] == "True") as cluster:
            environment = [{"name": "MARK", "value": sys.argv[1]}]
            cluster.create_pod("pod", {"containers": [{"command": ["sleep", "600"], "env": environment}]})
            print("up", flush=True)
            input()
    """
    mark = str(tmp_path / "cluster")
    Path(mark).mkdir()
    command = [sys.executable, "-c", textwrap.dedent(script), mark, str(FULL_KUBERNETES)]
    parent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        wait_until(lambda: any("sleep" in command_of(pid) for pid in mentioning(mark)), 30, "the pod")
        if how == "kill":
            parent.kill()
        parent.communicate("\n")
    finally:
        parent.kill()
        parent.communicate()
    wait_until(lambda: not mentioning(mark), 10, f"the end of {mark}")
    assert mark not in Path("/proc/mounts").read_text()
    assert not abandoned_cgroups()


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
