"""
One node of a Kubernetes cluster, without containers: it schedules pods and runs them as processes of this machine.

It is the scheduler and the kubelet of :class:`dev.kubernetes.KubernetesCluster`. What flows in are the pods
that the API server tells of; what flows out is what those two report, with their words: the binding, the
pod's status, events, and the log, which the API server fetches from here. The first container of each pod is
run by :mod:`dev.kubernetes_pod`, from one of the few images that :mod:`dev.kubernetes_container` knows.

What it leaves out: init containers and sidecars, probes, restarts, limits, ``readOnly``, security contexts,
persistent volumes, timestamps in logs.

The trap: pods die with the node, as they do not with a real kubelet, which adopts them. A node that is started
again reports those that it finds running as a kubelet does that has lost their containers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import sys
import traceback
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import aiohttp
from aiohttp import web

from dev.kubernetes_client import Api, Object, Refused
from dev.kubernetes_container import Image, Inputs, NotYet, expand, image_named, mount_point

_RUNNER = Path(__file__).with_name("kubernetes_pod.py")
_MERGE = "application/merge-patch+json"
_DEADLINE_EXCEEDED = "Pod was active on the node longer than the specified deadline"
_LOST = "The container could not be located when the pod was terminated"
_UNSCHEDULABLE = (
    "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector. no new claims to deallocate, "
    "preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."
)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Pod:
    """One pod of the node, from its first sight to its deletion."""

    def __init__(self, node: _Node, manifest: Object) -> None:
        self._node = node
        self._api = node.api
        self.manifest = manifest
        metadata = manifest["metadata"]
        self.name, self.namespace, self.uid = metadata["name"], metadata["namespace"], metadata["uid"]
        self._path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        self._directory: Path = node.directory / self.uid
        self.log = self._directory / "log"
        self.finished = False
        self._container: Object = manifest["spec"]["containers"][0]
        self._process: asyncio.subprocess.Process | None = None
        self._ip = ""
        self._started = ""
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._live())
        self._task.add_done_callback(_print_error)

    def update(self, manifest: Object) -> None:
        """Take note of what the API server says now."""
        self.manifest = manifest
        self._changed.set()

    def forget(self) -> None:
        """Kill what runs: the API server knows the pod no longer."""
        self._task.cancel()

    async def _live(self) -> None:
        status = self.manifest.get("status", {})
        try:
            if status.get("phase") == "Running" or (status.get("phase") == "Pending" and self.log.exists()):
                await self._report_loss(status)
            elif status.get("phase") not in ("Succeeded", "Failed"):
                await self._schedule()
                await self._run()
            self.finished = True
            self._give_address_back()
            while not self._deleted():
                await self._change()
            await self._remove()
            await asyncio.Event().wait()  # it may have finalizers
        finally:
            self._clean()

    def _clean(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._give_address_back()

    def _give_address_back(self) -> None:
        """Let another pod have the address: one that has ended, and is kept, needs none."""
        address, self._ip = self._ip, ""
        self._node.release(address)

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _deleted(self) -> bool:
        return "deletionTimestamp" in self.manifest["metadata"]

    # The scheduler

    async def _schedule(self) -> None:
        while not self.manifest["spec"].get("nodeName"):
            if self._deleted() or self.manifest["spec"].get("schedulingGates"):
                await self._change()
            elif self._node.matches(self.manifest["spec"].get("nodeSelector", {})):
                return await self._bind()
            else:
                await self._report_unschedulable()
                await self._change()
        return None

    async def _bind(self) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": self._node.name}
        binding = {"metadata": {"name": self.name, "uid": self.uid}, "target": target}
        try:
            await self._api.request("POST", f"{self._path}/binding", binding)
        except Refused as error:
            if error.status != 409:  # an earlier try, the answer to which was lost
                raise
        message = f"Successfully assigned {self.namespace}/{self.name} to {self._node.name}"
        self._event("Scheduled", message, component="default-scheduler")

    async def _report_unschedulable(self) -> None:
        conditions = self.manifest.get("status", {}).get("conditions", [])
        if any(condition.get("reason") == "Unschedulable" for condition in conditions):
            return
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": _UNSCHEDULABLE}
        await self._patch({"conditions": [{**condition, "lastTransitionTime": _now()}]})
        self._event("FailedScheduling", _UNSCHEDULABLE, warning=True, component="default-scheduler")

    # The kubelet

    async def _run(self) -> None:
        self._started = self.manifest.get("status", {}).get("startTime") or _now()
        await self._report("Pending", {"waiting": {"reason": "ContainerCreating"}})
        starting = asyncio.create_task(self._start())
        try:
            why = await self._until_done_or_stopped(starting)
        finally:
            started = starting.done() or not starting.cancel()
        if not started:
            if self._process:
                self._process.kill()
            await self._report("Failed", {"waiting": {"reason": "ContainerCreating"}}, **self._exceeded(why))
            return
        if failure := starting.result():
            await self._report("Failed", failure)
            return
        await self._follow()

    async def _follow(self) -> None:
        """Report the process that runs, and its end."""
        assert self._process is not None
        began = _now()
        await self._report("Running", {"running": {"startedAt": began}})
        exit_code = asyncio.create_task(self._process.wait())
        why = await self._until_done_or_stopped(exit_code)
        if not exit_code.done():
            await self._end(exit_code)
        code = exit_code.result()
        code = code if code >= 0 else 128 - code
        ended = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            **self._last_words(code),
            "startedAt": began,
            "finishedAt": _now(),
            "containerID": f"process://{self._process.pid}",
        }
        failed = code or why == "deadline"
        await self._report("Failed" if failed else "Succeeded", {"terminated": ended}, **self._exceeded(why))

    async def _until_done_or_stopped(self, task: asyncio.Task[Any]) -> Literal["", "deleted", "deadline"]:
        """Wait for a task as long as the pod may live; return why it may not."""
        while not task.done():
            if self._deleted():
                return "deleted"
            left = self._left()
            if left is not None and left <= 0:
                return "deadline"
            await self._done_or_change(task, left)
        return ""

    async def _done_or_change(self, task: asyncio.Task[Any], timeout: float | None) -> None:
        change = asyncio.create_task(self._change())
        try:
            await asyncio.wait({task, change}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()

    def _left(self) -> float | None:
        """Return how many seconds the pod may still be active."""
        allowed: int | None = self.manifest["spec"].get("activeDeadlineSeconds")
        if allowed is None:
            return None
        began = datetime.strptime(self._started, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        return began.timestamp() + allowed - datetime.now(timezone.utc).timestamp()

    @staticmethod
    def _exceeded(why: str) -> dict[str, str]:
        return {"reason": "DeadlineExceeded", "message": _DEADLINE_EXCEEDED} if why == "deadline" else {}

    async def _end(self, exit_code: asyncio.Task[int]) -> None:
        """Send SIGTERM, and SIGKILL when the grace period is over; a later deletion may make it shorter."""
        assert self._process is not None
        self._event("Killing", f"Stopping container {self._container['name']}")
        self._process.send_signal(signal.SIGTERM)
        clock = asyncio.get_running_loop().time
        until = clock() + self._grace()
        while not exit_code.done() and clock() < until:
            await self._done_or_change(exit_code, until - clock())
            until = min(until, clock() + self._grace())
        if not exit_code.done():
            self._process.kill()
        await exit_code

    def _grace(self) -> float:
        default = self.manifest["spec"].get("terminationGracePeriodSeconds", 30)
        return float(self.manifest["metadata"].get("deletionGracePeriodSeconds", default))

    async def _remove(self) -> None:
        only = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        with contextlib.suppress(Refused):  # it has gone, and another may have its name
            await self._api.request("DELETE", self._path, only)

    async def _start(self) -> Object | None:
        """Start the process; return the container's state if it cannot be."""
        specification = await self._prepare()
        reader, error = socket.socketpair()
        with self.log.open("wb") as log, error:
            command = [sys.executable, "-IS", str(_RUNNER), str(specification), str(error.fileno())]
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[error.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        stream, writer = await asyncio.open_connection(sock=reader)
        message = (await stream.read()).decode()  # it ends when the command runs
        writer.close()
        name = self._container["name"]
        if not message:
            self._event("Started", f"Started container {name}")
            return None
        self._event("Failed", f"Error: failed to create containerd task: {message}", warning=True)
        ended = {"startedAt": "1970-01-01T00:00:00Z", "finishedAt": _now(), "message": message}
        return {"terminated": {"exitCode": 128, "reason": "StartError", **ended}}

    async def _prepare(self) -> Path:
        """Return the file that specifies the process, when all that it needs is there."""
        problem: NotYet | None = None
        delay = 0.2
        while True:
            try:
                return await self._specification(problem)
            except NotYet as error:
                new = problem is None or (error.reason, error.about) != (problem.reason, problem.about)
                if new:
                    waiting = {"reason": error.reason, **({"message": error.message} if error.message else {})}
                    await self._report("Pending", {"waiting": waiting})
                if new or error.event == "FailedMount":  # which is told at each try
                    self._event(error.event, error.about, warning=True)
                problem = error
            await asyncio.sleep(delay)
            delay = min(2 * delay, 2.0)

    async def _specification(self, problem: NotYet | None) -> Path:
        spec, container = self.manifest["spec"], self._container
        self._ip = self._ip or self._node.new_address()
        inputs = Inputs(self._api, self.manifest, self._fields())
        mounts = container.get("volumeMounts", [])
        mounted = {entry["name"] for entry in mounts}  # what nobody mounts may be missing
        volumes = {
            volume["name"]: await inputs.volume(volume, self._directory / "volumes" / volume["name"])
            for volume in spec.get("volumes", [])
            if volume["name"] in mounted
        }
        image = await self._pulled(problem)
        builtin = {**image.environment, **self._node.service_variables, "HOSTNAME": self.name}
        builtin["SPARK_LOCAL_IP"] = self._ip  # or Spark asks which address the machine's name has
        environment = await inputs.variables(container, builtin)
        arguments = [expand(part, environment) for part in container.get("args", [])]
        command = [expand(part, environment) for part in container.get("command", [])]
        specification = {
            "command": [*command, *arguments] if command else list(image.command(arguments, environment)),
            "environment": environment,
            "directory": container.get("workingDir") or "/",
            "mounts": [mount_point(entry, volumes) for entry in mounts],
            "root": str(self._directory / "root"),
            "parent": os.getpid(),
        }
        (self._directory / "root").mkdir(parents=True, exist_ok=True)
        file = self._directory / "pod.json"
        file.write_text(json.dumps(specification))
        return file

    def _fields(self) -> dict[str, str]:
        return {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "metadata.uid": self.uid,
            "spec.nodeName": self._node.name,
            "spec.serviceAccountName": self.manifest["spec"].get("serviceAccountName", "default"),
            "status.hostIP": "127.0.0.1",
            "status.hostIPs": "127.0.0.1",
            "status.podIP": self._ip,
            "status.podIPs": self._ip,
        }

    async def _pulled(self, problem: NotYet | None) -> Image:
        name = self._container["image"]
        if image := await image_named(name):
            self._event("Pulled", f'Container image "{name}" already present on machine')
            return image
        if self._container.get("imagePullPolicy") == "Never":
            message = f'Container image "{name}" is not present with pull policy of Never'
            raise NotYet("ErrImageNeverPull", message, event="ErrImageNeverPull")
        if problem and problem.reason in ("ErrImagePull", "ImagePullBackOff"):
            message = f'Back-off pulling image "{name}"'
            raise NotYet("ImagePullBackOff", message, event="BackOff")
        message = f'failed to pull and unpack image "{name}": failed to resolve reference "{name}": not found'
        raise NotYet("ErrImagePull", message, event="Failed", about=f'Failed to pull image "{name}": {message}')

    def _last_words(self, code: int) -> dict[str, str]:
        if not code or self._container.get("terminationMessagePolicy") != "FallbackToLogsOnError":
            return {}
        lines = self.log.read_bytes()[-2048:].splitlines(keepends=True)[-80:]
        return {"message": b"".join(lines).decode(errors="replace")}

    async def _report_loss(self, status: Object) -> None:
        self._started, self._ip = status.get("startTime", _now()), status.get("podIP", "")
        ended = {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": _LOST}
        await self._report("Failed", {"terminated": {**ended, "startedAt": None, "finishedAt": None}})

    async def _report(
        self, phase: str, state: Object, *, reason: str | None = None, message: str | None = None
    ) -> None:
        running, done = "running" in state, phase in ("Succeeded", "Failed")
        unready = f"Pod{'Completed' if phase == 'Succeeded' else phase}" if done else "ContainersNotReady"
        conditions = [
            {"type": kind, "status": str(ok).capitalize(), "lastTransitionTime": _now()}
            | ({} if ok or kind == "PodReadyToStartContainers" else {"reason": unready})
            for kind, ok in (
                ("PodReadyToStartContainers", running),
                ("Initialized", True),
                ("Ready", running),
                ("ContainersReady", running),
                ("PodScheduled", True),
            )
        ]
        container = {
            "name": self._container["name"],
            "image": self._container["image"],
            "imageID": "",
            "ready": running,
            "started": running,
            "restartCount": 0,
            "state": state,
            "lastState": {},
        }
        if running and self._process:
            container["containerID"] = f"process://{self._process.pid}"
        address = {"podIP": self._ip, "podIPs": [{"ip": self._ip}]} if running else {}
        await self._patch(
            {
                "phase": phase,
                "reason": reason,
                "message": message,
                "startTime": self._started,
                "hostIP": "127.0.0.1",
                **address,
                "conditions": conditions,
                "containerStatuses": [container],
            }
        )

    async def _patch(self, status: Object) -> None:
        body = {"metadata": {"uid": self.uid}, "status": status}
        try:
            await self._api.request("PATCH", f"{self._path}/status", body, kind=_MERGE)
        except Refused as error:
            if error.status not in (404, 409):  # it has gone, and another may have its name
                raise

    def _event(self, reason: str, message: str, *, warning: bool = False, component: str = "kubelet") -> None:
        about = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "namespace": self.namespace, "uid": self.uid}
        self._node.emit(about, reason, message, "Warning" if warning else "Normal", component)


def _print_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()):
        traceback.print_exception(type(error), error, error.__traceback__)


