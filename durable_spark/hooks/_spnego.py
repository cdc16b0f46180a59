"""
Kerberos over HTTP: the tokens of SPNEGO (RFC 4559).

What flows in: a host that asked for ``Negotiate``, and whose credentials to use: a keytab's, or the ticket cache's of
this process. What flows out: a token for the request, and the proof that the answer's token is the host's.

The trap: everything here may wait for a KDC, or read files, so it runs in a thread, with a limit. ``gssapi`` is a C
extension that needs MIT Kerberos to be built, so it is an extra, and imported when it is needed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from durable_spark.jobs import AuthenticationFailed, BadConfiguration, ClusterUnreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Handshake", "Keytab", "Negotiator"]

T = TypeVar("T")

KDC_TIMEOUT = 30.0
"""Seconds that a KDC may take; with several in ``krb5.conf``, each is waited for in turn."""
_SPNEGO = (1, 3, 6, 1, 5, 5, 2)
_BEGINNING_OF_KEYTABS = b"\x05"

_MISSING = (
    "the ResourceManager asks for Kerberos, and the Python package gssapi cannot be imported ({error}): "
    "pip install 'airflow-provider-durable-spark[kerberos]' wherever Airflow's workers and triggerers run"
)


class Keytab:
    """
    A keytab: the path of a file, or its content in base64, as the Spark provider's connections hold it.

    :param text: as the connection gives it.
    :raises ValueError: when it is neither.
    """

    def __init__(self, text: str) -> None:
        self.path: Path | None = None
        self._content = b""
        text = text.strip()
        if text.startswith(("/", "~")):
            self.path = Path(text).expanduser()
            return
        try:
            self._content = base64.b64decode("".join(text.split()), validate=True)
        except binascii.Error as error:
            raise ValueError("it is neither a path nor base64") from error
        if not self._content.startswith(_BEGINNING_OF_KEYTABS):
            raise ValueError("its content is not that of a keytab")

    @property
    def identity(self) -> str:
        """What tells it from another one, without showing it."""
        return str(self.path) if self.path else hashlib.sha256(self._content).hexdigest()

    @contextmanager
    def file(self) -> Iterator[str]:
        """Have it as a file, for as long as the context is open; one that is made has the mode 0600."""
        if self.path is not None:
            yield str(self.path)
            return
        with tempfile.NamedTemporaryFile(prefix="durable-spark-keytab-") as file:
            file.write(self._content)
            file.flush()
            yield file.name


class Handshake:
    """
    One negotiation under way.

    :param token: what the request carries in ``Authorization: Negotiate``.
    """

    def __init__(self, context: Any, token: bytes) -> None:
        self._context = context
        self.token = base64.b64encode(token).decode()

    async def finish(self, token: str, host: str) -> None:
        """
        Check the token of the answer: it proves that the host is the one whose ticket was used.

        :raises AuthenticationFailed: when it proves nothing.
        """
        try:
            theirs = base64.b64decode(token, validate=True)
            await _in_thread(lambda: self._context.step(theirs), host)
        except binascii.Error as error:
            raise AuthenticationFailed(f"{host} answered with a token that is none") from error


class Negotiator:
    """
    Makes tokens, with the credentials of one principal.

    :param principal: whose; ``None`` means that of the ticket cache or keytab.
    :param keytab: where its key is; ``None`` means the ticket cache of this process (``KRB5CCNAME``).
    """

    def __init__(self, *, principal: str | None = None, keytab: Keytab | None = None) -> None:
        self._principal = principal
        self._keytab = keytab
        # In memory and of our own: the default cache belongs to whoever runs kinit, or 'airflow kerberos'. One for all
        # hooks with this key: a feed makes hook after hook in an outage, and such a cache lives as long as the process.
        whose = hashlib.sha256(f"{principal}\0{keytab.identity if keytab else ''}".encode()).hexdigest()[:16]
        self._cache = f"MEMORY:durable-spark-{whose}"

    async def begin(self, host: str) -> Handshake:
        """
        Return a token for a host.

        :param host: as the service's principal has it: a name, not an address.
        :raises AuthenticationFailed: when there are no credentials, or the KDC does not know the service.
        :raises ClusterUnreachable: when the KDC does not answer.
        :raises BadConfiguration: when ``gssapi`` is not installed, or the keytab cannot be read.
        """
        return await _in_thread(lambda: self._begin(host), host)

    def _begin(self, host: str) -> Handshake:
        gssapi = _gssapi()
        try:
            return self._handshake(gssapi, host, gssapi.OID.from_int_seq(_SPNEGO))
        except gssapi.exceptions.GSSError:
            self._handshake(gssapi, host, gssapi.MechType.kerberos)  # raises the reason, which SPNEGO hides (MIT 1.20)
            raise

    def _handshake(self, gssapi: Any, host: str, mechanism: Any) -> Handshake:
        service = gssapi.Name(f"HTTP@{host}", gssapi.NameType.hostbased_service)
        context = gssapi.SecurityContext(
            name=service, usage="initiate", mech=mechanism, creds=self._credentials(gssapi, mechanism)
        )
        return Handshake(context, context.step() or b"")

    def _credentials(self, gssapi: Any, mechanism: Any) -> Any:
        """Return the credentials, which MIT Kerberos gets, keeps and renews; ``None`` means the default ones."""
        name = gssapi.Name(self._principal, gssapi.NameType.kerberos_principal) if self._principal else None
        if self._keytab is None:
            return gssapi.Credentials(name=name, usage="initiate", mechs=[mechanism]) if name else None
        if self._keytab.path is not None and not self._keytab.path.is_file():
            raise BadConfiguration(f"the extra 'keytab' of the connection: there is no file {self._keytab.path}")
        with self._keytab.file() as path:
            store = {"client_keytab": f"FILE:{path}", "ccache": self._cache}
            return gssapi.Credentials(name=name, usage="initiate", mechs=[mechanism], store=store)


def _gssapi() -> Any:
    try:
        import gssapi
        import gssapi.exceptions
    except (ImportError, OSError) as error:
        raise BadConfiguration(_MISSING.format(error=str(error)[:200])) from error
    return gssapi


async def _in_thread(call: Callable[[], T], host: str) -> T:
    def run() -> T:
        gssapi = _gssapi()
        try:
            return call()
        except gssapi.exceptions.GSSError as error:
            said = f"no Kerberos ticket for HTTP@{host}: {' '.join(str(error).split())[:400]}"
            if "annot contact any KDC" in said:
                raise ClusterUnreachable(said) from error
            raise AuthenticationFailed(
                f"{said}. Give the extras 'principal' and 'keytab', or keep a ticket cache (KRB5CCNAME) fresh, as "
                "'airflow kerberos' does; the ResourceManager must be named as its principal is"
            ) from error

    try:
        return await asyncio.wait_for(asyncio.to_thread(run), KDC_TIMEOUT)
    except asyncio.TimeoutError as error:
        raise ClusterUnreachable(f"no Kerberos ticket for HTTP@{host} within {KDC_TIMEOUT:g} s") from error
