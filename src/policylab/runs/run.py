"""Runs from Python: `load_run` and `list_runs`. Only a policy needs torch, which is then imported."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from policylab.errors import UserError
from policylab.runs.find import find_policy, find_run, runs_below
from policylab.runs.metrics_file import columns_of, curves_of, read_rows
from policylab.runs.parents import POLICIES, parents_of
from policylab.runs.samples_file import read_samples
from policylab.runs.saved_config import load_config, load_usable
from policylab.runs.status import RUNNING, STATES, read_status, state_of
from policylab.runs.summary import summarize

if TYPE_CHECKING:
    from policylab.models.policy import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run folder. `load_run` and `list_runs` give these.

    Status, metrics and samples are read from the folder at each access, so those of a run in progress are up to date.
    Config and policy are read once.

    Example: ``run = load_run("latest"); run.state, run.summary["after"]["val/reward"], run.rows[-1]``
    """

    path: Path  #: the folder
    which: str = "best"  #: the policy to load: best or final
    trust_remote_code: bool = False  #: whether Python code that comes with the policy may run

    @cached_property
    def config(self) -> DictConfig:
        """The config as it was saved: resolved, except for references to the environment; without secrets."""
        return load_config(self.path)

    @property
    def status(self) -> dict[str, Any]:
        """The content of ``status.json``: iteration, tokens, exception, times."""
        return read_status(self.path)

    @property
    def state(self) -> str:
        """running, done, failed, interrupted or killed."""
        return state_of(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """The validation metrics before and after, the best one, iterations, seconds and tokens.

        The content of ``summary.json``. A run that did not reach its end has none, or that of an earlier session: then
        it comes from ``metrics.csv``, so far.
        """
        status, file = self.status, self.path / "summary.json"
        done = status.get("iteration")
        if file.is_file():
            summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if summary.get("iterations", done) == done:
                return summary
        outcome = {"status": status.get("status"), "iterations": done}
        outcome |= {key: status[key] for key in ("wall_seconds", "tokens_sampled") if key in status}
        return summarize(self.config, self.path, outcome)

    @property
    def rows(self) -> list[dict[str, float]]:
        """``metrics.csv``: a dict for each iteration, without empty cells."""
        return read_rows(self.path / "metrics.csv")

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """``metrics.csv`` by column: ``{"val/reward": {0: 0.12, 10: 0.31}}``."""
        return curves_of(self.rows)

    @property
    def metrics(self) -> Any:
        """``metrics.csv`` as a pandas DataFrame, with the iteration as index; an empty cell is NaN.

        Raises:
            UserError: without pandas.
        """
        try:
            import pandas
        except ImportError:
            raise UserError(
                "metrics is a DataFrame, and pandas is not installed: pip install pandas; without it, rows has the "
                "same as a list of dicts, and curves as a dict of columns"
            ) from None
        rows = self.rows
        return (
            pandas.DataFrame(rows, columns=columns_of(rows)).astype({"iteration": int}).set_index("iteration")
        )

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of ``samples.jsonl`` (`policylab.data.text.Sample`), without one that a crash has cut short."""
        return read_samples(self.path)

    @property
    def parents(self) -> list[dict[str, Any]]:
        """The runs that it descends from (``init=``), the nearest first."""
        return parents_of(self.path)

    @cached_property
    def policy(self) -> Policy:
        """The exported policy, on the CPU, in eval mode. ``policy.lm`` is the transformers model.

        Raises:
            UserError: when the run has not exported it.
        """
        folder = find_policy(self.path, self.which)
        model = load_usable(self.path, ("model",), self.trust_remote_code).model

        from policylab.models.loading import LoadOptions, from_folder
        from policylab.models.policy import Policy

        options = LoadOptions(
            model.dtype, model.attn_implementation, self.trust_remote_code, model.get("chat")
        )
        return Policy(from_folder(folder, options, source=str(folder)), critic=None).eval()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the policy, which is loaded."""
        return self.policy.tokenizer

    def named(self, part: str) -> str:
        """The name of the run's task, algo or model; empty if the config has none."""
        return str(OmegaConf.select(self.config, f"{part}.name") or "")


def load_run(
    run: str | Path, where: str | Path = "logs", *, which: str = "best", trust_remote_code: bool = False
) -> Run:
    """A run, from its folder. A run that is still running gives a warning.

    Args:
        run: what ``run=`` and ``init=`` take: a folder, "latest", or the name of an experiment, of which the newest run
            is taken.
        where: folder of "latest" and of experiments.
        which: the policy to load, "best" or "final".
        trust_remote_code: whether Python code that comes with the policy may run. The config of the run cannot allow
            it.

    Raises:
        UserError: when there is no such run.
    """
    if which not in POLICIES:
        raise UserError(f"which={which!r} is not one of {', '.join(POLICIES)}")
    found = Run(find_run(run, folder(where)), which, trust_remote_code)
    if found.state == RUNNING:
        status = found.status
        log.warning(
            "%s is still running, at iteration %s of %s: its records and policies change",
            *(found.path, status.get("iteration"), status.get("iterations")),
        )
    return found


def list_runs(
    where: str | Path = "logs",
    *,
    task: str | Sequence[str] | None = None,
    algo: str | Sequence[str] | None = None,
    model: str | Sequence[str] | None = None,
    state: str | Sequence[str] | None = None,
) -> list[Run]:
    """All runs in a folder, at any depth, the newest first. One that cannot be read is left out, with a warning.

    Args:
        where: the folder.
        task, algo, model, state: only runs with this name, or one of these names; None for all.

    Raises:
        UserError: when there is no such folder or state.
    """
    wanted = {"task": task, "algo": algo, "model": model, "state": state}
    names = {
        key: {value} if isinstance(value, str) else set(value)
        for key, value in wanted.items()
        if value is not None
    }
    if unknown := names.get("state", set()) - set(STATES):
        raise UserError(f"state={', '.join(sorted(unknown))} is not one of {', '.join(STATES)}")
    place = folder(where)
    if not place.is_dir():
        raise UserError(f"there is no folder {place}; give the folder that holds the runs")
    found = []
    for path in runs_below(place):
        run = Run(path)
        try:
            started = str(run.status.get("started"))
            of_run = {key: run.state if key == "state" else run.named(key) for key in wanted}
            _ = run.summary
        except Exception as error:  # a damaged file: any error of its parser
            log.warning("%s is left out: %s: %s", path, type(error).__name__, " ".join(str(error).split()))
            continue
        if all(of_run[key] in values for key, values in names.items()):
            found.append((started, path.name, run))
    return [run for *_, run in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def folder(where: str | Path) -> Path:
    """A folder of runs, as an absolute path."""
    return Path(where).expanduser().absolute()
