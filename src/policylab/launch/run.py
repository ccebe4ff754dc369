"""One job, from its config to its summary."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from policylab.cli.logs import silence_noise
from policylab.cli.screen import Screen
from policylab.config.checks import check_model_exists, tuned_for_others
from policylab.config.hardware import backend, processes
from policylab.config.settle import settle
from policylab.distributed.signals import SIGNALS, Interrupted
from policylab.distributed.world import (
    barrier,
    broadcast,
    check_same,
    connect,
    has_flag,
    in_environment,
    set_flag,
    world,
)
from policylab.errors import RunError, counted
from policylab.launch.endings import closed_wandb, log_failure, survive_exit
from policylab.launch.imports import import_libraries
from policylab.report.page import try_to_write_page
from policylab.runs.checkpoints import checkpoint_iteration
from policylab.runs.consent import check_consent
from policylab.runs.environment import record_command, record_environment
from policylab.runs.find import LATEST
from policylab.runs.folder import check_link, removed_if_empty, removed_if_refused
from policylab.runs.metrics_file import is_validated
from policylab.runs.parents import ancestors
from policylab.runs.redaction import redact_words
from policylab.runs.resume import find_start, rewind_to, validates_at
from policylab.runs.same_run import check_fits
from policylab.runs.saved_config import check_folder_is_free, learn_secrets, plain, save_config
from policylab.runs.status import RunStatus
from policylab.runs.summary import summarize, write_summary

if TYPE_CHECKING:
    from policylab.config.build import Experiment
    from policylab.launch.stop import StopOnSignal

log = logging.getLogger(__name__)


def train_job(config: DictConfig) -> float | None:
    """The Hydra task of ``train.py``: checks and settles the composed config once, then plans, trains in this process,
    or starts the processes that train."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    run_dir, overrides = Path(hydra.runtime.output_dir), task_overrides(hydra)
    sys.argv[1:] = redact_words(sys.argv[1:])  # W&B records the arguments
    with removed_if_empty(run_dir, Path(config.paths.logs)) if world().main else nullcontext():
        learn_secrets(config)  # before any message quotes the config
        if warning := tuned_for_others(config, hydra.runtime.choices.get("algo_model")):
            log.warning("%s", warning)
        if config.resume:
            check_consent(config, sys.orig_argv)
        if config.plan:
            import_libraries()
            from policylab.planning.plan import plan_job

            plan_job(config)
            return None
        config = settle(config)
        check_link(Path(config.paths.logs) / LATEST)
        if trains_here(config):
            return train(config, run_dir, overrides)
        from policylab.launch.processes import launch

        return launch(train, config, hydra.job_logging, run_dir, overrides)


def task_overrides(hydra: Any) -> list[str]:
    """The overrides of the command line; references to the environment stay unresolved."""
    words: Any = OmegaConf.to_container(hydra.overrides.task)
    return list(words)


def trains_here(config: DictConfig) -> bool:
    """Whether this process is one of those that train, rather than the one that starts them."""
    here = world()
    return processes(config) == here.size and (here.elastic or not config.hardware.max_restarts)


def train(
    config: DictConfig, run_dir: Path, overrides: list[str], signals: Sequence[int] = SIGNALS
) -> float | None:
    """Trains as the config says and writes the results to the run folder. With several processes, each calls this.

    Args:
        config: the settled config, which is not changed.
        run_dir: folder of this run; with ``config.resume``, the folder of that run.
        overrides: of the command line, to be shown and recorded.
        signals: those that stop the run.

    Returns:
        The best value of the monitored metric, for sweepers; None without one.

    Raises:
        UserError: when the run cannot start, or cannot resume from its checkpoint.
        Interrupted: after a signal, when everything is saved.
    """
    main = world().main
    with record_failed_start(config, run_dir, overrides):
        connect(backend(config.hardware), config.hardware.timeout)
    check_same("config", OmegaConf.to_yaml(config, resolve=True))
    checkpoint, fresh = start_of(config, run_dir, overrides)
    screen = Screen(config, run_dir)
    with (
        removed_if_refused(run_dir) if fresh and main else nullcontext(lambda: None) as accept,
        RunStatus(run_dir, config.iterations, config.max_tokens, writes=main) as status,
        log_failure(),
    ):
        start = checkpoint_iteration(checkpoint) if checkpoint else 0
        screen.opening(
            redact_words(overrides), None if fresh else start
        )  # before the seconds of heavy imports
        check_model_exists(config)
        import_libraries()
        from policylab.launch.follow import BecomeLatest, FollowStatus
        from policylab.launch.stop import StopOnSignal

        with StopOnSignal(signals) as stop, closed_wandb():
            experiment = build_experiment(config, run_dir)
            if checkpoint:
                check_fits(experiment.module, checkpoint)
            record(experiment, run_dir, overrides)
            accept()
            if main and not fresh:
                rewind_to(checkpoint, config, run_dir)
            callbacks = experiment.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:0] = [FollowStatus(status), stop]  # before the checkpoint callback
            callbacks.append(BecomeLatest(run_dir, Path(config.paths.logs)))
            screen.plan(experiment)
            with experiment.module.sampler.scorer:
                run(experiment, run_dir, checkpoint, stop)
        if stop.stopped:
            status.interrupted()
        summary = summarize(config, run_dir, outcome(experiment, status))
        if main:
            write_summary(run_dir, summary)
            try_to_write_page(run_dir, summary["status"])
        screen.ending(experiment, summary)
        barrier()
        if stop.stopped and stop.signum:
            raise Interrupted(stop.signum, together=True)
    return summary["best"]["value"] if summary["best"] else None


