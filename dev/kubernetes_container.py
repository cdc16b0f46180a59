"""
What a pod's container is made of: its image, its variables, the content of its volumes.

What flows in is the pod's manifest, what flows out is what :mod:`dev.kubernetes_pod` is told. Images are few,
and none is a file: :func:`image_named` knows what each would bring along, and for Spark's does as its
entrypoint does.

The trap: config maps and secrets may come later than the pod that asks for them (``spark-submit`` makes them
in that order), so what is missing is :class:`NotYet` there.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dev.kubernetes_client import Refused
from dev.processes import ToolMissing
from dev.spark import ensure_spark

if TYPE_CHECKING:
    from dev.kubernetes_client import Api, Object

__all__ = ["Image", "Inputs", "NotYet", "expand", "image_named", "mount_point"]


class NotYet(Exception):
    """A pod cannot start, for a reason that may go away."""

    def __init__(self, reason: str, message: str = "", *, event: str = "", about: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.event = event or reason
        self.about = about or message


@dataclasses.dataclass(frozen=True)
class Image:
    """What an image would bring along."""

    environment: Mapping[str, str]
    command: Callable[[Sequence[str], Mapping[str, str]], Sequence[str]]
    """From arguments and environment, for a container without a command of its own."""


async def image_named(name: str) -> Image | None:
    if name == "localhost/busybox:test":
        path = os.environ.get("PATH", os.defpath)
        return Image({"PATH": path, "HOME": "/"}, lambda arguments, environment: arguments or ["true"])
    if name == "localhost/spark:test":
        return await asyncio.to_thread(_spark_image)
    return None


@functools.cache
def _spark_image() -> Image | None:
    try:
        spark = ensure_spark()
    except ToolMissing as missing:
        print(missing, flush=True)
        return None
    environment = {name: value for name, value in spark.environment().items() if name != "SPARK_LOCAL_IP"}
    # The developer's own HOME may hold a kubeconfig, which Spark's client would believe.
    return Image({**environment, "HOME": "/nonexistent"}, _spark_command)


def _spark_command(arguments: Sequence[str], environment: Mapping[str, str]) -> Sequence[str]:
    """Do as the ``entrypoint.sh`` of Spark's image does."""
    role, *rest = arguments or ["true"]
    if role == "driver":
        address = environment.get("SPARK_DRIVER_BIND_ADDRESS", "")
        bind = ["--conf", f"spark.driver.bindAddress={address}"]
        executors = ["--conf", f"spark.executorEnv.SPARK_DRIVER_POD_IP={address}"]
        return [f"{environment['SPARK_HOME']}/bin/spark-submit", *bind, *executors, "--deploy-mode", "client", *rest]
    if role == "executor":
        return _spark_executor(environment)
    return arguments


def _spark_executor(environment: Mapping[str, str]) -> Sequence[str]:
    numbered = [name for name in environment if re.fullmatch(r"SPARK_JAVA_OPT_\d+", name)]
    options = [environment[name] for name in sorted(numbered, key=lambda name: int(name.rpartition("_")[2]))]
    memory = environment.get("SPARK_EXECUTOR_MEMORY", "")
    classpath = ":".join(filter(None, [environment.get("SPARK_CLASSPATH"), f"{environment['SPARK_HOME']}/jars/*"]))
    java = [f"{environment['JAVA_HOME']}/bin/java", *options, f"-Xms{memory}", f"-Xmx{memory}", "-cp", classpath]
    told = {
        "driver-url": "SPARK_DRIVER_URL",
        "executor-id": "SPARK_EXECUTOR_ID",
        "cores": "SPARK_EXECUTOR_CORES",
        "app-id": "SPARK_APPLICATION_ID",
        "hostname": "SPARK_EXECUTOR_POD_IP",
        "resourceProfileId": "SPARK_RESOURCE_PROFILE_ID",
        "podName": "SPARK_EXECUTOR_POD_NAME",
    }
    backend = "org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend"
    return [
        *java,
        backend,
        *(part for name, source in told.items() for part in (f"--{name}", environment.get(source, ""))),
    ]


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Expand ``$(NAME)`` as Kubernetes does: ``$$`` is a dollar, an unknown name stays as it is."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[1] is None else environment.get(found[1], found[0])

    return re.sub(r"\$(?:\$|\(([^)]*)\))", value, text)


