"""
Simulated time: an event loop whose clock stands still while code runs and jumps while it would wait.

In: a clock that all loops of a test share. Out: loops for the product's own coroutines, in which an hour of backoff
costs what its steps cost. What a loop is to do in a thread is done at once, where it is asked for.

The trap: there are no sockets and no threads here, so a loop with nothing scheduled would wait for ever. That is
:class:`Stuck`, at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(AssertionError):
    """A coroutine waits for what will never come."""


class Clock:
    """The one clock, in seconds since the epoch; it is the monotonic one as well."""

    def __init__(self, now: float = 1_795_406_100.0) -> None:
        self.now = now

    @property
    def module(self) -> Any:
        """What stands in the place of the module ``time`` in a module of the product."""

        def read() -> float:
            return self.now

        return SimpleNamespace(time=read, monotonic=read, gmtime=time.gmtime, strftime=time.strftime)


class Loop(asyncio.base_events.BaseEventLoop):
    """
    An event loop in simulated time.

    :param clock: is moved on while the loop would wait.
    :param tell: is told what an event loop tells its exception handler.
    """

    def __init__(self, clock: Clock, tell: Callable[[dict[str, Any]], None] = lambda context: None) -> None:
        super().__init__()
        self._clock = clock
        self._tell = tell
        self._clock_resolution = 1e-6  # at 1.8e9, neighbouring floats are 2.4e-7 apart
        self._selector = self

    def time(self) -> float:
        """Return the clock's time."""
        return self._clock.now

    def select(self, timeout: float | None) -> list[Any]:
        """Wait: move the clock on."""
        if timeout is None:
            raise Stuck("nothing is scheduled, and something is waited for")
        self._clock.now += max(0.0, timeout)
        return []

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Call at once."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def run_for(self, seconds: float) -> None:
        """Run whatever there is to run until that much time has passed."""
        stop = self.call_at(self.time() + seconds, self.stop)
        try:
            self.run_forever()
        finally:
            stop.cancel()  # it may have been ended before, by what killed its process

    def complete(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns."""
        return self.run_until_complete(coroutine)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Tell it."""
        self._tell(context)

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
