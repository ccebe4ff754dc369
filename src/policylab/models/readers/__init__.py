"""Readers: how language models read a rollout. The reader is chosen once, when the policy is built.

A new kind is a file with a class that implements `Reader`, with a ``reads`` that says which models it supports, and an
entry in `READERS`. A model may also have its own reader (`policylab.models.loading.LoadedModel`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from policylab.contracts import check_members
from policylab.models.readers.packed import PackedCausal
from policylab.models.readers.padded import PaddedCausal
from policylab.models.readers.reader import Pass, Reader

#: In order of preference: the first that supports a model is used.
READERS = (PackedCausal, PaddedCausal)


def reader_for(model: Any, own: Callable[[Any], Reader] | None = None) -> Reader:
    """The reader of a Hugging Face model, with an LM head or without one.

    Args:
        own: makes the model's own reader.

    Raises:
        UserError: when that lacks a member of `Reader`.
    """
    if own is None:
        return next(kind for kind in READERS if kind.reads(model))(model)
    reader = own(model)
    check_members("reader", reader, Reader)
    return reader
