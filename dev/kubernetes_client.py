"""
The API server, as the node asks it: asynchronously, and again until it answers.

What flows in are paths and bodies, what flows out are JSON objects and the events of a watch. An API server
that is away or overloaded is waited for; only a refusal is an error.

The trap: one that hangs keeps its connections open, so every wait here has a limit.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

__all__ = ["Api", "Object", "Refused"]

Object = dict[str, Any]


class Refused(Exception):
    """The API server answered, and it was no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status = status


class Api:
    """The API server, which may be away for a while."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def request(self, method: str, path: str, body: Object | None = None, *, kind: str = "") -> Object:
        """Send a request until it is answered; return the answer."""
        while True:
            try:
                return await self._request(method, path, body, kind or "application/json")
            except (aiohttp.ClientError, asyncio.TimeoutError):
                await asyncio.sleep(0.2)
            except Refused as error:
                if error.status != 429 and error.status < 500:
                    raise
                await asyncio.sleep(0.2)

    async def get(self, path: str) -> Object | None:
        """Return an object, or ``None``."""
        try:
            return await self.request("GET", path)
        except Refused as error:
            if error.status == 404:
                return None
            raise

    async def _request(self, method: str, path: str, body: Object | None, kind: str) -> Object:
        headers = {"Content-Type": kind}
        limit = aiohttp.ClientTimeout(total=10)
        async with self._session.request(method, self._url + path, json=body, headers=headers, timeout=limit) as answer:
            content: Object = await answer.json(content_type=None)
            if answer.status >= 400:
                raise Refused(answer.status, content.get("message", ""))
            return content

    async def watch(self, path: str) -> AsyncIterator[Object]:
        """Yield what happens, until the connection ends; it may be silent until the API server ends it."""
        limit = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
        rest = b""
        async with self._session.get(f"{self._url}{path}&timeoutSeconds=240", timeout=limit) as answer:
            answer.raise_for_status()
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield json.loads(line)
