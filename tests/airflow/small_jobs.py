"""
Drivers that are no Spark, but as small as a cluster takes them: what Dags of several topics ask for.

The last three arguments of a :func:`shell_pod` are the item that it stands for, how long it lives, and its exit code.
It lives for seconds, or until the gate of that name is opened (:mod:`tests.airflow.gates`).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.lives import lives_of
from tests.airflow.marks import mark_of

if TYPE_CHECKING:
    from tests.airflow.conftest import Run

__all__ = [
    "GATE",
    "RETRIED",
    "ShellPod",
    "alive_at_once",
    "dag_of_driver",
    "dag_of_pod",
    "pod_of",
    "shell_pod",
    "shell_pods",
    "small_driver",
]

HOME = "/airflow"
"""Where a pod finds Airflow's folder."""
GATE = f"{HOME}/gates/{{{{ run_id }}}}"
"""For which a pod may wait."""
RETRIED: dict[str, Any] = {
    "poll_interval": 1,
    "retries": 2,
    "retry_delay": timedelta(seconds=1),
    "retry_exponential_backoff": False,
}
_SCRIPT = f"""
shift $(($# - 3)); echo "item $1"
case $2 in
  *[!0-9]*) until [ -e "{HOME}/gates/$2" ]; do sleep 0.5; done ;;
  *) sleep "$2" ;;
esac
echo "exiting with $3"; exit "$3"
"""


def pod_of(script: str, *, grace: int = 1) -> dict[str, Any]:
    """
    Return the arguments, but for its task's ID, of a SparkJobOperator whose driver pod runs a script in Spark's place.

    :param grace: seconds for which the pod may live on after its deletion.
    """
    container = {
        "name": "spark-kubernetes-driver",
        "command": ["sh", "-c", script],
        "volumeMounts": [{"name": "airflow", "mountPath": HOME}],
    }
    airflow = {"name": "airflow", "hostPath": {"path": os.environ["AIRFLOW_HOME"]}}
    return {
        "application": "local:///nothing.py",
        "conf": {
            "spark.kubernetes.container.image": "localhost/spark:test",
            "spark.kubernetes.container.image.pullPolicy": "Never",
        },
        "pod": {"spec": {"terminationGracePeriodSeconds": grace, "containers": [container], "volumes": [airflow]}},
        "conn_id": "kubernetes",
        **RETRIED,
    }


def shell_pod(**arguments: Any) -> dict[str, Any]:
    """Return a SparkJobOperator's arguments, but for its task's ID and ``application_args``, with others over them."""
    return {**pod_of(_SCRIPT), **arguments}


def small_driver(seconds: str, exit_code: str) -> dict[str, Any]:
    """
    Return a SparkJobOperator's arguments, but for its task's ID, for a driver without Spark on a standalone cluster.

    :param seconds: how long it lives, or the file that it waits for.
    """
    source = str(Path(__file__).resolve().parents[1] / "apps" / "Driver.java")
    return {
        "application": source,
        "java_class": "org.codehaus.janino.SimpleCompiler",
        "application_args": [source, "Driver", seconds, exit_code],
        "driver_memory": "128m",
        "conn_id": "spark_default",
        **RETRIED,
    }


_EXIT_CODE = "{{ params.exit_code }}"


def dag_of_pod(dag_id: str, **arguments: Any) -> None:
    """Make a Dag whose one job is a pod that lives until the gate of its run is opened; ``exit_code`` is a param."""
    script = f"until [ -e {GATE} ]; do sleep 0.3; done; echo exiting with {_EXIT_CODE}; exit {_EXIT_CODE}"
    _dag_of_one(dag_id, **{**pod_of(script), **arguments})


def dag_of_driver(dag_id: str, **arguments: Any) -> None:
    """Do as :func:`dag_of_pod` does, with a driver on a standalone cluster, which is known by its memory."""
    gate = os.environ["AIRFLOW_HOME"] + "/gates/{{ run_id }}"
    own = {**small_driver(gate, _EXIT_CODE), "driver_memory": mark_of(dag_id)}
    _dag_of_one(dag_id, **{**own, **arguments})


def _dag_of_one(dag_id: str, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params={"exit_code": Param("0", type="string")}):
        SparkJobOperator(task_id="job", **arguments)


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
    for created in run.stage.pods():
        metadata, spec = (created.entry["responseObject"][part] for part in ("metadata", "spec"))
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
