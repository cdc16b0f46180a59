"""
From an Airflow connection to an API server: its address, its certificate authority, credentials that stay fresh.

What flows in: a connection whose master URL begins with ``k8s://``. What flows out: :class:`Settings`, read from the
connection alone, and :class:`Access`, for which kubeconfig files, service account files and exec plugins are read.
kubernetes-asyncio's own loaders do that, in a thread, because they block.

The trap: a kubeconfig holds client certificates in line, and both the loaders and Python's ``ssl`` want them as files.
They are handed over in anonymous memory, so that no key is written to a disk.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import os
import re
import ssl
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from durable_spark.hooks._connection import Extras, master_url, read_connection
from durable_spark.hooks._http import ssl_context
from durable_spark.hooks._kubernetes_links import LinkTemplates
from durable_spark.hooks._kubernetes_plan import is_namespace
from durable_spark.jobs import AuthenticationFailed, BadConfiguration, ClusterUnreachable

if TYPE_CHECKING:
    from kubernetes_asyncio.client import Configuration
    from kubernetes_asyncio.config.kube_config import ConfigNode, KubeConfigLoader

__all__ = ["Access", "Settings", "load_access", "read_settings"]

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its token, its certificate authority and its namespace."""
TOKEN_FILE_LIFETIME = 60.0
"""Seconds after which a token file is read again: the kubelet replaces projected tokens in time."""
EXPIRY_MARGIN = 60.0
"""Seconds before their end at which credentials are replaced."""
LOADING_TIMEOUT = 30.0
"""Seconds that an exec plugin, or an identity provider, may take."""

_MALFORMED = (OSError, ValueError, KeyError, AttributeError, AssertionError, TypeError)
"""What the loaders raise for files that are not what they should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """
    What the connection says, checked.

    :param server: ``https://host:port`` with an optional path; ``None``: a kubeconfig or the pod's environment has it.
    """

    conn_id: str
    server: str | None
    namespace: str | None
    token: str | None = dataclasses.field(repr=False)
    token_file: str | None
    kubeconfig: str | None = dataclasses.field(repr=False)
    context: str | None
    in_cluster: bool
    ca: str | None
    poll_interval: float
    links: LinkTemplates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """
    A way to speak to an API server.

    :param server: its URL, without a slash at the end.
    :param namespace: of the jobs, unless they say otherwise.
    :param authorization: value of the header, or ``None`` for a client certificate.
    :param expires: when the authorization must be loaded anew, in seconds since the epoch.
    :param tls: for ``https``.
    :param proxy: URL of the kubeconfig's proxy.
    :param server_hostname: the name in the server's certificate, if not the URL's.
    """

    server: str
    namespace: str
    authorization: str | None = dataclasses.field(default=None, repr=False)
    expires: float | None = None
    tls: ssl.SSLContext | None = None
    proxy: str | None = dataclasses.field(default=None, repr=False)
    server_hostname: str | None = None

    @property
    def fresh(self) -> bool:
        """Whether the credentials can still be used."""
        return self.expires is None or time.time() < self.expires


async def read_settings(conn_id: str, *, poll_interval: float) -> Settings:
    """
    Read a connection.

    :param poll_interval: seconds, unless the connection says otherwise.
    :raises BadConfiguration: naming the field and the fix.
    """
    connection = await read_connection(conn_id)
    extras = Extras(connection)
    namespace = extras.text("namespace")
    if namespace is not None and not is_namespace(namespace):
        raise extras.wrong("namespace", namespace, "give the name of a Kubernetes namespace, such as spark")
    settings = Settings(
        conn_id=conn_id,
        server=_server(master_url(connection), conn_id),
        namespace=namespace,
        token=(connection.password or "").strip() or None,
        token_file=extras.text("token-file"),
        kubeconfig=extras.text("kubeconfig"),
        context=extras.text("context"),
        in_cluster=extras.flag("in-cluster"),
        ca=extras.text("ca"),
        poll_interval=extras.seconds("poll-interval", poll_interval),
        links=LinkTemplates.read(extras),
    )
    _check(settings)
    return settings


async def load_access(settings: Settings) -> Access:
    """
    Load the credentials that the connection names; without a name those of this process: kubeconfig, then pod.

    :raises BadConfiguration: when there are none, or they cannot be used.
    :raises AuthenticationFailed: when an exec plugin or an identity provider gives none.
    """
    if settings.token or settings.token_file:
        return await _token_access(settings)
    access = await asyncio.to_thread(_load, settings)
    if settings.ca:
        access = dataclasses.replace(access, tls=await ssl_context(settings.ca))
    return access


def _server(url: str, conn_id: str) -> str | None:
    """Return the API server's URL from the master URL, as Spark takes it: ``https`` unless it says ``http``."""
    text = url[len("k8s://") :] if url.lower().startswith("k8s://") else url
    if not text.strip("/"):
        return None
    text = text if text.endswith("://") else text.rstrip("/")
    text = text if "://" in text else f"https://{text}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = re.fullmatch(r"[!-~]+", text) and re.fullmatch(r"[\w.:-]+", parts.hostname or "", re.ASCII)
    if parts.scheme not in ("http", "https") or not plain or not parts.hostname or parts.query or parts.fragment:
        raise BadConfiguration(
            f"the master URL {url[:200]!r} of connection {conn_id!r} cannot be used: give k8s://https://host:port, or "
            "k8s:// alone with the extra 'kubeconfig' or 'in-cluster'"
        )
    if parts.username is not None or parts.password is not None:
        raise BadConfiguration(
            f"the master URL of connection {conn_id!r} holds credentials: give a token as the password instead"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or (443 if parts.scheme == 'https' else 80)}{parts.path}"


