"""Dags for days on which Airflow is away. Each job lives until a test opens the gate of its run."""

from __future__ import annotations

from tests.airflow.small_jobs import dag_of_pod

for name in ("away_deferred", "away_running", "away_intent", "away_sent", "away_resuming", "away_last"):
    dag_of_pod(name, retries=5)  # some of which Airflow takes down with it
dag_of_pod("away_failing", retries=3)
for name in ("long_done", "long_marked", "long_killed"):
    dag_of_pod(name)
