"""
Speaking to an API server: raw JSON over HTTP, with credentials that stay fresh and errors in our own words.

What flows in: paths that are built here from validated names. What flows out: :class:`Pod`, and the exceptions of
:mod:`durable_spark.jobs`. kubernetes-asyncio loads the credentials and is not used beyond that: its typed client took
13 times as long for a watched event and 7 s for a list of 5,000 pods, and its watch does not reconnect.

The trap: not every 404 is the API server's. A proxy, or a wrong path, answers 404, too; only a ``Status`` object with
the reason ``NotFound`` says that a pod does not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

from durable_spark.hooks._http import Answer, HttpClient, Stream
from durable_spark.hooks._kubernetes_access import Access, Settings, load_access, read_settings
from durable_spark.hooks._kubernetes_status import TOKEN, Pod, place_of, read_pod, time_of
from durable_spark.jobs import (
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    InvalidAnswer,
    RequestRefused,
)

__all__ = ["Api", "Event", "Gone", "Right", "is_status", "said"]

T = TypeVar("T")

OBJECT_LIMIT = 8 << 20
"""Bytes that one object may have; etcd takes 1.5 MiB."""
PAGE_LIMIT = 128 << 20
PAGE = 250
"""Pods that are asked for at once. 10 kB each: 2.5 MB."""
PAGES = 1000
"""Pages that a list may have: more pods than Kubernetes is made for (150,000). One that goes on has no end."""
MERGE_PATCH = "application/merge-patch+json"
METADATA_ALONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class Gone(ClusterUnreachable):
    """What was asked for is too old (410): list anew."""


class Right(NamedTuple):
    """Something that credentials may be allowed to do in a namespace."""

    verb: str
    resource: str
    subresource: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{'/' + self.subresource if self.subresource else ''}"


class Event(NamedTuple):
    """
    What happened to a pod.

    :param uid: of the pod.
    :param made: when it was first told of, by the API server's clock, in seconds since the epoch.
    :param last: when it last happened, by the clock of whoever tells of it.
    """

    reason: str
    message: str
    uid: str
    made: float | None
    last: float | None

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"[:600]


class Api:
    """
    The API server that a connection names.

    :param conn_id: the connection; it is read on first use.
    :param poll_interval: seconds, unless the connection says otherwise.
    """

    def __init__(self, conn_id: str, *, poll_interval: float) -> None:
        self._conn_id = conn_id
        self._poll_interval = poll_interval
        self._settings: Settings | None = None
        self._access: Access | None = None
        self._loading = asyncio.Lock()
        self._client: HttpClient | None = None

    async def aclose(self) -> None:
        """Close the HTTP session."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def settings(self) -> Settings:
        """Return what the connection says."""
        if self._settings is None:
            self._settings = await read_settings(self._conn_id, poll_interval=self._poll_interval)
        return self._settings

    async def access(self, *, instead_of: Access | None = None) -> Access:
        """
        Return address and credentials, loaded anew when they have expired.

        :param instead_of: credentials that were not accepted.
        """
        async with self._loading:
            known = self._access
            if known is None or not known.fresh or known is instead_of:
                self._access = await load_access(await self.settings())
            assert self._access is not None  # noqa: S101
            return self._access

    # --- pods

    async def pod(self, namespace: str, name: str) -> Pod | None:
        """Return a pod, ``None`` when the API server says that there is none."""
        return (await self.look(namespace, name))[0]

    async def look(self, namespace: str, name: str) -> tuple[Pod | None, float | None]:
        """Return what :meth:`pod` returns, and the API server's clock, in seconds since the epoch."""
        answer = await self.request("GET", _path("pods", namespace, name))
        if await _not_found(answer, name):
            return None, answer.date
        return await self.read(await _expect(answer), namespace, name), answer.date

    async def pods(self, namespace: str, *, selector: str, keep: Callable[[Pod], T]) -> tuple[list[T], str]:
        """
        Return all pods with these labels, and the resource version from which a watch goes on.

        Asked for in pages and without a resource version, so that the answer is not older than the question.

        :param keep: what of a pod is returned. Of thousands of pods that should be little: see :meth:`Answer.parse`.
        :raises InvalidAnswer: it does not come to an end.
        """
        links = (await self.settings()).links
        kept: list[T] = []
        token = ""
        for _ in range(PAGES):
            query = {"labelSelector": selector, "limit": str(PAGE)} | ({"continue": token} if token else {})
            answer = await self.request("GET", _path("pods", namespace), query=query, limit=PAGE_LIMIT, timeout=120.0)
            page, version, following = await (await _expect(answer)).parse(
                _page, element=lambda value, _: keep(read_pod(value, namespace=namespace, links=links))
            )
            kept += page
            if not following:
                return kept, version
            if following == token:
                break
            token = following
        raise InvalidAnswer(f"the list of the pods in {namespace} goes on and on")

    async def read(self, answer: Answer, namespace: str, name: str) -> Pod:
        """
        Return the pod that an answer holds.

        :raises InvalidAnswer: when it is not the one of that name.
        """
        links = (await self.settings()).links
        pod = await answer.parse(lambda value: read_pod(value, namespace=namespace, links=links))
        if pod.status.job.id != f"{namespace}:{name}":
            raise InvalidAnswer(f"{answer.url} shows another pod: {pod.status.job}")
        return pod

    async def delete_pod(self, pod: Pod) -> bool:
        """
        Have a pod deleted with its own grace period, if it is still as it was read.

        :return: ``False`` when it has changed since, so that it must be read again.
        :raises RequestRefused: the API server does not allow it.
        """
        namespace, name = place_of(pod.status.job)
        preconditions = {"uid": pod.status.job.uid, "resourceVersion": pod.version}
        return await self.delete("pods", namespace, name, preconditions=preconditions)

    async def log(self, pod: Pod, *, lines: int, limit: int) -> str:
        """Return the end of the driver's log."""
        namespace, name = place_of(pod.status.job)
        query = {"tailLines": str(lines), "limitBytes": str(limit)}
        if pod.container:
            query["container"] = pod.container
        answer = await self.request("GET", f"{_path('pods', namespace, name)}/log", query=query, limit=limit + 1024)
        return (await _expect(answer)).text

    async def events(
        self, namespace: str, name: str, *, warnings: bool = False
    ) -> tuple[Sequence[Event], float | None]:
        """
        Return the events of pods of that name, the latest last; and the API server's clock.

        :param warnings: only what went wrong.
        :raises RequestRefused: the credentials may not list events.
        """
        selector = f"involvedObject.kind=Pod,involvedObject.name={name}" + (",type=Warning" if warnings else "")
        query = {"fieldSelector": selector, "limit": str(PAGE)}
        answer = await _expect(await self.request("GET", _path("events", namespace), query=query))
        return await answer.parse(_events), answer.date

    async def has_config_map(self, namespace: str, name: str) -> bool:
        """
        Return whether there is a config map. What is in it is not read.

        :raises RequestRefused: the credentials may not get config maps.
        """
        answer = await self.request("GET", _path("configmaps", namespace, name), accept=METADATA_ALONE)
        if await _not_found(answer, name):
            return False
        await _expect(answer)
        return True

    # --- any object of a namespace

    async def create(self, kind: str, namespace: str, body: Mapping[str, Any]) -> Answer:
        """Send an object; the API server's word is returned as it is, a 409 or a refusal, too."""
        return await self.request("POST", _path(kind, namespace), body=body)

    async def patch(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Merge a patch into an object. One that is gone, or has changed since the patch's version, is left alone."""
        answer = await self.request("PATCH", _path(kind, namespace, name), body=patch, content_type=MERGE_PATCH)
        if answer.status != 409 and not await _not_found(answer, name):
            await _expect(answer)

    async def delete(
        self, kind: str, namespace: str, name: str, *, preconditions: Mapping[str, str] | None = None
    ) -> bool:
        """
        Delete an object, if it is there.

        :return: ``False`` when the preconditions do not hold.
        """
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        answer = await self.request(
            "DELETE",
            _path(kind, namespace, name),
            body=body | ({"preconditions": preconditions} if preconditions else {}),
        )
        if answer.status == 409:
            return False
        if not await _not_found(answer, name):
            await _expect(answer)
        return True

    async def secret_token(self, namespace: str, name: str) -> str:
        """Return the token on a Secret that no pod owns yet, ``""`` if there is none that is ours to see."""
        answer = await self.request("GET", _path("secrets", namespace, name))
        if answer.status == 403 or await _not_found(answer, name):
            return ""
        metadata = (await (await _expect(answer)).json()).get("metadata")
        labels = metadata.get("labels") if isinstance(metadata, Mapping) else None
        if not isinstance(metadata, Mapping) or metadata.get("ownerReferences") or not isinstance(labels, Mapping):
            return ""
        return str(labels.get(TOKEN, ""))

    # --- what the credentials may do

    async def version(self) -> str:
        """Return the API server's version."""
        value = await (await _expect(await self.request("GET", "/version"))).json()
        version = value.get("gitVersion")
        if not isinstance(version, str):
            raise InvalidAnswer(f"what answers is no Kubernetes API server: {json.dumps(value)[:200]}")
        return version[:40]

    async def may(self, namespace: str, right: Right) -> bool:
        """Return whether the credentials have a right, by the API server's word (SelfSubjectAccessReview)."""
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {"namespace": namespace, **right._asdict()}},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        review = await (await _expect(await self.request("POST", path, body=body))).json()
        status = review.get("status")
        return isinstance(status, Mapping) and status.get("allowed") is True

    async def expect_namespace(self, namespace: str) -> None:
        """
        See that a namespace exists, as far as the credentials may look.

        :raises BadConfiguration: it does not.
        """
        answer = await self.request("GET", f"/api/v1/namespaces/{quote(namespace, safe='')}")
        if answer.status != 403 and await _not_found(answer, namespace):
            raise BadConfiguration(
                f"there is no namespace {namespace!r}: set the extra 'namespace' of connection {self._conn_id!r}"
            )

    # --- watching

    @contextlib.asynccontextmanager
    async def watch(
        self, namespace: str, *, selector: str, version: str, seconds: int, read_timeout: float
    ) -> AsyncIterator[Stream]:
        """
        Watch the pods with these labels from a resource version on.

        :param seconds: after which the API server ends the stream.
        :param read_timeout: seconds without a byte after which it is taken for hung.
        :raises Gone: the resource version is too old.
        :raises InvalidAnswer: what came is not a watch.
        """
        query = {
            "watch": "1",
            "labelSelector": selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        access = await self.access()
        url = f"{access.server}{_path('pods', namespace)}?{urlencode(query)}"
        async with self._session(access).stream(url, headers=_headers(access), read_timeout=read_timeout) as stream:
            if stream.answer.status != 200:
                await _expect(stream.answer)
            if "json" not in (kind := stream.answer.headers.get("Content-Type", "")):
                # Somebody's login page: without a line break it would be taken for a watch without events.
                raise InvalidAnswer(f"{stream.answer.url} answered a watch with {kind[:80]!r} in place of JSON")
            yield stream

    # --- anything

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        limit: int = OBJECT_LIMIT,
        timeout: float | None = None,
    ) -> Answer:
        """
        Send one request; one more with fresh credentials when they were not accepted.

        :raises AuthenticationFailed: for a 401.
        :raises ClusterUnreachable: for no answer, a 429 or a 5xx.
        :raises InvalidAnswer: for a redirect, which may lead a token elsewhere and is not followed.
        """
        tail = f"{path}?{urlencode(query)}" if query else path

        async def send(access: Access) -> Answer:
            return await self._session(access).request(
                method,
                f"{access.server}{tail}",
                body=body,
                headers=_headers(access) | {"Content-Type": content_type, "Accept": accept},
                limit=limit,
                timeout=timeout,
            )

        access = await self.access()
        answer = await send(access)
        if answer.status == 401:
            answer = await send(await self.access(instead_of=access))
        if answer.status == 401 or answer.status == 429 or answer.status >= 500 or 300 <= answer.status < 400:
            await _expect(answer)
        return answer

    def _session(self, access: Access) -> HttpClient:
        if self._client is None:
            self._client = HttpClient(tls=access.tls, proxy=access.proxy, server_hostname=access.server_hostname)
        return self._client


