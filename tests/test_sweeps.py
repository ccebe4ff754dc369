"""Sweeps: their jobs, which of them run, how they end, and resuming after a kill."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from policylab.cli.messages import improve
from policylab.distributed.signals import Interrupted
from policylab.errors import UserError
from policylab.runs.command import with_sweep
from policylab.runs.find import SWEEP_FILE, find_sweep
from policylab.runs.folder import write_json
from policylab.runs.metrics_file import read_rows, read_tail
from policylab.runs.status import read_status
from policylab.sweeps import pool, slots
from policylab.sweeps.choices import Choices, sweep_words
from policylab.sweeps.cluster import Cluster
from policylab.sweeps.ending import same_command, selection
from policylab.sweeps.index import Index
from policylab.sweeps.jobs import Job, identity, label_of
from policylab.sweeps.pool import Outcome, Pool
from policylab.sweeps.process import JobProcess, is_alive
from policylab.sweeps.progress import Progress
from policylab.sweeps.slots import Slots
from policylab.sweeps.sweep import Sweep
from policylab.sweeps.table import View, table

ROOT = Path(__file__).parent.parent


# -- jobs -------------------------------------------------------------------------------------------------


def test_a_job_is_identified_by_its_overrides_in_any_order_without_its_paths():
    assert identity(["seed=0", "algo=ppo"]) == identity(
        ["algo=ppo", "seed=0", "logger=wandb", "paths.logs=x"]
    )
    assert identity(["seed=0"]) != identity(["seed=1"])
    assert "SECRET" not in identity(["+reward.api_key=SECRET1"])


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (["seed=3", "algo=ppo"], "ppo_s3"),
        (["seed=0", "model=tiny", "algo=ppo", "task=reviews"], "reviews_ppo_tiny_s0"),
        (["optim.lr=0.001", "algo/kl=none", "seed=0"], "lr-0.001_kl-none_s0"),
        (["+model.architecture={n_layer:1}"], "architecture--n_layer-1"),
        (["debug=fast"], "job"),
        (["~algo_model="], "algo_model"),
        (["reward.words='a b/c'"], "words-a-b-c"),
        (["reward._target_=mine.brief"], "reward-mine.brief"),
    ],
)
def test_a_label_has_the_overrides_that_differ(words, label):
    assert label_of(words, ["debug=fast"], {}) == label


def test_labels_are_never_shared_and_never_too_long():
    first = label_of(["optim.lr=1"], [], {})
    second = label_of(["algo.critic.lr=1"], [], {first: identity(["optim.lr=1"])})
    assert (first, second[:5]) == ("lr-1", "lr-1_")
    assert label_of(["optim.lr=1"], [], {first: identity(["optim.lr=1"])}) == first, "its own"
    assert len(label_of([f"name.x={'a' * 300}", "seed=0"], [], {})) < 100


class Loader:
    """A loader with config groups, like Hydra's."""

    def get_group_options(self, group: str, results_filter: Any = None) -> list[str]:
        options = {"algo": ["ppo", "rloo", "grpo"], "model": ["tiny"], "reward": ["sentiment", "length"]}
        return options.get(group, [])


def test_each_algorithm_gets_its_own_value():
    words = ["algo=ppo,rloo", "seed=0,1", "iterations=5", "optim.lr={ppo:7e-4,rloo:3e-4}"]
    choices = Choices(words, Loader())
    assert choices.shared == ["iterations=5"]
    assert choices.swept == {"algo", "seed", "optim.lr"}
    for algo, rate in (("ppo", "0.0007"), ("rloo", "0.0003")):
        job = [f"algo={algo}", "seed=0", "iterations=5", "optim.lr={ppo:0.0007,rloo:0.0003}"]
        assert choices.own(job) == [f"algo={algo}", "seed=0", "iterations=5", f"optim.lr={rate}"]


