"""
Driver pods that run a shell script in Spark's place: what Dags of several topics ask for, and what became of it.

Each pod's last three arguments are the item that it stands for, how long it lives, and its exit code. It lives for
seconds, or until the gate of that name is opened (:mod:`tests.airflow.gates`).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dev.processes import wait_until
from tests.airflow.lives import lives_of

if TYPE_CHECKING:
    from tests.airflow.conftest import Run

__all__ = ["ShellPod", "alive_at_once", "shell_pod", "shell_pods", "wait_for_end"]

_GATES = "/gates"
_SCRIPT = f"""
shift $(($# - 3)); echo "item $1"
case $2 in
  *[!0-9]*) until [ -e "{_GATES}/$2" ]; do sleep 0.5; done ;;
  *) sleep "$2" ;;
esac
echo "exiting with $3"; exit "$3"
"""


def shell_pod(**arguments: Any) -> dict[str, Any]:
    """Return a SparkJobOperator's arguments, but for its task's ID and ``application_args``, with others over them."""
    container = {
        "name": "spark-kubernetes-driver",
        "command": ["sh", "-c", _SCRIPT],
        "volumeMounts": [{"name": "gates", "mountPath": _GATES}],
    }
    gates = {"name": "gates", "hostPath": {"path": f"{os.environ['AIRFLOW_HOME']}/gates"}}
    return {
        "application": "local:///nothing.py",
        "conf": {
            "spark.kubernetes.container.image": "localhost/spark:test",
            "spark.kubernetes.container.image.pullPolicy": "Never",
        },
        "pod": {"spec": {"terminationGracePeriodSeconds": 1, "containers": [container], "volumes": [gates]}},
        "conn_id": "kubernetes",
        "poll_interval": 1,
        "retries": 2,
        "retry_delay": timedelta(seconds=1),
        "retry_exponential_backoff": False,
        **arguments,
    }


@dataclasses.dataclass(frozen=True)
class ShellPod:
    """A pod as the API server's audit log tells of its creation."""

    name: str
    uid: str
    item: str
    application: str
    arguments: tuple[str, ...]
    """All of the application's."""
    labels: dict[str, str]

    @property
    def job_id(self) -> str:
        return f"spark:{self.name}"


def shell_pods(run: Run) -> list[ShellPod]:
    """Return the pods that were created for the run's task, whatever its map index, the oldest first."""
    prefix = re.sub(r"[^a-z0-9]+", "-", f"{run.dag}-{run.task}") + "-"
    named = re.compile(re.escape(prefix) + "[0-9a-f]{32}")
    made = []
    for entry in run.stage.pod_cluster.audit():
        reference, answer = entry["objectRef"], entry["responseStatus"]["code"]
        if entry["verb"] != "create" or reference["resource"] != "pods" or "subresource" in reference or answer != 201:
            continue
        metadata, spec = entry["responseObject"]["metadata"], entry["responseObject"]["spec"]
        if metadata["uid"] in run._before or not named.fullmatch(metadata["name"]):
            continue
        container = spec["containers"][0]["args"]
        begin = next(index for index, part in enumerate(container) if part.startswith("local:///"))
        made.append(
            ShellPod(
                name=metadata["name"],
                uid=metadata["uid"],
                item=container[-3],
                application=container[begin],
                arguments=tuple(container[begin + 1 :]),
                labels=metadata.get("labels", {}),
            )
        )
    return made


def alive_at_once(*runs: Run) -> int:
    """Return how many of the runs' pods, which have all ended, lived at once at most."""
    changes = []
    for life in itertools.chain.from_iterable(map(lives_of, runs)):
        assert life.over is not None, life
        changes += [(life.created, 1), (life.over, -1)]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def wait_for_end(job: Run, *, deadline: float = 180) -> str:
    """Wait until the whole run has ended; return its state."""
    path = f"/dags/{job.dag}/dagRuns/{job.id}"
    states = {"success", "failed"}
    ended = wait_until(
        lambda: state if (state := job.stage.airflow.api("GET", path)["state"]) in states else None,
        deadline,
        f"{job.dag} to end",
        interval=0.5,
    )
    return str(ended)
