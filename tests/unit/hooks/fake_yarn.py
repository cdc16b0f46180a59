"""
A YARN cluster that misbehaves on demand: real HTTP servers on loopback that speak as real ones did.

The answers were recorded on Hadoop 3.5.0 (``recorded/yarn-*``). The real cluster is asked in ``tests/contract`` and
``tests/cluster``; here is only what it cannot be made to do.
"""

from __future__ import annotations

import asyncio
import copy
import re
import sys
from contextlib import AsyncExitStack
from email.utils import formatdate
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiohttp import web

from durable_spark.hooks.yarn import YarnHook
from tests.unit.hooks.fake import Handler, recorded, recorded_json, serve

if TYPE_CHECKING:
    import pytest

NOW = 1795663900.0
"""The fake ResourceManagers' clock, unless one is told another time."""
STARTED = 1795663815040
ENDED = ("FINISHED", "FAILED", "KILLED")


def app_id(number: int) -> str:
    return f"application_{STARTED}_{number:04d}"


def row(number: int, state: str = "RUNNING", final: str = "", *, tags: str = "", **changes: Any) -> dict[str, Any]:
    """An application as a ResourceManager reports it."""
    ended = state in ENDED
    entry: dict[str, Any] = copy.deepcopy(recorded_json(f"yarn-app-{'failed' if ended else 'running'}.json")["app"])
    started = int(NOW - 100) * 1000 + number
    entry.update(
        id=app_id(number),
        state=state,
        finalStatus=final or (state if state in ("FAILED", "KILLED") else "SUCCEEDED" if ended else "UNDEFINED"),
        startedTime=started,
        finishedTime=started + 10_000 if ended else 0,
        diagnostics="",
        applicationTags=tags,
        amContainerLogs="",
    )
    return entry | changes


def ours(token: str = "a1" * 16, *, owner: str = "", deployment: str = "") -> str:
    """The tags of one of our applications, as YARN shows them."""
    labels = {"deployment": deployment, "owner": owner, "submission": token}
    return ",".join(["durable-spark", *(f"durable-spark.{name}={value}" for name, value in labels.items() if value)])


def _unknown(name: str) -> web.Response:
    told = recorded_json("yarn-app-unknown.json")
    told["RemoteException"]["message"] = f"app with id: {name} not found"
    return web.json_response(told, status=404)


