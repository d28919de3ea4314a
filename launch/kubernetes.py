r"""Writes, checks and submits a Kubernetes job that trains on several pods.

  python -m launch.kubernetes [flags] -- [flags of launch.train]

  python -m launch.kubernetes --image=registry/train:1 --workers=4 --gpus=8 \
      --claim=runs -- --precision=mixed_bfloat16 --global_batch_size=1024
  python -m launch.kubernetes --kind=tfjob --image=registry/train:1 \
      --workers=4 --claim=runs --dry_run                 shows the manifests

Each pod is a worker. --kind=job is an Indexed Job (Kubernetes 1.29 or newer),
--kind=tfjob is for Kubeflow's training operator. When a pod is lost or evicted
all workers end, start again, and go on from the last checkpoint; wrong
settings and exceptions end the job. --claim names a PersistentVolumeClaim that
all pods can write to (ReadWriteMany); results go there.

A NetworkPolicy keeps everyone but the job's own pods away from its ports, if
the cluster's network has such policies.
"""

import dataclasses
import pathlib
import re
import sys
from typing import Any

from absl import flags

from launch import job as job_lib
from launch import yaml_text
from launch.config import ConfigError, TrainConfig, check_positive, flag

KINDS = ("job", "tfjob")
PORT = 2222
_LABEL = "dist-amp/job"
_CONTAINER = "tensorflow"  # the training operator looks for this name
_QUANTITY = r"\d+(\.\d+)?(m|k|[KMGTPE]i|[MGTPE])?"
_LABEL_NAME = r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_MAX_NAME = 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class KubernetesJob:
    """Every setting of `python -m launch.kubernetes`; one flag each."""

    kind: str = flag("job", "Who starts the pods.", KINDS)
    name: str | None = flag(
        None, "Name of the job. Default: that of --run_dir's folder."
    )
    namespace: str | None = flag(None, "Default: that of kubectl's context.")
    image: str | None = flag(
        None, "An image with dist_amp and your code in its working directory."
    )
    python: str = flag("python", "The Python in the image.")
    workers: int = flag(1, "Pods.")
    gpus: int = flag(0, "GPUs of each worker; 0: the CPU.")
    cpus: str | None = flag(None, "CPU cores of each worker, as 8 or 500m.")
    memory: str | None = flag(None, "Memory of each worker, as 64Gi.")
    shm_size: str = flag(
        "1Gi", "Size of /dev/shm, through which GPUs of a pod talk (NCCL)."
    )
    env: tuple[str, ...] = flag(
        (),
        "A variable for all workers, as --env=NCCL_SOCKET_IFNAME=eth0; once "
        "for each.",
        is_repeated=True,
    )
    node_selector: tuple[str, ...] = flag(
        (),
        "A label that nodes must have, as --node_selector=gpu=h100; once for "
        "each.",
        is_repeated=True,
    )
    claim: str | None = flag(
        None, "The PersistentVolumeClaim that results go to."
    )
    mount_path: str = flag("/runs", "Where pods see it.")
    grace_seconds: int = flag(
        120,
        "Seconds to save in when a pod is asked to end: more than a "
        "checkpoint takes.",
    )
    max_restarts: int | None = flag(
        None,
        f"How often workers start again [{job_lib.DEFAULT_RESTARTS}; with "
        "--kind=tfjob without limit].",
    )
    max_hours: float | None = flag(
        None, "The job is ended after so long, restarts and all."
    )
    dry_run: bool = flag(
        False, "Prints the manifests instead of submitting them."
    )

    def __post_init__(self) -> None:
        if not self.image:
            raise ConfigError(
                "--image is needed: one with dist_amp and your code."
            )
        check_positive(self, "workers", "grace_seconds", "max_hours")
        for name in ("gpus", "max_restarts"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(
                    f"--{name} must not be negative. Received "
                    f"{getattr(self, name)}."
                )
        self._check_texts()
        if self.kind == "tfjob" and self.max_restarts:
            raise ConfigError(
                f"--max_restarts={self.max_restarts} contradicts "
                "--kind=tfjob: the training operator does not count them. "
                "Pass --max_restarts=0 for none, or --max_hours for a limit."
            )

    # ------------------------------------------------------------- resolved

    @property
    def num_restarts(self) -> int:
        """How often a worker may start again, where somebody counts."""
        if self.max_restarts is None:
            return job_lib.DEFAULT_RESTARTS
        return self.max_restarts

    @property
    def is_gang(self) -> bool:
        """Whether there is anyone to talk to."""
        return self.workers > 1

    # --------------------------------------------------------------- checks

    def _check_texts(self) -> None:
        job_lib.environment(self.env)
        for key, value in self.selected().items():
            if value and not re.fullmatch(_LABEL_NAME, value):
                raise ConfigError(
                    "--node_selector: no label has such a value. Received "
                    f"{key}={value}."
                )
        for name in ("cpus", "memory", "shm_size"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(_QUANTITY, value):
                raise ConfigError(
                    f"--{name} must be a quantity of Kubernetes, as 8, 500m "
                    f"or 64Gi. Received {value!r}."
                )
        for name in ("namespace", "claim"):
            value = getattr(self, name)
            if value is not None:
                _check_name(name, value, r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
        if not re.fullmatch(r"(/[^/:\s]+)+", self.mount_path):
            raise ConfigError(
                "--mount_path must be a folder from the root, as /runs. "
                f"Received {self.mount_path!r}."
            )

    def selected(self) -> dict[str, str]:
        """Labels that nodes must have."""
        return job_lib.named_values(
            "node_selector", self.node_selector, _LABEL_NAME
        )


# --------------------------------------------------------------- the program


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Prints or submits the manifests; returns the exit status."""
    try:
        read = job_lib.read_settings(argv, KubernetesJob, __doc__)
        if read is None:
            return 0
        job, arguments = read
        training = job_lib.read_training(arguments, is_elsewhere=True)
        name = name_of(job, training)
        training = place_results(job, training, name)
        text = yaml_text.dump(manifests(job, training, name))
        if job.dry_run:
            print(text, end="")
            return 0
        print(_submit(job, name, text))
        return 0
    except (flags.Error, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return job_lib.WRONG_SETTINGS


def name_of(job: KubernetesJob, training: job_lib.Training) -> str:
    """The job's name, by which its pods find each other.

    Raises:
        ConfigError: It is none that Kubernetes takes.
    """
    folder = pathlib.PurePosixPath(training.config.directory).name
    name = job.name or re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")
    _check_name("name", name, r"[a-z]([a-z0-9-]*[a-z0-9])?")
    longest = f"{name}-worker-{job.workers - 1}"
    if len(longest) > _MAX_NAME:
        raise ConfigError(
            f"--name is too long: {longest} must have {_MAX_NAME} characters "
            f"at most and has {len(longest)}."
        )
    return name


def place_results(
    job: KubernetesJob, training: job_lib.Training, name: str
) -> job_lib.Training:
    """Checks the flags of training; results go to the claim, say where not.

    Raises:
        ConfigError: They do not suit the job; the message names the flag.
    """
    config = training.config
    job_lib.check_training(
        config,
        num_workers=job.workers,
        num_gpus=job.gpus,
        restarts=job.max_restarts != 0,
    )
    if not job.claim:
        _check_remote(config)
        return training
    if config.run_dir is None:
        run_dir = f"--run_dir={job.mount_path}/{name}"
        return job_lib.read_training(
            [*training.arguments, run_dir], is_elsewhere=True
        )
    path = pathlib.PurePosixPath(config.run_dir)
    if ".." in path.parts or not path.is_relative_to(job.mount_path):
        raise ConfigError(
            f"--run_dir must be in --mount_path={job.mount_path}, or it is "
            f"gone with the pod. Received {config.run_dir}; pass "
            f"--run_dir={job.mount_path}/{path.name}."
        )
    return training


def manifests(
    job: KubernetesJob, training: job_lib.Training, name: str
) -> list[dict[str, Any]]:
    """What Kubernetes is to make, in this order."""
    arguments = list(training.arguments)
    if job.kind == "tfjob":
        made = [_tfjob(job, name, arguments)]
        return [_network_policy(job, name), *made] if job.is_gang else made
    if not job.is_gang:
        return [_job(job, name, arguments)]
    addresses = [f"{name}-{i}.{name}:{PORT}" for i in range(job.workers)]
    arguments.append(f"--workers={','.join(addresses)}")
    return [
        _service(job, name),
        _network_policy(job, name),
        _job(job, name, arguments),
    ]


# -------------------------------------------------------------------- private


def _metadata(job: KubernetesJob, name: str) -> dict[str, Any]:
    namespace = {"namespace": job.namespace} if job.namespace else {}
    return {"name": name, **namespace, "labels": {_LABEL: name}}


def _service(job: KubernetesJob, name: str) -> dict[str, Any]:
    """Gives each pod a name, before it is ready: they wait for each other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {_LABEL: name},
            "ports": [{"name": "tensorflow", "port": PORT}],
        },
    }


def _network_policy(job: KubernetesJob, name: str) -> dict[str, Any]:
    """TensorFlow's server does what anyone says who reaches it."""
    ours = {"matchLabels": {_LABEL: name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, name),
        "spec": {
            "podSelector": ours,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": ours}]}],
        },
    }


def _job(job: KubernetesJob, name: str, arguments: list[str]) -> dict[str, Any]:
    """One failed pod takes the others with it (129), so all count alike.

    Counted together, N pods would use up N restarts at a time, and wait
    2**N times as long for the next one.
    """
    template = _template(job, name, arguments)
    template["spec"]["restartPolicy"] = "Never"
    spec: dict[str, Any] = {"backoffLimit": job.num_restarts}
    if job.is_gang:
        template["spec"]["subdomain"] = name
        spec = {
            "completionMode": "Indexed",
            "completions": job.workers,
            "parallelism": job.workers,
            "backoffLimitPerIndex": job.num_restarts,
            "maxFailedIndexes": 0,
        }
    is_end = {
        "containerName": _CONTAINER,
        "operator": "NotIn",
        "values": list(job_lib.RESTART),
    }
    is_evicted = {"type": "DisruptionTarget", "status": "True"}
    rules = [
        {"action": "FailJob", "onExitCodes": is_end},
        {"action": "Ignore", "onPodConditions": [is_evicted]},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, name),
        "spec": {
            **spec,
            "podFailurePolicy": {"rules": rules},
            **_deadline(job),
            "template": template,
        },
    }


