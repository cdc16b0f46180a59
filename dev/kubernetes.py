"""
A real Kubernetes API on loopback, whose pods really run, as local processes or, the full way, as containers.

:class:`KubernetesCluster` starts etcd, kube-apiserver (TLS, tokens, RBAC, an audit log) and one node,
:mod:`dev.kubernetes_node`; makes what kube-controller-manager would make; and grants the rights that the
documentation's own manifest grants, ``docs/kubernetes/rbac.yaml``. Any of the three can be killed, suspended
and started again. The full way there are a real scheduler and a real kubelet, :mod:`dev.kubernetes_kubelet`.

Its :meth:`~KubernetesCluster.created_pods` is the witness of tests: which pods the API server's audit log says
were created, read without any of the package's code.

The trap: there is no kube-controller-manager. A namespace needs a service account and the authority's
certificate (:meth:`~KubernetesCluster.create_namespace`), and what a deleted pod owned stays.

``python -m dev.kubernetes [--full]`` runs one until it is interrupted and prints how to reach it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import trustme
import yaml

from dev.kubernetes_binaries import CONTROL_PLANE, REAL_NODE, ensure_kubernetes
from dev.kubernetes_kubelet import API_ADDRESS, NODE_ADDRESS, check_machine
from dev.processes import Server, Startable, ToolMissing, free_port, wait_until
from dev.spark import SMALL_JVM, ensure_spark

__all__ = ["CreatedPod", "KubernetesCluster", "RequestFailed"]

_ROOT = Path(__file__).resolve().parents[1]
_RBAC = _ROOT / "docs" / "kubernetes" / "rbac.yaml"
_RBAC_API = "rbac.authorization.k8s.io/v1"
_COLLECTIONS = {"ServiceAccount": "serviceaccounts", "Role": "roles", "RoleBinding": "rolebindings"}
_START = 60.0  # seconds; it takes 3 on an idle machine

_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        # The object's uid is only in the answer.
        {"level": "RequestResponse", "verbs": ["create", "patch"], "resources": [{"group": "", "resources": ["pods"]}]},
        {"level": "Request", "verbs": ["patch"], "resources": [{"group": "", "resources": ["pods/status"]}]},
        {
            "level": "Metadata",
            "verbs": ["create", "update", "patch", "delete", "deletecollection"],
            "resources": [{"group": "", "resources": ["pods", "secrets", "services", "configmaps"]}],
        },
        {"level": "None"},
    ],
}


class RequestFailed(OSError):
    """The API server refused a request."""

    def __init__(self, request: str, status: int, body: bytes) -> None:
        try:
            answer = json.loads(body)
            self.reason, message = answer.get("reason", ""), answer.get("message", "")
        except ValueError:
            self.reason, message = "", body[:500].decode(errors="replace")
        super().__init__(f"{request}: {status} {self.reason}: {message}")
        self.status = status


@dataclasses.dataclass(frozen=True)
class CreatedPod:
    """A pod as the audit log tells of its creation."""

    name: str
    namespace: str
    uid: str
    user: str
    """Who created it."""
    entry: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)
    """Of the audit log."""


class KubernetesCluster(Startable):
    """
    One API server, its etcd and one node on loopback, each a process of its own. A context manager.

    :param node: whether there is a node to run pods; without one they stay as a test's patches make them.
    :param labels: of the node, further ones.
    :param namespace: the one in which the rights of ``docs/kubernetes/rbac.yaml`` are granted.
    :param directory: for certificates, data, logs and pods; one that is removed at the end when ``None``.
    :param full: whether the node is a kubelet with containerd and runc, which takes root and a machine that allows it.
    """

    namespace = "spark"
    """Where the documentation's manifest grants rights."""
    node_name = "node-1"
    submitter = "spark-submitter"
    """The user that has the rights of Airflow, and :attr:`token`."""

    def __init__(
        self,
        *,
        node: bool = True,
        labels: Mapping[str, str] | None = None,
        directory: Path | None = None,
        full: bool = False,
    ) -> None:
        if full:
            check_machine()
        else:
            _check_namespaces()
        binaries = ensure_kubernetes(*CONTROL_PLANE, *(REAL_NODE if full else ()))
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="durable-spark-")
        self.directory = directory or Path(self._temporary.name if self._temporary else "")
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.token = secrets.token_hex()
        self.admin_token = secrets.token_hex()
        self._authority = trustme.CA()
        self.ca = self._write("ca.pem", self._authority.cert_pem.bytes())
        self._context = ssl.create_default_context(cafile=str(self.ca))
        self._audit_log = self.directory / "audit.log"
        self._audit_lock = threading.Lock()
        self._audited: list[dict[str, Any]] = []
        self._audited_bytes = 0
        self._created: list[CreatedPod] = []
        self._ran: set[str] = set()
        etcd_port = free_port()
        self.etcd = self._etcd(binaries, etcd_port)
        self._tunnel = self.directory / "node.sock" if full else None
        self.api_server = self._api_server(binaries, etcd_port)
        scheduler = [self._scheduler(binaries)] if full else []
        self.node = self._kubelet(binaries, labels or {}) if full else self._node(labels or {})
        self._servers = [self.etcd, self.api_server, *([*scheduler, self.node] if node else [])]

    def start(self) -> None:
        """Start everything; return when pods can be created and the node is ready to run them."""
        for server in self._servers:
            server.start()
        self._wait_until_ready()
        self.create_namespace("default")
        self.create_namespace(self.namespace)
        self._grant_rights()
        if self.node in self._servers:
            self._wait_for_node()

    def stop(self) -> None:
        """Kill everything, the pods with it."""
        self.node.stop()
        for server in reversed(self._servers):
            server.kill()
        if self._temporary:
            self._temporary.cleanup()

    def ready(self) -> bool:
        """Whether the API server says so. Raises :class:`OSError` when it does not answer."""
        return self._send("GET", "/readyz") == b"ok"

    def restart_api_server(self) -> None:
        """Kill the API server and start it again; return when it is ready."""
        self.api_server.kill()
        self.start_api_server()

    def start_api_server(self) -> None:
        """Start the API server, which has been killed; return when it is ready."""
        self.api_server.start()
        self._wait_until_ready()

    def restart_node(self) -> None:
        """Kill the node, and its pods with it, and start it again; return when it reports."""
        self.node.kill()
        self.node.start()
        self._wait_for_node()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        token: str | None = None,
    ) -> dict[str, Any]:
        """
        Send one request to the API server and return what it answers.

        :param path: with the query: ``/api/v1/namespaces/spark/pods?limit=1``.
        :param token: the administrator's when ``None``.
        :raises RequestFailed: when it refuses.
        """
        answer: dict[str, Any] = json.loads(self._send(method, path, body, content_type, token))
        return answer

    def apply(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Create or change one object, as ``kubectl apply --server-side`` does."""
        api, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        root = "/api/v1" if api == "v1" else f"/apis/{api}"
        path = f"{root}/namespaces/{metadata.get('namespace', self.namespace)}/{_COLLECTIONS[kind]}/{metadata['name']}"
        query = "?fieldManager=durable-spark&force=true"
        return self.request("PATCH", path + query, manifest, content_type="application/apply-patch+yaml")

    def create_namespace(self, name: str) -> None:
        """Create a namespace, unless it exists, with what kube-controller-manager puts into each one."""
        authority = {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": self.ca.read_text()}}
        for path, body in (
            ("/api/v1/namespaces", {"metadata": {"name": name}}),
            (f"/api/v1/namespaces/{name}/serviceaccounts", {"metadata": {"name": "default"}}),
            (f"/api/v1/namespaces/{name}/configmaps", authority),
        ):
            try:
                self.request("POST", path, body)
            except RequestFailed as error:
                if error.reason != "AlreadyExists":
                    raise

    def token_for(
        self, user: str, rules: Sequence[Mapping[str, Any]], *, namespace: str | None = None, lifetime: int = 3600
    ) -> str:
        """
        Return a token for a service account of this name, which is made, and given exactly these rights.

        :param rules: of a Role: ``[{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]``.
        :param lifetime: seconds; the API server takes no less than 600.
        """
        metadata = {"name": user, "namespace": namespace or self.namespace}
        subject = {"kind": "ServiceAccount", **metadata}
        self.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
        self.apply({"apiVersion": _RBAC_API, "kind": "Role", "metadata": metadata, "rules": list(rules)})
        self.apply(_binding(metadata, [subject]))
        path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/{user}/token"
        token: str = self.request("POST", path, {"spec": {"expirationSeconds": lifetime}})["status"]["token"]
        return token

    def create_pod(self, name: str, spec: Mapping[str, Any], **metadata: Any) -> dict[str, Any]:
        """Create a pod with what a test leaves out of its containers: a name and an image that there is."""
        containers = [
            {"name": "main", "image": "localhost/busybox:test", **container} for container in spec["containers"]
        ]
        pod = {
            "metadata": {"name": name, **metadata},
            "spec": {"restartPolicy": "Never", **spec, "containers": containers},
        }
        return self.request("POST", self._pods(), pod)

    def pods(self, selector: str = "") -> list[dict[str, Any]]:
        """Return the pods, those of one label selector if any is given."""
        items: list[dict[str, Any]] = self.request("GET", f"{self._pods()}?labelSelector={selector}")["items"]
        return items

    def pod(self, name: str) -> dict[str, Any]:
        """Return one pod; :class:`RequestFailed` with status 404 when there is none."""
        return self.request("GET", self._pods(name))

    def patch_status(self, name: str, status: Mapping[str, Any]) -> dict[str, Any]:
        """Merge into a pod's status what no node has found. A pod that a node runs is reported anew when it ends."""
        merge = "application/merge-patch+json"
        return self.request("PATCH", f"{self._pods(name)}/status", {"status": status}, content_type=merge)

    def delete_pod(self, name: str, grace: int | None = None) -> None:
        """Delete a pod; with a grace period of 0 at once, whatever the node does."""
        self.request("DELETE", self._pods(name), None if grace is None else {"gracePeriodSeconds": grace})

    def log(self, name: str, query: str = "") -> str:
        """Return a pod's log, through the API server, which asks the node."""
        return self._send("GET", f"{self._pods(name)}/log?{query}").decode()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events about a pod, the oldest first."""
        path = f"/api/v1/namespaces/{self.namespace}/events?fieldSelector=involvedObject.name={name}"
        items: list[dict[str, Any]] = self.request("GET", path)["items"]
        return sorted(items, key=lambda event: int(event["metadata"]["resourceVersion"]))

    def audit(self) -> list[dict[str, Any]]:
        """Return the audit log: creations, changes and deletions of pods, secrets, services and config maps."""
        with self._audit_lock:
            self._read_audit_log()
            return list(self._audited)

    def _read_audit_log(self) -> None:
        """Read what was added: a log of hundreds of pods, asked for ten times a second, is not read anew each time."""
        if not self._audit_log.exists():
            return
        with self._audit_log.open("rb") as log:
            log.seek(self._audited_bytes)
            added = log.read()
        complete = added[: added.rfind(b"\n") + 1]
        self._audited_bytes += len(complete)
        for line in complete.splitlines():
            entry = json.loads(line)
            if entry["objectRef"].get("subresource") == "status":
                patch = entry.get("requestObject", {})
                if patch.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed"):
                    self._ran.add(patch.get("metadata", {}).get("uid", ""))
                continue
            self._audited.append(entry)
            is_pod = entry["objectRef"]["resource"] == "pods" and "subresource" not in entry["objectRef"]
            if is_pod and entry["responseStatus"]["code"] == 201 and "dryRun=" not in entry["requestURI"]:
                metadata = entry["responseObject"]["metadata"]
                user = entry["user"]["username"]
                self._created.append(CreatedPod(metadata["name"], metadata["namespace"], metadata["uid"], user, entry))

    def created_pods(self) -> list[CreatedPod]:
        """
        Return all pods that were ever created, in that order, as the audit log has them.

        A creation is logged when it has been answered: an instant later than the client may know of it.
        """
        with self._audit_lock:
            self._read_audit_log()
            return list(self._created)

    def has_run(self, uid: str) -> bool:
        """Whether a pod has ever run on the node, as the audit log has it: also one that is deleted."""
        with self._audit_lock:
            self._read_audit_log()
            return uid in self._ran

    def connection(self, **extra: Any) -> dict[str, Any]:
        """
        Return an Airflow connection of type ``durable_spark``, as its JSON form takes it.

        :param extra: further extras, with underscores for hyphens.
        """
        return {
            "conn_type": "durable_spark",
            "host": "k8s://https://127.0.0.1",
            "port": self.port,
            "password": self.token,
            "extra": {
                "namespace": self.namespace,
                "ca": str(self.ca),
                **{name.replace("_", "-"): value for name, value in extra.items()},
            },
        }

    def kubeconfig(
        self,
        path: Path | None = None,
        *,
        user: Literal["token", "certificate", "exec"] = "token",
        token: str | None = None,
    ) -> Path:
        """
        Write a kubeconfig and return its path.

        :param path: a file in the cluster's directory when ``None``.
        :param user: how the submitter shows who it is: by its token, by a client certificate, or by the answer
            of a credential plugin that knows its token.
        :param token: another user's.
        """
        token = token or self.token
        users: dict[str, Any] = {
            "token": lambda: {"token": token},
            "certificate": self._client_certificate,
            "exec": functools.partial(self._exec_plugin, token),
        }
        cluster = {"server": self.url, "certificate-authority": str(self.ca)}
        context = {"cluster": "cluster", "user": "user", "namespace": self.namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "context",
            "clusters": [{"name": "cluster", "cluster": cluster}],
            "contexts": [{"name": "context", "context": context}],
            "users": [{"name": "user", "user": users[user]()}],
        }
        path = path or self.directory / f"kubeconfig-{secrets.token_hex(4)}"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def conf(self) -> dict[str, str]:
        """Return the Spark settings with which a driver and one executor run in this cluster."""
        ensure_spark()  # the node finds the same one
        return {
            "spark.kubernetes.container.image": "localhost/spark:test",
            "spark.kubernetes.container.image.pullPolicy": "Never",
            "spark.kubernetes.driver.master": f"https://{API_ADDRESS}" if self._tunnel else self.url,
            "spark.kubernetes.authenticate.driver.serviceAccountName": "spark",
            "spark.kubernetes.executor.useDriverPodIP": "true",  # there is no DNS for the driver's service
            "spark.kubernetes.allocation.batch.delay": "200ms",
            "spark.kubernetes.driver.request.cores": "0.1",
            "spark.kubernetes.executor.request.cores": "0.1",
            "spark.executor.instances": "1",
            "spark.driver.memory": "512m",
            "spark.executor.memory": "512m",
            "spark.driver.extraJavaOptions": SMALL_JVM,
            "spark.executor.extraJavaOptions": SMALL_JVM,
            "spark.ui.enabled": "false",
        }

    def _pods(self, name: str = "") -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods" + (f"/{name}" if name else "")

    def _send(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
        token: str | None = None,
    ) -> bytes:
        headers = {"Authorization": f"Bearer {token or self.admin_token}", "Content-Type": content_type}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, method=method, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10, context=self._context) as answer:
                content: bytes = answer.read()
        except urllib.error.HTTPError as error:
            raise RequestFailed(f"{method} {path}", error.code, error.read()) from None
        return content

    def _wait_until_ready(self) -> None:
        servers = [self.etcd, self.api_server]
        wait_until(self.ready, _START, "the API server to be ready", servers=servers, interval=0.02)

    def _wait_for_node(self) -> None:
        wait_until(self._node_reports, _START, "the node", servers=self._servers, interval=0.02)

    def _node_reports(self) -> bool:
        path = f"/api/v1/nodes/{self.node_name}"
        status = self.request("GET", path)["status"]
        if self._tunnel is None:
            return bool(status["nodeInfo"].get("bootID") == str(self.node.pid))
        ready = {condition["type"]: condition["status"] for condition in status.get("conditions", [])}.get("Ready")
        return ready == "True" and self._send("GET", f"{path}/proxy/healthz") == b"ok"

    def _grant_rights(self) -> None:
        """Apply what users are told to apply, but to the user that has :attr:`token`."""
        for manifest in yaml.safe_load_all(_RBAC.read_text()):
            if manifest["kind"] == "RoleBinding" and manifest["metadata"]["name"] == "airflow":
                subject = {"kind": "User", "name": self.submitter, "apiGroup": "rbac.authorization.k8s.io"}
                manifest = _binding(manifest["metadata"], [subject])
            self.apply(manifest)

    def _write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(content)
        return path

    def _certificate(self, name: str, *identities: str, **subject: Any) -> Path:
        """Return a file that holds a new certificate and its key, as a client and as a server."""
        leaf = self._authority.issue_cert(*identities, **subject)
        return self._write(name, leaf.cert_chain_pems[0].bytes() + leaf.private_key_pem.bytes())

    def _client_certificate(self) -> dict[str, str]:
        # Java takes neither a file that holds both nor a certificate without an alternative name.
        leaf = self._authority.issue_cert("submitter.invalid", common_name=self.submitter)
        certificate = self._write("submitter.pem", leaf.cert_chain_pems[0].bytes())
        key = self._write("submitter.key", leaf.private_key_pem.bytes())
        return {"client-certificate": str(certificate), "client-key": str(key)}

    def _exec_plugin(self, token: str) -> dict[str, Any]:
        api = "client.authentication.k8s.io/v1"
        credential = {"apiVersion": api, "kind": "ExecCredential", "status": {"token": token}}
        path = self._write(f"credential-{secrets.token_hex(4)}.json", json.dumps(credential).encode())
        plugin = {"apiVersion": api, "command": "cat", "args": [str(path)], "interactiveMode": "Never"}
        return {"exec": plugin}

    def _etcd(self, binaries: Path, port: int) -> Server:
        url, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
        options = {
            "data-dir": self.directory / "etcd",
            "listen-client-urls": url,
            "advertise-client-urls": url,
            "listen-peer-urls": peers,
            "initial-advertise-peer-urls": peers,
            "initial-cluster": f"default={peers}",
            "unsafe-no-fsync": "true",  # it need not survive the machine
            "log-level": "warn",
        }
        return self._server("etcd", [binaries / "etcd"], options)

    def _api_server(self, binaries: Path, etcd_port: int) -> Server:
        serving = self._certificate("api-server.pem", "127.0.0.1", "localhost", "kubernetes.default.svc", API_ADDRESS)
        client = self._certificate(
            "client.pem", "api-server.invalid", common_name="api-server", organization_name="system:masters"
        )
        signing = self._write("service-accounts.pem", trustme.CA().private_key_pem.bytes())
        tokens = (
            f'{self.admin_token},admin,admin,"system:masters"\n'
            f'{self.token},{self.submitter},{self.submitter},"submitters"\n'
        )
        options = {
            "etcd-servers": f"http://127.0.0.1:{etcd_port}",
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",
            "secure-port": self.port,
            "tls-cert-file": serving,
            "tls-private-key-file": serving,
            "client-ca-file": self.ca,
            "token-auth-file": self._write("tokens.csv", tokens.encode()),
            "authorization-mode": "RBAC",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": signing,
            "service-account-signing-key-file": signing,
            "service-cluster-ip-range": "10.0.0.0/24",
            "endpoint-reconciler-type": "none",
            "disable-admission-plugins": "TaintNodesByCondition",  # nobody would take the taint of a new node away
            "allow-privileged": "true",
            "kubelet-client-certificate": client,
            "kubelet-client-key": client,
            "kubelet-certificate-authority": self.ca,
            "kubelet-preferred-address-types": "InternalIP",
            "audit-policy-file": self._write("audit-policy.json", json.dumps(_AUDIT_POLICY).encode()),
            "audit-log-path": self._audit_log,
            "audit-log-maxsize": "10000",  # megabytes, after which it would begin another one
        }
        if self._tunnel:
            options["egress-selector-config-file"] = self._egress(self._tunnel)
        return self._server("kube-apiserver", [binaries / "kube-apiserver"], options)

    def _node(self, labels: Mapping[str, str]) -> Server:
        options = {
            "name": self.node_name,
            "url": self.url,
            "ca": self.ca,
            "token-file": self._write("node.token", self.admin_token.encode()),
            "certificate": self._certificate("node.pem", "127.0.0.1"),
            "port": free_port(),
            "directory": self.directory / "pods",
            "labels": json.dumps(dict(labels)),
        }
        return self._server("node", [sys.executable, "-m", "dev.kubernetes_node"], options, cwd=_ROOT)

    def _egress(self, tunnel: Path) -> Path:
        """Return a file that tells the API server how to reach the node, which is not on the machine's network."""
        connection = {"proxyProtocol": "HTTPConnect", "transport": {"uds": {"udsName": str(tunnel)}}}
        configuration = {
            "apiVersion": "apiserver.k8s.io/v1beta1",
            "kind": "EgressSelectorConfiguration",
            "egressSelections": [{"name": "cluster", "connection": connection}],
        }
        return self._write("egress.json", json.dumps(configuration).encode())

    def _scheduler(self, binaries: Path) -> Server:
        config = self.kubeconfig(self.directory / "scheduler.kubeconfig", token=self.admin_token)
        options = {
            "kubeconfig": config,
            "authentication-kubeconfig": config,
            "authorization-kubeconfig": config,
            "leader-elect": "false",
            "secure-port": "0",
        }
        return self._server("kube-scheduler", [binaries / "kube-scheduler"], options)

    def _kubelet(self, binaries: Path, labels: Mapping[str, str]) -> Server:
        options = {
            "name": self.node_name,
            "url": self.url,
            "ca": self.ca,
            "token-file": self._write("node.token", self.admin_token.encode()),
            "certificate": self._certificate("node.pem", NODE_ADDRESS),
            "tunnel": self._tunnel,
            "programs": binaries,
            "directory": self.directory / "node",
            "labels": json.dumps(dict(labels)),
        }
        return self._server("node", [sys.executable, "-m", "dev.kubernetes_kubelet"], options, cwd=_ROOT)

    def _server(
        self, name: str, program: Iterable[str | Path], options: Mapping[str, object], cwd: Path | None = None
    ) -> Server:
        command = [*program, *(f"--{option}={value}" for option, value in options.items())]
        return Server(name, command, log=self.directory / f"{name}.log", cwd=cwd)


@functools.cache
def _check_namespaces() -> None:
    """Run a process as a pod's, where it may go wrong for good."""
    with tempfile.TemporaryDirectory(prefix="durable-spark-") as root:
        file = Path(root) / "pod.json"
        pod = {"command": ["true"], "environment": {"PATH": os.environ["PATH"]}, "directory": "/", "mounts": []}
        file.write_text(json.dumps({**pod, "root": root, "parent": os.getpid()}))
        command = [sys.executable, "-IS", str(_ROOT / "dev" / "kubernetes_pod.py"), str(file), "1"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if answer.returncode or answer.stdout:
        raise ToolMissing(f"pods need namespaces of their own: {answer.stdout}{answer.stderr}")


def _binding(metadata: Mapping[str, str], subjects: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """Return a RoleBinding to the Role of the same name."""
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": metadata["name"]}
    return {
        "apiVersion": _RBAC_API,
        "kind": "RoleBinding",
        "metadata": dict(metadata),
        "roleRef": role,
        "subjects": list(subjects),
    }


def _main() -> None:
    with KubernetesCluster(full="--full" in sys.argv[1:]) as cluster:
        print(f"{cluster.url}\nexport KUBECONFIG={cluster.kubeconfig(token=cluster.admin_token)}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    _main()
