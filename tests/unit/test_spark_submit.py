"""The drop-in ``SparkSubmitOperator``: what it shares with upstream's, and what a try makes of ``spark-submit``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import inspect
import json
import os
import selectors
import shlex
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.exceptions import AirflowProviderDeprecationWarning
from airflow.providers.apache.spark.hooks.spark_submit import SparkSubmitHook
from airflow.providers.apache.spark.operators import spark_submit as upstream_operator
from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator as UpstreamOperator
from airflow.providers.cncf.kubernetes import kube_client
from airflow.providers.common.compat.openlineage.utils import spark as openlineage
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout, TaskDeferred
from airflow.serialization.serialized_objects import DagSerialization

from dev.processes import wait_until
from durable_spark.hooks.spark import SparkHook
from durable_spark.jobs import JobRef, JobState, SubmissionUncertain
from durable_spark.operators import _cluster, _spark_submit
from durable_spark.operators import job as job_module
from durable_spark.operators import spark_submit as operator_module
from durable_spark.operators.job import DurableJobOperator
from durable_spark.operators.spark_submit import SparkSubmitOperator
from durable_spark.triggers import job as trigger_module
from tests.unit import tries
from tests.unit.tries import Died, Job, MemoryCliHook, Service, TaskInstance, Try, alarm, waits

STANDALONE = {"conn_type": "spark", "host": "spark://master:7077"}
YARN = {"conn_type": "spark", "host": "yarn"}
KUBERNETES = {"conn_type": "spark", "host": "k8s://https://api:6443", "extra": {"namespace": "ns"}}


class SparkSubmit:
    """A ``spark-submit`` on the PATH, and what it has seen."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.cluster = home / "cluster"
        self.cluster.mkdir()
        self.program = home / "bin" / "spark-submit"
        self.program.parent.mkdir()
        self.does("submit")

    def does(self, body: str, *, name: str = "spark-submit") -> None:
        """Let it do something else: ``submit`` submits and says so, ``go`` waits for the file of that name."""
        path = self.program.with_name(name)
        path.write_text(
            textwrap.dedent(f"""\
            #!/bin/sh
            cd '{self.home}'
            echo $$ >> runs
            for part; do printf '%s\\0' "$part"; done > arguments
            env > environment
            for part; do case $part in spark.token=*) token=${{part#spark.token=}};; esac; done
            submit() {{
                job=job-$(($(ls cluster | wc -l) + 1))
                echo $token > new; mv new cluster/$job; echo "the cluster has $job"
            }}
            go() {{ looks=0; until [ -e go ] || [ $looks -gt 500 ]; do looks=$((looks + 1)); sleep 0.02; done; }}
            """)
            + body
            + "\n"
        )
        path.chmod(0o755)

    @property
    def runs(self) -> list[int]:
        path = self.home / "runs"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    @property
    def arguments(self) -> list[str]:
        """Its command line on the last run, without the program."""
        return (self.home / "arguments").read_text().split("\0")[:-1]

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.home / "environment").read_text().splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def dies(self) -> None:
        """See that it is dead, if only just now."""
        wait_until(lambda: not self.alive, 5, "its death")

    @property
    def alive(self) -> bool:
        try:
            return Path(f"/proc/{self.runs[-1]}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except FileNotFoundError:
            return False


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(tries, "service", Service())
    monkeypatch.setattr(_cluster, "_LOOK_AGAIN_AFTER", 0.0)
    monkeypatch.setattr(_spark_submit, "LOOK_INTERVAL", 0.02)
    monkeypatch.setattr(_spark_submit, "LINGER", 60.0)  # a tool that is to be interrupted must not be sent away before
    monkeypatch.setattr(operator_module, "_LAST_LOOKS", 1.0)
    return tries.service


@pytest.fixture(autouse=True)
def spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Service) -> SparkSubmit:
    spark = SparkSubmit(tmp_path)
    monkeypatch.setenv("PATH", f"{spark.program.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("SPARK_HOME", "SPARK_CONF_DIR", "SPARK_SUBMIT_OPTS", "SPARK_LAUNCHER_OPTS", "JAVA_TOOL_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    service.landing = spark.cluster
    return spark


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], None]:
    """Set the connection."""
    return lambda connection: monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps(connection))


Connect = Callable[[Mapping[str, Any]], None]


@pytest.fixture(autouse=True)
def _standalone(connect: Connect) -> None:
    connect(STANDALONE)


DEFAULTS: Mapping[str, Any] = {
    "hook": MemoryCliHook,
    "conn_id": "cluster",
    "application": "app.py",
    "deploy_mode": "cluster",
    "retries": 2,
}


@pytest.fixture
def instance() -> TaskInstance:
    return TaskInstance(SparkSubmitOperator, **DEFAULTS)


@pytest.fixture
def upstreams() -> TaskInstance:
    """The same task, run by upstream's operator."""
    return TaskInstance(UpstreamOperator, **{name: DEFAULTS[name] for name in DEFAULTS if name != "hook"})


def job_of(deferral: Any) -> str:
    assert isinstance(deferral, TaskDeferred), deferral
    return str(deferral.trigger._args.to_json()["job"][0])


def event(instance: TaskInstance, kind: str, **more: Any) -> dict[str, Any]:
    record = instance.store["durable_spark"]
    return {"v": 1, "kind": kind, "job_id": record["job"][0], "token": record["submission"]["token"], **more}


@contextlib.contextmanager
def interrupted(when: Callable[[], object], handler: Callable[[], object]) -> Iterator[None]:
    """
    Call the handler from a signal, as Airflow does, as soon as something is so and the event loop waits.

    While it calls back, it logs what a handler raises and goes on.
    """

    def idle() -> bool:
        return sys._current_frames()[main].f_code.co_filename == selectors.__file__

    def wait() -> None:
        until = time.monotonic() + 10
        while not over.is_set() and time.monotonic() < until:
            if when() and idle():
                signal.pthread_kill(main, signal.SIGUSR1)
                return
            time.sleep(0.01)

    over, main = threading.Event(), threading.get_ident()
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        with alarm(20):
            yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def die() -> None:
    raise Died


def time_out() -> None:
    raise AirflowTaskTimeout("Timeout")


def without_our_conf(arguments: list[str]) -> list[str]:
    """Return a command line without what the plan adds to it."""
    ours = [index for index, argument in enumerate(arguments) if argument.startswith("spark.token=")]
    assert len(ours) == 1
    assert arguments[ours[0] - 1] == "--conf"
    return arguments[: ours[0] - 1] + arguments[ours[0] + 1 :]


