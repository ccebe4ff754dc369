"""Low-rank adapters (LoRA, arXiv:2106.09685) with PEFT: the language model's weights are frozen, and products of two
small matrices, added to its linear layers, are trained. Without its adapters, the model is the one that training
started from, so the reference needs no weights of its own.

PEFT takes seconds to import, so it is imported only where adapters are created.

Axes: ``I`` and ``O`` inputs and outputs of a layer, ``R`` the rank.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from policylab.errors import UserError, check_range
from policylab.models.adapted import NAME, adapted_layers
from policylab.models.layers import layers_above

log = logging.getLogger(__name__)

#: Names by which PEFT recognizes parts of fused experts. In a model with fused experts, shared experts and dense layers
#: with these names get no adapter.
FUSED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class LoRA:
    """Adds ``alpha / rank * B A`` to linear layers of a language model.

    Args:
        rank: columns of ``B`` and rows of ``A``: ``rank * (I + O)`` weights for a layer's ``I * O``.
        alpha: ``alpha / rank`` scales the product.
        target_modules: names of layers, such as ``q_proj`` or ``mlp.c_proj``, or of the weights of fused experts, such
            as ``experts.down_proj``; None: all linear layers and experts between embeddings and head.
        seed: seed of ``A``; ``B`` is zero at the start.

    Raises:
        UserError: when PEFT is not installed, or a setting is out of its bounds.
    """

    rank: int
    alpha: float
    target_modules: list[str] | None
    seed: int

    def __post_init__(self) -> None:
        check_range("model.adapter.rank", self.rank, 1)
        check_range("model.adapter.alpha", self.alpha, 0, above=True)
        if self.target_modules is not None and not (
            isinstance(self.target_modules, list) and self.target_modules
        ):
            raise UserError(
                f"model.adapter.target_modules={self.target_modules!r} is not a list of names; write [q_proj,v_proj], "
                "or null for all linear layers"
            )
        if importlib.util.find_spec("peft") is None:
            raise UserError(
                "model/adapter=lora needs PEFT, which is not installed; pip install 'policylab[lora]', or take "
                "model/adapter=none"
            )

    def adapt(self, model: Any, frozen_layers: int = 0) -> None:
        """Adds adapters to a Hugging Face model and freezes all else; its outputs do not change.

        Adapters are in fp32 whatever the model's dtype, because bf16 would round small steps to nothing.

        Args:
            frozen_layers: this many of the lowest layers get no adapter.

        Raises:
            UserError: when the model has no such layers.
        """
        names, experts = self.targets(model, frozen_layers), self.experts(model, frozen_layers)
        if self.target_modules is None:
            warn_of_frozen(model, frozen_layers, {*(f"{name}.weight" for name in names), *experts})
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
        """Names of the weights of fused experts that get an adapter, one for each expert."""
        return [name for name in experts_within(model, frozen_layers) if self._wants(name)]

    def _wants(self, name: str) -> bool:
        return self.target_modules is None or any(name.endswith(f".{t}") for t in self.target_modules)


def experts_within(model: Any, frozen_layers: int) -> list[str]:
    """Names of the weights ``[experts, ., .]`` in which a mixture keeps all experts of a layer."""
    within = {id(p) for layer in layers_above(model, frozen_layers) for p in layer.parameters()}
    return [
        name
        for name, weight in model.named_parameters()
        if id(weight) in within and weight.ndim == 3 and len(weight) > 1 and "experts" in name.split(".")
    ]


def warn_of_frozen(model: Any, frozen_layers: int, adapted: set[str]) -> None:
    """Warns of matrices inside the layers that get no adapter."""
    within = {id(p) for layer in layers_above(model, frozen_layers) for p in layer.parameters()}
    frozen = [
        (re.sub(r"^.*?\.\d+\.", "", name), weight.numel())
        for name, weight in model.named_parameters()
        if id(weight) in within and weight.ndim >= 2 and name not in adapted
    ]
    if frozen:
        kinds = ", ".join(dict.fromkeys(kind for kind, _ in frozen))
        total = sum(numbers for _, numbers in frozen)
        log.warning(
            "model/adapter=lora leaves weights without an adapter, %s in all: %s", f"{total:,}", kinds
        )


def _read_directly(model: nn.Module, name: str) -> bool:
    """Whether a model multiplies by a layer's weight without calling the layer, so that an adapter around it would have
    no effect. Fused kernels of state-space mixers (Mamba) do so for all but the mixer's first layer."""
    path, _, own = name.rpartition(".")
    mixer = model.get_submodule(path)
    return hasattr(mixer, "A_log") and hasattr(mixer, "ssm_state_size") and own != "in_proj"
