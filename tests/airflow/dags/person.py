"""
Dags whose tasks a person clears, marks, deletes or pauses, or whose time runs out.

Each driver is a pod, which lives until the gate of its run is opened, or until it is killed.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import GATE, pod_of

NAMED = {"AIRFLOW__DURABLE_SPARK__DEPLOYMENT": "person"}
LONG = timedelta(hours=1)
SOON = timedelta(seconds=30)


def pod(task_id: str = "job", *, grace: int = 1, **arguments: Any) -> SparkJobOperator:
    """
    Return a task whose driver is a pod.

    :param grace: seconds for which the pod may live on after its deletion, of which it makes use.
    """
    script = f'trap "" TERM; until [ -e "{GATE}" ]; do sleep 0.3; done; exit {{{{ params.exit_code }}}}'
    return SparkJobOperator(task_id=task_id, **{**pod_of(script, grace=grace), **arguments})


def dag_of(dag_id: str, **options: Any) -> DAG:
    return DAG(dag_id, schedule=None, params={"exit_code": Param("0", type="string")}, **options)


def dag_of_one(dag_id: str, **arguments: Any) -> None:
    with dag_of(dag_id):
        pod(**arguments)


# Cleared

with dag_of("clear_chain"):
    pod() >> pod("after")
for name in ("clear_deferred", "clear_lost", "clear_dropped"):
    dag_of_one(name)
dag_of_one("clear_failed", retries=0)
dag_of_one("clear_following", on_clear="reconnect")
dag_of_one("clear_sending", conn_id="kubernetes_proxied")
dag_of_one("clear_waiting", deferrable=False)
dag_of_one("clear_retry", retry_delay=LONG)
dag_of_one("clear_kept", on_kill="keep")
dag_of_one("clear_twice", grace=600)
for name, on_clear in (("clear_named", "kill"), ("clear_labelled", "reconnect")):
    dag_of_one(name, on_clear=on_clear, pre_execute=lambda _: os.environ.update(NAMED))

# Marked, deleted, paused

for way in ("failed", "success", "run", "deleted"):
    dag_of_one(f"end_{way}")
    dag_of_one(f"send_{way}", conn_id="kubernetes_proxied")
for way in ("failed", "deleted"):
    dag_of_one(f"keep_{way}", on_kill="keep", hold_pod=True)
dag_of_one("send_kept", on_kill="keep", hold_pod=True, conn_id="kubernetes_proxied")
dag_of_one("wait_failed", deferrable=False)
dag_of_one("paused", conn_id="kubernetes_proxied")

# Out of time

dag_of_one("time_own", execution_timeout=SOON, retries=1)
with dag_of("time_default", default_args={"execution_timeout": SOON}):
    pod(retries=0)
dag_of_one("time_waiting", execution_timeout=SOON, retries=0, deferrable=False)
dag_of_one("time_same", execution_timeout=SOON, retries=0, conn_id="kubernetes_proxied")
dag_of_one("time_kept", execution_timeout=SOON, retries=0, on_timeout="keep")
dag_of_one("time_retried", execution_timeout=SOON, retries=1)
dag_of_one("time_away", execution_timeout=timedelta(seconds=60), retries=0)
dag_of_one("time_moved", execution_timeout=timedelta(seconds=105), retries=0)
for name in ("time_run", "time_run_waiting"):
    with dag_of(name, dagrun_timeout=SOON):
        pod(deferrable=name == "time_run")

# No try left

dag_of_one("last_killed", retries=0, on_clear="reconnect")
dag_of_one("last_away", retries=1, outage_timeout=8, kill_timeout=8, conn_id="kubernetes_proxied")
