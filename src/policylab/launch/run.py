"""One job, from its config to its summary."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from policylab.cli.logs import FILE_ONLY, silence_noise
from policylab.cli.screen import Screen
from policylab.config.checks import check
from policylab.config.hardware import backend, processes, settled
from policylab.distributed.signals import SIGNALS, Interrupted
from policylab.distributed.world import (
    agreed,
    connect,
    demand_same,
    in_environment,
    meet,
    note,
    noted,
    world,
)
from policylab.errors import RunError, UserError
from policylab.launch.imports import import_libraries
from policylab.models.folder import demand_folder
from policylab.rewards.pool import ended_workers
from policylab.runs.checkpoints import become_newest, checkpoint_iteration, checkpoint_state, demand_fit
from policylab.runs.find import LATEST, checkpoint_to_resume
from policylab.runs.folder import demand_link, forgotten_if_refused, leaving_nothing, write_json
from policylab.runs.metrics_file import read_rows, validated
from policylab.runs.places import placed
from policylab.runs.redaction import redact_words
from policylab.runs.resume import check_same_run, override_key, rewind
from policylab.runs.saved_config import (
    TRUST,
    learn_secrets,
    leaves,
    plain,
    refuse_taken_folder,
    save_config,
)
from policylab.runs.status import RunStatus
from policylab.runs.summary import summarize, write_summary

if TYPE_CHECKING:
    from policylab.config.build import Experiment
    from policylab.launch.stop import StopOnSignal

log = logging.getLogger(__name__)


def train_job(config: DictConfig) -> float | None:
    """The Hydra task of ``train.py``: trains in this process, or starts those that do."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    run_dir, overrides = Path(hydra.runtime.output_dir), changes(hydra)
    learn_secrets(config)
    sys.argv[1:] = redact_words(sys.argv[1:])  # W&B records it
    with leaving_nothing(run_dir, Path(config.paths.logs)) if world().main else nullcontext():
        if tuned := tuned_for_others(config, hydra.runtime.choices.get("algo_model")):
            log.warning("%s", tuned)
        return start(config, hydra.job_logging, run_dir, overrides)


def start(config: DictConfig, job_logging: Any, run_dir: Path, overrides: list[str]) -> float | None:
    """Checks what can be checked at once, then plans, trains, or starts the processes that train."""
    check(config)
    if config.resume:
        demand_consent(config, sys.orig_argv)
    if config.plan:
        import_libraries()
        from policylab.planning.plan import plan_job

        plan_job(config)
        return None
    demand_link(Path(config.paths.logs) / LATEST)
    config, here = placed(settled(config)), world()
    watched = here.elastic or not config.hardware.max_restarts
    if processes(config) == here.size and watched:
        return train(config, run_dir, overrides)
    from policylab.launch.processes import launch

    return launch(train, config, job_logging, run_dir, overrides)


def changes(hydra: Any) -> list[str]:
    """What the command line changes; references to the environment stay what they are."""
    words: Any = OmegaConf.to_container(hydra.overrides.task)
    return list(words)


def tuned_for_others(config: DictConfig, pair: str | None) -> str | None:
    """What to tell where numbers are in effect that were tuned for an embedded model, and other weights take its place.

    Args:
        pair: the choice of ``algo_model``, whether or not there is such a file.
    """
    path = OmegaConf.select(config, "model.path")
    file = Path(config.paths.repo, "configs", "algo_model", f"{pair}.yaml")
    if path is None or not Path(path).expanduser().is_dir() or not file.is_file():
        return None
    tuned = leaves(OmegaConf.to_container(OmegaConf.load(file)))
    words = [f"{key}={value}" for key, value in tuned if OmegaConf.select(config, key) == value]
    if not words:
        return None
    return (
        f"{' '.join(words)} was tuned for the weights that come with model={config.model.name}, not for those in "
        f"{path}; give your own, or ~algo_model for what other models have"
    )


def demand_consent(config: DictConfig, typed: Sequence[str]) -> None:
    """A run that goes on trusts the code of others only if the present command says so, not because it once did.

    Args:
        typed: the present command line, without what a resumed run adds to it.

    Raises:
        UserError: naming the key.
    """
    said = [
        override_key(word) for word in typed if TRUST in word
    ]  # the key, or a group that is given as a whole
    for key, value in leaves(OmegaConf.to_container(config, resolve=True)):
        if key.split(".")[-1] == TRUST and value and not any(f"{key}.".startswith(f"{k}.") for k in said):
            raise UserError(
                f"{config.resume} was started with {key}=true, and that consent does not last; give it again if you "
                "trust the code that comes with the model"
            )


