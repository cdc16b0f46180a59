"""Dags whose tasks are looked at from outside: by metrics, and by the command that lists orphans."""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import shell_pod

NAMED = {"AIRFLOW__DURABLE_SPARK__DEPLOYMENT": "observed"}
ARGS = ["item", "{{ run_id }}", "0"]

with DAG("observed_counted", schedule=None):
    SparkJobOperator(task_id="job", application_args=ARGS, **shell_pod(conn_id="counted"))
with DAG("observed_orphan", schedule=None):
    SparkJobOperator(
        task_id="job",
        application_args=ARGS,
        pre_execute=lambda _: os.environ.update(NAMED),
        **shell_pod(retries=1, retry_delay=timedelta(hours=1)),
    )
