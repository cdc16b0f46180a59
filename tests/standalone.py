"""Jobs and credentials for tests on standalone clusters."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12
from cryptography.x509 import load_pem_x509_certificate

from dev.spark import SMALL_JVM, Keystore
from durable_spark.jobs import SparkJob

if TYPE_CHECKING:
    import trustme

__all__ = ["jvm_job", "jws", "keystore", "pyspark_job"]

APPS = Path(__file__).parent / "apps"


def jvm_job(seconds: float, exit_code: int = 0, **options: Any) -> SparkJob:
    """Return a driver that runs no Spark: it sleeps and exits."""
    source = str(APPS / "Driver.java")
    arguments: dict[str, Any] = {
        "application": source,
        "java_class": "org.codehaus.janino.SimpleCompiler",
        "application_args": [source, "Driver", str(seconds), str(exit_code)],
        "driver_memory": "128m",
        "conf": {"spark.driver.extraJavaOptions": SMALL_JVM},
    }
    return SparkJob(**arguments | options)


def pyspark_job(seconds: float, end: str = "0", **options: Any) -> SparkJob:
    """Return a PySpark application that sums on an executor, sleeps, and ends with an exit code or by ``raise``."""
    arguments: dict[str, Any] = {
        "application": str(APPS / "driver.py"),
        "application_args": [str(seconds), end],
        "driver_memory": "512m",
        "executor_memory": "512m",
        "total_executor_cores": 1,
        "conf": {"spark.executor.extraJavaOptions": SMALL_JVM, "spark.driver.extraJavaOptions": SMALL_JVM},
    }
    return SparkJob(**arguments | options)


def jws(key: bytes, *, lifetime: float = 3600) -> str:
    """Return a JSON web token as Spark's ``JWSFilter`` accepts it."""

    def encode(part: bytes) -> str:
        return base64.urlsafe_b64encode(part).decode().rstrip("=")

    claims = {"sub": "tests", "exp": int(time.time() + lifetime)}
    signed = ".".join(encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return f"{signed}.{encode(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def keystore(authority: trustme.CA, path: Path) -> Keystore:
    """Write a certificate for 127.0.0.1 and its key, as Java takes them."""
    leaf = authority.issue_cert("127.0.0.1", "localhost")
    key = load_pem_private_key(leaf.private_key_pem.bytes(), password=None)
    certificate = load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
    password = "changeit"
    path.write_bytes(
        pkcs12.serialize_key_and_certificates(
            b"spark",
            key,  # type: ignore[arg-type]
            certificate,
            None,
            BestAvailableEncryption(password.encode()),
        )
    )
    return Keystore(path, password)
