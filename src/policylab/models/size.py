"""What a language model weighs, what a pass over it keeps and computes: read from its modules on the meta device.

Axes, as elsewhere: ``H`` hidden size, ``V`` vocabulary; and ``F`` the width of the MLP inside a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from policylab.errors import UserError
from policylab.models import shape
from policylab.models.adapter import LoRA, experts_within
from policylab.models.decoders import GPT2, Llama
from policylab.models.layers import decoder_layers, layers_above
from policylab.models.readers.packing import replaces_attention

BF16, FP32 = 2, 4
#: Rank that model/adapter=lora starts with.
LORA_RANK = 16


@dataclass(frozen=True)
class Size(shape.Shape):
    """What memory and work depend on, beside what `policylab.models.shape` says."""

    parameters: int  #: each once, however often it is used
    trained: int  #: of these; with adapters, theirs
    adapters: int  #: weights beside these, in fp32; 0 without
    weight_bytes: int  #: of one weight
    gated: bool  #: the MLP has three matrices, not two
    layer_parameters: int  #: of one layer
    linear: int  #: weights of the linear layers within all layers
    qkv: int  #: of these, what makes queries, keys and values
    lora: int  #: weights that adapters of rank 16 on all of them would have
    tied: bool  #: the head's weights are the embeddings
    context: int | None  #: positions at most
    decoder: Literal["gpt2", "llama", "general"]  #: who samples
    packs: bool  #: whether prompts are read once for all their completions
    eager: bool  #: attention keeps its scores

    @property
    def head(self) -> int:
        """Weights of the LM head."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> float:
        """Bytes, adapters included."""
        return float(self.parameters * self.weight_bytes + self.adapters * FP32)

    @property
    def trained_bytes(self) -> int:
        """Of one weight that trains."""
        return FP32 if self.adapters else self.weight_bytes

    def gathered(self, *, whole: bool = False, gradients: bool = False) -> float:
        """Bytes of sharded weights that are gathered for use: all of them, or what is in no layer and two layers, of
        which one is on its way; with ``gradients``, those of one and of what is in no layer, before they are shared
        out."""
        outside = self.parameters - self.layers * self.layer_parameters
        weights = self.parameters if whole else outside + 2 * self.layer_parameters
        weights += outside + self.layer_parameters if gradients and not self.adapters else 0
        return float(weights * self.weight_bytes)

    def layer_keeps(self, compute: int, prompt_share: float) -> float:
        """Bytes that a layer keeps a token for the backward pass, as autograd saves them.

        Args:
            compute: bytes of a number that goes into a product; the residual stream is in fp32 or the weights' own.
            prompt_share: tokens that a completion's token looks at for each of its own, above 1 with a prompt.
        """
        residual = max(compute, self.weight_bytes)
        query, keys = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        # Llama's norm keeps what it is given and what it has normed; GPT-2's keeps the one.
        norms = (4 if self.gated else 2) * self.hidden * residual
        inputs = (
            2 * self.hidden + query
        ) * compute  # of queries, of the MLP, of the projection out of attention
        mlp = (4 if self.gated else 2) * self.ffn * compute
        repeats = prompt_share if self.packs else 0  # each completion's keys beside those of its prompt
        attention = (2 * query + keys * (1 + repeats)) * compute
        adapted = (3 * self.hidden + self.ffn) * FP32 if self.adapters and compute < FP32 else 0
        return norms + inputs + mlp + attention + adapted

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
        """Bytes a token that a forward pass keeps.

        Args:
            compute: bytes of a number that goes into a product.
            prompt: tokens of a prompt, mean.
            new: tokens of a completion.
            longest: tokens of prompt and completion.
        """
        kept = self.layer_keeps(compute, 1 + prompt / new)
        kept += 2 * self.heads * longest * compute if self.eager else 0
        residual = max(compute, self.weight_bytes)
        ends = 4 * self.hidden * residual  # embeddings, the final norm, and the states that chose the actions
        # all inputs, and one layer at a time
        layers = self.layers * self.hidden * residual + kept if recomputes_layers else self.layers * kept
        return ends + layers + critic_layers * kept

    def transient(self, number: int) -> float:
        """Bytes a token of what a layer makes on the way, in numbers of so many bytes."""
        return float(((3 if self.gated else 2) * self.ffn + 4 * self.hidden) * number)

    def operations(self, tokens: float, layers: int, context: float) -> float:
        """Of a forward pass of so many tokens through so many layers, each token looking at ``context`` others."""
        attention = 4 * context * self.heads * self.head_dim
        return tokens * layers * (2 * (self.linear + self.adapters) / self.layers + attention)


