"""Dags of the Airflow suite on Kubernetes: one driver pod each, whose length and exit code come from the run's conf."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import dag_of_pod, pod_of


def dag_of_one_pod(dag_id: str, **arguments: Any) -> DAG:
    """Return a Dag whose task ``job`` runs a shell script in the driver's place."""
    with DAG(
        dag_id=dag_id,
        schedule=None,
        params={"seconds": Param("1", type="string"), "exit_code": Param("0", type="string")},
    ) as dag:
        script = "echo begun; sleep {{ params.seconds }}; echo exiting with {{ params.exit_code }}"
        script += "; exit {{ params.exit_code }}"
        SparkJobOperator(task_id="job", **{**pod_of(script), **arguments})
    return dag


for name in ("pod", "pod_active", "pod_succeeded", "pod_failed", "pod_unsent", "pod_no_uid", "pod_marked"):
    globals()[name] = dag_of_one_pod(name)
for name in ("pod_held", "pod_held_marked"):
    globals()[name] = dag_of_one_pod(name, hold_pod=True, pod_at_end="delete")
dag_of_pod("pod_held_alone", hold_pod=True, pod_at_end="delete")
for status in (403, 503):
    dag_of_pod(f"pod_held_{status}", conn_id="kubernetes_proxied", hold_pod=True, pod_at_end="delete")
pod_spark = dag_of_one_pod(
    "pod_spark",
    application=f"local://{Path(__file__).resolve().parents[2] / 'apps' / 'driver.py'}",
    application_args=["{{ params.seconds }}", "{{ params.exit_code }}"],
    conf=json.loads(os.environ.get("KUBERNETES_CONF", "{}")),
    pod=None,
)
pod_single = dag_of_one_pod("pod_single", retries=0)
pod_stuck = dag_of_one_pod(
    "pod_stuck",
    conf={
        "spark.kubernetes.container.image": "no/such:image",
        "spark.kubernetes.container.image.pullPolicy": "Never",
        "spark.hadoop.store.password": "hush-hush-hush",
    },
    start_timeout=10,
    hold_pod=True,
    retries=0,
)