def _path(kind: str, namespace: str, name: str = "") -> str:
    path = f"/api/v1/namespaces/{quote(namespace, safe='')}/{kind}"
    return f"{path}/{quote(name, safe='')}" if name else path


async def is_status(answer: Answer) -> bool:
    """Whether an answer is an API server's own word about an error."""
    return bool(await _status(answer))


async def said(answer: Answer) -> str:
    """Return what the API server says in the ``Status`` of an error, on one line."""
    status = await _status(answer)
    message = status.get("message")
    text = message if isinstance(message, str) and message else answer.excerpt
    return re.sub(r"\s+", " ", text)[:600]


async def _status(answer: Answer) -> Mapping[str, Any]:
    try:
        value = await answer.json()
    except InvalidAnswer:
        return {}
    return value if value.get("kind") == "Status" else {}


async def _not_found(answer: Answer, name: str) -> bool:
    """
    Whether the API server says that there is no such pod.

    :raises InvalidAnswer: for a 404 that is not its own.
    """
    if answer.status != 404:
        return False
    status = await _status(answer)
    details = status.get("details")
    if status.get("reason") == "NotFound" and isinstance(details, Mapping) and details.get("name") == name:
        return True
    raise InvalidAnswer(
        f"{answer.url} answered 404, but not as an API server that looked for a pod: {await said(answer)}"
    )


