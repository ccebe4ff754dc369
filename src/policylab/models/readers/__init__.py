"""Readers: how language models read a rollout. The choice is made once, where a policy is built.

A new kind is a file with a class that has a `Reader`'s members and says by ``reads`` which models it is for, and an
entry in `READERS`. A model may also bring its own (`policylab.models.loading.LoadedModel`).
"""

from __future__ import annotations

from typing import Any

from policylab.models.readers.packed import PackedCausal
from policylab.models.readers.padded import PaddedCausal
from policylab.models.readers.reader import Pass, Reader

#: The first that reads a model is taken.
READERS = (PackedCausal, PaddedCausal)


def reader_for(model: Any) -> Reader:
    """The reader of a Hugging Face model, with an LM head or without one."""
    return next(kind for kind in READERS if kind.reads(model))(model)