def train(
    config: DictConfig, run_dir: Path, overrides: list[str], signals: Sequence[int] = SIGNALS
) -> float | None:
    """Trains as the config says and leaves the results in the run folder. With several processes, each calls this.

    Args:
        config: the composed config, which is not changed.
        run_dir: folder of this run; with ``config.resume``, the folder of that run.
        overrides: what the command line changed, to show it.
        signals: that ask the run to stop.

    Returns:
        The best value of the monitored metric, for sweepers; None without one.

    Raises:
        UserError: when the config is wrong.
        Interrupted: after a signal, when everything is saved.
    """
    if not (config.logger and config.logger.get("csv")):
        raise UserError("logger.csv is off, but summary and resume read metrics.csv; leave it on")
    learn_secrets(config)
    check(config)
    config, main = placed(settled(config)), world().main
    demand_same("config", OmegaConf.to_yaml(config, resolve=True))
    checkpoint, fresh = starting_point(config, run_dir, overrides)
    screen = Screen(config, run_dir)
    with (
        forgotten_if_refused(run_dir) if fresh and main else nullcontext(lambda: None) as accept,
        RunStatus(run_dir, config.iterations, config.max_tokens, writes=main) as status,
        log_failure(),
    ):
        screen.opening(redact_words(overrides))  # stands before the seconds of heavy imports
        demand_model(config)
        import_libraries()
        from policylab.launch.follow import BecomeLatest, FollowStatus
        from policylab.launch.stop import StopOnSignal

        with StopOnSignal(signals) as stop, closed_loggers():
            experiment = prepare(config, run_dir, overrides, checkpoint)
            accept()
            if main:
                if checkpoint:
                    become_newest(run_dir, checkpoint)
                if not fresh:  # not before all is built: a command that is refused must not cut the records
                    iteration = checkpoint_iteration(checkpoint) if checkpoint else 0
                    rewind(run_dir, iteration, validates=validates_again(config, checkpoint))
                    save_config(config, run_dir)
            callbacks = experiment.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:0] = [FollowStatus(status), stop]  # before the checkpoint callback
            callbacks.append(BecomeLatest(run_dir, Path(config.paths.logs)))
            screen.plan(experiment)
            connect(backend(config.hardware), config.hardware.timeout)
            with ended_workers(experiment.module.reward):
                run(experiment, run_dir, checkpoint, stop)
        if stop.stopped:
            status.interrupted()
        summary = summarize(config, run_dir, outcome(experiment, status))
        if main:
            write_summary(run_dir, summary)
        screen.ending(summary)
        meet("end", config.hardware.timeout)
        if stop.stopped and stop.signum:
            raise Interrupted(stop.signum, together=True)
    return summary["best"]["value"] if summary["best"] else None


