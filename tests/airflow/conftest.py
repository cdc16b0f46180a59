"""One real Airflow and a real cluster of each kind for the whole suite, with proxies to stop a request at will."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import durable_spark.example_dags
from dev.airflow import IMPATIENT, Airflow, TaskInstance
from dev.processes import free_port, wait_until
from dev.proxy import Proxy
from tests.clusters import CLUSTERS, Clusters, change_import
from tests.conftest import or_none

if TYPE_CHECKING:
    from dev.kubernetes import KubernetesCluster
    from dev.spark import Driver, StandaloneCluster

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SUBMIT_DAG = Path(__file__).with_name("submit_dag.py")
DAGS = (
    "blocking",
    "durable_spark_example",
    "durable_spark_kubernetes_example",
    "durable_spark_submit_example",
    "keeping",
    "life",
    "limited",
    "pod",
    "pod_held",
    "pod_single",
    "pod_spark",
    "pod_stuck",
    "process_example",
    "proxied",
    "reconnecting",
    "single",
)
ENDED = {"success", "failed"}


@dataclasses.dataclass
class Stage:
    """All that a test acts on, and the witness."""

    airflow: Airflow
    cluster: StandaloneCluster
    execution_api: Proxy
    """Between workers and Airflow's execution API."""
    rest: Proxy
    """Between the connection ``spark_proxied`` and the master's REST server."""
    processes: Proxy
    """Between the connection ``processes`` and the job service of the page on writing a hook."""
    service_port: int
    kubernetes: KubernetesCluster | None
    """Known to the connection ``kubernetes``. Nothing where one cannot be had."""
    submit: Clusters | None
    """What ``spark-submit`` submits to, where there are all of them."""
    dags: Path
    """The folder of the Dag files."""

    def run(self, dag: str, *, task: str = "job", **conf: str) -> Run:
        """Trigger a run."""
        before = {driver.id for driver in self.cluster.drivers()}
        return Run(self, dag, self.airflow.trigger(dag, conf=conf, run=f"run-{uuid.uuid4().hex[:8]}"), before, task)


@dataclasses.dataclass
class Run:
    """One run of a Dag with one task."""

    stage: Stage
    dag: str
    id: str
    _before: set[str]
    task: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.dag, self.id, self.task

    @property
    def ti(self) -> TaskInstance:
        return self.stage.airflow.task(*self.key)

    def wait(self, *states: str, deadline: float = 90, try_number: int | None = None) -> TaskInstance:
        """Wait until the task is in one of the states."""

        def reached() -> TaskInstance | None:
            now = self.ti
            return now if now.state in states and try_number in (None, now.try_number) else None

        try:
            return wait_until(reached, deadline, f"{self.dag} to be {' or '.join(states)}", interval=0.1)
        except TimeoutError as error:
            raise AssertionError(f"{error}: it is {self.ti.state}\n{self.logs()}") from None

    def wait_for_driver(self, *states: str, deadline: float = 60) -> Driver:
        """Wait until the run has a driver, in one of the states."""

        def reached() -> Driver | None:
            return next((d for d in self.drivers() if not states or d.state in states), None)

        try:
            return wait_until(reached, deadline, f"a driver that is {states}", interval=0.1)
        except TimeoutError as error:
            raise AssertionError(f"{error}: the master lists {self.drivers()}\n{self.logs()}") from None

    def wait_until_followed(self) -> None:
        """Wait until the trigger runs: a task that is marked before reaches no code of ours."""
        wait_until(
            lambda: " is running" in self.log(self.ti.try_number).lower(),
            60,
            f"the trigger of {self.dag}",
            interval=0.2,
        )

    def drivers(self) -> list[Driver]:
        """Return the drivers that were submitted since this run began, by the master's own record."""
        return [driver for driver in self.stage.cluster.drivers() if driver.id not in self._before]

    def store(self) -> dict[str, Any]:
        return self.stage.airflow.store(*self.key)

    def xcoms(self) -> dict[str, Any]:
        return self.stage.airflow.xcoms(*self.key)

    def log(self, try_number: int = 1) -> str:
        return self.stage.airflow.log_text(*self.key, try_number)

    def logs(self) -> str:
        said = []
        for number in range(1, self.ti.try_number + 1):
            for line in self.stage.airflow.log(*self.key, number):
                said.append(json.dumps(line) if "error_detail" in line else str(line.get("event")))
        return "\n".join(said)[-8000:]

    def kill(self, **options: Any) -> None:
        """Kill -9 the process that runs the task's code."""
        self.stage.airflow.kill_task_process(*self.key, **options)


