"""
What becomes of all followed pods, from one LIST and one WATCH per namespace.

What flows in: the names of the followed jobs. What flows out: the last status of every pod that carries our label,
and a signal when one has changed. Whoever joins late finds his pod's status here; the pods themselves are not kept.

Streams end, and what ends them decides what is done:

* The server ends it, or the connection breaks: it is watched on from the last resource version.
* 410, as a status or as an event inside a 200 (a restarted API server has no history): it is listed anew.
* Nothing for longer than bookmarks take: the server hangs, and :meth:`Watches.changes` raises.
* From time to time it is listed anew all the same.

The trap: an event may have been missed in all that, so a pod that a new list lacks is no verdict. It is asked for by
name, and if it is gone, its end was not seen. A pod from which our label is taken is told of as deleted, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Collection, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from durable_spark.hooks._http import ConnectionLost, whole_characters
from durable_spark.hooks._kubernetes_api import Api, Gone
from durable_spark.hooks._kubernetes_status import TOKEN, place_of, read_pod
from durable_spark.jobs import ClusterUnreachable, InvalidAnswer, JobRef, JobStatus

if TYPE_CHECKING:
    from durable_spark.hooks._kubernetes_links import LinkTemplates

__all__ = ["Watches"]

EVENT_LIMIT = 8 << 20
"""Bytes that one event may have."""
WATCH_SECONDS = 300
"""After about as long the API server is to end a stream, so that one that died unnoticed does not last."""
BOOKMARK_SECONDS = 90.0
"""The API server sends a bookmark about once a minute: silence for longer means that it hangs."""
RELIST_SECONDS = 600.0
"""After about as long all is listed anew, in case an event was missed."""
AT_ONCE = 500
"""Pods of a list that are taken up in one turn of the event loop."""
SHORTEST_STREAM = 1.0
"""Seconds between two beginnings of a watch, for a server that ends each at once."""

log = logging.getLogger(__name__)


class Watches:
    """
    The watches of one hook, one per namespace. An asynchronous context manager: leaving it ends them.

    :param api: the API server.
    """

    def __init__(
        self, api: Api, *, bookmark_seconds: float = BOOKMARK_SECONDS, relist_seconds: float = RELIST_SECONDS
    ) -> None:
        self._api = api
        self._bookmark_seconds = bookmark_seconds
        self._relist_seconds = relist_seconds
        self._pods: dict[str, dict[str, JobStatus]] = {}
        self._changed: set[str] = set()
        self._news = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._listed: dict[str, asyncio.Event] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def open(self, namespaces: Iterable[str]) -> None:
        """
        Watch these namespaces, too. Returns when each has been listed.

        :raises ClusterError: a list failed.
        """
        for namespace in namespaces:
            if namespace not in self._tasks:
                self._listed[namespace] = asyncio.Event()
                self._tasks[namespace] = asyncio.create_task(self._follow(namespace), name=f"watch of {namespace}")
        for namespace, listed in list(self._listed.items()):
            if not listed.is_set():
                await _first(listed.wait(), self._tasks[namespace])
        self._raise_what_failed()

    def status(self, job: JobRef) -> JobStatus | None:
        """Return the last status of a pod of the job's name with our label, or ``None``."""
        namespace, name = place_of(job)
        return self._pods.get(namespace, {}).get(name)

    def explain(self, status: JobStatus, message: str) -> JobStatus | None:
        """Give a status a better message and return it; ``None`` if it is no longer the last one."""
        namespace, name = place_of(status.job)
        pods = self._pods.get(namespace, {})
        if pods.get(name) != status:
            return None
        pods[name] = dataclasses.replace(status, message=message)
        return pods[name]

    def take_changes(self) -> Collection[str]:
        """Return the IDs of jobs that have changed, each change once."""
        changed, self._changed = self._changed, set()
        self._news.clear()
        return changed

    async def changes(self, *, until: Awaitable[object]) -> AsyncGenerator[Collection[str], None]:
        """
        Yield the IDs of jobs that have changed, as soon as they do, until something else is done.

        :raises ClusterError: a watch has failed.
        """
        ending = asyncio.ensure_future(until)
        try:
            while not ending.done():
                await _first(self._news.wait(), ending, *self._tasks.values())
                self._raise_what_failed()
                if self._changed:
                    yield self.take_changes()
            await ending
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    def _raise_what_failed(self) -> None:
        for task in self._tasks.values():
            if task.done():
                task.result()
                raise ClusterUnreachable("a watch ended")

    # --- one namespace

    async def _follow(self, namespace: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            version: str | None = await self._list(namespace)
            relist_at = loop.time() + self._relist_seconds * random.uniform(0.8, 1.2)  # noqa: S311 jitter
            while version is not None and loop.time() < relist_at:
                began = loop.time()
                version = await self._watch(namespace, version, until=relist_at)
                await asyncio.sleep(max(0.0, began + SHORTEST_STREAM - loop.time()))

    async def _list(self, namespace: str) -> str:
        try:
            statuses, version = await self._statuses(namespace)
        except Gone:  # a long list may outlive its own continue token
            statuses, version = await self._statuses(namespace)
        before = self._pods.get(namespace, {})
        pods: dict[str, JobStatus] = {}
        for number, status in enumerate(statuses, start=1):
            _, name = place_of(status.job)
            known = before.get(name)
            if known == status:
                pods[name] = known
            else:
                pods[name] = status
                self._changed.add(status.job.id)
            if not number % AT_ONCE:
                await asyncio.sleep(0)
        self._pods[namespace] = pods
        self._changed.update(status.job.id for name, status in before.items() if name not in pods)
        self._news.set()
        self._listed[namespace].set()
        return version

    async def _statuses(self, namespace: str) -> tuple[list[JobStatus], str]:
        return await self._api.pods(namespace, selector=TOKEN, keep=lambda pod: pod.status)

    async def _watch(self, namespace: str, version: str, *, until: float) -> str | None:
        """Return the resource version to go on from, ``None`` to list anew."""
        left = until - asyncio.get_running_loop().time()
        seconds = max(1, round(min(left, WATCH_SECONDS * random.uniform(0.8, 1.0))))  # noqa: S311 jitter
        links = (await self._api.settings()).links
        try:
            async with self._api.watch(
                namespace, selector=TOKEN, version=version, seconds=seconds, read_timeout=self._bookmark_seconds
            ) as stream:
                try:
                    async for lines in stream.lines(limit=EVENT_LIMIT):
                        for line in lines:
                            kind, value = _event(line)
                            if kind != "BOOKMARK":
                                await self._take(namespace, value, deleted=kind == "DELETED", links=links)
                            version = _version(value) or version
                        await asyncio.sleep(0)
                except ConnectionLost as error:
                    log.debug("The watch of %s broke and goes on: %s", namespace, error)
        except Gone:
            return None
        return version

    async def _take(self, namespace: str, value: Mapping[str, Any], *, deleted: bool, links: LinkTemplates) -> None:
        """Take up what a watch tells of a pod. It calls one deleted, too, from which only our label was taken."""
        status = read_pod(value, namespace=namespace, links=links).status
        if deleted and not status.state.final:
            _, name = place_of(status.job)
            pod = await self._api.pod(namespace, name)
            if pod is not None and pod.status.job == status.job:
                self._pods[namespace].pop(name, None)  # from now on it is asked for by name
                self._tell(status)
                return
            status = read_pod(value, namespace=namespace, deleted=True, links=links).status
        self._keep(status)

    def _keep(self, status: JobStatus) -> None:
        namespace, name = place_of(status.job)
        pods = self._pods.setdefault(namespace, {})
        if pods.get(name) != status:
            pods[name] = status
            self._tell(status)

    def _tell(self, status: JobStatus) -> None:
        self._changed.add(status.job.id)
        self._news.set()


def _event(line: bytes) -> tuple[str, Mapping[str, Any]]:
    """
    Return the kind of an event and its object.

    :raises Gone: the resource version is too old.
    :raises ClusterUnreachable: any other error of the API server.
    :raises InvalidAnswer: for what is no event.
    """
    try:
        event = json.loads(whole_characters(line.decode()))
        kind, value = event["type"], event["object"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidAnswer(f"the API server sent what is no event: {line[:200]!r}") from error
    if not isinstance(value, Mapping):
        raise InvalidAnswer(f"the API server sent an event without an object: {line[:200]!r}")
    if kind == "ERROR":
        message = str(value.get("message"))[:300]
        if value.get("code") == 410:
            raise Gone(message)
        raise ClusterUnreachable(f"the watch failed ({value.get('code')}): {message}", retry_after=_seconds(value))
    if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK"):
        raise InvalidAnswer(f"the API server sent an event of the kind {str(kind)[:40]!r}")
    return kind, value


def _seconds(status: Mapping[str, Any]) -> float | None:
    details = status.get("details")
    seconds = details.get("retryAfterSeconds") if isinstance(details, Mapping) else None
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not 0 <= seconds < 1 << 31:
        return None
    return float(seconds)


def _version(value: Mapping[str, Any]) -> str | None:
    metadata = value.get("metadata")
    version = metadata.get("resourceVersion") if isinstance(metadata, Mapping) else None
    return version if isinstance(version, str) else None


async def _first(wait: Coroutine[Any, Any, Any], *others: asyncio.Future[Any]) -> None:
    """Return when the first of them is done; what was begun here is ended here."""
    waiting = asyncio.ensure_future(wait)
    try:
        await asyncio.wait([waiting, *others], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
