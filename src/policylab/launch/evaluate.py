"""Metrics and samples of runs' checkpoints on validation prompts of their own task or of another one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.table import Table

from policylab.callbacks.tables import console, pick, rows, samples_table, to_copy
from policylab.cli.logs import logged_to
from policylab.config.checks import check_number, check_whole
from policylab.errors import RunError, UserError, counted
from policylab.launch.asked import check_asked, output_file, sampling
from policylab.launch.endings import log_failure
from policylab.launch.imports import import_libraries
from policylab.runs.checkpoints import checkpoint_state
from policylab.runs.damage import check_undamaged
from policylab.runs.figures import headlines, number
from policylab.runs.find import find_checkpoint, find_runs
from policylab.runs.folder import write_json
from policylab.runs.same_run import check_fits
from policylab.runs.saved_config import learn_secrets, load_usable
from policylab.runs.words import override_key
from policylab.user_code import short_path

#: Parts of a run's config that an evaluation uses, and parts that it may replace.
PARTS = ("algo", "hardware", "model", "optim", "rollout", "validation")
REPLACEABLE = ("reward", "task")
#: Seconds between two lines of progress.
PROGRESS_SECONDS = 5.0


def evaluate_job(config: DictConfig) -> None:
    """The Hydra task of ``evaluate.py``."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    check(config, hydra.overrides.task)
    chosen = [group for group in REPLACEABLE if hydra.runtime.choices.get(group) is not None]
    out = None if config.out is None else output_file(config.out)
    found = [
        (run, find_checkpoint(run, config.checkpoint))
        for run in find_runs(config.run, Path(config.paths.logs))
    ]
    results, failures = list[dict[str, Any]](), list[str]()
    for run, checkpoint in found:
        file = out or run / "evaluate.json"
        try:
            with logged_to(file.with_name("evaluate.log")), log_failure():
                results.append(evaluate(run, checkpoint, config, chosen))
                write_json(file, results if out and len(found) > 1 else results[-1])
                show(results[-1], config.show)
                console().print(to_copy([("written to", short_path(file))]), soft_wrap=True)
        except (UserError, RunError) as error:
            if len(found) == 1:
                raise
            failures.append(f"{short_path(run)}: {error}")
            console().print(f"left out  {failures[-1]}", soft_wrap=True)
    if len(results) > 1:
        console().print(comparison(results))
    if failures:
        raise UserError(
            f"{len(failures)} of {counted(len(found), 'run')} could not be evaluated: {'; '.join(failures)}"
        )


def check(config: DictConfig, words: Sequence[str]) -> None:
    """Refuses values before anything is loaded.

    Args:
        words: overrides of the command line.

    Raises:
        UserError: naming the value.
    """
    check_asked(config)
    if config.prompts is not None:
        check_whole("prompts", config.prompts, 1)
    check_whole("show", config.show, 0)
    check_number("threshold", config.threshold, float("-inf"))
    if foreign := [word for word in words if override_key(word).partition(".")[0] == "model"]:
        raise UserError(f"{foreign[0]}: an evaluation uses the run's model; to change it, give another run")


def evaluate(
    run_folder: Path, checkpoint: Path, asked: DictConfig, chosen: Sequence[str] = ()
) -> dict[str, Any]:
    """Builds the experiment of a run with the changed settings, and validates a checkpoint.

    Args:
        asked: the config of ``evaluate.py``.
        chosen: groups of it that replace the run's whole group; of other groups, only the given keys are replaced.

    Returns:
        The content of ``evaluate.json``: run, checkpoint, iteration, settings of sampling and scoring, number of
        prompts, metrics, samples.

    Raises:
        UserError: when a needed secret was not saved, or the checkpoint is damaged or of another model.
    """
    checkpoint_state(check_undamaged(checkpoint))
    import_libraries()
    from policylab.callbacks.evaluation import EvaluationProgress
    from policylab.cli.logs import silence_noise
    from policylab.config.build import build
    from policylab.functional.behaviour import greedy
    from policylab.rollouts.noise import VALIDATION

    silence_noise()
    warnings.filterwarnings(
        "ignore", message="(?s).*callbacks used to create the checkpoint"
    )  # left out on purpose
    own = [group for group in REPLACEABLE if group not in chosen]
    config = for_evaluation(load_usable(run_folder, (*PARTS, *own), asked.trust_remote_code), asked, chosen)
    experiment = build(config, run_folder, trains=False)
    module, trainer = experiment.module, experiment.trainer
    module.run_state.checks_data = asked.get("task") is None
    module.sampler.reward_is_loaded = asked.get("reward") is not None
    module.validator.completions, module.validator.threshold = asked.n, asked.threshold
    if asked.temperature is not None:
        behaviour = greedy if asked.temperature == 0 else None
        module.sampler.behaviour = lambda stream: behaviour if stream == VALIDATION else None
    if asked.temperature == 0:
        module.sampler.reference = None  # greedy completions are not samples for a KL
    check_fits(module, checkpoint, "take a checkpoint of this run")
    trainer.callbacks.append(EvaluationProgress(PROGRESS_SECONDS))  # type: ignore[attr-defined]
    with module.sampler.scorer:
        trainer.validate(
            module, datamodule=experiment.data, ckpt_path=checkpoint, verbose=False, weights_only=True
        )
    return {
        "run": str(run_folder),
        "checkpoint": str(checkpoint),
        "iteration": module.iteration,
        "task": config.task.name,
        "reward": config.reward["_target_"],
        "seed": config.seed,
        "temperature": config.rollout.temperature if asked.temperature is None else asked.temperature,
        "n": asked.n,
        "threshold": asked.threshold,
        "prompts": int(module.val_metrics["val/prompts"]),
        "metrics": module.val_metrics,
        "samples": [asdict(sample) for sample in module.samples],
    }


