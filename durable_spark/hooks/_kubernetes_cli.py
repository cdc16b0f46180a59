"""
Driver pods that ``spark-submit`` makes: how they are marked, and how one is told that was left half-made.

What flows in: the properties of a submission, lines of the tool's output, pods as the API server shows them. What flows
out: properties, :class:`~durable_spark.jobs.JobRef`, and whether a pod is whole.

The trap: spark-submit makes the pod first and the config map with its settings up to a second later (``Client.run`` in
Spark's ``resource-managers/kubernetes``). Killed in between, it leaves a pod that waits for its volume for ever and
takes the name that the next try needs. Such a pod may be deleted, but one that could still become whole must not be:
so age is told by the API server's clock, and absence of a config map by its own word, or a kubelet's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from durable_spark.hooks._kubernetes_conf import prefixed
from durable_spark.hooks._kubernetes_plan import (
    is_namespace,
    is_pod_name,
    our_labels,
    pod_name,
    refuse_our_names,
)
from durable_spark.hooks._kubernetes_status import APP_NAME, DEPLOYMENT, OWNER, TASK, place_of
from durable_spark.jobs import BadArguments, ClusterUnreachable, RequestRefused, SubmissionUncertain

if TYPE_CHECKING:
    from durable_spark.hooks._kubernetes_api import Api, Event
    from durable_spark.hooks._kubernetes_status import Pod
    from durable_spark.jobs import JobRef, Submission

__all__ = [
    "BEFORE",
    "BY_CLI",
    "GONE_WITHIN",
    "WAIT",
    "Place",
    "delete_half",
    "deployed_job",
    "is_by_cli",
    "is_whole",
    "make_room",
    "marked_conf",
    "place_in",
    "traces_of",
]

BY_CLI = {"by": "spark-submit"}
"""Evidence of a submission whose pod spark-submit makes."""
BEFORE = "before"
"""Key of the evidence that holds the uid of the pod that had the name before."""

NAMESPACE = "spark.kubernetes.namespace"
POD_NAME = "spark.kubernetes.driver.pod.name"
WAIT = "spark.kubernetes.submission.waitAppCompletion"
_LABEL = "spark.kubernetes.driver.label."
_ANNOTATION = "spark.kubernetes.driver.annotation."

GONE_WITHIN = 60.0
"""Seconds for which a pod that is being deleted is waited for: twice the usual grace period."""
CLOCK_SLACK = 60.0
"""Seconds by which the clocks of two API servers may differ."""
_LOOK_EVERY = 0.25

_DEPLOYED = re.compile(r"Deployed Spark application .* submission ID (\S+) into Kubernetes\s*\Z", re.DOTALL)
"""The last line of ``Client.run`` (3.1 to 4.3), when all is made; it names namespace and pod."""
_BEFORE_START = frozenset(
    {
        "FailedAttachVolume",
        "FailedMount",
        "FailedScheduling",
        "NotTriggerScaleUp",
        "Scheduled",
        "SuccessfulAttachVolume",
        "TriggeredScaleUp",
    }
)
"""Reasons of events about pods of which no container has been started yet."""

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a submission's pod will be."""

    namespace: str
    name: str


# Before spark-submit runs. Pure


def place_in(conf: Mapping[str, str], submission: Submission, *, namespace: str) -> Place:
    """
    Return where spark-submit is to make the pod.

    :param namespace: the connection's, unless the properties have another.
    :raises BadArguments: when a property gives no such name.
    """
    place = Place(conf.get(NAMESPACE) or namespace, conf.get(POD_NAME) or pod_name(submission))
    if not is_namespace(place.namespace):
        raise BadArguments(f"{NAMESPACE} is {place.namespace[:100]!r}, which is no name of a namespace")
    if not is_pod_name(place.name):
        raise BadArguments(
            f"{POD_NAME} is {place.name[:300]!r}, which is no name of a pod: give lower-case letters, digits, '-' and "
            "'.', at most 253 of them, or leave it out"
        )
    return place


def marked_conf(conf: Mapping[str, str], submission: Submission, place: Place) -> dict[str, str]:
    """
    Return the properties by which spark-submit makes a pod that can be found again, and leaves.

    :raises BadArguments: when the user's own properties are in the way.
    """
    for prefix in (_LABEL, _ANNOTATION):
        refuse_our_names(f"{prefix}*", prefixed(conf, prefix))
    return {
        NAMESPACE: place.namespace,
        POD_NAME: place.name,
        WAIT: "false",
        **{f"{_LABEL}{key}": value for key, value in our_labels(submission).items()},
        **({f"{_ANNOTATION}{TASK}": submission.name} if submission.name else {}),
    }


