"""``config.yaml``: all that a run was told, in plain values, without secrets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.errors import UserError
from policylab.launch.environment import redact
from policylab.launch.run_folder import write_atomically


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, secrets hidden.

    Raises:
        omegaconf.MissingMandatoryValue: when a ``???`` was left.
    """
    return redact(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def save_config(config: DictConfig, run_folder: Path) -> None:
    """Writes ``config.yaml``, atomically."""
    write_atomically(run_folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(config))))


def load_config(run_folder: Path) -> DictConfig:
    """The config of a run.

    Raises:
        UserError: when the file is empty or not a mapping.
    """
    config = OmegaConf.load(run_folder / "config.yaml")
    if not isinstance(config, DictConfig) or not config:
        raise UserError(f"{run_folder / 'config.yaml'} holds no config")
    return config


def refuse_taken_folder(run_folder: Path) -> None:
    """Two runs never write into one folder.

    Raises:
        UserError: when the folder already holds a run.
    """
    if (run_folder / "status.json").exists():
        raise UserError(
            f"{run_folder} already holds a run; give another hydra.run.dir, or resume={run_folder} to go on with it"
        )
