"""
The form of our connection type, as plain data for the provider's metadata.

The trap: Airflow reads that metadata while it is still being imported. Whatever it imports must not
import Airflow, so this cannot stand in the module of the hook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CONN_FIELDS", "UI_FIELD_BEHAVIOUR"]

CONN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    name: {"label": label, "description": description, "schema": {"type": kind}}
    for name, label, kind, description in (
        ("rest-scheme", "REST scheme", ["string", "null"], "Standalone: http or https. Default: http."),
        (
            "rest-port",
            "REST port",
            ["string", "null"],
            "Standalone: spark.master.rest.port, or one for each master, separated by commas. Default: 6066.",
        ),
        ("ui-scheme", "Web UI scheme", ["string", "null"], "Standalone: http or https. Default: http."),
        (
            "ui-port",
            "Web UI port",
            ["string", "null"],
            "Standalone: port of the master's web UI, or one for each master, separated by commas. Default: 8080.",
        ),
        (
            "ca",
            "Certificate authority",
            ["string", "null"],
            "Path of a PEM file that all Airflow processes can read, or the PEM text. Default: the system's.",
        ),
        ("poll-interval", "Poll interval", ["string", "null"], "Seconds between two polls of the cluster. Default: 5."),
    )
}
"""``conn-fields`` of the connection type, for the provider's metadata."""

UI_FIELD_BEHAVIOUR: Mapping[str, Any] = {
    "hidden-fields": ["schema", "login"],
    "relabeling": {"host": "Master URL", "password": "Bearer token (JWS)"},
    "placeholders": {
        "host": "spark://host:7077 or spark://host1:7077,host2:7077",
        "password": "only for masters with spark.master.rest.filters=org.apache.spark.ui.JWSFilter",
    },
}
"""``ui-field-behaviour`` of the connection type, for the provider's metadata."""
