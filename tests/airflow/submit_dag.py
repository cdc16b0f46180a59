"""
Dags as they are written for the Spark provider's operator, one for each cluster.

The suite puts copies of this file into its Dags folder: one as it is, and others with nothing but the import changed.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import DAG, Param

ARGUMENTS = json.loads(os.environ.get("SUBMIT_ARGUMENTS", "{}"))

for cluster, arguments in ARGUMENTS.items():
    with DAG(
        dag_id=f"{Path(__file__).stem}_{cluster}",
        schedule=None,
        params={"seconds": Param("1", type="string"), "exit_code": Param("0", type="string")},
    ) as dag:
        SparkSubmitOperator(
            task_id="job",
            conn_id=f"submit_{cluster}",
            retries=2,
            retry_delay=timedelta(seconds=1),
            **{
                **arguments,
                "application_args": [
                    *arguments.get("application_args", ()),
                    "{{ params.seconds }}",
                    "{{ params.exit_code }}",
                ],
                "post_submit_commands": ["sh -c 'echo {{ ti.try_number }} >> $SUBMIT_NOTES/{{ run_id }}'"],
            },
        )
    globals()[dag.dag_id] = dag
