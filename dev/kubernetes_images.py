"""
Images for a real container runtime, made of almost nothing.

What flows in is the machine as it is and the environment that :mod:`dev.spark` keeps, what flows out are the archives
that containerd imports and the mounts that every container gets: the machine's programs, Java and Spark stay where
they are, read-only, and are seen there by the containers. So an image holds an entrypoint, a few links and
directories, and takes milliseconds to make and import.

The trap: a path that leads through symbolic links (``.venv/bin/python``) works only where each of its stations is
mounted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dev.processes import ToolMissing
from dev.spark import Spark, ensure_spark

__all__ = ["PAUSE", "mounts", "write_images"]

PAUSE = "localhost/pause:test"
_ROOT = Path(__file__).resolve().parents[1]
_PROGRAMS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # on most machines links into /usr
_WORK = "/opt/spark/work-dir"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENTRYPOINT = """#!/bin/bash
# Does as the entrypoint of Spark's own image does, for the roles of driver and executor.
set -e
role=${1-}
case "$role" in
driver)
  shift
  exec "$SPARK_HOME/bin/spark-submit" --conf "spark.driver.bindAddress=$SPARK_DRIVER_BIND_ADDRESS" \\
    --conf "spark.executorEnv.SPARK_DRIVER_POD_IP=$SPARK_DRIVER_BIND_ADDRESS" --deploy-mode client "$@"
  ;;
executor)
  mapfile -t options < <(env | grep ^SPARK_JAVA_OPT_ | sort -t_ -k4 -n | sed 's/[^=]*=//')
  exec "$JAVA_HOME/bin/java" "${options[@]}" "-Xms$SPARK_EXECUTOR_MEMORY" "-Xmx$SPARK_EXECUTOR_MEMORY" \\
    -cp "$SPARK_CLASSPATH:$SPARK_HOME/jars/*" org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \\
    --driver-url "$SPARK_DRIVER_URL" --executor-id "$SPARK_EXECUTOR_ID" --cores "$SPARK_EXECUTOR_CORES" \\
    --app-id "$SPARK_APPLICATION_ID" --hostname "$SPARK_EXECUTOR_POD_IP" \\
    --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" --podName "$SPARK_EXECUTOR_POD_NAME"
  ;;
*) exec "$@" ;;
esac
"""


def write_images(directory: Path) -> list[Path]:
    """Write the images' archives and return their paths; Spark's is left out where Spark cannot be had."""
    directory.mkdir(parents=True, exist_ok=True)
    images: dict[str, Mapping[str, object]] = {
        "localhost/busybox:test": {"Cmd": ["true"], "WorkingDir": "/", "Env": [f"PATH={_PATH}", "HOME=/"]},
    }
    if spark := _spark():
        # The developer's own settings are no part of an image.
        environment = {"PATH": _PATH, "HOME": "/nonexistent", **_spark_variables(spark)}
        variables = [f"{name}={value}" for name, value in environment.items()]
        images["localhost/spark:test"] = {
            "Entrypoint": ["/opt/entrypoint.sh"],
            "WorkingDir": _WORK,
            "Env": variables,
        }
    layer = _layer()
    archives = [_write_archive(directory, name, layer, config) for name, config in images.items()]
    pause = {"Entrypoint": ["/bin/sleep", "infinity"]}
    return [*archives, _write_archive(directory, PAUSE, _pause_layer(), pause)]


def mounts() -> list[dict[str, object]]:
    """Return what each container sees of the machine, as the OCI runtime specification takes it."""
    wanted = {"/usr", "/etc", str(_ROOT), *(path for path in _PROGRAMS if os.path.isdir(path))}
    wanted = {path for path in wanted if not os.path.islink(path)}
    if spark := _spark():
        java = Path(spark.environment()["JAVA_HOME"])
        wanted |= {str(path) for path in (spark.python.parents[1], java, *_installations(spark.python))}
    return [
        {"destination": path, "source": path, "type": "bind", "options": ["rbind", "ro"]}
        for path in sorted(wanted)
        if not any(path.startswith(f"{other}/") for other in wanted)
    ]


def _spark() -> Spark | None:
    try:
        return ensure_spark()
    except ToolMissing as missing:
        print(missing, flush=True)
        return None


def _spark_variables(spark: Spark) -> Mapping[str, str]:
    given = spark.environment()
    return {name: given[name] for name in ("JAVA_HOME", "SPARK_HOME", "PYSPARK_PYTHON")}


def _installations(python: Path) -> Iterator[Path]:
    """Yield where an interpreter is installed, through all of its links."""
    while python.is_symlink():
        python = python.parent / os.readlink(python)
        yield Path(os.path.normpath(python)).parents[1]
    yield python.resolve().parents[1]


def _layer() -> bytes:
    directories = ("etc", "opt", "opt/spark", "opt/spark/work-dir", "proc", "root", "run", "sys", "dev", "usr", "var")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in (*directories, "tmp", "var/tmp"):
            entry = tarfile.TarInfo(path)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if path.endswith("tmp") else 0o755
            archive.addfile(entry)
        for path, target in _links():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
        _add(archive, "opt/entrypoint.sh", _ENTRYPOINT.encode())
    return content.getvalue()


def _pause_layer() -> bytes:
    """Return what the container that holds a pod's network needs: it gets no mounts."""
    sleep = shutil.which("sleep") or "/bin/sleep"
    needed = subprocess.run(["ldd", sleep], check=True, stdout=subprocess.PIPE, text=True).stdout
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        _add(archive, "bin/sleep", Path(sleep).read_bytes())
        for library in re.findall(r"(/\S+) \(0x", needed):
            _add(archive, library[1:], Path(library).read_bytes())
    return content.getvalue()


def _links() -> Iterable[tuple[str, str]]:
    yield "var/run", "/run"
    for path in _PROGRAMS:
        if os.path.islink(path):
            yield path[1:], os.readlink(path)


def _write_archive(directory: Path, name: str, layer: bytes, config: Mapping[str, object]) -> Path:
    """Write an archive as ``docker save`` does."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    digests: Sequence[str] = [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    image = {
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": digests},
    }
    described = json.dumps(image).encode()
    file = f"{hashlib.sha256(described).hexdigest()}.json"
    manifest = [{"Config": file, "RepoTags": [name], "Layers": ["layer.tar"]}]
    path = directory / f"{name.partition('/')[2].partition(':')[0]}.tar"
    with tarfile.open(path, "w") as archive:
        _add(archive, "layer.tar", layer)
        _add(archive, file, described)
        _add(archive, "manifest.json", json.dumps(manifest).encode())
    return path


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o755
    archive.addfile(entry, io.BytesIO(content))
