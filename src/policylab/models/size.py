"""Parameter counts, activation memory and compute of a language model, read from its modules on the meta device.

Axes: ``H`` hidden size, ``V`` vocabulary, ``F`` width of the MLP inside a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from policylab.models import shape
from policylab.models.adapter import LoRA, experts_within
from policylab.models.decoders import Network, network_for
from policylab.models.layers import decoder_layers, layers_above, too_many_own_layers
from policylab.models.readers.packing import replaces_attention

BF16, FP32 = 2, 4
#: Default rank of model/adapter=lora.
LORA_RANK = 16


@dataclass(frozen=True)
class Size(shape.Shape):
    """The sizes that memory and compute depend on, in addition to `policylab.models.shape`."""

    parameters: int  #: shared ones are counted once
    trained: int  #: trainable parameters; with adapters, only the adapters'
    adapters: int  #: weights of adapters, in fp32; 0 without adapters
    weight_bytes: int  #: bytes of one weight
    gated: bool  #: the MLP has three matrices, not two
    layer_parameters: int  #: parameters of one layer
    linear: int  #: weights of the linear layers within all layers
    qkv: int  #: those of the projections to queries, keys and values
    lora: int  #: weights of rank-16 adapters on all linear layers
    tied: bool  #: whether the head shares its weights with the embeddings
    network: type[Network] | None  #: the model's fast decoder; None: the general one samples
    packs: bool  #: whether a prompt is read once for all its completions
    eager: bool  #: whether attention keeps its scores

    @property
    def head(self) -> int:
        """Weights of the LM head."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> float:
        """Bytes of all weights, adapters included."""
        return float(self.parameters * self.weight_bytes + self.adapters * FP32)

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trainable weight."""
        return FP32 if self.adapters else self.weight_bytes

    def gathered(self, *, whole: bool = False, gradients: bool = False) -> float:
        """Bytes of sharded weights while they are gathered.

        Args:
            whole: whether all are gathered at once. Otherwise: the weights outside the layers, the current layer's, and
                those of the next layer, which is prefetched.
            gradients: adds the unsharded gradients of one layer and of the weights outside the layers.
        """
        outside = self.parameters - self.layers * self.layer_parameters
        weights = self.parameters if whole else outside + 2 * self.layer_parameters
        weights += outside + self.layer_parameters if gradients and not self.adapters else 0
        return float(weights * self.weight_bytes)

    def keeps(
        self,
        compute: int,
        prompt: float,
        new: int,
        longest: int,
        *,
        recomputes_layers: bool,
        critic_layers: int,
    ) -> float:
        """Bytes per token that a forward pass keeps for the backward pass.

        Args:
            compute: bytes of one number in matrix products; the residual stream is in the wider of this and the
                weights' dtype.
            prompt: mean tokens of a prompt.
            new: tokens of a completion.
            longest: most tokens of prompt and completion.
        """
        residual = max(compute, self.weight_bytes)
        query, keys = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        wide = 4 if self.gated else 2
        # Llama's norm keeps its input and the normed input; GPT-2's keeps only its input
        layer = float(wide * self.hidden * residual)
        # inputs of queries, MLP and attention's output projection, and what is inside the MLP
        layer += (2 * self.hidden + query + wide * self.ffn) * compute
        # attention; each completion's keys are stored with a copy of its prompt's
        copies = 1 + prompt / new if self.packs else 0
        layer += (2 * query + keys * (1 + copies)) * compute
        layer += 2 * self.heads * longest * compute if self.eager else 0
        layer += (3 * self.hidden + self.ffn) * FP32 if self.adapters and compute < FP32 else 0
        ends = 4 * self.hidden * residual  # embeddings, final norm, and hidden states at the actions
        # the inputs of all layers, and all activations of one
        layers = self.layers * self.hidden * residual + layer if recomputes_layers else self.layers * layer
        return ends + layers + critic_layers * layer

    def transient(self, number: int) -> float:
        """Bytes per token of a layer's temporary tensors; ``number``: bytes of one number."""
        return float(((3 if self.gated else 2) * self.ffn + 4 * self.hidden) * number)

    def operations(self, tokens: float, layers: int, context: float) -> float:
        """FLOPs of a forward pass of this many tokens and layers, where each token attends to ``context`` others."""
        attention = 4 * context * self.heads * self.head_dim
        return tokens * layers * (2 * (self.linear + self.adapters) / self.layers + attention)