def _check(settings: Settings) -> None:
    sources = {
        "the password": settings.token,
        "the extra 'token-file'": settings.token_file,
        "the extra 'kubeconfig'": settings.kubeconfig,
        "the extra 'in-cluster'": settings.in_cluster,
    }
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        raise BadConfiguration(
            f"connection {settings.conn_id!r} has credentials in {' and '.join(given)}: leave one of them"
        )
    if settings.context and given and not settings.kubeconfig:
        raise BadConfiguration(
            f"connection {settings.conn_id!r} has the extra 'context', which is a kubeconfig's, beside {given[0]}: "
            "leave one of them"
        )
    if settings.server is None and (settings.token or settings.token_file):
        raise BadConfiguration(
            f"connection {settings.conn_id!r} has a token but no API server: give k8s://https://host:port as the host"
        )


async def _token_access(settings: Settings) -> Access:
    assert settings.server is not None  # noqa: S101 _check() has seen to it
    token, expires = settings.token, None
    if settings.token_file:
        path = Path(settings.token_file)
        try:
            token = (await asyncio.to_thread(path.read_text)).strip()
        except (OSError, ValueError) as error:
            raise BadConfiguration(
                f"the extra 'token-file' of connection {settings.conn_id!r} cannot be read here: {error}"
            ) from error
        if not token:
            raise BadConfiguration(f"the file of the extra 'token-file' of connection {settings.conn_id!r} is empty")
        expires = time.time() + TOKEN_FILE_LIFETIME
    return Access(
        server=settings.server,
        namespace=settings.namespace or "default",
        authorization=_header(f"Bearer {token}", settings),
        expires=expires,
        tls=await ssl_context(settings.ca) if settings.ca else None,
    )


def _header(value: str, settings: Settings) -> str:
    if not value.isascii() or not value.isprintable():
        raise BadConfiguration(
            f"the token of connection {settings.conn_id!r} holds characters that no token has: give the token alone"
        )
    return value


# What kubernetes-asyncio loads. Called in a thread