class FakeManager:
    """
    A ResourceManager's web app. ``handler`` replaces its answers to all but ``/info``, ``on_info`` those.

    ``ask`` is how it authenticates: ``Negotiate``, ``Basic`` or not at all.
    """

    def __init__(self) -> None:
        self.apps: dict[str, dict[str, Any]] = {}
        self.state = "ACTIVE"
        self.started = STARTED
        self.now = NOW
        self.redirect: str | None = None
        """What a standby redirects to; ``None``: it knows of no active one."""
        self.conf = {
            "yarn.resourcemanager.max-completed-applications": "1000",
            "yarn.webapp.filter-entity-list-by-user": "false",
        }
        self.ask = ""
        self.cookie = ""
        self.mutual = "c2VydmVy"
        self.handler: Handler | None = None
        self.on_info: Handler | None = None
        self.prefix = "/ws"
        self.tag_asked = asyncio.Event()
        """Set by the first question for a tag."""
        self.ignores_tags = False
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[Any] = []
        self.url = ""

    async def start(self, stack: AsyncExitStack) -> None:
        self.url = await serve(stack, self._serve)

    def add(self, *rows: dict[str, Any]) -> None:
        self.apps.update({entry["id"]: entry for entry in rows})

    def end(self, number: int, state: str = "FINISHED", final: str = "SUCCEEDED") -> None:
        finished = {"state": state, "finalStatus": final, "finishedTime": int(self.now * 1000)}
        self.apps[app_id(number)].update(finished)

    def asked(self, start: str, method: str = "GET") -> list[str]:
        """The requests below ``/v1/cluster/`` that begin so."""
        begin = f"{self.prefix}/v1/cluster/{start}"
        return [path for made, path in self.requests if made == method and path.startswith(begin)]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.text())
        response = await self._authenticated(request)
        if not response.prepared:
            response.headers.setdefault("Date", formatdate(self.now, usegmt=True))
        if "applicationTags" in request.query:
            asyncio.get_running_loop().call_later(0.05, self.tag_asked.set)
        return response

    async def _authenticated(self, request: web.Request) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if self.ask == "Negotiate":
            if request.headers.get("Cookie") == f'hadoop.auth="{self.cookie}"' and self.cookie:
                return await self._answer(request)
            if not given.startswith("Negotiate "):
                return web.Response(
                    status=401, text="Authentication required", headers={"WWW-Authenticate": "Negotiate"}
                )
            response = await self._answer(request)
            response.headers["WWW-Authenticate"] = f"Negotiate {self.mutual}"
            if self.cookie:
                response.headers["Set-Cookie"] = f'hadoop.auth="{self.cookie}"; Path=/; HttpOnly'
            return response
        if self.ask and given != self.ask:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="knox"'})
        return await self._answer(request)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix(f"{self.prefix}/v1/cluster")
        if path == "/info" and request.path != path:
            return await self.on_info(request) if self.on_info else self.info()
        if self.handler:
            return await self.handler(request)
        if request.path == "/conf":
            name = request.query["name"]
            if name not in self.conf:
                return web.Response(status=404, text="Property not found")
            return web.json_response({"property": {"key": name, "value": self.conf[name]}})
        if self.state == "STANDBY":
            where = {"Location": self.redirect} if self.redirect else {"Refresh": f"3;url={self.url}"}
            text = "This is standby RM. The redirect url is: /" if self.redirect else "Can not find any active RM."
            return web.Response(status=307, text=text, headers=where)
        return await self.answer(request)

    def info(self) -> web.Response:
        told = recorded_json("yarn-info.json")["clusterInfo"] | {"haState": self.state, "startedOn": self.started}
        return web.json_response({"clusterInfo": told})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """What a healthy one answers; one in its recovery knows nothing."""
        path = request.path.removeprefix(f"{self.prefix}/v1/cluster/")
        known = {} if self.state == "INITIALIZING" else self.apps
        if path == "apps":
            return self._list(request, known)
        if path == "apps/new-application":
            return web.json_response(recorded_json("yarn-new-application.json"))
        if path == "appstatistics":
            counts = [{"state": s, "count": sum(a["state"] == s for a in known.values())} for s in ENDED]
            return web.json_response({"appStatInfo": {"statItem": counts}})
        if match := re.fullmatch(r"apps/(application_\d+_\d+)(/state)?", path):
            if match[1] not in known:
                return _unknown(match[1])
            if match[2] and known[match[1]]["state"] not in ENDED:
                known[match[1]].update(state="KILLED", finalStatus="KILLED", finishedTime=int(self.now * 1000))
                return web.json_response({"state": "KILLING"}, status=202)
            if match[2]:
                return web.json_response({"state": known[match[1]]["state"]})
            return web.json_response({"app": known[match[1]]})
        return web.Response(status=404, text="<html>no such page</html>", content_type="text/html")

    def _list(self, request: web.Request, known: dict[str, dict[str, Any]]) -> web.Response:
        wanted = "" if self.ignores_tags else request.query.get("applicationTags", "")
        tags = {tag.lower() for tag in wanted.split(",") if tag}
        states = {state for state in request.query.get("states", "").split(",") if state}
        begin = int(request.query.get("finishedTimeBegin", -1))
        found = [
            entry
            for entry in known.values()
            if (not tags or tags & set(entry["applicationTags"].split(",")))
            and (not states or entry["state"] in states)
            and (begin < 0 or (entry["finishedTime"] and entry["finishedTime"] >= begin))
        ]
        return web.json_response({"apps": {"app": found}} if found else recorded_json("yarn-apps-none.json"))


class FakeTimeline:
    """A timeline server (version 1). ``handler`` replaces its answers."""

    def __init__(self) -> None:
        self.apps: dict[str, dict[str, Any]] = {}
        self.handler: Handler | None = None
        self.logs: dict[str, str] = {}
        self.headers: list[dict[str, str]] = []
        self.url = ""

    async def start(self, stack: AsyncExitStack) -> FakeTimeline:
        self.url = await serve(stack, self._serve)
        return self

    def remember(self, entry: dict[str, Any]) -> None:
        """Know an application as it was reported; the names of its members differ."""
        names = {
            "id": "appId",
            "state": "appState",
            "finalStatus": "finalAppStatus",
            "diagnostics": "diagnosticsInfo",
        }
        kept = ("applicationTags", "startedTime", "finishedTime", "queue", "user")
        past = {new: entry[old] for old, new in names.items()} | {name: entry[name] for name in kept}
        self.apps[entry["id"]] = past

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        if self.handler:
            return await self.handler(request)
        path = request.path.removeprefix("/ws/v1/applicationhistory/")
        if path == "apps":
            begin = int(request.query.get("startedTimeBegin", 0))
            return web.json_response({"apps": {"app": [a for a in self.apps.values() if a["startedTime"] >= begin]}})
        if path.startswith("containerlogs/"):
            name = path.rpartition("/")[2]
            return web.Response(text=self.logs[name]) if name in self.logs else web.Response(status=404)
        past = self.apps.get(path.removeprefix("apps/"))
        if past is None:
            return _unknown(path.removeprefix("apps/"))
        return web.json_response({"app": past})


