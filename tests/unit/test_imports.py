"""
What importing the operators brings along. Dag files are parsed over and over, so it must stay little.

Modules are counted, not milliseconds: ``scripts/bench imports`` measures those.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROBE = """
import json, sys
from airflow.sdk import DAG, BaseOperator
airflow = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - airflow)))
"""

_OURS_AT_PARSE_TIME = {
    "durable_spark",
    "durable_spark.hooks",
    "durable_spark.hooks.form",  # by the provider's metadata, which Airflow reads
    "durable_spark.hooks.job",
    "durable_spark.jobs",
    "durable_spark.links",
    "durable_spark.operators",
    "durable_spark.operators._conversation",
    "durable_spark.operators._store",
    "durable_spark.operators.job",
    "durable_spark.operators.spark",
}


@pytest.mark.parametrize("module", ["durable_spark.operators.job", "durable_spark.operators.spark"])
def test_importing_an_operator_brings_no_client_no_trigger_and_no_cluster(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE.format(module=module)], capture_output=True, text=True, timeout=120, check=True
    )
    added = set(json.loads(done.stdout.splitlines()[-1]))
    ours = {name for name in added if name.partition(".")[0] == "durable_spark"}
    assert module in ours
    assert ours <= _OURS_AT_PARSE_TIME
    airflow = {name for name in added if name.partition(".")[0] == "airflow"}
    assert not [name for name in airflow if name.startswith("airflow.triggers")]
    assert len(airflow) <= 10, "Airflow's own operators do without most of these"
    assert {name.partition(".")[0] for name in added - ours - airflow} <= sys.stdlib_module_names
