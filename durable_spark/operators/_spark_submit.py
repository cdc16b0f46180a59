"""
One run of ``spark-submit`` in cluster mode: it submits and leaves, watched for the job that comes of it.

What flows in: a command, the hook of the cluster. What flows out: the job, the moment that the tool's output
vouches for it or the cluster shows it, whichever comes first; and the exit code.

The trap: the tool must never outlive the task, or it submits after the retry has looked. It runs in a process group of
its own under :mod:`durable_spark.operators._guard`, and that group is killed whenever the run is left, by an
exception, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from durable_spark.hooks._spark_arguments import parse_properties
from durable_spark.jobs import BadArguments, BadConfiguration, DurableJobError

if TYPE_CHECKING:
    from durable_spark.hooks.cli import SparkCliHook
    from durable_spark.jobs import JobRef, Submission

__all__ = ["SparkSubmitRun", "check_command", "read_spark_defaults", "short_lived_jvm"]

LOOK_INTERVAL = 1.0
"""Seconds between two looks at the cluster while the tool runs."""
LINGER = 1.0
"""Seconds that the tool may take to leave once the cluster has the job. On a standalone cluster it looks on for 5 s."""
GRACE = 5.0
"""Seconds that the tool may take to tidy up when it is told to leave."""
_DRAIN = 2.0
"""Seconds for what is left of the output after the tool has ended: a process that it left behind may hold the pipe."""
_LINE_LIMIT = 1 << 16
_GUARD = Path(__file__).with_name("_guard.py")

log = logging.getLogger(__name__)


class SparkSubmitRun:
    """
    One run.

    :param command: the command.
    :param env: its whole environment.
    :param hook: of the cluster that it submits to.
    :param submission: that it submits.
    :param on_line: called with each line of the output, standard error included.
    :param on_job: called once with the job, as soon as the cluster is known to have it.
    :param output_is_proof: whether the output alone proves whose job it is; else it is only a reason to look.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        hook: SparkCliHook,
        submission: Submission,
        on_line: Callable[[str], None],
        on_job: Callable[[JobRef], None],
        output_is_proof: bool = True,
    ) -> None:
        self.job: JobRef | None = None
        self._command = command
        self._env = env
        self._hook = hook
        self._submission = submission
        self._on_line = on_line
        self._on_job = on_job
        self._output_is_proof = output_is_proof
        self._hint = asyncio.Event()
        self._known = asyncio.Event()
        self._group: int | None = None
        self._sent_away = False

    async def wait(self) -> int:
        """
        Run the command to its end and return its exit code, negative for a signal.

        A tool that does not leave although the cluster has the job is interrupted, and killed after a while; that
        counts as a good end. Called from the main thread, whose death the kernel notices.
        """
        loop = asyncio.get_running_loop()
        reading_end, writing_end = os.pipe()
        output = asyncio.StreamReader(limit=_LINE_LIMIT)
        pipe, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(reading_end, "rb", buffering=0)
        )
        tasks: list[asyncio.Future[Any]] = []
        try:
            process = self._start(writing_end)
            exiting = loop.run_in_executor(None, process.wait)
            reading = asyncio.ensure_future(self._read(output))
            tasks = [exiting, reading]
            tasks += map(asyncio.ensure_future, (self._look(), self._end_lingering(), self._end_with_the_supervisor()))
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()  # when it failed, nobody reads on, and the tool may never end
            await exiting
            await asyncio.wait([reading], timeout=_DRAIN)  # what the tool has left behind may hold the pipe for longer
            if reading.done():
                reading.result()
            return 0 if self._sent_away else exiting.result()
        finally:
            self.kill()
            for task in tasks[1:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            pipe.close()
            self._group = None  # the number may be another's from now on

    def _start(self, writing_end: int) -> subprocess.Popen[bytes]:
        """
        Start the tool, and know its group before Airflow's timer can interrupt: what is not known is not killed.

        The guard lets the signals through again.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            process = subprocess.Popen(  # noqa: S603 the user's own command
                [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=writing_end,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
            self._group = process.pid
            return process
        finally:
            os.close(writing_end)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def kill(self) -> None:
        """Kill the tool and all that it has started. May be called from a signal handler."""
        self._signal(signal.SIGKILL)

    async def look(self) -> JobRef | None:
        """Return the job if the cluster shows it in one cheap look."""
        try:
            ref = await self._hook.glimpse(self._submission)
        except DurableJobError as error:
            log.debug("No look at the cluster while spark-submit runs: %s", error)
            return None
        if ref is not None:
            self._found(ref)
        return ref

    def _found(self, ref: JobRef) -> None:
        first, self.job = self.job is None, ref
        if first:
            self._known.set()
            self._on_job(ref)

    async def _look(self) -> None:
        while self.job is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._hint.wait(), LOOK_INTERVAL)
            self._hint.clear()
            await self.look()

    async def _end_lingering(self) -> None:
        await self._known.wait()
        await asyncio.sleep(LINGER)
        self._sent_away = True
        self._signal(signal.SIGINT)  # a JVM removes its temporary files
        await asyncio.sleep(GRACE)
        self.kill()

    async def _end_with_the_supervisor(self) -> None:
        """
        Kill the tool when the process that watches over this one dies: Airflow will then run the task again elsewhere.

        A task's process lives on without its supervisor (tried on 3.3.2), and what it submitted would come beside the
        job of the retry.
        """
        supervisor = os.getppid()
        while os.getppid() == supervisor:  # noqa: ASYNC110 nothing announces it
            await asyncio.sleep(LOOK_INTERVAL)
        log.error("The process that watches over this task is dead: killing spark-submit")
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, number)

    async def _read(self, output: asyncio.StreamReader) -> None:
        rest = b""
        while data := await output.read(_LINE_LIMIT):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            if len(rest) > _LINE_LIMIT:
                self._take(rest)
                rest = b""
        if rest:
            self._take(rest)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self._on_line(text)
        if self.job is None and (ref := self._hook.job_in(text, self._submission)) is not None:
            if self._output_is_proof:
                self._found(ref)
            else:
                self._hint.set()


def check_command(command: Sequence[str], env: Mapping[str, str]) -> None:
    """
    See that the command can be started.

    :raises BadConfiguration: when this worker has no such program.
    """
    if shutil.which(command[0], path=env.get("PATH")) is None:
        raise BadConfiguration(
            f"spark_binary: {command[0]!r} is not on the PATH of this Airflow worker: install Spark there, or use "
            "durable_spark.operators.spark.SparkJobOperator, which needs none"
        )


_CHEAP = "-XX:TieredStopAtLevel=1 -Xmn24m -Xshare:auto"
"""No collector among them: a JVM refuses to start with two, and one may be set where we do not see it."""


def short_lived_jvm(env: Mapping[str, str]) -> Mapping[str, str]:
    """
    Return what to set in the environment of ``spark-submit`` so that its JVMs start soon and stay small.

    They live for seconds: the optimising compiler costs more than it saves, and a young generation of the usual size
    is filled once and never collected. ``spark-class`` gives ``SPARK_LAUNCHER_OPTS`` to the JVM that composes the
    command, which gives ``SPARK_SUBMIT_OPTS`` to the one that submits; neither reaches the job. The user's own options
    stand last, where they win.
    """
    return {name: f"{_CHEAP} {env.get(name, '')}".strip() for name in ("SPARK_SUBMIT_OPTS", "SPARK_LAUNCHER_OPTS")}


def read_spark_defaults(properties_file: str | None, *, binary: str, env: Mapping[str, str]) -> Mapping[str, str]:
    """
    Return the properties that ``spark-submit`` reads from a file: the one it is told of, or ``spark-defaults.conf``.

    Where that lies is found as Spark's own scripts find it: by ``SPARK_CONF_DIR``, ``SPARK_HOME``, the program's place.

    :raises BadArguments: when the file that the user named cannot be read.
    """
    if properties_file:
        try:
            return parse_properties(Path(properties_file).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise BadArguments(
                f"properties_file {properties_file!r} cannot be read on this Airflow worker: {error}"
            ) from error
    for path in _defaults_files(binary, env):
        with contextlib.suppress(OSError, ValueError):
            return parse_properties(path.read_text(encoding="utf-8"))
    return {}


def _defaults_files(binary: str, env: Mapping[str, str]) -> Iterator[Path]:
    name = "spark-defaults.conf"
    if directory := env.get("SPARK_CONF_DIR"):
        yield Path(directory) / name
    elif home := env.get("SPARK_HOME"):
        yield Path(home) / "conf" / name
    elif program := shutil.which(binary, path=env.get("PATH")):
        home_of = Path(program).resolve().parent.parent
        yield home_of / "conf" / name
        yield from home_of.glob(f"lib/python3*/site-packages/pyspark/conf/{name}")
