"""
Dags whose jobs are forgotten, by their cluster or by Airflow's clean-up.

Each job lives until a test opens the gate of its run. A driver is known by its memory, which no other Dag's has.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator
from durable_spark.operators.spark_submit import SparkSubmitOperator
from tests.airflow.small_jobs import GATE, RETRIED, pod_of, small_driver

EXIT_CODE = "{{ params.exit_code }}"


def dag_of_one(dag_id: str, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params={"exit_code": Param("0", type="string")}):
        SparkJobOperator(task_id="job", **arguments)


def pod(dag_id: str, **arguments: Any) -> None:
    script = f"until [ -e {GATE} ]; do sleep 0.3; done; echo exiting with {EXIT_CODE}; exit {EXIT_CODE}"
    dag_of_one(dag_id, **{**pod_of(script), **arguments})


def driver(dag_id: str, memory: int, **arguments: Any) -> None:
    gate = os.environ["AIRFLOW_HOME"] + "/gates/{{ run_id }}"
    dag_of_one(dag_id, **{**small_driver(gate, EXIT_CODE), "driver_memory": f"{memory}m", **arguments})


# Lost

for name in ("lost_pod", "lost_seen", "lost_retry"):
    pod(name)
for name in ("lost_again", "lost_retry_again"):
    pod(name, on_lost="resubmit")
driver("lost_driver", 160)
driver("lost_driver_seen", 161)
driver("lost_driver_again", 162, on_lost="resubmit")
if (arguments := json.loads(os.environ.get("SUBMIT_ARGUMENTS", "{}")).get("yarn")) is not None:
    for name in ("lost_app", "lost_app_again"):
        with DAG(name, schedule=None):
            SparkSubmitOperator(
                task_id="job",
                conn_id="submit_yarn",
                on_lost="resubmit" if name == "lost_app_again" else "fail",
                **RETRIED,
                **{**arguments, "application_args": [*arguments["application_args"], "600", "0"]},
            )

# Long lives

for name in ("long_retry", "long_deferred", "long_trigger", "long_instance", "long_run"):
    pod(name)
pod("long_kept", on_kill="keep")
pod("long_timeout", execution_timeout=timedelta(seconds=40), retries=0)
