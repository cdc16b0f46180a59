"""Relays on loopback, before a cluster's ports, that count what goes through them, whatever it means."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from dev.processes import free_port

__all__ = ["Relay", "Relays"]

_AT_ONCE = 65536


class Relay:
    """
    Passes on what comes to its port; a context manager, with a thread of its own.

    :param target: the port of 127.0.0.1 to which it passes it on.
    :ivar bytes: how many went through, both ways.
    :ivar opened: when each connection was opened, by ``time.monotonic()``.
    :ivar closed: when each that is closed was.
    """

    def __init__(self, target: int) -> None:
        self.target, self.port, self.bytes = target, free_port(), 0
        self.opened: list[float] = []
        self.closed: list[float] = []
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
        await asyncio.start_server(self._connected, "127.0.0.1", self.port, backlog=1024)
        self._ready.set()
        await asyncio.Event().wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened.append(time.monotonic())
        with contextlib.closing(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))
        self.closed.append(time.monotonic())

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(_AT_ONCE):
                    self.bytes += len(data)
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()


class Relays(contextlib.ExitStack):
    """
    Relays before several ports; a context manager.

    :param targets: the ports.
    """

    def __init__(self, targets: Iterable[int]) -> None:
        super().__init__()
        self._relays = {str(target): Relay(target) for target in targets}

    def __enter__(self) -> Self:
        for relay in self._relays.values():
            self.enter_context(relay)
        return self

    @property
    def bytes(self) -> int:
        """How many went through all of them, both ways."""
        return sum(relay.bytes for relay in self._relays.values())

    @property
    def opened(self) -> list[float]:
        """When each connection was opened, by ``time.monotonic()``, in their order."""
        return sorted(at for relay in self._relays.values() for at in relay.opened)

    @property
    def closed(self) -> list[float]:
        """When each that is closed was, in their order."""
        return sorted(at for relay in self._relays.values() for at in relay.closed)

    def copy(self, source: Path, target: Path) -> None:
        """Copy the files of a folder into another one, as :meth:`before` returns their texts."""
        for file in source.iterdir():
            (target / file.name).write_text(self.before(file.read_text()))

    def before(self, text: str) -> str:
        """Return a text, such as a connection or a configuration, with the relays' ports in the place of those."""
        return re.sub(
            r"\b\d{5}\b", lambda match: str(self._relays[match[0]].port) if match[0] in self._relays else match[0], text
        )
