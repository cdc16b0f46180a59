"""
A real Kerberos realm on loopback: MIT's key distribution center, with a few principals and their keytabs.

What flows in are names of users; what flows out is a configuration file, a keytab and tickets for each, and
what a Hadoop server takes to demand such tickets over HTTP (SPNEGO). The programs are those of
:mod:`dev.kerberos_packages`.

The trap: a ticket is for the name in the URL, and the only service of the realm is that of ``localhost``. Who
asks ``127.0.0.1`` gets a 401.
"""

from __future__ import annotations

import importlib
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dev.kerberos_packages import ensure_kerberos
from dev.processes import Server, Startable, ToolMissing, free_port, wait_until

__all__ = ["KeyDistributionCenter", "ensure_gssapi"]

_SERVICE = "HTTP/localhost"


def ensure_gssapi() -> None:
    """Raise :class:`ToolMissing` when the package ``gssapi`` cannot be imported."""
    try:
        importlib.import_module("gssapi")
    except ImportError as error:
        raise ToolMissing(f"gssapi cannot be imported ({error}): scripts/test gets it") from error


class KeyDistributionCenter(Startable):
    """
    One realm. A context manager.

    :param users: principals besides the web servers' own.
    :param directory: for its database, keytabs and tickets; one that is removed at the end when ``None``.
    """

    realm = "TEST.LOCAL"

    def __init__(self, users: Sequence[str] = ("airflow", "other"), *, directory: Path | None = None) -> None:
        _curl()
        self._kerberos = ensure_kerberos()
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="durable-spark-")
        self.directory = directory or Path(self._temporary.name if self._temporary else "")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.users = tuple(users)
        self.port = free_port()
        self.krb5_conf = self._write("krb5.conf", self._client())
        """For ``KRB5_CONFIG``, or the Java property ``java.security.krb5.conf``."""
        self._environment = {
            **self._kerberos.environment(),
            "KRB5_CONFIG": str(self.krb5_conf),
            "KRB5_KDC_PROFILE": str(self._write("kdc.conf", self._profile())),
        }
        command = [self._kerberos.program("krb5kdc"), "-n"]
        self.server = Server("krb5kdc", command, log=self.directory / "krb5kdc.log", env=self._environment)

    def start(self) -> None:
        """Make the realm and start its server; return when it listens."""
        if not (self.directory / "principal").exists():
            self._create()
        self.server.start()

        def listens() -> bool:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return True

        wait_until(listens, 30, "the key distribution center", servers=[self.server])

    def stop(self) -> None:
        """Kill the server."""
        self.server.kill()
        if self._temporary:
            self._temporary.cleanup()

    def principal(self, user: str) -> str:
        """Return a user's full name."""
        return f"{user}@{self.realm}"

    def keytab(self, user: str) -> Path:
        """Return the file with a user's key."""
        return self.directory / f"{user.replace('/', '-')}.keytab"

    def ticket(self, user: str, *, lifetime: str = "1h") -> Path:
        """Get a fresh ticket and return the file that holds it, for ``KRB5CCNAME``."""
        cache = self.directory / f"{user}.ccache"
        arguments = ["-l", lifetime, "-c", f"FILE:{cache}", "-k", "-t", str(self.keytab(user)), self.principal(user)]
        self._run("kinit", *arguments)
        return cache

    def environment(self, user: str) -> dict[str, str]:
        """Return the environment variables with which any program has a fresh ticket of this user."""
        return {"KRB5_CONFIG": str(self.krb5_conf), "KRB5CCNAME": f"FILE:{self.ticket(user)}"}

    def cookie(self, url: str, user: str) -> str:
        """Show a ticket to a Hadoop web server, through ``curl``, and return the cookie that it gives for it."""
        command = [_curl(), "--silent", "--insecure", "--negotiate", "--user", ":", "--output", "/dev/null"]
        answer = subprocess.run(
            [*command, "--dump-header", "-", url], env=self.environment(user), capture_output=True, text=True
        )
        found = re.findall(r"(?im)^set-cookie: (hadoop\.auth=[^;\r\n]+)", answer.stdout)
        if not found:
            raise OSError(f"{url} gives {user} no cookie: {answer.returncode} {answer.stdout}")
        cookie: str = found[-1]
        return cookie

    def web_properties(self, directory: Path) -> dict[str, str]:
        """
        Return the properties of Hadoop's ``core-site.xml`` with which web servers demand tickets.

        :param directory: of the cluster, for the key that signs its cookies.
        """
        secret = directory / "http-auth-secret"
        if not secret.exists():
            secret.write_text(secrets.token_hex())
        http = "hadoop.http.authentication"
        return {
            "hadoop.http.filter.initializers": "org.apache.hadoop.security.AuthenticationFilterInitializer",
            f"{http}.type": "kerberos",
            f"{http}.kerberos.principal": self.principal(_SERVICE),
            f"{http}.kerberos.keytab": str(self.keytab(_SERVICE)),
            f"{http}.signature.secret.file": str(secret),
            f"{http}.simple.anonymous.allowed": "false",
        }

    def _create(self) -> None:
        self._run("kdb5_util", "create", "-s", "-r", self.realm, "-P", secrets.token_hex())
        commands = [
            line
            for user in (_SERVICE, *self.users)
            for line in (f"addprinc -randkey {user}", f"ktadd -k {self.keytab(user)} {user}")
        ]
        said = self._run("kadmin.local", input="\n".join([*commands, ""]))
        if absent := [user for user in (_SERVICE, *self.users) if not self.keytab(user).exists()]:
            raise RuntimeError(f"no keytab for {absent}:\n{said}")

    def _run(self, program: str, *arguments: str, input: str = "") -> str:
        ended = subprocess.run(
            [self._kerberos.program(program), *arguments],
            env=self._environment,
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if ended.returncode:
            raise RuntimeError(f"{program} {arguments} ended with {ended.returncode}:\n{ended.stdout}")
        return ended.stdout

    def _write(self, name: str, content: str) -> Path:
        path = self.directory / name
        path.write_text(content)
        return path

    def _client(self) -> str:
        return f"""[libdefaults]
  default_realm = {self.realm}
  dns_canonicalize_hostname = false
  dns_lookup_kdc = false
  dns_lookup_realm = false
  rdns = false
  udp_preference_limit = 1
[realms]
  {self.realm} = {{
    kdc = 127.0.0.1:{self.port}
  }}
[domain_realm]
  localhost = {self.realm}
"""

    def _profile(self) -> str:
        return f"""[kdcdefaults]
  kdc_listen = 127.0.0.1:{self.port}
  kdc_tcp_listen = 127.0.0.1:{self.port}
[realms]
  {self.realm} = {{
    database_name = {self.directory}/principal
    key_stash_file = {self.directory}/stash
    max_life = 10h
  }}
[dbmodules]
  db_module_dir = {self._kerberos.libraries}/krb5/plugins/kdb
"""


def _curl() -> str:
    """Return a curl that can negotiate."""
    curl = shutil.which("curl")
    if curl is None or "SPNEGO" not in subprocess.run([curl, "--version"], capture_output=True, text=True).stdout:
        raise ToolMissing("curl with SPNEGO is not on the PATH: install curl")
    return curl
