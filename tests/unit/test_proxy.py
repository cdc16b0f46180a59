"""The proxy that other tests trust to stop a request at a given instant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import ClientSession, ServerDisconnectedError, web
from aiohttp.test_utils import TestServer

from dev.processes import free_port, wait_until
from dev.proxy import Proxy


class FarSide:
    """Answers, and remembers what it was sent."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.got.append((request.raw_path, await request.text()))
        status = 404 if "absent" in request.path else 200
        return web.json_response({"path": request.raw_path}, status=status, headers={"Refreshed-API-Token": "new"})


@pytest.fixture
async def far_side() -> AsyncIterator[tuple[FarSide, str]]:
    side, app = FarSide(), web.Application()
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
