"""
Real YARN clusters on loopback: ResourceManagers, one NodeManager, and a timeline server if asked for.

:class:`YarnCluster` writes the configuration, starts each of Hadoop's own servers as a process of its own,
and can kill, suspend and start them again. A manager keeps what it knows in files and a container outlives
its NodeManager, so that an application survives the death of both. Two managers share these files and one
of them is made active by the administrator's command, so there is no ZooKeeper: and nothing that fences the
other one.

Its :meth:`~YarnCluster.apps` and :meth:`~YarnCluster.requests` are the witness of tests: what the active manager
lists, and what it was asked, read without any of the package's code.

The trap: a manager answers HTTP before it has read its files, and calls applications unknown that it is
about to know. It has read them when it says that its ``haState`` is ``ACTIVE``.

``python -m dev.yarn`` runs one until it is interrupted and prints how to reach it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

from dev.hadoop import ensure_hadoop
from dev.processes import Server, Startable, free_port, wait_until
from dev.reaper import Reaper
from dev.spark import SMALL_JVM, Keystore, Spark, ensure_spark, java_home

if TYPE_CHECKING:
    from dev.kerberos import KeyDistributionCenter

__all__ = ["Answer", "App", "Manager", "Request", "RequestFailed", "YarnCluster", "send"]

_START = 60.0  # seconds that a JVM may take to start on a busy machine
_SERVER = "org.apache.hadoop.yarn.server"
_LOG4J = """
log4j.rootLogger=INFO,A
log4j.appender.A=org.apache.log4j.ConsoleAppender
log4j.appender.A.Target=System.err
log4j.appender.A.layout=org.apache.log4j.PatternLayout
log4j.appender.A.layout.ConversionPattern=%d{ISO8601} %p %c{2}: %m%n
"""
_LOG4J_OF_SERVERS = f"""{_LOG4J}
log4j.logger.http.requests=INFO,R
log4j.additivity.http.requests=false
log4j.appender.R=org.apache.log4j.FileAppender
log4j.appender.R.File=${{requests}}
log4j.appender.R.layout=org.apache.log4j.PatternLayout
log4j.appender.R.layout.ConversionPattern=%m%n
"""
_REQUEST = re.compile(r'"([A-Z]+) (\S+) [^"]*" (\d+) \S+ "[^"]*" "([^"]*)"$', re.MULTILINE)
_CAPACITY_SCHEDULER = {
    "yarn.scheduler.capacity.root.queues": "default",
    "yarn.scheduler.capacity.root.default.capacity": "100",
    "yarn.scheduler.capacity.root.default.state": "RUNNING",
    "yarn.scheduler.capacity.maximum-am-resource-percent": "1.0",
    "yarn.scheduler.capacity.resource-calculator": (
        "org.apache.hadoop.yarn.util.resource.DefaultResourceCalculator"  # which counts no cores
    ),
}


class RequestFailed(OSError):
    """A manager answered with an error."""

    def __init__(self, request: str, answer: Answer) -> None:
        super().__init__(f"{request}: {answer.status} {answer.text[:500]}")
        self.answer = answer


class Answer(NamedTuple):
    """What a server answered, an error or not; redirects are not followed."""

    status: int
    headers: Message[str, str]
    text: str

    def json(self) -> Any:
        """Return the body, parsed. Raises :class:`OSError` when it is no JSON."""
        try:
            return json.loads(self.text)
        except ValueError as error:
            raise OSError(f"{self.status} {self.text[:200]!r} is no JSON") from error


class Request(NamedTuple):
    """A request that a server has answered."""

    method: str
    path: str
    """With the query."""
    status: int
    agent: str
    """That of this module is ``Python-urllib``."""


@dataclasses.dataclass(frozen=True)
class App:
    """An application as the active manager lists it."""

    id: str
    name: str
    user: str
    state: str
    final_status: str
    tags: tuple[str, ...]
    diagnostics: str
    started: float
    """Seconds since the epoch."""
    finished: float
    """Likewise; 0 while it runs."""


@dataclasses.dataclass(frozen=True)
class Manager:
    """One ResourceManager."""

    server: Server
    id: str
    """``rm1``, ``rm2``."""
    web: str
    """URL of its web server, without a slash at the end."""


class YarnCluster(Startable):
    """
    ResourceManagers and one NodeManager on loopback, each a process of its own. A context manager.

    :param managers: how many; of two the first is made active.
    :param node: whether there is a NodeManager; without one applications stay ACCEPTED.
    :param memory: megabytes of the node, for it to give away.
    :param yarn_site: further properties of ``yarn-site.xml``.
    :param core_site: further properties of ``core-site.xml``.
    :param capacity_scheduler: further properties of ``capacity-scheduler.xml``.
    :param timeline: whether there is a timeline server, which remembers applications that the manager has forgotten.
    :param kerberos: the web servers demand its tickets (SPNEGO); RPC does not. :attr:`web` then names localhost.
    :param keystore: the web servers speak TLS.
    :param directory: for configuration, logs, state and containers; one that is removed at the end when ``None``.
    :param spark: which one to submit; :func:`ensure_spark`'s when ``None``.
    """

    user = "airflow"
    """Who asks, unless told otherwise."""

    def __init__(
        self,
        *,
        managers: int = 1,
        node: bool = True,
        memory: int = 16384,
        yarn_site: Mapping[str, str] | None = None,
        core_site: Mapping[str, str] | None = None,
        capacity_scheduler: Mapping[str, str] | None = None,
        timeline: bool = False,
        kerberos: KeyDistributionCenter | None = None,
        keystore: Keystore | None = None,
        directory: Path | None = None,
        spark: Spark | None = None,
    ) -> None:
        self.hadoop = ensure_hadoop()
        self.spark = spark or ensure_spark()
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="durable-spark-")
        self.directory = directory or Path(self._temporary.name if self._temporary else "")
        self.conf_dir = self.directory / "conf"
        """A ``HADOOP_CONF_DIR``."""
        self.kerberos = kerberos
        self._scheme = "https" if keystore else "http"
        self._host = "localhost" if kerberos else "127.0.0.1"
        self._extra = {"yarn-site": dict(yarn_site or {}), "core-site": dict(core_site or {})}
        self._capacity_scheduler = _CAPACITY_SCHEDULER | dict(capacity_scheduler or {})
        self._keystore = keystore
        self._cookies: dict[str, str] = {}
        names = [f"rm{number}" for number in range(1, managers + 1)]
        self._webs = {name: f"{self._scheme}://{self._host}:{free_port()}" for name in [*names, "node", "timeline"]}
        self._addresses = {name: _manager_addresses() for name in names}
        self._site = self._yarn_site(memory, timeline)
        self._configure(self.conf_dir)
        self.managers = [self._manager(name) for name in names]
        self.node = self._server("node", f"{_SERVER}.nodemanager.NodeManager", self.conf_dir)
        self.timeline = (
            self._server("timeline", f"{_SERVER}.applicationhistoryservice.ApplicationHistoryServer", self.conf_dir)
            if timeline
            else None
        )
        self._has_node = node
        self._reaper = Reaper(self._containers)

    def ports(self, number: int = 0) -> list[int]:
        """Return the ports by which clients reach a manager: of its RPC, and of its web server."""
        addresses = (list(self._addresses.values())[number]["yarn.resourcemanager.address"], self.web(number))
        return [int(address.rpartition(":")[2]) for address in addresses]

    @property
    def timeline_web(self) -> str:
        """URL of the timeline server, without a slash at the end."""
        return self._webs["timeline"]

    @property
    def node_web(self) -> str:
        """URL of the node's web server, without a slash at the end."""
        return self._webs["node"]

    def web(self, number: int = 0) -> str:
        """Return the URL of a manager's web server, without a slash at the end."""
        return self.managers[number].web

    def connection(self, **extra: Any) -> dict[str, Any]:
        """
        Return an Airflow connection of type ``durable_spark``, as its JSON form takes it.

        :param extra: further extras, with underscores for hyphens.
        """
        return {
            "conn_type": "durable_spark",
            "host": "yarn",
            "extra": {
                "yarn_resourcemanager_webapp_address": ",".join(manager.web for manager in self.managers),
                "deploy-mode": "cluster",
                **{name.replace("_", "-"): value for name, value in extra.items()},
            },
        }

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which ``spark-submit`` finds this cluster."""
        no_conf = self.directory / "no-spark-conf"
        no_conf.mkdir(exist_ok=True)
        return self.spark.environment() | {
            "HADOOP_CONF_DIR": str(self.conf_dir),
            "HADOOP_USER_NAME": self.user,
            "PYSPARK_ARCHIVES_PATH": ",".join(f"local:{path}" for path in self.python_archives()),
            "SPARK_CONF_DIR": str(no_conf),
            "SPARK_LAUNCHER_OPTS": SMALL_JVM,
            "SPARK_SUBMIT_OPTS": SMALL_JVM,
        }

    def python_archives(self) -> list[Path]:
        """Return the archives that a PySpark driver and its executors have on their ``PYTHONPATH``."""
        library = self.spark.home / "python" / "lib"
        return [library / "pyspark.zip", *library.glob("py4j-*-src.zip")]

    def spark_conf(self) -> dict[str, str]:
        """Return Spark properties with which small applications start quickly here, in cluster mode."""
        environment = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": str(self.spark.python)}
        return {
            "spark.yarn.jars": f"local:{self.spark.home}/jars/*",  # nothing is uploaded
            "spark.yarn.stagingDir": (self.directory / "staging").as_uri(),
            "spark.yarn.maxAppAttempts": "1",
            "spark.executor.instances": "1",
            "spark.driver.memory": "512m",
            "spark.driver.memoryOverhead": "256m",
            "spark.driver.extraJavaOptions": SMALL_JVM,
            "spark.executor.memory": "512m",
            "spark.executor.memoryOverhead": "256m",
            "spark.executor.extraJavaOptions": SMALL_JVM,
            "spark.ui.enabled": "false",
            **{f"spark.yarn.appMasterEnv.{name}": value for name, value in environment.items()},
            **{f"spark.executorEnv.{name}": value for name, value in environment.items()},
        }

    def start(self) -> None:
        """Start everything; return when a manager is active and the node runs."""
        self._reaper.start()
        for server in self._servers():
            server.start()
        several = len(self.managers) > 1
        for number in range(len(self.managers)):
            self.wait_for_state("STANDBY" if several else "ACTIVE", number)
        if several:
            self.transition_to_active(0)
            self.wait_for_state("ACTIVE", 0)
        if self._has_node:
            self.wait_for_node()
        if self.timeline:
            wait_until(
                lambda: self.fetch(f"{self.timeline_web}/ws/v1/applicationhistory/about").status == 200,
                _START,
                "the timeline server",
                servers=[self.timeline],
            )

    def stop(self) -> None:
        """Kill everything, the containers with it."""
        self.node.kill()  # first: it would start more
        self._reaper.stop()
        for server in self._servers():
            server.kill()
        if self._temporary:
            self._temporary.cleanup()

    def kill_manager(self, number: int = 0) -> None:
        """Send SIGKILL to a manager."""
        self.managers[number].server.kill()

    def start_manager(self, number: int = 0) -> None:
        """Start a manager that has been killed. It answers before it knows anything."""
        self.managers[number].server.start()

    def restart_manager(self, number: int = 0) -> None:
        """Kill a manager and start it again; return when it is active, or of two the standby."""
        self.kill_manager(number)
        self.start_manager(number)
        self.wait_for_state("ACTIVE" if len(self.managers) == 1 else "STANDBY", number)

    def kill_node(self) -> None:
        """Send SIGKILL to the NodeManager alone: what notes a container's exit code is in its session."""
        os.kill(self.node.pid, signal.SIGKILL)
        wait_until(lambda: not self.node.alive, 10, "the end of the node")

    def restart_node(self) -> None:
        """Kill the NodeManager and start it again, while its containers go on; return when the manager knows it."""
        self.kill_node()
        self.node.start()
        self.wait_for_node()

    def transition_to_active(self, number: int = 0) -> None:
        """Make a standby the active manager, whatever the other one is; nothing fences that one."""
        self._administrate("-transitionToActive", "--forceactive", self.managers[number].id)

    def transition_to_standby(self, number: int = 0) -> None:
        """Make the active manager a standby."""
        self._administrate("-transitionToStandby", self.managers[number].id)

    def fail_over(self) -> None:
        """Make the other one of two managers active; return when it is."""
        former = self.managers.index(self.active())
        self.transition_to_standby(former)
        self.transition_to_active(1 - former)
        self.wait_for_state("ACTIVE", 1 - former)

    def wait_for_state(self, state: str, number: int = 0, deadline: float = _START) -> None:
        """Return when a manager says that its ``haState`` is this one."""
        manager = self.managers[number]
        wait_until(
            lambda: self.state(number) == state, deadline, f"{manager.id} to be {state}", servers=[manager.server]
        )

    def wait_until_active(self, deadline: float = _START) -> Manager:
        """Return the active manager, when there is one."""
        living = [manager.server for manager in self.managers if manager.server.alive]
        return wait_until(self.active, deadline, "an active manager", servers=living)

    def wait_for_node(self, deadline: float = _START) -> None:
        """Return when the active manager says that the node runs."""

        def runs() -> bool:
            return bool((self.get("/ws/v1/cluster/nodes?states=RUNNING")["nodes"] or {}).get("node"))

        wait_until(runs, deadline, "the node", servers=[self.node])

    def state(self, number: int = 0) -> str:
        """Return a manager's ``haState``. Raises :class:`OSError` when it does not answer."""
        answer = self.request("GET", "/ws/v1/cluster/info", number=number)
        state: str = answer.json()["clusterInfo"]["haState"]
        return state

    def active(self) -> Manager:
        """Return the active manager. Raises :class:`OSError` when there is none."""
        states: list[object] = []
        for number, manager in enumerate(self.managers):
            try:
                state = self.state(number)
            except OSError as error:
                states.append(error)
                continue
            if state == "ACTIVE":
                return manager
            states.append(state)
        raise OSError(f"no manager is active: {states}")

    def apps(self) -> list[App]:
        """Return what the active manager lists, the oldest first."""
        listed = (self.get("/ws/v1/cluster/apps")["apps"] or {}).get("app", [])
        return sorted((_app(app) for app in listed), key=lambda app: (app.started, app.id))

    def app(self, app_id: str) -> App:
        """Return one application; :class:`RequestFailed` with status 404 when it is unknown."""
        return _app(self.get(f"/ws/v1/cluster/apps/{app_id}")["app"])

    def attempts(self, app_id: str) -> list[dict[str, Any]]:
        """Return an application's attempts."""
        answer = self.get(f"/ws/v1/cluster/apps/{app_id}/appattempts")
        attempts: list[dict[str, Any]] = (answer["appAttempts"] or {}).get("appAttempt", [])
        return attempts

    def wait_for_app(self, app_id: str, *states: str, deadline: float = 60.0) -> App:
        """Return an application when it is in one of these states."""

        def reached() -> App | None:
            app = self.app(app_id)
            return app if app.state in states else None

        return wait_until(reached, deadline, f"{app_id} to become {states}", servers=[self.node], interval=0.1)

    def kill_app(self, app_id: str, user: str | None = None) -> Answer:
        """Ask the active manager to kill an application."""
        path = f"/ws/v1/cluster/apps/{app_id}/state"
        return self.request("PUT", path, {"state": "KILLED"}, number=self._active_number(), user=user)

    def launched(self) -> list[str]:
        """Return the IDs of all applications of which the node has ever launched a container, by their directories."""
        return sorted(path.name for path in self._logs.glob("application_*"))

    def log(self, app_id: str, name: str = "stdout") -> str:
        """Return what an application's containers have written, one after the other, from the node's disk."""
        files = sorted((self._logs / app_id).glob(f"container_*/{name}"))
        return "".join(file.read_text(errors="replace") for file in files)

    def requests(self, number: int = 0) -> list[Request]:
        """Return what a manager has been asked over HTTP, in the order of its answers, by its own log."""
        try:
            lines = self._requests(self.managers[number].id).read_text()
        except FileNotFoundError:
            return []
        return [Request(method, path, int(status), agent) for method, path, status, agent in _REQUEST.findall(lines)]

    def get(self, path: str) -> dict[str, Any]:
        """Return what the active manager answers, parsed. Raises :class:`RequestFailed` when it refuses."""
        answer = self.request("GET", path, number=self._active_number())
        if answer.status != 200:
            raise RequestFailed(f"GET {path}", answer)
        body: dict[str, Any] = answer.json()
        return body

    def request(self, method: str, path: str, body: Any = None, *, number: int = 0, user: str | None = None) -> Answer:
        """
        Send one request to a manager and return what it answers, whatever that is.

        :param path: with the query: ``/ws/v1/cluster/apps?states=RUNNING``.
        :param number: which manager.
        :param user: who asks; :attr:`user` when ``None``. With Kerberos, a principal that has a keytab.
        """
        return self.fetch(self.web(number) + path, method=method, body=body, user=user)

    def fetch(self, url: str, *, method: str = "GET", body: Any = None, user: str | None = None) -> Answer:
        """Send one request to any of the web servers, as :meth:`request` does."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.kerberos:
            headers["Cookie"] = self._cookie(url, user or self.user)
        else:
            url += ("&" if "?" in url else "?") + urllib.parse.urlencode({"user.name": user or self.user})
        data = None if body is None else json.dumps(body).encode()
        return send(urllib.request.Request(url, data, headers, method=method))

    def _active_number(self) -> int:
        return 0 if len(self.managers) == 1 else self.managers.index(self.active())

    def _cookie(self, url: str, user: str) -> str:
        """Return the cookie that a server gave for a ticket; all of them accept it."""
        assert self.kerberos is not None
        if user not in self._cookies:
            self._cookies[user] = self.kerberos.cookie(url, user)
        return self._cookies[user]

    def _servers(self) -> Iterator[Server]:
        yield from (manager.server for manager in self.managers)
        if self._has_node:
            yield self.node
        if self.timeline:
            yield self.timeline

    @property
    def _containers(self) -> Path:
        """What the node's containers mention, and nothing else does."""
        return self.directory / "containers"

    @property
    def _logs(self) -> Path:
        return self.directory / "container-logs"

    def _requests(self, name: str) -> Path:
        return self.directory / f"{name}-requests.log"

    def _manager(self, name: str) -> Manager:
        conf = self.directory / name
        self._configure(conf, {"yarn.resourcemanager.ha.id": name} if len(self._addresses) > 1 else {})
        server = self._server(name, f"{_SERVER}.resourcemanager.ResourceManager", conf)
        return Manager(server, name, self._webs[name])

    def _server(self, name: str, main_class: str, conf: Path) -> Server:
        temporary = self.directory / f"{name}-tmp"  # for libraries and web pages that are unpacked
        temporary.mkdir(exist_ok=True)
        logging = self.directory / "log4j.properties"
        logging.write_text(_LOG4J_OF_SERVERS)
        options = {
            "hadoop.log.dir": self.directory,
            "java.io.tmpdir": temporary,
            "java.net.preferIPv4Stack": "true",
            "log4j.configuration": logging.as_uri(),
            "requests": self._requests(name),
            **({"java.security.krb5.conf": self.kerberos.krb5_conf} if self.kerberos else {}),
        }
        command = [*self._java(conf, "384m", options), main_class]
        return Server(
            name, command, log=self.directory / f"{name}.log", env=self._server_environment(), cwd=self.directory
        )

    def _java(self, conf: Path, memory: str, options: Mapping[str, object] | None = None) -> list[str]:
        properties = [f"-D{name}={value}" for name, value in (options or {}).items()]
        classpath = f"{conf}:{self.hadoop.classpath}"
        return [f"{java_home()}/bin/java", f"-Xmx{memory}", *SMALL_JVM.split(), *properties, "-cp", classpath]

    def _server_environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TZ") if name in os.environ}
        return kept | {"JAVA_HOME": str(java_home())}

    def _administrate(self, *arguments: str) -> None:
        command = [*self._java(self.conf_dir, "128m"), "org.apache.hadoop.yarn.client.cli.RMAdminCLI", *arguments]
        ended = subprocess.run(
            command,
            env=self._server_environment(),
            input="Y\n",  # to "Are you sure", of --forceactive
            capture_output=True,
            text=True,
            timeout=_START,
        )
        if ended.returncode:
            raise RuntimeError(f"rmadmin {arguments} failed:\n{ended.stdout}{ended.stderr}")

    def _configure(self, directory: Path, yarn_site: Mapping[str, str] | None = None) -> None:
        """Write a configuration directory."""
        directory.mkdir(parents=True, exist_ok=True)
        core_site = {"fs.defaultFS": "file:///", "hadoop.tmp.dir": str(self.directory / "tmp")}
        if self.kerberos:
            core_site |= self.kerberos.web_properties(self.directory)
        files: dict[str, Mapping[str, str]] = {
            "core-site": core_site | self._extra["core-site"],
            "yarn-site": self._site | dict(yarn_site or {}) | self._extra["yarn-site"],
            "capacity-scheduler": self._capacity_scheduler,
        }
        if self._keystore:
            files["ssl-server"] = _tls(self._keystore)
        for name, properties in files.items():
            (directory / f"{name}.xml").write_text(_xml(properties))
        (directory / "log4j.properties").write_text(_LOG4J)

    def _yarn_site(self, memory: int, timeline: bool) -> dict[str, str]:
        parts = [self._managers_site(), self._node_site(memory), self._state_site()]
        if timeline:
            parts.append(self._timeline_site())
        if self._keystore:
            parts.append({"yarn.http.policy": "HTTPS_ONLY"})
        return {name: value for part in parts for name, value in part.items()}

    def _web_address(self, name: str) -> dict[str, str]:
        """Return where one server's pages are: its name for each scheme is another."""
        kind = {"node": "nodemanager.webapp", "timeline": "timeline-service.webapp"}.get(name, "resourcemanager.webapp")
        suffix = f".{name}" if kind.startswith("resourcemanager") and len(self._addresses) > 1 else ""
        address = self._webs[name].rpartition("/")[2]
        return {f"yarn.{kind}.{'https.' if self._keystore else ''}address{suffix}": address}

    def _managers_site(self) -> dict[str, str]:
        several = len(self._addresses) > 1
        site = {
            "yarn.resourcemanager.bind-host": "127.0.0.1",
            "yarn.resourcemanager.webapp.ui-actions.enabled": "true",
            "yarn.resourcemanager.nodemanagers.heartbeat-interval-ms": "200",
            "yarn.resourcemanager.connect.max-wait.ms": "60000",
            "yarn.resourcemanager.connect.retry-interval.ms": "500",
            "yarn.am.liveness-monitor.expiry-interval-ms": "600000",  # a shell never shows that it lives
            "yarn.nm.liveness-monitor.expiry-interval-ms": "30000",
            "yarn.scheduler.minimum-allocation-mb": "128",
            "yarn.scheduler.maximum-allocation-mb": "4096",
        }
        if several:
            site |= {
                "yarn.resourcemanager.ha.enabled": "true",
                "yarn.resourcemanager.ha.automatic-failover.enabled": "false",
                "yarn.resourcemanager.ha.rm-ids": ",".join(self._addresses),
                "yarn.resourcemanager.cluster-id": "tests",
                "yarn.client.failover-sleep-base-ms": "100",
                "yarn.client.failover-sleep-max-ms": "500",
            }
        for name, addresses in self._addresses.items():
            suffix = f".{name}" if several else ""
            site |= {f"{address}{suffix}": value for address, value in addresses.items()}
            site |= self._web_address(name)
        return site

    def _state_site(self) -> dict[str, str]:
        return {
            "yarn.resourcemanager.recovery.enabled": "true",
            "yarn.resourcemanager.work-preserving-recovery.enabled": "true",
            "yarn.resourcemanager.work-preserving-recovery.scheduling-wait-ms": "1000",
            "yarn.resourcemanager.store.class": f"{_SERVER}.resourcemanager.recovery.FileSystemRMStateStore",
            "yarn.resourcemanager.fs.state-store.uri": (self.directory / "state").as_uri(),
            "yarn.nodemanager.recovery.enabled": "true",
            "yarn.nodemanager.recovery.supervised": "true",  # containers go on when it stops
            "yarn.nodemanager.recovery.dir": str(self.directory / "node-state"),
        }

    def _node_site(self, memory: int) -> dict[str, str]:
        disks = "yarn.nodemanager.disk-health-checker"
        return {
            "yarn.nodemanager.hostname": "127.0.0.1",
            "yarn.nodemanager.bind-host": "127.0.0.1",
            "yarn.nodemanager.address": f"127.0.0.1:{free_port()}",
            "yarn.nodemanager.localizer.address": f"127.0.0.1:{free_port()}",
            **self._web_address("node"),
            "yarn.nodemanager.resource.memory-mb": str(memory),
            "yarn.nodemanager.container-executor.exit-code-file.timeout-ms": "60000",  # a busy disk may take over 2 s
            "yarn.nodemanager.vmem-check-enabled": "false",
            "yarn.nodemanager.pmem-check-enabled": "false",
            "yarn.nodemanager.local-dirs": str(self._containers),
            "yarn.nodemanager.log-dirs": str(self._logs),
            f"{disks}.max-disk-utilization-per-disk-percentage": "100",
            f"{disks}.min-free-space-per-disk-mb": "0",
            "yarn.nodemanager.env-whitelist": "JAVA_HOME,PATH,LANG,TZ",
        }

    def _timeline_site(self) -> dict[str, str]:
        service = "yarn.timeline-service"
        return {
            "yarn.resourcemanager.system-metrics-publisher.enabled": "true",
            f"{service}.enabled": "true",
            f"{service}.version": "1.0",
            f"{service}.hostname": "127.0.0.1",
            f"{service}.bind-host": "127.0.0.1",
            f"{service}.address": f"127.0.0.1:{free_port()}",
            **self._web_address("timeline"),
            f"{service}.generic-application-history.enabled": "true",
            f"{service}.store-class": f"{_SERVER}.timeline.LeveldbTimelineStore",
            f"{service}.leveldb-timeline-store.path": str(self.directory / "timeline"),
            f"{service}.state-store-class": f"{_SERVER}.timeline.recovery.MemoryTimelineStateStore",
        }


