"""The face of a connection: the table from master URL to hook, and what Airflow asks of a hook class."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import pytest

from durable_spark.hooks._connection import Extras
from durable_spark.hooks.cli import SparkCliHook
from durable_spark.hooks.form import CONN_FIELDS, UI_FIELD_BEHAVIOUR
from durable_spark.hooks.job import JobHook
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.hooks.spark import SparkHook
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.jobs import BadConfiguration, JobRef, JobState, Submission

if TYPE_CHECKING:
    from tests.unit.hooks.fake import FakeCluster


def hook(monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any] | str) -> SparkHook:
    value = connection if isinstance(connection, str) else json.dumps(connection)
    monkeypatch.setenv("AIRFLOW_CONN_MY_SPARK", value)
    return SparkHook("my_spark")


STANDALONE = StandaloneHook, "spark://h:7077"
KUBERNETES = KubernetesHook, "k8s://https://h:443"


@pytest.mark.parametrize(
    ("connection", "expected"),
    [
        ({"conn_type": "durable_spark", "host": "spark://h:7077"}, STANDALONE),
        ({"conn_type": "spark", "host": "spark://h", "port": 7077}, STANDALONE),
        ({"conn_type": "spark", "host": "h", "port": 7077}, STANDALONE),
        ({"conn_type": "spark", "host": "SPARK://h:7077/"}, STANDALONE),
        ("spark://h:7077", STANDALONE),
        ("spark://h:7077?rest-port=6067&deploy-mode=cluster", STANDALONE),
        ({"conn_type": "durable_spark", "host": "k8s://https://h:443"}, KUBERNETES),
        ({"conn_type": "spark", "host": "k8s://https://h", "port": 443}, KUBERNETES),
        ({"conn_type": "spark", "host": "K8S://https://h/"}, KUBERNETES),
        ({"conn_type": "spark", "host": "k8s://h"}, KUBERNETES),
        ("k8s://https%3A%2F%2Fh:443", KUBERNETES),
        ("k8s://https%3A%2F%2Fh:443?namespace=spark&deploy-mode=cluster", KUBERNETES),
    ],
)
async def test_the_hook_of_a_master_url(
    monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any] | str, expected: tuple[type[JobHook], str]
) -> None:
    resolved = await hook(monkeypatch, connection).resolve()
    assert (type(resolved), await resolved.cluster()) == (expected[0], [expected[1]])


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        ({"conn_type": "durable_spark", "host": "local[*]"}, "local master"),
        ({"conn_type": "spark", "host": "local"}, "local master"),
        ({"conn_type": "spark", "host": "mesos://h:5050"}, "Mesos"),
        ({"conn_type": "spark", "host": "http://h"}, "spark://"),
        ({"conn_type": "spark"}, "no host"),
        ({"conn_type": "http", "host": "h"}, "'http'"),
    ],
)
async def test_no_hook_for_it(monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(BadConfiguration, match=message):
        await hook(monkeypatch, connection).resolve()


@pytest.mark.parametrize("connection", [{"conn_type": "spark", "host": "yarn"}, "yarn://"])
async def test_the_hook_of_yarn(monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any] | str) -> None:
    paths = []

    def load(path: str) -> type[JobHook]:
        paths.append(path)
        return StandaloneHook

    monkeypatch.setattr("durable_spark.hooks.spark.load_hook_class", load)
    await hook(monkeypatch, connection).resolve()
    assert paths == ["durable_spark.hooks.yarn.YarnHook"]


async def test_no_connection() -> None:
    with pytest.raises(BadConfiguration, match="no Airflow connection 'nowhere'"):
        await SparkHook("nowhere").cluster()


def test_the_test_button(monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int) -> None:
    assert SparkHook("nowhere").test_connection() == (
        False,
        "BadConfiguration: there is no Airflow connection 'nowhere': create it with the master URL as its host",
    )


async def test_it_delegates(monkeypatch: pytest.MonkeyPatch, cluster: FakeCluster) -> None:
    async with hook(monkeypatch, cluster.connection(**{"poll-interval": "9"})) as spark:
        assert await spark.poll_interval() == 9.0
        assert (await spark.check()).startswith("Spark 4.3.0")
        unknown = JobRef("driver-20200101000000-0000")
        assert (await spark.poll([unknown]))[unknown].state is JobState.ABSENT


async def test_submissions_by_spark_submit_are_delegated(monkeypatch: pytest.MonkeyPatch, cluster: FakeCluster) -> None:
    submission = Submission(token="ab" * 16)
    line = "INFO ClientEndpoint: Driver successfully submitted as driver-20261126031028-0000"
    async with hook(monkeypatch, cluster.connection()) as spark:
        assert spark.job_in(line, submission) is None, "which cluster it is has not been read yet"
        plan = await spark.prepare_cli({}, submission)
        assert plan.submission.evidence
        assert spark.job_in(line, plan.submission) == JobRef("driver-20261126031028-0000")
        assert await spark.glimpse(plan.submission) is None
        assert cluster.master.asked("GET", "/json/") == 2


async def test_cluster_that_is_not_spark_submits(monkeypatch: pytest.MonkeyPatch, cluster: FakeCluster) -> None:
    spark = hook(monkeypatch, cluster.connection())
    monkeypatch.setattr(spark, "_hook", create_autospec(JobHook, instance=True))
    with pytest.raises(BadConfiguration, match="'my_spark' is not one of spark-submit's"):
        await spark.prepare_cli({}, Submission(token="ab" * 16))


def test_every_promise_is_delegated() -> None:
    """A method added to the contract must not answer for no cluster."""
    promises = {
        name
        for name, member in {**vars(JobHook), **vars(SparkCliHook)}.items()
        if inspect.isfunction(member) and not name.startswith("_") and name != "test_connection"
    }
    assert promises <= set(vars(SparkHook))


def test_importing_it_imports_no_heavy_client() -> None:
    code = (
        "import sys, airflow.sdk\n"
        "before = set(sys.modules)\n"
        "import durable_spark.hooks.spark, durable_spark.hooks.standalone, durable_spark.hooks.kubernetes\n"
        "heavy = {'aiohttp', 'yarl', 'kubernetes_asyncio', 'tenacity'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_form() -> None:
    standalone = {"rest-scheme", "rest-port", "ui-scheme", "ui-port"}
    credentials = {"token-file", "kubeconfig", "context", "in-cluster"}
    links = {"dashboard-url", "log-url", "history-url"}
    yarn = {"yarn_resourcemanager_webapp_address", "yarn-user", "yarn-auth", "yarn-timeline-address"}
    kerberos = {"principal", "keytab"}
    everywhere = {"namespace", "ca", "poll-interval"}
    assert set(CONN_FIELDS) == {*standalone, *credentials, *links, *yarn, *kerberos, *everywhere}
    assert all(set(field) == {"label", "description", "schema"} for field in CONN_FIELDS.values())
    assert all("null" in field["schema"]["type"] for field in CONN_FIELDS.values()), "every field may stay empty"
    assert "password" in UI_FIELD_BEHAVIOUR["relabeling"]
    assert all(scheme in UI_FIELD_BEHAVIOUR["placeholders"]["host"] for scheme in ("spark://", "k8s://https://"))


@pytest.mark.parametrize(("hook_class", "host"), [STANDALONE, KUBERNETES])
async def test_each_extra_that_a_hook_reads_has_a_field(
    monkeypatch: pytest.MonkeyPatch, hook_class: type[JobHook], host: str
) -> None:
    read: set[str] = set()
    original = Extras.__init__

    class Noting(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            read.add(name)
            return super().get(name, default)

    def init(self: Extras, connection: Any) -> None:
        original(self, connection)
        self._values = Noting(self._values)

    monkeypatch.setattr(Extras, "__init__", init)
    await hook(monkeypatch, {"conn_type": "durable_spark", "host": host}).poll_interval()
    assert "poll-interval" in read
    assert read <= set(CONN_FIELDS)


def test_conn_type_does_not_clash() -> None:
    assert (SparkHook.conn_type, SparkHook.default_conn_name) == ("durable_spark", "spark_default")
