"""Completes prompts with trained policies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from policylab.callbacks.tables import console
from policylab.config.checks import check_whole
from policylab.errors import UserError
from policylab.launch.asked import check_asked, output_file, sampling
from policylab.launch.imports import UNUSED, absent
from policylab.runs.find import find_runs
from policylab.runs.folder import write_json
from policylab.runs.run import Run
from policylab.runs.saved_config import load_usable
from policylab.user_code import short_path

if TYPE_CHECKING:
    from policylab.models.policy import Policy


#: Parts of a run's config that are needed to generate.
PARTS = ("model", "rollout", "task.instruction", "hardware")


@dataclass(frozen=True)
class Trained:
    """A policy that a run has exported."""

    run: Path
    policy: Policy
    config: DictConfig  #: config of the run


def generate_job(config: DictConfig) -> None:
    """The Hydra task of ``generate.py``."""
    check(config)
    out = None if config.out is None else output_file(config.out)
    runs = find_runs(config.run, Path(config.paths.logs))
    trained = [load_trained(run, config.policy, config.trust_remote_code) for run in runs]
    answers = list[dict[str, Any]]()
    for prompt in prompts(config.prompt):
        for one in trained:
            if len(trained) > 1:
                console().print(short_path(one.run), style="dim", soft_wrap=True)
            texts = completions(one, prompt, config)
            answers.append(
                {"run": str(one.run), "policy": config.policy, "prompt": prompt, "completions": texts}
            )
            for text in texts:
                console().print(Text.assemble((prompt, "dim"), text), soft_wrap=True)
        if out is not None:
            write_json(out, answers)


def check(config: DictConfig) -> None:
    """Refuses values before anything is loaded.

    Raises:
        UserError: naming the value.
    """
    check_asked(config)
    check_whole("seed", config.seed, 0)
    if config.prompt is not None and not str(config.prompt).strip():
        raise UserError("prompt is empty; give the beginning of a text, or leave prompt out to be asked")


def load_trained(run: Path, which: str, trust_remote_code: bool = False) -> Trained:
    """A policy that a run has exported, on the GPU if there is one.

    Args:
        which: best or final.
        trust_remote_code: whether this command allows it; the saved config cannot.

    Raises:
        UserError: when the run has not exported it.
    """
    config = load_usable(run, PARTS, trust_remote_code)
    with absent(UNUSED):
        policy = Run(run, which, trust_remote_code).policy

    import torch

    from policylab.rollouts.products import choose_products

    choose_products(config.hardware.products)
    return Trained(run, policy.to("cuda" if torch.cuda.is_available() else "cpu"), config)


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


def completions(trained: Trained, text: str, asked: DictConfig) -> list[str]:
    """``n`` completions of a prompt, encoded as in training.

    Args:
        asked: the config of ``generate.py``.

    Raises:
        UserError: when prompt and completion do not fit the model's context.
    """
    from policylab.functional.behaviour import greedy
    from policylab.rollouts.cached import CachedEngine
    from policylab.rollouts.noise import GENERATE, uniforms
    from policylab.rollouts.row_limit import RowLimit

    policy, rollout = trained.policy, trained.config.rollout
    own = {"temperature": rollout.temperature, "max_new_tokens": rollout.max_new_tokens}
    engine = CachedEngine(**{**own, **sampling(asked)})
    instruction = OmegaConf.select(trained.config, "task.instruction")
    (prompt,) = policy.prompts([(text, "", None)], instruction)
    noise = uniforms(asked.seed, GENERATE, 0, range(asked.n), engine.max_new_tokens)
    behaviour = greedy if asked.temperature == 0 else None
    limit = RowLimit(rollout.get("max_rows"))
    sampled = limit.sample(engine, policy, [prompt], asked.n, noise, behaviour)
    return [
        policy.decode(tokens[:length].tolist())
        for tokens, length in zip(sampled.tokens, sampled.lengths.tolist(), strict=True)
    ]
