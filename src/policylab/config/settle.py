"""The config that a run is built from: composed by Hydra, checked and settled here once, and trusted from then on."""

from __future__ import annotations

from omegaconf import DictConfig

from policylab.config.checks import check
from policylab.config.hardware import with_devices
from policylab.runs.places import with_places
from policylab.runs.saved_config import learn_secrets


def settle(config: DictConfig) -> DictConfig:
    """A copy of a composed config whose devices are counted and whose paths are absolute. Its secrets are known from
    here on.

    Processes that a launcher starts, and commands that read ``config.yaml``, get a settled config and trust it.

    Raises:
        UserError: naming the first value that is wrong.
    """
    learn_secrets(config)
    check(config)
    return with_places(with_devices(config))
