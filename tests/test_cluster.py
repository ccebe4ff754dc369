"""Runs of several real processes: they start, agree on settings, and end together.

Each test takes the time to import everything in at least two processes, so there are few tests, and they share runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from conftest import evaluated
from policylab.cli.entry import flags_first
from policylab.distributed.world import World, main_address, world
from policylab.errors import ProcessFailed, UserError
from policylab.launch.failures import first_error, write_error
from policylab.runs.metrics_file import read_rows
from policylab.runs.status import read_status

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "train.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

#: Three iterations of tiny numbers.
SMALL = [
    "debug=fast",
    "task=random_walks",
    "model=walker_scratch",
    "iterations=3",
    "callbacks.checkpoint.every=1",
    "reward._target_=unlucky.length",
]
DDP = ["hardware=ddp_cpu", *SMALL]
#: Long enough to be stopped before it ends.
LONG = "iterations=1000"
#: Rewards; some end their process.
REWARDS = '''
import os, signal, time
from pathlib import Path

CALLS = 0

def length(completions):
    return [float(len(completion.tokens)) for completion in completions]

def unlucky_rank(completions):
    """Whether this is the fourth call on rank 1: in the second iteration."""
    global CALLS
    CALLS += 1
    return CALLS == 4 and os.environ["RANK"] == "1"

def killed(completions):
    if unlucky_rank(completions):
        os.kill(os.getpid(), signal.SIGKILL)
    return length(completions)

def killed_once(completions):
    if unlucky_rank(completions) and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return length(completions)

def slow_at_first(completions):
    """Slow in the process that calls it first."""
    mine = Path("first")
    if not mine.exists():
        mine.write_text(str(os.getpid()))
    time.sleep(2 * (mine.read_text() == str(os.getpid())))
    return length(completions)

def failing(completions):
    if unlucky_rank(completions):
        raise RuntimeError("no luck")
    if CALLS == 4:
        time.sleep(600)
    return length(completions)

def witness():
    """A callback that notes what each rank has trained with."""
    from lightning import Callback

    class Witness(Callback):
        def on_train_end(self, trainer, pl_module):
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            Path(trainer.default_root_dir, f"lr_{trainer.global_rank}").write_text(repr(lr))

    return Witness()
'''


class Running:
    """A command with a mark in its environment, by which all processes that it starts are found.

    Args:
        arguments: arguments of the Python interpreter.
        folder: current folder of the command; files with its output are written there.
        name: prefix of the names of these files.
        variables: added to the environment.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, name: str = "", **variables: str) -> None:
        self.output, self.errors = folder / f"{name}out.txt", folder / f"{name}err.txt"
        mark = uuid.uuid4().hex
        self.mark = f"POLICYLAB_TEST={mark}".encode()
        with self.output.open("w") as out, self.errors.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, **variables, "POLICYLAB_TEST": mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # and group, to interrupt it as a terminal does
            )

    def members(self) -> list[int]:
        """All its live processes."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # of another user, or it has ended meanwhile
                if self.mark in environment.read_bytes():
                    found.append(int(environment.parent.name))
        return found

    def wait(self, seconds: float = 400) -> int:
        """Waits for the exit code, then ends all remaining processes."""
        try:
            return self.process.wait(seconds)
        finally:
            self.end()

    def end(self) -> None:
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def told(self) -> str:
        """The text of standard error."""
        return self.errors.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A current folder that holds the rewards."""
    (tmp_path / "unlucky.py").write_text(REWARDS)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Running]]:
    """``start("iterations=3")`` trains in ``folder / "run"``; what still runs at the end of a test is ended."""
    started = list[Running]()

    def begin(*overrides: str, command: Sequence[str] = (), **options: str) -> Running:
        place = [f"hydra.run.dir={folder}/run", f"paths.logs={folder}/logs"]
        started.append(Running([*command, TRAIN, *place, *overrides], folder, **options))
        return started[-1]

    yield begin
    for running in started:
        running.end()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "unlucky.py").write_text(REWARDS)
    run = Running(
        [TRAIN, *DDP, f"hydra.run.dir={folder}/run", f"paths.logs={folder}/logs"],
        folder,
    )
    assert run.wait() == 0, run.told()
    assert run.told() == ""
    return folder / "run"


def same(one: Path, other: Path) -> None:
    """Asserts that two runs have the same weights and metrics, to the bit."""
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (one, other)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith("perf/")}
            for row in read_rows(run / "metrics.csv")
        ]
        for run in (one, other)
    ]
    assert rows[0] == rows[1]


