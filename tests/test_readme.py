"""README's commands work: each is run at a reduced size, or checked as far as possible on this machine.

- ``python train.py``: composed and checked; a multirun with each value. If its model and data are in the repository,
  it is trained for two small iterations, mostly in slow tests. ``plan=true`` prints a plan.
- ``python evaluate.py | generate.py | report.py | runs.py``: composed.
- ``make``, ``pip``, ``pytest``: the named targets, extras and files exist.
- Any other command is an error, because no rule checks it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from conftest import Compose, Train
from doc_blocks import ROOT, blocks
from policylab.cli.commands import as_overrides
from policylab.planning.plan import plan_job
from policylab.runs.words import typed
from small_runs import quick

README = ROOT / "README.md"
BLOCKS = blocks([README])
# What follows a file that the page shows is run with that file by test_docs_examples.py.
COMMANDS = [
    (block.where, words)
    for before, block in zip([None, *BLOCKS], BLOCKS, strict=False)
    if block.language == "bash" and not (before and before.file_name)
    for words in block.commands
]
TRAINING = sorted(
    {shlex.join(words) for _, words in COMMANDS if words[:2] == ["python", "train.py"]}
    - {"python train.py --help", "python train.py --cfg job"}
)
#: Of these, the ones that the fast tests train; test_configs.py has other algorithms and models.
IN_ALL_RUNS = ("python train.py",)
IN_THE_REPOSITORY = ("policylab.models.loading.embedded", "policylab.models.scratch.from_scratch")


def test_readme_has_commands() -> None:
    if not README.read_text().strip():
        pytest.skip("README is not written yet")
    commands = [" ".join(words) for _, words in COMMANDS]
    for command in ("make train", "make test", "pip install -e .[dev]", "python train.py", "pytest"):
        assert command in commands, f"README does not say {command!r}"
    in_ci = (ROOT / ".ci" / "run").read_text().replace("'", "").replace(" --quiet", "")
    assert "pip install -e .[dev]" in in_ci, "continuous integration installs in another way than README"


@pytest.mark.parametrize(
    ("where", "words"), COMMANDS, ids=[f"{where} {' '.join(words)}" for where, words in COMMANDS]
)
def test_command(where: str, words: list[str], compose: Compose) -> None:
    if words[:2] == ["python", "train.py"]:
        check_training(words[2:], compose)
    elif words[0] == "python" and (ROOT / words[1]).is_file():
        own = as_overrides(words[2:]) if words[1] == "runs.py" else words[2:]
        compose([typed(word, (), ["task"]) for word in own], config_name=Path(words[1]).stem)
    elif words[0] in CHECKS:
        CHECKS[words[0]](words[1:])
    else:
        pytest.fail(
            f"{where}: no rule for {' '.join(words)!r}; make one here, or write the command differently"
        )


@pytest.mark.parametrize("command", quick(TRAINING, IN_ALL_RUNS))
def test_it_trains(command: str, compose: Compose, train_briefly: Train) -> None:
    overrides = jobs(shlex.split(command)[2:])[0]
    if runs_here(compose(overrides)):
        train_briefly(overrides)


def check_training(arguments: list[str], compose: Compose) -> None:
    if "--help" in arguments or "--cfg" in arguments:
        command = [sys.executable, "train.py", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return
    for overrides in jobs(arguments):
        config = compose(overrides)
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        if config.plan:
            plan_job(config)


def jobs(arguments: list[str]) -> list[list[str]]:
    """Overrides of each job that a command starts; ``sweep=`` says only where."""
    arguments = [word for word in arguments if not word.startswith("sweep=")]
    return every_value(arguments) if "-m" in arguments or "--multirun" in arguments else [arguments]


def every_value(arguments: list[str]) -> list[list[str]]:
    """A few jobs of a multirun, in which each value of each swept key appears at least once."""
    overrides = [word.split("=", 1) for word in arguments if not word.startswith("-")]
    swept = [[f"{key}={value}" for value in _choices(values)] for key, values in overrides]
    jobs = zip_longest(*swept)
    return [[value or values[0] for value, values in zip(job, swept, strict=True)] for job in jobs]


def _choices(values: str) -> list[str]:
    is_one_value = values.startswith(("[", "{", "'", '"'))
    return [values] if is_one_value else values.split(",")


def test_every_value() -> None:
    assert every_value(["-m", "algo=ppo,reinforce", "seed=0,1,2", "tags=[a,b]"]) == [
        ["algo=ppo", "seed=0", "tags=[a,b]"],
        ["algo=reinforce", "seed=1", "tags=[a,b]"],
        ["algo=ppo", "seed=2", "tags=[a,b]"],
    ]


def runs_here(config: DictConfig) -> bool:
    """Whether model and data lie in the repository, and no earlier run is needed."""
    own_model = config.model._target_ in IN_THE_REPOSITORY and config.model.get("path") is None
    own_data = config.task.get("source", "default") == "default"
    alone = config.resume is None and isinstance(config.init, DictConfig)
    return own_model and own_data and alone and not config.plan


def check_make(arguments: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    for word in arguments:
        for extra in word.partition("[")[2].rstrip("]").split(",") if "[" in word else ():
            assert extra in extras, f"pyproject.toml has no extra {extra!r}"


def check_pytest(arguments: list[str]) -> None:
    for word in arguments:
        assert "/" not in word or (ROOT / word.partition("::")[0]).exists(), f"there is no {word}"


def check_nothing(arguments: list[str]) -> None:
    """Commands of others, which need a network, a browser or a terminal."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "git": check_nothing,
    "cd": check_nothing,
    "tensorboard": check_nothing,
    "wandb": check_nothing,
    "eval": check_nothing,  # tab completion
}
