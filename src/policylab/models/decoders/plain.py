"""Whether a model does what its classes say and nothing beside."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from policylab.models.adapter import modules_below


def is_plain(lm: nn.Module, known: Collection[str]) -> bool:
    """True when every module is of a known class, none is hooked or has another forward, none drops out, and no
    weight is in float64.

    Sharding, quantization and adapters of others put classes or hooks of their own into a model, so they are noticed.
    Our adapters may be there: who writes the arithmetic out takes `policylab.models.adapter.whole_weight`.

    Args:
        known: names of classes. Another class of the same name is not torch's or transformers'.
    """
    return all(
        type(module).__name__ in known
        and type(module).__module__.partition(".")[0] in ("torch", "transformers")
        and not any(map(_changes, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))
        and "forward" not in vars(module)
        and not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
        and not (isinstance(module, nn.GELU) and module.approximate != "tanh")
        for module in modules_below(lm)
    ) and all(parameter.dtype != torch.float64 for parameter in lm.parameters())


def _changes(hook: object) -> bool:
    """transformers' own hooks only watch: they stay in a model once it was asked for its hidden states."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