def test_values_by_choice_may_leave_choices_out_and_name_no_others():
    choices = Choices(["algo=ppo,rloo", "optim.lr={ppo:7e-4}"], Loader())
    assert choices.own(["algo=rloo", "optim.lr={ppo:0.0007}"]) == ["algo=rloo"], "its config's value is used"
    choices = Choices(["algo=ppo,rloo", "optim.lr={ppo:7e-4,grpo:1e-3}"], Loader())
    with pytest.raises(UserError, match=r"optim\.lr has a value for grpo, and this sweep has algo=ppo,rloo"):
        choices.own(["algo=ppo", "optim.lr={ppo:0.0007,grpo:0.001}"])


def test_a_dict_that_names_no_choice_is_a_value():
    word = "model.architecture={n_layer:1,n_head:2}"
    choices = Choices(["algo=ppo,rloo", word], Loader())
    assert choices.own(["algo=ppo", word]) == ["algo=ppo", word]
    assert choices.shared == [word]


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["reward=sentiment", "+reward.weights={sentiment:1.0}"], "+reward.weights={sentiment:1.0}"),
        (["reward=sentiment,length", "+reward.weights={sentiment:1.0}"], "+reward.weights=1.0"),
        (["algo=ppo", "optim.lr={ppo:0.1}"], "optim.lr=0.1"),
        (["algo=ppo", "+reward.weights={sentiment:1.0}"], "+reward.weights={sentiment:1.0}"),
    ],
)
def test_a_dict_of_a_group_with_one_choice_is_a_value_inside_that_group(words, own):
    choice = words[0].split(",")[0]
    assert Choices([*words, "seed=0,1"], Loader()).own([choice, words[1], "seed=0"]) == [
        *(choice, own, "seed=0")
    ]


def test_jobs_with_the_same_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("policylab.sweeps.sweep.check", lambda _: None)
    content = {"hydra": {"job": {"id": None}, "sweep": {"subdir": "same"}}}
    loader = SimpleNamespace(load_sweep_config=lambda *_: OmegaConf.create(content))
    sweep = object.__new__(Sweep)
    sweep.config, sweep.context = None, SimpleNamespace(config_loader=loader)
    sweep.choices, sweep.index = Choices(["seed=0,1"], Loader()), begun(tmp_path, [], {"seed"})
    sweep.folder, sweep.logs, sweep.places, sweep.cluster = tmp_path, tmp_path, {}, "slurm"
    assert sweep.job(["seed=0"]) == sweep.job(["seed=0"])
    with pytest.raises(UserError, match=r"jobs s0 and s1 have the same folder .*/same; put every swept key"):
        sweep.job(["seed=1"])


def test_the_command_line_overrides_the_recipe():
    words = sweep_words({"algo": "ppo,rloo", "seed": "0,1,2"}, ["seed=0"])
    assert Choices(words, Loader()).shared == ["seed=0"]
    assert Choices(["optim.lr=interval(1,2)"], Loader()).values == {"optim.lr": []}


# -- the record -------------------------------------------------------------------------------------------


def begun(folder: Path, shared: list[str], swept: set[str], *, resume: bool = False, **values: Any) -> Index:
    index = Index(folder, resume=resume)
    try:
        index.begin(shared, swept, lambda _: {"optim.lr": 1e-3, **values})
    except UserError:
        index.close()
        raise
    return index


def test_jobs_keep_their_folder_when_other_keys_are_swept(tmp_path):
    index = begun(tmp_path, ["algo=ppo"], {"seed"})
    assert [index.label(["algo=ppo", f"seed={seed}"]) for seed in (0, 1)] == ["s0", "s1"]
    index.add_failure(Job("s1", (), tmp_path), "why")
    index.close()
    with (tmp_path / SWEEP_FILE).open("a") as file:
        file.write('{"job": "torn')
    index = begun(tmp_path, [], {"algo", "seed"}, resume=True)
    assert index.failed == {"s1": "why"}
    assert index.label(["seed=1", "algo=ppo"]) == "s1"
    assert index.label(["seed=1", "algo=rloo"]) == "rloo_s1"
    index.close()
    index = begun(tmp_path, ["seed=7"], {"algo"}, resume=True)  # one value of what was swept
    assert index.label(["seed=7", "algo=rloo"]) == "rloo_s7"
    assert all(json.loads(line) for line in (tmp_path / SWEEP_FILE).read_text().splitlines())


