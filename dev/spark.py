"""
Spark itself: its environment, and real standalone clusters on loopback.

The pyspark wheel holds all that a master and a worker need. It goes into an environment of its own,
apart from Airflow's (``pyspark`` and the ``pyspark-client`` that Airflow's Spark provider wants
overwrite each other), cached by version. Clusters are :class:`StandaloneCluster` and
:class:`HighlyAvailableCluster`, whose masters and workers can be killed, suspended and started again.

Their :meth:`~StandaloneCluster.drivers` and :meth:`~StandaloneCluster.launched` are the witness of tests: what the
master's own page and the workers' own disks say, read without any of the package's code.

The trap: a worker that finds no master tries again only after 5 to 15 s, so workers are started when
the master listens.

``python -m dev.spark`` makes the environment ready and prints its ``SPARK_HOME``.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.cache import cached, in_cache
from dev.processes import Server, Startable, ToolMissing, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


__all__ = [
    "SMALL_JVM",
    "SPARK_VERSION",
    "Driver",
    "HighlyAvailableCluster",
    "Keystore",
    "Master",
    "Spark",
    "StandaloneCluster",
    "Worker",
    "archived_classes",
    "ensure_spark",
    "java_home",
]

SPARK_VERSION = "4.3.0"
"""The version that everything runs against unless told otherwise."""

_JAVA_NEEDED = 17
_START = 60.0  # seconds that a JVM may take to start on a busy machine
SMALL_JVM = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
"""Options of a JVM that lives for a minute: a driver takes two fifths less of the processor to start."""


@functools.cache
def java_home() -> Path:
    """
    Return the home of the Java that Spark will use: ``JAVA_HOME``, or that of ``java`` on the ``PATH``.

    :raises ToolMissing: when there is none, or it is older than Spark needs.
    """
    advice = f"Spark needs Java {_JAVA_NEEDED} or later: install openjdk-{_JAVA_NEEDED}-jre-headless or set JAVA_HOME"
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(f"{home}/bin/java" if home else "java")
    if java is None:
        raise ToolMissing(f"no Java found. {advice}")
    answer = subprocess.run([java, "-XshowSettings:properties", "-version"], capture_output=True, text=True, timeout=60)
    properties = dict(re.findall(r"^ +(java\.\S+) = (.*)$", answer.stderr, re.MULTILINE))
    version = properties.get("java.specification.version", "none")
    if not version.isdigit() or int(version) < _JAVA_NEEDED:
        raise ToolMissing(f"{java} is Java {version}. {advice}")
    return Path(properties["java.home"])


@dataclasses.dataclass(frozen=True)
class Spark:
    """One Spark, ready to run."""

    version: str
    home: Path
    """SPARK_HOME."""
    python: Path
    """The interpreter that has pyspark."""
    java_options: str = ""
    """For all its JVMs, those of drivers and executors among them, which tell of it in their logs."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables for Spark's programs; no setting of the developer's own gets in."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TMPDIR", "TZ") if name in os.environ}
        options = {"JAVA_TOOL_OPTIONS": self.java_options} if self.java_options else {}
        return kept | {
            **options,
            "JAVA_HOME": str(java_home()),
            "SPARK_HOME": str(self.home),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYSPARK_PYTHON": str(self.python),
        }


