"""Dags whose ends are seen, and reported a while later: the time for a test to kill the triggerers in between."""

from __future__ import annotations

import os

from tests.airflow.small_jobs import dag_of_driver, dag_of_pod

# Read by the operator, in a process that has read this file and no other. A command that reads all has its own.
os.environ.setdefault("AIRFLOW__DURABLE_SPARK__EARLIEST_EVENT", "75")

dag_of_pod("lost_seen")
dag_of_driver("lost_driver_seen")
