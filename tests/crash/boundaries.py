"""
Kills a task at each of its boundaries with the outside, lets Airflow's retry run, and has the clusters count the jobs.

A boundary is an exchange of the task's process, or of its triggerer's, with anything that is not that process: a
message to Airflow, a request to the cluster, an act on its own machine. A :class:`Harness` runs lives of tasks on one
:class:`Backend`, each with a plan of where it dies; nobody tells it how many boundaries there are: it goes on until a
plan is not reached any more. The witness is the cluster's own record, never the package's store or log.

What flows in: a backend, plans. What flows out: a :class:`Case` for each life, with what it has broken.

The trap: the same plan does not always meet the same exchange, for a job is polled as often as its length asks. So a
case tells what it was killed at.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import ssl
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dev.processes import wait_until
from dev.proxy import Proxy, Request
from tests.clusters import Clusters, Job, marked, spark_submits
from tests.crash.inprocess import TASK, Airflow, Stuck
from tests.crash.interposer import Exchange, Interposer, Kill, Way

if TYPE_CHECKING:
    from dev.kubernetes import KubernetesCluster
    from dev.spark import StandaloneCluster

__all__ = [
    "BACKENDS",
    "WINDOW",
    "Backend",
    "Case",
    "Harness",
    "Life",
    "Stage",
    "are_over",
    "backend",
    "in_process",
    "pairs",
    "singles",
    "usual",
    "ways_to_die",
]

RETRIES = 3
DEADLINE = 240.0
"""Seconds for a life, for each job that it may have."""
MISSES = 3
"""How many lives in a row do not come as far as planned when there is nothing more to come to."""
WINDOW = "Airflow: SetTaskStateStore spark_job_id"
"""Before it upstream's operator has submitted, and nobody knows."""
_RIGHT = {0: "succeeded", 1: "failed"}
_KILL = re.compile("^cluster: (DELETE|POST .*/kill/)")
_CLOCK = 1.0
"""Seconds to which Kubernetes rounds its times."""
_OURS = "durable_spark.operators.spark_submit.SparkSubmitOperator"
_NATIVE = "durable_spark.operators.spark.SparkJobOperator"
_UPSTREAM = "airflow.providers.apache.spark.operators.spark_submit.SparkSubmitOperator"
_DAGS = """
import importlib
import json
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG

operator, arguments = json.loads(Path({file!r}).read_text())
module, _, name = operator.rpartition(".")
with DAG({dag!r}, schedule=None):
    getattr(importlib.import_module(module), name)(task_id={task!r}, retry_delay=timedelta(0), **arguments)
"""
_FORGOTTEN = "forgotten"
_START = "machine: start python"
"""The guard, which runs ``spark-submit``."""
_SECONDS, _CODE = "{{ dag_run.conf.seconds }}", "{{ dag_run.conf.code }}"


@dataclasses.dataclass(frozen=True)
class Backend:
    """
    A cluster, and a way to submit to it.

    :param name: for people.
    :param operator: path of the operator's class.
    :param arguments: of the operator.
    :param connection: in its JSON form, through the proxies.
    :param jobs: returns the jobs of a run that the cluster has had, by its own record; of a place's runs, where it
        cannot tell them apart.
    :param place: ID of the Dag and of the connection: in one place there is one life at a time.
    :param seconds: how long a job takes, from when it runs.
    :param launched: returns the jobs that were ever launched, of a cluster that has nobody else's, and may forget.
    :param ours: whether the operator is this package's, and keeps its promises.
    """

    name: str
    operator: str
    arguments: Mapping[str, Any]
    connection: Mapping[str, Any]
    jobs: Callable[[str], Sequence[Job]]
    place: str
    seconds: float = 1.0
    launched: Callable[[], Sequence[str]] = tuple
    ours: bool = True

    @property
    def submits(self) -> bool:
        """Whether ``spark-submit`` of ours submits."""
        return self.operator == _OURS

    def source(self, directory: Path) -> str:
        """Return the source of the Dag; its arguments go into a file."""
        file = directory / f"{self.place}.json"
        file.write_text(json.dumps([self.operator, {"retries": RETRIES, **self.arguments}]))
        return _DAGS.format(dag=self.place, file=str(file), task=TASK)


