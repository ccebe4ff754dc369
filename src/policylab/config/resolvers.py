"""Words that the YAML files may use beside Hydra's own.

``${repo:}``                  root folder of the repository
``${slug:TEXT}``              TEXT as one folder name: ``org/model`` becomes ``org__model``
``${run_name:NAME,ALGO,MODEL}``  NAME if there is one, else ALGO-MODEL, as a folder name
``${unless:CONDITION,TEXT}``  TEXT, or null where CONDITION holds
``${run_dir:RESUME,PATH,PLAN}``  the folder of this job: that of the run to resume, else PATH, claimed
``${direction:MODE}``         maximize for "max", minimize for "min"
``${planned:PLAN,PATH}``      PATH, or where PLAN holds a folder that vanishes with this process

This module is imported before Hydra composes anything, so it imports nothing heavy.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from policylab.distributed.world import lasting
from policylab.runs.find import find_run
from policylab.runs.folder import claim


@cache
def run_dir(resume: str | None, path: str, plan: bool = False) -> str:
    """Folder of this job; asked again in this process, the answer is the same.

    Args:
        resume: run folder, checkpoint in one, or "latest"; None for a new run.
        path: folder for a new run; a relative one lies in the current folder. Taken names get ``_2``, ``_3``, ...
        plan: nothing will run, so nothing is claimed.
    """
    if plan:
        return vanishing_folder()
    return lasting("run folder", lambda: str(find_run(resume) if resume else claim(Path(path).absolute())))


@cache
def vanishing_folder() -> str:
    """For what Hydra insists on writing, where nothing is to be left: gone when this process ends."""
    folder = tempfile.mkdtemp(prefix="policylab-plan-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def slug(text: object) -> str:
    """Text as one folder name.

    >>> slug("org/model")
    'org__model'
    """
    return re.sub(r"[^\w.+-]+", "_", str(text).replace("/", "__")).strip("._") or "unnamed"


def run_name(name: str | None, algo: str, model: str) -> str:
    """What a run is called."""
    return slug(name or f"{algo}-{model}")


def register(root: Path) -> None:
    """Makes the resolvers known to OmegaConf.

    Args:
        root: the repository's root folder, which holds ``configs/`` and ``experiments/``.
    """
    OmegaConf.register_new_resolver("repo", lambda: str(root.resolve()), replace=True)
    OmegaConf.register_new_resolver("slug", slug, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver(
        "unless", lambda condition, text: None if condition else text, replace=True
    )
    OmegaConf.register_new_resolver(
        "direction", lambda mode: "minimize" if mode == "min" else "maximize", replace=True
    )
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    OmegaConf.register_new_resolver(
        "planned", lambda plan, path: vanishing_folder() if plan else path, replace=True
    )
