r"""Runs a tf.data service: machines that load and augment data for training.

  python -m launch.data_service --num_workers=2
  python -m launch.data_service --role=dispatcher --workers=a:5051,b:5051
  python -m launch.data_service --role=worker --dispatcher=host:5050 \
      --address=a:5051

The first is a whole service on this host. The others are one over several
hosts: a dispatcher, told every worker, and each worker, told the dispatcher
and its own address in that list. Training takes its batches of it with
--data_service=grpc://host:5050. Files must be there by the same path on each.
It runs until SIGTERM or Ctrl-C. Whoever reaches its ports may have it run
what he likes: see to a firewall.
"""

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch.config import ConfigError, flag
from launch.flags import read_command_line
from launch.quiet import quiet_start
from launch.worker_process import free_ports

ROLES = ("all", "dispatcher", "worker")
_DEFAULT_PORT = 5050
_NEEDED = {
    "all": ("num_workers",),
    "dispatcher": ("workers",),
    "worker": ("dispatcher", "address"),
}
_ADDRESS = re.compile(r"([^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):(\d+)")
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataServiceConfig:
    """Every setting of `python -m launch.data_service`; one flag each."""

    role: str = flag(
        "all", "What this process is; all: a service on one host.", ROLES
    )
    port: int | None = flag(
        None,
        f"Of the dispatcher [{_DEFAULT_PORT}]. A worker has that of --address.",
    )
    num_workers: int | None = flag(
        None, "Workers of a service on one host; they share its cores [2]."
    )
    workers: tuple[str, ...] = flag(
        (), "For the dispatcher: host:port of every worker."
    )
    dispatcher: str | None = flag(
        None, "For a worker: host:port of the dispatcher."
    )
    address: str | None = flag(
        None, "For a worker: its own host:port, as in --workers."
    )

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(
                f"--role must be one of {', '.join(ROLES)}. Received "
                f"{self.role}."
            )
        for role, names in _NEEDED.items():
            for name in names:
                self._check_is_for(role, name)
        if self.role == "worker" and self.port is not None:
            raise ConfigError(
                "--port contradicts --role=worker, whose port is that of "
                "--address: drop it."
            )
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(
                f"--num_workers must be positive. Received {self.num_workers}."
            )
        if not 0 <= (self.port or 0) < 2**16:
            raise ConfigError(
                f"--port must be from 0 (any) to 65535. Received {self.port}."
            )
        for address in (*self.workers, self.dispatcher, self.address):
            _check_address(address)
        twice = [a for a in self.workers if self.workers.count(a) > 1]
        if twice:
            raise ConfigError(
                f"--workers names {twice[0]} more than once: each worker has "
                "an address of its own."
            )

    def _check_is_for(self, role: str, name: str) -> None:
        value = getattr(self, name)
        if value and self.role != role:
            raise ConfigError(
                f"--{name} is for --role={role}, and would be ignored with "
                f"--role={self.role}: drop it."
            )
        if not value and self.role == role != "all":
            raise ConfigError(f"--role={role} needs --{name}.")


def _check_address(address: str | None) -> None:
    if address is None:
        return
    found = _ADDRESS.fullmatch(address)
    if not found or not 0 < int(found[2]) < 2**16:
        raise ConfigError(
            "--workers, --dispatcher and --address must be host:port (IPv6: "
            f"[host]:port). Received {address}."
        )


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Serves until a signal; returns the exit status."""
    try:
        config = read_command_line(argv, DataServiceConfig, __doc__)
    except (flags.Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config is None:
        return 0
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # of all threads
    with quiet_start():
        servers = start(config)
    print(describe(config, servers), flush=True)
    number = signal.sigwait(_SIGNALS)
    # Without TensorFlow's teardown, which waits for those it serves.
    os._exit(128 + number)


def start(config: DataServiceConfig) -> list[Any]:
    """The servers of this process: the dispatcher first, if it is here.

    They end when nothing refers to them any more.
    """
    if config.role == "worker":
        assert config.dispatcher
        assert config.address
        return [_worker(config.dispatcher, config.address)]
    addresses = list(config.workers)
    if config.role == "all":
        ports = free_ports(config.num_workers or 2)
        addresses = [f"127.0.0.1:{port}" for port in ports]
    port = _DEFAULT_PORT if config.port is None else config.port
    dispatcher = _dispatcher(port, addresses)
    if config.role == "dispatcher":
        return [dispatcher]
    here = f"127.0.0.1:{dispatcher.target.rpartition(':')[2]}"
    return [dispatcher, *(_worker(here, address) for address in addresses)]


def describe(config: DataServiceConfig, servers: Sequence[Any]) -> str:
    """The line that tells that all is ready."""
    if config.role == "worker":
        return f"data service: worker {config.address} of {config.dispatcher}"
    port = servers[0].target.rpartition(":")[2]
    number = len(config.workers) or len(servers) - 1
    return f"data service: --data_service=grpc://HOST:{port}, {number} workers"


def _dispatcher(port: int, addresses: Sequence[str]) -> Any:
    import tensorflow as tf

    service = tf.data.experimental.service
    return service.DispatchServer(
        service.DispatcherConfig(port=port, worker_addresses=list(addresses))
    )


def _worker(dispatcher: str, address: str) -> Any:
    import tensorflow as tf

    service = tf.data.experimental.service
    return service.WorkerServer(
        service.WorkerConfig(
            dispatcher_address=dispatcher,
            worker_address=address,
            port=int(address.rpartition(":")[2]),
        )
    )


if __name__ == "__main__":
    run()
