"""Resolvers for the YAML files, in addition to Hydra's own.

``${repo:}``                  root folder of the repository
``${slug:TEXT}``              TEXT as one folder name: ``org/model`` becomes ``org__model``
``${run_name:NAME,ALGO,MODEL}``  NAME if it is given, else ALGO-MODEL, as a folder name
``${unless:CONDITION,TEXT}``  TEXT, or null if CONDITION is true
``${run_dir:RESUME,PATH,PLAN}``  the folder of this job: that of the run to resume, else a new one at PATH
``${direction:MODE}``         maximize for "max", minimize for "min"
``${planned:PLAN,PATH}``      PATH, or a temporary folder if PLAN is true
``${most_tokens:NEW,TURNS}``  NEW times TURNS: the most tokens that the policy writes in an episode

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

from policylab.distributed.world import made_once
from policylab.errors import UserError
from policylab.runs.find import find_run
from policylab.runs.folder import claim


@cache
def run_dir(resume: str | None, path: str, plan: bool = False) -> str:
    """Folder of this job; the same at every call in this process.

    Args:
        resume: run folder, checkpoint in one, or "latest"; None for a new run.
        path: folder for a new run, relative to the current folder. Taken names get ``_2``, ``_3``, ...
        plan: nothing will run, so the folder is temporary.
    """
    if plan:
        return temporary_folder()
    return made_once("run folder", lambda: str(find_run(resume) if resume else claim(Path(path).absolute())))


@cache
def temporary_folder() -> str:
    """A folder for the files that Hydra always writes; removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="policylab-plan-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def slug(text: object) -> str:
    """Text as one folder name.

    >>> slug("org/model")
    'org__model'
    """
    return re.sub(r"[^\w.+-]+", "_", str(text).replace("/", "__")).strip("._") or "unnamed"


def run_name(name: object | None, algo: str, model: str) -> str:
    """The name of a run: one folder.

    Raises:
        UserError: for a name that would be a path.
    """
    if name is not None and (re.search(r"[/\\]", str(name)) or set(str(name)) <= set(". ")):
        raise UserError(f"name={name} is not a folder name; for another folder write hydra.run.dir=PATH")
    return slug(f"{algo}-{model}" if name is None else name)


def most_tokens(new: object, turns: object) -> object:
    """Most tokens that the policy writes in an episode: ``new`` in each of its turns, without those of the answers.

    Values that are no whole numbers are refused where they are used, so they are not multiplied.

    >>> most_tokens(4, 3)
    12
    """
    return new * turns if isinstance(new, int) and isinstance(turns, int) else new


def register(root: Path) -> None:
    """Registers the resolvers with OmegaConf.

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
    OmegaConf.register_new_resolver("most_tokens", most_tokens, replace=True)
    OmegaConf.register_new_resolver(
        "planned", lambda plan, path: temporary_folder() if plan else path, replace=True
    )
