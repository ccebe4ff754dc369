"""Console output of a run before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from policylab import __version__
from policylab.callbacks.tables import before_after, config_tree, console, rows, to_copy
from policylab.distributed.signals import in_sweep
from policylab.distributed.world import world
from policylab.errors import counted
from policylab.report.page import PAGE
from policylab.runs.environment import git_state
from policylab.runs.figures import duration, number
from policylab.runs.find import exported_iteration
from policylab.runs.parents import INIT, RUN, WHICH, policy_in_words
from policylab.runs.saved_config import plain
from policylab.runs.words import command, override
from policylab.user_code import short_path

if TYPE_CHECKING:
    from policylab.config.build import Experiment


class Screen:
    """Prints header, config, plan and results; the console callback prints the training in between.

    Prints nothing if ``callbacks.console`` is off, and in a job of a sweep; ``train.log`` still has it.
    """

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self.console = console()
        off = OmegaConf.select(config, "callbacks.console") is None
        self.console.quiet = off or in_sweep() or not world().main

    def opening(self, overrides: list[str], resumed_at: int | None = None) -> None:
        """Header and config.

        Args:
            resumed_at: the iteration that the run goes on from; None for a new run.
        """
        git = git_state(Path(self.config.paths.repo))
        commit = (git["commit"] or "no git repository")[:10] + (" with changes" if git["dirty"] else "")
        self.console.print(Text.assemble(("PolicyLab", "bold"), f" {__version__}   commit {commit}"))
        lines = [
            ("run", short_path(self.run_dir)),
            ("device", devices(self.config)),
            ("seed", str(self.config.seed)),
        ]
        if parent := OmegaConf.select(self.config, RUN):
            policy = policy_in_words(self.config.init.which, exported_iteration(Path(self.config.model.path)))
            lines.insert(1, ("init", f"{short_path(parent)}, {policy}"))
        if resumed_at is not None:
            run = short_path(self.config.resume or self.run_dir)
            lines.insert(1, ("resume", f"from iteration {resumed_at} of {run}"))
        self.console.print(to_copy(lines), soft_wrap=True)
        self.console.print(config_tree(plain(self.config), overrides))

    def plan(self, experiment: Experiment) -> None:
        """The size of the run: device, parameters, batch, length."""
        module, trainer = experiment.module, experiment.trainer
        parameters = list(module.policy.parameters())
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lines = [
            (
                "device",
                f"{trainer.strategy.root_device.type} x {trainer.world_size}, {self.config.hardware.precision}",
            ),
            (
                "parameters",
                f"{total:,}" + ("" if trained == total else f", of which {trained:,} are trained"),
            ),
            *module.plan.table(),
            ("iterations", f"{self._length()}, a validation every {self.config.validation.every}"),
        ]
        self.console.print("plan")
        self.console.print(rows([(f"  {label}", value) for label, value in lines]))

    def ending(self, experiment: Experiment, summary: dict[str, Any]) -> None:
        """Metrics before and after training, the run folder, and commands for the next steps."""
        self.console.print()
        if summary["after"].get("iteration"):  # a validation after the one before training
            self.console.print(before_after(summary["before"], summary["after"]))
        lines = [
            (
                summary["status"],
                f"{counted(summary['iterations'], 'iteration')} in {duration(summary['wall_seconds'])}",
            )
        ]
        if best := summary["best"]:
            lines.append(
                ("best", f"{best['metric']} {number(best['value'])} at iteration {best['iteration']}")
            )
        folder = short_path(self.run_dir)
        ended = summary["status"] != "interrupted"
        further = [self._twice(summary)] if ended else []
        last, final = ([], []) if best else (["checkpoint=last"], ["policy=final"])
        episodes = self.config.task.get("turns") is not None  # generate.py has no environment
        which = [] if best and ended else [f"{WHICH}={'best' if best else 'final'}"]
        lines += [
            ("run", folder),
            *([("report", short_path(page))] if (page := self.run_dir / PAGE).is_file() else []),
            ("next", command("evaluate.py", override("run", folder), *last)),
            *([] if episodes else [("", command("generate.py", override("run", folder), *final))]),
            ("", command("train.py", override("resume", folder), *further)),
        ]
        if experiment.module.parts.needs.learns_from == "completions":
            lines.append(
                ("", command("train.py", "algo=grpo", *self._task(), override(INIT, folder), *which))
            )
        self.console.print(to_copy(lines), soft_wrap=True)

    def _length(self) -> str:
        """The limits of the run: iterations, tokens."""
        iterations, budget = self.config.iterations, self.config.max_tokens
        if budget is None:
            return str(iterations)
        return f"until {budget:,} tokens are sampled, at most {iterations}"

    def _task(self) -> list[str]:
        """The overrides that select this task, if it has a file in ``configs/task/``, and its source."""
        task = self.config.task
        source = task.get("source", "default")
        file = Path(self.config.paths.repo, "configs", "task", f"{task.name}.yaml")
        return [f"task={task.name}"] * file.is_file() + [override("task.source", short_path(source))] * (
            source != "default"
        )

    def _twice(self, summary: dict[str, Any]) -> str:
        """The override that doubles the limit that ended the run."""
        budget = self.config.max_tokens
        if budget is not None and summary["tokens_sampled"] >= budget:
            return f"max_tokens={2 * budget}"
        return f"iterations={2 * self.config.iterations}"


def devices(config: DictConfig) -> str:
    """The devices of a run, for the console."""
    hardware = config.hardware
    nodes = f" on each of {hardware.num_nodes} machines" if hardware.num_nodes != 1 else ""
    strategy = f", {hardware.strategy}" if hardware.devices * hardware.num_nodes > 1 else ""
    return f"{hardware.accelerator} x {hardware.devices}{nodes}{strategy}, {hardware.precision}"
