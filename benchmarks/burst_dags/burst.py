"""The mapped task that ``scripts/bench burst`` runs: an operator, its arguments, and how many of it."""

from __future__ import annotations

import json
import os

from airflow.providers.common.compat.module_loading import import_string
from airflow.sdk import DAG

operator, arguments, count = json.loads(os.environ["BENCHMARK_BURST"])
args = arguments.pop("application_args", [])
with DAG("burst", schedule=None, max_active_tasks=10_000):
    mapped = import_string(operator).partial(task_id="job", **arguments)
    mapped.expand(application_args=[[*args, str(number)] for number in range(count)])
