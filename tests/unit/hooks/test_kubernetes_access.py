"""From a connection to an API server: every field, every kind of credentials, and no secret where it can be read."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from kubernetes_asyncio.config import kube_config

from dev.processes import wait_until
from durable_spark.hooks import _kubernetes_access
from durable_spark.hooks._http import HttpClient
from durable_spark.hooks._kubernetes_access import Access, Settings, load_access, read_settings
from durable_spark.hooks._kubernetes_api import Api
from durable_spark.jobs import AuthenticationFailed, BadConfiguration, ClusterUnreachable, DurableJobError
from tests.unit.hooks.fake import fixed, serve

SECRET = "hush-hush"
Read = Callable[..., Any]


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the developer's kubeconfig nor a pod's service account is seen."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_kubernetes_access, "SERVICE_ACCOUNT", tmp_path / "service-account")


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_connection(connection: dict[str, Any] | str | None = None, **extra: Any) -> None:
        if isinstance(connection, str):
            monkeypatch.setenv("AIRFLOW_CONN_K", connection)
            return
        value = {"conn_type": "durable_spark", "host": "k8s://https://api:6443", "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_K", json.dumps(value | (connection or {})))

    return set_connection


@pytest.fixture
def settings(connect: Callable[..., None]) -> Read:
    """Return the settings of a connection."""

    async def read(*connection: Any, **extra: Any) -> Settings:
        connect(*connection, **extra)
        return await read_settings("k", poll_interval=5.0)

    return read


@pytest.fixture
def access(settings: Read) -> Read:
    """Return the way to the API server of a connection."""

    async def load(*connection: Any, **extra: Any) -> Access:
        return await load_access(await settings(*connection, **extra))

    return load


@pytest.fixture
def api(connect: Callable[..., None]) -> Callable[..., Api]:
    """Return what keeps credentials fresh."""

    def make(*connection: Any, **extra: Any) -> Api:
        connect(*connection, **extra)
        return Api("k", poll_interval=5.0)

    return make


# --- what the connection says


@pytest.mark.parametrize(
    ("connection", "server"),
    [
        ({}, "https://api:6443"),
        ({"host": "k8s://https://API:6443/"}, "https://api:6443"),
        ({"host": "k8s://api"}, "https://api:443"),
        ({"host": "k8s://api", "port": 6443}, "https://api:6443"),
        ({"host": "k8s://http://api"}, "http://api:80"),
        ({"host": "k8s://https://[::1]:6443"}, "https://[::1]:6443"),
        ({"host": "k8s://https://rancher/k8s/clusters/c-1"}, "https://rancher:443/k8s/clusters/c-1"),
        ({"conn_type": "spark"}, "https://api:6443"),
        ("k8s://https%3A%2F%2Fapi:6443", "https://api:6443"),
        ({"host": "k8s://"}, None),
    ],
)
async def test_server(settings: Read, connection: Any, server: str | None) -> None:
    assert (await settings(connection)).server == server


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        ({"host": "k8s://https://"}, "'k8s://https:.*cannot be used: give k8s://https://host:port"),
        ({"host": "k8s://ftp://api"}, "cannot be used: give k8s://https://host:port"),
        ({"host": "k8s://http://a pi"}, "cannot be used: give k8s://https://host:port"),
        ({"host": "k8s://https://api/k8s clusters"}, "cannot be used: give k8s://https://host:port"),
        ({"host": "k8s://https://api:port"}, "cannot be used"),
        ({"host": "k8s://https://api:99999"}, "cannot be used"),
        ({"host": "k8s://https://[api"}, "cannot be used"),
        ({"host": "k8s://https://api?a=b"}, "cannot be used"),
        ({"host": "k8s://https://api#a"}, "cannot be used"),
        ({"host": f"k8s://https://me:{SECRET}@api"}, "holds credentials: give a token as the password"),
        ({"host": f"k8s://https://{SECRET}@api"}, "holds credentials: give a token as the password"),
        ({"password": f"{SECRET}\nX-Evil: 1"}, "holds characters that no token has"),
        ({"password": f"{SECRET}ü"}, "holds characters that no token has"),
        ({"extra": {"namespace": "My_Space"}}, "'namespace' of connection 'k' is 'My_Space': give the name of"),
        ({"extra": {"namespace": "a" * 64}}, "'namespace'"),
        ({"extra": {"namespace": "../x"}}, "'namespace'"),
        ({"extra": {"namespace": "spark\n"}}, "'namespace'"),
        ({"extra": {"namespace": 3}}, "'namespace'.*string"),
        ({"extra": {"token-file": 3}}, "'token-file'.*string"),
        ({"extra": {"kubeconfig": {"users": [{"token": SECRET}]}}}, "'kubeconfig'.*string"),
        ({"extra": {"context": 3}}, "'context'.*string"),
        ({"extra": {"ca": 3}}, "'ca'.*string"),
        ({"extra": {"in-cluster": "maybe"}}, "'in-cluster' of connection 'k' is 'maybe': give true or false"),
        ({"extra": {"in-cluster": 1}}, "'in-cluster'.*true or false"),
        ({"extra": {"poll-interval": "often"}}, "'poll-interval'.*seconds"),
        ({"extra": {"poll-interval": 0}}, "'poll-interval'"),
        ({"extra": {"log-url": "logs"}}, "'log-url'.*https://host/"),
        ({"password": SECRET, "extra": {"ca": "/no/such.pem"}}, "'ca'.*No such file.*PEM"),
        ({"password": SECRET, "extra": {"token-file": "/t"}}, "the password and the extra 'token-file'.*leave one"),
        ({"password": SECRET, "extra": {"kubeconfig": "/k"}}, "the password and the extra 'kubeconfig'"),
        ({"password": SECRET, "extra": {"in-cluster": True}}, "the password and the extra 'in-cluster'"),
        ({"extra": {"kubeconfig": "/k", "in-cluster": True}}, "'kubeconfig' and the extra 'in-cluster'"),
        ({"password": SECRET, "extra": {"context": "c"}}, "'context'.*kubeconfig's, beside the password: leave one"),
        ({"extra": {"context": "c", "in-cluster": True}}, "'context'.*beside the extra 'in-cluster'"),
        ({"host": "k8s://", "password": SECRET}, "has a token but no API server: give k8s://https://host:port"),
        ({"host": "k8s://", "extra": {"token-file": "/t"}}, "has a token but no API server"),
        ({"extra": {"token-file": "/no/such"}}, "'token-file' of connection 'k' cannot be read here.*No such file"),
        ({"extra": {"kubeconfig": "/no/such"}}, "'/no/such' of connection 'k' is not there.*path.*or its text"),
        ({}, "has no credentials.*password.*'kubeconfig', 'token-file' and 'in-cluster'"),
        ({"extra": {"in-cluster": "true"}}, "'k' cannot be used"),
        ({"conn_type": "postgres"}, "'postgres'.*'durable_spark'"),
    ],
)
async def test_bad_connections(access: Read, connection: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfiguration, match=message) as caught:
        await access(connection)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["true", "True", " TRUE ", True])
async def test_flags(settings: Read, text: Any) -> None:
    assert (await settings(**{"in-cluster": text})).in_cluster is True


async def test_defaults(access: Read, settings: Read) -> None:
    assert (await access({"password": SECRET})).namespace == "default"
    assert (await settings()).poll_interval == 5.0


async def test_no_repr_shows_a_secret(settings: Read, access: Read) -> None:
    read = await settings({"password": SECRET})
    inline = await settings(kubeconfig=f"\nusers: {SECRET}")
    loaded = await access({"password": SECRET})
    proxied = await access(kubeconfig=write_inline(cluster={"proxy-url": f"http://me:{SECRET}@proxy"}))
    assert proxied.proxy == f"http://me:{SECRET}@proxy"
    assert not [value for value in (read, inline, loaded, proxied) if SECRET in repr(value)]


# --- tokens


async def test_the_password_is_a_token(access: Read) -> None:
    loaded = await access({"password": f" {SECRET}\n", "extra": {"namespace": "spark"}})
    assert (loaded.server, loaded.namespace, loaded.authorization) == ("https://api:6443", "spark", f"Bearer {SECRET}")
    assert loaded.expires is None


async def test_a_token_file_is_read_again(
    api: Callable[..., Api], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    tokens = []
    for lifetime in (60.0, 60.0, 0.0, 0.0):
        monkeypatch.setattr(_kubernetes_access, "TOKEN_FILE_LIFETIME", lifetime)
        kept = api(**{"token-file": str(path)})
        for token in ("one\n", "two\n"):
            path.write_text(token)
            tokens.append((await kept.access()).authorization)
    assert tokens == ["Bearer one", "Bearer one"] * 2 + ["Bearer one", "Bearer two"] * 2


async def test_credentials_that_were_not_accepted_are_loaded_anew(api: Callable[..., Api], tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("one")
    kept = api(**{"token-file": str(path)})
    first = await kept.access()
    path.write_text("two")
    second, third = await asyncio.gather(*(kept.access(instead_of=first) for _ in range(2)))
    assert second is third
    assert second.authorization == "Bearer two"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", f"{SECRET}\nanother".encode()])
async def test_a_token_file_without_a_token(access: Read, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(BadConfiguration, match=r"token.* of connection 'k'") as caught:
        await access(**{"token-file": str(tmp_path / "token")})
    assert SECRET not in str(caught.value)


# --- in a pod


@pytest.fixture
def in_a_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What Kubernetes puts into a container."""
    directory = tmp_path / "service-account"
    directory.mkdir()
    (directory / "token").write_text(SECRET)
    (directory / "namespace").write_text("airflow")
    (directory / "ca.crt").write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return directory


