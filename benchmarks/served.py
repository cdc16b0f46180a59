"""
A cluster with as many jobs as one likes, a process of its own: ``python -m benchmarks.served yarn --jobs 10000``.

It answers as the real one was recorded to answer (``tests/unit/hooks/recorded``), with rows of the recorded size, made
beforehand: what is measured is who asks, and not who answers. Below ``/-/`` it is told what to do, and tells what it
was asked:

* ``GET /-/connection``: the connection to it;
* ``GET /-/jobs``: ID, uid and token of each job that is ours, and where one alone is asked for;
* ``POST /-/changing?rate=10``: from now on so many of them end each second, chosen at random;
* ``GET /-/changes``: which have ended, and when (``time.monotonic``, which all processes of a machine share);
* ``GET /-/requests``: how often each request was made since it was asked last;
* ``POST /-/hang``: from now on nothing is answered.
"""

from __future__ import annotations

import abc
import argparse
import asyncio
import collections
import contextlib
import json
import random
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from email.utils import formatdate
from typing import Any

from aiohttp import web

from tests.unit.hooks.fake import driver, recorded_json
from tests.unit.hooks.fake_kubernetes import NAMESPACE, bookmark
from tests.unit.hooks.fake_kubernetes import pod as pod_of
from tests.unit.hooks.fake_yarn import app_id
from tests.unit.hooks.fake_yarn import ours as tags_of
from tests.unit.hooks.fake_yarn import row as app_of

POD_BYTES = 10_000
"""What a driver pod takes, with the fields that its API server manages."""
BOOKMARK_EVERY = 30.0
TOKEN, NAME, UID, VERSION = "7" * 32, "the-name-of-it", "00000000-0000-4000-8000-777777777777", "7777777777"
"""Stand in a template for what is a job's own."""


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def answer(body: bytes) -> web.Response:
    """Return an answer with the time, as all three send it."""
    return web.Response(
        body=body, content_type="application/json", headers={"Date": formatdate(time.time(), usegmt=True)}
    )


class Served(abc.ABC):
    """
    A cluster.

    :param jobs: how many of its jobs are ours. All of them run.
    :param others: how many are not.
    """

    def __init__(self, jobs: int, others: int) -> None:
        self.tokens = [secrets.token_hex(16) for _ in range(jobs)]
        self.others = others
        self.running = list(range(jobs))
        self.changes: list[tuple[str, float]] = []
        self.requests: collections.Counter[str] = collections.Counter()
        self.hangs = False

    @abc.abstractmethod
    def id_of(self, number: int) -> tuple[str, str]:
        """Return a job's ID and uid."""

    @abc.abstractmethod
    def path_of(self, number: int) -> str:
        """Return where a job alone is asked for."""

    @abc.abstractmethod
    def end(self, number: int) -> None:
        """End a job well."""

    @abc.abstractmethod
    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""

    @abc.abstractmethod
    def connection(self, port: int) -> dict[str, Any]:
        """Return the connection to it."""

    async def change(self, rate: float) -> None:
        """End jobs, so many each second."""
        began, ended = time.monotonic(), 0
        while self.running:
            await asyncio.sleep(0.02)
            while self.running and ended < (time.monotonic() - began) * rate:
                number = self.running.pop(random.randrange(len(self.running)))
                self.end(number)
                self.changes.append((self.id_of(number)[0], time.monotonic()))
                ended += 1


class Standalone(Served):
    def __init__(self, jobs: int, others: int) -> None:
        super().__init__(jobs, others)
        self.entries = [driver(number, "RUNNING") for number in range(jobs + others)]
        self.rows = [compact(entry) for entry in self.entries]
        self.ended: list[int] = []
        page = recorded_json("page.json")
        self.head = compact(page | {"activedrivers": ["ACTIVE"], "completeddrivers": ["COMPLETED"]})

    def id_of(self, number: int) -> tuple[str, str]:
        return self.entries[number]["id"], ""

    def path_of(self, number: int) -> str:
        return f"/v1/submissions/status/{self.id_of(number)[0]}"

    def end(self, number: int) -> None:
        self.entries[number]["state"] = "FINISHED"
        self.rows[number] = compact(self.entries[number])
        self.ended.append(number)

    def connection(self, port: int) -> dict[str, Any]:
        extra = {"rest-port": port, "ui-port": port}
        return {"conn_type": "durable_spark", "host": "spark://127.0.0.1", "port": port, "extra": extra}

    async def serve(self, request: web.Request) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            active = [*self.running, *range(len(self.tokens), len(self.rows))]
            text = self.head.replace('"ACTIVE"', ",".join(self.rows[number] for number in active))
            return answer(text.replace('"COMPLETED"', ",".join(self.rows[number] for number in self.ended)).encode())
        entry = self.entries[int(request.path.rpartition("-")[2])]
        told = {"driverState": entry["state"], "submissionId": entry["id"]}
        return answer(compact(recorded_json("status-finished.json") | told).encode())