@dataclasses.dataclass
class Case:
    """
    One life.

    :ivar plan: where it was to die, in short.
    :ivar kind: for a report: of which series it is.
    :ivar killed: at which exchanges it died.
    :ivar crossed: how many exchanges each of its lives had, from one death to the next.
    :ivar code: with which its jobs ended.
    :ivar left: how many jobs there were after each death, before the next process began.
    :ivar lingered: seconds for which ``spark-submit`` has outlived its task, at most.
    :ivar limits: what is named as a limit: what the cluster itself did, and a death on the last try.
    :ivar of: which code it is a life of, and which seed: those of a table are the same.
    :ivar at: when it was over, in seconds since the epoch.
    """

    backend: str
    plan: list[str]
    kind: str = ""
    code: int = 0
    killed: list[str] = dataclasses.field(default_factory=list)
    crossed: list[int] = dataclasses.field(default_factory=list)
    left: list[int] = dataclasses.field(default_factory=list)
    lingered: float = 0.0
    state: str = ""
    jobs: list[str] = dataclasses.field(default_factory=list)
    tries: int = 0
    seconds: float = 0.0
    duplicates: list[str] = dataclasses.field(default_factory=list)
    losses: list[str] = dataclasses.field(default_factory=list)
    false_ends: list[str] = dataclasses.field(default_factory=list)
    limits: list[str] = dataclasses.field(default_factory=list)
    log: str = ""
    of: str = ""
    at: float = 0.0

    @property
    def broken(self) -> list[str]:
        """What it has broken."""
        return [*self.duplicates, *self.losses, *self.false_ends]

    @property
    def reached(self) -> bool:
        """Whether it died as often as planned."""
        return len(self.killed) == len(self.plan)

    def __str__(self) -> str:
        died = "; ".join(self.killed) or "(not killed)"
        what = f"{self.backend} {'+'.join(self.plan) or '-'}{' (its jobs fail)' if self.code else ''}"
        return f"{what}: {died}: {self.state}, jobs {self.jobs}, {self.broken}"


class Stage(Protocol):
    """An Airflow in which lives are lived."""

    def live(self, place: str, run: str, conf: Mapping[str, str]) -> Life:
        """Begin a run of a place's Dag, with these values for its templates."""


class Life(Protocol):
    """
    A task instance, from its first try to its end.

    :ivar waits: whether the next process begins only when it has been told of a death.
    """

    waits: bool

    def live(self, deadline: float, *, at_death: Callable[[], None]) -> str:
        """
        Run the task to its end, and return its state: ``success`` or ``failed``.

        :param deadline: seconds, for the whole.
        :param at_death: called when a process was killed.
        """

    @property
    def tries(self) -> int:
        """How many tries it has had."""

    def store(self) -> Mapping[str, Any]:
        """Return what is in the task state store."""

    def log(self) -> str:
        """Return the messages of all tries and triggers."""


class MortalServer:
    """
    The server of a cluster that dies in the place of a task's process, and is started again at once.

    :param kill: kills it.
    :param start: starts it, and returns when it can be used.
    """

    def __init__(self, kill: Callable[[], None], start: Callable[[], None]) -> None:
        self._kill, self._start = kill, start
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._starting: concurrent.futures.Future[None] | None = None

    def die(self) -> None:
        """Kill it, and begin to start it."""
        self._kill()
        self._starting = self._pool.submit(self._start)

    def wait(self) -> None:
        """Wait until it can be used."""
        if self._starting is not None:
            self._starting.result(DEADLINE)


