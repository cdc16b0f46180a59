"""A relay on loopback that counts the bytes that go through it, whatever they mean."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType

from typing_extensions import Self

from dev.processes import free_port

__all__ = ["Relay"]

_AT_ONCE = 65536


class Relay:
    """
    Passes on what comes to its port; a context manager, with a thread of its own.

    :param target: the port of 127.0.0.1 to which it passes it on.
    :ivar bytes: how many went through, both ways.
    """

    def __init__(self, target: int) -> None:
        self.target, self.port, self.bytes = target, free_port(), 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"relay to {target}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError(f"no relay listens on port {self.port}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(10)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._serving = self._loop.create_task(self._serve())
            self._loop.run_until_complete(self._serving)
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self) -> None:
        await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self._ready.set()
        await asyncio.Event().wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(_AT_ONCE):
                    self.bytes += len(data)
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()
