"""The processes of a run, as their environment tells: none but this one, or those of torchrun, SLURM or our own launch.

Known before Lightning or a process group is there, so that the processes can agree on a folder and compare configs.
"""

from __future__ import annotations

import atexit
import hashlib
import json
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

#: A process that waits longer than this for another at the start gives up.
START_TIMEOUT = timedelta(minutes=10)
#: Under SLURM a job listens on one of the ten thousand ports from here on.
SLURM_PORTS = 15_000


@dataclass(frozen=True)
class World:
    """Where this process stands among those of the run."""

    rank: int = 0  #: over all nodes
    size: int = 1
    local_rank: int = 0  #: on this node
    local_size: int = 1
    restarts: int = 0  #: times that the group was started again after a failure
    elastic: bool = False  #: whether torch's launcher watches over it, ours or torchrun's

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
            elastic=True,
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


def agreed(name: str, value: T | None, seconds: float) -> T:
    """What the process of rank 0 says, on all processes: plain data. All must call it, in the same order.

    Args:
        name: for whom, in messages.
        value: on rank 0; the others' is not looked at.
        seconds: that the others wait for it.

    Raises:
        ProcessFailed: when rank 0 says nothing for so long, or is no more.
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
        store.wait([key], timedelta(seconds=seconds))
        said: T = json.loads(store.get(key))
        return said
    except RuntimeError as error:
        raise ProcessFailed(f"the process of rank 0 has not said which {name} ({error})") from error


def lasting(name: str, make: Callable[[], str]) -> str:
    """What rank 0 makes, on all processes, and again the same when the group is started again after a failure."""
    here = world()
    if here.size == 1 and not here.elastic:
        return make()
    store = _store()
    if here.main and not store.check([name]):
        store.set(name, make())
    return store.get(name).decode()


def noted(name: str) -> bool:
    """Whether `note` was called with this name, by this group of processes or one before it."""
    return world().elastic and bool(_store().check([name]))


def note(name: str) -> None:
    """Leaves word for a group that is started again after a failure."""
    if world().elastic:
        _store().set(name, "")


def demand_same(name: str, text: str) -> None:
    """Refuses to go on when the processes hold different texts.

    Raises:
        UserError: on every process, naming those that differ from rank 0.
        ProcessFailed: when not all have come in ten minutes.
    """
    try:
        said = _gathered(name, hashlib.sha256(text.encode()).hexdigest(), START_TIMEOUT)
    except RuntimeError as error:
        raise ProcessFailed(
            f"not all {world().size} processes have said what their {name} is ({error})"
        ) from error
    others = [str(rank) for rank, hashed in enumerate(said) if hashed != said[0]]
    if others:
        raise UserError(
            f"the {name} of rank {', '.join(others)} is not that of rank 0; start all processes with the same command"
        )


def meet(name: str, seconds: float) -> None:
    """Returns when all processes have come here. The first that ends may take the others with it, as torchrun and
    SLURM have it.

    Raises:
        RuntimeError: when they have not, after so many seconds.
    """
    here, timeout = world(), timedelta(seconds=seconds)
    _gathered(name, "here", timeout)
    if here.size > 1:  # rank 0 may hold the store, so it leaves last
        left = [f"{name}/left/{attempt()}/{rank}" for rank in range(1, here.size)]
        if here.main:
            _store().wait(left, timeout)
        else:
            _store().set(left[here.rank - 1], "")


def _gathered(name: str, text: str, timeout: timedelta) -> list[str]:
    """What each process says, by rank."""
    here = world()
    if here.size == 1:
        return [text]
    store, turn = _store(), _calls(name)
    store.set(f"{name}/{turn}/{here.rank}", text)
    keys = [f"{name}/{turn}/{rank}" for rank in range(here.size)]
    store.wait(keys, timeout)
    return [store.get(key).decode() for key in keys]


@cache
def _store() -> TCPStore:
    """A place where the processes leave texts for one another."""
    from torch.distributed import TCPStore

    here = world()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it is there already
        host, port, serves = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), False
    else:
        host, port, serves = *main_address(), here.main
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
    return f"{attempt()}/{_turns[name]}"


@cache
def attempt() -> int:
    """Which group of processes this is, counted from 1 over the restarts of a launcher.

    Torch's launcher keeps one store for all groups, and what a process of an earlier one has left there must not pass
    for the word of a living one. (Its own count of restarts is each node's for itself.) So rank 0 counts, and answers
    the question that each of the others has just asked; of those of an earlier group none hears the answer.

    Raises:
        ProcessFailed: when not all have come in ten minutes.
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
                    raise RuntimeError(f"rank {rank} has not come")
                time.sleep(0.02)
        return number
    except RuntimeError as error:
        raise ProcessFailed(f"not all {here.size} processes have come ({error})") from error


def connect(backend: str, seconds: float) -> None:
    """Makes torch's process group, if there are several processes; Lightning then takes it as it is.

    Args:
        backend: gloo or nccl, or both by device.
        seconds: that one waits for the others in a collective operation.
    """
    here = world()
    if here.size == 1:
        return
    import torch.distributed as dist

    store = dist.PrefixStore(f"group/{attempt()}", _store())
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=here.rank, world_size=here.size)
    if "nccl" in backend:  # it warns otherwise
        atexit.register(dist.destroy_process_group)


def in_environment() -> dict[str, Any]:
    """For ``env.json``."""
    here = world()
    return {"processes": here.size, "nodes": here.nodes, "restarts": here.restarts}
