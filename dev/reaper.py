"""
The end of what outlives its server on purpose.

A NodeManager's containers run in sessions of their own and go on when it dies, which is what tests are
about; so neither :class:`dev.processes.Server` nor the kernel ends them with the rest. What they have in
common is a directory, in their command lines and environments. :func:`sweep` kills by that.
:class:`Reaper` does it also when this process is killed: it waits for the end of a pipe that nobody else
holds.

The trap: a process that starts others while it is looked for. A sweep ends when it found nothing.

``python -m dev.reaper`` reads the directory from its standard input, and sweeps when that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["Reaper", "mentioning", "sweep"]

_ROOT = Path(__file__).resolve().parents[1]


def mentioning(text: str | Path) -> list[int]:
    """Return the processes, but for this one, whose command line or environment mentions this text."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            about = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
        except OSError:
            continue  # it has ended just now, or is another user's
        if str(text).encode() in about and int(directory.name) != os.getpid():
            found.append(int(directory.name))
    return found


def sweep(directory: Path) -> None:
    """Send SIGKILL to all processes that mention a directory; return when there is none."""
    until = time.monotonic() + 10
    while found := mentioning(directory):
        if time.monotonic() > until:
            raise RuntimeError(f"processes {found}, which mention {directory}, do not die")
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)


class Reaper:
    """
    A process that sweeps when this one dies, however it dies.

    :param directory: no process mentions it but those that are to be killed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to wait."""
        command = [sys.executable, "-m", "dev.reaper"]
        self._process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._directory}\n".encode())  # as an argument it would be a mention
        self._process.stdin.flush()

    def stop(self) -> None:
        """Sweep now, and end."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
        sweep(self._directory)


def _main() -> None:
    directory = sys.stdin.readline().strip()
    sys.stdin.read()
    if directory:
        sweep(Path(directory))
        time.sleep(1)  # a server that dies with this one's parent may have started one more just before
        sweep(Path(directory))


if __name__ == "__main__":
    _main()
