"""The job service of the page on writing a hook, behind a proxy that stops a request at will."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import httpx

from dev.processes import Server, Startable, free_port, wait_until
from dev.proxy import Proxy

__all__ = ["EXAMPLES", "JobService"]

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


class JobService(Startable):
    """
    The service, which names nobody's script; the proxy has seen them.

    :param log: the file that it prints to.
    """

    def __init__(self, log: Path) -> None:
        port = free_port()
        self._server = Server(
            "process_service", [sys.executable, str(EXAMPLES / "process_service.py"), "--port", str(port)], log=log
        )
        self._url = f"http://127.0.0.1:{port}/jobs"
        self.proxy = Proxy(f"http://127.0.0.1:{port}")
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        self._running.callback(self._server.stop)
        self._server.start()
        wait_until(self._answers, 30, "the job service", servers=[self._server], interval=0.1)
        self._running.enter_context(self.proxy)

    def stop(self) -> None:
        self._running.close()

    def jobs(self, script: str) -> dict[str, str]:
        """Return name and state of each job whose command has these words, the oldest first."""
        states = httpx.get(self._url, trust_env=False).json()["jobs"]
        asked_for = (request.path for request in list(self.proxy.requests) if script in request.body)
        names = (match[1] for path in asked_for if (match := re.fullmatch(r"/jobs/([\w-]+)", path)))
        return {name: states[name] for name in names if name in states}

    def _answers(self) -> bool:
        try:
            return httpx.get(self._url, trust_env=False).is_success
        except httpx.TransportError:
            return False
