"""
What ``spark.kubernetes.*`` properties ask of a driver pod, read and checked, in Kubernetes' own terms.

The readers have the meaning, the defaults and the arithmetic that spark-submit gives the properties (Spark 4.3); the
docstrings name the place in Spark's source. Pure: no I/O.

The trap: Spark takes more for a secret than what is called one. Its redaction pattern looks at keys *and* values, and
:func:`secrecy` does the same, so that what Spark would not show on its own page is not shown in a pod either.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from durable_spark.hooks._spark_arguments import check_memory, mebibytes
from durable_spark.jobs import BadArguments

__all__ = [
    "Volume",
    "app_name_label",
    "check_executor_volumes",
    "driver_memory",
    "flag",
    "overhead_factor",
    "port",
    "prefixed",
    "quantity",
    "resources",
    "secrecy",
    "volumes",
]

_REDACTION = r"(?i)secret|password|token|access[.]?key"
"""Default of ``spark.redaction.regex`` (core's ``internal/config/package.scala``)."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]*)?([numkMGTPE]|[KMGTPE]i|[eE][-+]?[0-9]+)?")
_VOLUME = re.compile(r"([^.]+)\.([^.]+)\.")
_ON_DEMAND = "OnDemand"


class Volume(NamedTuple):
    """A volume of the pod and where the driver's container sees it."""

    volume: dict[str, Any]
    mount: dict[str, Any]


def prefixed(conf: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the properties that begin with a prefix, by the rest of their names."""
    return {key[len(prefix) :]: value for key, value in conf.items() if key.startswith(prefix) and key != prefix}


def flag(conf: Mapping[str, str], key: str) -> bool:
    """Return a boolean property, ``False`` when it is not set."""
    text = conf.get(key, "false").strip().lower()
    if text not in ("true", "false"):
        raise BadArguments(f"{key} is {conf[key]!r}: give true or false")
    return text == "true"


def port(conf: Mapping[str, str], *keys: str, default: int) -> int:
    """Return the port that the first of these properties gives."""
    for key in keys:
        if key in conf:
            text = conf[key].strip()
            if not text.isdecimal() or not 1 <= int(text) <= 65535:
                raise BadArguments(f"{key} is {conf[key]!r}: give a port, 1 to 65535; a pod declares its ports")
            return int(text)
    return default


def quantity(key: str, value: str) -> str:
    """Return a quantity as Kubernetes takes it."""
    if not _QUANTITY.fullmatch(value.strip()):
        raise BadArguments(f"{key} is {value!r}: give a Kubernetes quantity, such as 2, 500m or 1Gi")
    return value.strip()


def app_name_label(name: str) -> str:
    """Return an application's name as a label's value (``KubernetesConf.getAppNameLabel``)."""
    text = re.sub("-+", "-", re.sub(r"[^a-z0-9\-]", "-", name.strip().lower()))
    return text[:63].removeprefix("-").removesuffix("-")


def overhead_factor(conf: Mapping[str, str], *, jvm: bool) -> float:
    """Return the memory overhead factor of executors, and of a driver without its own (``BasicDriverFeatureStep``)."""
    return _factor(conf, "spark.kubernetes.memoryOverheadFactor", default=0.1 if jvm else 0.4)


def driver_memory(conf: Mapping[str, str], *, jvm: bool) -> int:
    """
    Return the MiB of memory of a driver's container: its heap and its overhead (``BasicDriverFeatureStep``).

    :param jvm: whether the application is a jar; Python and R need more beside the heap.
    """
    heap = check_memory("spark.driver.memory", conf.get("spark.driver.memory", "1g"))
    if "spark.driver.memoryOverhead" in conf:
        return heap + _overhead(conf, "spark.driver.memoryOverhead")
    key = "spark.driver.memoryOverheadFactor"
    factor = _factor(conf, key, default=overhead_factor(conf, jvm=jvm))
    if factor == 0 and key in conf:
        raise BadArguments(f"{key} is {conf[key]!r}: Spark wants a number greater than 0")
    return heap + max(int(factor * heap), _overhead(conf, "spark.driver.minMemoryOverhead", default="384m"))


def resources(conf: Mapping[str, str]) -> dict[str, str]:
    """
    Return the driver's custom resources, such as GPUs, by their Kubernetes names.

    ``spark.driver.resource.gpu.{amount,vendor}`` become ``nvidia.com/gpu`` (``KubernetesUtils``, ``ResourceUtils``).
    """
    settings = prefixed(conf, "spark.driver.resource.")
    limits = {}
    for name in sorted({key.partition(".")[0] for key in settings}):
        key = f"spark.driver.resource.{name}"
        amount = settings.get(f"{name}.amount", "").strip()
        if not amount.isdecimal():
            raise BadArguments(f"{key}.amount is {amount!r}: give the whole number that the driver needs")
        if int(amount) == 0:
            continue
        if not (vendor := settings.get(f"{name}.vendor")):
            raise BadArguments(f"{key}.vendor is missing: give the domain of its Kubernetes name, such as nvidia.com")
        limits[f"{vendor}/{name}"] = amount
    return limits


def volumes(conf: Mapping[str, str], *, claim_labels: Mapping[str, str]) -> list[Volume]:
    """
    Return the volumes of ``spark.kubernetes.driver.volumes.*`` (``KubernetesVolumeUtils``).

    An on-demand claim is a generic ephemeral volume here: Kubernetes itself creates it with the pod, and deletes it
    with the pod, like the one that spark-submit would create (``MountVolumesFeatureStep``).

    :param claim_labels: labels of an on-demand claim, beside the property's own.
    """
    claim = functools.partial(_claim, conf, claim_labels)
    return _volumes(conf, "spark.kubernetes.driver.volumes.", {**_SOURCES, "persistentVolumeClaim": claim})


def check_executor_volumes(conf: Mapping[str, str]) -> None:
    """Check ``spark.kubernetes.executor.volumes.*``: a driver that cannot read them waits for executors for ever."""
    _volumes(conf, "spark.kubernetes.executor.volumes.", {**_SOURCES, "persistentVolumeClaim": _executor_claim})


def secrecy(conf: Mapping[str, str]) -> Callable[[str, str], bool]:
    """
    Return what tells whether a setting or an environment variable, by name and value, is not to be shown.

    Spark's own pattern always counts, ``spark.redaction.regex`` as well if it is set.
    """
    patterns = [re.compile(_REDACTION)]
    if (own := conf.get("spark.redaction.regex")) is not None:
        try:
            patterns.append(re.compile(own))
        except re.error as error:
            raise BadArguments(
                f"spark.redaction.regex is {own[:200]!r}, which cannot be understood here ({error}): use what Java's "
                "and Python's regular expressions have in common"
            ) from error
    return lambda key, value: any(pattern.search(key) or pattern.search(value) for pattern in patterns)


def _factor(conf: Mapping[str, str], key: str, *, default: float) -> float:
    if (value := conf.get(key)) is None:
        return default
    if not _NUMBER.fullmatch(value.strip()):
        raise BadArguments(f"{key} is {value!r}: give a number such as 0.2")
    return float(value)


def _overhead(conf: Mapping[str, str], key: str, *, default: str = "") -> int:
    return mebibytes(key, conf.get(key, default), unit="m")


def _volumes(conf: Mapping[str, str], prefix: str, sources: Mapping[str, _Source]) -> list[Volume]:
    settings = prefixed(conf, prefix)
    found = []
    for kind, name in sorted({match.groups() for key in settings if (match := _VOLUME.match(key))}):
        key, options = f"{prefix}{kind}.{name}.", prefixed(settings, f"{kind}.{name}.")
        if kind not in sources:
            raise BadArguments(f"{key}* is a volume of a type that Spark does not know: use {', '.join(sources)}")
        found.append(Volume({"name": name, **sources[kind](key, options)}, _mount(key, name, options)))
    paths = [volume.mount["mountPath"] for volume in found]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise BadArguments(f"{prefix}* mount more than one volume at {', '.join(twice)}")
    return found


def _mount(key: str, name: str, options: Mapping[str, str]) -> dict[str, Any]:
    if "mount.subPath" in options and "mount.subPathExpr" in options:
        raise BadArguments(f"{key}mount.subPath and {key}mount.subPathExpr exclude each other")
    mount: dict[str, Any] = {"name": name, "mountPath": _needed(key, "mount.path", options)}
    if _read_only(key, options):
        mount["readOnly"] = True
    return mount | {
        part: options[f"mount.{part}"] for part in ("subPath", "subPathExpr") if options.get(f"mount.{part}")
    }


def _read_only(key: str, options: Mapping[str, str]) -> bool:
    return flag({f"{key}{option}": value for option, value in options.items()}, f"{key}mount.readOnly")


def _host_path(key: str, options: Mapping[str, str]) -> dict[str, Any]:
    return {"hostPath": {"path": _needed(key, "options.path", options), "type": options.get("options.type", "")}}


def _empty_dir(key: str, options: Mapping[str, str]) -> dict[str, Any]:
    source = {"medium": options["options.medium"]} if options.get("options.medium") else {}
    return {"emptyDir": source | _size(key, options, "sizeLimit")}


def _nfs(key: str, options: Mapping[str, str]) -> dict[str, Any]:
    return {"nfs": {part: _needed(key, f"options.{part}", options) for part in ("path", "server")}}


def _claim(conf: Mapping[str, str], labels: Mapping[str, str], key: str, options: Mapping[str, str]) -> dict[str, Any]:
    name = _needed(key, "options.claimName", options)
    created = "options.storageClass" in options and "options.sizeLimit" in options
    if _ON_DEMAND not in name and not created:
        source = {"claimName": name} | ({"readOnly": True} if _read_only(key, options) else {})
        return {"persistentVolumeClaim": source}
    if not created:
        raise BadArguments(f"{key}options.claimName is {name!r}: give options.storageClass and options.sizeLimit too")
    if _ON_DEMAND not in name:
        raise BadArguments(
            f"{key}options.storageClass and sizeLimit ask for the claim {name!r} to be created, which is done for "
            f"{_ON_DEMAND} alone: create it beforehand and leave them out, or set options.claimName to {_ON_DEMAND}"
        )
    legacy = flag(conf, "spark.kubernetes.legacy.useReadWriteOnceAccessMode")
    template = {
        "metadata": {
            "labels": {**prefixed(options, "label."), **labels},
            "annotations": prefixed(options, "annotation."),
        },
        "spec": {
            "accessModes": ["ReadWriteOnce" if legacy else "ReadWriteOncePod"],
            "storageClassName": options["options.storageClass"],
            "resources": {"requests": _size(key, options, "storage")},
        },
    }
    return {"ephemeral": {"volumeClaimTemplate": template}}


def _executor_claim(key: str, options: Mapping[str, str]) -> dict[str, Any]:
    _size(key, options, "storage")
    return {"persistentVolumeClaim": {"claimName": _needed(key, "options.claimName", options)}}


_Source = Callable[[str, Mapping[str, str]], dict[str, Any]]
_SOURCES: Mapping[str, _Source] = {"hostPath": _host_path, "emptyDir": _empty_dir, "nfs": _nfs}


def _size(key: str, options: Mapping[str, str], name: str) -> dict[str, str]:
    if "options.sizeLimit" not in options:
        return {}
    size = quantity(f"{key}options.sizeLimit", options["options.sizeLimit"])
    if size.isdecimal() and int(size) < 1024:
        raise BadArguments(f"{key}options.sizeLimit is {size!r}, less than a kibibyte: give a unit, such as 1Gi")
    return {name: size}


def _needed(key: str, option: str, options: Mapping[str, str]) -> str:
    if not (value := options.get(option)):
        raise BadArguments(f"{key}{option} is missing")
    return value
