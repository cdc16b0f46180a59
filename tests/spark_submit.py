"""
Spark's own spark-submit, for many submissions in one JVM, and its own reading of what a driver pod is told.

A JVM's start costs seconds, a submission a tenth of that. What ``bin/spark-submit`` runs is ``SparkSubmit``, and so is
this: the same class with the same arguments, in a JVM that has no Spark settings of its own.

The trap: the name of the config map is drawn once in a JVM's life. Whoever submits again deletes it first.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from dev.spark import SMALL_JVM

if TYPE_CHECKING:
    from dev.spark import Spark

__all__ = ["SparkSubmit"]

_PROPERTIES = "/opt/spark/conf/spark.properties"

_SCRIPT = """
import json, sys
from pyspark.java_gateway import launch_gateway

gateway = launch_gateway()
system = gateway.jvm.System
for line in sys.stdin:
    for name in list(system.getProperties().stringPropertyNames()):
        if name.startswith("spark."):  # of the gateway itself, or of the last application
            system.clearProperty(name)
    command, arguments = json.loads(line)
    array = gateway.new_array(gateway.jvm.String, len(arguments))
    for index, argument in enumerate(arguments):
        array[index] = argument
    spark_submit = gateway.jvm.org.apache.spark.deploy.SparkSubmit()
    if command == "submit":
        answer = spark_submit.doSubmit(array)
    else:
        parsed = spark_submit.parseArguments(array)
        conf = parsed.toSparkConf(getattr(parsed, "toSparkConf$default$1")())
        children = parsed.childArgs()
        answer = {
            "properties": {pair._1(): pair._2() for pair in conf.getAll()},
            "application": [parsed.proxyUser(), parsed.mainClass(), parsed.primaryResource()],
            "arguments": [children.apply(index) for index in range(children.size())],
        }
    print(json.dumps([answer]), flush=True)
"""
"""For Spark's own interpreter."""


class SparkSubmit:
    """A JVM that submits."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process = process
        self._log = log

    @classmethod
    @contextlib.contextmanager
    def started(cls, spark: Spark) -> Iterator[SparkSubmit]:
        """Start one, and end it."""
        environment = spark.environment() | {"SPARK_LAUNCHER_OPTS": SMALL_JVM, "JDK_JAVA_OPTIONS": SMALL_JVM}
        del environment["PYSPARK_PYTHON"]  # the driver would be told of it
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(
                [str(spark.python), "-c", _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            ) as process,
        ):
            try:
                yield cls(process, log)
            finally:
                process.kill()

    def submit(self, arguments: Sequence[str]) -> None:
        """
        Submit an application.

        :param arguments: of ``spark-submit``.
        """
        self._ask("submit", arguments)

    def read(self, arguments: Sequence[str], properties: str) -> dict[str, Any]:
        """
        Return what SparkSubmit in a driver pod understands: properties, application and the application's arguments.

        :param arguments: of the pod, which begin with ``driver``.
        :param properties: what is in the file that they name.
        """
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
            file.write(properties)
            file.flush()
            place = arguments.index("driver") + 1  # the entrypoint of Spark's images goes on like this
            told = [file.name if argument == _PROPERTIES else argument for argument in arguments[place:]]
            answer: dict[str, Any] = self._ask("read", ["--deploy-mode", "client", *told])
        return answer

    def _ask(self, command: str, arguments: Sequence[str], *, timeout: float = 60.0) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps([command, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = "".join(text for text in self._log if not text.startswith("\tat "))
            raise AssertionError(f"spark-submit could not {command} {arguments}:\n{said[-4000:]}")
        return json.loads(line)[0]
