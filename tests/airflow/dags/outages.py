"""Dags for days on which the cluster is away. Each job lives until a test opens the gate of its run."""

from __future__ import annotations

from tests.airflow.small_jobs import dag_of_driver, dag_of_pod

# A cluster that answers nonsense, or nothing: each Dag has a connection of its name

for trouble in ("refused", "hang", "half", "garbage", "e500", "e429", "token"):
    dag_of_pod(f"pod_{trouble}", conn_id=f"pod_{trouble}", retries=0)
    dag_of_driver(f"driver_{trouble}", conn_id=f"driver_{trouble}", retries=0)
dag_of_pod("pod_long", conn_id="pod_long", outage_timeout=5, retries=20)
dag_of_driver("driver_long", conn_id="driver_long", outage_timeout=5, retries=20)
for name in ("dead_ended", "dead_failed", "dead_again", "dead_running", "dead_held"):
    dag_of_pod(
        name,
        conn_id="dead_kubernetes",
        retries=1 if name == "dead_again" else 0,
        hold_pod=name == "dead_held",
        pod_at_end="delete" if name == "dead_held" else "keep",
    )
