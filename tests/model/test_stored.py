"""
What people and this package itself have written, and anybody may have written over: records, arguments, connections.

In: the values as :mod:`durable_spark.jobs`, triggers and Airflow write them, tampered with. Out: ``ValueError`` and
ours are the only exceptions, and from a trigger's constructor ``TypeError``; what is accepted can be worked with, and
is the same once written and read again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from airflow.sdk import Connection

from durable_spark.hooks import _kubernetes_access, _standalone_masters, _yarn_managers
from durable_spark.hooks._http import ssl_context
from durable_spark.hooks._kubernetes_links import LinkTemplates
from durable_spark.jobs import DurableJobError, JobRef, JobState, Record, Submission
from durable_spark.triggers.job import JobEvent, JobTrigger, JobTriggerArguments, noted_end
from tests.model.feeding import URL, Parser, fed, loop
from tests.model.mutations import changed
from tests.model.wire import Wire, wire

__all__ = ["fed", "wire"]  # fixtures

TOKEN = "a1" * 16

# --- what stands in Airflow's database

SUBMISSION = Submission(
    token=TOKEN,
    owner="o",
    name="dag.task",
    cluster_time=1795406000.0,
    job=JobRef("spark:pi1"),
    evidence={"newest": "4"},
)
RECORD = {
    "version": 1,
    "submission": SUBMISSION.to_json(),
    "generation": {"max_tries": 2, "traceparent": "00-a"},
    "fingerprint": "",
    "arguments": "77e1",
    "cluster": ["spark://m1:7077"],
    "intended_at": 1795406000.6,
    "job": ["driver-20261123035411-0004", ""],
    "killing": False,
    "unanswered": False,
    "verdict": {"state": "failed", "raw": "FAILED", "message": "", "at": 1795406001.0},
    "previous": [["t", "driver-20261123035411-0003", "failed"]],
}
ARGUMENTS = JobTriggerArguments(
    hook="durable_spark.hooks.spark.SparkHook",
    conn_id="c",
    cluster=("spark://m1:7077",),
    job=JobRef("driver-20261123035411-0004"),
    submission=SUBMISSION,
    dag_id="d",
    run_id="r",
    task_id="t",
    map_index=-1,
    ti_id="i",
    deadline=1795409600.0,
).to_json()
EVENT = {
    "v": 1,
    "kind": "failed",
    "job_id": "j",
    "uid": "",
    "token": TOKEN,
    "state": "FAILED",
    "message": "",
    "ti_id": "i",
}


def check_record(value: Any) -> None:
    with contextlib.suppress(ValueError):
        record = Record.from_json(value)
        if record.verdict is not None and record.verdict.state is JobState.SUCCEEDED:
            assert value["verdict"]["state"] == "succeeded"
        assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
        record.as_previous()
        record.lists("x")


def check_arguments(value: Any) -> None:
    try:
        trigger = JobTrigger(value)
    except TypeError:  # the only exception that does not end Airflow's whole triggerer (3.3.2)
        return
    args = trigger._args
    assert JobTriggerArguments.from_json(json.loads(json.dumps(args.to_json()))) == args
    assert args.deadline is None or args.deadline + 1.0 > -1e16
    assert all(isinstance(name, str) for name in (*args.cluster, *args.job, args.hook, args.conn_id, args.ti_id))
    assert min(args.outage_timeout, args.quiet, args.interval or 1.0, args.start_timeout or 1.0) > -1e400


def check_job_event(value: Any) -> None:
    with contextlib.suppress(ValueError):
        event = JobEvent.from_json(value)
        assert event.kind == value["kind"]
        assert event.confirmed == (value.get("confirmed") is True)
    noted = noted_end(value, ti_id="i")
    assert noted is None or value["ti_id"] == "i"


# --- kubeconfigs

KUBECONFIG = {
    "apiVersion": "v1",
    "current-context": "c",
    "clusters": [{"name": "k", "cluster": {"server": "https://api:6443", "certificate-authority-data": "Zm9v"}}],
    "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "spark"}}],
    "users": [{"name": "u", "user": {"token": "abc"}}],
}


def check_kubeconfig(value: Any) -> None:
    text = value if isinstance(value, str) else yaml.safe_dump(value)
    if "exec" in text or "auth-provider" in text:
        return
    given = _kubernetes_access.Settings(
        conn_id="k", server=None, namespace=None, token=None, token_file=None, kubeconfig=text + "\n", context=None,
        in_cluster=False, ca=None, poll_interval=5.0, links=LinkTemplates({}),
    )  # fmt: skip
    with contextlib.suppress(DurableJobError):
        access = _kubernetes_access._load(given)
        assert isinstance(access.server, str)


# --- connections

CONNECTIONS: list[dict[str, Any]] = [
    {"host": "spark://m1:7077,m2:7077", "extra": {"ui-port": "8080,8081", "rest-port": "6066", "ca": "/x"}},
    {"host": "yarn", "extra": {"yarn_resourcemanager_webapp_address": "http://rm:8088,rm2", "ca": "-----BEGIN"}},
    {"host": "yarn", "extra": {"yarn-user": "u", "keytab": "a2V5", "history-url": "http://h/{app_id}"}},
    {"host": "k8s://https://api:6443", "extra": {"namespace": "spark", "log-url": "https://l/{pod}"}},
    {"host": "k8s://api", "extra": {"in-cluster": False, "poll-interval": 5, "token-file": "/x"}},
]


@pytest.fixture
def wired(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Return the connection to be read, on a machine without a Hadoop configuration."""
    for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR"):
        monkeypatch.delenv(name, raising=False)
    return wire


def test_connections(wired: Wire, fed: Callable[..., None]) -> None:
    def check(value: Any) -> None:
        host, extra = (value.get("host"), value.get("extra")) if isinstance(value, dict) else (None, None)
        try:
            wired.connection = Connection(conn_id="c", conn_type="spark", host=str(host), extra=json.dumps(extra))
        except (TypeError, ValueError):  # Airflow has none like it
            return
        ca = extra.get("ca") if isinstance(extra, dict) else None
        loop.complete(_read_everything(str(ca)))

    fed("connection", Parser(changed([json.dumps(each) for each in CONNECTIONS]), check, 0.5))


async def _read_everything(ca: str) -> None:
    with contextlib.suppress(DurableJobError):
        told = await _standalone_masters.Masters("c", poll_interval=5.0).settings()
        assert all(URL.fullmatch(url) for master in told.masters for url in (master.rest, master.ui)), told
    with contextlib.suppress(DurableJobError):
        known = await _yarn_managers.Managers("c", poll_interval=5.0).settings()
        assert all(
            URL.fullmatch(url) for url in (*(each.base for each in known.managers), known.timeline or "http://h")
        )
    with contextlib.suppress(DurableJobError):
        given = await _kubernetes_access.read_settings("c", poll_interval=5.0)
        assert given.server is None or URL.fullmatch(given.server), given.server
    with contextlib.suppress(DurableJobError):
        await ssl_context(ca)


PARSERS: dict[str, Parser] = {
    "record": Parser(changed([json.dumps(RECORD)], ["succeeded", "absent"]), check_record),
    "trigger arguments": Parser(changed([json.dumps(ARGUMENTS)]), check_arguments),
    "event": Parser(changed([json.dumps(EVENT)], ["succeeded", "i"]), check_job_event, 0.5),
    "kubeconfig": Parser(changed([json.dumps(KUBECONFIG)]), check_kubeconfig, 0.1),
}


@pytest.mark.parametrize("name", PARSERS)
def test_stored(name: str, fed: Callable[..., None]) -> None:
    fed(name, PARSERS[name])
