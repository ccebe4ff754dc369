"""Critics: a value head on the policy's trunk, on own layers, or on an own network.

Axes: ``N`` actions, ``H`` hidden size. A value belongs to the state before an action, so it is read at the same
position as the logits that chose the action.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from policylab.data.rollout import Rollout
from policylab.errors import UserError
from policylab.models.adapted import shared_weights
from policylab.models.layers import after_layers, cannot_take_apart, decoder_layers, too_many_own_layers
from policylab.models.readers import Pass, reader_for
from policylab.models.reward_model import reward_model
from policylab.models.shape import attention_of
from policylab.models.watch import LayerCall, probe


class ValueModel(nn.Module):
    """A critic: hidden states, and a linear head that starts at zero.

    Attributes:
        reads_trunk: whether it needs the policy's forward pass.
        trains_trunk: whether the values have a gradient in the policy's weights. Such a critic reads only the policy's
            last hidden state, so sampling can record its values.
    """

    reads_trunk: ClassVar[bool]
    trains_trunk: ClassVar[bool]

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def watched(self, lm: nn.Module) -> Sequence[nn.Module]:
        """The policy's layers whose calls must be recorded for the critic."""
        return ()

    @property
    def context(self) -> int | None:
        """Most positions of a sequence, if the critic is a separate model; None without a limit."""
        return None

    def hidden(self, rollout: Rollout, trunk: Pass | None) -> Float[Tensor, "N H"]:
        """The head's input at each action. ``trunk`` is None if ``reads_trunk`` is false."""
        raise NotImplementedError

    def forward(self, rollout: Rollout, trunk: Pass | None) -> Float[Tensor, " N"]:
        """The value of the state before each action."""
        return self.score(self.hidden(rollout, trunk))

    def score(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B"]:
        """The head, in fp32 whatever the precision of the hidden states."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)


class SharedTrunk(ValueModel):
    """Reads the policy's last hidden state; the value loss also trains the trunk."""

    reads_trunk = True
    trains_trunk = True

    def hidden(self, rollout: Rollout, trunk: Pass | None) -> Float[Tensor, "N H"]:
        assert trunk is not None
        return trunk.hidden


class OwnLayers(ValueModel):
    """Copies of the policy's last layers and final norm. The trunk below them gets no gradient.

    Args:
        lm: the policy's language model.
        count: number of copied layers.

    Raises:
        UserError: when the model has fewer layers, or its layers cannot be reused.
    """

    reads_trunk = True
    trains_trunk = False

    def __init__(self, lm: nn.Module, count: int) -> None:
        super().__init__(head_width(lm))
        layers = decoder_layers(lm)
        if count > len(layers):
            raise too_many_own_layers(count, len(layers))
        # the copies share the policy's config, because a packed pass sets the attention there
        shared = {id(lm.config): lm.config} | shared_weights(lm)
        self.layers = nn.ModuleList(copy.deepcopy(layer, shared) for layer in layers[len(layers) - count :])
        self.norm = nn.Sequential(*(copy.deepcopy(module, shared) for module in after_layers(lm)))
        self._check(lm)

    def watched(self, lm: nn.Module) -> Sequence[nn.Module]:
        layers = decoder_layers(lm)
        return list(layers)[len(layers) - len(self.layers) :]

    def hidden(self, rollout: Rollout, trunk: Pass | None) -> Float[Tensor, "N H"]:
        assert trunk is not None
        with trunk.again():
            return trunk.at_actions(self._run(trunk.calls))

    def _run(self, calls: Sequence[LayerCall]) -> Float[Tensor, "B S H"]:
        hidden = calls[0].hidden
        for layer, call in zip(self.layers, calls, strict=True):
            hidden = call.repeat(layer, hidden)
        return self.norm(hidden)

    @torch.no_grad()
    def _check(self, lm: nn.Module) -> None:
        """Checks that copies and originals give the same result."""
        hidden, calls = probe(lm, self.watched(lm))
        try:
            own = self._run(calls)[0]
        except Exception as error:  # any exception of a layer of an unknown architecture
            raise cannot_take_apart(lm, f"{type(error).__name__}: {error}") from error
        _check_same(lm, own, hidden)


class SeparateNetwork(ValueModel):
    """A separate network, which reads the tokens itself.

    Args:
        backbone: a Hugging Face model without a head.
        hidden_size: size of its last hidden state.
    """

    reads_trunk = False
    trains_trunk = False

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.backbone = backbone
        self.reader = reader_for(backbone)

    @property
    def context(self) -> int | None:
        return self.reader.context

    def hidden(self, rollout: Rollout, trunk: Pass | None) -> Float[Tensor, "N H"]:
        return self.reader.hidden_at_actions(rollout)


def value_model(lm: Any, own_layers: int | Literal["all"], init: str | None) -> ValueModel:
    """The critic of a policy, as `policylab.algorithms.Critic` describes it.

    Args:
        lm: the policy's language model, with the weights that the critic starts from.

    Raises:
        UserError: when the model does not allow this critic.
    """
    if own_layers == 0:
        return SharedTrunk(head_width(lm))
    if own_layers != "all":
        return OwnLayers(lm, own_layers)
    return copy_of(lm) if init is None else from_reward_model(init, lm)


def copy_of(lm: Any) -> SeparateNetwork:
    """A separate critic with the policy's weights, without the LM head.

    Raises:
        UserError: when the base model's output is not the LM head's input.
    """
    if lm.base_model is lm:
        raise cannot_take_apart(lm, "its LM head cannot be separated")
    critic = SeparateNetwork(copy.deepcopy(lm.base_model, shared_weights(lm)), head_width(lm))
    tokens = torch.arange(4, device=lm.device)[None]
    with torch.no_grad():
        own = critic.backbone(input_ids=tokens, use_cache=False).last_hidden_state[0]
    _check_same(lm, own, probe(lm)[0])
    return critic


def from_reward_model(path: str, lm: Any) -> SeparateNetwork:
    """A separate critic that starts from a reward model: its first values are the model's scores of each prefix.

    "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593; InstructGPT, arXiv:2203.02155.

    Raises:
        UserError: when ``path`` has no reward model, or its vocabulary differs from the policy's.
    """
    model = reward_model(path, lm.dtype, attention_of(lm))
    own, expected = (m.get_input_embeddings().num_embeddings for m in (model, lm))
    if own != expected:
        raise UserError(
            f"algo.critic.init={path} embeds {own} tokens, but the policy {expected}; take a reward model with the "
            "policy's tokenizer"
        )
    critic = SeparateNetwork(model.base_model, model.score.weight.shape[1])
    with torch.no_grad():
        critic.head.weight.copy_(model.score.weight)
        if model.score.bias is not None:
            critic.head.bias.copy_(model.score.bias)
    return critic


def head_width(lm: Any) -> int:
    """Size of the hidden state that the LM head reads."""
    return int(lm.get_output_embeddings().weight.shape[1])


def _check_same(lm: nn.Module, own: Tensor, expected: Tensor) -> None:
    """Refuses a critic whose initial hidden states differ from the LM head's input."""
    if own.shape != expected.shape or not torch.allclose(own, expected, rtol=1e-3, atol=1e-3):
        raise cannot_take_apart(lm, "its parts together do not give the LM head's input")
