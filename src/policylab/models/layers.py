"""The layers of a Hugging Face causal LM, and the modules after the last layer.

Works for any architecture: layers are found by their number, later modules by watching a forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from policylab.errors import UserError, counted
from policylab.models.shape import layer_count
from policylab.models.watch import probe


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The model's list of layers: the outermost list with as many entries as the config has layers.

    Raises:
        UserError: when there is no such list, or more than one.
    """
    count = layer_count(lm)
    lists = {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise cannot_take_apart(lm, f"it has {len(outer)} lists of {count} layers, not 1")
    return outer[0]


@torch.no_grad()
def after_layers(lm: nn.Module) -> list[nn.Module]:
    """The modules between the last layer and the LM head, in order: the final norm."""
    layers = decoder_layers(lm)
    (owner,) = (m for m in lm.modules() if any(child is layers for child in m.children()))
    seen: list[nn.Module] = []

    def record(module: nn.Module, *_: Any) -> None:
        seen.append(module)

    watched = [layers[-1], *(child for child in owner.children() if child is not layers)]
    handles = [module.register_forward_hook(record) for module in watched]
    try:
        probe(lm)
    finally:
        for handle in handles:
            handle.remove()
    if layers[-1] not in seen:
        raise cannot_take_apart(lm, "its last layer is not called")
    return seen[seen.index(layers[-1]) + 1 :]


def layers_above(lm: nn.Module, count: int) -> list[nn.Module]:
    """The model's layers above the ``count`` lowest.

    Raises:
        UserError: when there are fewer layers, or they cannot be found.
    """
    layers = decoder_layers(lm)
    if count >= len(layers):
        raise UserError(
            f"optim.frozen_layers is {count}, but the model has {counted(len(layers), 'layer')}; take at "
            f"most {len(layers) - 1}"
        )
    return list(layers)[count:]


def freeze_below(lm: nn.Module, count: int) -> None:
    """Freezes the embeddings, a head tied to them, and the ``count`` lowest layers.

    Raises:
        UserError: when there are fewer layers, or they cannot be found.
    """
    upper = layers_above(lm, count)
    head = lm.get_output_embeddings()  # type: ignore[operator]
    tied = head.weight is lm.get_input_embeddings().weight  # type: ignore[operator]
    above = [*upper, *after_layers(lm), *([] if tied else [head])]
    trained = {id(parameter) for module in above for parameter in module.parameters()}
    for parameter in lm.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def too_many_own_layers(count: int, layers: int) -> UserError:
    """The error for a critic or a dueling head with more own layers than the policy has."""
    return UserError(
        f"own_layers={count}, but the policy has {counted(layers, 'layer')}; take at most {layers}, or all for a whole "
        "network"
    )


def cannot_take_apart(lm: nn.Module, reason: str) -> UserError:
    """The error for an architecture whose layers cannot be found or reused."""
    return UserError(
        f"{type(lm).__name__} cannot be taken apart into its layers ({reason}); take algo.critic.own_layers=0 (the "
        "policy's trunk), hardware.gradient_checkpointing=false, hardware.strategy=auto, optim.frozen_layers=0 and "
        "model/adapter=none"
    )
