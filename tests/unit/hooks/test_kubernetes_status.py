"""What a pod says of its job."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from durable_spark.hooks._kubernetes_links import LinkTemplates
from durable_spark.hooks._kubernetes_status import FINALIZER, Pod, read_pod
from durable_spark.jobs import InvalidAnswer, JobRef, JobState, Link
from tests.unit.hooks.fake import recorded_json
from tests.unit.hooks.fake_kubernetes import NAMESPACE, pod, ref, watch_lines

TOKEN = "ab" * 16
DRIVER = "spark-kubernetes-driver"
NO_LINKS = LinkTemplates({})


def read(value: Any, *, deleted: bool = False, links: LinkTemplates = NO_LINKS) -> Pod:
    return read_pod(value, namespace=NAMESPACE, deleted=deleted, links=links)


def at(time: str) -> float:
    return datetime.fromisoformat(f"2026-11-23T{time}+00:00").timestamp()


def with_status(phase: str, **status: Any) -> dict[str, Any]:
    """A pod of which only this is known."""
    return {**pod(TOKEN), "status": {"phase": phase, **status}}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"name": DRIVER, "state": {"waiting": {"reason": reason, "message": message}}}


def ended(
    code: Any, reason: Any = "Error", *, name: str = DRIVER, time: str = "03:20:00", **more: Any
) -> dict[str, Any]:
    terminated = {"exitCode": code, "reason": reason, "finishedAt": f"2026-11-23T{time}Z"}
    return {"name": name, "state": {"terminated": terminated | more}}


def scheduled(status: str, reason: str = "", message: str = "", time: str = "03:00:00") -> dict[str, Any]:
    told = {"type": "PodScheduled", "status": status, "lastTransitionTime": f"2026-11-23T{time}Z"}
    return told | {"reason": reason, "message": message}


# --- the phase decides


@pytest.mark.parametrize(
    ("name", "state", "raw", "message"),
    [
        ("pending", JobState.PENDING, "Pending", ""),
        ("running", JobState.RUNNING, "Running", ""),
        ("succeeded", JobState.SUCCEEDED, "Succeeded", ""),
        ("failed", JobState.FAILED, "Failed", f"container {DRIVER} ended with exit code 3"),
    ],
)
def test_recorded(name: str, state: JobState, raw: str, message: str) -> None:
    value = recorded_json(f"k8s-pod-{name}.json")
    status = read(value).status
    assert (status.job, status.state, status.raw, status.message) == (ref(value), state, raw, message)
    assert status.held_up_since is None


def test_recorded_life_of_a_pod_that_was_deleted() -> None:
    told: list[tuple[JobState, str]] = []
    for event in map(json.loads, watch_lines()):
        if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
            status = read(event["object"], deleted=event["type"] == "DELETED").status
            told += [(status.state, status.raw)] if (status.state, status.raw) not in told[-1:] else []
    assert told == [
        (JobState.PENDING, "Pending"),
        (JobState.PENDING, "Pending: ContainerCreating"),
        (JobState.RUNNING, "Running"),
        (JobState.RUNNING, "Running, being deleted"),
        (JobState.KILLED, "Failed"),
    ]


@pytest.mark.parametrize("phase", ["Unknown", "Paused", "", "running", None, 3, ["Succeeded"], {"a": 1}])
def test_no_other_phase_is_a_verdict(phase: Any) -> None:
    assert read(with_status(phase, containerStatuses=[ended(0, "Completed")])).status.state is JobState.UNKNOWN


@pytest.mark.parametrize("status", [None, 3, [], {}, "Succeeded"])
def test_no_status_is_no_verdict(status: Any) -> None:
    assert read({**pod(TOKEN), "status": status}).status.state is JobState.UNKNOWN


@pytest.mark.parametrize("phase", ["Pending", "Running"])
@pytest.mark.parametrize("code", [0, 1])
def test_a_container_that_has_just_ended_is_no_verdict(phase: str, code: int) -> None:
    """Seen for about a second before the phase follows."""
    status = read(with_status(phase, containerStatuses=[ended(code, "Completed")])).status
    assert (status.state, status.raw) == (JobState(phase.lower()), phase)


# --- why it failed


@pytest.mark.parametrize(
    ("status", "raw", "message"),
    [
        ({"containerStatuses": [ended(7)]}, "Failed", f"container {DRIVER} ended with exit code 7"),
        (
            {"containerStatuses": [ended(137, "OOMKilled")]},
            "Failed: OOMKilled",
            f"container {DRIVER} ended with exit code 137 (OOMKilled)",
        ),
        (
            {"containerStatuses": [ended(128, "StartError", message="no such file\n")]},
            "Failed: StartError",
            f"container {DRIVER} ended with exit code 128 (StartError): no such file",
        ),
        (
            {"reason": "DeadlineExceeded", "message": "too long", "containerStatuses": [ended(137)]},
            "Failed: DeadlineExceeded",
            f"too long; container {DRIVER} ended with exit code 137",
        ),
        ({"reason": "Evicted", "message": "low on memory"}, "Failed: Evicted", "low on memory"),
        ({"reason": "NodeLost"}, "Failed: NodeLost", ""),
        (
            {
                "initContainerStatuses": [ended(0, "Completed", name="fetch")],
                "containerStatuses": [ended(0, "Completed", name="sidecar"), ended(1)],
            },
            "Failed",
            f"container {DRIVER} ended with exit code 1",
        ),
        (
            {"initContainerStatuses": [ended(2, name="fetch")], "containerStatuses": [waiting("PodInitializing")]},
            "Failed",
            "container fetch ended with exit code 2",
        ),
        (
            {"containerStatuses": [ended(1), ended(137, "OOMKilled", name="sidecar")]},
            "Failed: OOMKilled",
            f"container {DRIVER} ended with exit code 1; container sidecar ended with exit code 137 (OOMKilled)",
        ),
        ({"reason": "two words", "containerStatuses": [ended("1"), ended(True), ended(None)]}, "Failed", ""),
        ({"reason": ["Evicted"], "message": {"a": 1}, "containerStatuses": "?"}, "Failed", ""),
    ],
)
def test_why_it_failed(status: dict[str, Any], raw: str, message: str) -> None:
    seen = read(with_status("Failed", **status)).status
    assert (seen.state, seen.raw, seen.message) == (JobState.FAILED, raw, message)


def test_a_long_message_is_cut() -> None:
    many = [ended(1, name=f"c{number}", message="x" * 1500) for number in range(100)]
    assert len(read(with_status("Failed", message="y" * 10**6, containerStatuses=many)).status.message) == 2000


# --- what holds it up

PULL = 'Back-off pulling image "nowhere/spark:4"'


@pytest.mark.parametrize(
    ("status", "raw", "message", "since"),
    [
        ({"containerStatuses": [waiting("ErrImagePull", PULL)]}, "ErrImagePull", PULL, None),
        ({"containerStatuses": [waiting("ImagePullBackOff", PULL)]}, "ErrImagePull", PULL, None),
        ({"containerStatuses": [waiting("ErrImageNeverPull", "absent")]}, "ErrImageNeverPull", "absent", None),
        ({"containerStatuses": [waiting("InvalidImageName", "bad")]}, "InvalidImageName", "bad", None),
        (
            {"containerStatuses": [waiting("CreateContainerConfigError", 'secret "s" not found')]},
            "CreateContainerConfigError",
            'secret "s" not found',
            None,
        ),
        ({"initContainerStatuses": [waiting("ErrImagePull", PULL)]}, "ErrImagePull", PULL, None),
        (
            {"startTime": "2026-11-23T03:01:00Z", "containerStatuses": [waiting("ErrImagePull", PULL)]},
            "ErrImagePull",
            PULL,
            "03:01:00",
        ),
        (
            {"conditions": [scheduled("True")], "containerStatuses": [waiting("ContainerCreating")]},
            "ContainerCreating",
            "",
            "03:00:00",
        ),
        (
            {"conditions": [scheduled("False", "Unschedulable", "0/3 nodes")]},
            "Unschedulable",
            "0/3 nodes",
            "03:00:00",
        ),
        ({"conditions": [scheduled("False", "SchedulingGated", "gates")]}, "SchedulingGated", "gates", None),
    ],
)
def test_what_holds_it_up(status: dict[str, Any], raw: str, message: str, since: str | None) -> None:
    seen = read(with_status("Pending", **status)).status
    assert (seen.state, seen.raw, seen.message) == (JobState.PENDING, f"Pending: {raw}", message)
    assert seen.held_up_since == (since and at(since))


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"containerStatuses": [waiting("SomethingNew", "?")]},
        {"containerStatuses": [{"state": None}, 3, None]},
        {"conditions": "?", "containerStatuses": {"a": 1}},
    ],
)
def test_it_merely_waits_its_turn(status: dict[str, Any]) -> None:
    seen = read(with_status("Pending", **status)).status
    assert (seen.state, seen.raw, seen.held_up_since) == (JobState.PENDING, "Pending", None)


def test_a_pod_that_has_a_node_does_not_wait_its_turn() -> None:
    """Not even when the kubelet gives no reason: it may be dead."""
    seen = read(with_status("Pending", conditions=[scheduled("True")])).status
    assert (seen.raw, seen.held_up_since) == ("Pending", at("03:00:00"))


# --- deleted, or failed by itself


def deleted(value: dict[str, Any], deadline: str, grace: int) -> dict[str, Any]:
    """A pod whose deletion was asked for ``grace`` seconds before the deadline."""
    deletion = {"deletionTimestamp": f"2026-11-23T{deadline}Z", "deletionGracePeriodSeconds": grace}
    return {**value, "metadata": value["metadata"] | deletion}


@pytest.mark.parametrize(
    ("container", "deadline", "grace", "state"),
    [
        # asked for at 03:20:00, with 30 s of grace
        (ended(143, time="03:20:05"), "03:20:30", 30, JobState.KILLED),
        (ended(1, time="03:20:05"), "03:20:30", 30, JobState.KILLED),
        (ended(143, time="03:20:00"), "03:20:30", 30, JobState.KILLED),
        (ended(137, None, time="03:20:00"), "03:20:30", 30, JobState.KILLED),
        (ended(1, time="03:20:00"), "03:20:30", 30, JobState.FAILED),
        (ended(137, "OOMKilled", time="03:20:00"), "03:20:30", 30, JobState.FAILED),
        (ended(143, time="03:19:59"), "03:20:30", 30, JobState.FAILED),
        (ended(1, time="03:19:59"), "03:20:30", 30, JobState.FAILED),
        # the kubelet has moved the deadline to the end of the containers
        (ended(143, time="03:20:00"), "03:20:04", 0, JobState.KILLED),
        (ended(137, time="03:20:00"), "03:20:04", 0, JobState.KILLED),
        (ended(143, time="03:20:00"), "03:20:09", 0, JobState.FAILED),
        (ended(1, time="03:20:00"), "03:20:04", 0, JobState.FAILED),
        (ended(137, "OOMKilled", time="03:20:00"), "03:20:04", 0, JobState.FAILED),
        # no container has ended by itself
        (waiting("ContainerCreating"), "03:20:30", 30, JobState.KILLED),
    ],
)
def test_failed_and_deleted(container: dict[str, Any], deadline: str, grace: int, state: JobState) -> None:
    value = deleted(with_status("Failed", containerStatuses=[container]), deadline, grace)
    assert read(value).status.state is state


def test_the_last_container_decides() -> None:
    ends = [ended(1, time="03:10:00", name="sidecar"), ended(143, time="03:20:05")]
    killed = read(deleted(with_status("Failed", containerStatuses=ends), "03:20:30", 30)).status
    assert (killed.state, killed.message[:32]) == (JobState.KILLED, "the pod was deleted while it ran")


@pytest.mark.parametrize("last_word", [True, False])
def test_succeeded_and_deleted_has_succeeded(last_word: bool) -> None:
    value = deleted(pod(TOKEN, "Succeeded"), "03:20:30", 30)
    assert read(value, deleted=last_word).status.state is JobState.SUCCEEDED


def test_failed_and_then_gone_has_failed() -> None:
    assert read(pod(TOKEN, "Failed"), deleted=True).status.state is JobState.FAILED


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown"])
def test_gone_without_an_end_was_killed(phase: str) -> None:
    status = read(with_status(phase), deleted=True).status
    assert (status.state, status.raw) == (JobState.KILLED, f"{phase}, deleted")
    assert status.message == f"the pod was deleted while it was {phase}"


@pytest.mark.parametrize("phase", ["Pending", "Running"])
def test_being_deleted_is_no_end(phase: str) -> None:
    status = read(deleted(with_status(phase), "03:20:30", 30)).status
    assert (status.state, status.raw) == (JobState(phase.lower()), f"{phase}, being deleted")


@pytest.mark.parametrize("deadline", ["yesterday", 3, "", "0000-00-00T00:00:00Z"])
def test_a_deletion_at_no_time_is_none(deadline: Any) -> None:
    value = pod(TOKEN, "Failed", deletionTimestamp=deadline, deletionGracePeriodSeconds="30")
    assert read(value).status.state is JobState.FAILED


def test_a_grace_period_without_end_is_none() -> None:
    container = ended(1, time="03:20:05")
    value = deleted(with_status("Failed", containerStatuses=[container]), "03:20:00", 10**400)
    assert read(value).status.state is JobState.KILLED


# --- what else is read


def test_labels_and_metadata() -> None:
    value = pod(
        TOKEN,
        resourceVersion="17",
        finalizers=[FINALIZER, 3, "other/one"],
        annotations={"durable-spark/at-end": "delete"},
        deletionTimestamp="2026-11-23T03:20:30Z",
    )
    seen = read(value)
    assert (seen.token, seen.version, seen.container) == (TOKEN, "17", DRIVER)
    assert (seen.held, seen.finalizers, seen.at_end, seen.deleting) == (True, [FINALIZER, "other/one"], "delete", True)


def test_a_pod_without_anything_of_ours() -> None:
    bare = {"metadata": {"name": "p", "namespace": NAMESPACE, "uid": "u", "finalizers": "?", "annotations": [1]}}
    seen = read(bare)
    assert (seen.token, seen.version, seen.container, seen.at_end) == ("", "", "", "")
    assert (seen.held, seen.has_secret, seen.deleting) == (False, False, False)


@pytest.mark.parametrize(("mounted", "has"), [("dag-task", True), ("another", False)])
def test_its_secret(mounted: str, has: bool) -> None:
    value = pod(TOKEN, name="dag-task")
    value["spec"]["volumes"].append({"name": "v", "secret": {"secretName": mounted}})
    assert read(value).has_secret is has


def test_the_drivers_container_is_not_always_the_first() -> None:
    value = pod(TOKEN)
    value["spec"]["containers"].insert(0, {"name": "sidecar"})
    assert read(value).container == DRIVER
    value["spec"]["containers"].pop()
    assert read(value).container == "sidecar"


def test_links() -> None:
    value = pod(TOKEN, name="p", uid="u-1")
    links = LinkTemplates({Link.LOG: "https://logs/{namespace}/{pod}/{uid}", Link.HISTORY: "https://h/{app_id}"})
    app_id = value["metadata"]["labels"]["spark-app-selector"]
    assert read(value, links=links).status.links == {
        Link.LOG: "https://logs/spark/p/u-1",
        Link.HISTORY: f"https://h/{app_id}",
    }


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        [],
        {},
        "pod",
        {"metadata": {}},
        {"metadata": []},
        pod(TOKEN, name="../x"),
        pod(TOKEN, name="p\n"),
        pod(TOKEN, name="Pod"),
        pod(TOKEN, name="p" * 254),
        pod(TOKEN, namespace="another"),
        pod(TOKEN, uid="u u"),
        pod(TOKEN, uid="u" * 70),
        {"metadata": {"name": "p", "namespace": NAMESPACE}},
        {"metadata": {"name": "p", "namespace": NAMESPACE, "uid": None}},
        {"metadata": {"name": 3, "namespace": NAMESPACE, "uid": "u"}},
        recorded_json("k8s-status-404.json"),
        recorded_json("k8s-page.json"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_not_a_pod(value: Any) -> None:
    with pytest.raises(InvalidAnswer, match="no pod of spark"):
        read(value)


def test_a_job_is_named_by_namespace_and_name() -> None:
    assert read(pod(TOKEN, name="p", uid="u")).status.job == JobRef("spark:p", "u")