def starting_point(config: DictConfig, run_dir: Path, overrides: list[str]) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, None for the start of the run; and whether the folder is new.

    Rank 0 looks, and the others hear of it. A group of processes that was started again goes on with its own run.
    """
    own = f"run of {run_dir}"
    resume, checkpoint = config.resume, ""
    if world().main:
        if noted(own) and (run_dir / "status.json").is_file():
            resume = str(run_dir)
        if resume:
            found = checkpoint_to_resume(resume)
            check_same_run(config, run_dir, found)
            checkpoint = str(found or "")
        else:
            refuse_taken_folder(run_dir)
            save_config(config, run_dir)
            # before there is a status: what has one can be resumed, with what it was started with
            write_json(run_dir / "env.json", {"overrides": redact_words(overrides)})
        note(own)
    checkpoint = agreed("checkpoint", checkpoint, config.hardware.timeout)
    return Path(checkpoint) if checkpoint else None, not resume


def demand_model(config: DictConfig) -> None:
    """A model that is neither here nor within reach is told before seconds of imports, not after them.

    Raises:
        UserError: naming the model, where it was looked for, and what works offline.
    """
    path = config.model.get("path")
    if path is not None:
        demand_folder(path)
    if config.model["_target_"] == "policylab.models.loading.from_hub" and config.model.path is None:
        from policylab.models import hub

        if not hub.is_cached(config.model.name):
            hub.demand_reachable(config.model.name)


def prepare(config: DictConfig, run_dir: Path, overrides: list[str], checkpoint: Path | None) -> Experiment:
    """Seeds, builds everything, records the environment, and hands the config to the loggers.

    Raises:
        UserError: when something cannot be built, or the checkpoint does not fit it. Nothing is recorded then: a run
            that goes on repeats the command on record.
    """
    from lightning import seed_everything

    from policylab.config.build import build
    from policylab.runs.environment import describe_environment

    silence_noise()
    seed_everything(config.seed, workers=True, verbose=False)
    experiment = build(config, run_dir)
    if checkpoint:
        demand_fit(experiment.module, checkpoint)
    environment = {
        **describe_environment(Path(config.paths.repo)),
        "weights": experiment.module.policy.source,
        "origin": experiment.module.origin,
        **in_environment(),
        "overrides": redact_words(overrides),
    }
    if world().main:
        write_json(run_dir / "env.json", with_earlier_sessions(environment, run_dir / "env.json"))
    for logger in experiment.trainer.loggers:
        logger.log_hyperparams({**plain(config), "environment": environment})
    return experiment


def with_earlier_sessions(environment: dict[str, Any], file: Path) -> dict[str, Any]:
    """The environment of this session, and in a resumed run those of the sessions before it that got so far."""
    before = json.loads(file.read_text(encoding="utf-8"))
    if before.keys() == {"overrides"}:
        return environment
    return {**environment, "earlier_sessions": [*before.pop("earlier_sessions", []), before]}


def run(experiment: Experiment, run_dir: Path, checkpoint: Path | None, stop: StopOnSignal) -> None:
    """Validates before the first iteration (of this session, if one is due there), trains, validates after the last."""
    module, data, trainer = experiment.module, experiment.data, experiment.trainer
    with survive_exit(stop):
        iteration = checkpoint_iteration(checkpoint) if checkpoint else 0
        if validates_at(experiment.config, iteration):
            trainer.validate(module, datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=True)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if module.iteration < module.iterations and not trainer.should_stop:
            raise RunError(
                f"training ended after {module.iteration} of {module.iterations} iterations: something raised "
                "StopIteration, which ends Lightning's loops; look at your callbacks"
            )
        if not stop.stopped and not agreed(
            "validated", is_validated(run_dir, module.iteration), experiment.config.hardware.timeout
        ):
            trainer.validate(module, datamodule=data, verbose=False, weights_only=True)


def validates_at(config: DictConfig, iteration: int) -> bool:
    """Whether a validation is due after so many iterations, be they the last or not."""
    return bool(iteration % config.validation.every == 0)


def validates_again(config: DictConfig, checkpoint: Path | None) -> bool:
    """Whether a run that goes on from a state validates it: because that is due there, or nothing is left to train. The
    validation of an end that is the end no more stays on record."""
    if checkpoint is None:
        return True
    state = checkpoint_state(checkpoint)
    spent = config.max_tokens is not None and state["tokens_sampled"] >= config.max_tokens
    return validates_at(config, state["iteration"]) or state["iteration"] >= config.iterations or spent


def is_validated(run_dir: Path, iteration: int) -> bool:
    """Whether the metrics of a validation at this iteration are on record."""
    return any(row["iteration"] == iteration for row in validated(read_rows(run_dir / "metrics.csv")))


@contextmanager
def survive_exit(stop: StopOnSignal) -> Iterator[None]:
    """Lightning ends the process after Ctrl-C and SIGTERM; a run still has its summary to write then."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        if stop.signum is None:
            raise
        if (
            world().size > 1 and not stop.stopped
        ):  # the others have not agreed, and may be waiting for this one
            raise Interrupted(stop.signum) from None
        stop.stopped = True


def outcome(experiment: Experiment, status: RunStatus) -> dict[str, Any]:
    """What the metrics do not tell of a run."""
    module = experiment.module
    return {
        "status": "done" if status.state == "running" else status.state,
        "iterations": module.iteration,
        "wall_seconds": round(status.wall_seconds, 1),
        "tokens_sampled": module.tokens_sampled,
        "tokens_trained": module.tokens_trained,
    }


@contextmanager
def log_failure() -> Iterator[None]:
    """Leaves the reason of a failure in ``train.log``; the console gets it from the root script."""
    try:
        yield
    except UserError as error:
        log.error("%s", error, extra=FILE_ONLY)
        raise
    except Exception:
        log.exception("the run failed", extra=FILE_ONLY)
        raise


@contextmanager
def closed_loggers() -> Iterator[None]:
    """Ends the W&B run, so that the next job of a multirun gets its own."""
    try:
        yield
    finally:
        if "wandb" in sys.modules:
            import wandb

            try:
                wandb.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
            except Exception as error:  # the run is done, whatever wandb says
                log.warning("wandb could not finish: %s", error)
