"""
Where the ResourceManagers are, from Hadoop's own configuration on this machine.

``spark-submit`` finds them by ``HADOOP_CONF_DIR`` or ``YARN_CONF_DIR``, and a connection that says nothing means the
same cluster. What flows in: ``core-site.xml`` and ``yarn-site.xml`` of that folder. What flows out: addresses of
web apps.

The trap: the folder is read by whichever process asks. The triggerer follows the jobs, so it needs the folder as much
as the workers do.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from durable_spark.jobs import BadConfiguration

__all__ = ["Site", "read_site"]

_FOLDERS = ("HADOOP_CONF_DIR", "YARN_CONF_DIR")
"""In the order in which Spark puts them on its class path, so that both find the same cluster."""
_SIZE_LIMIT = 4 << 20
_DEPTH_LIMIT = 20
"""``Configuration.MAX_SUBST``."""
_VARIABLE = re.compile(r"\$\{([^}$\s]+)\}")


class Site(NamedTuple):
    """
    What the configuration says.

    :param managers: addresses of the ResourceManagers' web apps, as URLs; not checked yet.
    :param timeline: of the timeline server's, ``""`` if it is not in use.
    :param source: the file, for messages.
    """

    managers: Sequence[str]
    timeline: str
    source: str


async def read_site() -> Site | None:
    """
    Return what the Hadoop configuration of this process says, ``None`` if there is none.

    :raises BadConfiguration: when it cannot be read, or names no ResourceManager.
    """
    return await asyncio.to_thread(_read_site)


def _read_site() -> Site | None:
    folder = next((Path(path) for name in _FOLDERS if (path := os.environ.get(name)) and _has_site(Path(path))), None)
    if folder is None:
        return None
    source = folder / "yarn-site.xml"
    conf = _Conf({**_properties(folder / "core-site.xml"), **_properties(source)}, source)
    https = conf.get("yarn.http.policy").upper() == "HTTPS_ONLY"
    return Site(managers=_managers(conf, https=https), timeline=_timeline(conf, https=https), source=str(source))


def _has_site(folder: Path) -> bool:
    return (folder / "yarn-site.xml").is_file()


class _Conf:
    """Properties with their variables replaced, as far as they are known here."""

    def __init__(self, properties: Mapping[str, str], source: Path) -> None:
        self._properties = properties
        self.source = source

    def get(self, name: str, default: str = "") -> str:
        return self._expanded(self._properties.get(name, default)).strip()

    def flag(self, name: str) -> bool:
        return self.get(name).lower() == "true"

    def _expanded(self, value: str) -> str:
        for _ in range(_DEPTH_LIMIT):
            replaced = _VARIABLE.sub(self._variable, value)
            if replaced == value:
                break
            value = replaced
        return value

    def _variable(self, match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith("env."):
            return os.environ.get(name.removeprefix("env."), match[0])
        return self._properties.get(name, match[0])


def _managers(conf: _Conf, *, https: bool) -> Sequence[str]:
    in_pairs = conf.flag("yarn.resourcemanager.ha.enabled")
    ids = [each.strip() for each in conf.get("yarn.resourcemanager.ha.rm-ids").split(",") if each.strip()]
    suffixes = [f".{each}" for each in ids] if in_pairs and ids else [""]
    managers = []
    for suffix in suffixes:
        host = conf.get(f"yarn.resourcemanager.hostname{suffix}")
        key = f"yarn.resourcemanager.webapp{'.https' if https else ''}.address{suffix}"
        managers.append(_url(conf, key, host=host, https=https, port=8090 if https else 8088))
    return managers


def _timeline(conf: _Conf, *, https: bool) -> str:
    """Return the address of a timeline server of version 1, the only one that keeps the ends of applications."""
    if not conf.flag("yarn.timeline-service.enabled") or conf.get("yarn.timeline-service.version", "1").startswith("2"):
        return ""
    key = f"yarn.timeline-service.webapp{'.https' if https else ''}.address"
    host = conf.get("yarn.timeline-service.hostname")
    return _url(conf, key, host=host, https=https, port=8190 if https else 8188)


def _url(conf: _Conf, key: str, *, host: str, https: bool, port: int) -> str:
    address = conf.get(key) or (f"{host}:{port}" if host else "")
    name, _, given = address.rpartition(":")
    if name == "0.0.0.0" and host:  # noqa: S104 what it binds is not where it is reached
        address = f"{host}:{given}"
    if not address or "${" in address or address.startswith("0.0.0.0"):  # noqa: S104
        raise BadConfiguration(
            f"{conf.source} does not say where {key} is: set it there, or give the address in the connection's extra "
            "'yarn_resourcemanager_webapp_address' ('yarn-timeline-address' for the timeline server)"
        )
    return f"{'https' if https else 'http'}://{address}"


def _properties(path: Path) -> dict[str, str]:
    """Return the properties of a file; none if there is no such file. Of two of a name, the last one counts."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _SIZE_LIMIT:
            raise ValueError(f"it has more than {_SIZE_LIMIT} bytes")
        text = path.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ValueError("it has a document type; none is needed")
        root = ElementTree.fromstring(text)  # noqa: S314 a file of this machine, bounded, without entities
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise BadConfiguration(f"the Hadoop configuration {path} cannot be read: {error}") from error
    found = {}
    for each in root.iter("property"):
        name = (each.findtext("name") or "").strip()
        if name:
            found[name] = each.findtext("value") or ""
    return found