def send(request: urllib.request.Request) -> Answer:
    """Send a request and return the answer, an error or not; TLS is not verified, redirects are not followed."""
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=unverified))
    try:
        with opener.open(request, timeout=10) as answer:
            return Answer(answer.status, answer.headers, answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read().decode(errors="replace"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _manager_addresses() -> dict[str, str]:
    kinds = ("scheduler.", "resource-tracker.", "", "admin.")
    return {f"yarn.resourcemanager.{kind}address": f"127.0.0.1:{free_port()}" for kind in kinds}


def _app(app: Mapping[str, Any]) -> App:
    return App(
        id=app["id"],
        name=app["name"],
        user=app["user"],
        state=app["state"],
        final_status=app["finalStatus"],
        tags=tuple(filter(None, app.get("applicationTags", "").split(","))),
        diagnostics=app["diagnostics"],
        started=app["startedTime"] / 1000,
        finished=app["finishedTime"] / 1000,
    )


def _tls(keystore: Keystore) -> dict[str, str]:
    return {
        "ssl.server.keystore.location": str(keystore.path),
        "ssl.server.keystore.type": "PKCS12",
        "ssl.server.keystore.password": keystore.password,
        "ssl.server.keystore.keypassword": keystore.password,
    }


def _xml(properties: Mapping[str, str]) -> str:
    lines = (
        f"  <property><name>{escape(name)}</name><value>{escape(value)}</value></property>\n"
        for name, value in properties.items()
    )
    return f"<configuration>\n{''.join(lines)}</configuration>\n"


def _main() -> None:
    with YarnCluster() as cluster:
        print(f"{cluster.web()}\nexport HADOOP_CONF_DIR={cluster.conf_dir}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    _main()
