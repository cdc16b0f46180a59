"""
Dags of the Airflow suite whose tasks are moved about: from triggerer to triggerer, from worker to worker.

Each job lives until a test opens the gate of its run, when it has seen what it waited for.
"""

from __future__ import annotations

import os
from typing import Any

from airflow.sdk import DAG

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.marks import mark_of
from tests.airflow.small_jobs import GATE, pod_of, small_driver


def dag_of_one(dag_id: str, *, items: int = 0, **arguments: Any) -> DAG:
    """
    Return a Dag with one task, ``job``.

    :param items: over how many the task is mapped; not at all if 0.
    """
    with DAG(dag_id, schedule=None) as dag:
        if items:
            mapped = SparkJobOperator.partial(task_id="job", **arguments)
            mapped.expand(application_args=[[str(item)] for item in range(items)])
        else:
            SparkJobOperator(task_id="job", **arguments)
    return dag


def pod(dag_id: str, *, exit_code: int = 0, **arguments: Any) -> DAG:
    """Return a Dag whose driver is a pod that runs a shell script in Spark's place."""
    script = f"until [ -e {GATE} ]; do sleep 0.3; done; exit {exit_code}"
    return dag_of_one(dag_id, **{**pod_of(script), **arguments})


def driver(dag_id: str, **arguments: Any) -> DAG:
    """Return a Dag whose driver is one without Spark on the standalone cluster."""
    gate = f"{os.environ['AIRFLOW_HOME']}/gates/{{{{ run_id }}}}"
    return dag_of_one(dag_id, **{**small_driver(gate, "0"), **arguments})


# Followed by a triggerer that is stopped
moved = pod("moved")
moved_items = pod("moved_items", items=3)
moved_ended = pod("moved_ended")
moved_unseen = pod("moved_unseen")
moved_marked = pod("moved_marked", items=2)
moved_cleared = pod("moved_cleared")
moved_unreached = pod("moved_unreached")
moved_retried = pod("moved_retried", outage_timeout=2, retries=20)

# Run by a worker that is cut off
for phase in ("intent", "post", "uid", "deferral", "resume", "verdict", "cleared"):
    globals()[f"late_{phase}"] = pod(f"late_{phase}")
late_waiting = pod("late_waiting", deferrable=False)
late_driver = driver("late_driver", conn_id="spark_default", driver_memory=mark_of("late_driver"))
late_request = driver("late_request", conn_id="spark_proxied", driver_memory=mark_of("late_request"))

# On Celery
for story in ("runner", "pool", "active", "succeeded", "submitting", "lost", "twice", "traced"):
    globals()[f"celery_{story}"] = pod(f"celery_{story}")
celery_failed = pod("celery_failed", exit_code=3)
for story in ("marked", "cleared", "waiting"):
    globals()[f"celery_{story}"] = pod(f"celery_{story}", deferrable=False)