def for_evaluation(config: DictConfig, asked: DictConfig, chosen: Sequence[str]) -> DictConfig:
    """A copy of a run's config for one process, without callbacks and loggers, and with the changed settings."""
    changed = config.copy()
    changed.callbacks, changed.logger = {}, {}
    changed.hardware.update({"devices": 1, "num_nodes": 1, "strategy": "auto", "cpu_offload": False})
    if asked.prompts is not None:
        changed.validation.prompts = asked.prompts
    if asked.seed is not None:
        changed.seed = asked.seed
    changed.validation.batch_size = max(1, changed.validation.batch_size // asked.n)
    for group in REPLACEABLE:
        if asked.get(group) is not None:
            changed[group] = replaced(config, asked, group, whole=group in chosen)
    if "task" in chosen:
        changed.rollout.max_new_tokens = changed.task.get("max_new_tokens", changed.rollout.max_new_tokens)
    changed.rollout.update(sampling(asked))
    return changed


def replaced(config: DictConfig, asked: DictConfig, group: str, *, whole: bool) -> DictConfig:
    """A group of a run's config with the given keys. The run's other keys stay, unless the whole group or its target is
    replaced."""
    own, given = config[group], asked[group]
    learn_secrets(given)
    new: Any = OmegaConf.to_container(given, resolve=True)
    foreign = new.get("_target_", own["_target_"]) != own["_target_"]
    if whole or foreign:  # as in training, a function itself is the reward
        own = {"_partial_": True} if foreign and not whole and group == "reward" else {}
    merged = OmegaConf.merge(own, new)
    assert isinstance(merged, DictConfig)
    return merged


def show(result: dict[str, Any], count: int) -> None:
    """Prints metrics and a few samples."""
    from policylab.data.rollout import Sample

    screen, metrics = console(), result["metrics"]
    how = counted(result["prompts"], "prompt") + (f" x {result['n']} completions" if result["n"] > 1 else "")
    how += ", greedy" if result["temperature"] == 0 else ""
    name = short_path(Path(result["checkpoint"]))
    screen.print(f"{name}, iteration {result['iteration']}, {how}", soft_wrap=True)
    screen.print(rows([(f"  {label(key, result)}", number(metrics[key])) for key in headlines(metrics)]))
    screen.print(samples_table(pick([Sample(**sample) for sample in result["samples"]], count)))


def label(metric: str, result: dict[str, Any]) -> str:
    """The name of a metric on the console, with ``mean@n`` for several completions and the threshold of pass@k."""
    if metric == "val/reward" and result["n"] > 1:
        return f"{metric} (mean@{result['n']})"
    return f"{metric} (reward >= {result['threshold']:g})" if metric.startswith("val/pass@") else metric


def comparison(results: Sequence[dict[str, Any]]) -> Table:
    """A table with the main metrics of each run; a dash for one that a run does not have."""
    names = dict.fromkeys(name for result in results for name in headlines(result["metrics"]))
    shown = [name for name in names if name in ("val/reward", "val/kl", "val/length") or "pass@" in name]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("iteration", *shown):
        table.add_column(name.removeprefix("val/"), justify="right", no_wrap=True)
    for result in results:
        values = [number(result["metrics"].get(name)) for name in shown]
        table.add_row(short_path(result["run"]), str(result["iteration"]), *values)
    return table
