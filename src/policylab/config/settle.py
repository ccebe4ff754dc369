"""Settles a config: Hydra composes it, this module checks it and fills it in once, and later code trusts it."""

from __future__ import annotations

from omegaconf import DictConfig

from policylab.config.checks import check
from policylab.config.hardware import with_devices
from policylab.runs.places import with_places
from policylab.runs.saved_config import learn_secrets


def settle(config: DictConfig) -> DictConfig:
    """A checked copy of a composed config, with numbers of devices and absolute paths. From now on its secrets are
    hidden in messages and files.

    Processes that a launcher starts, and commands that read ``config.yaml``, get a settled config and trust it.

    Raises:
        UserError: naming the first value that is wrong.
    """
    learn_secrets(config)
    check(config)
    return with_places(with_devices(config))
