"""The policy: a causal LM with its tokenizer, and a critic when the algorithm has one.

Axes: ``B`` sequences, ``T`` sampled positions, ``P`` prompt length, ``N`` actions, ``H`` hidden size,
``V`` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from policylab.contracts import returned
from policylab.data.rollout import Evaluation, Prompt, Rollout
from policylab.functional import kl
from policylab.functional.linear_head import Head, HeadFigures, head_figures
from policylab.functional.logprobs import entropy, log_distribution, token_logprobs
from policylab.models.adapted import adapted_layers, adapters_off, shared_weights
from policylab.models.compiling import compile_layers
from policylab.models.encoding import around_answer, encode, encode_prompts, end_of_answer, eos_ids
from policylab.models.readers import Pass, reader_for
from policylab.models.readers.packed import trial_rollout

if TYPE_CHECKING:
    from policylab.models.critic import ValueModel
    from policylab.models.loading import LoadedModel


class Policy(nn.Module):
    """A language model as a policy: log-probs, entropy and values of the actions of a rollout.

    Args:
        loaded: language model and tokenizer, from a loading function in ``models``.
        critic: from `policylab.models.critic.value_model`; None for a policy without values.

    Attributes:
        recomputes_layers: whether layers keep only their inputs for the backward pass.
        runs_on: the device to compute on, if it is not the device of the weights.
        adapted: whether adapters train, and not the language model's own weights.
        without_adapters: whether the policy computes without its adapters, as the original language model.
        reader: runs the language model over a rollout.
        eos_ids: tokens that end a completion.
        eos_id: the one of them that supervised training appends to a completion.
    """

    def __init__(self, loaded: LoadedModel, critic: ValueModel | None) -> None:
        super().__init__()
        self.recomputes_layers = False
        self.runs_on: torch.device | None = None
        self.adapted = bool(adapted_layers(loaded.lm))
        self.without_adapters = False
        self.lm = loaded.lm
        self.tokenizer = loaded.tokenizer
        self.chat = loaded.chat
        self.source = loaded.source
        self.eos_ids = eos_ids(loaded.tokenizer, loaded.lm)
        self.eos_id = int(loaded.tokenizer.eos_token_id)
        if loaded.chat:
            self.eos_id = end_of_answer(loaded.tokenizer, self.eos_ids)
        self.critic = critic
        self.reader = reader_for(loaded.lm, loaded.reader)

    @property
    def device(self) -> torch.device:
        """The device to compute on."""
        return self.runs_on or next(self.lm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model's weights."""
        return next(self.lm.parameters()).dtype

    def ends(self, tokens: Int[Tensor, "*B"]) -> Bool[Tensor, "*B"]:
        """Which tokens end a completion."""
        found = tokens == self.eos_ids[0]
        for other in self.eos_ids[1:]:
            found |= tokens == other
        return found

    def frozen_copy(self) -> Self:
        """A reference: the same weights, without gradient and critic."""
        reference = copy.copy(self)
        reference._modules = {**self._modules, "critic": None}
        if self.adapted:  # shares the modules, so that moving their weights moves both
            reference.without_adapters = True
            return reference
        # frozen weights are shared with the reference
        lm, reference.reader = copy.deepcopy((self.lm, self.reader), shared_weights(self.lm))
        reference._modules["lm"] = lm
        return reference.requires_grad_(False).eval()

    def compile_layers(self) -> str | None:
        """Compiles the layers with torch, for the device that they are on.

        Returns:
            None, or one line that says why it failed.
        """
        return compile_layers(self.lm, lambda: self.logprobs_of(trial_rollout(self.lm), 1.0).sum())

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the critic: its head and own layers. Empty without a critic."""
        return [] if self.critic is None else [p for p in self.critic.parameters() if p.requires_grad]

    def base_parameters(self) -> list[nn.Parameter]:
        """The weights that adapters leave frozen, including the critic's; empty without adapters."""
        return [p for p in self.parameters() if not p.requires_grad] if self.adapted else []

    def loaded_parameters(self) -> list[nn.Parameter]:
        """The weights that were loaded; unchanged until training starts."""
        return self.base_parameters() if self.adapted else list(self.lm.parameters())

    def actor_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the language model."""
        own = set(map(id, self.critic_parameters()))
        return [p for p in self.parameters() if p.requires_grad and id(p) not in own]

    def prompts(self, examples: Sequence[tuple[str, str, Any]], instruction: str | None) -> list[Prompt]:
        """Tokenizes examples, numbered in order; for chat models, in the chat template.

        Args:
            examples: the text, its completion for supervised training ("" if none) and its reference.
            instruction: for chat models, a template with ``{text}`` in it; None sends the bare text.

        Raises:
            UserError: naming the text that the tokenizer cannot read.
        """
        texts = [text for text, _, _ in examples]
        tokens = encode_prompts(self.tokenizer, texts, chat=self.chat, instruction=instruction)
        targets = encode(self.tokenizer, [completion for _, completion, _ in examples], special=False)
        return [
            Prompt(
                id=i,
                text=text,
                tokens=tuple(read) or (self.eos_id,),  # GPT-2's tokenizer gives no token for an empty text
                reference=reference,
                target=(*target, self.eos_id) if completion else (),
            )
            for i, ((text, completion, reference), read, target) in enumerate(
                zip(examples, tokens, targets, strict=True)
            )
        ]

    def encode_answer(self, text: str, *, ended: bool) -> list[int]:
        """Token ids of an environment's answer; for chat models a user message, up to the start of the next turn.

        Args:
            ended: whether the policy ended its turn with an EOS.

        Raises:
            UserError: when the tokenizer cannot encode the text, or the chat template does not support several turns.
        """
        (words,) = encode(self.tokenizer, [text], special=False)
        if not self.chat:
            return words
        before, after = around_answer(self.tokenizer)
        return before[ended and before[0] in self.eos_ids :] + words + after

    def decode(self, tokens: list[int]) -> str:
        """Text for rewards and display, without the EOS. It is never tokenized again."""
        if tokens and tokens[-1] in self.eos_ids:
            tokens = tokens[:-1]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def values(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """The critic's values at the actions, with gradient in the critic's own parameters only."""
        critic = self.critic
        assert critic is not None
        with torch.no_grad():
            trunk = self._read(rollout, logits=False) if critic.reads_trunk else None
        return rollout.on_grid(critic(rollout, trunk))

    def logprobs_of(self, rollout: Rollout, temperature: float) -> Float[Tensor, "B T"]:
        """Log-probs of the actions of a rollout."""
        return rollout.on_grid(self._figures(rollout, temperature, False, None)[0].logprobs)

    def log_distributions(self, rollout: Rollout, temperature: float) -> Float[Tensor, "N V"]:
        """Log-probs of every token at each action of a rollout, in row-major order of the action mask."""
        return log_distribution(self._read(rollout, logits=True).logits, temperature)

    def scores_of(
        self, rollout: Rollout, temperature: float
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"] | None]:
        """Logits over the temperature and, with a critic, values at the actions of a rollout, in row-major order."""
        trunk = self._read(rollout, logits=True)
        values = None if self.critic is None else self.critic(rollout, trunk)
        return trunk.logits.float() / temperature, values

    def evaluate(
        self, rollout: Rollout, temperature: float, *, entropy_gradient: bool, reference: Self | None
    ) -> Evaluation:
        """Log-probs, entropy, values and KL at the actions of a rollout.

        Args:
            temperature: divides the logits, as it did at sampling.
            entropy_gradient: whether the entropy is part of the loss.
            reference: policy that the exact KL is measured to; None: no KL.
        """
        figures, trunk = self._figures(rollout, temperature, entropy_gradient, reference)
        values = None if self.critic is None else rollout.on_grid(self.critic(rollout, trunk))
        return _evaluation(rollout, figures, values)

    def evaluate_distributions(
        self,
        rollout: Rollout,
        logp: Float[Tensor, "N V"],
        temperature: float,
        *,
        values: Float[Tensor, "B T"] | None,
        entropy_gradient: bool,
        reference: Self | None,
    ) -> Evaluation:
        """As `evaluate`, from given distributions."""
        figures = self._figures_of(rollout, logp, temperature, entropy_gradient, reference)
        return _evaluation(rollout, figures, values)

    def _figures(
        self, rollout: Rollout, temperature: float, entropy_gradient: bool, reference: Self | None
    ) -> tuple[HeadFigures, Pass]:
        """Log-probs, entropy and KL of the actions, and the forward pass that gave them."""
        linear = all(policy.reader.head() is not None for policy in (self, reference) if policy is not None)
        trunk = self._read(rollout, logits=not linear)
        if not linear:
            logp = log_distribution(trunk.logits, temperature)
            return self._figures_of(rollout, logp, temperature, entropy_gradient, reference), trunk
        other = None
        if reference is not None:
            with torch.no_grad():
                # the pass must run before the head is read: it gathers sharded weights
                hidden = reference._read(rollout, logits=False).hidden
                other = (reference.head(temperature), hidden)
        figures = head_figures(
            self.head(temperature),
            trunk.hidden,
            trunk.actions,
            entropy_gradient=entropy_gradient,
            other=other,
        )
        return figures, trunk

    def _figures_of(
        self,
        rollout: Rollout,
        logp: Float[Tensor, "N V"],
        temperature: float,
        entropy_gradient: bool,
        reference: Self | None,
    ) -> HeadFigures:
        """As `_figures`, from whole distributions."""
        exact = None
        if reference is not None:
            with torch.no_grad():
                ref_logp = reference.log_distributions(rollout, temperature)
            exact = kl.exact(logp, ref_logp)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropies = entropy(logp)
        return HeadFigures(token_logprobs(logp, rollout.tokens[rollout.action_mask]), entropies, exact)

    def head(self, temperature: float) -> Head:
        """The LM head, which must be linear."""
        layer = self.reader.head()
        assert layer is not None
        return Head(layer.weight, layer.bias, temperature)

    def _read(self, rollout: Rollout, *, logits: bool) -> Pass:
        """A forward pass that records the layer calls the critic needs."""
        with adapters_off(self.lm) if self.without_adapters else nullcontext():
            found = self.reader.read(
                rollout,
                logits=logits,
                watch=() if self.critic is None else self.critic.watched(self.lm),
                recompute=self.recomputes_layers and torch.is_grad_enabled(),
            )
        return returned(f"{type(self.reader).__name__}.read", found, Pass)


def _evaluation(rollout: Rollout, figures: HeadFigures, values: Float[Tensor, "B T"] | None) -> Evaluation:
    """Log-probs, entropy, KL and values in the rollout's layout, ``[B, T]``."""
    return Evaluation(
        logprobs=rollout.on_grid(figures.logprobs),
        entropy=rollout.on_grid(figures.entropy),
        values=values,
        exact_kl=None if figures.exact_kl is None else rollout.on_grid(figures.exact_kl),
    )