@pytest.mark.parametrize("extra", [{}, {"in-cluster": True}])
async def test_in_a_pod(access: Read, in_a_pod: Path, extra: dict[str, Any]) -> None:
    loaded = await access({"host": "k8s://", "extra": extra})
    assert (loaded.server, loaded.namespace) == ("https://10.0.0.1:443", "airflow")
    assert loaded.authorization == f"Bearer {SECRET}"
    assert loaded.tls is not None
    assert loaded.expires is not None


async def test_the_connection_overrules_the_pod(access: Read, in_a_pod: Path) -> None:
    loaded = await access({"extra": {"in-cluster": True, "namespace": "spark"}})
    assert (loaded.server, loaded.namespace) == ("https://api:6443", "spark")


@pytest.mark.parametrize(("name", "content"), [("token", ""), ("ca.crt", ""), ("ca.crt", "nonsense")])
async def test_a_broken_service_account(access: Read, in_a_pod: Path, name: str, content: str) -> None:
    (in_a_pod / name).write_text(content)
    with pytest.raises(BadConfiguration, match="'k' cannot be used"):
        await access({"host": "k8s://", "extra": {"in-cluster": True}})


# --- kubeconfigs


def kubeconfig(
    user: dict[str, Any] | None = None,
    *,
    cluster: dict[str, Any] | None = None,
    context: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Two contexts, ``here`` and ``there``."""
    user = {"token": SECRET} if user is None else user
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [
            {"name": "a", "cluster": {"server": "http://a:6443/", **(cluster or {})}},
            {"name": "b", "cluster": {"server": "http://b:6443"}},
        ],
        "contexts": [
            {"name": "here", "context": {"cluster": "a", "user": "me", **(context or {})}},
            {"name": "there", "context": {"cluster": "b", "user": "you", "namespace": "you-space"}},
        ],
        "users": [{"name": "me", "user": user}, {"name": "you", "user": {"token": "your-token"}}],
    }


def write_inline(*args: Any, **kwargs: Any) -> str:
    return yaml.safe_dump(kubeconfig(*args, **kwargs))


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], dict[str, Any]]:
    """Give a kubeconfig in a form, and return the extras that name it."""

    def give(form: str, value: Any) -> dict[str, Any]:
        text = value if isinstance(value, str) else yaml.safe_dump(value)
        path = tmp_path / ("home/.kube/config" if form == "home" else "config.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        if form in ("file", "variable", "home"):
            path.write_text(text)
        if form == "variable":
            monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'missing'}:{path}")
        return {"file": {"kubeconfig": str(path)}, "yaml": {"kubeconfig": text}}.get(
            form, {"kubeconfig": json.dumps(value)} if form == "json" else {}
        )

    return give


FORMS = ["file", "yaml", "json", "variable", "home"]


@pytest.mark.parametrize("form", FORMS)
async def test_a_kubeconfig(access: Read, given: Any, form: str) -> None:
    extra = given(form, kubeconfig(context={"namespace": "my-space"}))
    loaded = await access({"host": "k8s://", "extra": extra})
    assert (loaded.server, loaded.namespace) == ("http://a:6443", "my-space")
    assert (loaded.authorization, loaded.expires) == (f"Bearer {SECRET}", None)
    loaded = await access({"host": "k8s://", "extra": extra | {"context": "there"}})
    assert (loaded.server, loaded.namespace) == ("http://b:6443", "you-space")
    assert loaded.authorization == "Bearer your-token"


async def test_the_connection_overrules_the_kubeconfig(access: Read) -> None:
    loaded = await access({"host": "k8s://http://api", "extra": {"kubeconfig": write_inline(), "namespace": "spark"}})
    assert (loaded.server, loaded.namespace, loaded.authorization) == ("http://api:80", "spark", f"Bearer {SECRET}")


async def test_a_kubeconfig_comes_before_the_pods_account(access: Read, given: Any, in_a_pod: Path) -> None:
    given("home", kubeconfig())
    assert (await access({"host": "k8s://"})).server == "http://a:6443"


@pytest.mark.parametrize(
    ("user", "authorization"),
    [
        ({}, None),
        ({"username": "me", "password": SECRET}, "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()),
        ({"token": f"{SECRET}\n"}, f"Bearer {SECRET}"),
    ],
)
async def test_users(access: Read, user: dict[str, Any], authorization: str | None) -> None:
    loaded = await access({"host": "k8s://"}, kubeconfig=write_inline(user))
    assert loaded.authorization == authorization


def without(key: str) -> dict[str, Any]:
    value = kubeconfig()
    del value[key]
    return value


BROKEN = {
    "empty": "{}\n",
    "no YAML": f"a: [\nb: '{SECRET}",
    "a list": f"\n- {SECRET}",
    "no contexts": without("contexts"),
    "no clusters": without("clusters"),
    "no current context": without("current-context"),
    "another current context": kubeconfig() | {"current-context": "nowhere"},
    "contexts of another kind": kubeconfig() | {"contexts": [3]},
    "a context of another kind": kubeconfig() | {"contexts": [{"name": "here", "context": 3}]},
    "clusters of another kind": kubeconfig() | {"clusters": {"a": 1}},
    "a cluster of another kind": kubeconfig() | {"clusters": [{"name": "a", "cluster": "http://a"}]},
    "no server": kubeconfig() | {"clusters": [{"name": "a", "cluster": {"x": 1}}]},
    "no user": kubeconfig() | {"users": [{"name": "me", "token": SECRET}]},
    "a user of another kind": kubeconfig() | {"users": [{"name": "me", "user": SECRET}]},
    "a token with line breaks": kubeconfig({"token": f"{SECRET}\nX-Evil: 1"}),
    "a token file that is not there": kubeconfig({"tokenFile": "/no/such", "password": SECRET}),
    "no base64": kubeconfig({"client-certificate-data": SECRET + "!", "client-key-data": SECRET}),
    "an exec plugin without a command": kubeconfig({"exec": {"env": [{"name": "TOKEN", "value": SECRET}]}}),
    "an exec plugin of another kind": kubeconfig({"exec": SECRET}),
    "arguments of another kind": kubeconfig({"exec": {"command": "x", "apiVersion": "v1", "args": SECRET}}),
    "an identity provider without a URL": kubeconfig(
        {"auth-provider": {"name": "oidc", "config": {"refresh-token": SECRET, "client-secret": SECRET}}}
    ),
    "an identity provider without settings": kubeconfig({"auth-provider": {"name": "oidc"}, "password": SECRET}),
    "an authority that is none": kubeconfig(
        cluster={"server": "https://a", "certificate-authority-data": base64.b64encode(SECRET.encode()).decode()}
    ),
    "a certificate that is none": kubeconfig(
        {key: base64.b64encode(SECRET.encode()).decode() for key in ("client-certificate-data", "client-key-data")},
        cluster={"server": "https://a"},
    ),
}


@pytest.mark.parametrize("form", ["file", "yaml"])
@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
async def test_broken_kubeconfigs(
    access: Read, given: Any, value: Any, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises((BadConfiguration, AuthenticationFailed), match="connection 'k'") as caught:
        await access({"host": "k8s://"}, **given(form, value))
    assert SECRET not in f"{caught.value}{caplog.text}"


@pytest.mark.parametrize("path", ["directory", "binary"])
async def test_a_path_of_no_kubeconfig(access: Read, tmp_path: Path, path: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    with pytest.raises(BadConfiguration, match="connection 'k'"):
        await access(kubeconfig=str(tmp_path / path))


# --- exec plugins


class Plugin:
    """A credential plugin that counts its runs and answers what it is told."""

    def __init__(self, directory: Path) -> None:
        self._runs, self._answer = directory / "runs", directory / "answer"
        self.says({})

    def says(self, status: dict[str, Any] | str, **changes: Any) -> None:
        api = "client.authentication.k8s.io/v1"
        credential = {"apiVersion": api, "kind": "ExecCredential", "status": status, **changes}
        self._answer.write_text(status if isinstance(status, str) else json.dumps(credential))

    @property
    def runs(self) -> int:
        return len(self._runs.read_text()) if self._runs.exists() else 0

    def user(self, *, then: str = "") -> dict[str, Any]:
        script = f"printf . >> {self._runs}; cat {self._answer}; {then}"
        return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", script]}}


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


def expiring(token: str, seconds: float) -> dict[str, str]:
    expiry = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return {"token": token, "expirationTimestamp": expiry.strftime("%Y-%m-%dT%H:%M:%SZ")}


async def test_an_exec_plugin_is_run_again_when_its_token_expires(api: Callable[..., Api], plugin: Plugin) -> None:
    kept = api({"host": "k8s://"}, kubeconfig=write_inline(plugin.user()))
    plugin.says(expiring("one", 3600))
    assert (await kept.access()).authorization == "Bearer one"
    assert (await kept.access(), plugin.runs) == (await kept.access(), 1)
    plugin.says(expiring("two", _kubernetes_access.EXPIRY_MARGIN - 5))
    first = await kept.access()
    assert (await kept.access(instead_of=first)).authorization == "Bearer two"
    plugin.says(expiring("three", 3600))
    assert (await kept.access()).authorization == "Bearer three"
    assert plugin.runs == 3


async def test_a_plugins_token_without_an_end(access: Read, plugin: Plugin) -> None:
    plugin.says({"token": SECRET})
    loaded = await access({"host": "k8s://"}, kubeconfig=write_inline(plugin.user()))
    assert (loaded.authorization, loaded.expires, loaded.fresh) == (f"Bearer {SECRET}", None, True)


@pytest.mark.parametrize(
    ("answer", "then"),
    [
        ({"token": SECRET}, "echo no session >&2; exit 3"),
        (f"not JSON, but {SECRET}", ""),
        ("", ""),
        (json.dumps({"kind": "ExecCredential"}), ""),
        (json.dumps({"apiVersion": "v9", "kind": "ExecCredential", "status": {"token": SECRET}}), ""),
    ],
)
async def test_a_plugin_that_gives_no_credentials(access: Read, plugin: Plugin, answer: Any, then: str) -> None:
    plugin.says(answer)
    with pytest.raises(AuthenticationFailed, match="'k' gave no credentials") as caught:
        await access({"host": "k8s://"}, kubeconfig=write_inline(plugin.user(then=then)))
    assert SECRET not in str(caught.value)
    assert ("no session" in str(caught.value)) == bool(then)


async def test_a_plugin_that_is_not_installed(access: Read) -> None:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-plugin"}}
    with pytest.raises(DurableJobError, match=r"connection 'k'.*no-such-plugin"):
        await access({"host": "k8s://"}, kubeconfig=write_inline(user))


async def test_a_plugin_that_hangs_is_killed(
    access: Read, plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_kubernetes_access, "LOADING_TIMEOUT", 1.0)
    pid = tmp_path / "pid"
    with pytest.raises(ClusterUnreachable, match=r"'k' gave no credentials within 1 s"):
        await access({"host": "k8s://"}, kubeconfig=write_inline(plugin.user(then=f"echo $$ > {pid}; exec sleep 600")))
    cmdline = Path(f"/proc/{pid.read_text().strip()}/cmdline")
    await asyncio.to_thread(wait_until, lambda: b"sleep" not in _read(cmdline), 10, "the plugin to end")


def _read(path: Path) -> bytes:
    """A process that has ended has no command line, or no directory any more."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_a_plugin_that_answers_with_a_certificate(access: Read, plugin: Plugin) -> None:
    plugin.says({"clientCertificateData": "c", "clientKeyData": SECRET})
    with pytest.raises(BadConfiguration, match="only plugins that answer with a token"):
        await access({"host": "k8s://"}, kubeconfig=write_inline(plugin.user(), cluster={"server": "https://a"}))


# --- TLS


class Authority:
    """A server that wants its clients to have a certificate of its own authority."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.ca.issue_cert("127.0.0.1", "api.invalid").configure_cert(self.context)
        self.ca.configure_trust(self.context)
        self.context.verify_mode = ssl.CERT_REQUIRED
        client = self.ca.issue_cert("airflow@example.invalid")
        self.pems = {
            "certificate-authority": self.ca.cert_pem.bytes(),
            "client-certificate": client.cert_chain_pems[0].bytes(),
            "client-key": client.private_key_pem.bytes(),
        }
        for name, pem in self.pems.items():
            (directory / f"{name}.pem").write_bytes(pem)

    def fields(self, form: str, *names: str) -> dict[str, str]:
        if form == "file":
            return {name: f"{name}.pem" for name in names}
        return {f"{name}-data": base64.b64encode(self.pems[name]).decode() for name in names}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def reached(access: Access, stack: AsyncExitStack) -> bool:
    client = HttpClient(tls=access.tls, server_hostname=access.server_hostname)
    stack.push_async_callback(client.aclose)
    return (await client.request("GET", access.server, limit=100)).status == 200


@pytest.mark.parametrize("form", ["file", "inline"])
async def test_client_certificates(
    access: Read,
    stack: AsyncExitStack,
    authority: Authority,
    tmp_path: Path,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those in files relative to the kubeconfig; those in line without any file."""

    def write(*_: Any) -> None:
        raise AssertionError("a file was written")

    monkeypatch.setattr(kube_config, "_create_temp_file_with_content", write, raising=False)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", write)
    monkeypatch.setattr("tempfile.mkstemp", write)
    url = await serve(stack, fixed(200), tls=authority.context)
    value = kubeconfig(
        authority.fields(form, "client-certificate", "client-key"),
        cluster={"server": url, **authority.fields(form, "certificate-authority")},
    )
    (tmp_path / "config").write_text(yaml.safe_dump(value))
    loaded = await access({"host": "k8s://"}, kubeconfig=str(tmp_path / "config"))
    assert loaded.authorization is None
    assert await reached(loaded, stack)


async def test_a_server_of_another_authority(
    access: Read, stack: AsyncExitStack, authority: Authority, tmp_path: Path
) -> None:
    authority.context.verify_mode = ssl.CERT_NONE
    url = await serve(stack, fixed(200), tls=authority.context)
    other = base64.b64encode(trustme.CA().cert_pem.bytes()).decode()
    text = write_inline(cluster={"server": url, "certificate-authority-data": other})
    with pytest.raises(BadConfiguration, match="not trusted"):
        await reached(await access({"host": "k8s://"}, kubeconfig=text), stack)
    ca = str(tmp_path / "certificate-authority.pem")
    assert await reached(await access({"host": "k8s://"}, kubeconfig=text, ca=ca), stack)


@pytest.mark.parametrize("cluster", [{"insecure-skip-tls-verify": True}, {"tls-server-name": "api.invalid"}])
async def test_a_server_by_another_name(
    access: Read, stack: AsyncExitStack, authority: Authority, cluster: dict[str, Any]
) -> None:
    authority.context.verify_mode = ssl.CERT_NONE
    url = (await serve(stack, fixed(200), tls=authority.context)).replace("127.0.0.1", "localhost")
    trusted = {"server": url, **authority.fields("inline", "certificate-authority")}
    with pytest.raises(BadConfiguration, match="not trusted"):
        await reached(await access({"host": "k8s://"}, kubeconfig=write_inline(cluster=trusted)), stack)
    loaded = await access({"host": "k8s://"}, kubeconfig=write_inline(cluster=trusted | cluster))
    assert await reached(loaded, stack)
