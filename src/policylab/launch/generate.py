"""Completes prompts with a trained policy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from policylab.callbacks.tables import console
from policylab.config.checks import check_number, check_switch, check_whole
from policylab.errors import UserError
from policylab.launch.imports import UNUSED, absent
from policylab.runs.find import find_run
from policylab.runs.saved_config import load_usable

if TYPE_CHECKING:
    from policylab.models.policy import Policy


#: Parts of a run's config that are needed to generate.
PARTS = ("model", "rollout", "task.instruction", "hardware")


def generate_job(config: DictConfig) -> None:
    """The Hydra task of ``generate.py``."""
    check(config)
    run_folder = find_run(config.run)
    trained_with = load_usable(run_folder, PARTS, config.trust_remote_code)
    policy = load_policy(run_folder, config.policy, trained_with, config.trust_remote_code)
    for prompt in prompts(config.prompt):
        for text in completions(policy, prompt, config, trained_with):
            console().print(Text.assemble((prompt, "dim"), text), soft_wrap=True)


def check(config: DictConfig) -> None:
    """Refuses values before anything is loaded.

    Raises:
        UserError: naming the value.
    """
    check_whole("n", config.n, 1)
    check_whole("seed", config.seed, 0)
    if config.max_new_tokens is not None:
        check_whole("max_new_tokens", config.max_new_tokens, 1)
    if config.temperature is not None:
        check_number("temperature", config.temperature, 0)
    check_switch("trust_remote_code", config.trust_remote_code)
    if config.prompt is not None and not str(config.prompt).strip():
        raise UserError("prompt is empty; give the beginning of a text, or leave prompt out to be asked")


def load_policy(
    run_folder: Path, which: str, trained_with: DictConfig, trust_remote_code: bool = False
) -> Policy:
    """A policy that a run has exported, on the GPU if there is one.

    Args:
        trust_remote_code: whether this command allows it; the saved config cannot.

    Raises:
        UserError: when the run has not exported it.
    """
    import torch

    with absent(UNUSED):
        from policylab.models.loading import LoadOptions, from_folder
        from policylab.models.policy import Policy
        from policylab.rollouts.products import choose_products

    choose_products(trained_with.hardware.products)
    folder = run_folder / "model" / which
    if not folder.is_dir():
        exported = sorted(path.name for path in (run_folder / "model").glob("[!.]*"))
        raise UserError(f"no policy at {folder}; this run has exported {', '.join(exported) or 'none'}")
    model = trained_with.model
    options = LoadOptions(model.dtype, model.attn_implementation, trust_remote_code, model.get("chat"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Policy(from_folder(folder, options, source=str(folder)), critic=None).to(device).eval()


def prompts(given: str | None) -> Iterator[str]:
    """The given prompt, or each line that a person types, until an empty line or Ctrl-D."""
    if given is not None:
        yield str(given)
        return
    if sys.stdin.isatty():
        console().print("type the beginning of a text; an empty line ends", style="dim")
    while line := read_line():
        yield line


def read_line() -> str:
    """One line of standard input; empty at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"a line of the input is not {error.encoding}: {error.reason}") from error


def completions(policy: Policy, text: str, config: DictConfig, trained_with: DictConfig) -> list[str]:
    """``n`` completions of a prompt, encoded as in training.

    Raises:
        UserError: when prompt and completion do not fit the model's context.
    """
    from policylab.rollouts.cached import CachedEngine
    from policylab.rollouts.noise import GENERATE, uniforms
    from policylab.rollouts.row_limit import RowLimit

    rollout = trained_with.rollout
    engine = CachedEngine(
        temperature=rollout.temperature if config.temperature is None else config.temperature,
        max_new_tokens=rollout.max_new_tokens if config.max_new_tokens is None else config.max_new_tokens,
    )
    instruction = OmegaConf.select(trained_with, "task.instruction")
    (prompt,) = policy.prompts([(text, "", None)], instruction)
    noise = uniforms(config.seed, GENERATE, 0, range(config.n), engine.max_new_tokens)
    limit = RowLimit(rollout.get("max_rows"))
    sampled = limit.sample(engine, policy, [prompt], config.n, noise)
    return [
        policy.decode(tokens[:length].tolist())
        for tokens, length in zip(sampled.tokens, sampled.lengths.tolist(), strict=True)
    ]
