"""Where the ResourceManagers are, and as whom they are asked."""

from __future__ import annotations

import base64
import os
import ssl
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from durable_spark.hooks import _spnego
from durable_spark.hooks._spnego import Keytab
from durable_spark.jobs import (
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    JobRef,
    JobState,
    Link,
    RequestRefused,
    Submission,
)
from tests.unit.hooks.fake import fixed, serve
from tests.unit.hooks.fake_yarn import FakeKerberos, FakeYarn, QuickYarnHook, app_id, ours, row

Connect = Callable[[dict[str, Any]], QuickYarnHook]
ADDRESS = "yarn_resourcemanager_webapp_address"
UNKNOWN = JobRef("application_1111111111111_0001")


def named(address: str, **extra: Any) -> dict[str, Any]:
    return {"conn_type": "spark", "host": "yarn", "extra": {ADDRESS: address} | extra}


# --- addresses


@pytest.mark.parametrize(
    ("address", "bases"),
    [
        ("rm", ["http://rm:8088"]),
        ("rm:8000", ["http://rm:8000"]),
        ("RM.example.com:8088", ["http://rm.example.com:8088"]),
        ("http://rm:8088/", ["http://rm:8088"]),
        ("http://rm", ["http://rm"]),
        ("https://rm:8090", ["https://rm:8090"]),
        (" rm1:8088 , rm2:8088,", ["http://rm1:8088", "http://rm2:8088"]),
        ("rm1,rm1:8088", ["http://rm1:8088"]),
        ("http://[::1]:8088", ["http://[::1]:8088"]),
        ("http://rm:8088/cluster", ["http://rm:8088"]),
        ("http://rm:8088/ws/v1/cluster/", ["http://rm:8088"]),
        ("https://knox:8443/gateway/default/resourcemanager", ["https://knox:8443/gateway/default/resourcemanager"]),
        (
            "https://knox:8443/gateway/default/resourcemanager/v1/cluster",
            ["https://knox:8443/gateway/default/resourcemanager"],
        ),
    ],
)
async def test_addresses(connect_yarn: Connect, address: str, bases: list[str]) -> None:
    hook = connect_yarn(named(address))
    assert await hook.cluster() == bases
    assert await hook.poll_interval() == 5.0


@pytest.mark.parametrize(
    "connection",
    [{"conn_type": "yarn"}, {"conn_type": "spark", "host": "yarn"}, {"conn_type": "spark", "host": "yarn://"}],
)
async def test_connections_as_users_have_them(connect_yarn: Connect, connection: dict[str, Any]) -> None:
    extra = {ADDRESS: "rm:8088", "deploy-mode": "cluster", "queue": "etl", "spark-binary": "spark-submit"}
    assert await connect_yarn(connection | {"extra": extra}).cluster() == ["http://rm:8088"]


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        (named("http://user:secret@rm:8088"), f"'{ADDRESS}'"),
        (named("ftp://rm"), f"'{ADDRESS}'.*http://host:8088"),
        (named("http://rm:port"), f"'{ADDRESS}'"),
        (named("http://rm:8088?x"), f"'{ADDRESS}'"),
        (named("http://rm:8088/../x"), f"'{ADDRESS}'"),
        (named("r m"), f"'{ADDRESS}'"),
        (named("rm") | {"extra": {ADDRESS: 3}}, f"'{ADDRESS}'.*string"),
        (named("rm", **{"yarn-user": "a&doas=root"}), "'yarn-user'"),
        (named("rm", **{"yarn-auth": "ntlm"}), "'yarn-auth'.*auto, simple, kerberos"),
        (named("rm", **{"yarn-timeline-address": "file:///x"}), "'yarn-timeline-address'.*8188"),
        (named("rm", **{"history-url": "https://h/{pod}"}), "'history-url'.*app_id"),
        (named("rm", **{"poll-interval": 0}), "'poll-interval'"),
        (named("rm", keytab="?"), "'keytab'.*neither a path nor base64"),
        (named("rm", keytab=base64.b64encode(b"hush").decode()), "'keytab'.*not that of a keytab"),
        (named("rm") | {"host": "spark://h"}, "not the master URL of a YARN cluster"),
        (named("rm") | {"conn_type": "postgres"}, "'postgres'"),
        ({"conn_type": "spark", "host": "yarn"}, f"'{ADDRESS}'.*HADOOP_CONF_DIR.*triggerer"),
    ],
)
async def test_bad_connections(connect_yarn: Connect, connection: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfiguration, match=message) as caught:
        await connect_yarn(connection).cluster()
    assert "aHVzaA" not in str(caught.value), "a keytab is shown"


