"""
A standalone cluster that misbehaves on demand: real HTTP servers on loopback that replay what a real one said.

The answers were recorded on Spark 4.3.0 (``recorded/``). The real cluster is asked in ``tests/contract`` and
``tests/cluster``; here is only what it cannot be made to do.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from email.utils import formatdate
from pathlib import Path
from typing import Any

from aiohttp import web

from durable_spark.hooks.standalone import StandaloneHook

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RECORDED = Path(__file__).parent / "recorded"
WORKER = "worker-20261123035333-127.0.0.1-28435"
NOW = 1795406100.0
"""The fake master's clock, unless it is told another time."""


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


def recorded_json(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(recorded(name))
    return value


async def serve(stack: AsyncExitStack, handler: Handler, *, tls: Any = None) -> str:
    """Serve every path with one handler; return the origin."""
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    port = runner.addresses[0][1]
    return f"{'https' if tls else 'http'}://127.0.0.1:{port}"


def driver(number: int, state: str, *, start: float = NOW, worker: str = WORKER) -> dict[str, Any]:
    """A driver as ``/json/`` lists it."""
    stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime(start))
    template = recorded_json("page.json")["completeddrivers"][0]
    return {
        **template,
        "id": f"driver-{stamp}-{number:04d}",
        "starttime": str(int(start * 1000)),
        "state": state,
        "worker": worker,
    }


def launch_command(token: str = "", *, deployment: str = "", owner: str = "") -> str:
    """The head of a driver's log, with our properties in it."""
    head = recorded("log-finished.txt").partition("\n")[2]
    properties = {"submission": token, "deployment": deployment, "owner": owner}
    ours = " ".join(f'"-Dspark.airflow.{key}={value}"' for key, value in properties.items() if value)
    return head.replace('"-Dspark.airflow.submission=' + "a1" * 16 + '"', ours)