ARGUMENTS: Mapping[str, Any] = {
    "application": "app.jar",
    "conf": {"spark.a": "b c", "spark.n": 3, "spark.flag": True},
    "files": "a,b",
    "py_files": "p.py",
    "archives": "z.zip#Z",
    "driver_class_path": "d.jar",
    "jars": "j.jar",
    "java_class": "com.Main",
    "packages": "g:a:1",
    "exclude_packages": "g:b",
    "repositories": "http://repo",
    "total_executor_cores": 4,
    "executor_cores": 2,
    "executor_memory": "2g",
    "driver_memory": "1g",
    "keytab": "/k",
    "principal": "p@R",
    "proxy_user": "somebody",
    "name": "a name",
    "num_executors": 3,
    "status_poll_interval": 7,
    "application_args": ["-f", "with space", "", "$HOME"],
    "env_vars": {"ONE": 1},
    "verbose": True,
    "spark_binary": "spark3-submit",
    "properties_file": "p.conf",
    "yarn_queue": "q",
    "deploy_mode": "cluster",
    "use_krb5ccache": False,
    "post_submit_commands": ["true"],
    "track_driver_via_k8s_api": False,
    "yarn_track_via_rm_api": True,
    "yarn_rm_auth": None,
    "openlineage_inject_parent_job_info": True,
    "openlineage_inject_transport_info": True,
    "durable": False,
    "reconnect_on_retry": None,
    "conn_id": "cluster",
}


