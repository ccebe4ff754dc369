"""Metrics and samples of a run's checkpoint on the validation prompts."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from policylab.callbacks.tables import (
    console,
    headlines,
    number,
    pick,
    rows,
    samples_table,
    to_copy,
)
from policylab.cli.logs import logged_to
from policylab.config.checks import check_switch, check_whole
from policylab.errors import UserError
from policylab.launch.endings import log_failure
from policylab.launch.imports import import_libraries
from policylab.runs.checkpoints import checkpoint_state
from policylab.runs.damage import check_undamaged
from policylab.runs.find import find_checkpoint, find_run
from policylab.runs.folder import write_json
from policylab.runs.same_run import check_fits
from policylab.runs.saved_config import load_usable
from policylab.user_code import short_path

#: Groups of a run's config that an evaluation needs.
PARTS = ("algo", "hardware", "model", "optim", "reward", "rollout", "task", "validation")


def evaluate_job(config: DictConfig) -> None:
    """The Hydra task of ``evaluate.py``."""
    check(config)
    run_folder = find_run(config.run)
    checkpoint = find_checkpoint(run_folder, config.checkpoint)
    out = output_file(config.out, run_folder)
    with logged_to(out.with_name("evaluate.log")), log_failure():
        result = evaluate(run_folder, checkpoint, config.prompts, config.seed, config.trust_remote_code)
        write_json(out, result)
        show(result, config.show)
        console().print(to_copy([("written to", short_path(out))]), soft_wrap=True)


def output_file(out: str | None, run_folder: Path) -> Path:
    """The file for metrics and samples; ``evaluate.log`` is written beside it.

    Raises:
        UserError: when it is a folder or a log, or its folder does not exist.
    """
    path = Path(out).expanduser() if out else run_folder / "evaluate.json"
    if path.is_dir():
        raise UserError(f"out={out} is a folder; give the file to write")
    if path.suffix == ".log":
        raise UserError(f"out={out} is the name of a log; metrics and samples are JSON: give FILE.json")
    if not path.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {path.parent}; make it first")
    return path


def check(config: DictConfig) -> None:
    """Refuses values before anything is loaded.

    Raises:
        UserError: naming the value.
    """
    for name, low in (("prompts", 1), ("seed", 0)):
        if config[name] is not None:
            check_whole(name, config[name], low)
    check_whole("show", config.show, 0)
    check_switch("trust_remote_code", config.trust_remote_code)


def evaluate(
    run_folder: Path,
    checkpoint: Path,
    prompts: int | None,
    seed: int | None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Builds the experiment of a run again and validates a checkpoint.

    Args:
        prompts: largest number of validation prompts; None: the run's.
        seed: of the sampling noise; None: the run's.
        trust_remote_code: whether this command allows it; the saved config cannot.

    Returns:
        The content of ``evaluate.json``: run, checkpoint, iteration, seed, number of prompts, metrics, samples.

    Raises:
        UserError: when a needed secret was not saved, or the checkpoint is damaged or of another model.
    """
    checkpoint_state(check_undamaged(checkpoint))
    import_libraries()
    from policylab.cli.logs import silence_noise
    from policylab.config.build import build

    silence_noise()
    warnings.filterwarnings(
        "ignore", message="(?s).*callbacks used to create the checkpoint"
    )  # left out on purpose
    config = for_evaluation(load_usable(run_folder, PARTS, trust_remote_code), prompts, seed)
    experiment = build(config, run_folder)
    module = experiment.module
    check_fits(module, checkpoint, "take a checkpoint of this run")
    experiment.trainer.validate(
        module, datamodule=experiment.data, ckpt_path=checkpoint, verbose=False, weights_only=True
    )
    return {
        "run": str(run_folder),
        "checkpoint": str(checkpoint),
        "iteration": module.iteration,
        "seed": config.seed,
        "prompts": int(module.val_metrics["val/prompts"]),
        "metrics": module.val_metrics,
        "samples": [asdict(sample) for sample in module.samples],
    }


def for_evaluation(config: DictConfig, prompts: int | None, seed: int | None) -> DictConfig:
    """A copy of a run's config without callbacks and loggers, for one process."""
    changed = config.copy()
    changed.callbacks, changed.logger = {}, {}
    changed.hardware.update({"devices": 1, "num_nodes": 1, "strategy": "auto", "cpu_offload": False})
    if prompts is not None:
        changed.validation.prompts = prompts
    if seed is not None:
        changed.seed = seed
    return changed


def show(result: dict[str, Any], count: int) -> None:
    """Prints metrics and a few samples."""
    from policylab.data.rollout import Sample

    screen = console()
    name = short_path(Path(result["checkpoint"]))
    screen.print(f"{name}, iteration {result['iteration']}, {result['prompts']} prompts", soft_wrap=True)
    screen.print(rows([(f"  {key}", number(result["metrics"][key])) for key in headlines(result["metrics"])]))
    screen.print(samples_table(pick([Sample(**sample) for sample in result["samples"]], count)))
