"""``config.yaml``: the settled config of a run, without secrets. Writes it, and reads it for all later commands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from policylab.errors import UserError
from policylab.runs.consent import with_consent
from policylab.runs.folder import write_atomically
from policylab.runs.redaction import HIDDEN, is_secret, redact, remember
from policylab.runs.words import leaves, word

#: Keys that older runs lack, with the values that match their behaviour.
ADDED = {
    "hardware.products": "onednn",
    "hardware.deterministic": False,
    "hardware.compile": False,
    "hardware.gradient_checkpointing": False,
    "hardware.cpu_offload": False,
    "hardware.max_restarts": 0,
    "hardware.timeout": 1800,
    "task.too_long": "refuse",
    "max_tokens": None,
    "init.run": None,
    "init.which": "best",
}
#: New names of moved modules, which older runs or a user's own code may name.
MOVED = {
    "policylab.callbacks.metrics_file": "policylab.runs.metrics_file",
    "policylab.launch.hydra_files": "policylab.cli.hydra_files",
    "policylab.launch.status": "policylab.runs.status",
    "policylab.launch.world": "policylab.distributed.world",
    "policylab.modules": "policylab.training",
    "policylab.rewards.memory": "policylab.rewards.state",
    "policylab.rollouts.decoders": "policylab.models.decoders",
    "policylab.rollouts.plan": "policylab.data.plan",
    "policylab.rollouts.text": "policylab.data.text",
    "policylab.rollouts.types": "policylab.data.rollout",
}
#: OmegaConf's message for a reference that cannot be resolved, such as one to an environment variable.
UNRESOLVED = re.compile(r"\w+ raised while resolving interpolation: (?P<why>.*)\s+full_key: (?P<key>\S+)")


def self_contained(config: DictConfig) -> dict[str, Any]:
    """The config as plain containers, resolved except for references to the environment.

    Raises:
        omegaconf.MissingMandatoryValue: when a ``???`` was left.
    """
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    with environment_unresolved():
        kept = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    both = _self_contained(kept, resolved)
    assert isinstance(both, dict)
    return both


@contextmanager
def environment_unresolved() -> Iterator[None]:
    """While active, ``${oc.env:NAME}`` resolves to itself.

    One with a default, such as ``${oc.env:NAME,8}``, is a setting and resolves to its value, unless its name is a
    secret's.
    """

    def itself(name: str, *default: Any) -> Any:
        if default and default[0] is not None and not is_secret(name):
            return oc.env(name, *default)
        return f"${{oc.env:{name}{',null' if default == (None,) else ''}}}"

    OmegaConf.register_new_resolver("oc.env", itself, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _self_contained(kept: Any, resolved: Any) -> Any:
    """A value that resolves to ``resolved`` when it is read again, with references to the environment if possible."""
    if isinstance(kept, str) and kept != resolved and _read(kept) == resolved:
        return kept
    if isinstance(resolved, dict):
        inner = kept if isinstance(kept, dict) else {}
        return {key: _self_contained(inner.get(key), value) for key, value in resolved.items()}
    if isinstance(resolved, list):
        items = kept if isinstance(kept, list) else [None] * len(resolved)
        return [_self_contained(*pair) for pair in zip(items, resolved, strict=True)]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", resolved) if isinstance(resolved, str) else resolved


def _read(text: str) -> Any:
    """The value that a text of a config resolves to; None if it cannot be resolved."""
    try:
        return OmegaConf.create({"value": text}).value
    except OmegaConfBaseException:
        return None


def learn_secrets(config: DictConfig) -> None:
    """Records the secrets of a config. From now on they are hidden wherever they appear."""
    remember(OmegaConf.to_container(config, resolve=True))


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as it is saved: plain values, secrets hidden."""
    hidden: dict[str, Any] = redact(self_contained(config))
    return hidden


def as_yaml(config: DictConfig) -> str:
    """The content of ``config.yaml``, which checkpoints hold as well."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def save_config(config: DictConfig, run_folder: Path) -> None:
    """Writes ``config.yaml``, atomically."""
    write_atomically(run_folder / "config.yaml", as_yaml(config))


def load_config(run_folder: Path) -> DictConfig:
    """The saved config of a run. An older one gets missing keys of `ADDED` and the new names of `MOVED`.

    Raises:
        UserError: when the file is empty or not a mapping.
    """
    config = OmegaConf.load(run_folder / "config.yaml")
    if not isinstance(config, DictConfig) or not config:
        raise UserError(f"{run_folder / 'config.yaml'} does not hold a config")
    for key, value in ADDED.items():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(config, group) if group else config
        if isinstance(node, DictConfig) and name not in node:
            OmegaConf.update(config, key, value)
    for key, value in leaves(OmegaConf.to_container(config)):
        if key.endswith("._target_") and (new := moved(str(value))):
            OmegaConf.update(config, key, new)
    return config


def moved(name: str) -> str | None:
    """The new dotted name if a name's module is in `MOVED`; else None."""
    for old, new in MOVED.items():
        if f"{name}.".startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None


def load_usable(run_folder: Path, parts: Sequence[str], trust_remote_code: bool) -> DictConfig:
    """The saved config of a run, for use. It was settled when the run started, so it is not checked or settled again.

    Args:
        parts: dotted keys that are needed; below them no value may be hidden or unresolvable.
        trust_remote_code: whether the current command allows it; the saved config cannot.

    Raises:
        UserError: naming the first key that was not saved, or cannot be resolved here.
    """
    config = with_consent(load_config(run_folder), trust_remote_code)
    file = run_folder / "config.yaml"
    for key, value in leaves(OmegaConf.to_container(config)):
        if key.startswith(tuple(parts)) and isinstance(value, str) and HIDDEN in value:
            raise UserError(
                f"{key} was given as plain text, and secrets are not saved; write ${{oc.env:NAME}}, an environment "
                f"variable, for it in {file}"
            )
    for part in parts:
        try:
            node = OmegaConf.select(config, part)
            if isinstance(node, DictConfig):
                learn_secrets(node)
        except OmegaConfBaseException as error:
            raise UserError(f"{file}: {unresolved(str(error)) or error}") from error
    return config


def unresolved(message: str) -> str | None:
    """``key: reason`` from OmegaConf's message about an unresolvable interpolation; None for other messages."""
    match = UNRESOLVED.search(message)
    return f"{match['key']}: {match['why'].strip(chr(34))}" if match else None


def check_folder_is_free(run_folder: Path) -> None:
    """Refuses a folder that already holds a run.

    Raises:
        UserError: naming the folder.
    """
    if (run_folder / "status.json").exists():
        raise UserError(
            f"{run_folder} already holds a run; give another hydra.run.dir, or resume it: "
            f"{word('resume', run_folder)}"
        )