def until(condition: Callable[[], Any], seconds: float = 300) -> None:
    """Waits until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def iteration(run: Path) -> int:
    return int(read_status(run).get("iteration", 0))


def saved_iteration(run: Path) -> int:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return int(content["policylab"]["iteration"])


# -- started by train.py itself -----------------------------------------------------------------------------------


#: Runs train.py as a command line does, in a process whose state can be read afterwards.
LOOK = """
import json, multiprocessing, os, runpy, signal, sys
from pathlib import Path

def look():
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
    return {
        "environment": dict(os.environ),
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGHUP, signal.SIGURG, signal.SIGCHLD)],
        "children": [c for c in commands if "resource_tracker" not in c],
        "active": len(multiprocessing.active_children()),
    }

sys.argv = sys.argv[1:]
from policylab.cli.entry import ENVIRONMENT
os.environ.update({"HYDRA_FULL_ERROR": "1", **ENVIRONMENT})  # train.py sets them for itself
before = look()
runpy.run_path(sys.argv[0], run_name="__main__")
Path("look.json").write_text(json.dumps([before, look()]))
"""


@pytest.mark.slow
def test_a_multirun_has_one_folder_a_job_and_leaves_nothing_behind(folder: Path) -> None:
    (folder / "look.py").write_text(LOOK)
    sweep = ["-m", "algo=ppo,rloo", f"hydra.sweep.dir={folder}/sweep", f"paths.logs={folder}/logs"]
    run = Running(["look.py", TRAIN, *DDP, "iterations=1", *sweep], folder)
    assert run.wait() == 0, run.told()
    assert run.told() == ""
    jobs = sorted(path.parent for path in folder.rglob("status.json"))
    assert [job.relative_to(folder).as_posix() for job in jobs] == [
        "sweep/ppo",
        "sweep/rloo",
    ]
    for job in jobs:
        assert read_status(job)["status"] == "done"
        assert [row["iteration"] for row in read_rows(job / "metrics.csv")] == [0, 1]
        assert json.loads((job / "env.json").read_text())["processes"] == 2
    before, after = json.loads((folder / "look.json").read_text())
    assert before == after
    assert after["children"] == []


@pytest.mark.slow
def test_one_process_evaluates_what_two_have_trained(uninterrupted, monkeypatch):
    monkeypatch.syspath_prepend(uninterrupted.parent)
    result = evaluated(uninterrupted)
    own = read_rows(uninterrupted / "metrics.csv")[-1]
    assert result["metrics"].pop("val/pass@1") <= 1
    assert {name: own[name] for name in result["metrics"]} == pytest.approx(result["metrics"], abs=1e-6)


def interrupt_group(running: Running) -> None:
    """Sends SIGINT to the group, as a terminal does at Ctrl-C."""
    os.killpg(running.process.pid, signal.SIGINT)


def terminate_all(running: Running) -> None:
    """Sends SIGTERM to every process, as SLURM and systemd do."""
    for pid in running.members():
        os.kill(pid, signal.SIGTERM)


def terminate_launcher(running: Running) -> None:
    """Sends SIGTERM to the first process of the container, as Kubernetes does."""
    running.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        pytest.param(interrupt_group, 130, marks=pytest.mark.slow),
        pytest.param(terminate_all, 75, marks=pytest.mark.slow),
        pytest.param(terminate_launcher, 75, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_within_seconds_and_the_state_is_saved(start, folder, ask, code):
    running = start(*DDP, LONG, "callbacks.checkpoint.every=1000")
    until(lambda: iteration(folder / "run") >= 2)
    ask(running)
    asked = time.monotonic()
    assert running.process.wait(60) == code, running.told()
    assert time.monotonic() - asked < 20
    until(lambda: not running.members(), 5)
    assert running.told() == ""
    status = read_status(folder / "run")
    assert status["status"] == "interrupted"
    assert saved_iteration(folder / "run") == status["iteration"] >= 2


def test_a_failing_rank_ends_all_and_its_error_comes_first(start, folder):
    running = start(*DDP, "reward._target_=unlucky.failing")
    assert running.wait() == 1
    assert running.told().startswith("error: reward failing failed at unlucky.py:")
    assert running.told().rstrip().endswith("RuntimeError: no luck")
    assert "Traceback" not in running.told()
    assert (folder / "run/train.log").read_text().count("Traceback") >= 1
    assert read_status(folder / "run")["status"] == "failed"
    assert "no luck" in read_status(folder / "run")["exception"]


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_with_its_group_and_nothing_changes(start, folder, uninterrupted):
    running = start(*DDP, "reward._target_=unlucky.killed_once", "hardware.max_restarts=1")
    assert running.wait() == 0, running.told()
    assert (folder / "killed").exists()
    assert json.loads((folder / "run" / "env.json").read_text())["restarts"] == 1
    assert [path.parent for path in folder.rglob("status.json")] == [folder / "run"]
    same(folder / "run", uninterrupted)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(start):
    running = start(*DDP, "reward._target_=unlucky.killed")
    assert running.wait() == 1
    assert running.told().startswith(
        "the process of rank 1 was ended by SIGKILL, which the system sends when memory"
    )


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, restarts: int = 0) -> None:
    """Sets the variables of a process that torchrun has started as one of two."""
    variables = {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_what_failed_first_is_told(tmp_path, monkeypatch):
    killed = {1: SimpleNamespace(exitcode=-signal.SIGKILL)}
    raised = {0: SimpleNamespace(exitcode=1)}
    run = tmp_path / "run"
    assert str(first_error(tmp_path, raised, run)).endswith(
        "rank 0 ended with code 1 without an error message"
    )
    run.mkdir()
    (run / "status.json").touch()
    told = str(first_error(tmp_path, killed, run))
    assert "rank 1 was ended by SIGKILL, which the system sends when memory runs out; go on from" in told
    assert told.endswith(f": python train.py resume={run}")
    for rank, restarts, text in [(0, 0, "before"), (1, 1, "the first"), (0, 1, "what follows")]:
        pretend(monkeypatch, rank, restarts)
        write_error(ValueError(text), tmp_path)
    error = first_error(tmp_path, raised, run)
    assert isinstance(error, ProcessFailed)
    assert str(error).startswith("on rank 1:\n")
    assert str(error).endswith("ValueError: the first\n")
    pretend(monkeypatch, 1, 2)
    write_error(UserError("x is wrong"), tmp_path)
    assert isinstance(first_error(tmp_path, raised, run), UserError)
    pretend(monkeypatch, 1, 3)
    try:
        exec(compile("1 / 0", "mine.py", "exec"))
    except ZeroDivisionError as error:
        write_error(error, tmp_path)
    of_theirs = first_error(tmp_path, raised, run)
    assert isinstance(of_theirs, ProcessFailed), "a restart may help"
    assert str(of_theirs) == "on rank 1:\n<module> failed at mine.py:1: ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_process(start, folder):
    running = start(*DDP, LONG)
    until(lambda: iteration(folder / "run") >= 1)
    assert len(running.members()) >= 3
    running.process.kill()
    running.process.wait()
    until(lambda: not running.members(), 10)


# -- started by a sweeper or a launcher of Hydra -------------------------------------------------------------------


@pytest.mark.slow
def test_optuna_gives_all_ranks_the_same_values(folder):
    pytest.importorskip("optuna")
    sweep = ["-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={folder}/sweep"]
    witness = "+callbacks.witness._target_=unlucky.witness"
    run = Running([TRAIN, *DDP, "iterations=1", witness, *sweep, f"paths.logs={folder}/logs"], folder)
    assert run.wait() == 0, run.told()
    jobs = sorted(path.parent for path in folder.rglob("status.json"))
    assert len(jobs) == 2
    rates = [OmegaConf.load(job / "config.yaml").optim.lr for job in jobs]
    assert rates[0] != rates[1]
    for job, rate in zip(jobs, rates, strict=True):
        assert [float((job / f"lr_{rank}").read_text()) for rank in (0, 1)] == [rate, rate]
        assert read_rows(job / "metrics.csv")[-1]["train/lr"] == rate
    best = OmegaConf.load(folder / "sweep" / "optimization_results.yaml")
    assert best.best_params["optim.lr"] in rates


@pytest.mark.slow
def test_submitit_runs_each_job_in_processes_of_its_own(folder):
    pytest.importorskip("submitit")
    sweep = ["-m", "seed=0,1", f"hydra.sweep.dir={folder}/sweep", f"paths.logs={folder}/logs"]
    run = Running([TRAIN, *DDP, "iterations=1", "hydra.launcher.cluster=local", *sweep], folder)
    assert run.wait() == 0, run.told()
    jobs = sorted(path.parent for path in folder.rglob("status.json"))
    assert [job.name for job in jobs] == ["s0", "s1"]
    for job in jobs:
        assert read_status(job)["status"] == "done"
        assert json.loads((job / "env.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_job_is_requeued_at_its_time_limit(folder):
    """submitit's signal comes half a minute before the limit of one minute."""
    pytest.importorskip("submitit")
    launcher = ["hydra.launcher.cluster=local", "hydra.launcher.submitit.timeout_min=1"]
    sweep = ["-m", "seed=0", f"hydra.sweep.dir={folder}/sweep", f"paths.logs={folder}/logs"]
    sizes = [*SMALL, "hardware=cpu", "iterations=60", "reward._target_=unlucky.slow_at_first"]
    run = Running([TRAIN, *sizes, *launcher, *sweep], folder)
    assert run.wait() == 0, run.told()
    assert read_status(folder / "sweep" / "job")["status"] == "done"
    rows = read_rows(folder / "sweep" / "job" / "metrics.csv")
    assert [row["iteration"] for row in rows] == list(range(61))
    assert len(json.loads((folder / "sweep" / "job" / "env.json").read_text())["earlier_sessions"]) >= 1


