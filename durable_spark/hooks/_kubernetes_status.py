"""
From a pod as the API server shows it to what we say of a job. Pure: no I/O.

The phase decides, nothing else: a container that has just ended shows itself as terminated for about a second
while its pod is still ``Pending`` or ``Running``. Everything else only explains: exit codes, reasons, messages.

The trap: a pod that is deleted while it runs ends as ``Failed`` like any other (exit code 143). Whether it was
deleted or failed by itself is told by what came first, the request to delete it or the end of its containers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from durable_spark.jobs import InvalidAnswer, JobRef, JobState, JobStatus

if TYPE_CHECKING:
    from durable_spark.hooks._kubernetes_links import LinkTemplates

__all__ = [
    "APP_ID",
    "APP_NAME",
    "DEPLOYMENT",
    "FINALIZER",
    "OWNER",
    "TASK",
    "TOKEN",
    "Pod",
    "place_of",
    "read_pod",
    "time_of",
]

TOKEN = "durable-spark/token"  # noqa: S105 - it names a submission, and opens nothing
OWNER = "durable-spark/owner"
DEPLOYMENT = "durable-spark/deployment"
TASK = "durable-spark/task"
"""Annotation for people: ``dag.task``."""
FINALIZER = "durable-spark/end-not-recorded"
APP_ID = "spark-app-selector"
APP_NAME = "spark-app-name"

_STATES = {
    "Pending": JobState.PENDING,
    "Running": JobState.RUNNING,
    "Succeeded": JobState.SUCCEEDED,
    "Failed": JobState.FAILED,
}
"""By phase. ``Unknown``, and what is yet to be invented, are no verdict."""

_MESSAGE_LIMIT = 2000
_REPORTING = 5.0
"""Seconds that a kubelet may take from a container's end to the pod's deletion."""
_HELD_UP = {
    "ErrImagePull": "ErrImagePull",
    "ImagePullBackOff": "ErrImagePull",  # the same trouble between two tries
    "ErrImageNeverPull": "ErrImageNeverPull",
    "InvalidImageName": "InvalidImageName",
    "ImageInspectError": "ImageInspectError",
    "RegistryUnavailable": "RegistryUnavailable",
    "SignatureValidationFailed": "SignatureValidationFailed",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "RunContainerError",
    "ContainerCreating": "ContainerCreating",
    "PodInitializing": "PodInitializing",
}
"""Why a container of a pod that has a node is not started yet (kubelet: pkg/kubelet/images, kuberuntime)."""
_MADE_LATER = {
    "spark-conf-volume-driver": "-conf-map",
    "hadoop-properties": "-hadoop-config",
    "krb5-file": "-krb5-file",
    "pod-template-volume": "-driver-podspec-conf-map",
}
"""Volumes of drivers, and how the config maps in them are called if they are spark-submit's own (4.3.0's Constants)."""
_UID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9.]{0,63}\Z")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}\Z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
    """
    What matters of a pod.

    :param status: as a job, with its uid.
    :param version: the resource version.
    :param labels: its labels.
    :param deleting: whether its deletion was asked for.
    :param finalizers: who holds it.
    :param has_secret: whether it mounts the Secret of its own name.
    :param at_end: what its annotation says of its end, ``"delete"`` or ``""``.
    :param container: the name of the driver's container, or ``""``.
    :param task: what its annotation says of whose it is, or ``""``.
    :param created: by the API server's clock, in seconds since the epoch.
    :param started: whether a container of it may ever have been started. Before that, all its volumes were mounted.
    :param made_later: the config maps that it mounts and that spark-submit makes after it.
    """

    status: JobStatus
    version: str
    labels: Mapping[str, str]
    deleting: bool
    finalizers: Sequence[str]
    has_secret: bool
    at_end: str
    container: str
    task: str
    created: float | None
    started: bool
    made_later: Sequence[str]

    @property
    def held(self) -> bool:
        """Whether our finalizer holds it."""
        return FINALIZER in self.finalizers

    @property
    def token(self) -> str:
        """The token of its submission, ``""`` if it is none of ours."""
        return self.labels.get(TOKEN, "")


def place_of(job: JobRef) -> tuple[str, str]:
    """Return namespace and name of a job's pod, as its ID has them."""
    namespace, _, name = job.id.partition(":")
    return namespace, name


