"""What Airflow sees of the package: the provider, its example Dag, a Dag that is run without a scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from durable_spark.hooks.form import CONN_FIELDS
from tests.airflow.conftest import ENDED, Run, Stage

PI = Path(__file__).parents[2] / "dev" / "apps" / "pi.py"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["list"], ["airflow-provider-durable-spark"]),
        (["get", "airflow-provider-durable-spark"], ["0.1.0"]),
        (["hooks"], ["durable_spark", "durable_spark.hooks.spark.SparkHook"]),
        (["triggers"], ["durable_spark.triggers.job"]),
        (
            ["links"],
            [f"durable_spark.links.{link}" for link in ("JobLink", "JobLogLink", "JobTrackingLink", "JobHistoryLink")],
        ),
    ],
)
def test_airflow_knows_the_provider(stage: Stage, command: list[str], expected: list[str]) -> None:
    said = stage.airflow.airflow("providers", *command, *(["--output", "json"] if command != ["get"] else []))
    for word in expected:
        assert word in said


def test_the_connection_form(stage: Stage) -> None:
    forms = stage.airflow._request("GET", "/ui/connections/hook_meta")
    form = next(form for form in forms if form["connection_type"] == "durable_spark")
    assert {name for name, field in form["standard_fields"].items() if field and field["hidden"]} == {"url_schema"}
    assert set(form["extra_fields"]) == set(CONN_FIELDS)


def test_the_test_button(stage: Stage) -> None:
    connection = stage.cluster.connection()
    body = {**connection, "connection_id": "trial", "extra": json.dumps(connection["extra"])}
    good = stage.airflow.api("POST", "/connections/test", body)
    assert good["status"], good
    assert "leads" in good["message"]
    bad = stage.airflow.api("POST", "/connections/test", {**body, "extra": json.dumps({"ui-port": 1})})
    assert not bad["status"]
    assert ":1/" in bad["message"]


def test_the_example_dag_runs_pyspark(run: Callable[..., Run]) -> None:
    life = run("durable_spark_example", task="pi", application=str(PI), seconds="1")
    life.wait(*ENDED, deadline=180)
    assert life.ti.state == "success", life.logs()
    assert [d.state for d in life.drivers()] == ["FINISHED"]


def test_dag_test_needs_no_triggerer(stage: Stage) -> None:
    before = {driver.id for driver in stage.cluster.drivers()}
    stage.airflow.airflow("dags", "test", "life", "--conf", json.dumps({"seconds": "0"}), timeout=180)
    assert [d.state for d in stage.cluster.drivers() if d.id not in before] == ["FINISHED"]
