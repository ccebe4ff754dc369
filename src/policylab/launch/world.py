"""The processes of a run, as their environment tells: none but this one, or those of torchrun, SLURM or our own launch.

Known before Lightning or a process group is there, so that the processes can agree on a folder and compare configs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from policylab.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

T = TypeVar("T")

#: A process that waits longer than this for another at the start gives up.
START_TIMEOUT = timedelta(minutes=10)
#: Under SLURM, ports from here on, ten thousand of them, are those of torch; ours are as many above.
SLURM_PORTS, STORE_OFFSET = 15_000, 10_000


@dataclass(frozen=True)
class World:
    """Where this process stands among those of the run."""

    rank: int = 0  #: over all nodes
    size: int = 1
    local_rank: int = 0  #: on this node
    local_size: int = 1
    restarts: int = 0  #: times that the group was started again after a failure

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines, each with the same number of processes."""
        return self.size // self.local_size


def world(environment: Mapping[str, str] = os.environ) -> World:
    """The processes that exist.

    Raises:
        UserError: when nodes have different numbers of them.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return World(
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]),
            local_size=int(environment["LOCAL_WORLD_SIZE"]),
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    # Of the step that srun has started: the script of sbatch and the shell of salloc have the variables of their whole
    # job, and no tasks beside them.
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


def agreed(name: str, value: T | None) -> T:
    """What the process of rank 0 says, on all processes: plain data. All must call it, in the same order.

    Args:
        name: for whom, in messages.
        value: on rank 0; the others' is not looked at.

    Raises:
        UserError: when rank 0 says nothing for ten minutes.
    """
    here = world()
    if here.size == 1:
        assert value is not None
        return value
    key = f"{name}/{_calls(name)}"
    store = _store()
    if here.main:
        store.set(key, json.dumps(value))
        assert value is not None
        return value
    try:
        said: T = json.loads(store.get(key))
        return said
    except RuntimeError as error:
        raise UserError(f"the process of rank 0 said nothing about {name} for {START_TIMEOUT}") from error


def lasting(name: str, make: Callable[[], str]) -> str:
    """What rank 0 makes, on all processes, and again the same when the group is started again after a failure."""
    here = world()
    if here.size == 1:
        return make()
    store = _store()
    if here.main and not store.check([name]):
        store.set(name, make())
    return store.get(name).decode()


def demand_same(name: str, text: str) -> None:
    """Refuses to go on when the processes hold different texts.

    Raises:
        UserError: on every process, naming those that differ from rank 0.
    """
    here = world()
    if here.size == 1:
        return
    store, turn = _store(), _calls(name)
    store.set(f"{name}/{turn}/{here.rank}", hashlib.sha256(text.encode()).hexdigest())
    try:
        said = [store.get(f"{name}/{turn}/{rank}") for rank in range(here.size)]
    except RuntimeError as error:
        raise UserError(
            f"not all {here.size} processes have said what their {name} is, in {START_TIMEOUT}"
        ) from error
    others = [str(rank) for rank in range(here.size) if said[rank] != said[0]]
    if others:
        raise UserError(
            f"the {name} of rank {', '.join(others)} is not that of rank 0; start all processes with the same command"
        )


@cache
def _store() -> TCPStore:
    """A place where the processes leave texts for one another."""
    from torch.distributed import TCPStore

    here = world()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it is there already
        host, port, serves = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), False
    else:  # beside the one that torch will open, and far from those of the jobs that SLURM numbers next
        host, port, serves = *main_address(), here.main
        port += STORE_OFFSET if port + STORE_OFFSET < 2**16 else -STORE_OFFSET
    return TCPStore(host, port, here.size, serves, START_TIMEOUT)


def main_address(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of rank 0: as torchrun says, or anybody else; under SLURM else its first node, and a port by the
    job's number."""
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


#: Times that each name has been agreed on by this process.
_turns: dict[str, int] = {}


def _calls(name: str) -> str:
    """Another word each time, the same one on all processes."""
    _turns[name] = _turns.get(name, 0) + 1
    return f"{world().restarts}/{_turns[name]}"


def in_environment() -> dict[str, Any]:
    """For ``env.json``."""
    here = world()
    return {"processes": here.size, "nodes": here.nodes, "restarts": here.restarts}