class Inputs:
    """What the API server knows that a pod's variables and volumes ask for."""

    def __init__(self, api: Api, manifest: Object, fields: Mapping[str, str]) -> None:
        self._api = api
        self._metadata = manifest["metadata"]
        self._spec = manifest["spec"]
        self._fields = fields
        self._root = f"/api/v1/namespaces/{self._metadata['namespace']}"

    def field(self, path: str) -> str:
        """Return a field of the pod, as ``fieldRef`` names it."""
        if one := re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path):
            return str(self._metadata.get(one[1], {}).get(one[2], ""))
        if path in ("metadata.labels", "metadata.annotations"):
            values = self._metadata.get(path.rpartition(".")[2], {})
            return "\n".join(f"{name}={json.dumps(value)}" for name, value in sorted(values.items()))
        return self._fields.get(path, "")

    async def map(self, kind: Literal["configmap", "secret"], source: Object) -> dict[str, bytes] | None:
        """Return the data of a config map or secret; ``None`` when there is none and need not be."""
        name = source.get("name") or source["secretName"]
        found = await self._api.get(f"{self._root}/{kind}s/{name}")
        if found is None:
            if source.get("optional"):
                return None
            raise NotYet("CreateContainerConfigError", f'{kind} "{name}" not found', event="Failed")
        if kind == "secret":
            return {key: base64.b64decode(value) for key, value in found.get("data", {}).items()}
        text = {key: value.encode() for key, value in found.get("data", {}).items()}
        return text | {key: base64.b64decode(value) for key, value in found.get("binaryData", {}).items()}

    async def variables(self, container: Object, known: Mapping[str, str]) -> dict[str, str]:
        """Return the environment that a container asks for; later ones may refer to earlier ones."""
        environment = dict(known)
        for source in container.get("envFrom", []):
            kind: Literal["configmap", "secret"] = "configmap" if "configMapRef" in source else "secret"
            data = await self.map(kind, source[f"{'configMap' if kind == 'configmap' else kind}Ref"]) or {}
            environment |= {source.get("prefix", "") + key: value.decode() for key, value in data.items()}
        for entry in container.get("env", []):
            if "valueFrom" in entry:
                value = await self._value_from(entry["valueFrom"])
            else:
                value = expand(entry.get("value", ""), environment)
            if value is not None:
                environment[entry["name"]] = value
        return environment

    async def _value_from(self, source: Object) -> str | None:
        if "fieldRef" in source:
            return self.field(source["fieldRef"]["fieldPath"])
        kind: Literal["configmap", "secret"] = "secret" if "secretKeyRef" in source else "configmap"
        reference = source["secretKeyRef"] if kind == "secret" else source["configMapKeyRef"]
        data = await self.map(kind, reference) or {}
        if reference["key"] in data:
            return data[reference["key"]].decode()
        if reference.get("optional"):
            return None
        where = f"{'Secret' if kind == 'secret' else 'ConfigMap'} {self._metadata['namespace']}/{reference['name']}"
        message = f"couldn't find key {reference['key']} in {where}"
        raise NotYet("CreateContainerConfigError", message, event="Failed")

    async def volume(self, volume: Object, directory: Path) -> Path:
        """Return where a volume's content is: on the machine, or in ``directory``."""
        try:
            if "hostPath" in volume:
                return self._host_path(volume["hostPath"])
            _write(directory, await self._files(volume))
        except NotYet as error:
            about = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error.message}'
            raise NotYet("ContainerCreating", event="FailedMount", about=about) from None
        return directory

    def _host_path(self, source: Object) -> Path:
        path = Path(source["path"])
        if source.get("type") in ("DirectoryOrCreate", None, ""):
            if not path.exists():
                path.mkdir(parents=True)
        elif not path.exists():
            raise NotYet("", f"hostPath type check failed: {path} is not a {source['type'].lower()}")
        return path

    async def _files(self, volume: Object) -> dict[str, bytes]:
        if "configMap" in volume:
            return _chosen(await self.map("configmap", volume["configMap"]), volume["configMap"])
        if "secret" in volume:
            return _chosen(await self.map("secret", volume["secret"]), volume["secret"])
        if "downwardAPI" in volume:
            return self._fields_in_files(volume["downwardAPI"])
        if "projected" in volume:
            return await self._projected(volume["projected"].get("sources", []))
        if "emptyDir" in volume:
            return {}
        raise NotYet("", f"this node has no volumes like {sorted(volume)}")

    async def _projected(self, sources: Iterable[Object]) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for source in sources:
            if "serviceAccountToken" in source:
                files[source["serviceAccountToken"]["path"]] = await self._token(source["serviceAccountToken"])
            elif "downwardAPI" in source:
                files |= self._fields_in_files(source["downwardAPI"])
            elif "configMap" in source:
                files |= _chosen(await self.map("configmap", source["configMap"]), source["configMap"])
            elif "secret" in source:
                files |= _chosen(await self.map("secret", source["secret"]), source["secret"])
        return files

    def _fields_in_files(self, source: Object) -> dict[str, bytes]:
        items = source.get("items", [])
        return {item["path"]: self.field(item["fieldRef"]["fieldPath"]).encode() for item in items}

    async def _token(self, source: Object) -> bytes:
        pod = {"apiVersion": "v1", "kind": "Pod", "name": self._metadata["name"], "uid": self._metadata["uid"]}
        asked = {"expirationSeconds": source.get("expirationSeconds", 3607), "boundObjectRef": pod}
        if "audience" in source:
            asked["audiences"] = [source["audience"]]
        account = self._spec.get("serviceAccountName", "default")
        try:
            answer = await self._api.request("POST", f"{self._root}/serviceaccounts/{account}/token", {"spec": asked})
        except Refused as error:
            raise NotYet("", f"failed to fetch token: {error}") from None
        token: str = answer["status"]["token"]
        return token.encode()


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _chosen(data: dict[str, bytes] | None, source: Object) -> dict[str, bytes]:
    """Return files by path: those that a volume's ``items`` name, or all."""
    if data is None or not source.get("items"):
        return data or {}
    try:
        return {item["path"]: data[item["key"]] for item in source["items"]}
    except KeyError as missing:
        raise NotYet("", f"references non-existent config key: {missing.args[0]}") from None


def mount_point(entry: Object, volumes: Mapping[str, Path]) -> tuple[str, str]:
    source = volumes[entry["name"]]
    if part := entry.get("subPath"):
        source = source / part
        if not source.exists():
            source.mkdir(parents=True)
    return str(source), entry["mountPath"]
