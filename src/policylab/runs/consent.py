"""Code that comes with a model runs only if the current command allows it; the config of a run folder cannot."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from policylab.errors import UserError
from policylab.runs.words import leaves, override_key

TRUST = "trust_remote_code"


def check_consent(config: DictConfig, typed: Sequence[str]) -> None:
    """Refuses to resume a run that trusts remote code, unless the current command allows it again.

    Args:
        typed: the current command line, without the arguments that a resumed run adds.

    Raises:
        UserError: naming the key.
    """
    allowed = [override_key(word) for word in typed if TRUST in word]  # the key, or a whole group
    for key, value in leaves(OmegaConf.to_container(config, resolve=True)):
        if key.split(".")[-1] == TRUST and value and not any(f"{key}.".startswith(f"{k}.") for k in allowed):
            raise UserError(
                f"{config.resume} was started with {key}=true, which holds for one command only; give it again if you "
                "trust the code that comes with the model"
            )


def with_consent(config: DictConfig, trust_remote_code: bool) -> DictConfig:
    """A copy of a saved config that trusts remote code only if the current command does."""
    changed = config.copy()
    for key, _ in leaves(OmegaConf.to_container(config)):
        if key.split(".")[-1] == TRUST:
            OmegaConf.update(changed, key, trust_remote_code)
    return changed