def read_pod(value: Any, *, namespace: str, deleted: bool = False, links: LinkTemplates) -> Pod:
    """
    Return what matters of a pod.

    :param value: the pod as JSON.
    :param namespace: that was asked.
    :param deleted: whether it is the last word of a pod that is gone.
    :raises InvalidAnswer: when it is none, or of another namespace.
    """
    metadata, status, spec = _part(value, "metadata"), _part(value, "status"), _part(value, "spec")
    name, uid = metadata.get("name"), metadata.get("uid")
    if metadata.get("namespace") != namespace or not (_matches(_NAME, name) and _matches(_UID, uid)):
        raise InvalidAnswer(f"the API server shows what is no pod of {namespace}: {str(metadata)[:200]!r}")
    labels = {key: text for key, text in _part(metadata, "labels").items() if isinstance(text, str)}
    annotations = _part(metadata, "annotations")
    finalizers = metadata.get("finalizers")
    return Pod(
        status=_job_status(
            JobRef(f"{namespace}:{name}", str(uid)),
            metadata,
            status,
            deleted=deleted,
            on_node="nodeName" in spec or not isinstance(value.get("spec"), Mapping),  # what is not shown may be on one
            links=links,
        ),
        version=str(metadata.get("resourceVersion", "")),
        labels=labels,
        deleting=time_of(metadata.get("deletionTimestamp")) is not None,
        finalizers=[each for each in finalizers if isinstance(each, str)] if isinstance(finalizers, list) else [],
        has_secret=any(_part(volume, "secret").get("secretName") == name for volume in _items(spec, "volumes")),
        at_end="delete" if annotations.get("durable-spark/at-end") == "delete" else "",
        container=_driver_container(spec),
        task=_text(annotations.get(TASK))[:200],
        created=time_of(metadata.get("creationTimestamp")),
        started=status.get("phase") != "Pending" or any(map(_has_begun, _containers(status))),
        made_later=list(_made_later(spec)),
    )


def _job_status(
    job: JobRef,
    metadata: Mapping[str, Any],
    status: Mapping[str, Any],
    *,
    deleted: bool,
    on_node: bool,
    links: LinkTemplates,
) -> JobStatus:
    deleting = time_of(metadata.get("deletionTimestamp")) is not None
    phase = str(status.get("phase") or "Unknown")[:40]
    state = _STATES.get(phase, JobState.UNKNOWN)
    raw, message, since = phase, _message(status), None
    if state is JobState.PENDING:
        reason, message, since = _held_up(status, message)
        raw = f"Pending: {reason}" if reason else phase
    elif state is JobState.FAILED:
        reason = _reason(status)
        raw = f"Failed: {reason}" if reason else phase
        if _deleted_before_its_end(metadata, status):
            state = JobState.KILLED
            message = f"the pod was deleted while it ran; {message}".rstrip("; ")
    if state is JobState.PENDING and deleting and not on_node:
        # A deleted pod is given no node any more; a finalizer may keep it as it is (storage.go: assignPod()).
        state, raw, since = JobState.KILLED, f"{phase}, deleted", None
        message = "the pod was deleted before it was given a node"
    elif deleted and not state.final:
        state, raw, since = JobState.KILLED, f"{phase}, deleted", None
        message = f"the pod was deleted while it was {phase}"
    elif not state.final and deleting:
        raw = f"{phase}, being deleted"
    namespace, name = place_of(job)
    app_id = _part(metadata, "labels").get(APP_ID, "")
    filled = links.fill(namespace=namespace, pod=name, uid=job.uid, app_id=app_id if isinstance(app_id, str) else "")
    return JobStatus(job=job, state=state, raw=raw, message=message[:_MESSAGE_LIMIT], held_up_since=since, links=filled)


def _held_up(status: Mapping[str, Any], message: str) -> tuple[str, str, float | None]:
    """Return why a pending pod is not started, the explanation, and since when that is so."""
    since = time_of(status.get("startTime"))
    for condition in _items(status, "conditions"):
        if condition.get("type") != "PodScheduled":
            continue
        reason = condition.get("reason")
        if condition.get("status") == "False" and reason == "Unschedulable":
            return "Unschedulable", _text(condition.get("message")), time_of(condition.get("lastTransitionTime"))
        if condition.get("status") == "False":  # SchedulingGated: it waits its turn
            return _word(reason), _text(condition.get("message")), None
        since = since or time_of(condition.get("lastTransitionTime"))
    for container in _containers(status):
        waiting = _part(_part(container, "state"), "waiting")
        reason = _HELD_UP.get(str(waiting.get("reason")))
        if reason is not None:
            return reason, _text(waiting.get("message")) or message, since
    return "", message, since


