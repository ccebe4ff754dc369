"""A job of a sweep: its overrides, its unique label, its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from policylab.runs.redaction import redact_words
from policylab.runs.same_run import below
from policylab.runs.words import override_key

#: Keys that change neither the results of a job nor its identity.
SIDE = ("callbacks", "hydra", "logger", "name", "paths", "plan", "plan_flops", "plan_memory", "tags")
#: Most letters of a label.
LONGEST = 80


@dataclass(frozen=True)
class Job:
    """A job of a sweep."""

    label: str  #: such as ``ppo_s0``
    words: tuple[str, ...]  #: overrides for ``train.py``
    folder: Path
    processes: int = 1
    on_gpus: bool = False  #: whether each process uses a GPU


def matters(key: str) -> bool:
    """Whether another value of a key gives another job."""
    return not below(key.replace("/", "."), SIDE)


def identity(words: Iterable[str]) -> str:
    """The identity of the job with these overrides, in any order. Contains no secret.

    >>> identity(["seed=0", "algo=ppo"]) == identity(["algo=ppo", "seed=0", "logger=wandb"])
    True
    """
    return json.dumps(sorted(word for word in redact_words(words) if matters(override_key(word))))


def label_of(words: Sequence[str], base: Iterable[str], taken: Mapping[str, str]) -> str:
    """The label of a job, which is also its folder's name: its overrides without those that all jobs share.

    Args:
        base: overrides that all jobs share.
        taken: identities of other jobs, by label. A label that is taken or too long gets a few letters of a hash.

    >>> label_of(["seed=0", "algo=ppo", "optim.lr=0.001", "iterations=9"], ["iterations=9"], {})
    'ppo_lr-0.001_s0'
    """
    own = [word for word in redact_words(words) if word not in base and matters(override_key(word))]
    label = re.sub(r"[^\w.+-]+", "-", "_".join(map(_short, sorted(own, key=_rank)))).strip("._-") or "job"
    job = identity(words)
    if len(label) > LONGEST or taken.get(label, job) != job:
        label = f"{label[:LONGEST]}_{hashlib.sha256(job.encode()).hexdigest()[:6]}"
    return label


#: These come first in a label, by their value alone.
FIRST = ("experiments", "task", "algo", "model")


def _rank(word: str) -> tuple[int, int]:
    key = override_key(word)
    return (FIRST.index(key) if key in FIRST else len(FIRST), key == "seed")


def _short(word: str) -> str:
    key, _, value = word.partition("=")
    key, value = override_key(key).removesuffix("._target_"), value.strip("'\"")
    if key in FIRST:
        return value
    return f"s{value}" if key == "seed" else f"{re.split(r'[./@]', key)[-1]}-{value}"