def _tfjob(
    job: KubernetesJob, name: str, arguments: list[str]
) -> dict[str, Any]:
    """Its operator tells workers who they are, in TF_CONFIG.

    By `ExitCode` it starts pods again whose status is 128 or more. Its
    `backoffLimit` counts restarts within a pod only, of which there are none.
    """
    never = job.max_restarts == 0
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "TFJob",
        "metadata": _metadata(job, name),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", **_deadline(job)},
            "tfReplicaSpecs": {
                "Worker": {
                    "replicas": job.workers,
                    "restartPolicy": "Never" if never else "ExitCode",
                    "template": _template(job, name, arguments),
                }
            },
        },
    }


def _deadline(job: KubernetesJob) -> dict[str, int]:
    if job.max_hours is None:
        return {}
    return {"activeDeadlineSeconds": max(1, round(3600 * job.max_hours))}


def _template(
    job: KubernetesJob, name: str, arguments: list[str]
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": job.shm_size},
        }
    ]
    if job.claim:
        source = {"claimName": job.claim}
        volumes.append({"name": "runs", "persistentVolumeClaim": source})
    selector = job.selected()
    return {
        "metadata": {"labels": {_LABEL: name}},
        "spec": {
            "terminationGracePeriodSeconds": job.grace_seconds,
            **({"nodeSelector": selector} if selector else {}),
            "containers": [_container(job, arguments)],
            "volumes": volumes,
        },
    }


