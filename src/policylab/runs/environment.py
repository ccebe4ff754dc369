"""``env.json``: versions, machine, commit and command line of a run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from policylab.distributed.machine import cores, cpu_name
from policylab.runs.folder import write_json
from policylab.runs.redaction import redact_words

PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "safetensors",
    "torchmetrics",
    "wandb",
    "numpy",
    "vaderSentiment",
)


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the working tree and whether it has uncommitted changes; both None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that results may depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_environment(repository: Path) -> dict[str, Any]:
    """This machine, its software and the command. Imports torch, to list GPUs."""
    import torch

    from policylab import __version__

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "policylab": __version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "cpu_cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "git": git_state(repository),
        "command": shlex.join([Path(sys.executable).name, *redact_words(sys.argv)]),
        "folder": os.getcwd(),
    }


def record_command(overrides: list[str], run_folder: Path) -> None:
    """Writes only the command line. Call it before ``status.json`` is written: a run that has one can be resumed."""
    write_json(run_folder / "env.json", {"overrides": redact_words(overrides)})


def record_environment(
    run_folder: Path, repository: Path, overrides: list[str], extra: dict[str, Any], *, writes: bool
) -> dict[str, Any]:
    """The environment of this session, written to ``env.json`` before those of earlier sessions.

    Args:
        writes: whether this is the process that writes the file.
    """
    environment = {**describe_environment(repository), **extra, "overrides": redact_words(overrides)}
    file = run_folder / "env.json"
    if writes:
        before = json.loads(file.read_text(encoding="utf-8"))
        resumed = before.keys() != {"overrides"}
        sessions = [*before.pop("earlier_sessions", []), before] if resumed else []
        write_json(file, environment | ({"earlier_sessions": sessions} if sessions else {}))
    return environment