class TestArguments:
    def test_all_of_upstreams_are_known_here(self) -> None:
        known = set(inspect.signature(UpstreamOperator.__init__).parameters) - {"self", "kwargs"}
        assert known <= set(ARGUMENTS)

    def test_all_of_upstreams_are_taken_as_upstream_takes_them(self) -> None:
        ours = SparkSubmitOperator(task_id="t", **ARGUMENTS)
        theirs = UpstreamOperator(task_id="t", **ARGUMENTS)
        same = {name: value for name, value in vars(theirs).items() if not name.startswith("_BaseOperator__")}
        assert {name: vars(ours)[name] for name in same} == same

    def test_without_any_it_is_as_upstreams(self) -> None:
        ours, theirs = SparkSubmitOperator(task_id="t"), UpstreamOperator(task_id="t")
        same = {name: value for name, value in vars(theirs).items() if not name.startswith("_BaseOperator__")}
        assert {name: vars(ours)[name] for name in same} == same
        assert (ours.conn_id, ours.deferrable, ours.durable, ours.poll_interval) == ("spark_default", True, True, None)
        assert ours.hook_path == "durable_spark.hooks.spark.SparkHook"

    def test_it_is_upstreams_class(self) -> None:
        assert issubclass(SparkSubmitOperator, UpstreamOperator)
        assert issubclass(SparkSubmitOperator, DurableJobOperator)
        assert SparkSubmitOperator.template_fields == UpstreamOperator.template_fields
        assert SparkSubmitOperator.template_ext == UpstreamOperator.template_ext
        assert SparkSubmitOperator.template_fields_renderers == UpstreamOperator.template_fields_renderers
        assert SparkSubmitOperator.ui_color == UpstreamOperator.ui_color
        assert SparkSubmitOperator.external_id_key == "spark_job_id"
        assert SparkSubmitOperator.__name__ == UpstreamOperator.__name__

    @pytest.mark.parametrize(
        "arguments",
        [
            {"status_poll_interval": 20, "deploy_mode": "cluster", "conn_id": "cluster", "durable": False},
            {"reconnect_on_retry": False, "status_poll_interval": 20, "deploy_mode": "cluster", "conn_id": "cluster"},
        ],
    )
    @pytest.mark.filterwarnings("ignore::airflow.exceptions.AirflowProviderDeprecationWarning")
    def test_default_args_are_arguments(self, arguments: dict[str, Any]) -> None:
        given = SparkSubmitOperator(task_id="t", **arguments)
        with DAG("dag", schedule=None, default_args={**arguments, "on_lost": "resubmit", "retries": 7}):
            default = SparkSubmitOperator(task_id="t")
        for operator in (given, default):
            assert (operator.poll_interval, operator._status_poll_interval) == (20, 20)
            assert (operator.conn_id, operator._conn_id, operator.durable) == ("cluster", "cluster", False)
            assert operator._deploy_mode == "cluster"
        assert (default.on_lost, default.retries) == ("resubmit", 7)

    def test_poll_interval_is_the_stronger_one(self) -> None:
        operator = SparkSubmitOperator(task_id="t", status_poll_interval=20, poll_interval=3)
        assert (operator.poll_interval, operator._status_poll_interval) == (3, 20)

    @pytest.mark.parametrize(("durable", "expected"), [(None, False), (True, True)])
    def test_reconnect_on_retry_warns_as_upstream_does(self, durable: bool | None, expected: bool) -> None:
        told = []
        for kind in (SparkSubmitOperator, UpstreamOperator):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                operator = kind(task_id="t", reconnect_on_retry=False, durable=durable)
            assert operator.durable is expected
            told.append([(warning.category, str(warning.message)) for warning in caught])
        assert told[0] == told[1]
        assert [category for category, _ in told[0]] == [AirflowProviderDeprecationWarning]

    def test_the_interval_reaches_the_trigger(self, instance: TaskInstance) -> None:
        deferral = instance.begin(status_poll_interval=20).execute()
        assert deferral.trigger._args.to_json()["interval"] == 20

    def test_it_can_be_mapped_and_serialised(self) -> None:
        with DAG("dag", schedule=None) as dag:
            SparkSubmitOperator(task_id="one", application="a.py", conf={"spark.a": "{{ ds }}"})
            SparkSubmitOperator.partial(
                task_id="many", conn_id="cluster", deploy_mode="cluster", on_lost="resubmit", durable=True
            ).expand(application=["a.py", "b.py"])
        value = json.loads(json.dumps(DagSerialization.to_dict(dag)))
        again = DagSerialization.from_dict(value)
        assert sorted(again.task_ids) == ["many", "one"]
        one: Any = again.get_task("one")
        assert (one.task_type, one.conf) == ("SparkSubmitOperator", {"spark.a": "{{ ds }}"})
        assert sorted(one.extra_links) == ["Driver log", "Job", "Spark UI", "Spark history"]

    def test_a_mapped_task_is_one_of_ours(self) -> None:
        with DAG("dag", schedule=None) as dag:
            SparkSubmitOperator.partial(task_id="many", conn_id="cluster", status_poll_interval=9).expand(
                application=["a.py", "b.py"]
            )
        mapped: Any = dag.get_task("many")
        operator = mapped.unmap({**mapped.partial_kwargs, "application": "b.py"})
        assert isinstance(operator, SparkSubmitOperator)
        assert (operator.application, operator.conn_id, operator.poll_interval) == ("b.py", "cluster", 9)

    def test_it_can_be_copied(self) -> None:
        operator = copy.deepcopy(SparkSubmitOperator(task_id="t", application="a.py", deferrable=False))
        assert (operator.application, operator._half) == ("a.py", UpstreamOperator)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("connection", "left_out"),
        [
            (STANDALONE, {"env_vars"}),
            ({**STANDALONE, "host": "spark://one:7077,two:7077"}, {"env_vars"}),
            (YARN, set()),
            ({**YARN, "extra": {"queue": "theirs", "keytab": "a2V5", "principal": "x"}}, {"yarn_queue", "keytab"}),
            (KUBERNETES, set()),
            ({**KUBERNETES, "extra": {"spark-binary": "spark3-submit"}}, {"spark_binary"}),
        ],
    )
    def test_is_upstreams_but_for_what_marks_the_job(
        self, instance: TaskInstance, spark: SparkSubmit, connect: Connect, connection: Any, left_out: set[str]
    ) -> None:
        connect(connection)
        spark.does("submit", name="spark3-submit")
        (spark.home / "p.conf").write_text("")
        arguments = {name: value for name, value in ARGUMENTS.items() if name not in left_out}
        arguments |= {"properties_file": str(spark.home / "p.conf"), "durable": True}
        arguments |= {"openlineage_inject_parent_job_info": False, "openlineage_inject_transport_info": False}
        instance.begin(**arguments).execute()
        hook = UpstreamOperator(task_id="t", **arguments)._get_hook()
        assert ["spark3-submit", *without_our_conf(spark.arguments)] == hook._build_spark_submit_command("app.jar")

    def test_ours_replaces_the_users_property_of_that_name(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        conf = {"spark.token": "mine", "spark.a": "b"}
        instance.begin(conf=conf).execute()
        token = instance.store["durable_spark"]["submission"]["token"]
        assert [each for each in spark.arguments if "spark.token" in each] == [f"spark.token={token}"]
        assert conf == {"spark.token": "mine", "spark.a": "b"}

    @pytest.mark.parametrize(
        ("connection", "host"),
        [
            ({"host": "spark://one:7077"}, None),
            ({"host": "spark://one", "port": 7077}, None),
            ({"host": "one", "port": 7077}, None),
            ({"host": "spark://one:7077,two:7077"}, None),
            ({"host": "spark://one:7077", "extra": {"rest-scheme": "https", "rest-port": 6067}}, None),
            ({"host": "yarn", "extra": {"queue": "q"}}, None),
            ({"host": "k8s://https://api:6443", "extra": {"namespace": "n"}}, None),
            ({"host": "k8s://https://api", "port": 6443}, None),
            ({"host": "local[2]"}, None),
            ({"host": "one"}, "spark://one"),
        ],
    )
    @pytest.mark.parametrize("mode", ["cluster", "client", None])
    def test_a_connection_of_our_type_is_upstreams(
        self, connect: Connect, connection: dict[str, Any], host: str | None, mode: str | None
    ) -> None:
        """All that upstream concludes from a connection, for both halves."""
        concluded = []
        for kind in (SparkHook.conn_type, "spark"):
            connect({"conn_type": kind, **connection, **({"host": host} if host and kind == "spark" else {})})
            hook = vars(SparkSubmitOperator(task_id="t", conn_id="cluster", deploy_mode=mode)._get_hook())
            names = [
                name for name in hook if name not in ("_poll_k8s_driver_via_api", "_log", "_last_submit_log_lines")
            ]
            concluded.append({name: hook[name] for name in names})
        assert concluded[0] == concluded[1]

    def test_the_hook_sees_the_properties_as_spark_submit_will(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service, connect: Connect
    ) -> None:
        connect(KUBERNETES)
        (spark.home / "conf").mkdir()
        (spark.home / "conf" / "spark-defaults.conf").write_text("spark.a default\nspark.d default\n")
        instance.begin(conf={"spark.a": 1, "spark.b": True}).execute()
        (conf,) = service.prepared
        assert conf == {
            "spark.a": "1",
            "spark.b": "True",
            "spark.d": "default",
            "spark.kubernetes.namespace": "ns",
        }

    def test_a_property_that_cannot_be_used_is_told_before_the_intent(
        self, instance: TaskInstance, spark: SparkSubmit
    ) -> None:
        with pytest.raises(AirflowFailException, match=r"spark\.bad"):
            instance.begin(conf={"spark.bad": "1"}).execute()
        assert "durable_spark" not in instance.store
        assert spark.runs == []

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            ({"env_vars": {"A": "1"}}, "env_vars is not supported in standalone-cluster mode"),
            ({"use_krb5ccache": True, "principal": "p@R"}, "KRB5CCNAME"),
        ],
    )
    def test_what_upstream_refuses_is_told_before_the_intent(
        self, instance: TaskInstance, spark: SparkSubmit, arguments: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(AirflowException, match=why):
            instance.begin(**arguments).execute()
        assert "durable_spark" not in instance.store
        assert spark.runs == []

    def test_yarns_variables_are_spark_submits(
        self, instance: TaskInstance, spark: SparkSubmit, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HADOOP_CONF_DIR", "/theirs")
        monkeypatch.setenv("FROM_THE_WORKER", "1")
        connect(YARN)
        instance.begin(env_vars={"HADOOP_CONF_DIR": "/mine", "N": 3}).execute()
        seen = spark.environment
        assert (seen["HADOOP_CONF_DIR"], seen["N"], seen["FROM_THE_WORKER"]) == ("/mine", "3", "1")
        assert "spark.yarn.appMasterEnv.N=3" in spark.arguments
        assert "N" not in os.environ

    @pytest.mark.parametrize(("stays", "name"), [(True, True), (False, False)])
    def test_options_for_the_jvm_only_where_they_stay_on_the_worker(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service, stays: bool, name: bool
    ) -> None:
        service.environment_stays = stays
        instance.begin().execute()
        assert ("SPARK_SUBMIT_OPTS" in spark.environment) is name
        assert ("SPARK_LAUNCHER_OPTS" in spark.environment) is name
        assert "SPARK_SUBMIT_OPTS" not in os.environ

    def test_an_argument_that_is_not_text_is_refused_before_anything_is_sent(
        self, instance: TaskInstance, spark: SparkSubmit
    ) -> None:
        with pytest.raises(TypeError):
            instance.begin(application_args=[1]).execute()
        assert "durable_spark" not in instance.store
        assert spark.runs == []


class TestWhichHalf:
    def test_cluster_mode_is_ours_by_the_argument(self, instance: TaskInstance) -> None:
        assert job_of(instance.begin().execute()) == "job-1"

    @pytest.mark.parametrize("mode", ["cluster", "Cluster"])
    def test_by_the_connection(self, instance: TaskInstance, connect: Connect, spark: SparkSubmit, mode: str) -> None:
        connect({**STANDALONE, "extra": {"deploy-mode": mode}})
        assert job_of(instance.begin(deploy_mode=None).execute()) == "job-1"
        assert spark.arguments[spark.arguments.index("--deploy-mode") + 1] == "cluster"

    def test_by_the_property(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        deferral = instance.begin(deploy_mode=None, conf={"spark.submit.deployMode": "cluster"}).execute()
        assert job_of(deferral) == "job-1"
        assert spark.arguments[spark.arguments.index("--deploy-mode") + 1] == "cluster"

    @pytest.mark.parametrize("named", [True, False])
    def test_by_the_property_in_a_file(self, instance: TaskInstance, spark: SparkSubmit, named: bool) -> None:
        path = spark.home / "mine.conf" if named else spark.home / "conf" / "spark-defaults.conf"
        path.parent.mkdir(exist_ok=True)
        path.write_text("spark.submit.deployMode cluster\n")
        more = {"properties_file": str(path)} if named else {}
        assert job_of(instance.begin(deploy_mode=None, **more).execute()) == "job-1"

    def test_the_argument_is_stronger_than_the_connection_and_that_than_the_property(
        self, instance: TaskInstance, connect: Connect
    ) -> None:
        connect({**STANDALONE, "extra": {"deploy-mode": "client"}})
        conf = {"spark.submit.deployMode": "cluster"}
        assert instance.begin(deploy_mode=None, conf=conf).execute() is None
        assert job_of(instance.begin(conf=conf).execute()) == "job-2"

    def test_a_properties_file_that_cannot_be_read_is_told(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        with pytest.raises(AirflowFailException, match=r"properties_file '/nowhere/p.conf' cannot be read"):
            instance.begin(deploy_mode=None, properties_file="/nowhere/p.conf").execute()
        assert spark.runs == []

    @pytest.mark.parametrize(
        ("connection", "mode"),
        [
            (STANDALONE, "client"),
            (STANDALONE, None),
            (YARN, "client"),
            ({"conn_type": "spark", "host": "local[2]"}, None),
            ({"conn_type": "durable_spark", "host": "local[2]"}, None),
            ({"conn_type": "durable_spark", "host": "master", "port": 7077}, None),
        ],
    )
    def test_client_mode_is_upstreams_with_one_warning(
        self,
        instance: TaskInstance,
        upstreams: TaskInstance,
        spark: SparkSubmit,
        connect: Connect,
        capsys: pytest.CaptureFixture[str],
        connection: dict[str, Any],
        mode: str | None,
    ) -> None:
        connect(connection)
        arguments = {
            "deploy_mode": mode,
            "conf": {"spark.a": "b"},
            "post_submit_commands": [f"touch {spark.home}/post"],
        }
        assert instance.begin(**arguments).execute() is None
        said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
        assert len(said) == 1
        assert "dies with it" in said[0]
        seen = spark.arguments
        assert (spark.home / "post").exists()
        assert not instance.store
        assert not instance.xcoms
        connect({**connection, "conn_type": "spark"})
        upstreams.begin(**arguments).execute()
        assert seen == spark.arguments

    def test_client_mode_fails_as_upstream_does(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        spark.does("exit 3")
        with pytest.raises(AirflowException, match=r"Cannot execute: spark-submit .*Error code is: 3"):
            instance.begin(deploy_mode="client").execute()

    @pytest.mark.parametrize("arguments", [{"deploy_mode": "client"}, {"deferrable": False, "deploy_mode": "client"}])
    def test_openlineages_properties_reach_upstreams_half(
        self, instance: TaskInstance, spark: SparkSubmit, lineage: None, arguments: dict[str, Any]
    ) -> None:
        instance.begin(conf={"spark.a": "b"}, **LINEAGE, **arguments).execute()
        assert {"spark.a=b", "spark.parent=1", "spark.transport=1"} <= set(spark.arguments)

    @pytest.mark.parametrize("arguments", [{"deploy_mode": "client"}, {"deferrable": False}])
    def test_a_kill_is_upstreams_there(
        self,
        instance: TaskInstance,
        monkeypatch: pytest.MonkeyPatch,
        spark: SparkSubmit,
        arguments: dict[str, Any],
    ) -> None:
        kills: list[int] = []
        monkeypatch.setattr(SparkSubmitHook, "submit", lambda *_: first.operator.on_kill() or "driver-1")
        monkeypatch.setattr(SparkSubmitHook, "on_kill", lambda self: kills.append(id(self)))
        monkeypatch.setattr(SparkSubmitHook, "_start_driver_status_tracking", finish)
        first: Try = instance.begin(**arguments)
        first.execute()
        assert kills == [id(first.operator._hook)]

    @pytest.mark.parametrize("died", [True, False])
    def test_a_connection_that_cannot_be_read_for_a_while_is_no_second_job(
        self,
        instance: TaskInstance,
        spark: SparkSubmit,
        connect: Connect,
        monkeypatch: pytest.MonkeyPatch,
        died: bool,
    ) -> None:
        """Upstream takes it for YARN in client mode."""
        connect({**STANDALONE, "extra": {"deploy-mode": "cluster"}})
        spark.does("submit > /dev/null; go" if died else "submit")
        with contextlib.ExitStack() as stack:
            if died:
                stack.enter_context(interrupted(lambda: list(spark.cluster.iterdir()), die))
                stack.enter_context(pytest.raises(Died))
            instance.begin(deploy_mode=None).execute()
        spark.does("submit")
        with monkeypatch.context() as away:
            away.delenv("AIRFLOW_CONN_CLUSTER")
            with pytest.raises(AirflowException, match=r"earlier try submitted .*connection 'cluster'") as caught:
                instance.begin(deploy_mode=None).execute()
        assert not isinstance(caught.value, AirflowFailException), "the next try may read it"
        assert job_of(instance.begin(deploy_mode=None).execute()) == "job-1"
        assert len(spark.runs) == 1

    def test_a_task_whose_job_has_ended_may_change_to_client_mode(
        self, instance: TaskInstance, spark: SparkSubmit
    ) -> None:
        first = instance.begin()
        first.execute()
        first.complete(event(instance, "succeeded"))
        instance.clear()
        assert instance.begin(deploy_mode="client").execute() is None
        assert len(spark.runs) == 2

    def test_a_missing_connection_is_one_clear_error(
        self, instance: TaskInstance, spark: SparkSubmit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AIRFLOW_CONN_CLUSTER")
        monkeypatch.setattr(MemoryCliHook, "prepare_cli", read_the_connection)
        with pytest.raises(AirflowException, match="there is no Airflow connection 'cluster'"):
            instance.begin().execute()
        assert spark.runs == []
        assert "durable_spark" not in instance.store

    def test_a_hook_that_knows_no_spark_submit_is_told(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        with pytest.raises(AirflowException, match=r"MemoryHook does not follow what spark-submit submits"):
            instance.begin(hook=tries.MemoryHook).execute()
        assert spark.runs == []
        assert "durable_spark" not in instance.store

    def test_no_spark_submit_is_told_before_the_intent(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        spark.program.unlink()
        with pytest.raises(AirflowException, match=r"spark_binary: 'spark-submit' is not on the PATH"):
            instance.begin().execute()
        assert "durable_spark" not in instance.store

    def test_no_deferral_is_upstreams_to_the_letter(
        self, instance: TaskInstance, spark: SparkSubmit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SparkSubmitHook, "_start_driver_status_tracking", finish)
        spark.does("echo Submitted as driver-20260101000000-0001")
        assert instance.begin(deferrable=False).execute() is None
        assert instance.store == {"spark_job_id": "driver-20260101000000-0001"}
        assert not [part for part in spark.arguments if "spark.token" in part]
        monkeypatch.setattr(UpstreamOperator, "_fetch_driver_status", lambda *_: "FINISHED")
        assert instance.begin(deferrable=False).execute() is None
        assert len(spark.runs) == 1, "its retry saw that the first one has finished"
        monkeypatch.setattr(UpstreamOperator, "_fetch_driver_status", lambda *_: "FAILED")
        instance.begin(deferrable=False).execute()
        assert len(spark.runs) == 2

    @pytest.mark.parametrize("method", ["submit_job", "get_job_status", "poll_until_complete", "get_job_result"])
    def test_all_that_the_mixin_asks_is_asked_of_one_half(
        self, instance: TaskInstance, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        for half, deferrable in ((DurableJobOperator, True), (UpstreamOperator, False)):
            monkeypatch.setattr(half, method, lambda self, *a, half=half: (half.__name__, *a))
            operator = instance.begin(deferrable=deferrable).operator
            arguments = ("context",) if method == "submit_job" else ("id", "context")
            assert getattr(operator, method)(*arguments) == (half.__name__, *arguments)
        for name in ("is_job_active", "is_job_succeeded"):
            for half, deferrable in ((DurableJobOperator, True), (UpstreamOperator, False)):
                monkeypatch.setattr(half, name, lambda self, status, half=half: half.__name__ + status)
                assert getattr(instance.begin(deferrable=deferrable).operator, name)("x") == half.__name__ + "x"

    @pytest.mark.parametrize("kind", ["spark", "durable_spark"])
    def test_a_vanished_pod_is_no_success(
        self,
        instance: TaskInstance,
        upstreams: TaskInstance,
        spark: SparkSubmit,
        connect: Connect,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
    ) -> None:
        gone = vars(kube_client)["ApiException"](status=404)

        def read(*_: Any) -> None:
            raise gone

        client = SimpleNamespace(read_namespaced_pod=read)
        monkeypatch.setattr(kube_client, "get_kube_client", lambda: client)
        connect({**KUBERNETES, "conn_type": kind})
        spark.does("echo 'pod name: app-abc123-driver'")
        arguments = {"track_driver_via_k8s_api": True, "post_submit_commands": [f"touch {spark.home}/post"]}
        with pytest.raises(AirflowFailException, match=r"JobLost.*app-abc123-driver"):
            instance.begin(deferrable=False, **arguments).execute()
        assert (spark.home / "post").exists()
        if kind == "spark":
            assert upstreams.begin(**arguments).execute() is None, "else this test shows nothing"


async def read_the_connection(self: Any, conf: Any, submission: Any) -> Any:
    await SparkHook("cluster").resolve()


def finish(hook: Any) -> None:
    hook._driver_status = "FINISHED"


LINEAGE = {"openlineage_inject_parent_job_info": True, "openlineage_inject_transport_info": True}


@pytest.fixture
def lineage(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenLineage's two injections; the parent's is another one on every try."""

    def parent(properties: dict[str, Any], context: Any) -> dict[str, Any]:
        return {**properties, "spark.parent": str(context["ti"].try_number)}

    def transport(properties: dict[str, Any], context: Any) -> dict[str, Any]:
        return {**properties, "spark.transport": "1"}

    for module in (openlineage, upstream_operator):
        monkeypatch.setattr(module, "inject_parent_job_information_into_spark_properties", parent)
        monkeypatch.setattr(module, "inject_transport_information_into_spark_properties", transport)


class TestFirstTry:
    def test_submits_stores_defers_and_returns_the_id(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        first = instance.begin()
        assert job_of(first.execute()) == "job-1"
        token = first.record["submission"]["token"]
        assert service.jobs["job-1"].token == token
        assert (first.record["job"], first.record["verdict"]) == (["job-1", ""], None)
        assert instance.store["spark_job_id"] == "job-1"
        assert instance.xcoms["spark_job_id"] == "job-1"
        assert first.complete(event(instance, "succeeded")) == "job-1"
        assert first.record["verdict"]["state"] == "succeeded"
        assert len(spark.runs) == 1

    def test_the_intent_is_stored_before_spark_submit_runs(
        self, instance: TaskInstance, spark: SparkSubmit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        wait = _spark_submit.SparkSubmitRun.wait

        async def look(run: Any) -> int:
            seen.append((instance.store["durable_spark"]["job"], spark.runs))
            return await wait(run)

        monkeypatch.setattr(_spark_submit.SparkSubmitRun, "wait", look)
        instance.begin().execute()
        assert seen == [(None, [])]

    @pytest.mark.parametrize("body", ["submit", "submit > /dev/null"])
    def test_the_job_is_stored_while_spark_submit_still_runs(
        self, instance: TaskInstance, spark: SparkSubmit, body: str
    ) -> None:
        """By its output, and by the cluster alone."""
        seen = []

        def stored() -> bool:
            return instance.store.get("durable_spark", {}).get("job") is not None

        def look() -> None:
            seen.append(spark.alive)
            (spark.home / "go").touch()

        spark.does(f"{body}; go")
        with interrupted(stored, look):
            assert job_of(instance.begin().execute()) == "job-1"
        assert seen == [True]

    def test_a_job_that_only_a_search_finds(self, instance: TaskInstance, spark: SparkSubmit, service: Service) -> None:
        service.blind = True
        spark.does("submit > /dev/null")
        assert job_of(instance.begin().execute()) == "job-1"
        assert instance.store["durable_spark"]["job"] == ["job-1", ""]

    def test_a_note_that_cannot_be_written_is_written_later(
        self, instance: TaskInstance, spark: SparkSubmit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, failures = Try.set, [RuntimeError("the API server is away")]

        def flaky(self: Any, key: str, value: Any, **more: Any) -> None:
            if key == "durable_spark" and value["job"] and failures:
                raise failures.pop()
            write(self, key, value, **more)

        monkeypatch.setattr(Try, "set", flaky)
        spark.does("submit; sleep 0.2")
        assert job_of(instance.begin().execute()) == "job-1"
        assert failures == []
        assert instance.store["durable_spark"]["job"] == ["job-1", ""]

    def test_a_job_that_has_ended_already_is_not_deferred(
        self, instance: TaskInstance, service: Service, spark: SparkSubmit
    ) -> None:
        def end() -> None:
            for job in service.jobs.values():
                job.state = JobState.SUCCEEDED

        service.on_glimpse = end
        spark.does("submit > /dev/null; sleep 0.2")
        assert instance.begin().execute() == "job-1"
        assert instance.store["durable_spark"]["verdict"]["state"] == "succeeded"

    def test_not_durable_submits_anew_each_time(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        first = instance.begin(durable=False, post_submit_commands=[f"touch {spark.home}/post"])
        deferral = first.execute()
        assert job_of(deferral) == "job-1"
        told = {"v": 1, "kind": "succeeded", "job_id": "job-1", "token": service.jobs["job-1"].token}
        assert first.complete(told) == "job-1"
        assert (spark.home / "post").exists()
        assert job_of(instance.begin(durable=False).execute()) == "job-2"
        assert not instance.store

    def test_no_secret_is_kept(self, instance: TaskInstance) -> None:
        deferral = instance.begin(conf={"spark.password": "hush"}, application_args=["hush"]).execute()
        assert "hush" not in json.dumps(deferral.trigger.serialize())
        assert "hush" not in json.dumps(instance.store)

    def test_yarn_rm_auth_is_told_to_be_of_no_use(
        self, instance: TaskInstance, capsys: pytest.CaptureFixture[str]
    ) -> None:
        instance.begin(yarn_rm_auth=object()).execute()
        assert "yarn_rm_auth is not used" in capsys.readouterr().out


class TestExits:
    def test_a_failure_with_a_job_is_followed_with_a_warning(
        self, instance: TaskInstance, spark: SparkSubmit, capsys: pytest.CaptureFixture[str]
    ) -> None:
        spark.does("submit; exit 3")
        assert job_of(instance.begin().execute()) == "job-1"
        assert "exit code 3, but the cluster has the job: following job-1" in capsys.readouterr().out

    def test_a_failure_that_only_a_search_tells_from_a_submission(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service, capsys: pytest.CaptureFixture[str]
    ) -> None:
        service.blind = True
        spark.does("submit > /dev/null; exit 3")
        assert job_of(instance.begin().execute()) == "job-1"
        assert "but the cluster has the job" in capsys.readouterr().out

    def test_a_failure_without_a_job_is_a_refusal_with_the_tools_words(
        self, instance: TaskInstance, spark: SparkSubmit
    ) -> None:
        spark.does("echo something went wrong >&2; echo spark.db.password=hush; exit 3")
        conf = {"spark.db.password": "hush", "spark.a": "b"}
        with pytest.raises(AirflowException) as caught:
            instance.begin(conf=conf).execute()
        assert not isinstance(caught.value, AirflowFailException), "it may be tried again"
        message = str(caught.value)
        assert message.startswith(
            "SubmissionRefused: spark-submit ended with exit code 3: spark-submit --master spark:"
        )
        assert "something went wrong" in message
        assert "spark.a=b" in message
        assert "hush" not in message

    def test_a_refused_submission_is_tried_again_under_the_same_token(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        spark.does("exit 3")
        with pytest.raises(AirflowException, match="SubmissionRefused"):
            instance.begin().execute()
        token = instance.store["durable_spark"]["submission"]["token"]
        spark.does("submit")
        assert job_of(instance.begin().execute()) == "job-1"
        assert service.jobs["job-1"].token == token
        assert instance.store["durable_spark"]["submission"]["cluster_time"] == 1000.0

    def test_a_success_without_a_job_is_uncertain_and_not_retried(
        self, instance: TaskInstance, spark: SparkSubmit
    ) -> None:
        spark.does("exit 0")
        with pytest.raises(AirflowFailException, match=r"SubmissionUncertain.*does not know it.*way out"):
            instance.begin().execute()
        assert len(spark.runs) == 1

    def test_and_submitted_after_a_clear(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        spark.does("exit 0")
        with pytest.raises(AirflowFailException):
            instance.begin().execute()
        instance.clear()
        spark.does("submit")
        assert job_of(instance.begin().execute()) == "job-1"
        assert instance.store["durable_spark"]["submission"]["ordinal"] == 2

    @pytest.mark.parametrize("code", [0, 3])
    def test_a_cluster_out_of_reach_is_waited_for(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        async def lost(self: Any, submission: Any) -> None:
            service.unreachable = True

        monkeypatch.setattr(MemoryCliHook, "glimpse", lost)
        spark.does(f"submit > /dev/null; sleep 0.2; exit {code}")
        first = instance.begin()
        assert waits(first.execute())
        service.unreachable = False
        assert job_of(first.again()) == "job-1"
        assert len(spark.runs) == 1

    def test_what_cannot_be_told_is_not_submitted_again(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        service.blind, service.find_error = True, SubmissionUncertain("still queued")
        spark.does("submit > /dev/null; exit 3")
        for _ in range(2):
            assert waits(instance.begin().execute())
        assert len(spark.runs) == 1
        service.find_error = None
        assert job_of(instance.begin().execute()) == "job-1"
        assert len(spark.runs) == 1

    def test_a_tool_that_lingers_is_sent_away(
        self, instance: TaskInstance, spark: SparkSubmit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_spark_submit, "LINGER", 0.1)
        spark.does("submit; exec sleep 600")
        with alarm(15):
            assert job_of(instance.begin().execute()) == "job-1"
        spark.dies()


class TestRetry:
    def test_follows_the_job_on(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        instance.begin().execute()
        assert job_of(instance.begin().execute()) == "job-1"
        assert len(spark.runs) == 1

    def test_a_failed_job_is_submitted_anew_under_a_new_token(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state = JobState.FAILED
        assert job_of(instance.begin().execute()) == "job-2"
        assert service.jobs["job-1"].token != service.jobs["job-2"].token
        assert f"spark.token={service.jobs['job-2'].token}" in spark.arguments

    @pytest.mark.parametrize(
        "change",
        [
            {"application": "new.py"},
            {"application_args": ["2"]},
            {"conf": {"spark.bad": "1"}},
            {"deploy_mode": None, "properties_file": "/nowhere/p.conf"},
        ],
        ids=["application", "arguments", "bad", "properties that are gone"],
    )
    def test_changed_code_follows_the_old_job_on(
        self, instance: TaskInstance, spark: SparkSubmit, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
    ) -> None:
        instance.begin().execute()
        assert job_of(instance.begin(**change).execute()) == "job-1"
        assert "have changed; job-1 runs on with the old ones" in capsys.readouterr().out
        assert len(spark.runs) == 1

    def test_died_before_the_submission(self, instance: TaskInstance, spark: SparkSubmit, service: Service) -> None:
        spark.does("go; submit")
        with interrupted(lambda: spark.runs, die), pytest.raises(Died):
            instance.begin().execute()
        spark.dies()
        token = instance.store["durable_spark"]["submission"]["token"]
        (spark.home / "go").touch()
        assert job_of(instance.begin().execute()) == "job-1"
        assert list(service.jobs) == ["job-1"]
        assert service.jobs["job-1"].token == token
        assert len(spark.runs) == 2

    @pytest.mark.parametrize("blind", [True, False])
    def test_died_after_the_submission(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service, blind: bool
    ) -> None:
        service.blind = blind
        spark.does("submit > /dev/null; go")
        with interrupted(lambda: list(spark.cluster.iterdir()), die), pytest.raises(Died):
            instance.begin().execute()
        spark.dies()
        assert job_of(instance.begin().execute()) == "job-1"
        assert list(service.jobs) == ["job-1"]
        assert instance.store["durable_spark"]["job"] == ["job-1", ""]
        assert len(spark.runs) == 1

    def test_adopts_what_upstreams_operator_has_submitted(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        service.jobs["driver-1"] = Job("", "")
        instance.store["spark_job_id"] = "driver-1"
        assert job_of(instance.begin().execute()) == "driver-1"
        assert spark.runs == []

    def test_a_clear_kills_the_old_job_first(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        instance.begin().execute()
        instance.clear()
        service.on_glimpse = lambda: service.kills.append(f"then submit, {service.running}")
        spark.does("sleep 0.1; submit > /dev/null; sleep 0.1")
        assert job_of(instance.begin().execute()) == "job-2"
        assert service.kills[:2] == ["job-1", "then submit, []"]

    def test_openlineage_changes_no_argument(
        self, instance: TaskInstance, spark: SparkSubmit, lineage: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        instance.begin(conf={"spark.a": "b"}, **LINEAGE).execute()
        assert {"spark.a=b", "spark.parent=1", "spark.transport=1"} <= set(spark.arguments)
        again = instance.begin(conf={"spark.a": "b"}, **LINEAGE)
        assert job_of(again.execute()) == "job-1"
        assert again.operator.conf == {"spark.a": "b"}
        assert "arguments of this task have changed" not in capsys.readouterr().out
        instance.begin(conf={"spark.a": "c"}, **LINEAGE).execute()
        assert "arguments of this task have changed" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments", [{"archives": "a.zip"}, {"executor_memory": "3g"}, {"application": "b.py"}, {"yarn_queue": "q"}]
    )
    def test_changed_arguments_reconnect_with_a_warning(
        self, instance: TaskInstance, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any]
    ) -> None:
        instance.begin().execute()
        assert job_of(instance.begin(**arguments).execute()) == "job-1"
        assert "arguments of this task have changed" in capsys.readouterr().out

    def test_other_commands_after_the_job_are_no_other_job(
        self, instance: TaskInstance, capsys: pytest.CaptureFixture[str]
    ) -> None:
        instance.begin().execute()
        instance.begin(post_submit_commands=["true"], verbose=True, status_poll_interval=3).execute()
        assert "have changed" not in capsys.readouterr().out

    @pytest.mark.parametrize("cleared", [False, True])
    def test_an_older_try_gives_way_while_spark_submit_runs(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service, cleared: bool
    ) -> None:
        first = instance.begin()
        spark.does("go; submit")

        def overtake() -> None:
            if cleared:
                instance.clear()
            second = instance.begin()
            instance.xcoms["durable_spark_try"] = {
                "token": "f" * 32 if cleared else first.record["submission"]["token"],
                "ti_id": str(second.id),
            }
            (spark.home / "go").touch()

        with (
            interrupted(lambda: spark.runs, overtake),
            pytest.raises(AirflowException, match="Another try of this task has begun"),
        ):
            first.execute()
        assert instance.store["durable_spark"]["job"] is None, "it has written nothing more"
        assert service.kills == (["job-1"] if cleared else [])


class TestPostSubmitCommands:
    @pytest.fixture
    def instance(self, spark: SparkSubmit) -> TaskInstance:
        command = shlex.join(["sh", "-c", f"echo x >> {spark.home}/post"])
        return TaskInstance(
            SparkSubmitOperator, **DEFAULTS, post_submit_commands=[command], execution_timeout=HOUR, on_timeout="keep"
        )

    @pytest.fixture
    def ran(self, spark: SparkSubmit) -> Callable[[], int]:
        path = spark.home / "post"
        return lambda: len(path.read_text().split()) if path.exists() else 0

    @pytest.mark.parametrize("kind", ["succeeded", "failed", "killed", "lost"])
    def test_run_once_after_the_end(self, instance: TaskInstance, ran: Callable[[], int], kind: str) -> None:
        first = instance.begin()
        first.execute()
        assert ran() == 0
        with ended():
            first.complete(event(instance, kind))
        assert ran() == 1

    @pytest.mark.parametrize("kind", ["outage", "timeout"])
    def test_do_not_run_while_the_job_may_go_on(
        self, instance: TaskInstance, ran: Callable[[], int], kind: str
    ) -> None:
        first = instance.begin()
        first.execute()
        with ended():
            first.complete(event(instance, kind))
        assert ran() == 0

    def test_run_after_the_deadlines_kill(self, instance: TaskInstance, ran: Callable[[], int]) -> None:
        first = instance.begin(on_timeout="kill")
        first.execute()
        with pytest.raises(AirflowTaskTimeout):
            first.complete(event(instance, "timeout"))
        assert ran() == 1

    @pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
    def test_run_when_a_retry_sees_the_end(
        self, instance: TaskInstance, service: Service, ran: Callable[[], int], state: JobState
    ) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state = state
        instance.begin().execute()
        assert ran() == 1

    def test_run_when_a_retry_sees_it_lost(
        self, instance: TaskInstance, service: Service, ran: Callable[[], int]
    ) -> None:
        instance.begin().execute()
        service.jobs["job-1"].state = JobState.ABSENT
        with pytest.raises(AirflowFailException, match="JobLost"):
            instance.begin().execute()
        assert ran() == 1

    @pytest.mark.parametrize("kind", ["succeeded", "failed"])
    def test_do_not_run_again_when_a_retry_finds_the_verdict(
        self, instance: TaskInstance, ran: Callable[[], int], kind: str
    ) -> None:
        first = instance.begin()
        first.execute()
        with ended():
            first.complete(event(instance, kind))
        instance.begin().execute()
        assert ran() == 1

    def test_the_verdict_is_in_the_store_by_then(self, instance: TaskInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(
            SparkSubmitHook,
            "_run_post_submit_commands",
            lambda _: seen.append(instance.store["durable_spark"]["verdict"]["state"]),
        )
        first = instance.begin()
        first.execute()
        first.complete(event(instance, "succeeded"))
        assert seen == ["succeeded"]

    def test_an_older_try_runs_none(self, instance: TaskInstance, ran: Callable[[], int]) -> None:
        first = instance.begin()
        first.execute()
        told = event(instance, "succeeded")
        instance.begin()
        with pytest.raises(AirflowException):
            first.complete(told)
        assert ran() == 0

    @pytest.mark.parametrize(("kind", "outcome"), [("succeeded", "job-1"), ("failed", "JobFailed")])
    def test_what_fails_there_hides_no_end(
        self, instance: TaskInstance, monkeypatch: pytest.MonkeyPatch, kind: str, outcome: str
    ) -> None:
        first = instance.begin()
        first.execute()
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps({**STANDALONE, "extra": {"spark-home": "/x"}}))
        try:
            result = first.complete(event(instance, kind))
        except AirflowException as error:
            result = str(error)
        assert outcome in result


HOUR = datetime.timedelta(hours=1)


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Let a task end in any way but by our mistake."""
    with contextlib.suppress(AirflowException, AirflowTaskTimeout):
        yield


class TestStopped:
    """What a SIGTERM while ``spark-submit`` runs leads to."""

    @pytest.fixture
    def state(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
        return lambda state: monkeypatch.setattr(trigger_module, "state_of", lambda **_: state)

    def stop(self, instance: TaskInstance, when: Callable[[], object], **arguments: Any) -> Any:
        first = instance.begin(**arguments)
        with interrupted(when, first.operator.on_kill):
            return first.execute()

    def test_before_the_submission_kills_the_tool(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        spark.does("go; submit")
        with pytest.raises(AirflowException, match="Told to stop while spark-submit ran") as caught:
            self.stop(instance, lambda: spark.runs)
        assert not isinstance(caught.value, AirflowFailException)
        spark.dies()
        (spark.home / "go").touch()
        assert job_of(instance.begin().execute()) == "job-1"
        assert list(service.jobs) == ["job-1"]

    def test_by_a_deploy_the_job_is_followed_on(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service, state: Callable[[str | None], None]
    ) -> None:
        state("running")
        service.blind = True
        service.on_glimpse = lambda: setattr(service, "blind", not service.running)
        spark.does("submit > /dev/null; go")
        deferral = self.stop(instance, lambda: list(spark.cluster.iterdir()))
        assert job_of(deferral) == "job-1"
        spark.dies()
        assert service.kills == []
        assert instance.store["durable_spark"]["job"] == ["job-1", ""]

    def test_a_job_that_comes_late_is_found_by_a_last_look(
        self,
        instance: TaskInstance,
        spark: SparkSubmit,
        service: Service,
        state: Callable[[str | None], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A request that was on its way when its sender was killed."""
        state("running")

        def arrive() -> None:
            looks.append(spark.alive)
            if not spark.alive and len(looks) - looks.index(False) == 2:
                (spark.cluster / "job-1").write_text(instance.store["durable_spark"]["submission"]["token"])

        looks: list[bool] = []
        monkeypatch.setattr(operator_module, "_LAST_LOOKS", 10.0)
        spark.does("go")
        first = instance.begin()

        def stop() -> None:
            service.on_glimpse = arrive
            first.operator.on_kill()

        with interrupted(lambda: spark.runs, stop):
            assert job_of(first.execute()) == "job-1"

    @pytest.mark.parametrize("state_now", ["failed", "success", None])
    @pytest.mark.parametrize(("policy", "kills"), [("kill", ["job-1"]), ("keep", [])])
    def test_by_a_person_the_job_is_killed_unless_it_is_to_be_kept(
        self,
        instance: TaskInstance,
        spark: SparkSubmit,
        service: Service,
        state: Callable[[str | None], None],
        state_now: str | None,
        policy: str,
        kills: list[str],
    ) -> None:
        state(state_now)
        spark.does("submit; go")
        with pytest.raises(AirflowException, match="set to"):
            self.stop(instance, lambda: list(spark.cluster.iterdir()), on_kill=policy)
        assert service.kills == kills
        spark.dies()

    @pytest.mark.parametrize(
        ("state_now", "policy", "kills"),
        [("failed", "kill", ["job-9"]), ("failed", "keep", []), ("running", "kill", []), (None, "kill", ["job-9"])],
    )
    def test_what_may_yet_become_a_job_is_killed_for_a_person_alone(
        self,
        instance: TaskInstance,
        spark: SparkSubmit,
        service: Service,
        state: Callable[[str | None], None],
        monkeypatch: pytest.MonkeyPatch,
        state_now: str | None,
        policy: str,
        kills: list[str],
    ) -> None:
        """Where the cluster lets a job be named beforehand."""
        foresee(monkeypatch, "job-9")
        state(state_now)
        spark.does("go")
        with pytest.raises(AirflowException, match="Told to stop"):
            self.stop(instance, lambda: spark.runs, on_kill=policy)
        assert service.kills == kills

    def test_the_tool_is_killed_even_while_the_store_is_slow(
        self, instance: TaskInstance, spark: SparkSubmit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The event loop stands still then."""
        write = Try.set

        def slow(self: Try, key: str, value: Any, **more: Any) -> None:
            if key == "durable_spark" and value["job"] and spark.alive:
                first.operator.on_kill()
                spark.dies()
                died.append(True)
            write(self, key, value, **more)

        died: list[bool] = []
        monkeypatch.setattr(Try, "set", slow)
        spark.does("submit; go")
        first: Try = instance.begin()
        assert job_of(first.execute()) == "job-1"
        assert died == [True]

    def test_before_it_is_started_nothing_is_submitted(self, instance: TaskInstance, spark: SparkSubmit) -> None:
        first = instance.begin()
        first.operator.on_kill()
        with pytest.raises(AirflowException, match="nothing was submitted"):
            first.execute()
        assert spark.runs == []


class TestDeadline:
    """``execution_timeout`` passes while ``spark-submit`` runs; Airflow's timer interrupts whatever runs."""

    def time_out(self, instance: TaskInstance, when: Callable[[], object], **arguments: Any) -> None:
        first = instance.begin(execution_timeout=HOUR, **arguments)
        with interrupted(when, time_out):
            first.execute()

    def test_before_the_submission(self, instance: TaskInstance, spark: SparkSubmit, service: Service) -> None:
        spark.does("go; submit")
        with pytest.raises(AirflowTaskTimeout, match="Timeout"):
            self.time_out(instance, lambda: spark.runs)
        spark.dies()
        assert not list(spark.cluster.iterdir())

    def test_the_tool_is_dead_before_the_last_look(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        """Else it submits what nobody looks for any more."""
        seen: list[bool] = []
        service.on_glimpse = lambda: seen.append(spark.alive)
        spark.does("go")
        with pytest.raises(AirflowTaskTimeout, match="Timeout"):
            self.time_out(instance, lambda: spark.runs)
        assert seen[-1] is False

    def test_after_the_submission_the_job_is_killed(
        self, instance: TaskInstance, spark: SparkSubmit, service: Service
    ) -> None:
        spark.does("submit > /dev/null; go")
        with pytest.raises(AirflowTaskTimeout, match="job-1 was killed and is KILLED"):
            self.time_out(instance, lambda: list(spark.cluster.iterdir()))
        assert service.kills == ["job-1"]
        spark.dies()
        assert instance.store["durable_spark"]["verdict"]["state"] == "killed"

    def test_unless_it_is_to_be_kept(self, instance: TaskInstance, spark: SparkSubmit, service: Service) -> None:
        spark.does("submit; go")
        with pytest.raises(AirflowTaskTimeout, match="left running"):
            self.time_out(instance, lambda: list(spark.cluster.iterdir()), on_timeout="keep")
        assert service.kills == []
        spark.dies()
        assert job_of(instance.begin().execute()) == "job-1"

    def test_also_when_airflows_timer_is_lost(
        self, instance: TaskInstance, spark: SparkSubmit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(job_module, "_TIMER_MARGIN", 0.0)
        spark.does("go")
        with alarm(15), pytest.raises(AirflowTaskTimeout, match="the execution timeout passed"):
            instance.begin(execution_timeout=datetime.timedelta(seconds=0.3)).execute()
        spark.dies()


def foresee(monkeypatch: pytest.MonkeyPatch, job_id: str) -> None:
    """Let the service be one that names its jobs beforehand."""
    original = MemoryCliHook.prepare_cli

    async def prepare_cli(self: Any, conf: Any, submission: Any) -> Any:
        plan = await original(self, conf, submission)
        return dataclasses.replace(plan, submission=dataclasses.replace(plan.submission, job=JobRef(job_id)))

    monkeypatch.setattr(MemoryCliHook, "prepare_cli", prepare_cli)
