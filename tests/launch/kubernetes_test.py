"""The manifests of launch.kubernetes, against Kubernetes' own schemas."""

import dataclasses
import re
import shutil
import subprocess
import sys

import pytest

from dist_amp import cluster
from launch import job as job_lib
from launch import kubernetes

yaml = pytest.importorskip("yaml")
validator = pytest.importorskip("kubernetes_validate")

VERSIONS = ("1.29", "1.31", "1.33", "1.35", "1.37")
NASTY = "a 'b' \"c\" $HOME $(PATH) $$ `id` \\ * # %j;|&é: x\n!"
IMAGE = "--image=registry:5000/train:1"
FULL = (
    IMAGE,
    "--workers=3",
    "--gpus=2",
    "--cpus=8",
    "--memory=64Gi",
    "--claim=runs",
    "--namespace=ml",
    "--node_selector=gpu=h100",
    "--node_selector=cloud.google.com/gke-spot=true",
    "--env=NCCL_DEBUG=INFO",
    "--max_hours=1.5",
    "--grace_seconds=300",
)
TRAIN = ("--", "--global_batch_size=48", "--run_dir=/runs/big")


@pytest.fixture
def call(capsys):
    """Runs the program; returns status, output, errors."""

    def call(*arguments):
        status = kubernetes.main(["kubernetes", *arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def render(call):
    """The manifests by kind, as a YAML reader reads them."""

    def render(*arguments):
        status, out, err = call("--dry_run", *arguments)
        assert status == 0, err
        return {one["kind"]: one for one in yaml.safe_load_all(out)}

    return render


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a program of ours in place of kubectl."""

    def stub(script):
        path = tmp_path / "kubectl"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.chdir(tmp_path)

    return stub


def container_of(manifest):
    spec = manifest["spec"]
    if manifest["kind"] == "TFJob":
        spec = spec["tfReplicaSpecs"]["Worker"]
    (container,) = spec["template"]["spec"]["containers"]
    return container


def expanded(text, variables):
    """As the kubelet reads a command, an argument or a variable's value."""
    return re.sub(
        r"\$(\$|\((\w+)\))",
        lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]),
        text,
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "arguments",
    [
        (*FULL, *TRAIN),
        (IMAGE, "--claim=runs"),
        (IMAGE, "--claim=runs", "--workers=2", "--max_restarts=0"),
    ],
)
def test_manifests_are_what_kubernetes_takes(render, arguments, version):
    for manifest in render(*arguments).values():
        validator.validate(manifest, version, strict=True)


def test_the_schemas_find_mistakes(render):
    manifest = render(IMAGE, "--claim=runs")["Job"]
    container_of(manifest)["arg"] = ["a"]
    with pytest.raises(validator.ValidationError, match="'arg'"):
        validator.validate(manifest, "1.33", strict=True)


def test_an_indexed_job(render):
    made = render(*FULL, *TRAIN)
    assert list(made) == ["Service", "NetworkPolicy", "Job"]
    spec = made["Job"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 3
    assert spec["backoffLimitPerIndex"] == 20
    assert spec["maxFailedIndexes"] == 0
    assert spec["activeDeadlineSeconds"] == 5400
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "gpu": "h100",
        "cloud.google.com/gke-spot": "true",
    }
    container = container_of(made["Job"])
    assert container["resources"] == {
        "limits": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
    }
    assert container["command"] == ["python", "-m", "launch.train"]
    assert container["args"][:2] == ["--global_batch_size=48", TRAIN[-1]]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
    assert pod["volumes"] == [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
    ]
    assert container["volumeMounts"] == [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "runs", "mountPath": "/runs"},
    ]
    for one in made.values():
        assert one["metadata"]["name"] == "big"
        assert one["metadata"]["namespace"] == "ml"