@pytest.fixture(scope="session")
def kubernetes(request: pytest.FixtureRequest) -> KubernetesCluster | None:
    """Return the cluster whose pods run; ``None`` instead of skipping all that needs an Airflow."""
    return cast("KubernetesCluster | None", or_none(request, "kubernetes_cluster"))


@pytest.fixture(scope="session")
def stage(
    standalone_cluster: StandaloneCluster,
    kubernetes: KubernetesCluster | None,
    submit_clusters: Clusters | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    dags = tmp_path_factory.mktemp("dags")
    own, shipped = Path(__file__).parent / "dags", Path(durable_spark.example_dags.__file__).parent
    for file in (*own.glob("*.py"), *shipped.glob("*.py"), EXAMPLES / "process_dag.py"):
        (dags / file.name).symlink_to(file)
    port, service_port = free_port(), free_port()
    with (
        Proxy(f"http://127.0.0.1:{port}") as execution_api,
        Proxy(f"http://127.0.0.1:{standalone_cluster.master.rest_port}") as rest,
        Proxy(f"http://127.0.0.1:{service_port}") as processes,
    ):
        connections = {
            "spark_default": standalone_cluster.connection(),
            "spark_proxied": standalone_cluster.connection(rest_port=str(rest.port)),
            "processes": {"conn_type": "http", "host": "127.0.0.1", "port": processes.port, "extra": {}},
        }
        env = {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
        if kubernetes is not None:
            connections["kubernetes"] = kubernetes.connection(
                dashboard_url="https://dashboard.invalid/{namespace}/{pod}",
                log_url="https://logs.invalid/{uid}",
                history_url="https://history.invalid/{app_id}",
            )
            env["KUBERNETES_CONF"] = json.dumps(kubernetes.conf())
        expected = list(DAGS)
        if submit_clusters is not None:
            connections.update(submit_clusters.connections())
            env.update(submit_clusters.environment())
            (dags / "dropin.py").write_text(change_import(SUBMIT_DAG.read_text()))
            expected += [f"dropin_{cluster}" for cluster in CLUSTERS]
            for cluster in CLUSTERS:
                (dags / f"changing_{cluster}.py").write_text(SUBMIT_DAG.read_text())
                expected.append(f"changing_{cluster}_{cluster}")
        with Airflow(
            dags,
            port=port,
            execution_api=execution_api.url,
            connections={
                name: json.dumps({**connection, "extra": json.dumps(connection["extra"])})
                for name, connection in connections.items()
            },
            config={**IMPATIENT, "scheduler": {**IMPATIENT["scheduler"], "task_instance_heartbeat_timeout": 60}},
            env=env,
        ) as airflow:
            for dag in expected:
                airflow.wait_for_dag(dag)
            # No file changes any more. It writes every second, and SQLite has one writer at a time.
            airflow.dag_processor.kill()
            yield Stage(
                airflow=airflow,
                cluster=standalone_cluster,
                execution_api=execution_api,
                rest=rest,
                processes=processes,
                service_port=service_port,
                kubernetes=kubernetes,
                submit=submit_clusters,
                dags=dags,
            )
    shutil.rmtree(dags, ignore_errors=True)


@pytest.fixture
def run(stage: Stage) -> Iterator[Callable[..., Run]]:
    """Trigger a run; at the end of the test whatever it left running is ended."""
    runs: list[Run] = []

    def trigger(dag: str, **options: str) -> Run:
        runs.append(stage.run(dag, **options))
        return runs[-1]

    yield trigger
    for one in runs:
        if one.ti.state not in ENDED:
            stage.airflow.set_state(*one.key, "failed")
        wait_until(
            lambda one=one: all(d.state not in ("SUBMITTED", "RUNNING") for d in one.drivers()),  # type: ignore[misc]
            60,
            f"the drivers of {one.dag} to end",
        )
