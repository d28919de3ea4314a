"""Workers as processes on loopback."""

import json

from launch.prove_resume import free_ports

SECONDS = 180


def cluster_environments(number):
    """TF_CONFIG of each worker of a cluster."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(number)]
    return [
        {
            "TF_CONFIG": json.dumps(
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                }
            )
        }
        for index in range(number)
    ]


def end(workers):
    """Exit status, output and errors of each."""
    try:
        results = [w.communicate(timeout=SECONDS) for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [
        (worker.returncode, *result)
        for worker, result in zip(workers, results, strict=True)
    ]