class FakeNode:
    """A NodeManager: serves the logs of any container, by name."""

    def __init__(self) -> None:
        self.logs = {"stdout": recorded("yarn-log-running.txt"), "stderr": recorded("yarn-log-ended.txt")}
        self.handler: Handler | None = None
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    async def start(self, stack: AsyncExitStack) -> FakeNode:
        self.url = await serve(stack, self._serve)
        return self

    def container(self, number: int) -> str:
        return f"{self.url}/node/containerlogs/container_{STARTED}_{number:04d}_01_000001/airflow"

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path_qs)
        self.headers.append(dict(request.headers))
        if self.handler:
            return await self.handler(request)
        name = request.path.rpartition("/")[2]
        return web.Response(text=self.logs[name]) if name in self.logs else web.Response(status=404)


class FakeYarn:
    """ResourceManagers, of which the first is active."""

    def __init__(self, managers: int = 1) -> None:
        self.managers = [FakeManager() for _ in range(managers)]
        for number, standby in enumerate(self.managers[1:], start=1):
            standby.state, standby.started = "STANDBY", STARTED + number

    @property
    def manager(self) -> FakeManager:
        return self.managers[0]

    async def start(self, stack: AsyncExitStack) -> FakeYarn:
        for manager in self.managers:
            await manager.start(stack)
        return self

    def fail_over(self) -> None:
        """Let the second one lead, which knows the same applications."""
        old, new = self.managers
        old.state, new.state = "STANDBY", "ACTIVE"
        new.apps = old.apps

    def connection(self, **extra: Any) -> dict[str, Any]:
        addresses = ",".join(manager.url for manager in self.managers)
        extras = {"yarn_resourcemanager_webapp_address": addresses} | extra
        return {"conn_type": "durable_spark", "host": "yarn", "extra": extras}


class QuickYarnHook(YarnHook):
    """Does not wait long for what the tests withhold."""

    settle_time = 0.0
    recovery_time = 0.0
    patience = 0.0


class FakeKerberos:
    """
    Stands in for the module ``gssapi``, and notes what it was asked. ``fail`` is the text of its next errors.

    Real tickets are used in ``tests/cluster``; here is only what a KDC cannot be made to do.
    """

    def __init__(self) -> None:
        self.fail = ""
        self.hosts: list[str] = []
        self.credentials: list[dict[str, Any]] = []
        self.keytabs: list[bytes] = []
        self.verified: list[bytes] = []
        self.bad_proof = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeKerberos:
        fake = self

        class GSSError(Exception):
            pass

        def name(text: str, kind: str) -> str:
            return text

        class Credentials:
            def __init__(self, **given: Any) -> None:
                if fake.fail:
                    raise GSSError(fake.fail)
                fake.credentials.append(given)
                if path := (given.get("store") or {}).get("client_keytab"):
                    with open(path.removeprefix("FILE:"), "rb") as file:
                        fake.keytabs.append(file.read())

        class SecurityContext:
            def __init__(self, *, name: str, creds: Any, **_: Any) -> None:
                self.name = name

            def step(self, token: bytes | None = None) -> bytes | None:
                if fake.fail:
                    raise GSSError(fake.fail)
                if token is None:
                    fake.hosts.append(self.name)
                    return f"ticket-{len(fake.hosts)}".encode()
                if fake.bad_proof:
                    raise GSSError("A token had an invalid Message Integrity Check (MIC)")
                fake.verified.append(token)
                return None

        module: Any = ModuleType("gssapi")
        module.Name, module.Credentials, module.SecurityContext = name, Credentials, SecurityContext
        module.MechType = SimpleNamespace(kerberos="kerberos")
        module.NameType = SimpleNamespace(hostbased_service="service", kerberos_principal="principal")
        module.OID = SimpleNamespace(from_int_seq=lambda numbers: numbers)
        module.exceptions = ModuleType("gssapi.exceptions")
        module.exceptions.GSSError = GSSError
        monkeypatch.setitem(sys.modules, "gssapi", module)
        monkeypatch.setitem(sys.modules, "gssapi.exceptions", module.exceptions)
        return self
