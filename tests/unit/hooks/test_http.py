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
from durable_spark.hooks._http import (
    Answer,
    AnswerTimeout,
    ConnectFailed,
    ConnectionLost,
    HttpClient,
    for_each,
    ssl_context,
)
from durable_spark.jobs import (
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    DurableJobError,
    InvalidAnswer,
)
from tests.unit.hooks.fake import Handler, fixed, hang, hang_up, serve


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


def drip(status: int) -> Any:
    """Return a handler whose answer never ends."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.01)

    return handler


async def test_an_answer_that_never_ends(stack: AsyncExitStack, client: HttpClient) -> None:
    url = await serve(stack, drip(200))
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


def pieces(*texts: bytes, then: Handler | None = None) -> Handler:
    """Answer without a length, piece by piece; the reader is given a turn after each, so that it sees each alone."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for text in texts:
            await response.write(text)
            await asyncio.sleep(0.02)
        if then is not None:
            return await then(request)
        await response.write_eof()
        return response

    return answer


async def lines(client: HttpClient, url: str, *, limit: int = 100, read_timeout: float = 10) -> list[bytes]:
    got: list[bytes] = []
    async with client.stream(url, read_timeout=read_timeout) as stream:
        stream.answer.expect_ok()
        async for some in stream.lines(limit=limit):
            got += some
    return got


class TestStream:
    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            ([b"one\ntwo\n"], [b"one", b"two"]),
            ([b"o", b"ne\ntw", b"o\n"], [b"one", b"two"]),
            ([b"one", b"\n", b"\ntwo\n"], [b"one", b"", b"two"]),
            ([b"one\ntw"], [b"one"]),
            ([b"cut"], []),
            ([], []),
        ],
        ids=["at once", "in pieces", "an empty line", "cut off", "nothing but a cut line", "nothing"],
    )
    async def test_lines(
        self, stack: AsyncExitStack, client: HttpClient, texts: list[bytes], expected: list[bytes]
    ) -> None:
        assert await lines(client, await serve(stack, pieces(*texts))) == expected

    async def test_a_line_comes_when_it_is_there(self, stack: AsyncExitStack, client: HttpClient) -> None:
        url = await serve(stack, pieces(b"one\ntw", then=hang))
        async with client.stream(url, read_timeout=10) as stream:
            async for some in stream.lines(limit=100):
                assert some == [b"one"]
                break

    @pytest.mark.parametrize(
        "texts", [[b"x" * 11 + b"\n"], [b"x" * 6, b"x" * 5 + b"\n"], [b"x" * 11], [b"a\nb\n" + b"x" * 11 + b"\nc\n"]]
    )
    async def test_a_line_that_is_too_long(self, stack: AsyncExitStack, client: HttpClient, texts: list[bytes]) -> None:
        url = await serve(stack, pieces(*texts))
        with pytest.raises(InvalidAnswer, match="longer than 10 bytes"):
            await lines(client, url, limit=10)

    async def test_many_short_lines_are_not_a_long_one(self, stack: AsyncExitStack, client: HttpClient) -> None:
        url = await serve(stack, pieces(b"0123456789\n" * 100, b"01234", *[b"56789\n01234"] * 5, b"56789\n"))
        assert len(await lines(client, url, limit=10)) == 106

    async def test_hangs(self, stack: AsyncExitStack, client: HttpClient) -> None:
        url = await serve(stack, pieces(b"one\n", then=hang))
        with pytest.raises(AnswerTimeout, match="any more"):
            await asyncio.wait_for(lines(client, url, read_timeout=0.2), 3)

    async def test_does_not_answer(self, stack: AsyncExitStack, client: HttpClient) -> None:
        url = await serve(stack, hang)
        with pytest.raises(AnswerTimeout, match=r"within 0\.2 s"):
            await asyncio.wait_for(lines(client, url, read_timeout=0.2), 3)

    async def test_hangs_up(self, stack: AsyncExitStack, client: HttpClient) -> None:
        url = await serve(stack, pieces(b"one\ntw", then=hang_up))
        with pytest.raises(ConnectionLost):
            await lines(client, url)

    async def test_nobody_there(self, client: HttpClient, unused_tcp_port: int) -> None:
        with pytest.raises(ConnectFailed):
            await lines(client, f"http://127.0.0.1:{unused_tcp_port}/")

    @pytest.mark.parametrize("status", [201, 302, 401, 410, 500])
    async def test_an_error_has_a_body(self, stack: AsyncExitStack, client: HttpClient, status: int) -> None:
        url = await serve(stack, fixed(status, "sorry"))
        async with client.stream(url, read_timeout=10) as stream:
            assert (stream.answer.status, stream.answer.text) == (status, "sorry")

    async def test_an_error_that_never_ends(
        self, stack: AsyncExitStack, client: HttpClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_http, "TOTAL_TIMEOUT", 0.2)
        url = await serve(stack, drip(500))
        with pytest.raises(AnswerTimeout):
            await asyncio.wait_for(lines(client, url), 5)

    async def test_headers_are_sent(self, stack: AsyncExitStack, client: HttpClient) -> None:
        seen: list[str] = []

        async def note(request: web.Request) -> web.StreamResponse:
            seen.append(f"{request.method} {request.headers['Authorization']}")
            return web.Response()

        async with client.stream(await serve(stack, note), headers={"Authorization": "x"}, read_timeout=10):
            assert seen == ["GET x"]

    async def test_what_the_reader_raises_is_its_own(self, stack: AsyncExitStack, client: HttpClient) -> None:
        url = await serve(stack, pieces(b"one\n", then=hang))

        async def read() -> None:
            async with client.stream(url, read_timeout=10) as stream:
                async for _ in stream.lines(limit=100):
                    raise asyncio.TimeoutError

        with pytest.raises(asyncio.TimeoutError):
            await read()


