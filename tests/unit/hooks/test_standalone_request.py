"""What becomes of a job's description: the request, or one clear error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from durable_spark.hooks._standalone_request import build_request, parse_properties
from durable_spark.jobs import BadArguments, SparkJob, Submission
from durable_spark.operators.spark import SparkJobOperator

SUBMISSION = Submission(token="ab" * 16, owner="cd" * 16, deployment="prod")
PYTHON = SparkJob(application="/apps/job.py")
JAVA = SparkJob(application="s3a://bucket/job.jar", java_class="org.example.Main")


def build(job: SparkJob, defaults: dict[str, str] | None = None) -> dict[str, Any]:
    return build_request(job, SUBMISSION, master="spark://h1:7077,h2:7077", defaults=defaults or {}, version="4.3.0")


def test_python_in_the_cluster() -> None:
    job = dataclasses.replace(
        PYTHON,
        application_args=["a b", "--x"],
        name="my job",
        py_files="/apps/a.py, s3a://bucket/b.zip",
        files="/apps/data.txt#alias",
        jars="local:/opt/x.jar",
        packages="org:name:1",
        driver_memory="1gb",
        executor_memory="2g",
        driver_cores=2,
        executor_cores=3,
        total_executor_cores=6,
        env_vars={"KEY": "hush"},
        conf={"spark.my.password": "hush"},
        supervise=True,
    )
    request = build(job)
    assert request["mainClass"] == "org.apache.spark.deploy.SparkSubmit"
    assert request["appResource"] == "file:/apps/job.py"
    assert request["appArgs"] == [
        *("--master", "spark://h1:7077,h2:7077", "--name", "my job", "--packages", "org:name:1"),
        *("--jars", "file:/opt/x.jar", "--files", "file:/apps/data.txt#alias"),
        *("--py-files", "file:/apps/a.py,s3a://bucket/b.zip"),
        *("file:/apps/job.py", "a b", "--x"),
    ]
    assert request["environmentVariables"] == {"KEY": "hush"}
    assert request["sparkProperties"] == {
        "spark.airflow.deployment": "prod",
        "spark.airflow.owner": "cd" * 16,
        "spark.airflow.submission": "ab" * 16,
        "spark.app.name": "my job",
        "spark.cores.max": "6",
        "spark.driver.cores": "2",
        "spark.driver.memory": "1gb",
        "spark.driver.supervise": "true",
        "spark.executor.cores": "3",
        "spark.executor.memory": "2g",
        "spark.master": "spark://h1:7077,h2:7077",
        "spark.my.password": "hush",
    }


def test_java_in_the_cluster() -> None:
    request = build(dataclasses.replace(JAVA, jars="/opt/x.jar", driver_class_path="/opt/lib/*"))
    assert request["mainClass"] == "org.example.Main"
    assert request["appResource"] == "s3a://bucket/job.jar"
    assert request["appArgs"] == []
    properties = request["sparkProperties"]
    assert properties["spark.jars"] == "file:/opt/x.jar"
    assert properties["spark.submit.deployMode"] == "cluster"
    assert properties["spark.driver.extraClassPath"] == "/opt/lib/*"


def test_the_more_explicit_setting_wins() -> None:
    job = dataclasses.replace(PYTHON, conf={"spark.a": "conf", "spark.driver.memory": "1g"}, driver_memory="2g")
    properties = build(job, {"spark.a": "file", "spark.b": "file", "spark.driver.memory": "3g"})["sparkProperties"]
    assert (properties["spark.a"], properties["spark.b"], properties["spark.driver.memory"]) == ("conf", "file", "2g")


def test_conf_that_spark_submit_takes_as_arguments() -> None:
    request = build(dataclasses.replace(PYTHON, conf={"spark.submit.pyFiles": "file:/a.py"}))
    assert request["appArgs"][4:6] == ["--py-files", "file:/a.py"]
    assert "spark.submit.pyFiles" not in request["sparkProperties"]


def test_empty_strings_are_what_templates_leave_behind() -> None:
    assert build(dataclasses.replace(PYTHON, files="", keytab="", driver_memory="")) == build(PYTHON)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"application": ""}, "application is empty"),
    ({"application": "job.py"}, "relative path"),
    ({"application": "s3a://bucket"}, "names no file"),
    ({"application": None}, "application must be a string, not NoneType"),
    ({"application": "/a.jar"}, "java_class is missing"),
    ({"application": "/a.R"}, "java_class is missing"),
    ({"java_class": "Main"}, "java_class has no meaning"),
    ({"driver_memory": "1.5g"}, "spark.driver.memory is '1.5g'.*512m"),
    ({"driver_memory": "512"}, "spark.driver.memory is '512'.*unit"),
    ({"executor_memory": "plenty"}, "spark.executor.memory is 'plenty'"),
    ({"executor_memory": "1 g"}, "spark.executor.memory"),
    ({"executor_memory": "10k"}, "less than a mebibyte"),
    ({"driver_memory": 512}, "driver_memory must be a string, not int"),
    ({"conf": {"spark.driver.memory": "512"}}, "spark.driver.memory is '512'"),
    ({"driver_cores": 0}, "driver_cores is 0"),
    ({"executor_cores": -1}, "executor_cores is -1"),
    ({"total_executor_cores": True}, "total_executor_cores is True"),
    ({"conf": {"spark.cores.max": "many"}}, "spark.cores.max is 'many'"),
    ({"conf": {"spark.a": 1}}, "the value of spark.a in conf must be a string, not int"),
    ({"conf": {1: "a"}}, "conf has the key 1"),
    ({"conf": ["spark.a=b"]}, "conf must be a mapping"),
    ({"conf": {"hive.a": "b"}}, "'hive.a', which Spark would ignore"),
    ({"conf": {"spark.a b": "b"}}, "not a name"),
    ({"conf": {"spark.master": "spark://x"}}, "spark.master.*connection"),
    ({"conf": {"spark.submit.deployMode": "client"}}, "deployMode must be 'cluster'"),
    ({"conf": {"spark.airflow.submission": "x"}}, "must not set spark.airflow.submission"),
    ({"env_vars": {"A": 1}}, "the value of A in env_vars"),
    ({"application_args": "one two"}, "application_args must be a list"),
    ({"application_args": ["a", 1]}, r"application_args\[1\] must be a string, not int"),
    ({"application_args": ["a\0b"]}, r"application_args\[0\]"),
    ({"files": "data.txt"}, "files is 'data.txt', a relative path"),
    ({"py_files": ["/a.py"]}, "py_files must be a string, not list"),
    ({"num_executors": 2}, "num_executors.*total_executor_cores"),
    ({"keytab": "/x"}, "keytab cannot be used"),
    ({"principal": "x"}, "principal cannot be used"),
    ({"proxy_user": "x"}, "proxy_user cannot be used"),
    ({"options": {"queue": "q"}}, "does not know queue"),
    ({"name": " "}, "name is empty"),
]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pod": {"spec": {}}}, "pod"),
        ({"pod": "pod.yaml"}, "pod"),
        ({"pod": "keep"}, "pod"),
        ({"hold_pod": True}, "hold_pod"),
        ({"hold_pod": "no"}, "hold_pod"),
        ({"pod_at_end": "delete"}, "pod_at_end"),
        ({"pod_at_end": "burn"}, "pod_at_end"),
        ({"pod_at_end": "delete", "hold_pod": True}, "hold_pod, pod_at_end"),
    ],
)
def test_an_argument_for_another_kind_of_cluster(arguments: dict[str, Any], named: str) -> None:
    job = SparkJobOperator(task_id="t", application="/a.py", **arguments).describe_job()
    with pytest.raises(BadArguments, match=f"a standalone cluster does not know {named}: "):
        build(job)


@pytest.mark.parametrize("arguments", [{}, {"pod": None}, {"pod": {}}, {"hold_pod": False}, {"pod_at_end": "keep"}])
def test_a_default_for_another_kind_of_cluster_does_not_matter(arguments: dict[str, Any]) -> None:
    job = SparkJobOperator(task_id="t", application="/a.py", **arguments).describe_job()
    assert job.options == {}
    assert build(job)["appResource"] == "file:/a.py"


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArguments, match=message):
        build(dataclasses.replace(PYTHON, **changes))


def test_no_value_of_conf_is_shown_in_an_error() -> None:
    with pytest.raises(BadArguments) as caught:
        build(dataclasses.replace(PYTHON, conf={"spark.my.password": b"hush"}))  # type: ignore[dict-item]
    assert "hush" not in str(caught.value)


def test_properties_file() -> None:
    text = (
        "# comment\n! comment\n\n"
        "spark.equals=a=b \n"
        "  spark.colon : c\n"
        "spark.space   d e\n"
        "spark.long one \\\n   two\n"
        "spark.escaped\\:key \\u0041\\tb\n"
        "spark.empty\n"
        "other.key ignored\n"
        "spark.last=1"
    )
    assert parse_properties(text) == {
        "spark.equals": "a=b",
        "spark.colon": "c",
        "spark.space": "d e",
        "spark.long": "one two",
        "spark.escaped:key": "A\tb",
        "spark.empty": "",
        "spark.last": "1",
    }


def test_spark_reads_the_template_that_it_ships(tmp_path: Path) -> None:
    line = 'spark.executor.extraJavaOptions  -XX:+PrintGCDetails -Dkey=value -Dnumbers="one two three"\n'
    assert parse_properties(line) == {
        "spark.executor.extraJavaOptions": '-XX:+PrintGCDetails -Dkey=value -Dnumbers="one two three"'
    }
