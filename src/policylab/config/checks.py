"""What can be said of a composed config before anything heavy is imported."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig, OmegaConf

from policylab.config.suggest import nearest
from policylab.errors import UserError, demand

#: All that stands at the root of a config.
ROOT_KEYS = {
    "algo", "callbacks", "detect_anomaly", "hardware", "iterations", "logger", "max_tokens", "model", "name", "optim",
    "paths", "plan", "plan_flops", "plan_memory", "resume", "reward", "rollout", "seed", "tags", "task", "validation",
}  # fmt: skip
#: Values outside any ``_target_``, whose type nothing else checks.
WHOLE_NUMBERS = (
    "seed", "iterations", "rollout.prompts", "rollout.group_size", "validation.every", "validation.prompts",
    "validation.batch_size",
)  # fmt: skip
#: Values outside any ``_target_`` that are true or false.
SWITCHES = (
    "detect_anomaly", "plan", "hardware.gradient_checkpointing", "hardware.compile", "hardware.cpu_offload",
)  # fmt: skip
#: Values with a few choices, of which "auto" is settled where the run starts.
CHOICES = {
    "hardware.precision": ("32-true", "bf16-mixed", "bf16-true"),
    "hardware.strategy": ("auto", "ddp", "fsdp"),
    "hardware.products": ("measured", "pytorch", "onednn"),
    "hardware.accelerator": ("auto", "cpu", "gpu"),
}


def check(config: DictConfig) -> None:
    """Refuses root values that nothing else looks at.

    Raises:
        UserError: naming the value and what to do.
    """
    unknown = sorted(set(map(str, config)) - ROOT_KEYS)
    if unknown:
        hint = nearest(unknown[0], sorted(ROOT_KEYS)).strip() or f"known are {', '.join(sorted(ROOT_KEYS))}"
        raise UserError(f"{unknown[0]} is not a key of the config; {hint}")
    for path in WHOLE_NUMBERS:
        demand_whole(path, OmegaConf.select(config, path), 0 if path == "seed" else 1)
    for path in ("max_tokens", "rollout.max_rows"):
        if (value := OmegaConf.select(config, path)) is not None:
            demand_whole(path, value, 1)
    if not isinstance(config.tags, ListConfig):
        raise UserError(f"tags={config.tags!r} is not a list; write tags=[{config.tags}]")
    demand("seed", config.seed, 0, 2**32 - 1)
    for path in ("hardware.devices", "hardware.num_nodes"):
        if OmegaConf.select(config, path) != "auto":
            demand_whole(path, OmegaConf.select(config, path), 1)
    demand_whole("hardware.max_restarts", config.hardware.max_restarts, 0)
    demand("hardware.timeout", config.hardware.timeout, 0, above=True)
    for path in SWITCHES:
        demand_switch(path, OmegaConf.select(config, path))
    if config.hardware.compile and config.hardware.gradient_checkpointing:
        raise UserError(
            "hardware.compile=true and hardware.gradient_checkpointing=true: compiled layers cannot be told to run "
            "again; take one of them"
        )
    for path, choices in CHOICES.items():
        if (value := OmegaConf.select(config, path)) not in choices:
            raise UserError(f"{path}={value} is not one of {', '.join(choices)}")
    if config.hardware.cpu_offload and config.hardware.strategy != "fsdp":
        raise UserError(
            f"hardware.cpu_offload=true is a thing of hardware.strategy=fsdp, and it is {config.hardware.strategy}"
        )


def demand_number(path: str, value: object, above: float) -> None:
    """Refuses what is no number, or not above its bound."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{path}={value!r} is not a number")
    demand(path, value, above, above=True)


def demand_switch(path: str, value: object) -> None:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool):
        raise UserError(f"{path}={value} is neither true nor false")


def demand_whole(path: str, value: object, low: int) -> None:
    """Refuses what is not a whole number, or below its bound."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path}={value!r} is not a whole number")
    demand(path, value, low)
