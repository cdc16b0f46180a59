"""What becomes of a job's description on Kubernetes: the driver pod and its Secret, or one clear error."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from kubernetes_asyncio import client

from durable_spark.hooks._kubernetes_pod import (
    AT_END,
    DEPLOYMENT,
    FINALIZER,
    OWNER,
    TASK,
    TOKEN,
    Driver,
    build_driver,
    deployment_label,
    is_pod_name,
    namespace_of,
    owner_reference,
    pod_name,
    template_path,
)
from durable_spark.hooks._spark_arguments import parse_properties, write_properties
from durable_spark.jobs import BadArguments, SparkJob, Submission

SUBMISSION = Submission(token="ab" * 16, owner="cd" * 16, deployment="prod", name="sales.daily")
IMAGE = {"spark.kubernetes.container.image": "spark:4"}
PYTHON = SparkJob(application="local:///app/job.py", conf=IMAGE)
JAR = SparkJob(application="local:///app/job.jar", java_class="org.Main", conf=IMAGE)
R = SparkJob(application="local:///app/job.R", conf=IMAGE)
SECRET = "hush-hush"
CONF_VOLUME = "spark-conf-volume-driver"


def build(
    job: SparkJob = PYTHON,
    submission: Submission = SUBMISSION,
    *,
    defaults: Mapping[str, str] | None = None,
    template: Mapping[str, Any] | None = None,
) -> Driver:
    return build_driver(
        job,
        submission,
        master="k8s://https://api:6443",
        namespace="spark",
        defaults=defaults or {},
        template=template,
        user="airflow",
    )


def changed(job: SparkJob = PYTHON, conf: Mapping[str, str] | None = None, **changes: Any) -> SparkJob:
    return dataclasses.replace(job, conf={**job.conf, **(conf or {})}, **changes)


def with_pod(pod: Any, **options: Any) -> SparkJob:
    return changed(options={"pod": pod, **options})


def with_container(**container: Any) -> SparkJob:
    return with_pod({"spec": {"containers": [container]}})


def container(driver: Driver) -> dict[str, Any]:
    """Return the driver's container, which is the last one."""
    found: dict[str, Any] = driver.pod["spec"]["containers"][-1]
    return found


def variables(driver: Driver) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(driver)["env"]}


def settings(driver: Driver) -> dict[str, str]:
    """Return the settings that are arguments."""
    arguments = container(driver)["args"]
    options = arguments[: arguments.index("--class")]
    pairs = [options[index + 1] for index, option in enumerate(options) if option == "--conf"]
    return dict(pair.split("=", 1) for pair in pairs)


def application(driver: Driver) -> list[str]:
    """Return what follows the main class: the application and its arguments."""
    arguments: list[str] = container(driver)["args"]
    return arguments[arguments.index("--class") + 2 :]


def hidden(driver: Driver) -> dict[str, str]:
    """Return the settings in the Secret."""
    assert driver.secret is not None
    return parse_properties(driver.secret["stringData"].get("spark.properties", ""))


# --- names


NAMES = [
    ("sales.daily", "sales-daily"),
    ("Sales_2.Load-All", "sales-2-load-all"),
    ("sales.group.daily", "sales-group-daily"),
    ("sales.daily[17]", "sales-daily-17"),
    ("sales.daily__17", "sales-daily-17"),
    ("", ""),
    (".", ""),
    ("sales", "sales"),
    (".daily", "daily"),
    ("日本.タスク", ""),
    ("über.straße", "ber-stra-e"),
    ("-_-.-_-", ""),
    ("9.9", "9-9"),
    (f"{'d' * 250}.{'t' * 250}", f"{'d' * 14}-{'t' * 15}"),
    (f"{'d' * 250}.t", f"{'d' * 28}-t"),
    (f"d.{'t' * 250}", f"d-{'t' * 28}"),
    (f"{'d' * 13}-x.{'t' * 250}", f"{'d' * 13}-{'t' * 15}"),
    ("a/b\n'\"; rm -rf ~.$(x)", "a-b-rm-rf-x"),
]


@pytest.mark.parametrize(("name", "words"), NAMES)
def test_pod_name(name: str, words: str) -> None:
    pod = pod_name(dataclasses.replace(SUBMISSION, name=name))
    assert pod == "-".join(filter(None, [words, SUBMISSION.token]))
    assert len(pod) <= 63, "a pod's name becomes its hostname"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", pod)
    assert is_pod_name(pod)


def test_pod_names_differ_by_token_alone() -> None:
    long = f"{'d' * 250}.{'t' * 250}"
    first, second = (dataclasses.replace(SUBMISSION, name=long, token=token * 16) for token in ("ab", "ac"))
    assert pod_name(first) != pod_name(second)
    assert pod_name(first) == pod_name(dataclasses.replace(first, name=f"{long}x"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-a",
        "a-",
        "A",
        "a.",
        ".a",
        ".",
        "..",
        "a..b",
        "a.-b",
        "a-.b",
        "a/b",
        "a/../b",
        "../a",
        "a%2fb",
        "a?b",
        "a#b",
        "a:b",
        "a b",
        "a_b",
        "é",
        "a" * 254,
        f"{'a' * 126}.{'b' * 127}",
        "a\n",
        "a\nb",
        "a\0",
    ],
)
def test_what_is_no_pod_name(text: str) -> None:
    assert not is_pod_name(text)


@pytest.mark.parametrize(
    "text", ["a", "0", "a-b", "a.b", "spark-pi-1.2.0-driver", "a" * 64, "a" * 253, "a." * 126 + "b"]
)
def test_what_another_operators_pod_may_be_called(text: str) -> None:
    """What the API server takes (``NameIsDNSSubdomain``), tried in ``tests/cluster``."""
    assert is_pod_name(text)