# -- started by torchrun ------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def two_nodes(start: Callable[..., Running], *overrides: str, others: Sequence[str] = ()) -> list[Running]:
    """Starts two agents on this machine that connect as those of two machines do.

    Args:
        others: overrides of the second agent only.
    """
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--local-addr=localhost"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=test"]
    return [
        start(*overrides, *more, command=[*torchrun, *meeting], name=f"node{number}_")
        for number, more in enumerate([(), others])
    ]


@pytest.mark.slow
def test_two_nodes_are_one_run_and_equal_two_processes(start, folder, uninterrupted):
    nodes = two_nodes(start, *DDP)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].told() + nodes[1].told()
    assert [path.parent for path in folder.rglob("status.json")] == [folder / "run"]
    environment = json.loads((folder / "run" / "env.json").read_text())
    assert (environment["processes"], environment["nodes"]) == (2, 2)
    assert sum(bool(node.output.read_text()) for node in nodes) == 1, "one process speaks"
    same(folder / "run", uninterrupted)


@pytest.mark.slow
def test_processes_of_different_configs_refuse_to_start(start, folder):
    nodes = two_nodes(start, *DDP, others=["optim.lr=0.5"])
    assert all(node.wait() != 0 for node in nodes)
    said = sorted(line for node in nodes for line in node.told().splitlines() if line.startswith("error"))
    assert said == [
        "error on rank 1: the config of rank 1 is not that of rank 0; start all processes with the same command",
        "error: the config of rank 1 is not that of rank 0; start all processes with the same command",
    ]
    assert not list(folder.rglob("status.json"))


