"""
One real Airflow and a real cluster of each kind for the whole suite, with proxies to stop a request at will.

The Airflow has PostgreSQL, two schedulers and two triggerers. Tests that only wait are told side by side, see
:mod:`tests.airflow.together`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import ssl
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import durable_spark.example_dags
from dev import processes
from dev.airflow import IMPATIENT, Airflow, ApiError, TaskInstance, connection_text
from dev.kubernetes import KubernetesCluster, RequestFailed
from dev.postgres import Postgres
from dev.processes import free_port, wait_until
from dev.proxy import Proxy
from dev.spark import SMALL_JVM, archived_classes, ensure_spark
from tests.airflow.collectors import statsd
from tests.airflow.job_service import EXAMPLES, JobService
from tests.airflow.marks import MEMORY, SUBMITTING
from tests.airflow.together import Elsewhere, InActs, Together, Turn, has_own_stage, turn_of
from tests.clusters import Clusters, change_import
from tests.conftest import or_none, require

if TYPE_CHECKING:
    from dev.kubernetes import CreatedPod
    from dev.proxy import Hold
    from dev.spark import Driver, StandaloneCluster

processes.patience = 3.0  # two cores, six stories at once

SUBMIT_DAG = Path(__file__).with_name("submit_dag.py")
ENDED = {"success", "failed"}
PRELOADED = (
    "durable_spark.operators.spark_submit",
    "durable_spark.hooks.kubernetes",
    "durable_spark.hooks.standalone",
    "durable_spark.hooks.yarn",
    "durable_spark.triggers.job",
    "tests.airflow.small_jobs",
    "tests.clusters",
)
"""What nearly every task imports, most of which is not this package's."""
LAST_LOOK = r"/execution/task-instances/states"
"""
What a task asks last before it defers. The deferral itself cannot be held back for this purpose: it is sent by the
supervisor, which sends it again when the task's process is long dead.
"""


@dataclasses.dataclass
class Stage:
    """All that a test acts on, and the witness."""

    airflow: Airflow
    cluster: StandaloneCluster
    execution_api: Proxy
    """Between workers and Airflow's execution API."""
    rest: Proxy
    """Between the connection ``spark_proxied`` and the master's REST server."""
    job_service: JobService
    """Known to the connection ``processes``."""
    kubernetes: KubernetesCluster | None
    """Known to the connection ``kubernetes``. Nothing where one cannot be had."""
    kubernetes_api: Proxy
    """Between the connection ``kubernetes_proxied`` and the API server, if there is one."""
    submit: Clusters | None
    """What ``spark-submit`` submits to, where there are all of them."""
    dags: Path
    """The folder of the Dag files."""
    postgres: Postgres
    """Airflow's database."""
    metrics: list[str]
    """What this package has sent to statsd, the tags as InfluxDB has them."""

    def run(self, dag: str, *, task: str = "job", **conf: str) -> Run:
        """Trigger a run."""
        before = {driver.id for driver in self.cluster.drivers()} | {pod.uid for pod in self.pods()}
        return Run(self, dag, self.airflow.trigger(dag, conf=conf, run=f"run-{uuid.uuid4().hex[:8]}"), before, task)

    def counted(self, metric: str, conn_id: str, kind: str = "c") -> list[str]:
        """
        Return the values of one of this package's metrics that were sent for a connection.

        :param kind: statsd's: ``c`` for a counter, ``g`` for a gauge.
        """
        values = []
        for line in list(self.metrics):  # name,tag=value,tag=value:number|kind
            told, _, value = line.partition(":")
            name, *tags = told.split(",")
            number, _, its_kind = value.partition("|")
            if (name, its_kind) == (f"airflow.durable_spark.{metric}", kind) and f"conn_id={conn_id}" in tags:
                values.append(number)
        return values

    def wait_for_count(self, metric: str, conn_id: str, value: str = "1", kind: str = "c") -> None:
        """Wait until a value of one of this package's metrics has come: it is sent with nobody waiting for it."""
        what = f"{metric} of {conn_id} to be {value}"
        wait_until(lambda: value in self.counted(metric, conn_id, kind), 60, what, interval=0.2)

    def about_to_defer(self, dag: str) -> contextlib.AbstractContextManager[Hold]:
        """
        Hold back what a Dag's task asks last before it defers.

        :param dag: a regular expression.
        """
        return self.execution_api.holding("GET", rf"{LAST_LOOK}.*dag_id={dag}&")

    def submitting(self, dag: str, *, after: bool = False) -> contextlib.AbstractContextManager[Hold]:
        """
        Hold back the request by which a Dag of ``spark_proxied`` submits its driver.

        :param after: hold back the answer instead.
        """
        memory = f'"spark.driver.memory": ?"{MEMORY[dag]}m"'
        return self.rest.holding("POST", "/v1/submissions/create", body=memory, after=after)

    @contextlib.contextmanager
    def killed_before_it_defers(self, run: Callable[..., Run], dag: str, **options: str) -> Iterator[Run]:
        """Trigger a run whose task is about to defer; at the end of the block the task's process is killed."""
        with self.about_to_defer(dag) as held:
            job = run(dag, **options)
            held.wait()
            yield job
            job.kill()
            held.drop()

    @contextlib.contextmanager
    def without_triggerers(self) -> Iterator[None]:
        """Kill -9 all triggerers for the length of the block."""
        for triggerer in self.airflow.triggerers:
            triggerer.kill()
        try:
            yield
        finally:
            for triggerer in self.airflow.triggerers:
                triggerer.start()

    @property
    def pod_cluster(self) -> KubernetesCluster:
        """The Kubernetes cluster. Skips the test where there is none."""
        if self.kubernetes is None:
            pytest.skip("there is no Kubernetes cluster")
        return self.kubernetes

    def pods(self) -> list[CreatedPod]:
        """Return all pods that were ever created, by the API server's audit log."""
        return self.kubernetes.created_pods() if self.kubernetes is not None else []