class _Node:
    """The node: which pods it has, and its face towards the API server."""

    def __init__(self, api: Api, options: argparse.Namespace) -> None:
        self.api = api
        self.name: str = options.name
        self.directory: Path = options.directory
        self._port: int = options.port
        self._labels = {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", **json.loads(options.labels)}
        self._pods: dict[str, _Pod] = {}
        self._events: asyncio.Queue[Object] = asyncio.Queue()
        self._told: dict[tuple[str, str, str], Object] = {}
        # The port is nobody else's on this machine, so these are not, either: 127.78.0.1 to 127.117.255.254.
        network = f"127.{self._port >> 8}.{self._port & 255}"
        self._addresses = [f"{network}.{last}" for last in range(1, 255)]
        host, port = re.findall(r"//(.*):(\d+)$", options.url)[0]
        self.service_variables = {
            "KUBERNETES_SERVICE_HOST": host,
            "KUBERNETES_SERVICE_PORT": port,
            "KUBERNETES_SERVICE_PORT_HTTPS": port,
            "KUBERNETES_PORT": f"tcp://{host}:{port}",
        }

    def matches(self, selector: Mapping[str, str]) -> bool:
        """Whether the node has all these labels."""
        return selector.items() <= self._labels.items()

    def new_address(self) -> str:
        """Return an address of 127.0.0.0/8 that no other pod has."""
        return self._addresses.pop(0)

    def release(self, address: str) -> None:
        """Give an address back."""
        if address and address not in self._addresses:  # an earlier node's pod may have had it
            self._addresses.append(address)

    async def run(self, context: ssl.SSLContext) -> None:
        """Be a node, for ever."""
        await self._serve_logs(context)
        await self._register()
        await asyncio.gather(self._follow_pods(), self._send_events())

    async def _register(self) -> None:
        with contextlib.suppress(Refused):  # it has been one before
            await self.api.request("POST", "/api/v1/nodes", {"metadata": {"name": self.name, "labels": self._labels}})
        size = {"cpu": "64", "memory": "256Gi", "pods": str(len(self._addresses))}
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "kubelet is posting ready status",
        }
        status = {
            "conditions": [{**ready, "lastHeartbeatTime": _now(), "lastTransitionTime": _now()}],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._port}},
            "capacity": size,
            "allocatable": size,
            "nodeInfo": {"bootID": str(os.getpid())},
        }
        await self.api.request("PATCH", f"/api/v1/nodes/{self.name}/status", {"status": status}, kind=_MERGE)

    async def _follow_pods(self) -> None:
        while True:
            try:
                await self._list_and_watch()
            except (aiohttp.ClientError, asyncio.TimeoutError, Refused) as error:
                print(f"the watch ended: {error!r}", flush=True)
                await asyncio.sleep(0.1)

    async def _list_and_watch(self) -> None:
        """Compare what there is with what is known, then follow what happens until the watch ends."""
        pods = await self.api.request("GET", "/api/v1/pods")
        there = {manifest["metadata"]["uid"] for manifest in pods["items"]}
        for uid in self._pods.keys() - there:
            self._forget(uid)
        for manifest in pods["items"]:
            self._see(manifest)
        since = pods["metadata"]["resourceVersion"]
        async for event in self.api.watch(f"/api/v1/pods?watch=1&allowWatchBookmarks=true&resourceVersion={since}"):
            if event["type"] == "ERROR":  # such as 410: the API server has no history that far back
                return
            if event["type"] == "DELETED":
                self._forget(event["object"]["metadata"]["uid"])
            elif event["type"] != "BOOKMARK":
                self._see(event["object"])

    def _see(self, manifest: Object) -> None:
        uid = manifest["metadata"]["uid"]
        if uid in self._pods:
            self._pods[uid].update(manifest)
        elif manifest["spec"].get("nodeName") in (None, self.name):
            self._pods[uid] = _Pod(self, manifest)

    def _forget(self, uid: str) -> None:
        if pod := self._pods.pop(uid, None):
            pod.forget()

    def emit(self, about: Object, reason: str, message: str, kind: str, component: str) -> None:
        """Tell of something that happened to a pod. What happens again is counted."""
        key = (about["uid"], reason, message)
        if key in self._told:
            told = self._told[key]
            told |= {"count": told["count"] + 1, "lastTimestamp": _now()}
            return self._events.put_nowait(dict(told))
        name = f"{about['name']}.{secrets.token_hex(8)}"
        self._told[key] = {"metadata": {"name": name, "namespace": about["namespace"]}, "count": 1}
        return self._events.put_nowait(
            {
                "metadata": self._told[key]["metadata"],
                "involvedObject": about,
                "reason": reason,
                "message": message,
                "type": kind,
                "source": {"component": component, **({"host": self.name} if component == "kubelet" else {})},
                "reportingComponent": component,
                "firstTimestamp": _now(),
                "lastTimestamp": _now(),
                "count": 1,
            }
        )

    async def _send_events(self) -> None:
        while True:
            event = await self._events.get()
            path = f"/api/v1/namespaces/{event['metadata']['namespace']}/events"
            with contextlib.suppress(Refused):  # the namespace may be gone
                if event["count"] == 1:
                    await self.api.request("POST", path, event)
                else:
                    await self.api.request("PATCH", f"{path}/{event['metadata']['name']}", event, kind=_MERGE)

    async def _serve_logs(self, context: ssl.SSLContext) -> None:
        application = web.Application()
        application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._answer_log)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self._port, ssl_context=context).start()

    async def _answer_log(self, request: web.Request) -> web.StreamResponse:
        wanted = (request.match_info["namespace"], request.match_info["pod"])
        pod = next((pod for pod in self._pods.values() if (pod.namespace, pod.name) == wanted), None)
        if pod is None or not pod.log.exists() or "previous" in request.query:
            about = f'container "{request.match_info["container"]}" in pod "{wanted[1]}"'
            return web.Response(status=400, text=f"{about} is waiting to start: ContainerCreating")
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        left = int(request.query.get("limitBytes", sys.maxsize))
        with pod.log.open("rb") as log:
            content = _last_lines(log.read(), request.query.get("tailLines"))
            while True:
                await response.write(content[:left])
                left -= len(content[:left])
                finished = pod.finished  # before the rest is read
                content = log.read()
                if left == 0 or "follow" not in request.query or (finished and not content):
                    return response
                if not content:
                    await asyncio.sleep(0.05)


