"""Low-rank adapters (LoRA, arXiv:2106.09685) by PEFT: the language model keeps its weights, and what trains are small
products of two matrices beside its linear layers. Left out, they leave the model that training started from, so that
the reference needs no weights of its own.

PEFT takes seconds to import; it is imported where adapters are made, and nowhere else.

Axes: ``I`` and ``O`` what goes into a layer and comes out, ``R`` the rank.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from policylab.errors import UserError, demand
from policylab.models.trunk import layers_above

#: What PEFT calls our adapters. A model that brings some of its own calls them otherwise.
NAME = "policylab"
#: Numbers of each weight that a fingerprint looks at.
LOOKED_AT = 1024


@dataclass(frozen=True)
class LoRA:
    """Adds ``alpha / rank * B A`` to linear layers of a language model.

    Args:
        rank: columns of ``B`` and rows of ``A``: ``rank * (I + O)`` weights beside a layer's ``I * O``.
        alpha: over the rank, what the product is multiplied by.
        target_modules: names of layers, such as ``q_proj`` or ``mlp.c_proj``; None takes all linear layers between
            embeddings and head.
        seed: draws ``A``; ``B`` is zero at the start.

    Raises:
        UserError: when PEFT is not installed, or a setting is out of its bounds.
    """

    rank: int
    alpha: float
    target_modules: list[str] | None
    seed: int

    def __post_init__(self) -> None:
        demand("model.adapter.rank", self.rank, 1)
        demand("model.adapter.alpha", self.alpha, 0, above=True)
        if self.target_modules is not None and not (
            isinstance(self.target_modules, list) and self.target_modules
        ):
            raise UserError(
                f"model.adapter.target_modules={self.target_modules!r} is no list of names; write [q_proj,v_proj], or "
                "null for all linear layers"
            )
        if importlib.util.find_spec("peft") is None:
            raise UserError(
                "model/adapter=lora needs PEFT, which is not installed; pip install 'policylab[lora]', or take "
                "model/adapter=none"
            )

    def adapt(self, model: Any, frozen_layers: int = 0) -> None:
        """Puts adapters into a Hugging Face model and takes the gradient from all else; it says the same as before.

        Adapters are in fp32 whatever the model is in: bf16 would swallow small steps.

        Args:
            frozen_layers: the lowest layers, which get none.

        Raises:
            UserError: when the model has no such layers.
        """
        names = self.targets(model, frozen_layers)
        peft = importlib.import_module("peft")
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,  # log-probs recorded while sampling must equal those recomputed in training
            target_modules=names,
            fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.config.name_or_path or None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            peft.inject_adapter_in_model(config, model, adapter_name=NAME)
        for layer in adapted_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.float()

    def targets(self, model: Any, frozen_layers: int) -> list[str]:
        """Names of the modules that get an adapter."""
        within = {id(m) for layer in layers_above(model, frozen_layers) for m in layer.modules()}
        linear = [
            name
            for name, module in model.named_modules()
            if id(module) in within and isinstance(module, nn.Linear | Conv1D)
        ]
        wanted = self.target_modules or {name.rpartition(".")[2] for name in linear}
        for target in wanted:
            if not any(name.endswith(f".{target}") for name in linear):
                known = sorted({name.rpartition(".")[2] for name in linear})
                raise UserError(
                    f"model.adapter.target_modules: {type(model).__name__} has no linear layer called {target} there; "
                    f"it has {', '.join(known) or 'none'}"
                )
        if not linear:
            raise UserError(
                f"model/adapter=lora: {type(model).__name__} has no linear layers; take model/adapter=none"
            )
        return [name for name in linear if any(name.endswith(f".{target}") for target in wanted)]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter of ours, by name. Told by what they hold, so that nothing imports PEFT in vain."""
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """While active, the model is the one that was adapted."""
    layers = list(adapted_layers(model).values())
    try:
        for layer in layers:
            layer._disable_adapters = True  # PEFT's own switch would take the adapters' gradient as well
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def modules_below(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of the model that was adapted: without the adapters, and PEFT's layers around their own."""
    added = set[int]()
    for layer in adapted_layers(model).values():
        added |= {id(module) for module in layer.modules()}
        added -= {id(module) for module in layer.base_layer.modules()}
    return (module for module in model.modules() if id(module) not in added)


def whole_weight(layer: Any) -> Tensor:
    """The weight of a linear layer together with its adapter, if it has one; laid out as the layer's own is."""
    if not _is_adapted(layer):
        return layer.weight.detach()
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return _merged(layer, layer.base_layer.weight.detach(), a.detach(), b.detach())


def whole_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A state of the model, in names and weights of a model without adapters that says the same.

    Args:
        state: weights by name, not necessarily the present ones.
    """
    layers = adapted_layers(model)
    for name, value in state.items():
        path, _, own = name.rpartition(".base_layer.")
        if path in layers:
            if own == "weight":
                value = _merged(layers[path], value, *_factors(path, state)).to(value.dtype)
            yield f"{path}.{own}", value
        elif not any(f".lora_{factor}.{NAME}." in name for factor in "AB"):
            yield name, value


def save_adapters(model: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the adapters alone, in a state of the model, in PEFT's format."""
    tensors = {}
    for path in adapted_layers(model):
        for letter, factor in zip("AB", _factors(path, state), strict=True):
            tensors[f"base_model.model.{path}.lora_{letter}.weight"] = factor.contiguous()
    folder.mkdir()
    model.peft_config[NAME].save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def fingerprint(weights: Iterable[Tensor]) -> str:
    """Tells the weights of one model from those of another by a thousand numbers of each."""
    digest = hashlib.sha256()
    for weight in weights:
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // LOOKED_AT)].float().cpu()
        digest.update(repr(tuple(weight.shape)).encode() + some.numpy().tobytes())
    return digest.hexdigest()


def shared_weights(model: nn.Module) -> dict[int, Any]:
    """What never trains, for ``copy.deepcopy`` to leave where it is: copies hold the same tensors."""
    return {id(p): p for p in model.parameters() if not p.requires_grad}


def _is_adapted(module: nn.Module) -> bool:
    factors = getattr(module, "lora_A", None)
    return isinstance(factors, nn.ModuleDict) and NAME in factors


def _factors(path: str, state: Mapping[str, Tensor]) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    return state[f"{path}.lora_A.{NAME}.weight"], state[f"{path}.lora_B.{NAME}.weight"]


def _merged(layer: Any, weight: Tensor, a: Float[Tensor, "R I"], b: Float[Tensor, "O R"]) -> Tensor:
    """In the wider of the two precisions, where the weight is. GPT-2 keeps its weights transposed, ``[I, O]``."""
    change = (b @ a).to(weight.device) * layer.scaling[NAME]
    return weight + (change.t() if layer.fan_in_fan_out else change)