def ensure_spark(version: str = SPARK_VERSION) -> Spark:
    """
    Return a Spark of this version, installed into the user's cache on first use (half a gigabyte, a minute).

    :raises ToolMissing: when there is no fitting Java, or no ``uv``.
    """
    java_home()
    directory = in_cache(f"spark-{version}-py{sys.version_info.major}{sys.version_info.minor}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _usable(directory):
            _install(version, directory)
    return Spark(version, _home_in(directory), directory / "bin" / "python")


_SLEEPING = """
public class Application {
    public static void main(String[] arguments) throws Exception {
        Thread.sleep(1000);
    }
}
"""


def archived_classes(spark: Spark) -> str:
    """
    Return options by which Spark's JVMs take their classes from an archive, made on first use (a quarter of a minute).

    A driver without Spark takes 2.8 s of the processor to start instead of 4.4, ``spark-submit`` 2.4 instead of 4.2.
    A JVM that finds the archive not to fit it does without, and says nothing.
    """
    java = f"{java_home()}/bin/java"
    quiet = ("-Xlog:disable", "-Xlog:all=error:stderr")
    # Its class path is as the launcher makes it: an archive is good for those that begin with this one.
    (logging,) = (spark.home / "jars").glob("slf4j-api-*.jar")
    build = subprocess.run([java, "-Xinternalversion"], capture_output=True, check=True, timeout=60).stdout
    key = hashlib.sha256(build + f"{logging} {logging.stat().st_mtime_ns}".encode()).hexdigest()[:8]

    def fill(directory: Path) -> None:
        directory.mkdir()
        application, archive = directory / "Application.java", directory / "classes.jsa"
        application.write_text(_SLEEPING)
        compiled = ("org.codehaus.janino.SimpleCompiler", str(application), "Application")
        done = subprocess.run(
            [
                *(java, *SMALL_JVM.split(), *quiet, f"-XX:ArchiveClassesAtExit={archive}"),
                "--add-modules=jdk.incubator.vector",  # as the launcher has it, too
                *("-cp", f"{logging}:{spark.home}/jars/*", "org.apache.spark.deploy.worker.DriverWrapper"),
                *("spark://Worker@127.0.0.1:9", str(application), *compiled),
            ],
            env=spark.environment(),
            cwd=directory,
            capture_output=True,
            check=False,  # there is no such worker
            text=True,
            timeout=120,
        )
        if not archive.exists():
            raise RuntimeError(f"a JVM made no archive of its classes:\n{done.stdout}{done.stderr}"[-4000:])

    archive = cached(f"spark-{spark.version}-classes-{key}", fill) / "classes.jsa"
    return " ".join([f"-XX:SharedArchiveFile={archive}", *quiet])


def _home_in(environment: Path) -> Path:
    return next(environment.glob("lib/python3*/site-packages/pyspark"), environment / "absent")


def _stamp(environment: Path) -> str:
    """Return what a whole environment looks like: how many jars, and of how many bytes."""
    sizes = [jar.stat().st_size for jar in (_home_in(environment) / "jars").glob("*.jar")]
    return f"{len(sizes)} jars, {sum(sizes)} bytes\n"


def _usable(environment: Path) -> bool:
    stamp = environment / "stamp"
    return (
        stamp.exists()
        and stamp.read_text() == _stamp(environment)
        and os.access(environment / "bin" / "python", os.X_OK)  # the interpreter that it links to may be gone
    )


def _install(version: str, directory: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        raise ToolMissing("uv is not on the PATH: see https://docs.astral.sh/uv/getting-started/installation/")
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.") as scratch:
        new = Path(scratch) / "new"
        for command in (
            [uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, str(new)],
            [uv, "pip", "install", "--quiet", "--python", f"{new}/bin/python", f"pyspark=={version}"],
        ):
            subprocess.run(command, check=True)
        if not any((_home_in(new) / "jars").glob("spark-core*.jar")):
            raise RuntimeError(f"pyspark {version} was installed, but its jars are not there")
        (new / "stamp").write_text(_stamp(new))
        if directory.exists():
            directory.rename(Path(scratch) / "old")
        new.rename(directory)


@dataclasses.dataclass(frozen=True)
class Keystore:
    """A PKCS #12 file with a certificate for 127.0.0.1 and its key."""

    path: Path
    password: str


@dataclasses.dataclass(frozen=True)
class Driver:
    """A driver as the master lists it."""

    id: str
    state: str
    started: float
    """Seconds since the epoch, by the master's clock."""
    worker: str
    main_class: str
    memory: int
    """Megabytes."""


@dataclasses.dataclass(frozen=True)
class Master:
    """One master of a cluster."""

    server: Server
    port: int
    rest_port: int
    ui: str
    """URL of the web UI, without a slash at the end."""

    @property
    def ui_port(self) -> int:
        return int(self.ui.rpartition(":")[2])

    def page(self) -> dict[str, Any]:
        """Return what its ``/json/`` says. Raises :class:`OSError` when it does not answer."""
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        with urllib.request.urlopen(f"{self.ui}/json/", timeout=5, context=unverified) as answer:
            body = answer.read()
        try:
            page: dict[str, Any] = json.loads(body)
        except ValueError as error:  # so it answers for an instant while it starts
            raise OSError(f"{self.ui}/json/ answers {body[:200]!r}") from error
        return page

    def listens(self) -> bool:
        """Whether its RPC port accepts connections."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True


@dataclasses.dataclass(frozen=True)
class Worker:
    """One worker of a cluster."""

    server: Server
    ui: str
    """URL of the web UI, without a slash at the end."""
    directory: Path
    """It holds a directory for each driver that the worker ever launched."""


class StandaloneCluster(Startable):
    """
    Masters and workers of Spark standalone on loopback, each a process of its own. A context manager.

    :param masters: how many; two need a common memory: :class:`HighlyAvailableCluster`.
    :param workers: how many.
    :param cores: of each worker, for it to give away; a driver takes one, however few there really are.
    :param memory: of each worker, likewise.
    :param recovery: the master keeps what it knows of living drivers in files, and knows it again when
        it is started anew.
    :param rest: whether the masters have a REST server.
    :param master_conf: further Spark settings of the masters.
    :param worker_conf: further Spark settings of the workers.
    :param jws_key: the REST server demands a JSON web token signed with this key (base64url, 32 bytes or more).
    :param keystore: the web UIs of masters and workers speak TLS.
    :param directory: for logs, drivers' directories and recovery files; one that is removed at the end
        when ``None``.
    :param spark: which one to run; :func:`ensure_spark`'s when ``None``.
    """

    def __init__(
        self,
        *,
        masters: int = 1,
        workers: int = 1,
        cores: int = 16,
        memory: str = "16g",
        recovery: bool = False,
        rest: bool = True,
        master_conf: Mapping[str, str] | None = None,
        worker_conf: Mapping[str, str] | None = None,
        jws_key: str | None = None,
        keystore: Keystore | None = None,
        directory: Path | None = None,
        spark: Spark | None = None,
    ) -> None:
        self.spark = spark or ensure_spark()
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="durable-spark-")
        self.directory = directory or Path(self._temporary.name if self._temporary else "")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._scheme = "https" if keystore else "http"
        self._tls = _tls_conf(keystore) if keystore else {}
        conf = {"spark.master.rest.enabled": str(rest).lower()}
        if recovery:
            conf["spark.deploy.recoveryMode"] = "FILESYSTEM"
            conf["spark.deploy.recoveryDirectory"] = str(self.directory / "recovery")
        if jws_key:
            conf["spark.master.rest.filters"] = "org.apache.spark.ui.JWSFilter"
            conf["spark.org.apache.spark.ui.JWSFilter.param.secretKey"] = jws_key
        conf |= master_conf or {}
        self._size = ("--cores", str(cores), "--memory", memory)
        self.masters = [self._master(f"master-{number}", conf) for number in range(1, masters + 1)]
        self.workers = [self._worker(f"worker-{number}", worker_conf or {}) for number in range(1, workers + 1)]

    @property
    def url(self) -> str:
        """The master URL: ``spark://127.0.0.1:p1,127.0.0.1:p2``."""
        return "spark://" + ",".join(f"127.0.0.1:{master.port}" for master in self.masters)

    @property
    def master(self) -> Master:
        """The first master."""
        return self.masters[0]

    def connection(self, **extra: Any) -> dict[str, Any]:
        """
        Return an Airflow connection of type ``durable_spark``, as its JSON form takes it.

        :param extra: further extras, with underscores for hyphens.
        """
        alone = len(self.masters) == 1
        return {
            "conn_type": "durable_spark",
            **({"host": "spark://127.0.0.1", "port": self.master.port} if alone else {"host": self.url}),
            "extra": {
                "rest-port": ",".join(str(master.rest_port) for master in self.masters),
                "ui-port": ",".join(str(master.ui_port) for master in self.masters),
                "ui-scheme": self._scheme,
                **{name.replace("_", "-"): value for name, value in extra.items()},
            },
        }

    def start(self) -> None:
        """Start everything; return when a master leads and all workers have registered."""
        for master in self.masters:
            master.server.start()
        for master in self.masters:
            wait_until(master.listens, _START, f"{master.server.name} to listen", servers=[master.server])
        for worker in self.workers:
            worker.server.start()
        self.wait_for_workers(len(self.workers))

    def stop(self) -> None:
        """Kill everything."""
        for server in self._servers():
            server.kill()
        if self._temporary:
            self._temporary.cleanup()

    def leader(self) -> Master:
        """Return the master that leads now. Raises :class:`OSError` when none does."""
        return self._led()[0]

    def wait_for_leader(self, deadline: float = _START) -> Master:
        """Return the master that leads, when one does."""
        return wait_until(self.leader, deadline, "a master that leads", servers=self._living())

    def wait_for_workers(self, count: int, deadline: float = _START) -> None:
        """Return when a master leads that has this many living workers."""

        def registered() -> bool:
            return bool(self._led()[1]["aliveworkers"] == count)

        wait_until(registered, deadline, f"{count} registered workers", servers=self._living())

    def restart_master(self) -> None:
        """Kill the first master and start it again; return when it leads and all workers have come back."""
        self.master.server.kill()
        self.start_master()

    def start_master(self) -> None:
        """Start the first master, which has been killed; return when it leads and all workers have come back."""
        self.master.server.start()
        self.wait_for_workers(len(self.workers))

    def drivers(self) -> list[Driver]:
        """Return what the leading master lists, active and completed, the oldest first."""
        page = self._led()[1]
        drivers = [
            Driver(
                id=driver["id"],
                state=driver["state"],
                started=int(driver["starttime"]) / 1000,
                worker=driver["worker"],
                main_class=driver["mainclass"],
                memory=driver["memory"],
            )
            for driver in page["activedrivers"] + page["completeddrivers"]
        ]
        return sorted(drivers, key=lambda driver: (driver.started, driver.id))

    def kill_driver(self, driver: str) -> None:
        """Ask the leading master to kill a driver."""
        url = f"http://127.0.0.1:{self.leader().rest_port}/v1/submissions/kill/{driver}"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=5):
            pass

    def launched(self) -> list[str]:
        """Return the IDs of all drivers that any worker has ever launched, by their directories."""
        return sorted(path.name for worker in self.workers for path in worker.directory.glob("driver-*"))

    def _servers(self) -> Iterator[Server]:
        yield from (worker.server for worker in self.workers)
        yield from (master.server for master in self.masters)

    def _living(self) -> list[Server]:
        return [server for server in self._servers() if server.alive]

    def _led(self) -> tuple[Master, dict[str, Any]]:
        pages: list[object] = []
        for master in self.masters:
            try:
                page = master.page()
            except OSError as error:
                pages.append(error)
                continue
            if page["status"] == "ALIVE":
                return master, page
            pages.append(page["status"])
        raise OSError(f"no master leads: {pages}")

    def _master(self, name: str, conf: Mapping[str, str]) -> Master:
        port, rest_port, ui_port = free_port(), free_port(), free_port()
        settings = {"spark.master.rest.port": str(rest_port), **conf}
        address = ("--host", "127.0.0.1", "--port", str(port), "--webui-port", str(self._plain(ui_port)))
        server = self._server(name, "org.apache.spark.deploy.master.Master", address, settings, ui_port)
        return Master(server, port, rest_port, f"{self._scheme}://127.0.0.1:{ui_port}")

    def _worker(self, name: str, conf: Mapping[str, str]) -> Worker:
        ui_port, directory = free_port(), self.directory / name
        address = ("--host", "127.0.0.1", "--port", str(free_port()), "--webui-port", str(self._plain(ui_port)))
        arguments = (*address, *self._size, "--work-dir", str(directory), self.url)
        server = self._server(name, "org.apache.spark.deploy.worker.Worker", arguments, conf, ui_port)
        return Worker(server, f"{self._scheme}://127.0.0.1:{ui_port}", directory)

    def _plain(self, ui_port: int) -> int:
        """Return the port of the unencrypted web UI: with TLS another one, which redirects."""
        return free_port() if self._tls else ui_port

    def _server(
        self, name: str, main_class: str, arguments: Sequence[str], conf: Mapping[str, str], ui_port: int
    ) -> Server:
        conf = {"spark.port.maxRetries": "0", **conf}  # a port that is taken is an error, not a reason to try the next
        if self._tls:
            conf |= {"spark.ssl.standalone.port": str(ui_port), **self._tls}
        environment = self.spark.environment() | {
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_DAEMON_JAVA_OPTS": " ".join([SMALL_JVM, *(f"-D{name}={value}" for name, value in conf.items())]),
            "SPARK_LAUNCHER_OPTS": SMALL_JVM,
        }
        command = [f"{self.spark.home}/bin/spark-class", main_class, *arguments]
        return Server(name, command, log=self.directory / f"{name}.log", env=environment, cwd=self.directory)


def _tls_conf(keystore: Keystore) -> dict[str, str]:
    return {
        "spark.ssl.standalone.enabled": "true",
        "spark.ssl.standalone.keyStore": str(keystore.path),
        "spark.ssl.standalone.keyStorePassword": keystore.password,
        "spark.ssl.standalone.keyPassword": keystore.password,
        "spark.ssl.standalone.keyStoreType": "PKCS12",
        "spark.ssl.standalone.protocol": "TLSv1.3",
    }


class HighlyAvailableCluster(StandaloneCluster):
    """
    Two masters that elect their leader through a ZooKeeper of their own, and their workers.

    The lease of a leader that was killed ends after :attr:`session_timeout`; then the other one takes
    over what it finds in ZooKeeper.

    :param options: as for :class:`StandaloneCluster`.
    """

    session_timeout = 3.0
    """Seconds. Spark asks for 60, the server grants at most this."""

    def __init__(self, *, master_conf: Mapping[str, str] | None = None, **options: Any) -> None:
        self._zookeeper_port = free_port()
        recovery = {
            "spark.deploy.recoveryMode": "ZOOKEEPER",
            "spark.deploy.zookeeper.url": f"127.0.0.1:{self._zookeeper_port}",
        }
        super().__init__(masters=2, master_conf=recovery | dict(master_conf or {}), **options)
        settings = {
            "admin.enableServer": "false",
            "clientPort": self._zookeeper_port,
            "clientPortAddress": "127.0.0.1",
            "dataDir": self.directory / "zookeeper",
            "maxSessionTimeout": int(self.session_timeout * 1000),
            "tickTime": 500,
        }
        configuration = self.directory / "zookeeper.cfg"
        configuration.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        java = [f"{java_home()}/bin/java", *SMALL_JVM.split(), "-Xmx128m", "-cp", f"{self.spark.home}/jars/*"]
        command = [*java, "org.apache.zookeeper.server.ZooKeeperServerMain", str(configuration)]
        self.zookeeper = Server("zookeeper", command, log=self.directory / "zookeeper.log", cwd=self.directory)

    def start(self) -> None:
        """Start everything; return when a master leads and all workers have registered."""
        self.zookeeper.start()

        def listens() -> bool:
            with socket.create_connection(("127.0.0.1", self._zookeeper_port), timeout=5):
                return True

        wait_until(listens, _START, "ZooKeeper to listen", servers=[self.zookeeper])
        super().start()

    def _servers(self) -> Iterator[Server]:
        yield from super()._servers()
        yield self.zookeeper


if __name__ == "__main__":
    print(ensure_spark().home)