def test_pods_find_each_other_by_the_names_that_kubernetes_gives(render):
    """Pod i of a Job is host JOB-i of the service that is its subdomain."""
    made = render(*FULL, *TRAIN)
    job, service = made["Job"], made["Service"]
    pod = job["spec"]["template"]
    subdomain = pod["spec"]["subdomain"]
    assert subdomain == service["metadata"]["name"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    (flag,) = (
        argument
        for argument in container_of(job)["args"]
        if argument.startswith("--workers=")
    )
    config = job_lib.read_training([flag]).config
    for index in range(3):
        spec = cluster.find(
            config.workers,
            environment={
                "JOB_COMPLETION_INDEX": str(index),
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            },
        )
        assert spec.num_workers == 3
        assert spec.address == (
            f"{job['metadata']['name']}-{index}.{subdomain}:2222"
        )
        assert spec.may_wait_for_names


def test_only_the_jobs_own_pods_reach_its_ports(render):
    for kind in kubernetes.KINDS:
        made = render(f"--kind={kind}", *FULL, *TRAIN)
        policy = made["NetworkPolicy"]["spec"]
        labels = {"matchLabels": {"dist-amp/job": "big"}}
        assert policy["podSelector"] == labels
        assert policy["ingress"] == [{"from": [{"podSelector": labels}]}]


def test_every_status_but_those_of_a_restart_ends_the_job(render):
    rules = render(*FULL, *TRAIN)["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore"]
    ends, evicted = rules
    assert ends["onExitCodes"]["operator"] == "NotIn"  # 0 never matches
    assert ends["onExitCodes"]["values"] == list(job_lib.RESTART)
    assert evicted["onPodConditions"] == [
        {"type": "DisruptionTarget", "status": "True"}
    ]
    (name,) = {ends["onExitCodes"]["containerName"]}
    assert name == container_of(render(*FULL, *TRAIN)["Job"])["name"]


def test_a_job_of_one_pod_is_no_gang(render):
    made = render(IMAGE, "--claim=runs")
    assert list(made) == ["Job"]
    spec = made["Job"]["spec"]
    assert spec["backoffLimit"] == 20
    assert "completionMode" not in spec
    assert container_of(made["Job"])["args"] == ["--run_dir=/runs/mlp-digits"]


def test_a_tfjob(render):
    """The operator's own schema was compared by hand; here: what it reads."""
    made = render("--kind=tfjob", *FULL, *TRAIN)
    assert list(made) == ["NetworkPolicy", "TFJob"]
    job = made["TFJob"]
    assert job["apiVersion"] == "kubeflow.org/v1"
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert job["spec"]["runPolicy"] == {
        "cleanPodPolicy": "Running",
        "activeDeadlineSeconds": 5400,
    }
    (role,) = job["spec"]["tfReplicaSpecs"].items()
    assert role[0] == "Worker"  # a Chief would be one that cluster.py refuses
    assert role[1]["replicas"] == 3
    assert role[1]["restartPolicy"] == "ExitCode"
    container = container_of(job)
    assert container["name"] == "tensorflow"
    assert container["ports"] == [{"name": "tfjob-port", "containerPort": 2222}]
    assert not [a for a in container["args"] if a.startswith("--workers")]


def test_the_pods_of_a_tfjob_are_what_kubernetes_takes(render):
    job = render("--kind=tfjob", *FULL, *TRAIN)["TFJob"]
    template = job["spec"]["tfReplicaSpecs"]["Worker"]["template"]
    for version in VERSIONS:
        validator.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "template": template},
            version,
            strict=True,
        )