@contextmanager
def record_failed_start(config: DictConfig, run_dir: Path, overrides: list[str]) -> Iterator[None]:
    """Records a run that fails before it has begun, so that it can be resumed, also by a restart of the group.

    A run that is already in the folder keeps its status; the failure is then only in ``train.log``.
    """
    with log_failure():
        try:
            yield
        except Exception as error:
            if world().main and not (run_dir / "status.json").exists():
                open_run(config, run_dir, overrides)
                with suppress(RuntimeError):  # the store may be unreachable as well
                    set_flag(begun_flag(run_dir))
                with RunStatus(run_dir, config.iterations, config.max_tokens):
                    raise error
            raise


def open_run(config: DictConfig, run_dir: Path, overrides: list[str]) -> None:
    """Saves the config and the command of a new run.

    Raises:
        UserError: when the folder already holds a run.
    """
    check_folder_is_free(run_dir)
    save_config(config, run_dir)
    record_command(overrides, run_dir)


def begun_flag(run_dir: Path) -> str:
    """Name of the flag that this group of processes has begun the run. Restarts of the group keep the flag."""
    return f"run of {run_dir}"


def start_of(config: DictConfig, run_dir: Path, overrides: list[str]) -> tuple[Path | None, bool]:
    """The checkpoint to resume from (None: start from the beginning), and whether the run is new.

    Rank 0 decides and broadcasts. A group of processes that was restarted resumes its own run.
    """
    flag = begun_flag(run_dir)
    resume, checkpoint = config.resume, ""
    if world().main:
        if has_flag(flag) and (run_dir / "status.json").is_file():
            resume = str(run_dir)
        if resume:
            checkpoint = str(find_start(config, run_dir, resume) or "")
        else:
            open_run(config, run_dir, overrides)
        set_flag(flag)
    checkpoint = broadcast("checkpoint", checkpoint)
    return Path(checkpoint) if checkpoint else None, not resume


def build_experiment(config: DictConfig, run_dir: Path) -> Experiment:
    """Seeds everything and builds.

    Raises:
        UserError: when a part refuses its values.
    """
    from lightning import seed_everything

    from policylab.config.build import build

    silence_noise()
    seed_everything(config.seed, workers=True, verbose=False)
    return build(config, run_dir)


def record(experiment: Experiment, run_dir: Path, overrides: list[str]) -> None:
    """Writes ``env.json`` and hands config and environment to the loggers.

    Call it after all checks, because a resumed run repeats the recorded command.
    """
    module, config = experiment.module, experiment.config
    origin = module.run_state.origin
    parents = ancestors(config, run_dir, origin["weights"])
    extra = {"weights": module.policy.source, "origin": origin, "parents": parents, **in_environment()}
    environment = record_environment(run_dir, Path(config.paths.repo), overrides, extra, writes=world().main)
    for logger in experiment.trainer.loggers:
        logger.log_hyperparams({**plain(config), "environment": environment})


def run(experiment: Experiment, run_dir: Path, checkpoint: Path | None, stop: StopOnSignal) -> None:
    """Validates before the first iteration of this session if that is due, trains, and validates at the end."""
    module, data, trainer = experiment.module, experiment.data, experiment.trainer
    with survive_exit(stop):
        iteration = checkpoint_iteration(checkpoint) if checkpoint else 0
        if validates_at(experiment.config, iteration):
            trainer.validate(module, datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=True)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if module.iteration < module.progress.iterations and not trainer.should_stop:
            raise RunError(
                f"training ended after {module.iteration} of {counted(module.progress.iterations, 'iteration')}: "
                "something raised StopIteration, which ends Lightning's loops (look at your callbacks), or your own "
                "trainer did not call finish_iteration"
            )
        if stop.stopped or broadcast("validation", is_validated(run_dir / "metrics.csv", module.iteration)):
            return
        trainer.validate(module, datamodule=data, verbose=False, weights_only=True)


def outcome(experiment: Experiment, status: RunStatus) -> dict[str, Any]:
    """How a run ended: the part of its summary that is not in ``metrics.csv``."""
    module = experiment.module
    return {
        "status": "done" if status.state == "running" else status.state,
        "iterations": module.iteration,
        "wall_seconds": round(status.wall_seconds, 1),
        "tokens_sampled": module.progress.tokens_sampled,
        "tokens_trained": module.progress.tokens_trained,
    }
