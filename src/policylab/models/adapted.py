"""Turns off, merges and saves the adapters that `policylab.models.adapter` adds.

Adapted layers are recognized by their attributes, so this module does not import PEFT.

Axes: ``I`` and ``O`` inputs and outputs of a layer, ``R`` the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

#: PEFT's name for our adapters. Adapters that come with a checkpoint have other names.
NAME = "policylab"


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with one of our adapters, by name."""
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """While active, the model computes without its adapters."""
    layers = list(adapted_layers(model).values())
    try:
        for layer in layers:
            layer._disable_adapters = True  # PEFT's own switch would also turn off the adapters' gradient
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def modules_below(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of the model without its adapters and PEFT's wrappers."""
    added = set[int]()
    for layer in adapted_layers(model).values():
        added |= {id(module) for module in layer.modules()}
        added -= {id(module) for module in layer.base_layer.modules()}
    return (module for module in model.modules() if id(module) not in added)


def whole_weight(layer: Any) -> Tensor:
    """The weight of a linear layer with its adapter, if any, added; in the layout of the layer's own weight."""
    if not _is_adapted(layer):
        return layer.weight.detach()
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return _merged(layer, layer.base_layer.weight.detach(), a.detach(), b.detach())


def whole_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A state of the model with its adapters merged in, under the names of a model without adapters.

    Args:
        state: weights by name, not necessarily the model's current ones.
    """
    owners = {  # by the name of the weight that an adapter is added to
        f"{plain_name(path)}.{layer.parameter_name if hasattr(layer, 'num_experts') else 'weight'}": path
        for path, layer in adapted_layers(model).items()
    }
    for name, value in state.items():
        if any(f".lora_{factor}.{NAME}." in name for factor in "AB"):
            continue
        plain = plain_name(name)
        if (path := owners.get(plain)) is not None:
            layer = model.get_submodule(path)
            value = _merged(layer, value, *_factors(path, state)).to(value.dtype)
        yield plain, value


def plain_name(name: str) -> str:
    """The name of a module or weight before PEFT wrapped it."""
    return name.replace(".base_layer", "")


def save_adapters(model: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the adapters in a state of the model, without its other weights, in PEFT's format."""
    tensors = {}
    for path in adapted_layers(model):
        for letter, factor in zip("AB", _factors(path, state), strict=True):
            tensors[f"base_model.model.{path}.lora_{letter}.weight"] = factor.contiguous()
    folder.mkdir()
    model.peft_config[NAME].save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def shared_weights(model: nn.Module) -> dict[int, Any]:
    """Frozen weights, as a memo for ``copy.deepcopy``: copies share these tensors."""
    return {id(p): p for p in model.parameters() if not p.requires_grad}


def _is_adapted(module: nn.Module) -> bool:
    factors = getattr(module, "lora_A", None)
    return isinstance(factors, nn.ModuleDict) and NAME in factors


def _factors(path: str, state: Mapping[str, Tensor]) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    return state[f"{path}.lora_A.{NAME}.weight"], state[f"{path}.lora_B.{NAME}.weight"]


def _merged(layer: Any, weight: Tensor, a: Float[Tensor, "R I"], b: Float[Tensor, "O R"]) -> Tensor:
    """Weight plus adapter, in the wider of the two precisions, on the weight's device. GPT-2 keeps its weights
    transposed, ``[I, O]``; fused experts are ``[E, O, I]`` or ``[E, I, O]``, with a pair of factors for each expert."""
    if hasattr(layer, "num_experts"):
        experts = layer.num_experts
        grids = b.reshape(len(b), -1, experts), a.reshape(experts, -1, a.shape[1])
        to = "eoi" if layer._did_swap_in_out_features else "eio"
        change = torch.einsum(f"ore,eri->{to}", *grids)
    else:
        change = (b @ a).t() if layer.fan_in_fan_out else b @ a
    return weight + change.to(weight.device) * layer.scaling[NAME]
