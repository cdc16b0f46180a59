"""
Dags for days on which the cluster, or Airflow, is away, forgets, or cleans up.

Each job lives until a test opens the gate of its run. A driver is known by its memory, which no other Dag's has.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator
from durable_spark.operators.spark_submit import SparkSubmitOperator

SOURCE = str(Path(__file__).resolve().parents[2] / "apps" / "Driver.java")
HOME = os.environ["AIRFLOW_HOME"]
EXIT_CODE = "{{ params.exit_code }}"


def dag_of_one(dag_id: str, **arguments: Any) -> None:
    with DAG(dag_id, schedule=None, params={"exit_code": Param("0", type="string")}):
        SparkJobOperator(
            task_id="job",
            **{
                "poll_interval": 1,
                "retries": 2,
                "retry_delay": timedelta(seconds=1),
                "retry_exponential_backoff": False,
                **arguments,
            },
        )


def pod(dag_id: str, **arguments: Any) -> None:
    wait, code = 'until [ -e "/airflow/gates/{{ run_id }}" ]; do sleep 0.3; done', EXIT_CODE
    container = {
        "name": "spark-kubernetes-driver",
        "command": ["sh", "-c", f"{wait}; echo exiting with {code}; exit {code}"],
        "volumeMounts": [{"name": "airflow", "mountPath": "/airflow"}],
    }
    airflow = {"name": "airflow", "hostPath": {"path": HOME}}
    shell = {
        "application": "local:///nothing.py",
        "conf": {
            "spark.kubernetes.container.image": "localhost/spark:test",
            "spark.kubernetes.container.image.pullPolicy": "Never",
        },
        "pod": {"spec": {"terminationGracePeriodSeconds": 1, "containers": [container], "volumes": [airflow]}},
        "conn_id": "kubernetes",
    }
    dag_of_one(dag_id, **{**shell, **arguments})


def driver(dag_id: str, memory: int, **arguments: Any) -> None:
    small = {
        "application": SOURCE,
        "java_class": "org.codehaus.janino.SimpleCompiler",
        "application_args": [SOURCE, "Driver", HOME + "/gates/{{ run_id }}", EXIT_CODE],
        "driver_memory": f"{memory}m",
        "conf": {"spark.driver.extraJavaOptions": "-XX:+UseSerialGC"},
        "conn_id": "spark_default",
    }
    dag_of_one(dag_id, **{**small, **arguments})


# A cluster that answers nonsense, or nothing: each Dag has a connection of its name

for number, trouble in enumerate(("refused", "hang", "half", "garbage", "e500", "e429")):
    pod(f"pod_{trouble}", conn_id=f"pod_{trouble}", retries=0)
    driver(f"driver_{trouble}", 140 + number, conn_id=f"driver_{trouble}", retries=0)
pod("pod_token", conn_id="pod_token", retries=0)
driver("driver_token", 150, conn_id="driver_token", retries=0)
pod("pod_long", conn_id="pod_long", outage_timeout=5, retries=20)
driver("driver_long", 151, conn_id="driver_long", outage_timeout=5, retries=20)
for name in ("dead_ended", "dead_failed", "dead_again", "dead_running", "dead_held"):
    pod(
        name,
        conn_id="dead_kubernetes",
        retries=1 if name == "dead_again" else 0,
        hold_pod=name == "dead_held",
        pod_at_end="delete" if name == "dead_held" else "keep",
    )

# Airflow is away

for name in ("away_deferred", "away_running", "away_intent", "away_sent", "away_resuming", "away_last"):
    pod(name)
pod("away_failing", retries=1)

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
                poll_interval=1,
                retries=2,
                retry_delay=timedelta(seconds=1),
                **{**arguments, "application_args": [*arguments["application_args"], "600", "0"]},
            )

# Long lives

for name in ("long_retry", "long_deferred", "long_trigger", "long_instance", "long_run"):
    pod(name)
for name in ("long_done", "long_marked", "long_killed"):
    pod(name)
pod("long_kept", on_kill="keep")
pod("long_timeout", execution_timeout=timedelta(seconds=40), retries=0)
