"""The tasks that ``scripts/bench costs`` runs: a Dag for each way, with its operator and arguments."""

from __future__ import annotations

import json
import os

from airflow.providers.common.compat.module_loading import import_string
from airflow.sdk import DAG

for name, (operator, arguments) in json.loads(os.environ["BENCHMARK_WAYS"]).items():
    with DAG(name, schedule=None):
        import_string(operator)(task_id="job", retries=0, **arguments)
