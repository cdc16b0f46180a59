"""
A network without a network: hooks ask as they always do, and what a strategy draws is what they are told.

In: who answers what, by path. Out: hooks on connections that are not in Airflow, and a list of all that was asked and
answered. What is asked is checked here: no URL is made of what a server has said and nobody has looked at, and what
opens a door goes to those alone that the connection names.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from airflow.sdk import Connection

from durable_spark.hooks import _connection, _kubernetes_access, _kubernetes_api, _standalone_masters, _yarn_managers
from durable_spark.hooks._http import Answer, HttpClient, whole_characters
from durable_spark.hooks._kubernetes_access import Access

if TYPE_CHECKING:
    from durable_spark.hooks.job import JobHook

NEVER = "no-job-of-ours"
"""Stands in IDs that no cluster has given."""
DATE = "Mon, 23 Nov 2026 03:55:00 GMT"
_URL = re.compile(r"https?://[\w.:\[\]-]+(/[\w./:;%&=?,+@~!$'()*-]*)?", re.ASCII)


class Said(NamedTuple):
    """A question, and what was answered."""

    method: str
    answer: Answer

    @property
    def path(self) -> str:
        return urlsplit(self.answer.url).path

    @property
    def values(self) -> list[dict[str, Any]]:
        """The object that was answered, or those in the lines of a stream."""
        body = self.answer.body
        texts = [body, *body.split(b"\n")] if "watch=1" in self.answer.url else [body]
        found = []
        for text in texts:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(whole_characters(text.decode())))
        return [value for value in found if isinstance(value, dict)]


class Wire:
    """
    Whoever is asked over HTTP.

    :param answer: returns status, headers and body for a method and a URL.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, str], tuple[int, Mapping[str, str], bytes]] = lambda method, url: (404, {}, b"")
        self.known: frozenset[str] = frozenset()
        """Hosts that the connection names."""
        self.told: list[Said] = []
        self.broken: list[BaseException] = []
        """What was not to be asked, whoever has caught the exception: a feed takes any for an outage."""
        self.connection: Connection | None = None

    def ask(self, method: str, url: str, headers: Mapping[str, str] | None) -> Answer:
        try:
            self._look_at(url, headers)
            status, answered, body = self.answer(method, url)
        except AssertionError as error:
            self.broken.append(error)
            raise
        answer = Answer(url=url, status=status, headers=answered, body=body)
        self.told.append(Said(method, answer))
        return answer

    def _look_at(self, url: str, headers: Mapping[str, str] | None) -> None:
        assert _URL.fullmatch(url), f"a URL of unchecked parts: {url[:200]!r}"
        parts = urlsplit(url)
        assert ".." not in parts.path.split("/"), url
        assert NEVER not in url, "what is no ID of a job is never sent"
        assert parts.username is None, url
        if parts.netloc not in self.known:
            secret = {name for name in headers or {} if name in ("Authorization", "Cookie")}
            assert not secret, f"{secret} for {parts.netloc}"


class _Stream:
    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._lines = answer.body.split(b"\n")[:-1]

    async def lines(self, *, limit: int) -> AsyncGenerator[Sequence[bytes], None]:
        for line in self._lines:
            yield [line]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Return what every hook of this test is connected to."""
    wire = Wire()

    async def request(self: HttpClient, method: str, url: str, *, headers: Any = None, **_: Any) -> Answer:
        return wire.ask(method, url, headers)

    @contextlib.asynccontextmanager
    async def stream(self: HttpClient, url: str, *, headers: Any = None, **_: Any) -> AsyncIterator[_Stream]:
        yield _Stream(wire.ask("GET", url, headers))

    async def read_connection(conn_id: str) -> Connection:
        assert wire.connection is not None
        return wire.connection

    async def load_access(settings: Any) -> Access:
        return Access(server=settings.server, namespace="spark", authorization="Bearer s", expires=None, tls=None)

    monkeypatch.setattr(HttpClient, "request", request)
    monkeypatch.setattr(HttpClient, "stream", stream)
    for module in (_connection, _kubernetes_access, _standalone_masters, _yarn_managers):
        monkeypatch.setattr(module, "read_connection", read_connection)
    monkeypatch.setattr(_kubernetes_api, "load_access", load_access)
    return wire


def hook_on(wire: Wire, kind: type[JobHook], host: str, **extra: Any) -> JobHook:
    """Return a hook on a connection with that host and these extras."""
    wire.connection = Connection(
        conn_id="cluster", conn_type="durable_spark", host=host, password="s", extra=json.dumps(extra)
    )
    return kind("cluster")