def test_another_base_is_refused_and_listed(tmp_path):
    begun(tmp_path, ["iterations=5", "debug=fast"], {"seed"}).close()
    before = (tmp_path / SWEEP_FILE).read_text()
    with pytest.raises(UserError) as told:
        begun(tmp_path, ["iterations=6", "task=reviews"], {"seed"}, resume=True)
    for difference in (
        *(
            "iterations=5 before, iterations=6 now",
            "debug=fast before, no debug now",
            "no task before, task=reviews now",
        ),
    ):
        assert difference in str(told.value)
    with pytest.raises(
        UserError, match=r"is another sweep .*: kl was None, now 2; use the same overrides and config files"
    ):
        begun(tmp_path, ["iterations=5", "debug=fast"], {"seed"}, resume=True, kl=2)
    assert (tmp_path / SWEEP_FILE).read_text() == before


def test_one_process_at_a_time_and_nothing_is_overwritten(tmp_path):
    index = begun(tmp_path, [], {"seed"})
    for resume in (True, False):
        with pytest.raises(UserError, match=rf"is running, as process {os.getpid()} of .*; wait for its end"):
            Index(tmp_path, resume=resume)
    index.close()
    with pytest.raises(UserError, match=r"already holds a sweep; to resume it, give sweep="):
        Index(tmp_path, resume=False)


# -- sweep= -----------------------------------------------------------------------------------------------


def test_sweep_names_a_folder(tmp_path):
    begun(tmp_path / "sweep", [], set()).close()
    words = with_sweep(["-m", "seed=0,1", f"sweep={tmp_path}/sweep", "hydra.sweep.dir=x"])
    assert words == ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep", "hydra.launcher.resume=true"]
    (tmp_path / "latest_sweep").symlink_to("sweep")
    assert find_sweep("latest", tmp_path) == tmp_path / "sweep"
    assert with_sweep(["seed=0", "resume=latest"]) == ["seed=0", "resume=latest"]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"is not a sweep: it has no sweep\.jsonl; give the folder of a multirun"
    ):
        find_sweep(tmp_path)
    with pytest.raises(UserError, match=r"sweep=latest, but .*latest_sweep does not exist"):
        find_sweep("latest", tmp_path)
    with pytest.raises(
        UserError, match=r"resume= is for a single run; to resume a multirun, give sweep=PATH"
    ):
        with_sweep(["-m", "resume=latest"])
    told = "Could not override 'sweep'.\nTo append to your config use +sweep=latest"
    assert improve(told) == "sweep= resumes a multirun: give it with -m and the arguments of that multirun"


# -- shares of the machine --------------------------------------------------------------------------------


def job(label: str = "a", folder: Path = Path(), processes: int = 1, on_gpus: bool = False) -> Job:
    return Job(label, (f"x={label}",), folder, processes, on_gpus)


def test_the_cores_limit_the_jobs_at_once(monkeypatch):
    monkeypatch.setattr(slots, "cores", lambda: 4)
    shares = Slots(None, threads=1)
    first = shares.take(job(processes=2))
    assert shares.take(job())
    assert shares.take(job(processes=2)) is None
    shares.free(first)
    assert shares.take(job(processes=3))
    assert Slots(None, threads=8).take(job()), "too large for the machine: alone"
    few = Slots(1, threads=1)
    assert few.take(job())
    assert few.take(job()) is None


def test_gpus_are_pinned_and_shared_only_if_asked(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    shares = Slots(None, threads=1)
    first, second = shares.take(job(on_gpus=True)), shares.take(job(on_gpus=True))
    assert shares.environment(first) == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "3"}
    assert second.gpus == ("5",)
    assert shares.take(job(on_gpus=True)) is None
    shares = Slots(3, threads=1)
    assert [shares.take(job(on_gpus=True)).gpus for _ in range(3)] == [("3",), ("5",), ("3",)]
    assert Slots(None, threads=1).take(job(processes=2, on_gpus=True)).gpus == ("3", "5")


def test_a_cluster_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match=r"hydra\.launcher\.cluster=pbs is not one of slurm, local"):
        Cluster("pbs", tmp_path, {})
    with pytest.raises(UserError, match=r'hydra\.launcher\.cluster=local: Parameter "nodes" expected type'):
        Cluster("local", tmp_path, {"nodes": "two", "cpus_per_task": None})
    with pytest.raises(UserError, match=r"Unknown argument 'color' for executor 'slurm'"):
        Cluster("local", tmp_path, {"slurm_color": "red"})


