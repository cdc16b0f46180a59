"""
Dags whose jobs are forgotten, by their cluster or by Airflow's clean-up.

Each job lives until a test opens the gate of its run. A driver is known by its memory, which no other Dag's has.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta

from airflow.sdk import DAG

from durable_spark.operators.spark_submit import SparkSubmitOperator
from tests.airflow.small_jobs import RETRIED, dag_of_driver, dag_of_pod

# Lost

for name in ("lost_pod", "lost_retry"):
    dag_of_pod(name)
for name in ("lost_again", "lost_retry_again"):
    dag_of_pod(name, on_lost="resubmit")
dag_of_driver("lost_driver")
dag_of_driver("lost_driver_again", on_lost="resubmit")
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
    dag_of_pod(name)
dag_of_pod("long_kept", on_kill="keep")
dag_of_pod("long_timeout", execution_timeout=timedelta(seconds=40), retries=0)