async def make_room(api: Api, pod: Pod, submission: Submission) -> str:
    """
    Delete the pod that has the submission's name, if it is an ended one of the same task. Return its uid.

    The name is the user's own choice then: our names hold the token.

    :raises BadArguments: when it may not be deleted.
    :raises ClusterUnreachable: when it does not go.
    """
    uid, (namespace, name) = pod.status.job.uid, place_of(pod.status.job)
    loop = asyncio.get_running_loop()
    give_up = loop.time() + GONE_WITHIN
    found: Pod | None = pod
    while found is not None and found.status.job.uid == uid:
        if loop.time() > give_up:
            raise ClusterUnreachable(f"the pod {name} in {namespace} is being deleted, but does not go")
        if not found.deleting:
            if not (found.status.state.final and _of_same_task(found, submission)):
                raise _taken(found, submission)
            log.info("Deleting the pod %s in %s: it has ended, and its name is wanted (%s)", name, namespace, POD_NAME)
            await _delete_ended(api, found)
        await asyncio.sleep(_LOOK_EVERY)
        found = await api.pod(namespace, name)
    if found is not None:
        raise _taken(found, submission)
    return uid


async def _delete_ended(api: Api, pod: Pod) -> None:
    namespace, name = place_of(pod.status.job)
    try:
        await api.delete_pod(pod)
    except RequestRefused as error:
        raise BadArguments(
            f"{POD_NAME} is {name!r}, and an ended pod of this task in {namespace} has that name, which may not be "
            f"deleted ({error}): grant the right to delete pods, or leave the property out"
        ) from error


def _of_same_task(pod: Pod, submission: Submission) -> bool:
    ours = our_labels(submission)
    return bool(submission.owner) and all(pod.labels.get(key, "") == ours.get(key, "") for key in (OWNER, DEPLOYMENT))


def _taken(pod: Pod, submission: Submission) -> BadArguments:
    namespace, name = place_of(pod.status.job)
    if _of_same_task(pod, submission):
        whose = "an earlier submission of this task made it, and it has not ended"
    elif pod.token:
        whose = f"another task made it ({pod.task or 'its name is not known'}, or this one in another run)"
    else:
        whose = f"it is none of this package's (its application: {pod.labels.get(APP_NAME, 'not known')})"
    return BadArguments(
        f"{POD_NAME} is {name!r}, and there is such a pod in {namespace} ({pod.status.raw}): {whose}. Leave the "
        "property out, so that each submission has a name of its own, or delete that pod"
    )


# While spark-submit runs, and afterwards


def is_by_cli(submission: Submission) -> bool:
    """Return whether it is spark-submit that makes the submission's pod."""
    return submission.evidence.items() >= BY_CLI.items()


def deployed_job(line: str, submission: Submission) -> JobRef | None:
    """Return the job if a line of the output says that all of it has been made."""
    match = _DEPLOYED.search(line)
    return submission.job if match and submission.job and match[1] == submission.job.id else None


async def is_whole(api: Api, pod: Pod, *, settled_after: float) -> bool | None:
    """
    Return whether all is there that spark-submit makes for a pod; ``None``: it cannot be told now.

    A pod that has started has had all its volumes. Else its config maps are asked for by name, which takes the right to
    get config maps; without it, the kubelet's word counts that one was missing when it must have been there.

    :param settled_after: age in seconds at which a spark-submit that makes a pod has made the rest, too.
    """
    if pod.started:
        return True
    namespace, _ = place_of(pod.status.job)
    try:
        for name in pod.made_later:
            if not await api.has_config_map(namespace, name):
                return False
    except RequestRefused as error:
        log.debug("Whether the config maps of %s are there cannot be asked: %s", pod.status.job, error)
        return await _whole_by_events(api, pod, settled_after)
    return True


async def _whole_by_events(api: Api, pod: Pod, settled_after: float) -> bool | None:
    try:
        events, _ = await api.events(*place_of(pod.status.job), warnings=True)
    except RequestRefused:
        return None
    wanted = [f'configmap "{name}" not found' for name in pod.made_later]
    for event in events:
        late = event.last is not None and pod.created is not None and event.last >= pod.created + settled_after
        about_it = event.uid == pod.status.job.uid and event.reason == "FailedMount"
        if late and about_it and any(text in event.message for text in wanted):
            return False
    return None


async def delete_half(api: Api, pod: Pod) -> None:
    """
    Delete a half-made pod, as it was read. One that has changed since is left alone.

    :raises SubmissionUncertain: when it may not be deleted.
    """
    namespace, name = place_of(pod.status.job)
    log.warning(
        "The pod %s in %s was left half-made: spark-submit died before it made the config map %s. Deleting it",
        *(name, namespace, " and ".join(pod.made_later)),
    )
    try:
        await api.delete_pod(pod)
    except RequestRefused as error:
        raise SubmissionUncertain(
            f"the pod {name} in {namespace} was left half-made by a spark-submit that died, and may not be deleted "
            f"({error}): grant the right to delete pods, or delete it"
        ) from error


def traces_of(events: Sequence[Event], submission: Submission) -> Sequence[Event]:
    """
    Return the events that tell of a pod of the submission that is gone, and may have run.

    Those of an earlier pod of the same name are not. Nor are those of a pod that came no farther than to wait for a
    node or a volume: so it is with one that was left half-made and deleted, here or by spark-submit itself.
    """
    of_ours = [
        event
        for event in events
        if event.uid != submission.evidence.get(BEFORE)
        and not (event.made is not None and event.made < (submission.cluster_time or 0.0) - CLOCK_SLACK)
    ]
    begun = {event.uid for event in of_ours if event.reason not in _BEFORE_START}
    return [event for event in of_ours if event.uid in begun]
