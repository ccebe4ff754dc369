"""Paths that a config names, made absolute when the run starts."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import policylab
from policylab.runs.words import leaves

ASSETS = Path(policylab.__file__).parent / "assets"
#: Keys that may name a file or folder to read; the check of that path; values that are not a path.
PLACES = {
    "model.path": (Path.is_dir, ()),
    "model.tokenizer": (Path.is_dir, tuple(path.name for path in ASSETS.iterdir())),
    "algo.critic.init": (Path.is_dir, ()),
    "task.source": (Path.is_file, ("default", "vader")),
}


def with_places(config: DictConfig) -> DictConfig:
    """A copy of the config in which `PLACES` are absolute paths without links, and so are values below `reward` that
    have a slash and name an existing file or folder.

    A link such as ``logs/latest``, or a relative path, may mean something else when the run is evaluated or resumed.
    The id of a model or data set on the hub is not changed.
    """
    found = config.copy()
    for key, (fits, words) in PLACES.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value not in words and fits(path := Path(value).expanduser()):
            OmegaConf.update(found, key, str(path.resolve()))
    for key, value in texts_of_reward(config):
        if "/" in value and os.path.exists(
            place := os.path.expanduser(value)
        ):  # false for a text of any length
            OmegaConf.update(found, key, os.path.realpath(place))
    return found


def texts_of_reward(config: DictConfig) -> list[tuple[str, str]]:
    """Texts below ``reward`` by key, such as ``reward.parts.kind.path``; no interpolations, which may be secrets."""
    values = leaves(OmegaConf.to_container(config.get("reward") or OmegaConf.create()), "reward")
    return [(key, value) for key, value in values if isinstance(value, str) and "${" not in value]
