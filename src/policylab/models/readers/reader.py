"""What a policy asks of a language model, whatever its architecture.

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
    """What a forward pass over a rollout gives."""

    hidden: Float[Tensor, "N H"]  #: that the LM head reads to choose each action
    logits: Float[Tensor, "N V"]  #: without rows where they were not asked for
    actions: Int[Tensor, " N"]  #: the tokens that were chosen
    calls: Sequence[LayerCall]  #: of the layers that were watched, in order
    again: Callable[
        [], AbstractContextManager[None]
    ]  #: what layers need around them to run on the same input again
    at_actions: Callable[
        [Float[Tensor, "R S H"]], Float[Tensor, "N H"]
    ]  #: of a layer's output, what chose the actions


class Reader(Protocol):
    """A language model as a policy or a critic uses it. It holds the model, but owns no weights."""

    @property
    def packs(self) -> bool:
        """Whether a prompt is read once for all its completions, and nothing is padded. Micro-batches are cut so."""
        ...

    @property
    def context(self) -> int | None:
        """Positions that prompt and completion may take together; None without a limit."""
        ...

    def shape(self) -> Shape:
        """The model in numbers: micro-batches and pieces of a rollout are sized by it."""
        ...

    def head(self) -> nn.Linear | None:
        """The layer that makes logits of hidden states; None where anything else is done to them."""
        ...

    def read(
        self, rollout: Rollout, *, logits: bool, watch: Sequence[nn.Module] = (), recompute: bool = False
    ) -> Pass:
        """A forward pass over prompts and completions.

        Args:
            logits: whether they are wanted. With a linear head, figures of actions come from hidden states alone.
            watch: layers whose calls are wanted.
            recompute: layers keep only their input for the backward pass, and run again there.
        """
        ...

    def hidden_at_actions(self, rollout: Rollout) -> Float[Tensor, "N H"]:
        """The last hidden states that chose the actions, of a model without an LM head (a critic's)."""
        ...

    def decoder(self, dtype: torch.dtype) -> Decoder:
        """What ``rollout=cached`` samples with: the weights as they are now, with products in ``dtype``."""
        ...

    def make_differentiable(self) -> None:
        """Takes kernels with forward-mode and second derivatives, which a trust region needs.

        Raises:
            UserError: where there are none.
        """
        ...