@contextlib.contextmanager
def in_process(backend: Backend, interposer: Interposer, server: MortalServer | None = None) -> Iterator[Harness]:
    """
    Give a harness whose Airflow is this process's own. One in a process.

    :param server: what dies in the place of the task's process.
    """
    home = Path(os.environ["AIRFLOW_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    airflow = Airflow(backend.source(home), {backend.place: backend.connection}, interposer)
    airflow.prepare()
    try:
        yield Harness(backend, interposer, airflow, server)
    finally:
        airflow.close()


class Harness:
    """
    Lives of tasks on one backend.

    :ivar seed: from which it is drawn whose jobs fail.
    :ivar failing: the share of lives whose jobs do, where nothing else is said.
    """

    def __init__(
        self, backend: Backend, interposer: Interposer, stage: Stage, server: MortalServer | None = None
    ) -> None:
        self.backend = backend
        self.interposer = interposer
        self.seed, self.failing = "", 0.0
        self._stage = stage
        self._server = server
        self._numbers = 0
        self._judged: dict[str, Set[str]] = {}
        """The jobs that were there when a life was judged, by its run."""

    def slices(self, seconds: float, done: Sequence[bool] = ()) -> Iterator[Case]:
        """
        Kill in each slice of the life of ``spark-submit``, from its start until its task's process has ended.

        :param done: whether those slices were reached that an earlier run has seen to.
        """
        missed = [*done]
        while any(missed[-MISSES:]) or len(missed) < MISSES:
            case = self.live([self.after_start((len(missed) + 1) * seconds)])
            missed.append(case.reached)
            yield case

    def after_start(self, seconds: float) -> Kill:
        """Return a death so long after the start of ``spark-submit``."""
        return Kill(0, Way.ACTED, seconds, _START)

    def life_of_spark_submit(self) -> float:
        """Return the seconds from the start of ``spark-submit`` until its task defers."""
        self.live([])
        crossed, times = self.interposer.crossed[0], self.interposer.times[0]
        deferral = next(number for number, what in enumerate(crossed) if _defers(what))
        return times[deferral] - times[crossed.index(_START)]

    def live(self, plan: Sequence[Kill], *, code: int | None = None) -> Case:
        """
        Run a task to its end, and let it die as planned. A fault of the test itself breaks the case, too.

        :param code: with which its jobs end: 0 for a success; ``None`` to draw it.
        """
        case = Case(self.backend.name, [str(kill) for kill in plan])
        drawn = self.backend.ours and random.Random(f"{self.seed} {case.plan}").random() < self.failing
        case.code = int(drawn) if code is None else code
        began = time.monotonic()
        try:
            self._live(case, plan)
        except Exception as error:
            case.false_ends.append(f"the test itself has failed: {error!r}")
            case.log = traceback.format_exc()
        case.seconds, case.at = round(time.monotonic() - began, 1), time.time()
        return case

    def _live(self, case: Case, plan: Sequence[Kill]) -> None:
        self._numbers += 1
        run = f"{self.backend.place}-{self._numbers:04}-{os.getpid()}"
        before, launched = {job.id for job in self.backend.jobs(run)}, set(self.backend.launched())
        case.duplicates += [f"{job}, of the life before, has come late" for job in self.late(list(self._judged)[-1:])]
        self.interposer.plan(plan)
        conf = {"seconds": str(self.backend.seconds), "code": str(case.code)}
        life = self._stage.live(self.backend.place, run, conf)
        seen: dict[str, Job] = {}
        """Jobs by what the cluster said of them when it died."""

        def all_jobs() -> list[Job]:
            now = {job.id: job for job in self.backend.jobs(run)}
            forgotten = {job.id: _forgotten(job) for job in seen.values() if job.id not in now}
            return list({**forgotten, **now}.values())

        def die(server: MortalServer) -> None:
            seen.update((job.id, job) for job in self.backend.jobs(run))
            server.die()

        def counted(jobs: Sequence[Job]) -> list[Job]:
            """Leave out pods that spark-submit has submitted by half, and that have never run."""
            half = "gone" if self.backend.submits else ""
            return [job for job in jobs if job.id not in before and job.state != half]

        def at_death() -> None:
            if self._server:
                self._server.wait()
            elif self.backend.ours:
                dying, since = set(spark_submits(run)), time.monotonic()

                def dead() -> bool:
                    living = set(spark_submits(run))
                    return not (living if life.waits else living & dying)

                wait_until(dead, 5, "spark-submit to die with its task", interval=0.01)
                if dying:
                    case.lingered = max(case.lingered, round(time.monotonic() - since, 3))
            case.left.append(len(counted(all_jobs())))

        if self._server:
            self.interposer.instead = partial(die, self._server)
        try:
            deadline = DEADLINE * (RETRIES + 1 if case.code else 1)
            case.state = life.live(deadline, at_death=at_death)
        except (Stuck, TimeoutError) as error:
            case.state = "stuck"
            case.false_ends.append(str(error))
        case.killed = self.interposer.killed
        case.crossed = [len(each) for each in self.interposer.crossed]
        case.tries = life.tries
        judged = all_jobs()
        self._judged[run] = {job.id for job in judged}
        self._judge(case, counted(judged), life.store())
        unlisted = set(self.backend.launched()) - launched - self._judged[run]
        case.duplicates += [f"{job} was launched, and is not listed" for job in sorted(unlisted)]
        if case.broken:
            case.log = life.log()
        # What upstream's operator leaves behind is not to be counted with the next life.
        wait_until(lambda: not spark_submits(run), 5 if self.backend.ours else 60, "the last spark-submit to end")
        if not self.backend.ours:
            self._judged[run] = {job.id for job in self.backend.jobs(run)}

    def late(self, runs: Sequence[str] | None = None) -> Set[str]:
        """
        Return the jobs that have come since their lives were over.

        :param runs: those asked about; else all that there were.
        """
        # Where the cluster cannot tell runs apart, what is new is so for the last of them.
        before: Set[str] = set().union(*self._judged.values())
        asked = self._judged if runs is None else runs
        return {job.id for run in asked for job in self.backend.jobs(run)} - before

    def _judge(self, case: Case, jobs: Sequence[Job], store: Mapping[str, Any]) -> None:
        case.jobs = [f"{job.id} {job.state}" for job in jobs]
        killed = self._killed_by_the_cluster(jobs)
        case.limits += [f"the cluster has killed {job}" for job in sorted(killed)]
        case.duplicates += self._too_many(case, jobs, killed)
        on_last_try = case.state == "failed" and case.tries > RETRIES and case.killed and not case.crossed[-1]
        over = jobs[:-1] if on_last_try else jobs
        case.false_ends += [f"{job.id} is {job.state}, and the task over" for job in over if job.state == "running"]
        if on_last_try:  # what became of its job was not written down any more
            case.limits.append("killed on its last try")
            return
        if not jobs:
            case.losses.append("there is no job")
        else:
            self._judge_end(case, jobs, store)

    def _judge_end(self, case: Case, jobs: Sequence[Job], store: Mapping[str, Any]) -> None:
        """Compare how the task ended, and what it wrote down, with how its last job ended, and had to end."""
        last = jobs[-1]
        record = store.get("durable_spark") or {}
        verdict, named = (record.get("verdict") or {}).get("state"), (record.get("job") or [None])[0]
        said = f"the record says {verdict} of {named}, upstream's key {store.get('spark_job_id')}"
        if last.state == _FORGOTTEN and case.state == "failed":
            case.limits.append("the cluster has forgotten the job")
            if (verdict, named) not in ((None, last.id), ("absent", last.id)):  # it is lost, nothing else
                case.false_ends.append(said)
            return
        ended, right = {"success": "succeeded", "failed": "failed"}.get(case.state), _RIGHT[case.code]
        if last.state != ended and not (last.state in ("gone", "deleted") and not self.backend.ours):  # which deletes
            case.false_ends.append(f"the task is {case.state}, its job {last.state}")
        if ended != right:
            case.losses.append(f"the task is {case.state}, its job was to be {right}")
        if case.code and len(jobs) == 1:
            case.losses.append("no retry has submitted anew what failed")
        if self.backend.ours and (verdict, named, store.get("spark_job_id")) != (last.state, last.id, last.id):
            case.false_ends.append(said)

    def _killed_by_the_cluster(self, jobs: Sequence[Job]) -> Set[str]:
        """
        Return the jobs that a server has killed after its restart, with no request for it through the proxies.

        A standalone master does so with a driver whose worker registers before it answers what it runs
        (``WorkerLatestState`` in Spark's ``Master``): it does not know the driver as that worker's yet.
        """
        asked = any(_KILL.search(what) for life in self.interposer.crossed for what in life)
        if self._server is None or asked:
            return set()
        return {job.id for job in jobs if job.state == "killed"}

    def _too_many(self, case: Case, jobs: Sequence[Job], killed: Set[str]) -> Iterator[str]:
        """
        Say which jobs are one too many, by nothing but the cluster's record.

        A retry submits anew only what has failed, or was killed by the cluster: when it is dead, under another token,
        and once at most.
        """
        allowed = case.tries if case.code else 1 + len(killed)
        if len(jobs) > allowed or any(left > allowed for left in case.left):
            yield f"{len(jobs)} jobs where {allowed} may be, after the deaths {case.left}"
        if not self.backend.ours:
            return
        for token, number in collections.Counter(job.token for job in jobs).items():
            if not token or number > 1:
                yield f"{number} jobs of {f'submission {token}' if token else 'a submission that the cluster hides'}"
        for earlier, later in itertools.pairwise(jobs):
            if earlier.state != "failed" and earlier.id not in killed:
                yield f"{later.id} was submitted after {earlier.id}, which is {earlier.state}"
            elif earlier.ended and later.began + _CLOCK < earlier.ended:
                yield f"{later.id} began before {earlier.id} had ended"


def _forgotten(job: Job) -> Job:
    """Return a job that the cluster does not list any more, as it was; nobody knows what became of one that ran."""
    return dataclasses.replace(job, state=_FORGOTTEN) if job.state == "running" else job


def _defers(what: str) -> bool:
    return what.startswith("Airflow: DeferTask")


def singles(
    harnesses: Sequence[Harness], *, seed: str | None = None, done: Mapping[str, bool] | None = None
) -> Iterator[Case]:
    """
    Kill once at each boundary, in each way, until a few lives in a row have not come as far.

    A poll counts once, until something else follows it: what it finds differs, but no more than that. There are as many
    lives at a time as there are harnesses.

    :param seed: from which one way is drawn for each boundary; else it is all of them.
    :param done: whether those plans were reached that an earlier run has seen to.
    """
    done = done or {}
    reached: dict[int, list[bool]] = collections.defaultdict(list)
    plans = (Kill(number, way) for number in itertools.count(1) for way in ways_to_die(seed, number))
    idle = list(harnesses)
    lives: dict[concurrent.futures.Future[Case], tuple[Harness, Kill]] = {}
    for harness in harnesses:
        harness.interposer.repeats = False
    with concurrent.futures.ThreadPoolExecutor(len(harnesses)) as pool:
        begin: Any = pool.submit if len(harnesses) > 1 else _here
        while True:
            while idle and not are_over(reached, len(ways_to_die(seed, 1))):
                plan = next(plans)
                if str(plan) in done:
                    reached[plan.exchange].append(done[str(plan)])
                    continue
                harness = idle.pop()
                lives[begin(harness.live, [plan])] = harness, plan
            if not lives:
                return
            for life in concurrent.futures.wait(lives, return_when=concurrent.futures.FIRST_COMPLETED)[0]:
                harness, plan = lives.pop(life)
                idle.append(harness)
                reached[plan.exchange].append(life.result().reached)
                yield life.result()


def _here(live: Callable[[Sequence[Kill]], Case], plan: Sequence[Kill]) -> concurrent.futures.Future[Case]:
    """Live in this thread, which may be the main one: Airflow's supervisor takes its signals."""
    lived: concurrent.futures.Future[Case] = concurrent.futures.Future()
    lived.set_result(live(plan))
    return lived


def ways_to_die(seed: str | None, number: int) -> Sequence[Way]:
    """Return those for a boundary: all, or the one that is drawn."""
    return list(Way) if seed is None else [random.Random(f"{seed} {number}").choice(list(Way))]


def are_over(reached: Mapping[int, Sequence[bool]], ways: int) -> bool:
    """
    Whether all boundaries have been gone through: each in all its ways, and then a few that were not reached in any.

    :param reached: for each number whether its lives came as far.
    :param ways: how many lives each number has.
    """

    def missed(number: int) -> bool:
        return len(reached.get(number, ())) == ways and not any(reached[number])

    beyond = math.ceil(MISSES / ways)
    last = next((number for number in sorted(reached) if all(missed(number + more) for more in range(beyond))), None)
    return last is not None and all(len(reached.get(number, ())) == ways for number in range(1, last))


def pairs(seed: str, singles: Sequence[Case]) -> Iterator[list[Kill]]:
    """
    Return plans of two deaths without end, the same ones for the same seed.

    :param singles: lives with one death. The second is drawn from what one of them went through after its own.
    """
    rng = random.Random(seed)
    while True:
        single = rng.choice(singles)
        first, second = rng.randint(1, single.crossed[0]), rng.randint(1, max(1, single.crossed[-1]))
        yield [Kill(number, rng.choice(list(Way))) for number in (first, second)]


def usual(name: str, *, whole: bool = False) -> dict[str, str]:
    """Return what the environment of the processes of an Airflow with a :class:`Harness` has."""
    own = {"AIRFLOW__DURABLE_SPARK__DEPLOYMENT": f"crash-{name}"}
    if not whole:  # there is no scheduler that a fast event would outrun
        own["AIRFLOW__DURABLE_SPARK__EARLIEST_EVENT"] = "0.5"
    return own


# Backends

BACKENDS = (
    "kubernetes",
    "standalone",
    "submit_kubernetes",
    "submit_standalone",
    "submit_yarn",
    "upstream_kubernetes",
    "upstream_standalone",
    "upstream_yarn",
)


@contextlib.contextmanager
def backend(name: str, clusters: Clusters, interposer: Interposer, *, number: int = 0) -> Iterator[Backend]:
    """
    Return a backend, with proxies before its cluster that number what goes through them.

    :param number: of the place, if there are several of a name.
    """

    def gate(request: Request) -> Exchange:
        what = f"cluster: {request.method} {_generic(request.path)}"
        return interposer.exchange(what, stream="watch=1" in request.path or "watch=true" in request.path)

    way, _, cluster = name.rpartition("_")
    with contextlib.ExitStack() as stack:
        if cluster == "kubernetes":
            connection = _through_proxies_kubernetes(clusters.kubernetes, gate, stack)
        elif cluster == "standalone":
            connection = _through_proxies_standalone(clusters.standalone, gate, stack)
        else:
            manager = stack.enter_context(Proxy(clusters.yarn.web(), gate=gate))
            connection = {**clusters.yarn.connection()}
            connection["extra"] = {**connection["extra"], "yarn_resourcemanager_webapp_address": manager.url}
        if way == "":
            yield _native(cluster, clusters, connection, number)
        else:
            yield _submitted(way, cluster, clusters, connection, number)


def _generic(path: str) -> str:
    """Return a path without what differs from one life to the next."""
    path = re.sub(r"[0-9a-f]{32}|driver-[0-9-]+|application_[0-9_]+", "…", path)
    return re.sub(r"(resourceVersion|timeoutSeconds|finishedTimeBegin)=[0-9]+", r"\1=…", path)[:160]


def _through_proxies_kubernetes(
    cluster: KubernetesCluster, gate: Callable[[Request], Exchange], stack: contextlib.ExitStack
) -> dict[str, Any]:
    tls = ssl.create_default_context(cafile=str(cluster.ca))
    proxy = stack.enter_context(Proxy(cluster.url, tls=tls, gate=gate))
    return {**cluster.connection(), "host": "k8s://http://127.0.0.1", "port": proxy.port}


def _through_proxies_standalone(
    cluster: StandaloneCluster, gate: Callable[[Request], Exchange], stack: contextlib.ExitStack
) -> dict[str, Any]:
    master, (worker,) = cluster.master, cluster.workers
    page = stack.enter_context(Proxy(worker.ui, gate=gate))
    renamed = {worker.ui.encode(): page.url.encode()}
    assert len(worker.ui) == len(page.url)
    rest = stack.enter_context(Proxy(f"http://127.0.0.1:{master.rest_port}", gate=gate))
    pages = stack.enter_context(Proxy(master.ui, gate=gate, renamed=renamed))
    return cluster.connection(rest_port=str(rest.port), ui_port=str(pages.port))


def _place(number: int) -> str:
    return f"crash_{number}"


def _native(cluster: str, clusters: Clusters, connection: Mapping[str, Any], number: int) -> Backend:
    place, memory = _place(number), f"{130 + 10 * number}m"  # by which a driver's place can be told
    arguments: dict[str, Any] = {"conn_id": place, "poll_interval": 2}
    if cluster == "kubernetes":
        container = {
            "name": "spark-kubernetes-driver",
            "command": ["sh", "-c", f"sleep {_SECONDS}; exit {_CODE}"],
        }
        arguments |= {
            "application": "local:///nothing.py",
            "conf": {
                "spark.kubernetes.container.image": "localhost/spark:test",
                "spark.kubernetes.container.image.pullPolicy": "Never",
                "spark.kubernetes.driver.request.cores": "0.01",
            },
            "pod": {
                "metadata": {"labels": {"mark": "{{ run_id }}"}},
                "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]},
            },
        }
        return Backend(cluster, _NATIVE, arguments, connection, lambda run: clusters.jobs("kubernetes", run), place)
    submitted = clusters.arguments()["standalone"]
    arguments |= {
        **submitted,
        "application_args": [*submitted["application_args"], _SECONDS, _CODE],
        "driver_memory": memory,
    }
    drivers = partial(clusters.jobs, "standalone", memory)
    return Backend(cluster, _NATIVE, arguments, connection, lambda _: drivers(), place, seconds=0.5)


def _submitted(way: str, cluster: str, clusters: Clusters, connection: dict[str, Any], number: int) -> Backend:
    arguments = clusters.arguments()[cluster]
    arguments["application_args"] = [*arguments.get("application_args", ()), _SECONDS, _CODE]
    place, memory = _place(number), f"{(131 if way == 'submit' else 132) + 10 * number}m"
    arguments = marked(cluster, memory if cluster == "standalone" else "{{ run_id }}", arguments)
    arguments |= {"conn_id": place, "status_poll_interval": 2 if way == "submit" else 1}
    connection = {name: value for name, value in connection.items() if name != "password"}
    connection |= {"conn_type": "spark", "extra": {**connection["extra"], "deploy-mode": "cluster"}}
    connection["extra"].pop("ca", None)
    return Backend(
        f"{way}_{cluster}",
        _OURS if way == "submit" else _UPSTREAM,
        arguments,
        connection,
        lambda run: clusters.jobs(cluster, memory if cluster == "standalone" else run),
        place,
        seconds=0.5,
        ours=way == "submit",
    )