def _reason(status: Mapping[str, Any]) -> str:
    """Return the pod's own reason (``Evicted``, ``DeadlineExceeded``), else a container's that is telling."""
    if reason := _word(status.get("reason")):
        return reason
    reasons = [_word(terminated.get("reason")) for _, terminated in _terminated(status)]
    return next((reason for reason in reasons if reason not in ("", "Error", "Completed")), "")


def _message(status: Mapping[str, Any]) -> str:
    """Return what pod and containers say of their end: exit codes, reasons, messages."""
    parts = [_text(status.get("message"))]
    for name, terminated in _terminated(status):
        code = terminated.get("exitCode")
        if code == 0 or isinstance(code, bool) or not isinstance(code, int):
            continue
        reason = _word(terminated.get("reason"))
        told = f"container {name} ended with exit code {code}"
        told += f" ({reason})" if reason not in ("", "Error") else ""
        said = _text(terminated.get("message"))
        parts.append(f"{told}: {said}" if said else told)
    return "; ".join(part for part in parts if part)


def _deleted_before_its_end(metadata: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """
    Whether a failed pod's deletion was asked for before its last container ended.

    ``deletionTimestamp`` is when the grace period ends. Times are whole seconds; in the same second an exit by
    SIGTERM or SIGKILL counts as the deletion's doing. The kubelet, when it has ended the containers, deletes with a
    grace period of 0, which moves the timestamp to that moment (seen while a finalizer holds the pod): then
    an exit by signal a few seconds before counts, too.
    """
    deadline = time_of(metadata.get("deletionTimestamp"))
    if deadline is None:
        return False
    grace = metadata.get("deletionGracePeriodSeconds")
    requested = deadline - (grace if isinstance(grace, int) and abs(grace) < 1 << 63 else 0)
    ends = [
        (end, terminated) for _, terminated in _terminated(status) if (end := time_of(terminated.get("finishedAt")))
    ]
    if not ends:
        return True
    end, terminated = max(ends, key=lambda pair: pair[0])
    by_signal = terminated.get("exitCode") in (137, 143) and terminated.get("reason") in (None, "Error")
    return end > requested or (by_signal and requested - end <= (0 if grace else _REPORTING))


def _terminated(status: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for container in _containers(status):
        terminated = _part(_part(container, "state"), "terminated")
        if terminated:
            yield _text(container.get("name")), terminated


def _containers(status: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from _items(status, "initContainerStatuses")
    yield from _items(status, "containerStatuses")


def _has_begun(container: Mapping[str, Any]) -> bool:
    states = (_part(container, name) for name in ("state", "lastState"))
    return container.get("started") is True or any("running" in state or "terminated" in state for state in states)


def _made_later(spec: Mapping[str, Any]) -> Iterator[str]:
    for volume in _items(spec, "volumes"):
        ending, name = _MADE_LATER.get(str(volume.get("name"))), _part(volume, "configMap").get("name")
        if ending and _matches(_NAME, name) and str(name).endswith(ending):
            yield str(name)


def _driver_container(spec: Mapping[str, Any]) -> str:
    """Return the container that has Spark's application ID in its environment, else the first one."""
    names = []
    for container in _items(spec, "containers"):
        name = container.get("name")
        if not _matches(_NAME, name):
            continue
        if any(variable.get("name") == "SPARK_APPLICATION_ID" for variable in _items(container, "env")):
            return str(name)
        names.append(str(name))
    return names[0] if names else ""


def _part(value: Any, name: str) -> Mapping[str, Any]:
    part = value.get(name) if isinstance(value, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _items(value: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    items = value.get(name)
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.match(value) is not None


def _word(value: object) -> str:
    return str(value) if _matches(_WORD, value) else ""


def _text(value: object) -> str:
    return value.strip()[:_MESSAGE_LIMIT] if isinstance(value, str) else ""


def time_of(value: object) -> float | None:
    """Return seconds since the epoch for RFC 3339 as the API server writes it."""
    if not isinstance(value, str):
        return None
    try:
        return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
