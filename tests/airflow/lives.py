"""The lives of a run's pods by the API server's audit log: who asked for the end of which, and when it was gone."""

from __future__ import annotations

import dataclasses
import itertools
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from dev.airflow import parse_time
from dev.kubernetes import KubernetesCluster, RequestFailed

if TYPE_CHECKING:
    from dev.kubernetes import CreatedPod
    from tests.airflow.conftest import Run

__all__ = ["Life", "lives_of", "now", "one_after_the_other"]


@dataclasses.dataclass(frozen=True)
class Life:
    """What became of one pod."""

    pod: CreatedPod
    created: datetime
    killed: datetime | None
    """When the hook asked for its deletion, for the first time."""
    over: datetime | None
    """When it was removed, or else when its container ended, in whole seconds. ``None`` while it lives."""


def now() -> datetime:
    """Return the time, on the clock that the API server has, too."""
    return datetime.now(timezone.utc)


def lives_of(run: Run) -> list[Life]:
    """Return the lives of all pods of the run's task, the oldest first."""
    deletions: dict[str, list[dict[str, Any]]] = {}
    for entry in run.stage.pod_cluster.audit():
        reference, answer = entry["objectRef"], entry["responseStatus"]["code"]
        is_pod = reference["resource"] == "pods" and "subresource" not in reference
        if is_pod and entry["verb"] == "delete" and answer == 200:
            deletions.setdefault(reference["name"], []).append(entry)
    lives = []
    for pod in run.pods():
        asked = deletions.get(pod.name, [])
        by_hook = [
            _time(each["requestReceivedTimestamp"])
            for each in asked
            if each["user"]["username"] == KubernetesCluster.submitter
        ]
        removed = _time(asked[-1]["stageTimestamp"]) if asked else None
        created = _time(pod.entry["requestReceivedTimestamp"])
        lives.append(Life(pod, created, min(by_hook, default=None), _end(run, pod, removed)))
    return lives


def one_after_the_other(run: Run, count: int) -> list[Life]:
    """Return the lives of the run's pods, which are so many, and of which none began before the last one was over."""
    lives = lives_of(run)
    assert len(lives) == count, [life.pod.name for life in lives]
    for old, new in itertools.pairwise(lives):
        assert old.over is not None, old
        assert old.over <= new.created, (old, new)
    return lives


def _end(run: Run, pod: CreatedPod, removed: datetime | None) -> datetime | None:
    try:
        found = run.stage.pod_cluster.pod(pod.name)
    except RequestFailed as error:
        if error.status != 404:
            raise
        return removed
    states = [container["state"] for container in found["status"].get("containerStatuses", [])]
    return next((_time(state["terminated"]["finishedAt"]) for state in states if "terminated" in state), None)


def _time(text: str) -> datetime:
    time = parse_time(text)
    assert time is not None
    return time
