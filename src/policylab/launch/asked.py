"""Shared by ``evaluate.py`` and ``generate.py``: settings of sampling, and the output file."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from policylab.config.checks import check_number, check_switch, check_whole
from policylab.errors import UserError
from policylab.runs.folder import RECORDS


def check_asked(config: DictConfig) -> None:
    """Checks the settings of both commands, before anything is loaded.

    Raises:
        UserError: naming the value.
    """
    check_whole("n", config.n, 1)
    for key, low in (("seed", 0), ("max_new_tokens", 1)):
        if config[key] is not None:
            check_whole(key, config[key], low)
    if config.temperature is not None:
        check_number("temperature", config.temperature, 0)
    if config.temperature == 0 and config.n > 1:
        raise UserError(
            f"n={config.n} with temperature=0: all completions of a prompt would be the same; leave n out"
        )
    check_switch("trust_remote_code", config.trust_remote_code)


def sampling(config: DictConfig) -> dict[str, float]:
    """The values of a run's ``rollout`` that a command changes. Temperature 0 is not one of them: greedy sampling takes
    the same tokens at any temperature."""
    given = {key: config[key] for key in ("temperature", "max_new_tokens")}
    return {key: value for key, value in given.items() if value}


def output_file(out: str) -> Path:
    """The file that ``out`` names.

    Raises:
        UserError: when it is a folder, a log or another file that holds no results, or its folder does not exist.
    """
    path = Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"out={out} is a folder; give the file to write")
    if path.suffix == ".log":
        raise UserError(f"out={out} is the name of a log; results are JSON: give FILE.json")
    if not path.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {path.parent}; create it first")
    if not may_be_written(path):
        raise UserError(
            f"out={out} is no file of results; give the name of a new one, or that of earlier results"
        )
    return path


def may_be_written(path: Path) -> bool:
    """Whether results may be written there: over nothing else than earlier ones, and not where a run writes."""
    if not path.exists():
        return path.name not in RECORDS or not (path.parent / "status.json").exists()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    results = content if isinstance(content, list) else [content]
    return all(isinstance(x, dict) and "run" in x and ("metrics" in x or "completions" in x) for x in results)
