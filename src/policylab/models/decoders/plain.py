"""Whether a model consists of known classes, unchanged."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from policylab.models.adapted import modules_below


def is_plain(lm: nn.Module, known: Collection[str]) -> bool:
    """True when every module is of a known class, none has hooks or a changed forward, none applies dropout, and no
    weight is in float64.

    Sharding, quantization and adapters of other libraries are detected by the classes or hooks that they add. Our own
    adapters are allowed: decoders read weights by `policylab.models.adapted.whole_weight`, which adds the adapter.

    Args:
        known: names of classes, which must be torch's or transformers'.
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
    """Whether a hook may change results. transformers' own hooks only record hidden states; a model keeps them after it
    has returned hidden states once."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
