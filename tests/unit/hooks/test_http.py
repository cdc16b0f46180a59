"""Servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from durable_spark.hooks import _http
from durable_spark.hooks._http import Answer, AnswerTimeout, ConnectFailed, ConnectionLost, HttpClient, ssl_context
from durable_spark.jobs import (
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    DurableJobError,
    InvalidAnswer,
)
from tests.unit.hooks.fake import fixed, hang, hang_up, serve


@pytest.fixture
async def client(stack: AsyncExitStack) -> HttpClient:
    client = HttpClient()
    stack.push_async_callback(client.aclose)
    return client


async def test_an_answer(stack: AsyncExitStack, client: HttpClient) -> None:
    url = await serve(stack, fixed(200, '{"a": [1, 2]}'))
    assert await (await client.request("GET", url, limit=100)).expect_ok().json() == {"a": [1, 2]}


async def test_nobody_there(client: HttpClient, unused_tcp_port: int) -> None:
    with pytest.raises(ConnectFailed, match=str(unused_tcp_port)):
        await client.request("GET", f"http://127.0.0.1:{unused_tcp_port}/", limit=100)


async def test_no_such_host(client: HttpClient) -> None:
    with pytest.raises(ConnectFailed, match=r"no-such-host\.invalid"):
        await client.request("GET", "http://no-such-host.invalid/", limit=100)


async def test_an_answer_that_never_comes(stack: AsyncExitStack, client: HttpClient) -> None:
    url = await serve(stack, hang)
    with pytest.raises(AnswerTimeout, match=r"within 0\.2 s"):
        await client.request("GET", url, limit=100, timeout=0.2)


async def test_an_answer_that_never_ends(stack: AsyncExitStack, client: HttpClient) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.01)

    url = await serve(stack, drip)
    with pytest.raises(AnswerTimeout):
        await client.request("GET", url, limit=100_000, timeout=0.3)


async def test_hangs_up(stack: AsyncExitStack, client: HttpClient) -> None:
    url = await serve(stack, hang_up)
    with pytest.raises(ConnectionLost):
        await client.request("POST", url, limit=100, body={})


async def test_hangs_up_in_the_middle(stack: AsyncExitStack, client: HttpClient) -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"a":')
        assert request.transport
        request.transport.close()
        return response

    url = await serve(stack, half)
    with pytest.raises(ConnectionLost, match="in the middle"):
        await client.request("GET", url, limit=10_000)


@pytest.mark.parametrize("chunked", [True, False])
async def test_longer_than_the_limit(stack: AsyncExitStack, client: HttpClient, chunked: bool) -> None:
    async def long(request: web.Request) -> web.StreamResponse:
        if not chunked:
            return web.Response(body=b" " * 300_000)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b" " * 3000)
        return response

    url = await serve(stack, long)
    with pytest.raises(InvalidAnswer, match="longer than 200000 bytes"):
        await client.request("GET", url, limit=200_000)


async def test_not_http(stack: AsyncExitStack, client: HttpClient) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0\1\2 no http\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    stack.callback(server.close)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(InvalidAnswer, match="not answer in HTTP"):
        await client.request("GET", f"http://127.0.0.1:{port}/", limit=100)


def answer(status: int, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(url="http://x/", status=status, headers=named, body=b"<h1>sorry</h1>")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, InvalidAnswer),
        (400, InvalidAnswer),
        (401, AuthenticationFailed),
        (403, AuthenticationFailed),
        (404, InvalidAnswer),
        (429, ClusterUnreachable),
        (500, ClusterUnreachable),
        (503, ClusterUnreachable),
    ],
)
def test_statuses(status: int, kind: type[DurableJobError]) -> None:
    with pytest.raises(kind) as caught:
        answer(status).expect_ok()
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("Mon, 23 Nov 2026 03:20:25 GMT", 10.0),
        ("Mon, 23 Nov 2026 03:20:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    with pytest.raises(ClusterUnreachable) as caught:
        answer(503, Retry_After=value, Date="Mon, 23 Nov 2026 03:20:15 GMT").expect_ok()
    assert caught.value.retry_after == seconds


async def test_redirects_are_not_followed(stack: AsyncExitStack, client: HttpClient) -> None:
    seen: list[dict[str, str]] = []

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        seen.append(dict(request.headers))
        return web.Response(text="{}")

    target = await serve(stack, elsewhere)
    url = await serve(stack, fixed(302, Location=target))
    with pytest.raises(InvalidAnswer, match=f"302 to '{target}'"):
        (await client.request("GET", url, limit=100, headers={"Authorization": "Bearer x"})).expect_ok()
    assert seen == []


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
async def test_not_a_json_object(body: bytes) -> None:
    with pytest.raises(InvalidAnswer, match="JSON"):
        await Answer(url="http://x/", status=200, headers={}, body=body).json()


@pytest.mark.parametrize(
    "text",
    ["{}", ' { "a" : [ ] } ', '{"a":[1,{"b":[2]},"x"],"c":{"d":null},"e":1.5}', '{"a":[\n1 ,\n2\n]\n,"b":"]"}'],
)
def test_stepwise_parsing_is_parsing(text: str) -> None:
    assert _http._loads_stepwise(text, lambda value: value) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", "{", '{"a"', '{"a":', '{"a":[', '{"a":[1', '{"a":[1,]}', '{"a":1,}', "{} x", "{1:2}"]
)
def test_stepwise_parsing_refuses_what_parsing_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        _http._loads_stepwise(text, lambda value: value)


class Authority:
    """A server with a certificate of an authority of its own."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.ca.issue_cert("127.0.0.1").configure_cert(self.context)
        self.pem = self.ca.cert_pem.bytes().decode()
        self.path = directory / "ca.pem"
        self.path.write_text(self.pem)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_tls_with_an_unknown_authority(stack: AsyncExitStack, client: HttpClient, authority: Authority) -> None:
    url = await serve(stack, fixed(200, "{}"), tls=authority.context)
    with pytest.raises(BadConfiguration, match=r"not trusted.*'ca'"):
        await client.request("GET", url, limit=100)