@pytest.mark.parametrize("name", [name for name, _ in NAMES])
@pytest.mark.parametrize("deployment", ["prod", "Prod EU", "-", "x" * 100, "日本", "", "a.b_c"])
def test_labels_are_such_as_kubernetes_takes(name: str, deployment: str) -> None:
    submission = dataclasses.replace(SUBMISSION, name=name, deployment=deployment)
    driver = build(changed(name=name or "x"), submission)
    labels = driver.pod["metadata"]["labels"]
    for key, value in labels.items():
        assert re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", key)
        assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value), key
    assert labels[TOKEN] == submission.token
    assert labels[OWNER] == submission.owner
    assert labels.get(DEPLOYMENT, "") == (deployment_label(deployment) if deployment else "")
    assert driver.pod["metadata"]["annotations"] == {TASK: name}


def test_deployments_that_are_no_labels_stay_apart() -> None:
    names = ["prod", "a b", "a-b", "a  b", "x" * 64, "x" * 65]
    assert len({deployment_label(name) for name in names}) == len(names)


def test_namespace() -> None:
    conf = {"spark.kubernetes.namespace": "mine"}
    for job, defaults in ((changed(conf=conf), {}), (PYTHON, conf)):
        driver = build(job, defaults=defaults)
        assert driver.pod["metadata"]["namespace"] == namespace_of(job, defaults, "spark") == "mine"
        assert settings(driver)["spark.kubernetes.namespace"] == "mine"
    assert build().pod["metadata"]["namespace"] == namespace_of(PYTHON, {}, "spark") == "spark"


# --- what the driver is told


def test_settings_are_arguments() -> None:
    job = changed(
        conf={"spark.a": "1", "spark.executor.memory": "1g", "spark.blank": " \tx "},
        executor_memory="2g",
        num_executors=3,
        packages="org:name:1",
        jars="local:///a.jar, https://h/b.jar",
        name="my job",
    )
    driver = build(job, defaults={"spark.a": "default", "spark.b": "default"})
    assert container(driver)["args"][0] == "driver"
    assert settings(driver) == {
        "spark.a": "1",
        "spark.app.id": f"spark-{SUBMISSION.token}",
        "spark.app.name": "my job",
        "spark.b": "default",
        "spark.blank": "x",
        "spark.driver.blockManager.port": "7079",
        "spark.driver.host": "$(SPARK_DRIVER_BIND_ADDRESS)",
        "spark.driver.port": "7078",
        "spark.executor.instances": "3",
        "spark.executor.memory": "2g",
        "spark.jars": "local:///a.jar,https://h/b.jar",
        "spark.jars.packages": "org:name:1",
        "spark.kubernetes.container.image": "spark:4",
        "spark.kubernetes.driver.pod.name": f"sales-daily-{SUBMISSION.token}",
        "spark.kubernetes.memoryOverheadFactor": "0.4",
        "spark.kubernetes.namespace": "spark",
        "spark.kubernetes.resource.type": "python",
        "spark.kubernetes.submitInDriver": "true",
        "spark.master": "k8s://https://api:6443",
        "spark.submit.deployMode": "cluster",
    }
    assert driver.secret is None


@pytest.mark.parametrize(
    ("job", "kind", "main_class", "jars"),
    [
        (PYTHON, "python", "org.apache.spark.deploy.PythonRunner", None),
        (R, "r", "org.apache.spark.deploy.RRunner", None),
        (JAR, "java", "org.Main", "local:///app/job.jar"),
        (changed(JAR, jars="local:///x.jar"), "java", "org.Main", "local:///x.jar,local:///app/job.jar"),
    ],
)
def test_kinds_of_applications(job: SparkJob, kind: str, main_class: str, jars: str | None) -> None:
    driver = build(changed(job, application_args=["a b", "--conf", "c"]))
    assert settings(driver)["spark.kubernetes.resource.type"] == kind
    assert settings(driver).get("spark.jars") == jars
    assert container(driver)["args"][-6:] == ["--class", main_class, job.application, "a b", "--conf", "c"]


@pytest.mark.parametrize(
    "uri",
    [
        "local:///app/job.py",
        "local:/app/job.py",
        "http://host/job.py",
        "https://host/a/job.py",
        "s3a://bucket/job.py",
        "hdfs://name:8020/job.py",
        "hdfs:///job.py",
        "gs://bucket/job.py",
        "abfss://box@account.dfs.core.windows.net/job.py",
    ],
)
def test_uris_that_a_pod_can_read(uri: str) -> None:
    assert application(build(changed(application=uri))) == [uri]
    assert settings(build(changed(py_files=uri)))["spark.submit.pyFiles"] == uri


