"""
Pods that people wrote, as JSON: what they may be written with, and how one is laid over the driver pod.

Mappings are merged, and so are the lists whose entries have a name; all other lists replace those of the driver pod.
A variable or a volume replaces the one of its name, since either is one of several kinds. That is what ``kubectl
patch`` does with the same pod, without its directives.

The trap: a client library's ``V1Pod`` does not have the API's field names. It knows them (``attribute_map``), and they
are read from there, so that neither ``kubernetes`` nor ``kubernetes_asyncio`` need be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from durable_spark.hooks._kubernetes_plan import SPARK_LABELS, refuse_our_names
from durable_spark.hooks._kubernetes_status import FINALIZER
from durable_spark.jobs import BadArguments

if TYPE_CHECKING:
    from durable_spark.jobs import SparkJob

__all__ = ["AT_END", "Options", "lay_over", "pod_as_dict"]

AT_END = "durable-spark/at-end"
"""Annotation: ``delete`` for a pod that goes once its end is recorded."""

_KEY_OF = {
    "containers": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "initContainers": "name",
    "ports": "name",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
"""By which key the entries of a list are told apart."""
_APPENDED = ("tolerations",)
_WHOLE = ("env", "volumes")
"""Lists whose entries are not merged."""


def pod_as_dict(pod: Any, what: str = "pod") -> dict[str, Any]:
    """
    Return a pod as plain JSON values, whether it is a mapping already or a ``V1Pod``. What is ``None`` is left out.

    :param what: how an error calls it.
    :raises BadArguments: when it is neither, or holds what JSON has not.
    """
    value = _plain(pod, what)
    if not isinstance(value, dict):
        raise BadArguments(f"{what} must be a mapping (the JSON form of a pod) or a V1Pod, not {type(pod).__name__}")
    if value.get("kind", "Pod") != "Pod" or value.get("apiVersion", "v1") != "v1":
        raise BadArguments(f"{what} is a {value.get('apiVersion')} {value.get('kind')}, not a v1 Pod")
    metadata, spec = _mapping(value, "metadata", what), _mapping(value, "spec", what)
    for part in ("labels", "annotations"):
        _mapping(metadata, part, f"{what}.metadata")
    _mapping(spec, "nodeSelector", f"{what}.spec")
    for part in ("imagePullSecrets", "tolerations", "volumes"):
        _mappings(spec, part, f"{what}.spec")
    for part in ("containers", "initContainers"):
        for index, container in enumerate(_mappings(spec, part, f"{what}.spec")):
            _check_container(container, f"{what}.spec.{part}[{index}]")
    return value


def lay_over(base: Mapping[str, Any], overlay: Mapping[str, Any], what: str = "pod") -> dict[str, Any]:
    """
    Return a mapping with another one laid over it.

    :param what: how an error calls the latter.
    :raises BadArguments: when an entry of a list has not the key that it is known by.
    """
    merged = dict(base)
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            merged[key] = lay_over(base[key], value, f"{what}.{key}")
        elif isinstance(value, list) and isinstance(base.get(key), list) and key in _APPENDED:
            merged[key] = [*base[key], *value]
        elif isinstance(value, list) and isinstance(base.get(key), list) and key in _KEY_OF:
            merged[key] = _lay_list_over(base[key], value, f"{what}.{key}", name=_KEY_OF[key], whole=key in _WHOLE)
        else:
            merged[key] = value
    return merged


def _check_container(container: Mapping[str, Any], what: str) -> None:
    for part in ("resources", "securityContext"):
        _mapping(container, part, what)
    for part in ("env", "ports", "volumeMounts"):
        _mappings(container, part, what)


def _mapping(value: Mapping[str, Any], key: str, what: str) -> Mapping[str, Any]:
    found = value.get(key, {})
    if not isinstance(found, dict):
        raise BadArguments(f"{what}.{key} must be a mapping, not {type(found).__name__}")
    return found


def _mappings(value: Mapping[str, Any], key: str, what: str) -> list[Any]:
    found = value.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise BadArguments(f"{what}.{key} must be a list of mappings")
    return found


def _lay_list_over(base: Sequence[Any], overlay: Sequence[Any], what: str, *, name: str, whole: bool) -> list[Any]:
    merged = list(base)
    for index, entry in enumerate(overlay):
        if name not in entry:
            raise BadArguments(f"{what}[{index}] has no {name}, by which it is told from the others")
        places = [place for place, old in enumerate(merged) if old.get(name) == entry[name]]
        if places:
            merged[places[-1]] = entry if whole else lay_over(merged[places[-1]], entry, f"{what}[{index}]")
        else:
            merged.append(entry)
    return merged


def _plain(value: Any, what: str) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_name(key, what): _plain(v, f"{what}.{key}") for key, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{what}[{index}]") for index, entry in enumerate(value)]
    if isinstance(fields := getattr(value, "attribute_map", None), Mapping) and hasattr(value, "openapi_types"):
        return _plain({name: getattr(value, attribute) for attribute, name in fields.items()}, what)
    raise BadArguments(f"{what} is a {type(value).__name__}, for which JSON has no form")


def _name(key: Any, what: str) -> str:
    if not isinstance(key, str):
        raise BadArguments(f"{what} has the key {key!r}, which is not a string")
    return key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What only Kubernetes understands of a job's options."""

    pod: dict[str, Any]
    hold: bool
    delete: bool

    @classmethod
    def of(cls, job: SparkJob) -> Options:
        if not isinstance(job.options, Mapping):
            raise BadArguments(f"options must be a mapping, not {type(job.options).__name__}")
        if unknown := sorted(map(str, set(job.options) - {"hold_pod", "pod", "pod_at_end"})):
            raise BadArguments(f"Kubernetes does not know {', '.join(unknown)}")
        pod = pod_as_dict(job.options.get("pod") or {})
        if unknown := sorted(set(pod) - {"apiVersion", "kind", "metadata", "spec"}):
            raise BadArguments(f"pod must not have {', '.join(unknown)}: only metadata and spec are yours to write")
        hold, at_end = job.options.get("hold_pod", False), job.options.get("pod_at_end", "keep")
        if not isinstance(hold, bool):
            raise BadArguments(f"hold_pod must be True or False, not {hold!r}")
        if at_end not in ("keep", "delete"):
            raise BadArguments(f"pod_at_end is {at_end!r}: give 'keep' or 'delete'")
        return cls(pod=pod, hold=hold, delete=at_end == "delete")

    def apply(self, pod: dict[str, Any], *, driver: str) -> dict[str, Any]:
        """
        Return the pod with the user's laid over it.

        :param driver: the driver container's name. A container without a name is meant to be it.
        """
        pod = lay_over(pod, self._checked(pod, driver))
        metadata = pod["metadata"]
        if self.hold:
            metadata["finalizers"] = [*metadata.get("finalizers", []), FINALIZER]
        if self.delete:
            metadata["annotations"][AT_END] = "delete"
        return pod

    def _checked(self, pod: Mapping[str, Any], driver: str) -> dict[str, Any]:
        metadata, spec = self.pod.get("metadata", {}), dict(self.pod.get("spec", {}))
        for kind in ("labels", "annotations"):
            refuse_our_names(f"pod.metadata.{kind}", metadata.get(kind, {}))
        for key in ("name", "namespace"):
            if metadata.get(key, pod["metadata"][key]) != pod["metadata"][key]:
                raise BadArguments(f"pod.metadata.{key} is not yours to set: it says which submission the pod is of")
        for key in SPARK_LABELS:
            if key in metadata.get("labels", {}):
                raise BadArguments(f"pod.metadata.labels must not have {key}: it is Spark's own")
        if spec.get("restartPolicy", "Never") != "Never":
            raise BadArguments("pod.spec.restartPolicy must be Never: one submission is one run")
        if "containers" in spec:
            spec["containers"] = _name_driver(spec["containers"], driver)
        return {"metadata": metadata, "spec": spec}


def _name_driver(containers: Sequence[Mapping[str, Any]], driver: str) -> list[Mapping[str, Any]]:
    """Give the first container without a name the driver's, unless another one has it."""
    named = list(containers)
    if driver not in [container.get("name") for container in named]:
        nameless = next((index for index, container in enumerate(named) if "name" not in container), None)
        if nameless is not None:
            named[nameless] = {"name": driver, **named[nameless]}
    return named