# --- Hadoop's own configuration


def site(folder: Path, name: str = "yarn-site.xml", **properties: str) -> Path:
    rows = "".join(
        f"<property><name>{key.replace('__', '-').replace('_', '.')}</name><value>{value}</value></property>"
        for key, value in properties.items()
    )
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"<?xml version='1.0'?>\n<configuration>{rows}</configuration>")
    return folder


RM = "yarn_resourcemanager_"
PAIR = {f"{RM}ha_enabled": "true", f"{RM}ha_rm__ids": "rm1, rm2"}
PAIR_OF_HOSTS = PAIR | {f"{RM}hostname_rm1": "a", f"{RM}hostname_rm2": "b"}


@pytest.mark.parametrize(
    ("properties", "bases"),
    [
        ({f"{RM}hostname": "rm"}, ["http://rm:8088"]),
        ({f"{RM}hostname": "rm", "yarn_http_policy": "HTTPS_ONLY"}, ["https://rm:8090"]),
        ({f"{RM}webapp_address": "rm:9000", f"{RM}hostname": "x"}, ["http://rm:9000"]),
        ({f"{RM}webapp_address": "0.0.0.0:9000", f"{RM}hostname": "rm"}, ["http://rm:9000"]),
        (
            {f"{RM}webapp_address": "${" + f"{RM}hostname".replace("_", ".") + "}:1", f"{RM}hostname": "rm"},
            ["http://rm:1"],
        ),
        (PAIR_OF_HOSTS, ["http://a:8088", "http://b:8088"]),
        (PAIR_OF_HOSTS | {f"{RM}webapp_address_rm2": "b:1"}, ["http://a:8088", "http://b:1"]),
        (PAIR_OF_HOSTS | {f"{RM}ha_enabled": "false", f"{RM}hostname": "c"}, ["http://c:8088"]),
        (
            PAIR
            | {f"{RM}webapp_https_address_rm1": "a:1", f"{RM}webapp_https_address_rm2": "b:2"}
            | {"yarn_http_policy": "HTTPS_ONLY"},
            ["https://a:1", "https://b:2"],
        ),
    ],
)
async def test_yarn_site(
    connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, properties: dict[str, str], bases: list[str]
) -> None:
    hook = connect_yarn({"conn_type": "spark", "host": "yarn"})
    monkeypatch.setenv("HADOOP_CONF_DIR", str(site(tmp_path / "conf", **properties)))
    assert await hook.cluster() == bases


