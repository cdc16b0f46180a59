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
{before}
airflow = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - airflow)))
"""

_OURS_AT_PARSE_TIME = {
    "durable_spark",
    "durable_spark._metrics",
    "durable_spark.hooks",
    "durable_spark.hooks.form",  # by the provider's metadata, which Airflow reads
    "durable_spark.hooks.job",
    "durable_spark.jobs",
    "durable_spark.links",
    "durable_spark.operators",
    "durable_spark.operators._cluster",
    "durable_spark.operators._conversation",
    "durable_spark.operators._ending",
    "durable_spark.operators._lineage",
    "durable_spark.operators._recorded",
    "durable_spark.operators._store",
    "durable_spark.operators._telling",
    "durable_spark.operators.job",
    "durable_spark.operators.spark",
}

_OURS_IN_THE_DROP_IN = {
    "durable_spark.hooks._connection",
    "durable_spark.hooks._spark_arguments",
    "durable_spark.hooks.cli",
    "durable_spark.hooks.spark",
    "durable_spark.operators._spark_submit",
    "durable_spark.operators.spark_submit",
}


@pytest.mark.parametrize("module", ["durable_spark.operators.job", "durable_spark.operators.spark"])
def test_importing_an_operator_brings_no_client_no_trigger_and_no_cluster(module: str) -> None:
    added = _added_by(module)
    ours = {name for name in added if name.partition(".")[0] == "durable_spark"}
    assert module in ours
    assert ours <= _OURS_AT_PARSE_TIME
    airflow = {name for name in added if name.partition(".")[0] == "airflow"}
    assert not [name for name in airflow if name.startswith("airflow.triggers")]
    assert len(airflow) <= 10, "Airflow's own operators do without most of these"
    assert {name.partition(".")[0] for name in added - ours - airflow} <= sys.stdlib_module_names


def test_the_drop_in_adds_little_to_what_it_replaces() -> None:
    added = _added_by(
        "durable_spark.operators.spark_submit", before="import airflow.providers.apache.spark.operators.spark_submit"
    )
    ours = {name for name in added if name.partition(".")[0] == "durable_spark"}
    assert ours <= _OURS_AT_PARSE_TIME | _OURS_IN_THE_DROP_IN
    assert not [name for name in added if name.startswith(("aiohttp", "kubernetes_asyncio", "airflow.triggers"))]


def _added_by(module: str, *, before: str = "") -> set[str]:
    probe = _PROBE.format(module=module, before=before)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))
