"""Checks of a composed config that need no heavy import."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from policylab.config.suggest import nearest
from policylab.errors import UserError, check_range
from policylab.models.folder import check_folder
from policylab.runs.parents import POLICIES, RUN, WHICH
from policylab.runs.words import leaves

#: All keys at the root of a config.
ROOT_KEYS = {
    "algo", "callbacks", "detect_anomaly", "hardware", "init", "iterations", "logger", "max_tokens", "model", "name",
    "optim", "paths", "plan", "plan_flops", "plan_memory", "resume", "reward", "rollout", "seed", "tags", "task",
    "validation",
}  # fmt: skip
#: Whole numbers outside any ``_target_``: nothing else checks their type.
WHOLE_NUMBERS = (
    "seed", "iterations", "rollout.prompts", "rollout.group_size", "validation.every", "validation.prompts",
    "validation.batch_size",
)  # fmt: skip
#: Booleans outside any ``_target_``.
SWITCHES = (
    "detect_anomaly", "plan", "hardware.gradient_checkpointing", "hardware.compile", "hardware.cpu_offload",
)  # fmt: skip
#: Values with a few choices; `policylab.config.hardware` replaces some "auto".
CHOICES = {
    "hardware.precision": ("32-true", "bf16-mixed", "bf16-true"),
    "hardware.strategy": ("auto", "ddp", "fsdp"),
    "hardware.products": ("measured", "pytorch", "onednn"),
    "hardware.accelerator": ("auto", "cpu", "gpu"),
}


def check(config: DictConfig) -> None:
    """Refuses values that nothing else checks.

    Raises:
        UserError: naming the value and what to do.
    """
    unknown = sorted(set(map(str, config)) - ROOT_KEYS)
    if unknown:
        hint = nearest(unknown[0], sorted(ROOT_KEYS)).strip() or f"known are {', '.join(sorted(ROOT_KEYS))}"
        raise UserError(f"{unknown[0]} is not a key of the config; {hint}")
    for path in WHOLE_NUMBERS:
        check_whole(path, OmegaConf.select(config, path), 0 if path == "seed" else 1)
    for path in ("max_tokens", "rollout.max_rows"):
        if (value := OmegaConf.select(config, path)) is not None:
            check_whole(path, value, 1)
    if not isinstance(config.tags, ListConfig):
        raise UserError(f"tags={config.tags!r} is not a list; write tags=[{config.tags}]")
    check_range("seed", config.seed, 0, 2**32 - 1)
    check_init(config)
    for path in ("hardware.devices", "hardware.num_nodes"):
        if OmegaConf.select(config, path) != "auto":
            check_whole(path, OmegaConf.select(config, path), 1)
    check_whole("hardware.max_restarts", config.hardware.max_restarts, 0)
    check_range("hardware.timeout", config.hardware.timeout, 0, above=True)
    if OmegaConf.select(config, "logger.csv") is None:
        raise UserError("logger.csv is off, but summary and resume read metrics.csv; leave it on")
    for path in SWITCHES:
        check_switch(path, OmegaConf.select(config, path))
    if config.hardware.compile and config.hardware.gradient_checkpointing:
        raise UserError(
            "hardware.compile=true and hardware.gradient_checkpointing=true: compiled layers cannot be recomputed; "
            "take one of them"
        )
    for path, choices in CHOICES.items():
        if (value := OmegaConf.select(config, path)) not in choices:
            raise UserError(f"{path}={value} is not one of {', '.join(choices)}")
    if config.hardware.cpu_offload and config.hardware.strategy != "fsdp":
        raise UserError(
            f"hardware.cpu_offload=true needs hardware.strategy=fsdp, and it is {config.hardware.strategy}"
        )


def check_init(config: DictConfig) -> None:
    """Refuses ``init.run`` without ``init=RUN`` on the command line, other weights than that run's, and ``init.which``
    without a parent. A resumed run may find its parent's policy in another folder."""
    run, which = (OmegaConf.select(config, key) for key in (RUN, WHICH))
    if run is None and which not in (None, POLICIES[0]):
        raise UserError(f"init.which={which} selects a policy of init=RUN, and there is no init=")
    path = config.model.get("path")
    if not isinstance(config.init, DictConfig) or (run is not None and path is None):
        raise UserError(f"init={run or config.init} works only on the command line: python train.py init=RUN")
    if run is None or config.get("resume"):
        return
    policy = Path(run, "model", str(which))
    if Path(path).expanduser().resolve() != policy.expanduser().resolve():
        raise UserError(
            f"init.run={run} starts from {policy}, and model.path={path}; give init={run} without model.path, or "
            "model.path without init.run"
        )


def check_number(path: str, value: object, low: float, *, above: bool = False) -> None:
    """Refuses a value that is not a number or is below its bound."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{path}={value!r} is not a number")
    check_range(path, value, low, above=above)


def check_switch(path: str, value: object) -> None:
    """Refuses a value that is neither true nor false."""
    if not isinstance(value, bool):
        raise UserError(f"{path}={value} is neither true nor false")


def check_whole(path: str, value: object, low: int) -> None:
    """Refuses a value that is not a whole number, or below its bound."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path}={value!r} is not a whole number")
    check_range(path, value, low)


def check_model_exists(config: DictConfig) -> None:
    """Refuses a model that is neither on this machine nor reachable, before heavy imports take seconds.

    Raises:
        UserError: naming the model, the searched places, and what works offline.
    """
    path = config.model.get("path")
    if path is not None:
        check_folder(path)
    if config.model["_target_"] == "policylab.models.loading.from_hub" and config.model.path is None:
        from policylab.models import hub

        if not hub.is_cached(config.model.name):
            hub.check_reachable(config.model.name)


def tuned_for_others(config: DictConfig, pair: str | None) -> str | None:
    """A warning if values tuned for an embedded model are used with other weights.

    Args:
        pair: the choice of ``algo_model``; its file may not exist.
    """
    path = OmegaConf.select(config, "model.path")
    file = Path(config.paths.repo, "configs", "algo_model", f"{pair}.yaml")
    if path is None or not Path(path).expanduser().is_dir() or not file.is_file():
        return None
    tuned = leaves(OmegaConf.to_container(OmegaConf.load(file)))
    used = [f"{key}={value}" for key, value in tuned if OmegaConf.select(config, key) == value]
    if not used:
        return None
    return (
        f"{' '.join(used)} was tuned for the weights that come with model={config.model.name}, not for those in "
        f"{path}; give your own values, or ~algo_model for the defaults of other models"
    )
