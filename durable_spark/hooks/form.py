"""
The form of our connection type, as plain data for the provider's metadata.

The trap: Airflow reads that metadata while it is still being imported. Whatever it imports must not
import Airflow, so this cannot stand in the module of the hook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CONN_FIELDS", "UI_FIELD_BEHAVIOUR"]

_TEXT: Mapping[str, Any] = {"type": ["string", "null"]}
_LINES: Mapping[str, Any] = {**_TEXT, "format": "multiline"}
_SECRET: Mapping[str, Any] = {**_TEXT, "format": "password"}
_FLAG: Mapping[str, Any] = {"type": ["boolean", "null"]}
_LINK = "Kubernetes: http or https URL with {namespace}, {pod}, {uid} or {app_id}, for the button"

CONN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    name: {"label": label, "description": description, "schema": dict(schema)}
    for name, label, schema, description in (
        ("rest-scheme", "REST scheme", _TEXT, "Standalone: http or https. Default: http."),
        (
            "rest-port",
            "REST port",
            _TEXT,
            "Standalone: spark.master.rest.port, or one for each master, separated by commas. Default: 6066.",
        ),
        ("ui-scheme", "Web UI scheme", _TEXT, "Standalone: http or https. Default: http."),
        (
            "ui-port",
            "Web UI port",
            _TEXT,
            "Standalone: port of the master's web UI, or one for each master, separated by commas. Default: 8080.",
        ),
        (
            "yarn_resourcemanager_webapp_address",
            "ResourceManager address",
            _TEXT,
            "YARN: of its web app, http://host:8088; of several, separated by commas. Default: from HADOOP_CONF_DIR.",
        ),
        ("yarn-user", "YARN user", _TEXT, "YARN without Kerberos: who asks and kills (user.name)."),
        (
            "yarn-auth",
            "YARN authentication",
            _TEXT,
            "YARN: simple, kerberos, or auto: Kerberos if the ResourceManager asks for it. Default: auto.",
        ),
        ("principal", "Kerberos principal", _TEXT, "YARN: whose keytab or ticket is used. Default: the ticket's."),
        (
            "keytab",
            "Kerberos keytab",
            _SECRET,
            "YARN: base64 of a keytab, or the path of one that all Airflow processes can read. Default: ticket cache.",
        ),
        (
            "yarn-timeline-address",
            "Timeline server address",
            _TEXT,
            "YARN: of its web app, http://host:8188, for applications that the ResourceManager has forgotten.",
        ),
        (
            "namespace",
            "Namespace",
            _TEXT,
            "Kubernetes: of the driver pods. Default: the kubeconfig context's, the pod's own, or 'default'.",
        ),
        ("token-file", "Token file", _TEXT, "Kubernetes: path of a token, in place of one as the password."),
        (
            "kubeconfig",
            "Kubeconfig",
            _LINES,
            "Kubernetes: path of a file that all Airflow processes can read, or its text. Default: ~/.kube/config.",
        ),
        ("context", "Context", _TEXT, "Kubernetes: of the kubeconfig. Default: its current one."),
        ("in-cluster", "In cluster", _FLAG, "Kubernetes: the service account of the pod that Airflow runs in."),
        (
            "ca",
            "Certificate authority",
            _LINES,
            "Path of a PEM file that all Airflow processes can read, or its text. Default: kubeconfig's or system's.",
        ),
        ("dashboard-url", "Dashboard URL", _TEXT, f"{_LINK} 'Job'."),
        ("log-url", "Log URL", _TEXT, f"{_LINK} 'Driver log'."),
        (
            "history-url",
            "History URL",
            _TEXT,
            f"{_LINK} 'Spark history'. YARN: with {{app_id}}. Default there: the application's tracking URL.",
        ),
        ("poll-interval", "Poll interval", _TEXT, "Seconds between two polls of the cluster. Default: 5."),
    )
}
"""``conn-fields`` of the connection type, for the provider's metadata."""

UI_FIELD_BEHAVIOUR: Mapping[str, Any] = {
    "hidden-fields": ["schema"],
    "relabeling": {"host": "Master URL", "password": "Bearer token or password"},
    "placeholders": {
        "host": "spark://host:7077, spark://host1:7077,host2:7077, k8s://https://host:port or yarn",
        "login": "YARN: for a gateway that asks for login and password (Apache Knox)",
        "password": "Kubernetes: of a service account. Standalone: for masters with the JWSFilter. YARN: the login's",
    },
}
"""``ui-field-behaviour`` of the connection type, for the provider's metadata."""
