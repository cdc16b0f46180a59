"""
A Dag as it is written for the Spark provider's operator; the last word of the file's name is the cluster.

The suite puts copies of this file into its Dags folder: some as it is, and others with nothing but the import changed.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import DAG, Param

from tests.airflow.marks import mark_of
from tests.clusters import marked

NAME = Path(__file__).stem
CLUSTER = NAME.rpartition("_")[2]
GATE = f"{os.environ['SUBMIT_GATES']}/{{{{ run_id }}}}"

with DAG(
    dag_id=NAME,
    schedule=None,
    params={"seconds": Param("", type="string"), "exit_code": Param("0", type="string")},
):
    arguments = marked(CLUSTER, mark_of(NAME), json.loads(os.environ["SUBMIT_ARGUMENTS"])[CLUSTER])
    SparkSubmitOperator(
        task_id="job",
        conn_id=f"submit_{CLUSTER}",
        retries=1,
        retry_delay=timedelta(seconds=1),
        **{
            **arguments,
            "application_args": [
                *arguments.get("application_args", ()),
                "{% if params.seconds %}{{ params.seconds }}{% else %}" + GATE + "{% endif %}",
                "{{ params.exit_code }}",
            ],
            "post_submit_commands": ["sh -c 'echo {{ ti.try_number }} >> $SUBMIT_NOTES/{{ run_id }}'"],
        },
    )
