"""The proxy that other tests trust to stop a request at a given instant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import ClientConnectorError, ClientError, ClientPayloadError, ClientSession, ServerDisconnectedError, web
from aiohttp.test_utils import TestServer

from dev.processes import free_port, wait_until
from dev.proxy import Proxy


class FarSide:
    """Answers, and remembers what it was sent."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []
        self.events: asyncio.Queue[str] = asyncio.Queue()

    async def answer(self, request: web.Request) -> web.Response:
        self.got.append((request.raw_path, await request.text()))
        status = 404 if "absent" in request.path else 200
        return web.json_response({"path": request.raw_path}, status=status, headers={"Refreshed-API-Token": "new"})

    async def watch(self, request: web.Request) -> web.StreamResponse:
        """Answer line by line, without an end, what a test puts into the queue."""
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(f"{await self.events.get()}\n".encode())


@pytest.fixture
async def far_side() -> AsyncIterator[tuple[FarSide, str]]:
    side, app = FarSide(), web.Application()
    app.router.add_get("/watch", side.watch)
    app.router.add_route("*", "/{path:.*}", side.answer)
    async with TestServer(app) as server:
        yield side, f"http://127.0.0.1:{server.port}"


@pytest.fixture
def proxy(far_side: tuple[FarSide, str]) -> Iterator[Proxy]:
    with Proxy(far_side[1]) as proxy:
        yield proxy


@pytest.fixture
async def client() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


async def test_passes_on_word_for_word(proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession) -> None:
    async with client.get(f"{proxy.url}/absent?a=%20b") as answer:
        assert answer.status == 404
        assert answer.headers["Refreshed-API-Token"] == "new"
        assert await answer.json() == {"path": "/absent?a=%20b"}
    assert proxy.count("GET", "^/absent") == 1


@pytest.mark.parametrize("after", [False, True])
async def test_holds_and_drops(proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession, after: bool) -> None:
    hold = proxy.hold("PATCH", "/state$", body='"deferred"', after=after)
    async with client.patch(f"{proxy.url}/state", json={"state": "running"}) as answer:
        assert answer.status == 200, "only what matches is held"
    sent = asyncio.create_task(client.patch(f"{proxy.url}/state", json={"state": "deferred"}))
    held = await asyncio.to_thread(hold.wait, 10)
    assert held.path == "/state"
    assert [body for _, body in far_side[0].got[1:]] == (['{"state": "deferred"}'] if after else [])
    assert not sent.done()
    hold.drop()
    with pytest.raises(ServerDisconnectedError):
        await sent
    async with client.patch(f"{proxy.url}/state", json={"state": "deferred"}) as answer:
        assert answer.status == 200, "a dropped order holds nothing any more"


async def test_holds_all_that_match_and_releases_them(
    proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession
) -> None:
    with proxy.holding("GET", "/a") as hold:
        sent = [asyncio.create_task(client.get(f"{proxy.url}/a")) for _ in range(2)]
        await asyncio.to_thread(hold.wait, 10)
        await asyncio.to_thread(wait_until, lambda: proxy.count("GET", "/a") == 2, 10, "both requests")
        assert far_side[0].got == []
    assert [(await answer).status for answer in sent] == [200, 200]


async def test_answers_in_json_when_nobody_is_there(client: ClientSession) -> None:
    """A 4xx or 5xx that is not JSON would kill LocalExecutor's scheduler."""
    with Proxy(f"http://127.0.0.1:{free_port()}") as proxy:
        async with client.get(f"{proxy.url}/run") as answer:
            assert answer.status == 503
            assert "cannot be reached" in (await answer.json())["detail"]


async def test_passes_an_answer_on_as_it_comes(
    proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession
) -> None:
    async with client.get(f"{proxy.url}/watch") as answer:
        for event in ("first", "second"):
            far_side[0].events.put_nowait(event)
            assert await asyncio.wait_for(answer.content.readline(), 10) == f"{event}\n".encode()