def test_a_tfjob_without_restarts(render):
    job = render("--kind=tfjob", "--max_restarts=0", *FULL, *TRAIN)["TFJob"]
    worker = job["spec"]["tfReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "Never"


@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_every_value_arrives_as_it_was_typed(render, kind):
    made = render(
        f"--kind={kind}",
        IMAGE,
        "--claim=runs",
        "--name=a",
        f"--env=NASTY={NASTY}",
        f"--python={NASTY}",
        "--",
        f"--data_dir={NASTY}",
        "--dataset",
        "none",
    )
    container = container_of(made["TFJob" if kind == "tfjob" else "Job"])
    variables = {"PATH": "wrong", "HOME": "wrong"}
    words = [
        expanded(word, variables)
        for word in (*container["command"], *container["args"])
    ]
    assert words == [
        NASTY,
        "-m",
        "launch.train",
        f"--data_dir={NASTY}",
        "--dataset",
        "none",
        "--run_dir=/runs/a",
    ]
    (value,) = (
        variable["value"]
        for variable in container["env"]
        if variable["name"] == "NASTY"
    )
    assert expanded(value, variables) == NASTY


def test_modules_may_be_in_the_image_only(render):
    job = render(
        IMAGE, "--claim=runs", "--", "--model=only_in_the_image:build"
    )["Job"]
    assert job["metadata"]["name"] == "only-in-the-image-build-digits"


def test_checkpoints_may_go_elsewhere(render):
    job = render(IMAGE, "--", "--checkpoint_dir=gs://bucket/run")["Job"]
    container = container_of(job)
    assert container["args"] == ["--checkpoint_dir=gs://bucket/run"]
    assert [mount["name"] for mount in container["volumeMounts"]] == ["shm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--image is needed"),
        ((IMAGE,), "--claim is needed"),
        ((IMAGE, "--workers=0"), "--workers must be positive"),
        ((IMAGE, "--gpus=-1"), "--gpus must not be negative"),
        ((IMAGE, "--max_hours=0"), "--max_hours must be positive"),
        ((IMAGE, "--memory=64 GB"), "--memory must be a quantity"),
        ((IMAGE, "--cpus=many"), "--cpus must be a quantity"),
        ((IMAGE, "--kind=pod"), "--kind=pod"),
        ((IMAGE, "--env=A"), "--env must be NAME=VALUE"),
        ((IMAGE, "--env=TF_CONFIG={}"), "--env=TF_CONFIG contradicts"),
        ((IMAGE, "--node_selector=a b=c"), "--node_selector must be NAME="),
        ((IMAGE, "--node_selector=a=b c"), "no label has such a value"),
        ((IMAGE, "--namespace=My"), "--namespace must be a name"),
        ((IMAGE, "--claim=a/b"), "--claim must be a name"),
        ((IMAGE, "--claim=a", "--name=1st"), "--name must be a name"),
        ((IMAGE, "--claim=a", f"--name={'a' * 60}"), "--name is too long"),
        ((IMAGE, "--mount_path=runs"), "--mount_path must be a folder"),
        (
            (IMAGE, "--kind=tfjob", "--max_restarts=3"),
            "--max_restarts=3 contradicts --kind=tfjob",
        ),
        (
            (IMAGE, "--claim=a", "--", "--run_dir=runs/a"),
            "pass --run_dir=/runs/a",
        ),
        (
            (IMAGE, "--claim=a", "--", "--run_dir=/runs/../a"),
            "--run_dir must be in --mount_path=/runs",
        ),
        (
            (IMAGE, "--claim=a", "--", "--resume=never"),
            "--resume=never contradicts restarts",
        ),
        (
            (IMAGE, "--claim=a", "--workers=3", "--gpus=2"),
            "(3 processes x 2 devices)",
        ),
        ((IMAGE, "--claim=a", "--", "--epochs=0"), "--epochs must be positive"),
        ((IMAGE, "--epochs=1"), "put it after --"),
    ],
)
def test_what_is_wrong_is_said_before_it_is_submitted(call, arguments, message):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_it_hands_the_manifests_to_kubectl(call, stub, tmp_path):
    stub('cat > manifests; echo "$@" > arguments; echo job.batch/big created')
    status, out, err = call(*FULL, *TRAIN)
    assert status == 0, err
    label = "--selector=dist-amp/job=big --namespace=ml"
    assert out == (
        "job.batch/big created\n"
        f"output: kubectl logs --follow --prefix {label}\n"
        f"the end: kubectl delete job,service,networkpolicy {label}\n"
    )
    assert (tmp_path / "arguments").read_text() == "create -f -\n"
    text = (tmp_path / "manifests").read_text()
    assert text == call("--dry_run", *FULL, *TRAIN)[1]


def test_an_earlier_job_of_the_name_is_explained(call, stub):
    stub("echo 'Error from server (AlreadyExists): jobs' >&2; exit 1")
    status, _, err = call(*FULL, *TRAIN)
    assert status == 2
    assert "error: kubectl refused the job: Error from server" in err
    assert "Remove it (kubectl delete job,service,networkpolicy" in err


def test_without_kubectl_it_says_so(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = call(*FULL, *TRAIN)
    assert status == 2
    assert "there is no kubectl on this machine" in err


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_kubectl_can_read_it(call, kind):
    """A command of its that asks no server."""
    text = call("--dry_run", f"--kind={kind}", *FULL, *TRAIN)[1]
    done = subprocess.run(
        ["kubectl", "label", "--local", "-f", "-", "a=b", "-o", "name"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in (
        "job.batch/big",
        "tfjob.kubeflow.org/big",
    )


def test_help_names_every_flag(call):
    status, out, _ = call("--help")
    assert status == 0
    for field in dataclasses.fields(kubernetes.KubernetesJob):
        assert f"  --{field.name}\n" in out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
