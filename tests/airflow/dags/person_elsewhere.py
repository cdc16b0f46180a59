"""What person.py has, on the other clusters, where a job costs a JVM, and whose Dags import upstream's operator."""

from __future__ import annotations

import json
import os
from datetime import timedelta

from airflow.sdk import DAG

from durable_spark.operators.spark import SparkJobOperator
from durable_spark.operators.spark_submit import SparkSubmitOperator
from tests.airflow.marks import mark_of
from tests.clusters import marked

for cluster, arguments in json.loads(os.environ.get("SUBMIT_ARGUMENTS", "{}")).items():
    if cluster != "kubernetes":
        operator, conn_id = {
            "standalone": (SparkJobOperator, "spark_default"),
            "yarn": (SparkSubmitOperator, "submit_yarn"),
        }[cluster]
        application_args = [*arguments.get("application_args", ()), "600", "0"]
        own = {"task_id": "job", "conn_id": conn_id, "retries": 0, "poll_interval": 1}
        arguments = {**arguments, **own, "application_args": application_args}
        for topic, more in (("other", {}), ("time", {"execution_timeout": timedelta(minutes=1)})):
            dag_id = f"{topic}_{cluster}"
            with DAG(dag_id, schedule=None):
                operator(**{**marked(cluster, mark_of(dag_id), arguments), **more})
