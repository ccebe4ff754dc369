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
import logging
import re
import zlib
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

log = logging.getLogger(__name__)

#: Layers that PEFT takes for parts of fused experts, wherever they are, in a model that has some: shared experts and
#: dense layers get no adapter there.
FUSED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
#: What PEFT calls our adapters. A model that brings some of its own calls them otherwise.
NAME = "policylab"


@dataclass(frozen=True)
class LoRA:
    """Adds ``alpha / rank * B A`` to linear layers of a language model.

    Args:
        rank: columns of ``B`` and rows of ``A``: ``rank * (I + O)`` weights beside a layer's ``I * O``.
        alpha: over the rank, what the product is multiplied by.
        target_modules: names of layers, such as ``q_proj`` or ``mlp.c_proj``, or of the weights of fused experts, such
            as ``experts.down_proj``; None takes all linear layers and experts between embeddings and head.
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
        names, experts = self.targets(model, frozen_layers), self.experts(model, frozen_layers)
        if self.target_modules is None:
            tell_what_rests(model, frozen_layers, {*(f"{name}.weight" for name in names), *experts})
        peft = importlib.import_module("peft")
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,  # log-probs recorded while sampling must equal those recomputed in training
            target_modules=names,
            target_parameters=experts or None,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
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
        """Names of the linear layers that get an adapter."""
        within = {id(m) for layer in layers_above(model, frozen_layers) for m in layer.modules()}
        fused = bool(experts_within(model, frozen_layers))
        linear = [
            name
            for name, module in model.named_modules()
            if id(module) in within
            and isinstance(module, nn.Linear | Conv1D)
            and not _read_directly(model, name)
            and not (fused and name.rpartition(".")[2] in FUSED)
        ]
        known = {name.rpartition(".")[2] for name in linear}
        known |= {name.rpartition(".")[2] for name in experts_within(model, frozen_layers)}
        for target in self.target_modules or ():
            names = [*linear, *experts_within(model, frozen_layers)]
            if not any(name.endswith(f".{target}") for name in names):
                raise UserError(
                    f"model.adapter.target_modules: {type(model).__name__} has no linear layer called {target} there "
                    f"that can be adapted; it has {', '.join(sorted(known)) or 'none'}"
                )
        if not known:
            raise UserError(
                f"model/adapter=lora: {type(model).__name__} has no linear layers that can be adapted; take "
                "model/adapter=none"
            )
        return [name for name in linear if self._wants(name)]

    def experts(self, model: Any, frozen_layers: int) -> list[str]:
        """Names of the weights of fused experts that get an adapter, each expert one of its own."""
        return [name for name in experts_within(model, frozen_layers) if self._wants(name)]

    def _wants(self, name: str) -> bool:
        return self.target_modules is None or any(name.endswith(f".{t}") for t in self.target_modules)


def experts_within(model: Any, frozen_layers: int) -> list[str]:
    """Names of the weights ``[experts, ., .]`` by which a mixture keeps those of all experts together."""
    within = {id(p) for layer in layers_above(model, frozen_layers) for p in layer.parameters()}
    return [
        name
        for name, weight in model.named_parameters()
        if id(weight) in within and weight.ndim == 3 and len(weight) > 1 and "experts" in name.split(".")
    ]


def tell_what_rests(model: Any, frozen_layers: int, adapted: set[str]) -> None:
    """Says which matrices of the layers get no adapter, if any."""
    within = {id(p) for layer in layers_above(model, frozen_layers) for p in layer.parameters()}
    resting = [
        (re.sub(r"^.*?\.\d+\.", "", name), weight.numel())
        for name, weight in model.named_parameters()
        if id(weight) in within and weight.ndim >= 2 and name not in adapted
    ]
    if resting:
        kinds = ", ".join(dict.fromkeys(kind for kind, _ in resting))
        total = sum(numbers for _, numbers in resting)
        log.warning(
            "model/adapter=lora leaves weights without an adapter, %s in all: %s", f"{total:,}", kinds
        )


def _read_directly(model: nn.Module, name: str) -> bool:
    """Whether a model multiplies by the weight of a layer without calling the layer, so that an adapter around it would
    be passed by: all but the first of a state-space mixer (Mamba), at least in its fused kernels."""
    path, _, own = name.rpartition(".")
    mixer = model.get_submodule(path)
    return hasattr(mixer, "A_log") and hasattr(mixer, "ssm_state_size") and own != "in_proj"


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
    owners = {
        f"{plain_name(path)}.{_adapted_name(layer)}": path for path, layer in adapted_layers(model).items()
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
    """The name that a module or weight had before PEFT put a layer around it."""
    return name.replace(".base_layer", "")


def _adapted_name(layer: Any) -> str:
    """The name of the weight that an adapter stands beside."""
    return str(layer.parameter_name) if hasattr(layer, "num_experts") else "weight"


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
    """Tells the weights of one model from those of another, by shape, dtype and CRC-32 of each."""
    digest = hashlib.sha256()
    for weight in weights:
        content = weight.detach().cpu().flatten().view(torch.uint8).numpy()
        digest.update(f"{tuple(weight.shape)} {weight.dtype} {zlib.crc32(content.data)}\n".encode())
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
    """In the wider of the two precisions, where the weight is. GPT-2 keeps its weights transposed, ``[I, O]``; fused
    experts, one of whose adapters is ``[O, R]`` and ``[R, I]`` in a grid, are ``[E, O, I]`` or ``[E, I, O]``."""
    if hasattr(layer, "num_experts"):
        experts = layer.num_experts
        grids = b.reshape(len(b), -1, experts), a.reshape(experts, -1, a.shape[1])
        to = "eoi" if layer._did_swap_in_out_features else "eio"
        change = torch.einsum(f"ore,eri->{to}", *grids)
    else:
        change = (b @ a).t() if layer.fan_in_fan_out else b @ a
    return weight + change.to(weight.device) * layer.scaling[NAME]