def _load(settings: Settings) -> Access:
    from kubernetes_asyncio.config.config_exception import ConfigException

    try:
        if settings.in_cluster:
            return _in_cluster(settings)
        if settings.kubeconfig or settings.context:
            return _from_kubeconfig(settings)
        if any(Path(path).expanduser().is_file() for path in _default_kubeconfig().split(os.pathsep) if path):
            return _from_kubeconfig(settings)
        if (SERVICE_ACCOUNT / "token").is_file():
            return _in_cluster(settings)
    except ConfigException as error:
        raise BadConfiguration(
            f"the Kubernetes credentials of connection {settings.conn_id!r} cannot be used: {error}"
        ) from error
    except _MALFORMED as error:
        raise BadConfiguration(
            f"the Kubernetes credentials of connection {settings.conn_id!r} cannot be used: "
            f"{type(error).__name__}: {error}"
        ) from error
    raise BadConfiguration(
        f"connection {settings.conn_id!r} has no credentials, and there is neither a kubeconfig nor a pod's service "
        "account here: give a token as the password, or one of the extras 'kubeconfig', 'token-file' and 'in-cluster'"
    )


def _in_cluster(settings: Settings) -> Access:
    from kubernetes_asyncio.client import Configuration
    from kubernetes_asyncio.config import load_incluster_config

    configuration = Configuration()
    load_incluster_config(
        client_configuration=configuration,
        token_filename=str(SERVICE_ACCOUNT / "token"),
        cert_filename=str(SERVICE_ACCOUNT / "ca.crt"),
    )
    return Access(
        server=settings.server or str(configuration.host),
        namespace=settings.namespace or _text_of(SERVICE_ACCOUNT / "namespace") or "default",
        authorization=_header(configuration.api_key["BearerToken"].strip(), settings),
        expires=time.time() + TOKEN_FILE_LIFETIME,
        tls=ssl.create_default_context(cafile=configuration.ssl_ca_cert),
    )


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _default_kubeconfig() -> str:
    return os.environ.get("KUBECONFIG") or "~/.kube/config"


def _from_kubeconfig(settings: Settings) -> Access:
    from kubernetes_asyncio.client import Configuration

    configuration = Configuration()
    configuration.host = ""
    with tempfile.TemporaryDirectory(prefix="durable-spark-") as directory:
        loader, inline = _loader(settings, directory)
        _authenticate(loader, configuration, settings)
        if configuration.cert_file and configuration.cert_file.startswith(directory):
            raise BadConfiguration(
                f"the exec plugin in the kubeconfig of connection {settings.conn_id!r} answers with a client "
                "certificate: only plugins that answer with a token can be used"
            )
    server = str(settings.server or configuration.host)
    if not server:
        raise BadConfiguration(f"the kubeconfig of connection {settings.conn_id!r} names no server")
    expiry = getattr(loader, "exec_plugin_expiry", None)
    context = (loader.current_context or {}).get("context", {})
    authorization = configuration.api_key.get("BearerToken")
    return Access(
        server=server.rstrip("/"),
        namespace=settings.namespace or context.get("namespace") or "default",
        authorization=_header(authorization.strip(), settings) if authorization else None,
        expires=expiry.timestamp() - EXPIRY_MARGIN if expiry else None,
        tls=_tls(configuration, inline, settings) if server.startswith("https") else None,
        proxy=configuration.proxy,
        server_hostname=configuration.tls_server_name,
    )