async def test_which_folder(connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one that Spark has first on its class path."""
    connection = {"conn_type": "spark", "host": "yarn"}
    monkeypatch.setenv("YARN_CONF_DIR", str(site(tmp_path / "yarn", **{f"{RM}hostname": "by-yarn"})))
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    assert await connect_yarn(connection).cluster() == ["http://by-yarn:8088"], "the other one has no yarn-site.xml"
    site(tmp_path, **{f"{RM}hostname": "by-hadoop"})
    assert await connect_yarn(connection).cluster() == ["http://by-hadoop:8088"]


async def test_the_connection_goes_before_the_folder(
    connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hook = connect_yarn(named("mine"))
    monkeypatch.setenv("HADOOP_CONF_DIR", str(site(tmp_path / "conf", **{f"{RM}hostname": "rm"})))
    assert await hook.cluster() == ["http://mine:8088"]


async def test_variables(connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hook = connect_yarn({"conn_type": "spark", "host": "yarn"})
    folder = site(tmp_path / "conf", **{f"{RM}hostname": "${rm.${tier}}", "rm_a": "${env.THE_HOST}", "tier": "a"})
    site(folder, "core-site.xml", tier="b", rm_b="wrong")
    monkeypatch.setenv("THE_HOST", "host-a")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(folder))
    assert await hook.cluster() == ["http://host-a:8088"]


ENDLESS = (
    "<configuration><property><name>yarn.resourcemanager.hostname</name><value>${a}</value></property>"
    "<property><name>a</name><value>${a}</value></property></configuration>"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("<configuration>", "cannot be read"),
        ("<configuration/>", rf"does not say where .*'{ADDRESS}'"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><configuration/>", "document type"),
        ("x" * (5 << 20), "more than"),
        (ENDLESS, "does not say where"),
    ],
)
async def test_a_site_that_says_nothing(
    connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str
) -> None:
    hook = connect_yarn({"conn_type": "spark", "host": "yarn"})
    (tmp_path / "yarn-site.xml").write_text(text)
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    with pytest.raises(BadConfiguration, match=message):
        await hook.cluster()


TIMELINE = {f"{RM}hostname": "rm", "yarn_timeline__service_enabled": "true"}


@pytest.mark.parametrize(
    ("properties", "timeline"),
    [
        ({f"{RM}hostname": "rm"}, ""),
        (TIMELINE | {"yarn_timeline__service_hostname": "t"}, "http://t:8188"),
        (TIMELINE | {"yarn_timeline__service_webapp_address": "t:1"}, "http://t:1"),
        (TIMELINE | {"yarn_timeline__service_hostname": "t", "yarn_timeline__service_version": "2.0f"}, ""),
        (TIMELINE | {"yarn_timeline__service_hostname": "t", "yarn_timeline__service_enabled": "false"}, ""),
    ],
)
async def test_the_timeline_server_of_the_site(
    connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, properties: dict[str, str], timeline: str
) -> None:
    connection = {"conn_type": "spark", "host": "yarn"}
    hook = connect_yarn(connection)
    monkeypatch.setenv("HADOOP_CONF_DIR", str(site(tmp_path / "conf", **properties)))
    assert (await hook._managers.settings()).timeline == timeline


# --- who asks


async def test_the_user_is_named_on_every_request(yarn: FakeYarn, connect_yarn: Connect) -> None:
    hook = connect_yarn(yarn.connection(**{"yarn-user": "alice@EXAMPLE.COM"}))
    yarn.manager.add(row(1, tags=ours("ab" * 16)))
    await hook.check()
    await hook.poll([JobRef(app_id(1)), UNKNOWN])
    await hook.find_owned("prod")
    await hook.prepare_cli({}, Submission(token="ab" * 16))
    await hook.kill(JobRef(app_id(1)))
    assert len(yarn.manager.requests) > 10
    assert all(path.count("user.name=alice%40EXAMPLE.COM") == 1 for _, path in yarn.manager.requests)


async def test_knox(yarn: FakeYarn, connect_yarn: Connect) -> None:
    yarn.manager.prefix = "/gateway/default/resourcemanager"
    yarn.manager.ask = "Basic " + base64.b64encode(b"me:hush").decode()
    yarn.manager.add(row(1))
    address = f"{yarn.manager.url}/gateway/default/resourcemanager"
    connection = yarn.connection(**{ADDRESS: address}) | {"login": "me", "password": "hush"}
    hook = connect_yarn(connection)
    assert "asked as me" in await hook.check()
    status = (await hook.poll([JobRef(app_id(1))]))[JobRef(app_id(1))]
    assert status.state is JobState.RUNNING
    assert status.links[Link.JOB] == f"{yarn.manager.url}/gateway/default/yarn/cluster/app/{app_id(1)}"
    with pytest.raises(AuthenticationFailed, match="login and password") as caught:
        await connect_yarn(connection | {"password": "other-secret"}).check()
    assert "other-secret" not in str(caught.value)


async def test_a_password_alone_is_not_sent(yarn: FakeYarn, connect_yarn: Connect) -> None:
    await connect_yarn(yarn.connection() | {"password": "hush"}).check()
    assert not any("Authorization" in headers for headers in yarn.manager.headers)


async def test_tls(stack: AsyncExitStack, connect_yarn: Connect) -> None:
    authority, fake = trustme.CA(), FakeYarn().manager
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    fake.url = await serve(stack, fake._serve, tls=context)
    with pytest.raises(BadConfiguration, match=r"not trusted.*'ca'"):
        await connect_yarn(named(fake.url)).check()
    hook = connect_yarn(named(fake.url, ca=authority.cert_pem.bytes().decode()))
    assert fake.url in await hook.check()


async def test_a_403_to_a_read_is_a_refusal(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.handler = fixed(403, "no")
    with pytest.raises(RequestRefused, match="403"):
        await yarn_hook.poll([UNKNOWN])


# --- Kerberos


@pytest.fixture
def kerberos(monkeypatch: pytest.MonkeyPatch) -> FakeKerberos:
    return FakeKerberos().install(monkeypatch)


@pytest.fixture
def secure(yarn: FakeYarn) -> FakeYarn:
    yarn.manager.ask, yarn.manager.cookie = "Negotiate", "u=airflow&p=airflow@R&t=kerberos&e=1&s=hush="
    yarn.manager.add(row(1))
    return yarn


def tickets(yarn: FakeYarn) -> list[str]:
    return [value for headers in yarn.manager.headers if (value := headers.get("Authorization"))]


async def test_one_ticket_for_many_requests(
    secure: FakeYarn, yarn_hook: QuickYarnHook, kerberos: FakeKerberos, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        jobs = [JobRef(app_id(1), uid=str(number)) for number in range(15)]
        assert {status.state for status in (await yarn_hook.poll(jobs)).values()} == {JobState.RUNNING}
        await yarn_hook.check()
    assert tickets(secure) == ["Negotiate " + base64.b64encode(b"ticket-1").decode()]
    assert kerberos.hosts == ["HTTP@127.0.0.1"]
    assert kerberos.verified == [b"server"], "the server proves that it is the one"
    assert kerberos.credentials == [], "the ticket cache of this process"
    assert "hush" not in caplog.text


async def test_a_cookie_that_expires(secure: FakeYarn, yarn_hook: QuickYarnHook, kerberos: FakeKerberos) -> None:
    await yarn_hook.check()
    secure.manager.cookie = "another"
    await yarn_hook.check()
    assert len(tickets(secure)) == 2


async def test_a_cookie_that_is_refused(secure: FakeYarn, yarn_hook: QuickYarnHook, kerberos: FakeKerberos) -> None:
    """Hadoop answers 403 and takes it back when its signature is not good any more."""
    await yarn_hook.check()
    original = secure.manager._authenticated

    async def refuse(request: web.Request) -> web.StreamResponse:
        if "Cookie" in request.headers and "Authorization" not in request.headers:
            gone = "hadoop.auth=; Path=/; Expires=Thu, 01-Jan-1970 00:00:00 GMT; HttpOnly"
            return web.Response(status=403, text="Invalid signature", headers={"Set-Cookie": gone})
        return await original(request)

    secure.manager._authenticated = refuse  # type: ignore[method-assign]
    await yarn_hook.check()
    assert len(tickets(secure)) >= 2


async def test_a_server_that_sets_no_cookie(secure: FakeYarn, yarn_hook: QuickYarnHook, kerberos: FakeKerberos) -> None:
    secure.manager.cookie = ""
    await yarn_hook.check()
    assert len(tickets(secure)) == 2


async def test_the_cookie_goes_to_its_own_server_alone(
    yarn_pair: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos
) -> None:
    for number, manager in enumerate(yarn_pair.managers):
        manager.ask, manager.cookie = "Negotiate", f"secret-of-{number}"
        manager.add(row(1))
    hook = connect_yarn(yarn_pair.connection())
    await hook.poll([UNKNOWN])
    for number, manager in enumerate(yarn_pair.managers):
        cookies = {headers["Cookie"] for headers in manager.headers if "Cookie" in headers}
        assert cookies <= {f'hadoop.auth="secret-of-{number}"'}


async def test_a_keytab(secure: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos, tmp_path: Path) -> None:
    content = b"\x05\x02the key"
    (tmp_path / "airflow.keytab").write_bytes(content)
    for keytab in (base64.encodebytes(content).decode(), str(tmp_path / "airflow.keytab")):
        for _ in range(2):
            await connect_yarn(secure.connection(principal="airflow@R", keytab=keytab)).check()
    assert kerberos.keytabs == [content] * 4
    first, again, second, _ = kerberos.credentials
    assert first["store"]["ccache"] == again["store"]["ccache"], "such a cache lives as long as the process"
    assert first["name"] == "airflow@R"
    assert first["usage"] == "initiate"
    assert all(each["store"]["ccache"].startswith("MEMORY:") for each in (first, second)), "nobody else's cache"
    assert first["store"]["ccache"] != second["store"]["ccache"]
    path = first["store"]["client_keytab"].removeprefix("FILE:")
    assert not os.path.lexists(path)  # noqa: ASYNC240 a test may wait
    assert second["store"]["client_keytab"] == f"FILE:{tmp_path / 'airflow.keytab'}"


def test_a_keytab_is_a_private_file() -> None:
    with Keytab(base64.b64encode(b"\x05\x02key").decode()).file() as path:
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


async def test_a_keytab_that_is_not_there(secure: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos) -> None:
    with pytest.raises(BadConfiguration, match=r"'keytab'.*no file /no/such"):
        await connect_yarn(secure.connection(keytab="/no/such")).check()


async def test_a_principal_of_the_ticket_cache(secure: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos) -> None:
    await connect_yarn(secure.connection(principal="airflow@R")).check()
    assert [(each["name"], "store" in each) for each in kerberos.credentials] == [("airflow@R", False)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Major (851968): Unspecified failure, Minor (1): Cannot contact any KDC for realm 'R'", ClusterUnreachable),
        ("Minor (2529639053): No Kerberos credentials available (default cache: FILE:/tmp/x)", AuthenticationFailed),
        ("Minor (2529638936): Server HTTP/127.0.0.1@R not found in Kerberos database", AuthenticationFailed),
    ],
)
async def test_no_ticket(
    secure: FakeYarn, yarn_hook: QuickYarnHook, kerberos: FakeKerberos, text: str, kind: type[Exception]
) -> None:
    kerberos.fail = text
    for call in (yarn_hook.check(), yarn_hook.poll([UNKNOWN])):
        with pytest.raises(kind, match=r"HTTP@127\.0\.0\.1.*Minor"):
            await call


async def test_a_kdc_that_hangs(
    secure: FakeYarn, yarn_hook: QuickYarnHook, kerberos: FakeKerberos, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(_spnego, "KDC_TIMEOUT", 0.1)
    monkeypatch.setattr(_spnego.Negotiator, "_begin", lambda *_: answers.wait(60))
    try:
        with pytest.raises(ClusterUnreachable, match=r"within 0\.1 s"):
            await yarn_hook.check()
    finally:
        answers.set()


async def test_a_server_that_proves_nothing(secure: FakeYarn, yarn_hook: QuickYarnHook, kerberos: FakeKerberos) -> None:
    kerberos.bad_proof = True
    with pytest.raises(AuthenticationFailed, match="Message Integrity"):
        await yarn_hook.check()
    secure.manager.mutual = "not base64!"
    with pytest.raises(AuthenticationFailed):
        await yarn_hook.check()


async def test_a_ticket_that_is_not_accepted(secure: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=401, text="GSSException", headers={"WWW-Authenticate": "Negotiate"})

    secure.manager._authenticated = refuse  # type: ignore[method-assign]
    hook = connect_yarn(secure.connection(principal="airflow@R"))
    with pytest.raises(AuthenticationFailed, match="does not accept the ticket of airflow@R"):
        await hook.check()
    assert len(secure.manager.requests) == 2, "once without, once with a ticket"


async def test_without_gssapi(secure: FakeYarn, yarn_hook: QuickYarnHook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gssapi", None)
    with pytest.raises(BadConfiguration, match=r"pip install 'airflow-provider-durable-spark\[kerberos\]'"):
        await yarn_hook.check()


async def test_without_kerberos_gssapi_is_not_needed(
    yarn: FakeYarn, connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's connection may have a keytab for spark-submit alone."""
    monkeypatch.setitem(sys.modules, "gssapi", None)
    keytab = base64.b64encode(b"\x05\x02key").decode()
    await connect_yarn(yarn.connection(principal="airflow@R", keytab=keytab)).check()


async def test_simple_means_simple(secure: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos) -> None:
    with pytest.raises(AuthenticationFailed, match="asks for Kerberos, and yarn-auth is simple"):
        await connect_yarn(secure.connection(**{"yarn-auth": "simple"})).check()
    assert kerberos.hosts == []


async def test_kerberos_means_kerberos(yarn: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos) -> None:
    """It is not waited for the server to ask; a proxy may let anybody pass."""
    await connect_yarn(yarn.connection(**{"yarn-auth": "kerberos"})).check()
    assert all(headers["Authorization"].startswith("Negotiate ") for headers in yarn.manager.headers)


async def test_a_password_goes_before_kerberos(secure: FakeYarn, connect_yarn: Connect, kerberos: FakeKerberos) -> None:
    connection = secure.connection() | {"login": "me", "password": "hush"}
    with pytest.raises(AuthenticationFailed, match="'yarn-auth' to kerberos"):
        await connect_yarn(connection).check()
    assert kerberos.hosts == []
