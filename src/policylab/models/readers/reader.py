"""The interface between a policy and a language model of any architecture.

Axes: ``N`` actions of a rollout, in row-major order of its action mask; ``H`` hidden size, ``V`` vocabulary; ``R`` rows
and ``S`` positions as the model reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from policylab.data.rollout import Rollout
from policylab.models.decoders import Decoder
from policylab.models.shape import Shape
from policylab.models.watch import LayerCall


@dataclass(frozen=True)
class Pass:
    """The result of a forward pass over a rollout."""

    hidden: Float[Tensor, "N H"]  #: input of the LM head at each action
    logits: Float[Tensor, "N V"]  #: no rows if logits were not requested
    actions: Int[Tensor, " N"]  #: the chosen tokens
    calls: Sequence[LayerCall]  #: calls of the watched layers, in order
    #: creates the context in which layers can run on the same input again
    again: Callable[[], AbstractContextManager[None]]
    #: selects a layer's output at the actions
    at_actions: Callable[[Float[Tensor, "R S H"]], Float[Tensor, "N H"]]


class Reader(Protocol):
    """A language model as a policy or a critic uses it. It refers to the model, but registers no weights."""

    @property
    def packs(self) -> bool:
        """Whether a prompt is read once for all its completions and nothing is padded; micro-batches depend on it."""
        ...

    @property
    def context(self) -> int | None:
        """Most positions of prompt and completion together; None without a limit."""
        ...

    def shape(self) -> Shape:
        """The model's sizes, which limit micro-batches and pieces of a rollout."""
        ...

    def head(self) -> nn.Linear | None:
        """The linear layer from hidden states to logits; None if the logits are computed in another way."""
        ...

    def read(
        self, rollout: Rollout, *, logits: bool, watch: Sequence[nn.Module] = (), recompute: bool = False
    ) -> Pass:
        """A forward pass over prompts and completions.

        Args:
            logits: whether to return them. With a linear head, hidden states are enough.
            watch: layers whose calls to record.
            recompute: whether layers keep only their input, and are recomputed in the backward pass.
        """
        ...

    def hidden_at_actions(self, rollout: Rollout) -> Float[Tensor, "N H"]:
        """The last hidden state before each action, of a model without an LM head (a critic)."""
        ...

    def decoder(self, dtype: torch.dtype) -> Decoder:
        """The decoder of ``rollout=cached``: the current weights, with products in ``dtype``."""
        ...

    def make_differentiable(self) -> None:
        """Switches to kernels with forward-mode and second derivatives, which a trust region needs.

        Raises:
            UserError: if there are no such kernels.
        """
        ...
