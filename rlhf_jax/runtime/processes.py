"""Many processes, one program: every host runs the same script, JAX's own runtime connects them.

    with joined(run, Processes(coordinator="host0:1234", num_processes=2, process_id=1)):
        mesh = make_mesh()                  # over the devices of all processes

What that asks of the rest: the first process writes what is written once (`is_first`), the others wait for it before they
read it (`meet`), and all of them stop at one step (`largest`). Without other processes none of the three touches a device.
"""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_LAST_WORDS = Path(__file__).with_name("last_words.py")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who the processes of a run are. SLURM, Open MPI, GKE and TPU VMs say it themselves; elsewhere three flags do."""

    distributed: bool = False
    """Join the processes that the cluster's environment names."""
    coordinator: str | None = None
    """host:port of process 0, the same in every process."""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat: int = 30
    """Seconds without a sign of life after which a process counts as gone and the others stop."""


@contextlib.contextmanager
def joined(run: Path, processes: Processes) -> Iterator[None]:
    """Connect to the run's other processes for the time of the `with`; alone, it does nothing. Before any array is made.

    A process that is killed, or that JAX's runtime ends because another one is gone (at the latest `heartbeat` seconds
    after it fell silent), runs no clean-up code: `last_words.py` says in its place what is kept and how to go on.

    Raises:
      ValueError: some of the three flags are missing, the environment names no cluster, or the processes were started with
        different numbers of them.
    """
    if not _asked(processes):
        yield
        return
    _check(processes)
    timeout = max(processes.heartbeat, 60)
    if processes.num_processes:
        who = f"process {processes.process_id} of {processes.num_processes}"
        print(f"{who} joins {processes.coordinator}: waiting {timeout} s at most for the others", file=sys.stderr)
    command = [sys.executable, "-I", "-S", str(_LAST_WORDS), str(run), _in_vain(processes, timeout)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as speaker:
        try:
            _connect(processes, timeout)
        except (ValueError, RuntimeError):
            speaker.communicate(b"done\n")
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        speaker.stdin.write(f"{who} on {socket.gethostname()}\n".encode())
        speaker.stdin.flush()
        as_wanted = False
        try:
            _check_number(processes)
            yield
            as_wanted = True
        except SystemExit:
            as_wanted = True
            raise
        finally:
            if not as_wanted:
                _leave_at_once(speaker)
            speaker.communicate(b"done\n")
    jax.distributed.shutdown()


def _connect(processes: Processes, timeout: int) -> None:
    """Where others do not come in time, JAX's runtime ends the process: no exception can be caught."""
    jax.distributed.initialize(
        processes.coordinator,
        processes.num_processes,
        processes.process_id,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=processes.heartbeat,
        shutdown_timeout_seconds=processes.heartbeat,
    )


def _in_vain(processes: Processes, timeout: int) -> str:
    """What a process says that ends before it has met the others."""
    who, where = "a process", "the address that the cluster's environment names"
    if processes.coordinator:
        who = f"process {processes.process_id} of {processes.num_processes}"
        where = processes.coordinator
    return (
        f"{who} on {socket.gethostname()} has ended before all had met at {where}, for which it waits {timeout} s: nothing was "
        "computed. Fix: start every process within that time, all with the same --processes.coordinator, an address of "
        "process 0 that the others reach, and --processes.num-processes, the number of them"
    )


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def meet(where: str) -> None:
    """Return when every process has come to this line; what the first one wrote before it can then be read by all."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(where)


def largest(number: int) -> int:
    """The largest of all processes' numbers, in every one of them."""
    if not jax.distributed.is_initialized():
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def on_every_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array in the memory of every process."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _leave_at_once(speaker: subprocess.Popen) -> None:
    """Show the error in flight and end: an orderly exit waits for the other processes, which wait for this one."""
    sys.excepthook(*sys.exc_info())
    speaker.communicate()
    os._exit(1)


def _asked(processes: Processes) -> bool:
    return processes.distributed or _flags(processes) != (None, None, None)


def _flags(processes: Processes) -> tuple[str | None, int | None, int | None]:
    return processes.coordinator, processes.num_processes, processes.process_id


def _check_number(processes: Processes) -> None:
    """Process 0's number holds for all, whatever the others were told."""
    if processes.num_processes not in (None, jax.process_count()):
        raise ValueError(
            f"process {processes.process_id} was told of {processes.num_processes} processes, process 0 of "
            f"{jax.process_count()}: nothing was computed. Fix: the same num_processes in every one"
        )


def _check(processes: Processes) -> None:
    """What would otherwise be found out by a wait of minutes."""
    coordinator, num_processes, process_id = _flags(processes)
    if processes.distributed and _flags(processes) == (None, None, None):
        return
    if None in _flags(processes):
        raise ValueError(
            f"coordinator {coordinator}, num_processes {num_processes}, process_id {process_id}: nothing was started. "
            "Fix: all three, or only distributed where the environment (SLURM, Open MPI, GKE, a TPU VM) knows them"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id {process_id} of {num_processes} processes: nothing was started. "
            f"Fix: 0 to {num_processes - 1}, each once"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator {coordinator!r}: nothing was started. Fix: host:port of process 0")