class PodStage(Stage):
    """A stage of a module's own, without a standalone cluster."""

    def __init__(
        self, airflow: Airflow, execution_api: Proxy, kubernetes: KubernetesCluster, postgres: Postgres
    ) -> None:
        self.airflow, self.execution_api, self.kubernetes, self.postgres = airflow, execution_api, kubernetes, postgres

    def run(self, dag: str, *, task: str = "job", **conf: str) -> Run:
        """Trigger a run."""
        before = {pod.uid for pod in self.pods()}
        return Run(self, dag, self.airflow.trigger(dag, conf=conf), before, task)


@dataclasses.dataclass
class Run:
    """
    One run of a Dag, and one of its tasks.

    Pods bear the Dag's name. Whose a driver is is told by its memory, if the Dag's is its own
    (:data:`tests.airflow.marks.MEMORY`), else by the time alone: such Dags do not run side by side.
    """

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

    def wait(self, *states: str, deadline: float = 150, try_number: int | None = None) -> TaskInstance:
        """Wait until the task is in one of the states."""

        def reached() -> bool:
            state, number = self.state()
            return state in states and try_number in (None, number)

        try:
            wait_until(reached, deadline, f"{self.dag} to be {' or '.join(states)}", interval=0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}: it is {self.ti.state}\n{self.logs()}") from None
        return self.ti

    def state(self) -> tuple[str | None, int]:
        """
        Return the task's state and the number of its try, as the database has them.

        For who asks again and again: asking the API server costs it more than all else that goes on.
        """
        return self.states()[-1]

    def states(self) -> dict[int, tuple[str | None, int]]:
        """Return the same of all map indexes, -1 for a task that is not mapped."""
        rows = self.stage.postgres.query(
            "SELECT map_index, state, try_number FROM task_instance "
            "WHERE dag_id = %(dag)s AND run_id = %(run)s AND task_id = %(task)s",
            dag=self.dag,
            run=self.id,
            task=self.task,
        )
        return {index: (state, number) for index, state, number in rows}

    def wait_for_driver(self, *states: str, deadline: float = 120) -> Driver:
        """Wait until the run has a driver, the latest one in one of the states."""

        def reached() -> Driver | None:
            made = self.drivers()
            return made[-1] if made and (not states or made[-1].state in states) else None

        try:
            return wait_until(reached, deadline, f"a driver that is {states}", interval=0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}: the master lists {self.drivers()}\n{self.logs()}") from None

    def wait_until_followed(self) -> None:
        """Wait until the trigger runs: a task that is marked before reaches no code of ours."""
        self.wait_until_said(" is Running", " is RUNNING", " is running", try_number=None, deadline=120)

    def wait_until_said(
        self, *parts: str, try_number: int | None = 1, map_index: int = -1, deadline: float = 90
    ) -> None:
        """
        Wait until a message of the task's log has one of these parts; read from the files.

        :param parts: beginning, or ending, with a line break if the message is to.
        :param try_number: ``None`` for the one that it has come to.
        """

        def said() -> bool:
            number = self.states()[map_index][1] if try_number is None else try_number
            texts = self.told(number, map_index).values()
            return any(part in f"\n{text}\n" for text in texts for part in parts)

        try:
            wait_until(said, deadline, f"{' or '.join(map(repr, parts))} in the log of {self.dag}", interval=0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def told(self, try_number: int = 1, map_index: int = -1) -> dict[str, str]:
        """
        Return the messages of a try's log, by the names of its files: one of the worker, one of each triggerer.

        For who asks again and again: the API server merges them anew each time.
        """
        folder = self.stage.airflow.home / "logs" / f"dag_id={self.dag}" / f"run_id={self.id}" / f"task_id={self.task}"
        if map_index >= 0:
            folder /= f"map_index={map_index}"
        return {file.name: "\n".join(messages_in(file)) for file in folder.glob(f"attempt={try_number}.log*")}

    def drivers(self) -> list[Driver]:
        """Return the drivers that were submitted since this run began, by the master's own record."""
        return [
            driver
            for driver in self.stage.cluster.drivers()
            if driver.id not in self._before and driver.memory == MEMORY.get(self.dag, driver.memory)
        ]

    def pods(self) -> list[CreatedPod]:
        """Return the pods that were created for this Dag since the run began, the oldest first."""
        dag, task = self.dag.replace("_", "-"), self.task.replace("_", "-")
        prefix = f"{dag[: 29 - len(task)].rstrip('-')}-{task}-"  # of the Dag's name as much as a pod's has room for
        return [pod for pod in self.stage.pods() if pod.name.startswith(prefix) and pod.uid not in self._before]

    def phase(self, pod: CreatedPod) -> str | None:
        """Return a pod's phase, ``None`` when it is gone."""
        try:
            return str(self.stage.pod_cluster.pod(pod.name)["status"]["phase"])
        except RequestFailed as error:
            if error.status != 404:
                raise
            return None

    def wait_for_pod(self, *phases: str | None, deadline: float = 120) -> CreatedPod:
        """Wait until the run's latest pod is in one of the phases; ``None`` is one that is gone."""

        def reached() -> CreatedPod | None:
            pods = self.pods()
            return pods[-1] if pods and self.phase(pods[-1]) in phases else None

        try:
            return wait_until(reached, deadline, f"a pod of {self.dag} that is {phases}", interval=0.4)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def wait_for_followed_pod(self) -> CreatedPod:
        """Wait until the run's pod runs and its trigger follows it."""
        self.wait("deferred")
        pod = self.wait_for_pod("Running")
        self.wait_until_followed()
        return pod

    def wait_for_end(self, *, deadline: float = 180) -> str:
        """
        Wait until the whole run has ended; return its state.

        A scheduler that is about to end a run may overwrite what a clear has just made of it: the tasks wait for ever
        then.
        """

        def ended() -> str | None:
            ((state,),) = self.stage.postgres.query(
                "SELECT state FROM dag_run WHERE dag_id = %(dag)s AND run_id = %(run)s", dag=self.dag, run=self.id
            )
            return str(state) if state in ENDED else None

        try:
            return wait_until(ended, deadline, f"the run of {self.dag} to end", interval=0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def store(self) -> dict[str, Any]:
        return self.stage.airflow.store(*self.key)

    def xcoms(self) -> dict[str, Any]:
        return self.stage.airflow.xcoms(*self.key)

    def log(self, try_number: int = 1) -> str:
        return self.stage.airflow.log_text(*self.key, try_number)

    def logs(self) -> str:
        said = []
        for number in range(1, self.ti.try_number + 1):
            with contextlib.suppress(ApiError):  # a try that is to come has none
                for line in self.stage.airflow.log(*self.key, number):
                    said.append(json.dumps(line) if "error_detail" in line else str(line.get("event")))
        return "\n".join(said)[-8000:]

    def kill(self, **options: Any) -> None:
        """Kill -9 the process that runs the task's code."""
        self.stage.airflow.kill_task_process(*self.key, **options)


@pytest.fixture(scope="session")
def java_options() -> str:
    """Let all JVMs start soon: a quarter of a busy machine was theirs."""
    return f"{SMALL_JVM} {archived_classes(require(ensure_spark))}"


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
    for file in (*own.glob("*.py"), *shipped.glob("[a-z]*.py"), EXAMPLES / "process_dag.py"):
        (dags / file.name).symlink_to(file)
    port = free_port()
    with (
        Proxy(f"http://127.0.0.1:{port}") as execution_api,
        Proxy(f"http://127.0.0.1:{standalone_cluster.master.rest_port}") as rest,
        JobService(tmp_path_factory.mktemp("job-service") / "log") as job_service,
        proxy_of(kubernetes) as kubernetes_api,
        statsd() as (statsd_port, metrics),
    ):
        connections = {
            "spark_default": standalone_cluster.connection(),
            "spark_proxied": standalone_cluster.connection(rest_port=str(rest.port)),
            "processes": {"conn_type": "http", "host": "127.0.0.1", "port": job_service.proxy.port, "extra": {}},
        }
        env = {"PYTHONPATH": str(EXAMPLES)}
        if kubernetes is not None:
            connections["kubernetes"] = kubernetes.connection(
                dashboard_url="https://dashboard.invalid/{namespace}/{pod}",
                log_url="https://logs.invalid/{uid}",
                history_url="https://history.invalid/{app_id}",
            )
            connections["kubernetes_proxied"] = {
                **kubernetes.connection(),
                "host": "k8s://http://127.0.0.1",
                "port": kubernetes_api.port,
            }
            env["KUBERNETES_CONF"] = json.dumps(kubernetes.conf())
        if submit_clusters is not None:
            connections.update(submit_clusters.connections())
            env.update(submit_clusters.environment())
            env["SPARK_SUBMIT_OPTS"] = archived_classes(submit_clusters.yarn.spark)
            source = SUBMIT_DAG.read_text()
            for story, cluster in SUBMITTING:
                dag = source if story == "taken" else change_import(source)
                (dags / f"submit_{story}_{cluster}.py").write_text(dag)
        with (
            Postgres() as postgres,
            Airflow(
                dags,
                port=port,
                database=postgres.url,
                schedulers=2,
                triggerers=2,
                execution_api=execution_api.url,
                connections={name: connection_text(connection) for name, connection in connections.items()},
                config={
                    **IMPATIENT,
                    "scheduler": {
                        **IMPATIENT["scheduler"],
                        "task_instance_heartbeat_timeout": 60,
                        # There are two of them, which took a sixth of the machine to look whether there is something.
                        "scheduler_idle_sleep_time": 2,
                        "trigger_timeout_check_interval": 2,
                        "task_instance_heartbeat_timeout_detection_interval": 4,
                    },
                    "workers": {**IMPATIENT["workers"], "min_heartbeat_interval": 4},
                    "triggerer": {**IMPATIENT["triggerer"], "triggerer_health_check_threshold": 10},
                    "metrics": {
                        "statsd_on": True,
                        "statsd_port": statsd_port,
                        "statsd_influxdb_enabled": True,
                        "metrics_allow_list": "durable_spark",
                    },
                },
                env=env,
                preload=PRELOADED,
            ) as airflow,
        ):
            files = {file.name for file in dags.glob("[a-z]*.py")}
            wait_until(lambda: parsed(airflow, files), 120, "all Dags", servers=[airflow.dag_processor], interval=0.2)
            yield Stage(
                airflow=airflow,
                cluster=standalone_cluster,
                execution_api=execution_api,
                rest=rest,
                job_service=job_service,
                kubernetes=kubernetes,
                kubernetes_api=kubernetes_api,
                submit=submit_clusters,
                dags=dags,
                postgres=postgres,
                metrics=metrics,
            )
    shutil.rmtree(dags, ignore_errors=True)


def messages_in(file: Path) -> Iterator[str]:
    """Give the messages of a file of a task's log, which may be written to at this moment."""
    for line in file.read_text(errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            yield str(json.loads(line).get("event"))


def proxy_of(cluster: KubernetesCluster | None) -> Proxy:
    """Return what is to stand between a connection and the API server."""
    if cluster is None:
        return Proxy("http://127.0.0.1:9")
    return Proxy(cluster.url, tls=ssl.create_default_context(cafile=str(cluster.ca)))


def parsed(airflow: Airflow, files: set[str]) -> bool:
    """Whether each file has shown its Dags; an import error is raised."""
    if errors := airflow.api("GET", "/importErrors")["import_errors"]:
        raise RuntimeError("\n".join(f"{error['filename']}:\n{error['stack_trace']}" for error in errors))
    shown = airflow.api("GET", "/dags", params={"limit": 500})["dags"]
    return files <= {Path(dag["fileloc"]).name for dag in shown}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let all that is told side by side end before a test kills a process that others need."""
    items.sort(key=turn_of)


@contextlib.contextmanager
def runs_of(stage: Stage) -> Iterator[Callable[..., Run]]:
    """Trigger runs; at the end whatever they left running is ended."""
    runs: list[Run] = []

    def trigger(dag: str, **options: str) -> Run:
        runs.append(stage.run(dag, **options))
        return runs[-1]

    try:
        yield trigger
    finally:
        for one in runs:
            with contextlib.suppress(ApiError):  # a run that was deleted
                if one.ti.state not in ENDED:
                    stage.airflow.set_state(*one.key, "failed")


@pytest.fixture
def run(stage: Stage) -> Iterator[Callable[..., Run]]:
    """Trigger a run; at the end of the test whatever it left running is ended."""
    before = {driver.id for driver in stage.cluster.drivers()}
    with runs_of(stage) as trigger:
        yield trigger
    wait_until(
        lambda: all(d.state not in ("SUBMITTED", "RUNNING") for d in stage.cluster.drivers() if d.id not in before),
        60,
        "the drivers to end",
    )


@contextlib.contextmanager
def telling(request: pytest.FixtureRequest, stage: Stage, *turns: Turn) -> Iterator[Together]:
    """Begin to tell all stories of these turns."""

    def tell(story: Callable[..., None], parameters: dict[str, Any]) -> None:
        with runs_of(stage) as trigger:
            story(stage, trigger, **parameters)

    told = Together(request.session.items, turns, tell)
    try:
        yield told
    finally:
        told.end()


@pytest.fixture(scope="session")
def told_here(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Together]:
    """Begin to tell all that is told side by side."""
    with telling(request, stage, Turn.LONG, Turn.STORY) as told:
        yield told


@pytest.fixture(scope="session")
def told_at_last(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Together]:
    """Begin to tell all stories that kill what others need."""
    with telling(request, stage, Turn.FATAL) as told:
        yield told


@pytest.fixture(scope="session")
def told_in_acts(request: pytest.FixtureRequest, stage: Stage) -> InActs:
    """Tell all stories in acts."""

    def tell(story: Callable[..., Iterator[None]]) -> Iterator[None]:
        with runs_of(stage) as trigger:
            yield from story(stage, trigger)

    @contextlib.contextmanager
    def second_act() -> Iterator[None]:
        with stage.without_triggerers():
            request.getfixturevalue("told_elsewhere")  # begins now
            yield

    return InActs(request.session.items, tell, second_act)


@pytest.fixture(scope="session")
def told_elsewhere(
    request: pytest.FixtureRequest, kubernetes: KubernetesCluster | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[pytest.Item], Elsewhere[Stage]]]:
    """Begin to tell all that is on a stage of its own; gives what tells of a test of such a module."""

    def tell(stage: Stage, story: Callable[..., None]) -> None:
        with runs_of(stage) as trigger:
            story(stage, trigger)

    @contextlib.contextmanager
    def open_stage(module: Any, dags: Path) -> Iterator[Stage]:
        if kubernetes is None:
            pytest.skip("there is no Kubernetes cluster")
        with KubernetesCluster() as own, module.own_stage(own, dags) as stage:  # that of the others is killed meanwhile
            yield stage

    modules: dict[Any, list[pytest.Item]] = {}
    for item in filter(has_own_stage, request.session.items):
        modules.setdefault(item.module, []).append(item)  # type: ignore[attr-defined]
    told = {
        module: Elsewhere(items, open_stage(module, tmp_path_factory.mktemp("dags")), tell)
        for module, items in modules.items()
    }
    try:
        yield lambda item: told[item.module]  # type: ignore[attr-defined]
    finally:
        for each in told.values():
            each.end()


@pytest.fixture(autouse=True)
def beside(request: pytest.FixtureRequest) -> None:
    """Have tests on a stage of their own told beside those that are not told side by side, if no act was before."""
    if turn_of(request.node) > Turn.IN_ACTS:
        request.getfixturevalue("told_elsewhere")


@pytest.fixture
def told_together(request: pytest.FixtureRequest) -> Together | Elsewhere[Stage]:
    """Return what tells of a story."""
    if has_own_stage(request.node):
        return cast("Elsewhere[Stage]", request.getfixturevalue("told_elsewhere")(request.node))
    return cast("Together", request.getfixturevalue("told_here"))