class _Inline(NamedTuple):
    """Certificates that stood in the kubeconfig itself, as PEM."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


def _loader(settings: Settings, directory: str) -> tuple[KubeConfigLoader, _Inline]:
    """Return the loader for the kubeconfig, and what was taken out of it lest the loader write it to a file."""
    from kubernetes_asyncio.config.kube_config import KubeConfigLoader

    text = settings.kubeconfig or _default_kubeconfig()
    config: Any
    if "\n" in text or text.lstrip().startswith("{"):
        config, base = _parsed(text, settings), os.getcwd()
    else:
        config, base = _merged(text, settings), None
    if config is None:
        raise BadConfiguration(
            f"the kubeconfig {text[:200]!r} of connection {settings.conn_id!r} is not there: give the path of a file "
            "that all Airflow processes can read, or its text"
        )
    loader = KubeConfigLoader(config, active_context=settings.context, config_base_path=base, temp_file_path=directory)
    context = (loader.current_context or {}).get("context", {})
    cluster = _entry(config, "clusters", context.get("cluster")).get("cluster") or {}
    user = _entry(config, "users", context.get("user")).get("user") or {}
    inline = _Inline(
        ca=_taken(cluster, "certificate-authority-data", settings),
        certificate=_taken(user, "client-certificate-data", settings),
        key=_taken(user, "client-key-data", settings),
    )
    return loader, inline


def _entry(config: Any, kind: str, name: object) -> dict[str, Any]:
    """Return the entry of that name; a merged kubeconfig wraps its parts."""
    entries = getattr(config, "value", config).get(kind) or []
    plain = (getattr(entry, "value", entry) for entry in entries)
    return next((entry for entry in plain if entry.get("name") == name), {})


def _merged(paths: str, settings: Settings) -> ConfigNode | None:
    """Return what is in the files, ``None`` if there are none."""
    import yaml
    from kubernetes_asyncio.config.kube_config import KubeConfigMerger

    try:
        config = KubeConfigMerger(paths).config
    except yaml.YAMLError as error:
        raise BadConfiguration(
            f"the kubeconfig {paths[:200]!r} of connection {settings.conn_id!r} is not YAML"
        ) from error
    if config is not None:
        for kind in ("clusters", "contexts", "users"):
            for entry in config.value[kind]:
                entry.name = f"{kind}[name={entry.value.get('name')}]"  # it held the whole entry, and errors show it
    return config


def _parsed(text: str, settings: Settings) -> Mapping[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise BadConfiguration(
            f"the extra 'kubeconfig' of connection {settings.conn_id!r} is neither a path nor a kubeconfig in YAML"
        )
    return value


def _taken(values: dict[str, Any], name: str, settings: Settings) -> bytes | None:
    data = values.pop(name, None)
    if not data:
        return None
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise BadConfiguration(f"{name} in the kubeconfig of connection {settings.conn_id!r} is not base64") from error


def _authenticate(loader: KubeConfigLoader, configuration: Configuration, settings: Settings) -> None:
    """Have the loader get credentials, which may run a plugin or ask an identity provider."""
    from kubernetes_asyncio.config.config_exception import ConfigException

    try:
        asyncio.run(_load_in_time(loader, configuration))
    except asyncio.TimeoutError as error:
        raise ClusterUnreachable(
            f"the kubeconfig of connection {settings.conn_id!r} gave no credentials within {LOADING_TIMEOUT:.0f} s"
        ) from error
    except ConfigException as error:
        if "exec" in str(error) or "oidc" in str(error):
            raise AuthenticationFailed(
                f"the kubeconfig of connection {settings.conn_id!r} gave no credentials: {error}"
            ) from error
        raise


async def _load_in_time(loader: KubeConfigLoader, configuration: Configuration) -> None:
    """Have the loader get credentials; a plugin that has not ended in time is killed."""
    loop = asyncio.get_running_loop()
    plugins = []
    start = loop.subprocess_exec

    async def start_and_note(*args: Any, **options: Any) -> Any:
        transport, protocol = await start(*args, **options)
        plugins.append(transport)
        return transport, protocol

    loop.subprocess_exec = start_and_note  # type: ignore[method-assign]  # the loop runs nothing else
    try:
        await asyncio.wait_for(loader.load_and_set(configuration), LOADING_TIMEOUT)
    finally:
        for plugin in plugins:
            plugin.close()


def _tls(configuration: Configuration, inline: _Inline, settings: Settings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(
            cafile=configuration.ssl_ca_cert, cadata=inline.ca.decode("ascii") if inline.ca else None
        )
        if inline.certificate and inline.key:
            _load_from_memory(context, inline.certificate + b"\n" + inline.key)
        elif configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BadConfiguration(
            f"a certificate in the kubeconfig of connection {settings.conn_id!r} cannot be used: {error}"
        ) from error
    if not configuration.verify_ssl:  # insecure-skip-tls-verify: the user's own word
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load_from_memory(context: ssl.SSLContext, pem: bytes) -> None:
    descriptor = os.memfd_create("client-certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