@pytest.mark.parametrize("form", ["path", "pem"])
async def test_tls_with_an_authority(stack: AsyncExitStack, authority: Authority, form: str) -> None:
    url = await serve(stack, fixed(200, "{}"), tls=authority.context)
    client = HttpClient(tls=await ssl_context(str(authority.path) if form == "path" else authority.pem))
    stack.push_async_callback(client.aclose)
    assert (await client.request("GET", url, limit=100)).status == 200


async def test_tls_where_there_is_none(stack: AsyncExitStack, client: HttpClient) -> None:
    url = await serve(stack, fixed(200, "{}"))
    with pytest.raises(BadConfiguration, match=r"plain HTTP.*'http'"):
        await client.request("GET", url.replace("http:", "https:"), limit=100)


@pytest.mark.parametrize("ca", ["/no/such/file", "-----BEGIN nonsense", __file__])
async def test_an_authority_that_cannot_be_read(ca: str) -> None:
    with pytest.raises(BadConfiguration, match=r"'ca'.*PEM"):
        await ssl_context(ca)


async def test_a_large_page_does_not_hold_the_event_loop() -> None:
    """Counted, not timed, for a busy machine lags by itself. Parsed in one go the loop turns once, thread or not."""
    entry: dict[str, Any] = {"id": "driver-20261123031254-0000", "starttime": "1795403574528", "state": "RUNNING"}
    body = json.dumps({"activedrivers": [entry | {"x": "y" * 200}] * 30_000}, indent=2).encode()
    parsing = asyncio.ensure_future(Answer(url="http://x/", status=200, headers={}, body=body).json())
    turns = 0
    while not parsing.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len((await parsing)["activedrivers"]) == 30_000
    assert turns > 5
