"""What Airflow's UI and provider manager ask for."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest
from airflow.sdk import BaseHook, BaseOperator, BaseOperatorLink
from airflow.sdk.execution_time.xcom import XCom
from airflow.triggers.base import BaseTrigger

from durable_spark.hooks.form import CONN_FIELDS
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.hooks.spark import SparkHook
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.hooks.yarn import YarnHook
from durable_spark.jobs import Link
from durable_spark.links import JobHistoryLink, JobLink, JobLogLink, JobTrackingLink
from durable_spark.operators.job import DurableJobOperator
from durable_spark.operators.spark import SparkJobOperator
from durable_spark.operators.spark_submit import SparkSubmitOperator
from durable_spark.provider import get_provider_info
from durable_spark.triggers.job import JobTrigger, SubmissionTrigger

LINKS = [
    (JobLink, "Job", "durable_spark_job_link"),
    (JobLogLink, "Driver log", "durable_spark_log_link"),
    (JobTrackingLink, "Spark UI", "durable_spark_tracking_link"),
    (JobHistoryLink, "Spark history", "durable_spark_history_link"),
]


def listed(kind: str, base: type) -> set[type]:
    """Return the classes in the modules that the metadata lists under a kind."""
    modules = [import_module(name) for entry in get_provider_info()[kind] for name in entry["python-modules"]]
    return {
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, base) and each.__module__ == module.__name__
    }


def test_airflow_finds_it() -> None:
    (entry,) = entry_points(group="apache_airflow_provider", name="provider_info").select(
        value="durable_spark.provider:get_provider_info"
    )
    assert entry.load() is get_provider_info


def test_all_that_a_user_may_import_is_listed() -> None:
    assert listed("hooks", BaseHook) >= {SparkHook, StandaloneHook, KubernetesHook, YarnHook}
    assert listed("operators", BaseOperator) == {DurableJobOperator, SparkJobOperator, SparkSubmitOperator}
    assert listed("triggers", BaseTrigger) == {JobTrigger, SubmissionTrigger}


def test_the_connection_type() -> None:
    (connection,) = get_provider_info()["connection-types"]
    module, _, name = connection["hook-class-name"].rpartition(".")
    assert getattr(import_module(module), name) is SparkHook
    assert (connection["connection-type"], connection["hook-name"]) == (SparkHook.conn_type, SparkHook.hook_name)
    assert connection["conn-fields"] == CONN_FIELDS


def test_the_links() -> None:
    classes = [link for link, _, _ in LINKS]
    assert get_provider_info()["extra-links"] == [f"{link.__module__}.{link.__qualname__}" for link in classes]
    assert [type(link) for link in SparkJobOperator.operator_extra_links] == classes
    assert {link.xcom_key for link in SparkJobOperator.operator_extra_links} == {link.xcom_key for link in Link}


@pytest.mark.parametrize(("kind", "name", "key"), LINKS)
def test_a_link_is_what_was_stored_last(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseOperatorLink], name: str, key: str
) -> None:
    stored: dict[str, str] = {}
    monkeypatch.setattr(XCom, "get_value", lambda *, ti_key, key: stored.get(key))
    link, nothing = kind(), None
    ask: Any = link.get_link
    assert (link.name, ask(nothing, ti_key=nothing)) == (name, "")
    stored[key] = "https://host/"
    assert ask(nothing, ti_key=nothing) == "https://host/"
