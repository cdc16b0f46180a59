"""
Hadoop's own programs: the jars of a ResourceManager, a NodeManager and what talks to them.

There is no package of YARN's servers, and Hadoop's tarball is a gigabyte from places that are often out
of reach; a Maven repository is not. What flows in is the pinned version; what flows out is a directory
in the user's cache with some 160 jars, each verified by its SHA-256 whenever it is asked for.

The trap: a ResourceManager loads classes of the timeline service even where none is used, so its jars
are asked for, too.

``python -m dev.hadoop`` gets what is missing and prints the directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dev.cache import cached, in_cache, intact, sums
from dev.processes import ToolMissing
from dev.spark import java_home

__all__ = ["HADOOP_VERSION", "Hadoop", "ensure_hadoop"]

HADOOP_VERSION = "3.5.0"
"""The version of the clients that Spark brings."""

_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_ARTIFACTS = (
    "hadoop-common",
    "hadoop-yarn-client",
    "hadoop-yarn-server-applicationhistoryservice",
    "hadoop-yarn-server-nodemanager",
    "hadoop-yarn-server-resourcemanager",
    "hadoop-yarn-server-timelineservice",
)
_PINNED = "4cd30f2a91b6951c95bbcdac22e550c8e4fab5936d020b101faf2cbefe2d3b6a"
"""SHA-256 of the list of all jars\' checksums."""


@dataclasses.dataclass(frozen=True)
class Hadoop:
    """One Hadoop, ready to run."""

    version: str
    jars: Path
    """The directory that holds all of them."""

    @property
    def classpath(self) -> str:
        """For ``java -cp``."""
        return f"{self.jars}/*"


@functools.cache
def ensure_hadoop() -> Hadoop:
    """
    Return Hadoop's jars, fetched into the user's cache on first use (90 MB, ten seconds).

    :raises ToolMissing: when there is no fitting Java, or jars have to be fetched and there is no Maven.
    """
    java_home()
    return Hadoop(HADOOP_VERSION, cached(_name(), _fetch))


def _name() -> str:
    return f"hadoop-{HADOOP_VERSION}-{hashlib.sha256(_pom().encode()).hexdigest()[:8]}"


def _pom() -> str:
    dependencies = "".join(
        f"\n    <dependency><groupId>org.apache.hadoop</groupId><artifactId>{artifact}</artifactId>"
        f"<version>{HADOOP_VERSION}</version></dependency>"
        for artifact in _ARTIFACTS
    )
    return f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>durable-spark</groupId><artifactId>hadoop</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>{dependencies}
  </dependencies>
</project>
"""


def _fetch(directory: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ToolMissing("Hadoop's jars come from a Maven repository, and there is no mvn: install maven")
    print(f"Getting Hadoop {HADOOP_VERSION} (once; 90 MB) ...", file=sys.stderr, flush=True)
    pom = directory.with_name("pom.xml")
    pom.write_text(_pom())
    options = {
        "includeScope": "runtime",
        "maven.repo.local": directory.with_name("repository"),  # the jars are copied out of it, and it goes
        "outputDirectory": directory,
    }
    command = [maven, "-B", "-q", "-f", str(pom), _COPY, *(f"-D{name}={value}" for name, value in options.items())]
    environment = os.environ | {"JAVA_HOME": str(java_home())}
    ended = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ended.returncode:
        raise RuntimeError(f"mvn ended with {ended.returncode}:\n{ended.stdout}")
    found = sums(directory)
    if (digest := hashlib.sha256(found.encode()).hexdigest()) != _PINNED:
        raise RuntimeError(f"the jars' checksums have SHA-256 {digest}, which is not pinned:\n{found}")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.hadoop", description="Hadoop's jars.")
    parser.add_argument("--cached", action="store_true", help="get nothing; fail when anything is missing")
    if parser.parse_args().cached:
        return 0 if intact(in_cache(_name())) else 1
    try:
        print(ensure_hadoop().jars)
    except ToolMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