# -- the pool ---------------------------------------------------------------------------------------------


class Pretended:
    """A stub of a process that ends with this code at the second check."""

    def __init__(self, job: Job, code: int) -> None:
        self.job, self.final, self.looks = job, code, 0
        self.log = SimpleNamespace(
            warnings=lambda: [] if self.looks else ["careful"], reason=lambda code: f"code {code}"
        )

    def code(self) -> int | None:
        self.looks += 1
        if self.looks < 2:
            return None
        if self.final == 0:
            put_status(self.job.folder, "done")
        return self.final

    def stop(self) -> None:
        self.final = 75

    def kill(self) -> None:
        self.final = -9


def put_status(folder: Path, state: str, iteration: int = 2, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "status.json", {"status": state, "iteration": iteration, "iterations": 2, **more})


def nobody(one: Job) -> bool:
    return False


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs jobs with these exit codes, two at once; returns their outcomes and the labels of the started ones."""
    monkeypatch.setattr(pool, "LOOK", 0)

    def run_all(
        codes: dict[str, int], fail_fast: bool = False, alive: Any = nobody
    ) -> tuple[dict[str, str], list[str]]:
        started = list[str]()

        def start(one: Job, slot: Any) -> Any:
            started.append(one.label)
            return Pretended(one, codes[one.label])

        jobs = [job(label, tmp_path / label) for label in codes]
        runs = Pool(start, alive, Slots(2, 1), View(), fail_fast=fail_fast).run(iter(jobs))
        return {outcome.job.label: outcome.state for outcome in runs}, started

    return run_all


def test_done_jobs_are_skipped_and_failures_do_not_stop_the_others(run, tmp_path, capsys):
    put_status(tmp_path / "a", "done")
    put_status(tmp_path / "b", "failed", 1)
    put_status(tmp_path / "c", "interrupted", 1)
    states, started = run({"a": 0, "b": 0, "c": 2, "d": 0})
    assert states == {"a": "done", "b": "done", "c": "failed", "d": "done"}
    assert started == ["b", "c", "d"]
    said = capsys.readouterr().out.splitlines()
    assert "b  resumes after iteration 1 of 2" in said
    assert "c  failed: code 2" in said
    assert "d  warning: careful" in said


def test_fail_fast_stops_the_others(run):
    states, started = run({"a": 1, "b": 0, "c": 0}, fail_fast=True)
    assert started == ["a", "b"]
    assert states["a"] == "failed"
    assert "c" not in states


def test_a_signal_stops_all_and_starts_none(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "LOOK", 0)

    def start(one: Job, slot: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return Pretended(one, 0)

    runs = Pool(start, nobody, Slots(1, 1), View(), fail_fast=False).run(
        [job("a", tmp_path / "a"), job("b", tmp_path / "b")]
    )
    outcomes = list[Outcome]()
    with pytest.raises(Interrupted):
        outcomes.extend(runs)
    assert [(outcome.job.label, outcome.state) for outcome in outcomes] == [("a", "interrupted")]


def test_a_job_that_another_session_runs_is_waited_for(run):
    looks = iter([True, True, True])
    states, started = run({"a": 0, "b": 0}, alive=lambda one: one.label == "a" and next(looks, False))
    assert started == ["b", "a"]
    assert states == {"a": "done", "b": "done"}


def test_the_next_job_is_taken_when_there_is_room_for_it(tmp_path, monkeypatch):
    """So that a sweeper can choose it by earlier results."""
    monkeypatch.setattr(pool, "LOOK", 0)
    told = list[str]()

    def jobs() -> Iterator[Job]:
        for label in "abc":
            told.append(f"take {label}")
            yield job(label, tmp_path / label)

    for outcome in Pool(lambda one, _: Pretended(one, 0), nobody, Slots(1, 1), View(), fail_fast=False).run(
        jobs()
    ):
        told.append(f"tell {outcome.job.label}")
    assert told.index("tell a") < told.index("take c")


# -- a process --------------------------------------------------------------------------------------------


def started(folder: Path, code: str) -> JobProcess:
    return JobProcess(job("a", folder), [sys.executable, "-c", code], {"OMP_NUM_THREADS": "7"})


def ended(process: JobProcess) -> int:
    while process.code() is None:
        time.sleep(0.01)
    return process.code()


def test_a_jobs_output_is_in_its_log_and_warnings_are_shown(tmp_path):
    (tmp_path / "train.log").write_text("[2026-01-01 00:00:00,000 WARNING x] of before\n")
    line = "[2026-01-01 00:00:00,000 WARNING a.b] look out"
    process = started(
        tmp_path, f"import os; print({line!r}); print(os.environ['OMP_NUM_THREADS'], 'threads')"
    )
    assert ended(process) == 0
    assert process.log.warnings() == ["look out"]
    assert (tmp_path / "train.log").read_text().splitlines()[1:] == [line, "7 threads"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; print('error: x is wrong'); print('bye'); sys.exit(2)", "x is wrong"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("import os; os._exit(3)", "exit code 3, without an error message"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "ended by SIGKILL, which the system sends when memory runs out",
        ),
    ],
)
def test_the_reason_of_a_failure(tmp_path, code, reason):
    process = started(tmp_path, code)
    code = ended(process)
    process.log.warnings()
    assert process.log.reason(code) == reason


def test_a_job_is_alive_as_long_as_one_of_its_processes(tmp_path):
    assert not is_alive(tmp_path)
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = started(tmp_path, child)
    process.process.wait()
    assert is_alive(tmp_path)
    assert process.code() == 0, "its remaining processes are killed with its group"
    deadline = time.monotonic() + 5
    while is_alive(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, env={**__import__("os").environ,
    "POLICYLAB_SWEEP": str(__import__("os").getpid())})
child.stdout.readline()
__import__("os").kill(__import__("os").getpid(), 9)
"""
CHILD = """
import os, sys, time
from pathlib import Path
from policylab.distributed.signals import Interrupted, in_sweep, stop_on_signals, stop_with_sweep
stop_on_signals()
try:
    stop_with_sweep()
    assert in_sweep()
    print("ready", flush=True)
    time.sleep(20)
except Interrupted as stopped:
    Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["PLACE"]).write_text(f"{stopped.exit_code}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a signal")
def test_a_job_stops_when_its_sweep_is_killed(tmp_path):
    place = tmp_path / "stopped"
    subprocess.run([sys.executable, "-c", PARENT, CHILD], env={**os.environ, "PLACE": str(place)}, timeout=20)
    deadline = time.monotonic() + 10
    while not (place.exists() and place.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert place.read_text() == "75"


# -- console output ---------------------------------------------------------------------------------------


def test_progress_comes_from_the_folder(tmp_path):
    put_status(tmp_path, "running", 1)
    (tmp_path / "metrics.csv").write_text("iteration,train/reward,val/reward\n0,,0.25\n1,0.5,\n2,0.7")
    progress = Progress(tmp_path)
    assert (progress.state, progress.iteration, progress.reward, progress.share) == ("started", 1, 0.25, 0.5)
    progress.start()
    progress.began -= 10
    assert progress.seconds_left is None
    put_status(tmp_path, "running", 1, max_tokens=100, tokens_sampled=75)
    progress.iteration = 0
    progress.look()
    assert progress.seconds_left == pytest.approx(10, rel=0.1), "half of the remaining work took ten seconds"
    assert Progress(tmp_path / "none").state == "waiting"


def test_the_end_of_a_long_file_is_read(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("iteration,x\n" + "".join(f"{n},{n / 3}\n" for n in range(5000)) + "5000,")
    rows = read_tail(path)
    assert rows == read_rows(path)[-len(rows) :]
    assert 1000 < len(rows) < 5000
    path.write_text("iteration,x\n1,2\n")
    assert read_tail(path) == [{"iteration": 1, "x": 2}]


def test_the_table_has_a_row_per_job_and_only_running_ones_if_there_is_no_room():
    from rich.console import Console

    jobs = {f"job{n}": Progress(Path("nowhere")) for n in range(6)}
    for name, state in (("job1", "running"), ("job2", "done"), ("job3", "failed")):
        jobs[name].state = state
    jobs["job1"].iteration, jobs["job1"].iterations, jobs["job1"].reward = 3, 20, 0.51234
    console = Console(width=80)

    def text(height: int) -> str:
        with console.capture() as page:
            console.print(table(jobs, height))
        return page.get()

    assert [word in text(10) for word in ("job0", "job5", "3/20", "0.5123")] == [True] * 4
    assert "6 jobs: 3 waiting, 1 running, 1 done, 1 failed" in text(10)
    assert ["job1" in text(2), "job3" in text(2), "job0" in text(2), "job2" in text(2)] == [
        True,
        True,
        False,
        False,
    ]


def test_the_commands_at_the_end_can_be_pasted(tmp_path, monkeypatch):
    words = [
        "-m",
        "algo=ppo,rloo",
        "hydra.sweep.dir=x",
        "hydra.launcher.resume=true",
        "optim.lr={ppo:1,rloo:2}",
    ]
    assert shlex.split(same_command("train.py", words, tmp_path)) == [
        *("python", "train.py", "-m", "algo=ppo,rloo", "optim.lr={ppo:1,rloo:2}", f"sweep={tmp_path}")
    ]
    folders = [tmp_path / name for name in ("a_s0", "a_s1", "b_s0")]
    assert selection("a", folders, folders) == f'runs="{tmp_path}/*"'
    assert selection("a", folders[:2], folders) == f'runs="{tmp_path}/a_*"'
    assert selection("x", folders[1:], folders) == f"runs=[{tmp_path}/a_s1,{tmp_path}/b_s0]"


# -- from the command line --------------------------------------------------------------------------------

REWARDS = """
from pathlib import Path

