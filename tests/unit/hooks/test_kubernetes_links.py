"""Links from the templates in a connection."""

from __future__ import annotations

import json
from typing import Any

import pytest
from airflow.sdk import Connection

from durable_spark.hooks._connection import Extras
from durable_spark.hooks._kubernetes_links import LinkTemplates
from durable_spark.jobs import BadConfiguration, Link


def read(**extra: Any) -> LinkTemplates:
    extras = {name.replace("_", "-"): value for name, value in extra.items()}
    return LinkTemplates.read(Extras(Connection(conn_id="k8s", conn_type="spark", extra=json.dumps(extras))))


def test_nothing_is_linked_by_itself() -> None:
    assert read().fill(namespace="n", pod="p", uid="u", app_id="a") == {}


def test_filled() -> None:
    links = read(
        dashboard_url="https://dashboard/#/pod/{namespace}/{pod}",
        log_url="http://logs:3000/?q=%7Buid%3D{uid}%7D&literal={{x}}",
        history_url="https://history/history/{app_id}/jobs/",
    )
    assert links.fill(namespace="n", pod="p", uid="u", app_id="spark-1") == {
        Link.JOB: "https://dashboard/#/pod/n/p",
        Link.LOG: "http://logs:3000/?q=%7Buid%3Du%7D&literal={x}",
        Link.HISTORY: "https://history/history/spark-1/jobs/",
    }


def test_values_cannot_leave_their_place() -> None:
    filled = read(log_url="https://logs/{app_id}").fill(app_id="../x?y=z#javascript:alert(1)")
    assert filled == {Link.LOG: "https://logs/..%2Fx%3Fy%3Dz%23javascript%3Aalert%281%29"}


def test_a_value_that_is_not_known_makes_no_link() -> None:
    links = read(log_url="https://logs/{pod}", history_url="https://history/{app_id}")
    assert links.fill(pod="p", app_id="") == {Link.LOG: "https://logs/p"}


@pytest.mark.parametrize("name", ["dashboard-url", "log-url", "history-url"])
@pytest.mark.parametrize(
    "template",
    [
        "logs/{pod}",
        "ftp://logs/{pod}",
        "javascript:alert({pod})",
        "https:///{pod}",
        "https://[logs/{pod}",
        "https://logs/{name}",
        "https://logs/{}",
        "https://logs/{0}",
        "https://logs/{pod.__class__}",
        "https://logs/{pod[0]}",
        "https://logs/{pod!r}",
        "https://logs/{pod:>99}",
        "https://logs/{pod",
        "https://logs/\n{pod}",
    ],
)
def test_templates_that_cannot_be_used(name: str, template: str) -> None:
    with pytest.raises(BadConfiguration, match=rf"'{name}' of connection 'k8s'.*https://host/{{namespace}}/{{pod}}"):
        read(**{name: template})
