"""What Airflow sees of the package: the provider, its connection, its example Dag."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from durable_spark.hooks.form import CONN_FIELDS
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.together import together

PI = Path(__file__).parents[2] / "dev" / "apps" / "pi.py"


@together
def test_airflow_knows_the_links(stage: Stage, run: Callable[..., Run]) -> None:
    said = stage.airflow.airflow("providers", "links", "--output", "json")
    for link in ("JobLink", "JobLogLink", "JobTrackingLink", "JobHistoryLink"):
        assert f"durable_spark.links.{link}" in said


@together
def test_the_connection_form(stage: Stage, run: Callable[..., Run]) -> None:
    forms = stage.airflow._request("GET", "/ui/connections/hook_meta")
    form = next(form for form in forms if form["connection_type"] == "durable_spark")
    assert {name for name, field in form["standard_fields"].items() if field and field["hidden"]} == {"url_schema"}
    assert set(form["extra_fields"]) == set(CONN_FIELDS)


@together
def test_the_test_button(stage: Stage, run: Callable[..., Run]) -> None:
    connection = stage.cluster.connection()
    body = {**connection, "connection_id": "trial", "extra": json.dumps(connection["extra"])}
    good = stage.airflow.api("POST", "/connections/test", body)
    assert good["status"], good
    assert "leads" in good["message"]
    bad = stage.airflow.api("POST", "/connections/test", {**body, "extra": json.dumps({"ui-port": 1})})
    assert not bad["status"]
    assert ":1/" in bad["message"]


@together
def test_the_example_dag_runs_pyspark(stage: Stage, run: Callable[..., Run]) -> None:
    life = run("durable_spark_example", task="pi", application=str(PI), seconds="1")
    life.wait(*ENDED, deadline=180)
    assert life.ti.state == "success", life.logs()
    assert [d.state for d in life.drivers()] == ["FINISHED"]