def length(completions):
    return [float(len(completion.tokens)) for completion in completions]

def broken(completions):
    print("the reward prints this")
    if not Path("mended").exists():
        raise RuntimeError("no luck")
    return length(completions)
"""


@pytest.mark.slow
def test_the_same_command_retries_failures(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    sizes = [
        "debug=fast",
        "task=random_walks",
        "model=walker_scratch",
        "hardware=cpu",
        "callbacks.checkpoint.every=1",
    ]
    words = ["-m", "reward._target_=mine.broken,mine.length", *sizes, f"paths.logs={tmp_path}/logs"]

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train.py"), *words, *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    first = train("iterations=3")
    assert first.returncode == 1, first.stderr
    assert first.stderr == "error: 1 of 2 jobs did not finish: reward-mine.broken\n"
    assert "reward-mine.length  done: reward" in first.stdout
    reason = "reward broken failed at mine.py:10: RuntimeError: no luck"
    assert [line for line in first.stdout.splitlines() if line.startswith("failed")] == [
        f"failed  reward-mine.broken: {reason}"
    ] or reason in first.stdout
    sweep = (tmp_path / "logs" / "latest_sweep").resolve()
    log = (sweep / "reward-mine.broken" / "train.log").read_text()
    assert "the reward prints this" in log
    assert "Traceback" in log
    assert "PolicyLab" in log, "the console output of a run"
    finished = (sweep / "reward-mine.length" / "status.json").read_text()

    other = train("iterations=4", "sweep=latest")
    assert other.returncode == 2
    assert "iterations=3 before, iterations=4 now; use the same overrides" in other.stderr

    (tmp_path / "mended").touch()
    second = train("iterations=3", "sweep=latest")
    assert second.returncode == 0, second.stdout + second.stderr
    assert (sweep / "reward-mine.length" / "status.json").read_text() == finished
    assert read_status(sweep / "reward-mine.broken")["status"] == "done"
    assert {path.name for path in sweep.iterdir()} == {
        *("reward-mine.broken", "reward-mine.length", "sweep.jsonl", "multirun.yaml")
    }
    report = next(line for line in second.stdout.splitlines() if line.startswith("report "))
    assert shlex.split(report)[1:] == [
        *("python", "report.py", f'runs="{short(sweep, tmp_path)}/*"', f"out={short(sweep, tmp_path)}/report")
    ]


def short(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))
