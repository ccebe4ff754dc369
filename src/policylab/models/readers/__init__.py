"""Readers: how language models read a rollout. The reader is chosen once, when the policy is built.

A new kind is a file with a class that implements `Reader`, with a ``reads`` that says which models it supports, and an
entry in `READERS`. A model may also have its own reader (`policylab.models.loading.LoadedModel`).
"""

from __future__ import annotations

from typing import Any

from policylab.models.readers.packed import PackedCausal
from policylab.models.readers.padded import PaddedCausal
from policylab.models.readers.reader import Pass, Reader

#: In order of preference: the first that supports a model is used.
READERS = (PackedCausal, PaddedCausal)


def reader_for(model: Any) -> Reader:
    """The reader of a Hugging Face model, with an LM head or without one."""
    return next(kind for kind in READERS if kind.reads(model))(model)