async def test_fails_what_matches_and_breaks_off_what_is_under_way(
    proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession
) -> None:
    async with client.get(f"{proxy.url}/watch", headers={"Authorization": "Bearer old"}) as watch:
        old = {"headers": {"Retry-After": "7"}, "answer": "go away", "header": "Authorization: Bearer old"}
        with proxy.failing(429, method="GET", path="/(watch|a)$", **old):  # type: ignore[arg-type]
            with pytest.raises(ClientError):
                await asyncio.wait_for(watch.content.readline(), 10)
            for method, path, token, status in [
                ("GET", "/a", "old", 429),
                ("GET", "/a", "new", 200),
                ("GET", "/b", "old", 200),
                ("PUT", "/a", "old", 200),
            ]:
                headers = {"Authorization": f"Bearer {token}"}
                async with client.request(method, proxy.url + path, headers=headers) as answer:
                    assert answer.status == status
                    if status == 429:
                        assert (answer.headers["Retry-After"], await answer.text()) == ("7", "go away")
    assert [path for path, _ in far_side[0].got] == ["/a", "/b", "/a"]
    async with client.get(f"{proxy.url}/a", headers={"Authorization": "Bearer old"}) as answer:
        assert answer.status == 200, "it is over"


async def test_cuts_answers_in_half(proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession) -> None:
    with proxy.cutting(path="^/half"):
        async with client.get(f"{proxy.url}/half") as answer:
            assert await answer.content.readany() == b'{"path":'
            with pytest.raises(ClientPayloadError):
                await answer.read()
        async with client.get(f"{proxy.url}/whole") as answer:
            assert await answer.json() == {"path": "/whole"}


async def test_hangs_and_hangs_up(proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession) -> None:
    async with client.get(f"{proxy.url}/watch") as watch:
        with proxy.hanging():
            sent = asyncio.create_task(client.post(f"{proxy.url}/a"))  # a GET the client would send again
            far_side[0].events.put_nowait("unheard")
            line = asyncio.create_task(watch.content.readline())
            done, _ = await asyncio.wait([sent, line], timeout=0.5)
            assert not done, "neither an answer nor the end of one"
            assert proxy.count("POST", "/a") == 1
        with pytest.raises(ServerDisconnectedError):
            await asyncio.wait_for(sent, 10)
        with pytest.raises(ClientError):
            await asyncio.wait_for(line, 10)
    assert far_side[0].got == []


async def test_refuses_connections(proxy: Proxy, far_side: tuple[FarSide, str], client: ClientSession) -> None:
    async with client.get(f"{proxy.url}/a") as answer:
        assert answer.status == 200, "its connection is kept"
    async with client.get(f"{proxy.url}/watch") as watch:
        with proxy.refusing():
            with pytest.raises(ClientError):
                await asyncio.wait_for(watch.content.readline(), 10)
            with pytest.raises(ClientConnectorError):
                await client.get(f"{proxy.url}/a")
    async with client.get(f"{proxy.url}/a") as answer:
        assert answer.status == 200


async def test_tells_the_client_when_the_far_side_breaks_off(client: ClientSession) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return response

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestServer(app) as server:
        with Proxy(f"http://127.0.0.1:{server.port}") as proxy:
            async with client.get(proxy.url) as broken:
                with pytest.raises(ClientPayloadError):
                    await broken.read()


class Gate:
    """Lets requests pass up to a moment."""

    def __init__(self, *moments: str) -> None:
        self.moments = moments
        self.seen: list[str] = []

    def leaves(self) -> bool:
        return self._passes("leaves")

    def answered(self) -> bool:
        return self._passes("answered")

    def over(self) -> bool:
        return self._passes("over")

    def part(self) -> Gate | None:
        return None

    def _passes(self, moment: str) -> bool:
        self.seen.append(moment)
        return moment in self.moments


@pytest.mark.parametrize("moments", [[], ["leaves"], ["leaves", "answered"], ["leaves", "answered", "over"]])
async def test_a_gate_is_asked_at_each_moment(
    far_side: tuple[FarSide, str], client: ClientSession, moments: list[str]
) -> None:
    side, url = far_side
    gate = Gate(*moments)
    with Proxy(url, gate=lambda request: gate) as proxy:
        if len(moments) < 2:
            with pytest.raises(ServerDisconnectedError):
                await client.get(f"{proxy.url}/a")
        else:
            async with client.get(f"{proxy.url}/a") as answer:
                assert await answer.json() == {"path": "/a"}
    assert bool(side.got) == bool(moments)
    assert gate.seen[: len(moments)] == moments


async def test_names_in_answers_are_replaced(far_side: tuple[FarSide, str], client: ClientSession) -> None:
    with Proxy(far_side[1], renamed={b"/abc": b"/xyz"}) as proxy:
        async with client.get(f"{proxy.url}/abc") as answer:
            assert await answer.json() == {"path": "/xyz"}