class FakeMaster:
    """A master's page and REST server. ``ui`` and ``rest`` replace their answers."""

    def __init__(self) -> None:
        self.page = recorded_json("page.json") | {"activedrivers": [], "completeddrivers": []}
        self.now = NOW
        self.ui: Handler | None = None
        self.rest: Handler | None = None
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.creates = True
        """Whether a submission becomes a driver."""
        self.messages: dict[str, str] = {}
        self.ui_url = self.rest_url = ""
        self._events: list[tuple[str, str, asyncio.Event]] = []

    async def start(self, stack: AsyncExitStack) -> None:
        self.ui_url = await serve(stack, self._ui)
        self.rest_url = await serve(stack, self._rest)

    def add(self, *drivers: dict[str, Any]) -> None:
        for entry in drivers:
            active = entry["state"] in ("SUBMITTED", "RUNNING", "UNKNOWN")
            self.page["activedrivers" if active else "completeddrivers"].append(entry)

    @property
    def drivers(self) -> list[dict[str, Any]]:
        return [*self.page["activedrivers"], *self.page["completeddrivers"]]

    def asked(self, method: str, start: str) -> int:
        return sum(m == method and p.startswith(start) for m, p in self.requests)

    def event(self, method: str, start: str) -> asyncio.Event:
        """Return an event that is set when such a request has been answered."""
        event = asyncio.Event()
        self._events.append((method, start, event))
        return event

    async def _ui(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        if self.ui:
            return await self.ui(request)
        return web.json_response(self.page, headers={"Date": formatdate(self.now, usegmt=True)})

    async def _rest(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        if self.rest:
            return await self.rest(request)
        return await self.answer(request)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """What a healthy REST server answers."""
        action, name = request.path.split("/")[3], request.path.rpartition("/")[2]
        if action == "create":
            return web.json_response(self.create(await request.json()))
        if self.page["status"] != "ALIVE":
            message = f"Current state is not alive: {self.page['status']}. Can only request in ALIVE state."
            return web.json_response({"action": "X", "message": message, "submissionId": name, "success": False})
        known = {entry["id"]: entry for entry in self.drivers}
        if action == "kill":
            return web.json_response(recorded_json("kill.json" if name in known else "kill-unknown.json"))
        answer = recorded_json("status-finished.json" if name in known else "status-unknown.json")
        if name in known:
            answer |= {"driverState": known[name]["state"]}
        if name in self.messages:
            answer["message"] = self.messages[name]
        return web.json_response(answer | {"submissionId": name})

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take a submission as the master does."""
        answer = recorded_json("create.json")
        if self.page["status"] != "ALIVE":
            message = f"Current state is not alive: {self.page['status']}. Can only accept driver submissions."
            return {"action": "CreateSubmissionResponse", "message": message, "success": False}
        self.created.append(body)
        entry = driver(100 + len(self.created), "RUNNING", start=self.now)
        if self.creates:
            self.add(entry)
        return answer | {"submissionId": entry["id"]}

    def _note(self, request: web.Request) -> None:
        self.requests.append((request.method, request.path_qs))
        self.headers.append(dict(request.headers))
        for method, start, event in self._events:
            if request.method == method and request.path.startswith(start):
                asyncio.get_running_loop().call_later(0.05, event.set)


class FakeWorker:
    """
    A worker's pages: ``logs`` by driver ID, ``listed`` on its own page besides.

    :param master: the page of its master, which knows its ID.
    """

    def __init__(self, master: dict[str, Any]) -> None:
        self.master = master
        self.logs: dict[str, str] = {}
        self.outputs: dict[str, str] = {}
        self.listed: list[str] = []
        self.handler: Handler | None = None
        self.headers: list[dict[str, str]] = []
        self.url = ""

    @property
    def asked(self) -> int:
        return len(self.headers)

    async def start(self, stack: AsyncExitStack) -> None:
        self.url = await serve(stack, self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        if self.handler:
            return await self.handler(request)
        if request.path == "/":
            rows = "".join(f"<tr><td>{driver_id}</td></tr>" for driver_id in [*self.logs, *self.listed])
            names = " ".join(worker["id"] for worker in self.master["workers"])
            return web.Response(text=f"<html>{names}<table>{rows}</table></html>\n", content_type="text/html")
        driver_id = request.query["driverId"]
        if driver_id not in self.logs:
            return web.Response(text=recorded("log-missing.txt").rstrip("\n"))
        kind = request.query["logType"]
        log = self.logs[driver_id] if kind == "stderr" else self.outputs.get(driver_id, "")
        length = int(request.query["byteLength"])
        offset = int(request.query.get("offset", max(0, len(log) - length)))
        part = log[offset : offset + length]
        head = f"==== Bytes {offset}-{offset + len(part)} of {len(log)} of /spark/{driver_id}/{kind} ====\n"
        return web.Response(text=head + part)


class FakeCluster:
    """Masters and one worker."""

    def __init__(self, masters: int = 1) -> None:
        self.masters = [FakeMaster() for _ in range(masters)]
        for standby in self.masters[1:]:
            standby.page |= {"status": "STANDBY", "workers": []}
        self.worker = FakeWorker(self.master.page)

    @property
    def master(self) -> FakeMaster:
        return self.masters[0]

    async def start(self, stack: AsyncExitStack) -> FakeCluster:
        await self.worker.start(stack)
        for master in self.masters:
            await master.start(stack)
        self.master.page["workers"][0]["webuiaddress"] = self.worker.url
        return self

    def ran(self, entry: dict[str, Any], log: str | None) -> dict[str, Any]:
        """Add a driver, with its log on the worker unless ``None``."""
        self.master.add(entry)
        if log is not None:
            self.worker.logs[entry["id"]] = log
        return entry

    def connection(self, **extra: Any) -> dict[str, Any]:
        ports = {
            "rest-port": ",".join(_port(master.rest_url) for master in self.masters),
            "ui-port": ",".join(_port(master.ui_url) for master in self.masters),
        }
        host = "spark://" + ",".join(f"127.0.0.1:{7077 + n}" for n in range(len(self.masters)))
        return {"conn_type": "durable_spark", "host": host, "extra": ports | extra}


class QuickHook(StandaloneHook):
    """Does not wait long for what the tests withhold."""

    queue_patience = 0.0
    settle_time = 0.0


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport
    request.transport.close()
    return web.Response()


def fixed(status: int, text: str = "", **headers: str) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


def ids(entries: Iterable[dict[str, Any]]) -> list[str]:
    return [entry["id"] for entry in entries]


def _port(url: str) -> str:
    return url.rpartition(":")[2]