class TestForEach:
    async def test_a_few_at_once(self) -> None:
        running, most, done = 0, 0, []

        async def call(item: int) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            done.append(item)

        await for_each(call, range(10), at_once=3)
        assert (most, sorted(done)) == (3, list(range(10)))

    async def test_the_first_error_ends_it(self) -> None:
        began: list[int] = []

        async def call(item: int) -> None:
            began.append(item)
            if item == 1:
                raise ClusterUnreachable("away")
            await asyncio.sleep(3600)

        with pytest.raises(ClusterUnreachable, match="away"):
            await asyncio.wait_for(for_each(call, range(10), at_once=2), 5)
        assert began[:2] == [0, 1]
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left running"

    async def test_of_nothing(self) -> None:
        await for_each(asyncio.sleep, [], at_once=3)


async def test_a_proxy_is_asked(stack: AsyncExitStack) -> None:
    async def relay(request: web.Request) -> web.StreamResponse:
        return web.Response(text=request.raw_path)

    client = HttpClient(proxy=await serve(stack, relay))
    stack.push_async_callback(client.aclose)
    assert (await client.request("GET", "http://api.invalid/version", limit=100)).text == "http://api.invalid/version"
    as_is = "http://api.invalid/a%2Fb%7E?c=%7E"
    assert (await client.request("GET", as_is, limit=100)).text == as_is


async def test_a_proxy_that_is_not_there(stack: AsyncExitStack, unused_tcp_port: int) -> None:
    client = HttpClient(proxy=f"http://user:hush@127.0.0.1:{unused_tcp_port}")
    stack.push_async_callback(client.aclose)
    with pytest.raises(ConnectFailed, match=str(unused_tcp_port)) as caught:
        await client.request("GET", "http://api.invalid/", limit=100)
    assert "hush" not in str(caught.value)


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
        ("²", None),
        ("Mon, 23 Nov 99999999999 03:20:25 GMT", None),
        ("", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    with pytest.raises(ClusterUnreachable) as caught:
        answer(503, Retry_After=value, Date="Mon, 23 Nov 2026 03:20:15 GMT").expect_ok()
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("value", ["", "now", "Mon, 23 Nov 99999999999 03:20:25 GMT"])
def test_a_clock_that_tells_no_time(value: str) -> None:
    assert answer(200, Date=value).date is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (rb'{"a": "cut off \ud83d"}', "cut off \ufffd"),
        (rb'{"a": "\uDE00 begun late"}', "\ufffd begun late"),
        (rb'{"a": "\ud83d\uD83D\ude00\ude00"}', "\ufffd\U0001f600\ufffd"),
        (rb'{"a": "\ud83d\ude00 \u00e9"}', "\U0001f600 é"),
    ],
)
async def test_half_a_character_becomes_one(body: bytes, text: str) -> None:
    """Java cuts texts off anywhere, and what is left can be neither asked for in a URL nor written to a database."""
    told = await Answer(url="http://x/", status=200, headers={}, body=body).json()
    assert told == {"a": text}
    assert told["a"].encode()


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
    assert _http._loads_stepwise(text, lambda value, _: value) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", "{", '{"a"', '{"a":', '{"a":[', '{"a":[1', '{"a":[1,]}', '{"a":1,}', "{} x", "{1:2}"]
)
def test_stepwise_parsing_refuses_what_parsing_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        _http._loads_stepwise(text, lambda value, _: value)


class Authority:
    """A server with a certificate of an authority of its own."""

    def __init__(self, directory: Path, name: str = "127.0.0.1") -> None:
        self.ca = trustme.CA()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.ca.issue_cert(name).configure_cert(self.context)
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


@pytest.mark.parametrize(("name", "trusted"), [("api.example", True), (None, False), ("other.example", False)])
async def test_tls_of_another_name(stack: AsyncExitStack, tmp_path: Path, name: str | None, trusted: bool) -> None:
    authority = Authority(tmp_path, "api.example")
    url = await serve(stack, fixed(200, "{}"), tls=authority.context)
    client = HttpClient(tls=await ssl_context(authority.pem), server_hostname=name)
    stack.push_async_callback(client.aclose)
    if trusted:
        assert (await client.request("GET", url, limit=100)).status == 200
        return
    with pytest.raises(BadConfiguration, match="not trusted"):
        await client.request("GET", url, limit=100)


async def test_tls_where_there_is_none(stack: AsyncExitStack, client: HttpClient) -> None:
    url = await serve(stack, fixed(200, "{}"))
    with pytest.raises(BadConfiguration, match=r"plain HTTP.*'http'"):
        await client.request("GET", url.replace("http:", "https:"), limit=100)


@pytest.mark.parametrize("ca", ["/no/such/file", "-----BEGIN nonsense", "-----BEGIN é", __file__])
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