class Yarn(Served):
    def __init__(self, jobs: int, others: int) -> None:
        super().__init__(jobs, others)
        template = compact(app_of(1, tags=tags_of(TOKEN)))
        self.started = time.time() - 3600
        self.rows = [
            template.replace(app_id(1), app_id(number)).replace(TOKEN, token)
            for number, token in enumerate(self.tokens, 1)
        ]
        self.ended: list[tuple[float, int]] = []
        self.foreign = compact(app_of(0, tags="somebody-elses"))

    def id_of(self, number: int) -> tuple[str, str]:
        return app_id(number + 1), ""

    def path_of(self, number: int) -> str:
        return f"/ws/v1/cluster/apps/{self.id_of(number)[0]}"

    def end(self, number: int) -> None:
        now = int(time.time() * 1000)
        entry = json.loads(self.rows[number]) | {
            "state": "FINISHED",
            "finalStatus": "SUCCEEDED",
            "finishedTime": now,
        }
        self.rows[number] = compact(entry)
        self.ended.append((now, number))

    def connection(self, port: int) -> dict[str, Any]:
        extra = {"yarn_resourcemanager_webapp_address": f"http://127.0.0.1:{port}"}
        return {"conn_type": "durable_spark", "host": "yarn", "extra": extra}

    async def serve(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/ws/v1/cluster/")
        if path == "info":
            told = recorded_json("yarn-info.json")["clusterInfo"]
            return answer(compact({"clusterInfo": told | {"startedOn": int(self.started * 1000)}}).encode())
        if path == "apps":
            return answer(f'{{"apps":{{"app":[{",".join(self._selected(request))}]}}}}'.encode())
        if match := re.fullmatch(r"apps/application_\d+_(\d+)", path):
            return answer(f'{{"app":{self.rows[int(match[1]) - 1]}}}'.encode())
        if path == "/conf":
            return web.Response(status=404, text="Property not found")
        return web.Response(status=404, text="<html>no such page</html>", content_type="text/html")

    def _selected(self, request: web.Request) -> Iterator[str]:
        """Give the rows that a query asks for, as a ResourceManager selects them."""
        begin, states = request.query.get("finishedTimeBegin"), request.query.get("states", "")
        if begin is not None:
            yield from (self.rows[number] for at, number in self.ended if at >= int(begin))
        else:
            yield from (self.rows[number] for number in self.running)
            if "FINISHED" in states or not states:
                yield from (self.rows[number] for _, number in self.ended)
        if not request.query.get("applicationTags"):
            yield from (self.foreign for _ in range(self.others))


class Kubernetes(Served):
    def __init__(self, jobs: int, others: int) -> None:
        super().__init__(jobs, others)
        self.templates = {phase: self._template(phase) for phase in ("Running", "Succeeded")}
        self.version = 1000
        self.names = [f"{NAME}-{token}" for token in self.tokens]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.pods = [self._pod(number, "Running") for number in range(jobs)]
        self.streams: list[asyncio.Queue[bytes]] = []
        self.history: list[tuple[int, bytes]] = []

    @staticmethod
    def _template(phase: str) -> str:
        value = pod_of(TOKEN, phase, name=NAME, uid=UID, resourceVersion=VERSION)
        padding = "x" * max(0, POD_BYTES - len(compact(value)) - 100)
        value["metadata"]["managedFields"] = [{"manager": "kubelet", "fieldsV1": {"f:padding": padding}}]
        return compact(value)

    def _pod(self, number: int, phase: str) -> str:
        self.version += 1
        text = self.templates[phase].replace(f'"{NAME}"', f'"{self.names[number]}"').replace(TOKEN, self.tokens[number])
        return text.replace(UID, self.id_of(number)[1]).replace(VERSION, str(self.version))

    def id_of(self, number: int) -> tuple[str, str]:
        return f"{NAMESPACE}:{self.names[number]}", f"00000000-0000-4000-8000-{number:012d}"

    def path_of(self, number: int) -> str:
        return f"/api/v1/namespaces/{NAMESPACE}/pods/{self.names[number]}"

    def end(self, number: int) -> None:
        self.pods[number] = self._pod(number, "Succeeded")
        line = f'{{"type":"MODIFIED","object":{self.pods[number]}}}\n'.encode()
        self.history.append((self.version, line))
        for stream in self.streams:
            stream.put_nowait(line)

    def connection(self, port: int) -> dict[str, Any]:
        extra = {"namespace": NAMESPACE}
        return {"conn_type": "durable_spark", "host": f"k8s://http://127.0.0.1:{port}", "password": "t", "extra": extra}

    async def serve(self, request: web.Request) -> web.StreamResponse:
        name = request.path.rpartition("/")[2]
        if name == "version":
            return answer(compact(recorded_json("k8s-version.json")).encode())
        if name != "pods":
            return answer(self.pods[self.numbers[name]].encode())
        if request.query.get("watch"):
            return await self._watch(request)
        begin, limit = int(request.query.get("continue", 0)), int(request.query.get("limit", 10**6))
        items = self.pods[begin : begin + limit]
        if not request.query.get("labelSelector"):
            items = [*items, *self.pods[:1] * self.others]
        more = {"continue": str(begin + limit)} if begin + limit < len(self.pods) else {}
        page = recorded_json("k8s-page.json") | {
            "metadata": {"resourceVersion": str(self.version), **more},
            "items": [],
        }
        return answer(compact(page).replace('"items":[]', f'"items":[{",".join(items)}]').encode())

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        stream: asyncio.Queue[bytes] = asyncio.Queue()
        since = int(request.query["resourceVersion"])
        for at, line in self.history:
            if at > since:
                stream.put_nowait(line)
        self.streams.append(stream)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        until = time.monotonic() + int(request.query["timeoutSeconds"])
        try:
            while time.monotonic() < until:
                try:
                    await response.write(await asyncio.wait_for(stream.get(), BOOKMARK_EVERY))
                except asyncio.TimeoutError:
                    await response.write(bookmark(self.version))
        finally:
            self.streams.remove(stream)
        return response


CLUSTERS: dict[str, type[Served]] = {"standalone": Standalone, "yarn": Yarn, "kubernetes": Kubernetes}


class Server:
    """Serves a cluster, and what it is told to do."""

    def __init__(self, cluster: Served) -> None:
        self.cluster = cluster
        self._changing: asyncio.Task[None] | None = None

    async def run(self, port: int) -> None:
        app = web.Application()
        app.router.add_route("*", "/-/{what}", self._told)
        app.router.add_route("*", "/{path:.*}", self._asked)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
        await asyncio.Event().wait()

    async def _asked(self, request: web.Request) -> web.StreamResponse:
        kind = re.sub(r"(driver-|application_|the-name-of-it-)[\w-]+", "{one}", request.path)
        watch = " watch" if request.query.get("watch") else ""
        self.cluster.requests[f"{request.method} {kind}{watch}"] += 1
        if self.cluster.hangs:
            await asyncio.Event().wait()
        with contextlib.suppress(ConnectionResetError):
            return await self.cluster.serve(request)
        raise web.HTTPInternalServerError

    async def _told(self, request: web.Request) -> web.StreamResponse:
        cluster, what = self.cluster, request.match_info["what"]
        if what == "connection":
            return web.json_response(cluster.connection(request.url.port or 0))
        if what == "jobs":
            return web.json_response(list(self._jobs()))
        if what == "changes":
            return web.json_response(cluster.changes)
        if what == "requests":
            counted, cluster.requests = cluster.requests, collections.Counter()
            return web.json_response(counted)
        if what == "hang":
            cluster.hangs = True
        if what == "changing":
            if self._changing is not None:
                self._changing.cancel()
            self._changing = asyncio.create_task(cluster.change(float(request.query["rate"])))
        return web.json_response({})

    def _jobs(self) -> Iterable[tuple[str, str, str, str]]:
        for number, token in enumerate(self.cluster.tokens):
            yield (*self.cluster.id_of(number), token, self.cluster.path_of(number))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cluster", choices=CLUSTERS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--others", type=int, default=0)
    options = parser.parse_args()
    asyncio.run(Server(CLUSTERS[options.cluster](options.jobs, options.others)).run(options.port))


if __name__ == "__main__":
    main()
