"""
Where a person looks at a driver pod: links made from the templates in a connection.

A Kubernetes API server has no pages of its own, so nothing is linked unless the connection says where its dashboard,
its log system and the Spark history server are. What flows in: templates, and names that were validated. What flows
out: URLs.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

from durable_spark.jobs import Link

if TYPE_CHECKING:
    from durable_spark.hooks._connection import Extras

__all__ = ["LinkTemplates"]

_FIELDS = ("namespace", "pod", "app_id", "uid")
_EXTRAS = {Link.JOB: "dashboard-url", Link.LOG: "log-url", Link.HISTORY: "history-url"}
_EXAMPLE = "https://host/{namespace}/{pod}"


class LinkTemplates(NamedTuple):
    """Checked templates, by link."""

    templates: Mapping[Link, str]

    @classmethod
    def read(cls, extras: Extras) -> LinkTemplates:
        """
        Read the templates from a connection's extras.

        :raises BadConfiguration: for one that is no ``http`` URL, or has a placeholder that nobody fills.
        """
        templates = {}
        for link, name in _EXTRAS.items():
            if (template := extras.text(name)) is not None:
                if not _usable(template):
                    known = ", ".join(f"{{{field}}}" for field in _FIELDS)
                    raise extras.wrong(name, template, f"give an http or https URL such as {_EXAMPLE}, with {known}")
                templates[link] = template
        return cls(templates)

    def fill(self, **values: str) -> dict[Link, str]:
        """
        Return the links for one pod; a template that asks for a value that is not known makes none.

        :param values: ``namespace``, ``pod``, ``app_id``, ``uid``; an empty one is not known.
        """
        known = {name: quote(value, safe="") for name, value in values.items() if value}
        links = {}
        for link, template in self.templates.items():
            try:
                links[link] = template.format_map(known)
            except KeyError:
                continue
        return links


def _usable(template: str) -> bool:
    try:
        fields = [
            (name, spec, conversion)
            for _, name, spec, conversion in string.Formatter().parse(template)
            if name is not None
        ]
        parts = urlsplit(template)
    except ValueError:
        return False
    plain = all(name in _FIELDS and not spec and not conversion for name, spec, conversion in fields)
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and template.isprintable()