@pytest.mark.slow
def test_torchrun_on_one_machine(start, folder, uninterrupted):
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    running = start(*DDP, command=command)
    assert running.wait() == 0, running.told()
    same(folder / "run", uninterrupted)


def test_a_multirun_under_torchrun_is_refused(monkeypatch):
    pretend(monkeypatch, rank=0)
    with pytest.raises(UserError, match="-m under torchrun or srun would run the sweep 2 times"):
        flags_first(["-m", "seed=0,1"])


# -- started by SLURM ---------------------------------------------------------------------------------------------


def step(rank: int, tasks: int = 2, nodes: int = 1, nodelist: str = "localhost") -> dict[str, str]:
    """The variables of srun that we read."""
    return {
        "SLURM_JOB_ID": "4217",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NODELIST": nodelist,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % (tasks // nodes)),
    }


def test_tasks_of_a_slurm_step_are_processes():
    here = world(step(rank=5, tasks=8, nodes=2))
    assert here == World(rank=5, size=8, local_rank=1, local_size=4)
    assert here.nodes == 2
    assert world({**step(rank=0), "SLURM_RESTART_COUNT": "3"}).restarts == 3
    batch_script = {"SLURM_JOB_ID": "4217", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert world(batch_script) == World(), "it has no tasks beside it"
    with pytest.raises(UserError, match="3 tasks on 2 nodes"):
        world({**step(rank=0, tasks=4, nodes=2), "SLURM_STEP_NUM_TASKS": "3"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[03-05,9],login1", "gpu03"), ("gpu7,gpu9", "gpu7"), ("a[12]-ib,x", "a12-ib"), ("r1-n2", "r1-n2")],
)
def test_the_first_node_of_a_step_is_the_main_one(nodelist, host):
    assert main_address(step(0, nodelist=nodelist)) == (host, 19217)
    assert main_address({**step(0), "MASTER_ADDR": "here", "MASTER_PORT": "1234"}) == ("here", 1234)


@pytest.mark.slow
def test_tasks_of_a_slurm_step_are_one_run(start, folder, uninterrupted):
    """Two processes with the variables that srun would give them."""
    port = {"MASTER_PORT": str(free_port())}
    tasks = [start(*DDP, name=f"task{rank}_", **step(rank), **port) for rank in range(2)]
    assert [task.wait() for task in tasks] == [0, 0], tasks[0].told() + tasks[1].told()
    assert [path.parent for path in folder.rglob("status.json")] == [folder / "run"]
    same(folder / "run", uninterrupted)
