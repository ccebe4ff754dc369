"""Places that a config names: what they mean is settled once, where the run starts."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import policylab

ASSETS = Path(policylab.__file__).parent / "assets"
#: Keys that may name a file or folder to read, what it has to be, and the words that mean something else there.
PLACES = {
    "model.path": (Path.is_dir, ()),
    "model.tokenizer": (Path.is_dir, tuple(path.name for path in ASSETS.iterdir())),
    "algo.critic.init": (Path.is_dir, ()),
    "task.source": (Path.is_file, ("default", "vader")),
}


def placed(config: DictConfig) -> DictConfig:
    """A copy of the config whose `PLACES` are absolute paths without links, and so is what a reward reads: any value of
    its keys that has a slash and names something that is there.

    A link such as ``logs/latest``, or a relative path, may mean something else when the run is evaluated or resumed.
    The id of a model or data set on the hub stays as it is.
    """
    found = config.copy()
    for key, (fits, words) in PLACES.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value not in words and fits(path := Path(value).expanduser()):
            OmegaConf.update(found, key, str(path.resolve()))
    for key in keys_of_reward(config):
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and "/" in value and (path := Path(value).expanduser()).exists():
            OmegaConf.update(found, key, str(path.resolve()))
    return found


def keys_of_reward(config: DictConfig) -> list[str]:
    """Such as ``reward.path``; only the value tells whether it is a place. References stay: they may be to a secret."""
    reward = config.get("reward") or OmegaConf.create()
    return [f"reward.{key!s}" for key in reward if not OmegaConf.is_interpolation(reward, str(key))]