FIELDS = ["application", "files", "archives", "jars", "py_files"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("uri", ["/home/me/job.py", "job.py", "file:///home/me/job.py", "file:/x.py"])
def test_files_of_the_worker_are_refused_with_the_reason(field: str, uri: str) -> None:
    with pytest.raises(BadArguments, match=rf"^{field} is .*file of the Airflow worker.*local://"):
        build(changed(PYTHON, None, **{field: uri}))


def test_files_in_conf_are_refused_by_their_property() -> None:
    with pytest.raises(BadArguments, match=r"^spark\.files is '/x'"):
        build(changed(conf={"spark.files": "local:///a,/x"}))


def test_python_of_the_driver() -> None:
    assert "PYSPARK_PYTHON" not in variables(build())
    assert variables(build(changed(conf={"spark.pyspark.python": "/p"}))).items() >= {
        ("PYSPARK_PYTHON", "/p"),
        ("PYSPARK_DRIVER_PYTHON", "/p"),
    }
    both = {"spark.pyspark.python": "/p", "spark.pyspark.driver.python": "/d"}
    assert variables(build(changed(conf=both)))["PYSPARK_DRIVER_PYTHON"] == "/d"
    assert "PYSPARK_PYTHON" not in variables(build(changed(JAR, both)))


def test_user() -> None:
    assert variables(build())["SPARK_USER"] == "airflow"
    driver = build(changed(proxy_user="somebody"))
    assert variables(driver)["SPARK_USER"] == "somebody"
    assert container(driver)["args"][:3] == ["driver", "--proxy-user", "somebody"]


@pytest.mark.parametrize("text", ["$(HOME)", "$$", "a$$(HOME)$", "$HOME and $(HOME)", "$$$(A)$(B)"])
def test_the_kubelet_expands_nothing_of_the_users(text: str) -> None:
    job = changed(conf={"spark.text": text}, application_args=[text], env_vars={"TEXT": text}, proxy_user=text)
    driver = build(changed(job, application=f"local:///{text}.py"))

    def as_the_kubelet_does(argument: str) -> str:
        return re.sub(r"\$(?:\$|\([^)]*\))", lambda match: "$" if match[0] == "$$" else "expanded", argument)

    assert as_the_kubelet_does(settings(driver)["spark.text"]) == text
    assert [as_the_kubelet_does(argument) for argument in application(driver)] == [f"local:///{text}.py", text]
    assert as_the_kubelet_does(variables(driver)["TEXT"]) == text
    assert as_the_kubelet_does(variables(driver)["SPARK_USER"]) == text
    assert as_the_kubelet_does(container(driver)["args"][2]) == text


@pytest.mark.parametrize("text", ["$HOME", "a $ b", "$", "100%"])
def test_a_harmless_dollar_stays_as_it_is(text: str) -> None:
    assert application(build(changed(application_args=[text])))[1:] == [text]


def test_the_address_of_the_driver() -> None:
    reference = {"fieldRef": {"fieldPath": "status.podIP"}}
    assert variables(build())["SPARK_DRIVER_BIND_ADDRESS"] == reference
    families = {"spark.kubernetes.driver.service.ipFamilies": "IPv6,IPv4"}
    assert settings(build(changed(conf=families)))["spark.driver.host"] == "[$(SPARK_DRIVER_BIND_ADDRESS)]"


# --- memory and other resources


MEMORY = [
    (PYTHON, {}, 1024 + 409),
    (R, {}, 1024 + 409),
    (JAR, {}, 1024 + 384),
    (JAR, {"spark.driver.memory": "8g"}, 8192 + 819),
    (PYTHON, {"spark.driver.memory": "8g"}, 8192 + 3276),
    (PYTHON, {"spark.driver.memory": "512m"}, 512 + 384),
    (PYTHON, {"spark.driver.memory": "2T"}, (2 << 20) + int(0.4 * (2 << 20))),
    (JAR, {"spark.driver.memory": "3000000k"}, 2929 + 384),
    (JAR, {"spark.driver.memoryOverhead": "1g"}, 1024 + 1024),
    (JAR, {"spark.driver.memoryOverhead": "10"}, 1024 + 10),
    (JAR, {"spark.driver.memoryOverhead": "0"}, 1024),
    (JAR, {"spark.driver.minMemoryOverhead": "500"}, 1024 + 500),
    (PYTHON, {"spark.driver.minMemoryOverhead": "100m"}, 1024 + 409),
    (PYTHON, {"spark.driver.memoryOverheadFactor": "0.8"}, 1024 + 819),
    (PYTHON, {"spark.kubernetes.memoryOverheadFactor": "0.8"}, 1024 + 819),
    (JAR, {"spark.kubernetes.memoryOverheadFactor": "0.8"}, 1024 + 819),
    (JAR, {"spark.kubernetes.memoryOverheadFactor": "0"}, 1024 + 384),
    (JAR, {"spark.kubernetes.memoryOverheadFactor": ".8", "spark.driver.memoryOverheadFactor": "0.5"}, 1024 + 512),
    (JAR, {"spark.driver.memoryOverhead": "1g", "spark.driver.memoryOverheadFactor": "0.9"}, 2048),
    (JAR, {"spark.executor.pyspark.memory": "7g", "spark.executor.memoryOverhead": "7g"}, 1024 + 384),
]


@pytest.mark.parametrize(("job", "conf", "mebibytes"), MEMORY)
def test_memory(job: SparkJob, conf: dict[str, str], mebibytes: int) -> None:
    resources = container(build(changed(job, conf)))["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == f"{mebibytes}Mi"


@pytest.mark.parametrize(("job", "factor"), [(PYTHON, "0.4"), (R, "0.4"), (JAR, "0.1")])
def test_executors_get_the_overhead_of_the_kind(job: SparkJob, factor: str) -> None:
    key = "spark.kubernetes.memoryOverheadFactor"
    assert settings(build(job))[key] == factor
    assert settings(build(changed(job, {"spark.driver.memoryOverheadFactor": "0.9"})))[key] == factor
    assert settings(build(changed(job, {key: "0.25"})))[key] == "0.25"


@pytest.mark.parametrize(
    ("memory", "heap"),
    [
        ("2g", "2g"),
        ("512M", "512M"),
        ("2gb", "2048m"),
        ("2TB", f"{2 << 20}m"),
        (" 1g ", "1g"),
        ("1073741824b", "1024m"),
    ],
)
def test_the_heap_in_a_form_that_a_jvm_reads(memory: str, heap: str) -> None:
    assert settings(build(changed(driver_memory=memory)))["spark.driver.memory"] == heap


def test_cores_and_custom_resources() -> None:
    def resources(conf: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        found = container(build(changed(conf=conf)))["resources"]
        del found["requests"]["memory"], found["limits"]["memory"]
        return found["requests"], found["limits"]

    cores, request, limit = (
        "spark.driver.cores",
        *(f"spark.kubernetes.driver.{kind}.cores" for kind in ("request", "limit")),
    )
    gpu = {"spark.driver.resource.gpu.amount": "2", "spark.driver.resource.gpu.vendor": "nvidia.com"}
    assert resources({}) == ({"cpu": "1"}, {})
    assert resources({cores: "4"}) == ({"cpu": "4"}, {})
    assert resources({cores: "4", request: "500m", limit: "2.5"}) == ({"cpu": "500m"}, {"cpu": "2.5"})
    assert resources(gpu) == ({"cpu": "1"}, {"nvidia.com/gpu": "2"})
    assert resources({"spark.driver.resource.gpu.amount": "0"}) == ({"cpu": "1"}, {})


# --- volumes


def test_scratch_space_is_the_submissions_own() -> None:
    driver = build(changed(conf={"spark.kubernetes.local.dirs.tmpfs": "true"}))
    path = "/var/data/spark-abababab-abab-abab-abab-abababababab"
    assert variables(driver)["SPARK_LOCAL_DIRS"] == path
    assert {"name": "spark-local-dir-1", "emptyDir": {"medium": "Memory"}} in driver.pod["spec"]["volumes"]
    assert {"name": "spark-local-dir-1", "mountPath": path} in container(driver)["volumeMounts"]


@pytest.mark.parametrize(("value", "paths"), [("/a,/b", ["/a", "/b"]), ("/a,,", ["/a"])])
def test_scratch_space_where_it_is_asked_for(value: str, paths: list[str]) -> None:
    driver = build(changed(conf={"spark.local.dir": value}))
    assert variables(driver)["SPARK_LOCAL_DIRS"] == ",".join(paths)
    assert [mount["mountPath"] for mount in container(driver)["volumeMounts"][:-1]] == paths


def test_scratch_space_of_volumes_that_there_are() -> None:
    prefix = "spark.kubernetes.driver.volumes.hostPath.spark-local-dir-fast."
    conf = {f"{prefix}mount.path": "/fast", f"{prefix}options.path": "/disk", "spark.local.dir": "/unused"}
    driver = build(changed(conf=conf))
    assert variables(driver)["SPARK_LOCAL_DIRS"] == "/fast"
    assert [volume["name"] for volume in driver.pod["spec"]["volumes"]] == [
        "spark-local-dir-fast",
        CONF_VOLUME,
    ]


def test_claim_on_demand_lives_as_long_as_the_pod() -> None:
    prefix = "spark.kubernetes.driver.volumes.persistentVolumeClaim.data."
    conf = {"mount.path": "/data", "options.claimName": "OnDemand", "options.storageClass": "fast"}
    conf |= {"options.sizeLimit": "1Gi", "label.a": "b", "annotation.c": "d"}
    job = changed(conf={prefix + key: value for key, value in conf.items()})
    template = build(job).pod["spec"]["volumes"][0]["ephemeral"]["volumeClaimTemplate"]
    assert template["metadata"]["labels"] == {"a": "b", "spark-app-selector": f"spark-{SUBMISSION.token}"}
    assert template["metadata"]["annotations"] == {"c": "d"}
    assert template["spec"] == {
        "accessModes": ["ReadWriteOncePod"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    legacy = build(changed(job, {"spark.kubernetes.legacy.useReadWriteOnceAccessMode": "true"}))
    spec = legacy.pod["spec"]["volumes"][0]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert spec["accessModes"] == ["ReadWriteOnce"]


# --- what must not be seen


SECRET_SETTINGS = [
    ("spark.hadoop.fs.s3a.secret.key", SECRET),
    ("spark.hadoop.fs.s3a.access.key", SECRET),
    ("spark.my.Password", SECRET),
    ("spark.authToken", SECRET),
    ("spark.my.accesskey", SECRET),
    ("spark.url", f"https://host/?token={SECRET}"),
    ("spark.executor.extraJavaOptions", f"-Dpassword={SECRET}"),
    ("spark.kubernetes.driverEnv.DB_PASSWORD", SECRET),
]


@pytest.mark.parametrize(("key", "value"), SECRET_SETTINGS)
@pytest.mark.parametrize("way", ["conf", "defaults"])
def test_what_spark_would_redact_is_not_in_the_pod(key: str, value: str, way: str) -> None:
    driver = build(changed(conf={key: value})) if way == "conf" else build(defaults={key: value})
    assert SECRET not in json.dumps(driver.pod)
    assert hidden(driver) == {key: value}
    assert container(driver)["args"][1:3] == ["--properties-file", "/opt/spark/conf/spark.properties"]
    (volume,) = [entry for entry in driver.pod["spec"]["volumes"] if entry["name"] == CONF_VOLUME]
    assert volume["secret"]["secretName"] == driver.pod["metadata"]["name"]
    assert volume["secret"]["items"] == [{"key": "spark.properties", "path": "spark.properties", "mode": 0o644}], (
        "variables are no files, and the image's user is not root"
    )


@pytest.mark.parametrize(("name", "value"), [("DB_PASSWORD", SECRET), ("URL", f"x?TOKEN={SECRET}")])
@pytest.mark.parametrize("way", ["conf", "env_vars"])
def test_what_spark_would_redact_is_not_in_the_environment(name: str, value: str, way: str) -> None:
    job = changed(env_vars={name: value})
    if way == "conf":
        job = changed(conf={f"spark.kubernetes.driverEnv.{name}": value})
    driver = build(job)
    assert SECRET not in json.dumps(driver.pod)
    reference = variables(driver)[name]["secretKeyRef"]
    assert reference["name"] == driver.pod["metadata"]["name"]
    assert driver.secret is not None
    assert driver.secret["stringData"][reference["key"]] == value


def test_the_secret_is_known_by_its_pods_name_and_labels() -> None:
    driver = build(changed(env_vars={"PASSWORD": SECRET}))
    assert driver.secret is not None
    metadata = driver.pod["metadata"]
    assert driver.secret["metadata"] == {key: metadata[key] for key in ("name", "namespace", "labels")}
    assert driver.secret["type"] == "Opaque"
    created = {"metadata": {**metadata, "uid": "u-1"}}
    assert owner_reference(created).items() >= {("kind", "Pod"), ("name", metadata["name"]), ("uid", "u-1")}


def test_a_pattern_of_the_users_hides_more_and_never_less() -> None:
    conf = {"spark.redaction.regex": "(?i)private", "spark.Private": SECRET, "spark.a": f"private {SECRET}"}
    driver = build(changed(conf={**conf, "spark.password": SECRET, "spark.seen": "seen"}))
    assert SECRET not in json.dumps(driver.pod)
    assert hidden(driver).keys() == {"spark.Private", "spark.a", "spark.password", "spark.redaction.regex"}
    assert settings(driver)["spark.seen"] == "seen"


def test_what_arguments_cannot_carry_goes_with_the_secrets() -> None:
    limit = 128 << 10
    conf = {"spark.cr": "a\rb", "spark.long": "x" * limit, "spark.fits": "x" * (limit - len("spark.fits=") - 1)}
    driver = build(changed(conf=conf))
    assert hidden(driver) == {"spark.cr": "a\rb", "spark.long": "x" * limit}
    assert all(len(argument) < limit for argument in container(driver)["args"])


def test_properties_are_read_as_they_were_written() -> None:
    awkward = {
        "spark.a:b": "x=y:z #! \\ \\n",
        "spark.ünï": "é 😀 日本",
        "spark.space": "a  b\tc\nd\re\ff",
        "spark.start": "#!=: x",
        "spark.lines": "\r\n",
        "spark.empty": "",
    }
    text = write_properties(awkward)
    assert parse_properties(text) == awkward
    assert text.isascii(), "Java reads properties in Latin-1 where it is not told otherwise"
    assert len(text.splitlines()) == len(awkward)


# --- the user's own pod


OVERLAY: dict[str, Any] = {
    "metadata": {"labels": {"team": "data"}, "annotations": {"a": "b"}},
    "spec": {
        "tolerations": [{"key": "spark"}],
        "nodeSelector": {"disk": "ssd"},
        "priorityClassName": "high",
        "volumes": [
            {"name": "more", "emptyDir": {}},
            {"name": "spark-local-dir-1", "persistentVolumeClaim": {"claimName": "c"}},
        ],
        "containers": [
            {
                "name": "spark-kubernetes-driver",
                "env": [{"name": "MORE", "value": "1"}, {"name": "DB_PASSWORD", "value": "x"}],
                "resources": {"limits": {"memory": "9Gi"}},
                "volumeMounts": [
                    {"mountPath": "/more", "name": "more"},
                    {"mountPath": "/opt/spark/conf", "readOnly": True},
                ],
            },
            {"name": "sidecar", "image": "busybox"},
        ],
    },
}


def v1_pod() -> Any:
    """Return the same as an object of the client library."""
    spec = OVERLAY["spec"]
    return client.V1Pod(
        metadata=client.V1ObjectMeta(**OVERLAY["metadata"]),
        spec=client.V1PodSpec(
            tolerations=[client.V1Toleration(key="spark")],
            node_selector=spec["nodeSelector"],
            priority_class_name="high",
            volumes=[
                client.V1Volume(name="more", empty_dir=client.V1EmptyDirVolumeSource()),
                client.V1Volume(
                    name="spark-local-dir-1",
                    persistent_volume_claim=client.V1PersistentVolumeClaimVolumeSource(claim_name="c"),
                ),
            ],
            containers=[
                client.V1Container(
                    name="spark-kubernetes-driver",
                    env=[client.V1EnvVar(name="MORE", value="1"), client.V1EnvVar(name="DB_PASSWORD", value="x")],
                    resources=client.V1ResourceRequirements(limits={"memory": "9Gi"}),
                    volume_mounts=[
                        client.V1VolumeMount(mount_path="/more", name="more"),
                        client.V1VolumeMount(mount_path="/opt/spark/conf", name=CONF_VOLUME, read_only=True),
                    ],
                ),
                client.V1Container(name="sidecar", image="busybox"),
            ],
        ),
    )


@pytest.mark.parametrize("kind", ["mapping", "V1Pod"])
def test_pod_is_laid_over_ours(kind: str) -> None:
    plain = changed(conf={"spark.kubernetes.node.selector.zone": "a"}, env_vars={"DB_PASSWORD": SECRET})
    before, after = build(plain), build(changed(plain, options={"pod": OVERLAY if kind == "mapping" else v1_pod()}))
    metadata, spec = after.pod["metadata"], after.pod["spec"]
    assert metadata["labels"] == {**before.pod["metadata"]["labels"], "team": "data"}
    assert metadata["annotations"] == {**before.pod["metadata"]["annotations"], "a": "b"}
    assert spec["tolerations"] == [{"key": "spark"}]
    assert spec["nodeSelector"] == {"zone": "a", "disk": "ssd"}
    assert spec["priorityClassName"] == "high"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert list(volumes) == ["spark-local-dir-1", CONF_VOLUME, "more"]
    assert volumes["spark-local-dir-1"] == {"name": "spark-local-dir-1", "persistentVolumeClaim": {"claimName": "c"}}
    driver, sidecar = spec["containers"]
    assert sidecar == {"name": "sidecar", "image": "busybox"}
    assert driver["args"] == container(before)["args"]
    assert driver["env"][-1] == {"name": "MORE", "value": "1"}
    assert {"name": "DB_PASSWORD", "value": "x"} in driver["env"], "one value, not two"
    assert len(driver["env"]) == len(container(before)["env"]) + 1
    memory = container(before)["resources"]["requests"]["memory"]
    assert (driver["resources"]["requests"]["memory"], driver["resources"]["limits"]["memory"]) == (memory, "9Gi")
    assert [mount["mountPath"] for mount in driver["volumeMounts"][1:]] == ["/opt/spark/conf", "/more"]
    assert driver["volumeMounts"][1] == {**container(before)["volumeMounts"][1], "readOnly": True}


def test_container_without_a_name_is_the_drivers() -> None:
    driver = build(with_container(workingDir="/work"))
    assert (container(driver)["name"], container(driver)["workingDir"]) == ("spark-kubernetes-driver", "/work")


def test_tolerations_add_up() -> None:
    template = {"spec": {"tolerations": [{"key": "a"}]}}
    driver = build(with_pod({"spec": {"tolerations": [{"key": "b"}]}}), template=template)
    assert driver.pod["spec"]["tolerations"] == [{"key": "a"}, {"key": "b"}]


def test_what_was_given_is_left_as_it_was() -> None:
    overlay, template = copy.deepcopy(OVERLAY), {"metadata": {"labels": {"a": "b"}}, **copy.deepcopy(OVERLAY)}
    before = copy.deepcopy(template)
    job = with_pod(overlay, hold_pod=True, pod_at_end="delete")
    assert build(job, template=template) == build(job, template=template)
    assert (overlay, template) == (OVERLAY, before)


def test_hold_and_end() -> None:
    metadata = build().pod["metadata"]
    assert "finalizers" not in metadata
    assert AT_END not in metadata["annotations"]
    assert AT_END not in build(changed(options={"pod_at_end": "keep"})).pod["metadata"]["annotations"]
    job = with_pod({"metadata": {"finalizers": ["example.com/mine"]}}, hold_pod=True, pod_at_end="delete")
    metadata = build(job).pod["metadata"]
    assert metadata["finalizers"] == ["example.com/mine", FINALIZER]
    assert metadata["annotations"][AT_END] == "delete"


# --- the pod template


TEMPLATE = {
    "metadata": {"labels": {"from": "template", "spark-role": "x"}},
    "spec": {
        "hostNetwork": True,
        "restartPolicy": "Always",
        "containers": [
            {"name": "first", "image": "a", "args": ["x"]},
            {"name": "second", "image": "b", "env": [{"name": "FROM", "value": "template"}]},
        ],
    },
}


@pytest.mark.parametrize(("chosen", "sidecar"), [(None, "second"), ("first", "second"), ("second", "first")])
def test_driver_is_one_of_the_templates_containers(chosen: str | None, sidecar: str) -> None:
    conf = {} if chosen is None else {"spark.kubernetes.driver.podTemplateContainerName": chosen}
    driver = build(changed(conf=conf), template=TEMPLATE)
    assert [entry["name"] for entry in driver.pod["spec"]["containers"]] == [sidecar, chosen or "first"]
    assert container(driver)["image"] == "spark:4"
    assert driver.pod["spec"]["hostNetwork"] is True
    assert driver.pod["spec"]["restartPolicy"] == "Never"
    labels = driver.pod["metadata"]["labels"]
    assert (labels["from"], labels["spark-role"]) == ("template", "driver")
    overlaid = build(changed(conf=conf, options={"pod": {"spec": {"containers": [{"tty": True}]}}}), template=TEMPLATE)
    assert container(overlaid) == {**container(driver), "tty": True}


@pytest.mark.parametrize(
    ("value", "path"), [("/a/b.yaml", "/a/b.yaml"), ("file:///a.yaml", "/a.yaml"), ("a.yaml", "a.yaml"), ("", None)]
)
def test_path_of_the_template(value: str, path: str | None) -> None:
    conf = {"spark.kubernetes.driver.podTemplateFile": value}
    assert template_path(changed(conf=conf), {}) == template_path(PYTHON, conf) == path


def test_template_elsewhere_is_refused() -> None:
    with pytest.raises(BadArguments, match=r"podTemplateFile is 's3a://b/t.yaml'.*worker's disk, give a path"):
        template_path(changed(conf={"spark.kubernetes.driver.podTemplateFile": "s3a://b/t.yaml"}), {})


# --- refusals


def volume(kind: str, *, executor: bool = False, **options: str) -> dict[str, str]:
    role = "executor" if executor else "driver"
    prefix = f"spark.kubernetes.{role}.volumes.{kind}.v"
    return {f"{prefix}.{name.replace('_', '.')}": value for name, value in options.items()}


BAD_CONF: list[tuple[dict[str, str], str]] = [
    ({"spark.kubernetes.container.image": ""}, r"conf needs spark\.kubernetes\.container\.image.*such as"),
    ({"spark.kubernetes.container.image": "spark:{{SPARK_VERSION}}"}, "container.image.*write Spark's version out"),
    ({"spark.kubernetes.container.image.pullPolicy": "always"}, "pullPolicy is 'always': give Always, Never or"),
    ({"spark.kubernetes.namespace": "My_Space"}, "spark.kubernetes.namespace is 'My_Space'"),
    ({"spark.master": "k8s://other"}, "spark.master.*connection"),
    ({"spark.submit.deployMode": "client"}, "deployMode must be 'cluster'"),
    ({"spark.driver.host": "h"}, "spark.driver.host cannot be used here: it is the pod's address"),
    ({"spark.driver.bindAddress": "h"}, "spark.driver.bindAddress cannot be used"),
    ({"spark.kubernetes.driver.pod.name": "x"}, "pod.name cannot be used here.*token"),
    ({"spark.kubernetes.driver.pod.featureSteps": "x"}, "featureSteps cannot be used here.*pod template"),
    ({"spark.kubernetes.driver.pod.excludedFeatureSteps": "x"}, "excludedFeatureSteps cannot be used here but for"),
    ({"spark.kubernetes.kerberos.krb5.path": "/x"}, "krb5.path cannot be used here.*configMapName"),
    ({"spark.kubernetes.authenticate.driver.oauthToken": SECRET}, "driver.oauthToken cannot.*service account"),
    ({"spark.kubernetes.authenticate.submission.oauthToken": SECRET}, "submission.oauthToken cannot.*connection"),
    ({"spark.kubernetes.context": "x"}, "context cannot be used here.*connection"),
    ({"spark.kubernetes.driver.service.label.a": "b"}, "service.label.a cannot be used here.*no Service"),
    ({"spark.kubernetes.driver.label.spark-role": "x"}, "driver.label.spark-role cannot be used.*Spark's own"),
    ({"spark.kubernetes.driver.label.durable-spark/token": "x"}, "must not set durable-spark/token"),
    ({"spark.kubernetes.driver.annotation.durable-spark/task": "x"}, "must not set durable-spark/task"),
    ({"spark.kubernetes.kerberos.tokenSecret.name": "x"}, r"tokenSecret.name and .itemKey go together"),
    ({"spark.kubernetes.driver.secretKeyRef.A": "x"}, "secretKeyRef.A must be name:key"),
    ({"spark.kubernetes.driver.secretKeyRef.A": "x:y:z"}, "secretKeyRef.A must be name:key"),
    ({"spark.kubernetes.driverEnv.A/B": "x"}, "'A/B' is not a name for an environment variable"),
    ({"spark.kubernetes.driver.podTemplateContainerName": "x"}, "podTemplateContainerName is 'x'"),
    ({"spark.kubernetes.executor.podTemplateFile": "/x.yaml"}, "executor.podTemplateFile is '/x.yaml'.*local://"),
    ({"spark.driver.memory": "512"}, "spark.driver.memory is '512'.*unit"),
    ({"spark.driver.memory": "1.5g"}, "spark.driver.memory is '1.5g'.*512m"),
    ({"spark.driver.memoryOverhead": "lots"}, "spark.driver.memoryOverhead is 'lots'"),
    ({"spark.driver.memoryOverheadFactor": "lots"}, "memoryOverheadFactor is 'lots': give a number"),
    ({"spark.driver.memoryOverheadFactor": "0"}, "spark.driver.memoryOverheadFactor is '0'.*greater than 0"),
    ({"spark.kubernetes.memoryOverheadFactor": "-1"}, "kubernetes.memoryOverheadFactor is '-1'"),
    ({"spark.driver.cores": "1.5"}, "spark.driver.cores is '1.5'"),
    ({"spark.kubernetes.driver.request.cores": "two"}, "request.cores is 'two': give a Kubernetes quantity"),
    ({"spark.kubernetes.driver.limit.cores": "-1"}, "limit.cores is '-1'"),
    ({"spark.driver.port": "0"}, "spark.driver.port is '0': give a port"),
    ({"spark.blockManager.port": "70000"}, "spark.blockManager.port is '70000'"),
    ({"spark.kubernetes.local.dirs.tmpfs": "yes"}, "tmpfs is 'yes': give true or false"),
    ({"spark.redaction.regex": "["}, r"spark.redaction.regex is '\['"),
    ({"spark.driver.resource.gpu.vendor": "nvidia.com"}, "gpu.amount is ''"),
    ({"spark.driver.resource.gpu.amount": "1"}, "gpu.vendor is missing.*nvidia.com"),
    (volume("floppy", mount_path="/x"), r"volumes.floppy.v.\* is a volume of a type.*hostPath"),
    (volume("emptyDir", options_medium="Memory"), "emptyDir.v.mount.path is missing"),
    (volume("hostPath", mount_path="/x"), "hostPath.v.options.path is missing"),
    (volume("nfs", mount_path="/x", options_path="/y"), "nfs.v.options.server is missing"),
    (volume("persistentVolumeClaim", mount_path="/x"), "claimName is missing"),
    (volume("emptyDir", mount_path="/x", options_sizeLimit="10"), "sizeLimit is '10', less than a kibibyte"),
    (volume("emptyDir", mount_path="/x", mount_readOnly="maybe"), "mount.readOnly is 'maybe'"),
    (volume("emptyDir", mount_path="/x", mount_subPath="a", mount_subPathExpr="b"), "exclude each other"),
    (volume("persistentVolumeClaim", mount_path="/x", options_claimName="OnDemand"), "give options.storageClass"),
    (
        volume("emptyDir", mount_path="/x") | volume("nfs", mount_path="/x", options_path="/y", options_server="s"),
        "mount more than one volume at /x",
    ),
    (volume("emptyDir", executor=True, options_medium="Memory"), "executor.volumes.emptyDir.v.mount.path is missing"),
]


@pytest.mark.parametrize(("conf", "message"), BAD_CONF, ids=[message for _, message in BAD_CONF])
def test_bad_setting_is_one_clear_error(conf: dict[str, str], message: str) -> None:
    with pytest.raises(BadArguments, match=message) as caught:
        build(changed(conf=conf))
    assert SECRET not in str(caught.value)


def test_bad_setting_of_the_properties_file() -> None:
    with pytest.raises(BadArguments, match=r"spark\.driver\.host cannot be used here"):
        build(defaults={"spark.driver.host": "h"})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"application": ""}, "application is empty"),
    ({"application": "local://host/job.py"}, "local:// has three"),
    ({"application": "s3a://bucket"}, "names no file"),
    ({"application": "http://[x/job.py"}, "which is no URL"),
    ({"application": "local:///a.jar"}, "java_class is missing"),
    ({"java_class": "Main"}, "java_class has no meaning"),
    ({"application": "local:///a.R", "java_class": "Main"}, "an R application"),
    ({"application_args": "one two"}, "application_args must be a list"),
    ({"application_args": ["a", 1]}, r"application_args\[1\] must be a string, not int"),
    ({"application_args": ["a\0"]}, r"application_args\[0\] holds a NUL"),
    ({"application_args": ["a\ud800"]}, r"application_args\[0\] holds half a character"),
    ({"env_vars": {"A": "\udcff"}}, "the value of A in env_vars holds half a character"),
    ({"application_args": ["a", "b\r"]}, r"application_args\[1\] has a carriage return"),
    ({"application_args": ["x" * (128 << 10)]}, r"application_args\[0\] is longer than Linux allows"),
    ({"env_vars": {"A": "x" * (128 << 10)}}, "variable A is longer than Linux allows"),
    ({"env_vars": {"A B": "x"}}, "env_vars has the key 'A B'"),
    ({"env_vars": {"1A": "x"}}, "'1A' is not a name for an environment variable"),
    ({"driver_memory": "plenty"}, "spark.driver.memory is 'plenty'"),
    ({"total_executor_cores": 4}, "total_executor_cores cannot be used with Kubernetes.*num_executors"),
    ({"supervise": True}, "supervise cannot be used with Kubernetes.*retry"),
    ({"num_executors": 0}, "num_executors is 0"),
    ({"keytab": "local:///k"}, "keytab and principal go together"),
    ({"keytab": "/k", "principal": "p"}, "keytab is '/k', a file of the Airflow worker.*Secret"),
    ({"keytab": "local:///k", "principal": "p", "proxy_user": "u"}, "proxy_user and principal exclude each other"),
    ({"proxy_user": 1}, "proxy_user must be a string"),
    ({"options": {"queue": "q"}}, "Kubernetes does not know queue"),
    ({"options": ["pod"]}, "options must be a mapping"),
    ({"options": {"hold_pod": "yes"}}, "hold_pod must be True or False"),
    ({"options": {"pod_at_end": "burn"}}, "pod_at_end is 'burn': give 'keep' or 'delete'"),
]
BAD_PODS: list[tuple[Any, str]] = [
    ("pod.yaml", "pod must be a mapping .* or a V1Pod, not str"),
    ({"kind": "Deployment"}, "pod is a None Deployment, not a v1 Pod"),
    ({"status": {}}, "pod must not have status"),
    ({"metadata": {"name": "x"}}, "pod.metadata.name is not yours to set"),
    ({"metadata": {"namespace": "x"}}, "pod.metadata.namespace is not yours"),
    ({"metadata": {"labels": {"durable-spark/token": "x"}}}, "pod.metadata.labels must not set durable-spark/token"),
    ({"metadata": {"annotations": {"durable-spark/task": "x"}}}, "annotations must not set durable-spark/task"),
    ({"metadata": {"labels": {"spark-app-selector": "x"}}}, "must not have spark-app-selector: it is Spark's own"),
    ({"metadata": {"labels": ["x"]}}, "pod.metadata.labels must be a mapping, not list"),
    ({"metadata": {1: "x"}}, "pod.metadata has the key 1"),
    ({"spec": {"restartPolicy": "Always"}}, "restartPolicy must be Never"),
    ({"spec": {"containers": {"name": "x"}}}, "pod.spec.containers must be a list of mappings"),
    ({"spec": {"volumes": [{"emptyDir": {}}]}}, r"pod.spec.volumes\[0\] has no name"),
    ({"spec": {"containers": [{"env": [{"value": "x"}]}]}}, r"containers\[0\].env\[0\] has no name"),
    ({"spec": {"x": {1, 2}}}, "pod.spec.x is a set, for which JSON has no form"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_argument_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArguments, match=message):
        build(changed(**changes))


@pytest.mark.parametrize(("pod", "message"), BAD_PODS, ids=[message for _, message in BAD_PODS])
def test_bad_pod_is_one_clear_error(pod: Any, message: str) -> None:
    with pytest.raises(BadArguments, match=message):
        build(with_pod(pod))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"metadata": {"labels": {"durable-spark/token": "x"}}},
            "the pod template's labels must not set durable-spark/token",
        ),
        ({"kind": "PodTemplate"}, "the pod template is a None PodTemplate"),
        ({"spec": {"containers": ["x"]}}, "the pod template.spec.containers must be a list of mappings"),
        ({"spec": {"containers": [{"env": {"A": "x"}}]}}, r"containers\[0\].env must be a list of mappings"),
    ],
)
def test_bad_template_is_one_clear_error(template: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArguments, match=message):
        build(template=template)


@pytest.mark.parametrize("field", ["files", "keytab", "driver_memory", "proxy_user", "jars"])
def test_empty_strings_are_what_templates_leave_behind(field: str) -> None:
    assert build(changed(PYTHON, None, **{field: ""})) == build()