@dataclass(frozen=True)
class CriticSize:
    """A critic in numbers.

    Args:
        parameters: its own, the head included.
        layers: of its own that a token goes through.
        separate: whether it is a network of its own, which reads the tokens itself.
    """

    parameters: int
    layers: int
    separate: bool


def size_of(lm: Any, adapter: LoRA | None = None, frozen_layers: int = 0) -> Size:
    """The numbers of a causal language model.

    Raises:
        UserError: when its layers cannot be told, or it has fewer than are frozen.
    """
    numbers, layers = shape.shape_of(lm), decoder_layers(lm)
    layers_above(lm, frozen_layers)  # refuses more than there are
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
        context=shape.context_of(lm),
        decoder="gpt2" if GPT2.reads(lm) else "llama" if Llama.reads(lm) else "general",
        packs=replaces_attention(lm),
        eager=shape.attention_of(lm) == "eager",
    )


def critic_size(lm: Any, size: Size, own_layers: int | Literal["all"]) -> CriticSize:
    """The numbers of the critic that `policylab.models.critic.value_model` makes.

    Raises:
        UserError: when the model has fewer layers.
    """
    head = size.hidden + 1
    if own_layers == 0:
        return CriticSize(head, 0, separate=False)
    layers = size.layers if own_layers == "all" else own_layers
    if layers > size.layers:
        raise UserError(
            f"algo.critic.own_layers is {layers}, but the policy has {size.layers} layers; take at most that, or all"
        )
    if size.adapters:  # copies share what does not train
        own = size.adapters * layers // size.layers
    elif own_layers == "all":
        own = count(lm.base_model)
    else:  # and the final norm
        within = {id(p) for p in decoder_layers(lm).parameters()}
        norm = (p.numel() for p in lm.base_model.parameters() if id(p) not in within and p.ndim == 1)
        own = layers * size.layer_parameters + sum(norm)
    return CriticSize(own + head, layers, separate=own_layers == "all")


def count(module: nn.Module) -> int:
    """Parameters of a module, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def frozen(lm: Any, layers: int) -> int:
    """Parameters that ``optim.frozen_layers`` takes the gradient from: the lowest layers and all embeddings."""
    if layers == 0:
        return 0
    below = [*list(decoder_layers(lm))[:layers], *(m for m in lm.modules() if isinstance(m, nn.Embedding))]
    return sum(p.numel() for p in {id(p): p for module in below for p in module.parameters()}.values())


def added_by(adapter: LoRA, lm: Any, frozen_layers: int) -> int:
    """Weights of the adapters: rank times what goes in and comes out of each layer that gets one."""
    linear = [lm.get_submodule(name).weight for name in adapter.targets(lm, frozen_layers)]
    experts = [lm.get_parameter(name) for name in adapter.experts(lm, frozen_layers)]
    return adapter.rank * sum(map(ends_of, [*linear, *experts]))


def ends_of(weight: nn.Parameter) -> int:
    """What goes in and comes out of a matrix, or of those of all experts ``[E, ., .]`` together."""
    return sum(weight.shape[-2:]) * (len(weight) if weight.ndim == 3 else 1)
