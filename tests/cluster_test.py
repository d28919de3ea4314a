"""Which workers a job has, told from every source, and what is refused."""

import json
import sys

import pytest

from dist_amp import cluster
from dist_amp.cluster import ClusterSpec, expand_counts, expand_hosts


def tf_config(workers=("a:1", "b:1"), task=None, **jobs):
    jobs = {"worker": list(workers), **jobs}
    task = {"type": "worker", "index": 1} if task is None else task
    return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})}


def slurm(nodes, counts, index, place, **more):
    """What srun sets; `place` is the node and the place on it."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(sum(expand_counts(counts))),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": counts,
        "SLURM_PROCID": str(index),
        "SLURM_NODEID": str(place[0]),
        "SLURM_LOCALID": str(place[1]),
        **more,
    }


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "3713728513",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALNRANKS": "3"}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-12]", [f"n{i}" for i in range(1, 13)]),
        ("n[01-12,15]", [*(f"n{i:02d}" for i in range(1, 13)), "n15"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack[1-2]n[3-4]", ["rack1n3", "rack1n4", "rack2n3", "rack2n4"]),
        ("n1-ib[0-1]-x", ["n1-ib0-x", "n1-ib1-x"]),
        (
            "login,n[1,3],gpu-[07-08].lan,z9",
            ["login", "n1", "n3", "gpu-07.lan", "gpu-08.lan", "z9"],
        ),
    ],
)
def test_slurm_lists_of_hosts(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "n[1-", "n1]", "n[2-1]", "n[a-b]", "n[]", "a,,b", "n[1[2]]"]
)
def test_a_malformed_list_of_hosts_is_an_error(text):
    with pytest.raises(ValueError, match="Malformed list of hosts"):
        expand_hosts(text)


@pytest.mark.parametrize(
    ("text", "counts"),
    [("2", [2]), ("2(x3)", [2, 2, 2]), ("2(x2),1", [2, 2, 1]), ("1,3", [1, 3])],
)
def test_slurm_tasks_per_node(text, counts):
    assert expand_counts(text) == counts


def test_malformed_tasks_per_node_are_an_error():
    with pytest.raises(ValueError, match="tasks per node"):
        expand_counts("2(y3)")


def test_tf_config_is_read():
    assert cluster.find(environment=tf_config()) == ClusterSpec(
        ("a:1", "b:1"), 1, "TF_CONFIG"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TF_CONFIG": ""},
        {"TF_CONFIG": "{}"},
        tf_config(["a:1"], {"type": "worker", "index": 0}),
        {"TF_CONFIG": json.dumps({"cluster": {"chief": ["a:1"]}})},
        slurm("n1", "1", 0, (0, 0)),
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"JOB_COMPLETION_INDEX": "1"},
    ],
)
def test_one_process_is_no_cluster(environment):
    assert cluster.find(environment=environment) is None


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_NTASKS": "4"}, "4 tasks, but this process was not started"),
        ({"JOB_COMPLETION_INDEX": "1"}, "no --workers were given"),
    ],
)
def test_one_of_several_tasks_that_would_train_alone_is_warned(
    environment, said, caplog
):
    cluster.find(environment=environment)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TF_CONFIG": "{"}, "must be a JSON object"),
        ({"TF_CONFIG": "[1]"}, "must be a JSON object"),
        ({"TF_CONFIG": '{"cluster": []}'}, "must be a JSON object"),
        (tf_config(worker="a:1,b:1"), "must be a list of host:port"),
        (tf_config(task={"index": 2}), r"in \[0, 2\).*Received 2 from TF_C"),
        (tf_config(task={"index": -1}), r"in \[0, 2\).*Received -1"),
        (tf_config(task={"index": "1"}), r"in \[0, 2\).*Received '1'"),
        (tf_config(task={"index": True}), r"in \[0, 2\).*Received True"),
        (tf_config(task={"type": "worker"}), "task.index.*is missing"),
        (tf_config(["a:1", "a:1"]), "address of its own.*a:1 more than once"),
        (tf_config(["a:1", "b"]), "host:port.*'b' for worker 1 from TF_CONFIG"),
        (tf_config(["a:1", "b:0"]), "'b:0' for worker 1"),
        (tf_config(["a:1", "b:99999"]), "'b:99999' for worker 1"),
        (tf_config(["a:1", "http://b:1"]), "'http://b:1' for worker 1"),
        (tf_config(["a:1", 7]), "host:port.*7 for worker 1"),
        (tf_config(chief=["c:1"]), "a chief beside the workers.*first"),
        (tf_config(evaluator=["c:1"]), "evaluator; evaluation runs on the"),
        (tf_config(ps=["c:1"]), "must be a worker. Received ps"),
        (tf_config(task={"type": "evaluator", "index": 0}), "task type 'eval"),
        (
            slurm("n[1-2]", "1(x2)", 1, (0, 1)),
            "block distribution.*--distribution=block",
        ),
        (slurm("n[1-2]", "2", 1, (1, 0)), "2 nodes.*and 1 in"),
        (
            slurm("n1", "3", 1, (0, 1), SLURM_STEP_RESV_PORTS="12000-12001"),
            "reserved 2 ports.*--resv-ports=3",
        ),
        (
            {**slurm("n1", "2", 1, (0, 1)), "SLURM_STEP_NODELIST": ""},
            "SLURM_STEP_NODELIST is not set",
        ),
        (
            {**slurm("n1", "2", 1, (0, 1)), "SLURM_PROCID": "x"},
            "SLURM_PROCID must be a number",
        ),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "Open MPI started 2 processes on several hosts.*--workers",
        ),
        ({**MPICH, "MPI_LOCALNRANKS": "2"}, "MPICH started 3 processes"),
    ],
)
def test_a_wrong_environment_is_explained(environment, message):
    with pytest.raises(ValueError, match=message):
        cluster.find(environment=environment)


def test_ipv6_addresses():
    spec = cluster.find(environment=tf_config(["[::1]:1", "[fe80::2]:1"]))
    assert cluster.split_address(spec.address) == ("fe80::2", 1)


def workers_of(environment):
    return list(cluster.find(environment=environment).workers)


@pytest.mark.parametrize(
    ("nodes", "counts", "places", "options", "expected"),
    [
        (
            "n[9-11]",
            "1(x3)",
            [(0, 0), (1, 0), (2, 0)],
            {},
            ["n9:15112", "n10:15112", "n11:15112"],
        ),
        (
            "n[1-2]",
            "2,1",
            [(0, 0), (0, 1), (1, 0)],
            {},
            ["n1:15112", "n1:15113", "n2:15112"],
        ),
        (
            "n[1-2]",
            "2,1",
            [(0, 0), (1, 0), (0, 1)],
            {"SLURM_DISTRIBUTION": "cyclic"},
            ["n1:15112", "n2:15112", "n1:15113"],
        ),
        (
            "n[1-2]",
            "2(x2)",
            [(0, 0), (0, 1), (1, 0), (1, 1)],
            {"SLURM_STEP_RESV_PORTS": "12000-12001"},
            ["n1:12000", "n1:12001", "n2:12000", "n2:12001"],
        ),
    ],
)
def test_slurm_steps(nodes, counts, places, options, expected):
    for index, place in enumerate(places):
        environment = slurm(nodes, counts, index, place, **options)
        spec = cluster.find(environment=environment)
        assert list(spec.workers) == expected
        assert spec.task_index == index
        assert spec.source == f"Slurm (job 7, {nodes})"


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH])
def test_mpi_on_one_host(environment):
    spec = cluster.find(environment=environment)
    ports = [cluster.split_address(worker)[1] for worker in spec.workers]
    assert ports == list(range(ports[0], ports[0] + len(ports)))
    assert {w.partition(":")[0] for w in spec.workers} == {"127.0.0.1"}
    assert spec.task_index == int(
        environment.get("PMI_RANK") or environment["OMPI_COMM_WORLD_RANK"]
    )


def test_ports_of_jobs_do_not_overlap_and_leave_outgoing_ones_alone():
    ports = [
        {
            cluster.split_address(worker)[1]
            for worker in workers_of(
                slurm("n1", "16", 0, (0, 0), SLURM_JOB_ID=str(job))
            )
        }
        for job in (0, 1, 998, 999)
    ]
    assert len(set.union(*ports)) == 4 * 16
    assert max(set.union(*ports)) < 32768


def test_tf_config_goes_before_slurm_and_open_mpi_before_slurm():
    step = slurm("n[1-2]", "1(x2)", 1, (1, 0))
    both = cluster.find(environment={**step, **tf_config()})
    assert both.source == "TF_CONFIG"
    both = cluster.find(environment={**step, **OPEN_MPI})
    assert both.source == "Open MPI"


@pytest.mark.parametrize(
    ("environment", "source"),
    [
        ({"JOB_COMPLETION_INDEX": "1"}, "--workers and JOB_COMPLETION_INDEX"),
        ({"SLURM_PROCID": "1"}, "--workers and SLURM_PROCID"),
        ({"PMI_RANK": "1"}, "--workers and PMI_RANK"),
        (OPEN_MPI, "--workers and OMPI_COMM_WORLD_RANK"),
    ],
)
def test_a_list_of_workers_with_the_index_that_a_launcher_tells(
    environment, source
):
    spec = cluster.find(["a:1", "b:1"], environment=environment)
    assert (spec.task_index, spec.source) == (1, source)


def test_a_list_of_workers_goes_before_tf_config():
    spec = cluster.find(["c:1", "d:1"], 0, environment=tf_config())
    assert spec == ClusterSpec(("c:1", "d:1"), 0, "--workers")


@pytest.mark.parametrize(
    ("workers", "index", "message"),
    [
        (["a:1", "b:1"], None, "`task_index` is needed.*--task_index"),
        (["a:1", "b:1"], 2, r"in \[0, 2\)"),
        ([], 1, "`task_index` needs `workers`"),
    ],
)
def test_a_wrong_list_of_workers_is_explained(workers, index, message):
    with pytest.raises(ValueError, match=message):
        cluster.find(workers, index, environment={})


def test_names_may_come_later_on_kubernetes():
    environment = {**tf_config(), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert cluster.find(environment=environment).may_wait_for_names


@pytest.mark.parametrize("name", ["startup", "collective", "heartbeat"])
def test_timeouts_are_positive(name):
    with pytest.raises(ValueError, match=f"--{name}_timeout"):
        cluster.Timeouts(**{name: 0.0})


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
