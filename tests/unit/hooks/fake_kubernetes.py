"""
An API server that misbehaves on demand: a real HTTP server on loopback that speaks as a real one did.

The shapes were recorded on Kubernetes 1.34 (``recorded/k8s-*``, without managed fields). The real one is asked in
``tests/contract`` and ``tests/cluster``; here is only what it cannot be made to do.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from email.utils import formatdate
from typing import Any

from aiohttp import web

from dev.processes import wait_until_async
from durable_spark.hooks._kubernetes_status import TOKEN
from durable_spark.jobs import JobRef
from tests.unit.hooks.fake import NOW, Handler, recorded, recorded_json, serve

NAMESPACE = "spark"
CREDENTIAL = "hush-hush"
"""The bearer token of the connection."""
PROXY_404 = "<html><head><title>404 Not Found</title></head><body><h1>nginx</h1></body></html>"

_uids = itertools.count(1)


def watch_lines() -> list[bytes]:
    """The recorded life of a pod that was deleted while it ran, a bookmark, and the end of a history, as sent."""
    return [line.encode() + b"\n" for line in recorded("k8s-watch.jsonl").splitlines()]


def pod(
    token: str, phase: str = "Running", *, name: str = "", uid: str = "", namespace: str = NAMESPACE, **metadata: Any
) -> dict[str, Any]:
    """A driver pod as the API server shows it."""
    value = recorded_json(f"k8s-pod-{phase.lower()}.json")
    value["metadata"] |= {
        "name": name or f"dag-task-{token}",
        "namespace": namespace,
        "uid": uid or f"00000000-0000-4000-8000-{next(_uids):012d}",
        "labels": value["metadata"]["labels"] | {TOKEN: token},
        **metadata,
    }
    return value


def ref(value: Mapping[str, Any]) -> JobRef:
    """The job that a pod is."""
    metadata = value["metadata"]
    return JobRef(f"{metadata['namespace']}:{metadata['name']}", metadata["uid"])


def status(code: int, name: str = "", **changes: Any) -> web.Response:
    """An error as an API server words it."""
    known = {401, 403, 404, 409, 422}
    body = recorded_json(f"k8s-status-{code if code in known else 409}.json") | {"code": code} | changes
    if name:
        body["details"] = {"kind": "pods", **body.get("details", {}), "name": name}
    return web.json_response(body, status=code)


def refused(code: int, **changes: Any) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return status(code, **changes)

    return answer


def answered(value: Any, code: int = 200) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(value, status=code)

    return answer


def event(kind: str, value: Mapping[str, Any]) -> bytes:
    """One line of a watch."""
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


def bookmark(version: int | str) -> bytes:
    return event("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(version)}})


class FakeApi:
    """
    An API server with pods, Secrets, config maps and events.

    Requests are named by verb and kind, as in a Role: ``list pods``, ``create secrets``, ``get pods/log``.

    :ivar instead: answers that replace the healthy ones, by the name of the request.
    :ivar once: answers that do so once each, in order.
    :ivar token: the bearer token that is accepted; any if ``None``.
    :ivar forbidden: requests whose right is missing.
    """

    def __init__(self) -> None:
        self.url = ""
        self.now = NOW
        self.token: str | None = CREDENTIAL
        self.forbidden: set[str] = set()
        self.instead: dict[str, Handler] = {}
        self.once: dict[str, list[Handler]] = {}
        self.requests: list[str] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[tuple[str, Any]] = []
        self.pods: dict[tuple[str, str], dict[str, Any]] = {}
        self.secrets: dict[str, dict[str, Any]] = {}
        self.config_maps: set[str] = set()
        self.events: list[dict[str, Any]] = []
        self.log = "line 1\nline 2\nline 3\n"
        self.version = 1000
        self.oldest = 0
        """The oldest resource version from which can be watched."""
        self.streams: list[asyncio.Queue[bytes | None]] = []
        self._history: list[tuple[int, bytes]] = []

    async def start(self, stack: AsyncExitStack, *, tls: Any = None) -> FakeApi:
        self.url = await serve(stack, self._serve, tls=tls)
        stack.callback(self.end_streams)
        return self

    def connection(self, **extra: Any) -> dict[str, Any]:
        return {
            "conn_type": "durable_spark",
            "host": f"k8s://{self.url}",
            "password": CREDENTIAL,
            "extra": {"namespace": NAMESPACE, **extra},
        }

    # --- what happens in the cluster

    def put(self, value: dict[str, Any]) -> dict[str, Any]:
        """Add or change a pod, and tell the watches."""
        metadata = value["metadata"]
        key = metadata["namespace"], metadata["name"]
        kind = "MODIFIED" if key in self.pods else "ADDED"
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        self.pods[key] = value
        self._tell(event(kind, value))
        return value

    def becomes(self, value: dict[str, Any], phase: str) -> None:
        self.put(value | {"status": recorded_json(f"k8s-pod-{phase.lower()}.json")["status"]})

    def remove(self, value: dict[str, Any], *, told: bool = True) -> None:
        """Take a pod away; the watches are told, unless they missed it."""
        metadata = value["metadata"]
        gone = self.pods.pop((metadata["namespace"], metadata["name"]))
        self.version += 1
        if told:
            self._tell(event("DELETED", {**gone, "metadata": metadata | {"resourceVersion": str(self.version)}}))

    def happened(
        self, name: str, reason: str, message: str, *, at: str = "2026-11-23T03:20:00Z", made: str = "", uid: str = ""
    ) -> None:
        """Add an event about a pod. ``made``: when it was first told of, if not at the time of the recording."""
        template = recorded_json("k8s-events.json")["items"][0]
        about = template["involvedObject"] | {"name": name} | ({"uid": uid} if uid else {})
        metadata = template["metadata"] | ({"creationTimestamp": made} if made else {})
        told = {"metadata": metadata, "involvedObject": about, "reason": reason, "message": message}
        self.events.append(template | told | {"lastTimestamp": at})

    def say(self, *lines: bytes) -> None:
        """Send lines on all streams."""
        for stream in self.streams:
            for line in lines:
                stream.put_nowait(line)

    def end_streams(self) -> None:
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.put_nowait(None)

    def _tell(self, line: bytes) -> None:
        self._history.append((self.version, line))
        self.say(line)

    # --- what it answers

    def asked(self, request: str) -> int:
        return self.requests.count(request)

    def sent(self, request: str) -> list[Any]:
        """Return the bodies of the requests of that name."""
        return [body for name, body in self.bodies if name == request]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        name = _name(request)
        self.requests.append(name)
        self.paths.append(request.path_qs)
        self.headers.append(dict(request.headers))
        if request.body_exists:
            self.bodies.append((name, await request.json()))
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return status(401)
        handler = self.once[name].pop(0) if self.once.get(name) else self.instead.get(name, self.answer)
        response = await handler(request)
        if not response.prepared:
            response.headers.setdefault("Date", formatdate(self.now, usegmt=True))
        return response

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """What a healthy API server answers."""
        name = _name(request)
        _, _, subresource = name.partition("/")
        verb, _, kind = name.partition("/")[0].partition(" ")
        if name in self.forbidden:
            return status(403)
        if name == "get version":
            return web.json_response(recorded_json("k8s-version.json"))
        if name == "create selfsubjectaccessreviews":
            asked = (await request.json())["spec"]["resourceAttributes"]
            right = f"{asked['verb']} {asked['resource']}" + (
                "/" + asked["subresource"] if asked["subresource"] else ""
            )
            return web.json_response({"status": {"allowed": right not in self.forbidden}})
        if name == "get namespaces":
            return status(404, request.path.rpartition("/")[2])
        parts = request.path.split("/")
        namespace, last = parts[4], parts[6] if len(parts) > 6 else ""
        if name == "watch pods":
            return await self._watch(request)
        if name == "list events":
            about = request.query["fieldSelector"].partition("involvedObject.name=")[2].partition(",")[0]
            items = [each for each in self.events if each["involvedObject"]["name"] == about]
            return web.json_response(recorded_json("k8s-events.json") | {"items": items})
        if subresource == "log":
            lines = self.log.splitlines(keepends=True)[-int(request.query["tailLines"]) :]
            return web.Response(text="".join(lines)[: int(request.query["limitBytes"])])
        if kind == "configmaps":
            metadata = {"kind": "PartialObjectMetadata", "metadata": {"name": last}}
            return web.json_response(metadata) if last in self.config_maps else status(404, last)
        if kind == "secrets":
            return await self._secret(verb, last, request)
        if verb == "list":
            return web.json_response(self._page(namespace, request.query))
        if verb == "create":
            return await self._create(namespace, await request.json())
        found = self.pods.get((namespace, last))
        if found is None:
            return status(404, last)
        if verb == "delete":
            return self._delete(found, await request.json())
        if verb == "patch":
            return self._patch(found, await request.json())
        return web.json_response(found)

    async def _create(self, namespace: str, body: dict[str, Any]) -> web.Response:
        key = namespace, body["metadata"]["name"]
        if key in self.pods:
            return status(409, key[1])
        value = copy.deepcopy(body)
        value["metadata"]["uid"] = f"00000000-0000-4000-8000-{next(_uids):012d}"
        value["status"] = recorded_json("k8s-pod-pending.json")["status"]
        return web.json_response(self.put(value), status=201)

    def _delete(self, found: dict[str, Any], body: Mapping[str, Any]) -> web.Response:
        metadata = found["metadata"]
        if any(metadata[key] != value for key, value in body.get("preconditions", {}).items()):
            return web.json_response(recorded_json("k8s-status-409-precondition.json"), status=409)
        deletion = {"deletionTimestamp": "2026-11-23T03:20:30Z", "deletionGracePeriodSeconds": 30}
        if metadata.get("finalizers") or found["status"]["phase"] == "Running":
            self.put({**found, "metadata": metadata | deletion})
        else:
            self.remove(found)
        return web.json_response(found)

    def _patch(self, found: dict[str, Any], body: dict[str, Any]) -> web.Response:
        metadata = found["metadata"]
        version = body["metadata"].pop("resourceVersion", metadata["resourceVersion"])
        if version != metadata["resourceVersion"]:
            return status(409, metadata["name"])
        return web.json_response(self.put({**found, "metadata": metadata | body["metadata"]}))

    async def _secret(self, verb: str, name: str, request: web.Request) -> web.Response:
        body = await request.json() if request.body_exists else {}
        if verb == "create":
            name = body["metadata"]["name"]
            if name in self.secrets:
                return status(409, name)
            self.secrets[name] = body
            return web.json_response(body, status=201)
        if name not in self.secrets:
            return status(404, name)
        if verb == "delete":
            return web.json_response(self.secrets.pop(name))
        if verb == "patch":
            known = self.secrets[name]
            self.secrets[name] = known | body | {"metadata": known["metadata"] | body["metadata"]}
        return web.json_response(self.secrets[name])

    def _page(self, namespace: str, query: Mapping[str, str]) -> dict[str, Any]:
        page = recorded_json("k8s-page.json")
        pods = [value for (ns, _), value in sorted(self.pods.items()) if ns == namespace and _selected(value, query)]
        begin, limit = int(query.get("continue", 0)), int(query.get("limit", 10**6))
        metadata = {"resourceVersion": str(self.version)}
        if begin + limit < len(pods):
            metadata["continue"] = str(begin + limit)
        return page | {"metadata": metadata, "items": pods[begin : begin + limit]}

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        stream: asyncio.Queue[bytes | None] = asyncio.Queue()
        if version < self.oldest:
            stream.put_nowait(watch_lines()[-1])
            stream.put_nowait(None)
        for at, line in self._history:
            if at > version >= self.oldest:
                stream.put_nowait(line)
        self.streams.append(stream)
        asyncio.get_running_loop().call_later(int(request.query["timeoutSeconds"]), stream.put_nowait, None)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            while (sent := await stream.get()) is not None:
                await response.write(sent)
        finally:
            self.streams = [each for each in self.streams if each is not stream]
        return response


def jobs(values: Iterable[Mapping[str, Any]]) -> list[JobRef]:
    return [ref(value) for value in values]


_VERBS: Mapping[str, Callable[[bool], str]] = {
    "GET": lambda one: "get" if one else "list",
    "POST": lambda _: "create",
    "PATCH": lambda _: "patch",
    "DELETE": lambda _: "delete",
}


def _name(request: web.Request) -> str:
    """``/api/v1/namespaces/spark/pods/name/log`` → ``get pods/log``."""
    parts = request.path.strip("/").split("/")
    if parts[:3] != ["api", "v1", "namespaces"] or len(parts) == 4:
        kind = "namespaces" if len(parts) == 4 and parts[0] == "api" else parts[-1]
        return f"{_VERBS[request.method](True)} {kind}"
    verb = "watch" if "watch" in request.query else _VERBS[request.method](len(parts) > 5)
    return f"{verb} {parts[4]}" + (f"/{parts[6]}" if len(parts) > 6 else "")


def _selected(value: Mapping[str, Any], query: Mapping[str, str]) -> bool:
    labels = value["metadata"]["labels"]
    terms = [term for term in query.get("labelSelector", "").split(",") if term]
    return all(
        term[1:] not in labels
        if term.startswith("!")
        else labels.get(term.partition("=")[0]) == term.partition("=")[2]
        if "=" in term
        else term in labels
        for term in terms
    )


async def until(condition: Callable[[], object], what: str = "what the test waits for") -> None:
    """Wait until something is so; ten seconds at most."""

    async def holds() -> bool:
        return bool(condition())

    await wait_until_async(holds, 10, what, interval=0.01)
