"""The processes of a run: their ranks, from the environment (torchrun, SLURM, our own launcher), and communication
outside Lightning."""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from policylab.errors import ProcessFailed, UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

T = TypeVar("T")

#: Timeout of the start: all processes must have connected by then.
START_TIMEOUT = timedelta(minutes=10)
#: Under SLURM rank 0 listens on one of the ten thousand ports from this one on.
SLURM_PORTS = 15_000


@dataclass(frozen=True)
class World:
    """The rank of this process, and how many there are."""

    rank: int = 0  #: over all nodes
    size: int = 1
    local_rank: int = 0  #: on this node
    local_size: int = 1
    restarts: int = 0  #: of the group, after a failure
    elastic: bool = False  #: whether torch's launcher has started it, ours or torchrun's

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines, each with the same number of processes."""
        return self.size // self.local_size


def world(environment: Mapping[str, str] = os.environ) -> World:
    """The rank of this process, and the number of processes.

    Raises:
        UserError: when nodes have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return World(
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]),
            local_size=int(environment["LOCAL_WORLD_SIZE"]),
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
            elastic=True,
        )
    # Use the variables of the step: those of the job are also set in sbatch's script and salloc's shell, which are not
    # tasks.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
        if size % nodes:
            raise UserError(f"SLURM has started {size} tasks on {nodes} nodes; take the same number on each")
        return World(
            rank=int(environment["SLURM_PROCID"]),
            size=size,
            local_rank=int(environment["SLURM_LOCALID"]),
            local_size=size // nodes,
            restarts=int(environment.get("SLURM_RESTART_COUNT", 0)),
        )
    return World()


def main_address(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of rank 0, from ``MASTER_ADDR`` and ``MASTER_PORT``, or from the variables of SLURM."""
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if host is None:
        host = first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
    if port is None:
        port = str(SLURM_PORTS + int(environment.get("SLURM_JOB_ID", 0)) % 10_000)
    return host, int(port)


def first_host(nodes: str) -> str:
    """The first of a SLURM list of nodes.

    >>> first_host("gpu[03-05,9],login1"), first_host("gpu7"), first_host("gpu[12]-ib,x")
    ('gpu03', 'gpu7', 'gpu12-ib')
    """
    first = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    assert first is not None
    return first[1] + (first[2] or "") + first[3]


# -- before the process group: a store for short texts ---------------------------------------------------------------


def made_once(name: str, make: Callable[[], str]) -> str:
    """Broadcasts a value that rank 0 makes. After a restart of the group the value is the same, not made again."""
    here = world()
    if here.size == 1 and not here.elastic:
        return make()
    store = _store()
    if here.main and not store.check([name]):
        store.set(name, make())
    return store.get(name).decode()


def has_flag(name: str) -> bool:
    """Whether `set_flag` was called with this name, by this group of processes or by one before a restart."""
    return world().elastic and bool(_store().check([name]))


def set_flag(name: str) -> None:
    """Sets a flag that is kept over restarts of the group."""
    if world().elastic:
        _store().set(name, "")


@cache
def _store() -> TCPStore:
    """Key-value store of the launcher, or of rank 0."""
    from torch.distributed import TCPStore

    here = world()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the launcher's
        host, port, serves = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), False
    else:
        host, port, serves = *main_address(), here.main
    return TCPStore(host, port, here.size, serves, START_TIMEOUT)


@cache
def attempt() -> int:
    """Number of this group of processes, counted from 1 over the restarts of a launcher.

    Torch's launcher keeps one store for all groups, and each node counts its own restarts. So rank 0 counts, and each
    other rank asks it with a fresh id, so that a process of an earlier group cannot take the answer.

    Raises:
        ProcessFailed: when a process has not connected within ten minutes.
    """
    here = world()
    if here.size == 1:
        return 1
    store = _store()
    try:
        if not here.main:
            question = uuid.uuid4().hex
            store.set(f"question/{here.rank}", question)
            number = int(store.get(f"answer/{question}"))
            store.set(f"heard/{number}/{here.rank}", "")
            return number
        number, end = store.add("attempts", 1), time.monotonic() + START_TIMEOUT.total_seconds()
        for rank in range(1, here.size):
            while not store.check([f"heard/{number}/{rank}"]):
                question = store.get(f"question/{rank}").decode()
                store.set(f"answer/{question}", str(number))
                if time.monotonic() > end:
                    raise RuntimeError(f"rank {rank} has not connected")
                time.sleep(0.02)
        return number
    except RuntimeError as error:
        raise ProcessFailed(f"not all {here.size} processes have connected ({error})") from error


# -- the process group: torch's collective operations ----------------------------------------------------------------


#: "cpu": a gloo group of all processes, for plain data. NCCL would need a GPU for it.
_groups: dict[str, Any] = {}


def connect(backend: str, seconds: float) -> None:
    """Creates torch's process group if there are several processes. Lightning uses it.

    Args:
        backend: gloo or nccl, or both by device.
        seconds: timeout of collective operations.
    """
    here = world()
    if here.size == 1:
        return
    import torch.distributed as dist

    store = dist.PrefixStore(f"group/{attempt()}", _store())
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=here.rank, world_size=here.size)
    if "nccl" in backend:  # otherwise torch warns at the exit
        atexit.register(dist.destroy_process_group)
    _groups["cpu"] = dist.new_group(backend="gloo", timeout=timeout)


def broadcast(name: str, value: T | None) -> T:
    """Broadcasts plain data from rank 0; a collective.

    Args:
        name: name of the value, for messages.
        value: rank 0's value; those of other ranks are ignored.

    Raises:
        ProcessFailed: when rank 0 does not answer within the timeout, or has exited.
    """
    values = [value]
    if world().size > 1:
        import torch.distributed as dist

        try:
            dist.broadcast_object_list(values, src=0, group=_groups["cpu"])
        except RuntimeError as error:
            raise ProcessFailed(f"rank 0 has not sent its {name} ({error})") from error
    (sent,) = values
    assert sent is not None
    return sent


def check_same(name: str, text: str) -> None:
    """Checks that all processes have the same text; a collective.

    Raises:
        UserError: on every process, naming the ranks that differ from rank 0.
        ProcessFailed: when a process does not answer within the timeout, or has exited.
    """
    here = world()
    if here.size == 1:
        return
    import torch.distributed as dist

    hashes = [""] * here.size
    try:
        dist.all_gather_object(hashes, hashlib.sha256(text.encode()).hexdigest(), group=_groups["cpu"])
    except RuntimeError as error:
        raise ProcessFailed(f"not all {here.size} processes have sent their {name} ({error})") from error
    others = [str(rank) for rank, hashed in enumerate(hashes) if hashed != hashes[0]]
    if others:
        raise UserError(
            f"the {name} of rank {', '.join(others)} is not that of rank 0; start all processes with the same command"
        )


def barrier() -> None:
    """Waits for all processes. Needed at the end of a run: torchrun and SLURM may end the others when one exits.

    Raises:
        RuntimeError: when a process does not arrive within the timeout, naming its rank.
    """
    if world().size > 1:
        import torch.distributed as dist

        dist.monitored_barrier(group=_groups["cpu"])


def in_environment() -> dict[str, Any]:
    """Numbers of processes, nodes and restarts, for ``env.json``."""
    here = world()
    return {"processes": here.size, "nodes": here.nodes, "restarts": here.restarts}