def _last_lines(content: bytes, count: str | None) -> bytes:
    if count is None:
        return content
    return b"".join(content.splitlines(keepends=True)[-int(count) :]) if int(count) else b""


async def main(options: argparse.Namespace) -> None:
    """Run the node until it is killed."""
    trusted = ssl.create_default_context(cafile=options.ca)
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=options.ca)
    serving.verify_mode = ssl.CERT_REQUIRED  # the API server's own certificate, or another that the authority made
    serving.load_cert_chain(options.certificate)
    headers = {"Authorization": f"Bearer {options.token_file.read_text()}"}
    connector = aiohttp.TCPConnector(ssl=trusted)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        await _Node(Api(session, options.url), options).run(serving)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m dev.kubernetes_node", description="A node whose pods are processes."
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("--url", required=True, help="of the API server")
    parser.add_argument("--ca", required=True, help="file with the authority's certificate")
    parser.add_argument("--token-file", required=True, type=Path, help="the administrator's token")
    parser.add_argument("--certificate", required=True, help="file with the node's certificate and key")
    parser.add_argument("--port", required=True, type=int, help="for the API server to ask for logs")
    parser.add_argument("--directory", required=True, type=Path, help="for the pods' volumes and logs")
    parser.add_argument("--labels", default="{}", help="JSON, further labels")
    asyncio.run(main(parser.parse_args()))