def _container(job: KubernetesJob, arguments: list[str]) -> dict[str, Any]:
    wanted = {
        "cpu": job.cpus,
        "memory": job.memory,
        "nvidia.com/gpu": str(job.gpus) if job.gpus else None,
    }
    limits = {key: value for key, value in wanted.items() if value}
    variables = {"PYTHONUNBUFFERED": "1", **job_lib.environment(job.env)}
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if job.claim:
        mounts.append({"name": "runs", "mountPath": job.mount_path})
    command = [job.python, "-m", "launch.train"]
    return {
        "name": _CONTAINER,
        "image": job.image,
        "command": [_literal(word) for word in command],
        **({"args": [_literal(a) for a in arguments]} if arguments else {}),
        "env": [
            {"name": key, "value": _literal(value)}
            for key, value in variables.items()
        ],
        "ports": [{"name": "tfjob-port", "containerPort": PORT}],
        **({"resources": {"limits": limits}} if limits else {}),
        "volumeMounts": mounts,
    }


def _literal(text: str) -> str:
    """Kubernetes puts a variable's value for $(NAME), and $ for $$."""
    return text.replace("$", "$$")


def _check_remote(config: TrainConfig) -> None:
    if "://" not in (config.checkpoint_dir or ""):
        raise ConfigError(
            "--claim is needed, or checkpoints are gone with the pod: pass "
            "a PersistentVolumeClaim, or after -- a --checkpoint_dir such as "
            "gs://bucket/run."
        )


def _check_name(flag_name: str, value: str, pattern: str) -> None:
    if not re.fullmatch(pattern, value) or len(value) > _MAX_NAME:
        raise ConfigError(
            f"--{flag_name} must be a name as Kubernetes takes it: small "
            f"letters, digits and -. Received {value!r}."
        )


def _submit(job: KubernetesJob, name: str, text: str) -> str:
    where = f" --namespace={job.namespace}" if job.namespace else ""
    label = f"--selector={_LABEL}={name}{where}"
    end = f"kubectl delete {job.kind},service,networkpolicy {label}"
    try:
        answer = job_lib.submit(
            ["kubectl", "create", "-f", "-"],
            text,
            mend="install it and choose the cluster's context",
        )
    except ConfigError as error:
        if "AlreadyExists" not in str(error):
            raise
        raise ConfigError(
            f"{error}\nAn earlier job has this name. Remove it ({end}), and "
            "the new one goes on from its checkpoint; or pass another --name."
        ) from error
    output = f"kubectl logs --follow --prefix {label}"
    return f"{answer}\noutput: {output}\nthe end: {end}"


if __name__ == "__main__":
    run()