async def _expect(answer: Answer) -> Answer:
    """Return the answer if it is a success, else raise what it means."""
    if answer.status in (200, 201, 202):
        return answer
    text = f"{answer.url.partition('?')[0]} answered {answer.status}: {await said(answer)}"
    if answer.status == 401:
        raise AuthenticationFailed(f"{text}: it does not accept the connection's credentials")
    if answer.status == 410:
        raise Gone(text)
    if answer.status == 429 or answer.status >= 500:
        raise ClusterUnreachable(text, retry_after=answer.retry_after)
    if 400 <= answer.status < 500 and await _status(answer):
        raise RequestRefused(text)
    raise InvalidAnswer(text)


def _headers(access: Access) -> dict[str, str]:
    headers = {"Accept": "application/json"}
    return headers | {"Authorization": access.authorization} if access.authorization else headers


def _page(value: Mapping[str, Any]) -> tuple[Sequence[Any], str, str]:
    """Return what was kept of the pods, the resource version, and the token of the next page."""
    metadata, pods = value.get("metadata"), value.get("items")
    version = metadata.get("resourceVersion") if isinstance(metadata, Mapping) else None
    if value.get("kind") not in ("PodList", "List") or not isinstance(version, str) or not version:
        raise InvalidAnswer(f"not a list of pods: {str(value)[:200]}")
    token = metadata.get("continue") if isinstance(metadata, Mapping) else None
    return pods if isinstance(pods, list) else [], version, token if isinstance(token, str) else ""


def _events(value: Mapping[str, Any]) -> Sequence[Event]:
    """Return the events of a list. What is none would be no trace of a pod, so nothing is passed over."""
    items = value.get("items") or []
    if value.get("kind") not in ("EventList", "List") or not isinstance(items, list):
        raise InvalidAnswer(f"not a list of events: {str(value)[:200]}")
    if not all(isinstance(item, Mapping) for item in items):
        raise InvalidAnswer(f"not events: {str(items)[:200]}")
    events = [_event(item) for item in items]
    return sorted(events, key=lambda event: event.last or 0.0)


def _event(value: Mapping[str, Any]) -> Event:
    metadata, about = value.get("metadata"), value.get("involvedObject")
    made = metadata.get("creationTimestamp") if isinstance(metadata, Mapping) else None
    uid = about.get("uid") if isinstance(about, Mapping) else None
    last = time_of(value.get("lastTimestamp")) or time_of(value.get("eventTime"))
    return Event(str(value.get("reason")), str(value.get("message")), str(uid or ""), time_of(made), last)
