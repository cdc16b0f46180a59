"""
The log of an ApplicationMaster, which in cluster mode is the driver's.

What flows in: the NodeManager that ran it, as the ResourceManager names it, and a container. What flows out: lines.

The trap: a NodeManager serves a log with a header and a footer of its own, and forgets it soon after the application
has ended; it redirects to a log server then. What the connection knows of such a server is its timeline server.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from durable_spark.jobs import ClusterError, DurableJobError

if TYPE_CHECKING:
    from durable_spark.hooks._yarn_managers import Managers

__all__ = ["LogReader", "contents_of"]

LOG_BYTES = 64 << 10
"""Bytes that are read from the end of each log."""
_LIMIT = 1 << 20
"""Bytes that an answer may have: a NodeManager that is too old for ``size`` sends the whole log."""
_HEADER = re.compile(r"\A.{0,4000}?^LogContents:\n", re.DOTALL | re.MULTILINE)
_FOOTER = "End of LogType:"


class LogReader:
    """
    Reads the logs of one container.

    :param managers: as whom we ask. Neither password nor cookies of a ResourceManager go to a NodeManager.
    :param node: origin of the NodeManager's web app.
    :param container: its ID.
    """

    def __init__(self, managers: Managers, node: str, container: str) -> None:
        self._managers = managers
        self._node = node
        self._container = container

    async def tail(self, lines: int) -> Sequence[str]:
        """Return the last lines of ``stderr`` and, if there are any, of ``stdout``, where Python's tracebacks are."""
        errors, output = await asyncio.gather(self._read("stderr"), self._read("stdout"))
        written = output[-(lines // 2) :] if lines > 1 else []
        shown = errors[-max(0, lines - len(written) - bool(written)) :] if len(written) + bool(written) < lines else []
        return [*shown, "--- stdout:", *written][-lines:] if written else errors[-lines:]

    async def _read(self, name: str) -> Sequence[str]:
        failure: DurableJobError | None = None
        for url in await self._places(name):
            try:
                answer = await self._managers.fetch(url, limit=_LIMIT, timeout=5.0)
                if answer.status == 200:
                    return contents_of(answer.text).strip().splitlines()
            except ClusterError as error:
                failure = error
        if failure is not None:
            raise failure
        return []

    async def _places(self, name: str) -> Sequence[str]:
        places = [f"{self._node}/ws/v1/node/containerlogs/{self._container}/{name}?size=-{LOG_BYTES}"]
        if timeline := (await self._managers.settings()).timeline:
            path = f"ws/v1/applicationhistory/containerlogs/{self._container}/{name}?size=-{LOG_BYTES}"
            places.append(f"{timeline}/{path}")
        return places


def contents_of(text: str) -> str:
    """Return a log without what a NodeManager puts around it."""
    header = _HEADER.match(text)
    if header is None:
        return text
    text = text[header.end() :]
    log, found, rest = text.rpartition(_FOOTER)  # no pattern: blanks in the log make one take hours
    _, *more = rest.rstrip().split("\n")
    stars = len(more) == 1 and more[0].strip("*") == ""
    return log.removesuffix("\n") if found and (not more or stars) else text
