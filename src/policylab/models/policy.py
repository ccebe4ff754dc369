"""The policy: a causal LM with its tokenizer, and a critic when the algorithm has one.

Axes: ``B`` sequences, ``T`` sampled positions, ``P`` prompt length, ``N`` actions, ``H`` hidden size,
``V`` vocabulary.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from policylab.errors import UserError
from policylab.functional import kl
from policylab.functional.logprobs import entropy, log_distribution, token_logprobs
from policylab.models.head import watch_head
from policylab.models.sequences import Sequences, on_grid
from policylab.models.trunk import TrunkPass, watch_layers
from policylab.rollouts.types import Evaluation, Prompt, Rollout

if TYPE_CHECKING:
    from policylab.models.critic import ValueModel
    from policylab.models.loading import LoadedModel


class Policy(nn.Module):
    """A language model that acts.

    Args:
        loaded: language model and tokenizer, as a function in ``models`` returns them.
        critic: gives the values, as `policylab.models.critic.value_model` makes it; None for a policy alone.
    """

    def __init__(self, loaded: LoadedModel, critic: ValueModel | None) -> None:
        super().__init__()
        self.lm = loaded.lm
        self.tokenizer = loaded.tokenizer
        self.chat = loaded.chat
        self.source = loaded.source
        self.critic = critic

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.lm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return next(self.lm.parameters()).dtype

    @property
    def eos_id(self) -> int:
        """The token that ends a completion."""
        return int(self.tokenizer.eos_token_id)

    def frozen_copy(self) -> Self:
        """A reference: the same weights without gradient or critic."""
        reference = copy.copy(self)
        reference._modules = {**self._modules, "lm": copy.deepcopy(self.lm), "critic": None}
        return reference.requires_grad_(False).eval()

    def critic_parameters(self) -> list[nn.Parameter]:
        """What trains and is the critic's own: its head, and layers if it has any. Empty without a critic."""
        return [] if self.critic is None else [p for p in self.critic.parameters() if p.requires_grad]

    def actor_parameters(self) -> list[nn.Parameter]:
        """Everything else that trains."""
        own = set(map(id, self.critic_parameters()))
        return [p for p in self.parameters() if p.requires_grad and id(p) not in own]

    def prompt(self, id: int, text: str, reference: Any, completion: str, instruction: str | None) -> Prompt:
        """Tokenizes one example; a chat model reads it through its template.

        Args:
            instruction: for chat models, a template with ``{text}`` in it; None sends the bare text.
        """
        if self.chat:
            message = instruction.format(text=text) if instruction else text
            templated = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
            )
            # The template has written its own special tokens.
            tokens = self._encode(str(templated), special=False)
        else:
            tokens = self._encode(text, special=True)
        target = self._encode(completion, special=False)
        return Prompt(
            id=id,
            text=text,
            tokens=tuple(tokens) or (self.eos_id,),  # GPT-2's tokenizer makes nothing of an empty text
            reference=reference,
            target=(*target, self.eos_id) if completion else (),
        )

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        except Exception as error:  # the tokenizers library raises no narrower class
            raise UserError(f"the tokenizer cannot read {text!r}: {error}") from error

    def decode(self, tokens: list[int]) -> str:
        """Text for rewards and people; never encoded back."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def values(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """The critic's values at the actions; their gradient goes into the critic's own parameters alone."""
        critic = self.critic
        assert critic is not None
        sequences = Sequences.of(rollout)
        with torch.no_grad():
            trunk = self._read(sequences, head=False) if critic.reads_trunk else None
        return on_grid(critic(sequences, trunk), rollout)

    def logprobs_of(self, rollout: Rollout, temperature: float) -> Float[Tensor, "B T"]:
        """Log-probs of the actions of a rollout, and nothing else."""
        logp = self.log_distributions(rollout, temperature)
        return on_grid(token_logprobs(logp, rollout.tokens[rollout.action_mask]), rollout)

    def log_distributions(self, rollout: Rollout, temperature: float) -> Float[Tensor, "N V"]:
        """Log-probs of every token at each action of a rollout, in row-major order of the action mask."""
        return log_distribution(self._action_logits(rollout), temperature)

    def scores_of(
        self, rollout: Rollout, temperature: float
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"] | None]:
        """Logits over the temperature and, with a critic, values at the actions of a rollout, in row-major order."""
        sequences = Sequences.of(rollout)
        trunk = self._read(sequences, head=True)
        values = None if self.critic is None else self.critic(sequences, trunk)
        return trunk.logits.float() / temperature, values

    def evaluate(
        self, rollout: Rollout, temperature: float, *, entropy_gradient: bool, reference: Self | None
    ) -> Evaluation:
        """What this policy says about the actions of a rollout.

        Args:
            temperature: divides the logits, as it did at sampling.
            entropy_gradient: whether the entropy is part of the loss.
            reference: gives the exact KL when it is asked for.
        """
        sequences = Sequences.of(rollout)
        trunk = self._read(sequences, head=True)
        return self.evaluate_distributions(
            rollout,
            log_distribution(trunk.logits, temperature),
            temperature,
            values=None if self.critic is None else on_grid(self.critic(sequences, trunk), rollout),
            entropy_gradient=entropy_gradient,
            reference=reference,
        )

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
        """The same for whole distributions, of whatever weights, that are at hand already."""
        exact = None
        if reference is not None:
            with torch.no_grad():
                ref_logp = reference.log_distributions(rollout, temperature)
            exact = on_grid(kl.exact(logp, ref_logp), rollout)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropies = entropy(logp)
        return Evaluation(
            logprobs=on_grid(token_logprobs(logp, rollout.tokens[rollout.action_mask]), rollout),
            entropy=on_grid(entropies, rollout),
            values=values,
            exact_kl=exact,
        )

    def _action_logits(self, rollout: Rollout) -> Float[Tensor, "N V"]:
        """Logits that chose each action, in row-major order of the action mask."""
        sequences = Sequences.of(rollout)
        with watch_head(self.lm, sequences.chosen_at):
            return sequences.through(self.lm).logits[0]

    def _read(self, sequences: Sequences, *, head: bool) -> TrunkPass:
        """A forward pass that the critic watches; without the head there are no logits."""
        layers = () if self.critic is None else self.critic.watched(self.lm)
        with watch_head(self.lm, sequences.chosen_at, run=head) as seen, watch_layers(layers) as calls:
            logits = sequences.through(self.lm).logits
        assert seen.hidden is not None
        return TrunkPass(logits[0], seen.hidden[0], calls)