@dataclass(frozen=True)
class CriticSize:
    """The sizes of a critic; all zero without one."""

    parameters: int = 0  #: own parameters, including the head
    layers: int = 0  #: number of own layers
    separate: bool = False  #: whether it is a separate network, which reads the tokens itself


def size_of(lm: Any, adapter: LoRA | None = None, frozen_layers: int = 0) -> Size:
    """The sizes of a causal language model.

    Raises:
        UserError: when its layers cannot be found, or it has fewer than ``frozen_layers``.
    """
    numbers, layers = shape.shape_of(lm), decoder_layers(lm)
    layers_above(lm, frozen_layers)  # raises if there are fewer layers
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim >= 2]
    experts = [lm.get_parameter(name) for name in experts_within(lm, 0)]
    parameters = count(lm)
    adapters = 0 if adapter is None else added_by(adapter, lm, frozen_layers)
    return Size(
        **vars(numbers),
        parameters=parameters,
        trained=adapters or parameters - frozen(lm, frozen_layers),
        adapters=adapters,
        weight_bytes=next(lm.parameters()).dtype.itemsize,
        gated=sum(numbers.ffn in p.shape for p in layers[0].parameters() if p.ndim >= 2) >= 3,
        layer_parameters=count(layers[0]),
        linear=sum(p.numel() for p in matrices),
        qkv=numbers.layers * numbers.hidden * (numbers.heads + 2 * numbers.kv_heads) * numbers.head_dim,
        lora=LORA_RANK * sum(map(ends_of, [*(p for p in matrices if p.ndim == 2), *experts])),
        tied=lm.get_output_embeddings().weight is lm.get_input_embeddings().weight,
        network=network_for(lm),
        packs=replaces_attention(lm),
        eager=shape.attention_of(lm) == "eager",
    )


def critic_size(lm: Any, size: Size, own_layers: int | Literal["all"]) -> CriticSize:
    """The sizes of the critic that `policylab.models.critic.value_model` builds.

    Raises:
        UserError: when the model has fewer layers.
    """
    head = size.hidden + 1
    if own_layers == 0:
        return CriticSize(head)
    layers = size.layers if own_layers == "all" else own_layers
    if layers > size.layers:
        raise too_many_own_layers(layers, size.layers)
    if size.adapters:  # copies share frozen weights
        own = size.adapters * layers // size.layers
    elif own_layers == "all":
        own = count(lm.base_model)
    else:  # and the final norm
        within = {id(p) for p in decoder_layers(lm).parameters()}
        norm = (p.numel() for p in lm.base_model.parameters() if id(p) not in within and p.ndim == 1)
        own = layers * size.layer_parameters + sum(norm)
    return CriticSize(own + head, layers, separate=own_layers == "all")


def count(module: nn.Module) -> int:
    """Number of a module's parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def frozen(lm: Any, layers: int) -> int:
    """Number of parameters that ``optim.frozen_layers`` freezes: the lowest layers and all embeddings."""
    if layers == 0:
        return 0
    below = [*list(decoder_layers(lm))[:layers], *(m for m in lm.modules() if isinstance(m, nn.Embedding))]
    return sum(p.numel() for p in {id(p): p for module in below for p in module.parameters()}.values())


def added_by(adapter: LoRA, lm: Any, frozen_layers: int) -> int:
    """Number of the adapters' weights: rank times the inputs and outputs of each adapted layer."""
    linear = [lm.get_submodule(name).weight for name in adapter.targets(lm, frozen_layers)]
    experts = [lm.get_parameter(name) for name in adapter.experts(lm, frozen_layers)]
    return adapter.rank * sum(map(ends_of, [*linear, *experts]))


def ends_of(weight: nn.Parameter) -> int:
    """Inputs plus outputs of a matrix, or of the matrices of all experts, ``[E, ., .]``, together."""
    return sum(weight.shape[-2:]) * (len(weight) if weight.ndim == 3 else 1)
