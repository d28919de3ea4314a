"""A Slurm of its own: the real daemons, on loopback, in a folder."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
SECONDS = 60
_SIOCSIFADDR = 0x8916

# Nodes are named by addresses, so that workers find each other without DNS;
# the devices stand for GPUs.
_CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=2000 Gres=gpu:2
NodeName=127.0.0.1 NodeHostname=localhost Port=16818
NodeName=127.0.0.2 NodeHostname=localhost Port=16819
PartitionName=main Nodes=ALL Default=YES State=UP
"""
_GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def why_not():
    """Why the daemons cannot run here; None if they can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [n for n in PROGRAMS if shutil.which(n, path=path) is None]
    if missing:
        return (
            f"needs {', '.join(missing)}: apt-get install slurmctld slurmd "
            "slurm-client munge util-linux"
        )
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


class Slurm:
    """Commands to a running Slurm.

    Attributes:
        folder: Where its files are.
        environment: Variables with which programs find it.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.environment = {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        }

    def call(self, *command, **keywords):
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            **keywords,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def show(self, job):
        """What Slurm knows of a job, by name."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job, *states, seconds=SECONDS):
        """What Slurm knows of a job, once it is in one of the states."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        known = self.show(job)
        deadline = time.monotonic() + seconds
        while known["JobState"] not in states:
            assert time.monotonic() < deadline, (known, self.logs())
            time.sleep(0.2)
            known = self.show(job)
        return known

    def logs(self):
        return {
            path.name: path.read_text()[-2000:]
            for path in self.folder.glob("*.log")
        }


@contextlib.contextmanager
def running(folder):
    """Slurm on this network namespace's loopback, until the block ends."""
    _add_an_address()
    slurm = Slurm(folder)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder))
    (folder / "gres.conf").write_text(_GPUS)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    daemons = []
    try:
        for command in _commands(folder):
            log = folder / f"{command[0]}.log"
            with log.open("ab") as output:
                daemons.append(_start(command, slurm, output))
            if command[0] == "munged":
                _wait_until((folder / "munge.socket").exists, slurm, daemons)
        _wait_until(lambda: _num_idle(slurm) == 2, slurm, daemons)
        yield slurm
    finally:
        _kill_all(slurm)
        for daemon in daemons:
            daemon.wait(timeout=SECONDS)


def _start(command, slurm, output):
    """A daemon that ends with this process at the latest."""
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        env=slurm.environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=slurm.folder,
    )


def _commands(folder):
    config = folder / "slurm.conf"
    files = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    names = [f"--{flag}={folder / name}" for flag, name in files.items()]
    yield ["munged", "--foreground", "--force", *names]
    yield ["slurmctld", "-D", "-f", str(config)]
    for node in ("127.0.0.1", "127.0.0.2"):
        yield ["slurmd", "-D", "-f", str(config), "-N", node]


def _add_an_address():
    """Slurm resolves names only where there is more than 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        address = struct.pack(
            "16sHH4s8x",
            b"lo:1",
            socket.AF_INET,
            0,
            socket.inet_aton("10.99.0.1"),
        )
        fcntl.ioctl(one, _SIOCSIFADDR, address)


def _num_idle(slurm):
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return done.stdout.split().count("idle")


def _wait_until(is_done, slurm, daemons):
    deadline = time.monotonic() + SECONDS
    while not is_done():
        assert all(daemon.poll() is None for daemon in daemons), slurm.logs()
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def _kill_all(slurm):
    """Daemons, and what they have started: all know this configuration."""
    mark = f"SLURM_CONF={slurm.environment['SLURM_CONF']}\0".encode()
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes() + b"\0":
                os.kill(int(path.parent.name), signal.SIGKILL)
