"""The policy: a causal LM with its tokenizer, and a value head when the algorithm has a critic.

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
from policylab.functional.logprobs import completion_slice, entropy, log_distribution, token_logprobs
from policylab.functional.masks import length_mask
from policylab.models.head import watch_head
from policylab.rollouts.types import Evaluation, Prompt, Rollout

if TYPE_CHECKING:
    from policylab.models.loading import LoadedModel


class Policy(nn.Module):
    """A language model that acts.

    Args:
        loaded: language model and tokenizer, as a function in ``models`` returns them.
        critic: adds a value head on the model's last hidden state. It starts at zero, so that the first
            advantages are the rewards themselves.
    """

    def __init__(self, loaded: LoadedModel, critic: bool) -> None:
        super().__init__()
        self.lm = loaded.lm
        self.tokenizer = loaded.tokenizer
        self.chat = loaded.chat
        self.source = loaded.source
        self.value_head: nn.Linear | None = None
        if critic:
            self.value_head = nn.Linear(self.lm.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

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
        """A reference: the same weights without gradient or value head."""
        reference = copy.copy(self)
        reference._modules = {**self._modules, "lm": copy.deepcopy(self.lm), "value_head": None}
        return reference.requires_grad_(False).eval()

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

    def values_of(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B"]:
        """The critic's values, in fp32 whatever the precision of the trunk."""
        assert self.value_head is not None
        return self.value_head(hidden.float()).squeeze(-1).float()

    def logprobs_of(self, rollout: Rollout, temperature: float) -> Float[Tensor, "B T"]:
        """Log-probs of the actions of a rollout, and nothing else."""
        logits, _ = self._action_logits(rollout)
        logp = log_distribution(logits, temperature)
        return _on_grid(token_logprobs(logp, rollout.tokens[rollout.action_mask]), rollout)

    def evaluate(
        self, rollout: Rollout, temperature: float, *, entropy_gradient: bool, reference: Self | None
    ) -> Evaluation:
        """What this policy says about the actions of a rollout.

        Args:
            temperature: divides the logits, as it did at sampling.
            entropy_gradient: whether the entropy is part of the loss.
            reference: gives the exact KL when it is asked for.
        """
        logits, hidden = self._action_logits(rollout)
        logp = log_distribution(logits, temperature)
        exact = None
        if reference is not None:
            with torch.no_grad():
                ref_logp = log_distribution(reference._action_logits(rollout)[0], temperature)
            exact = _on_grid(kl.exact(logp, ref_logp), rollout)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropies = entropy(logp)
        return Evaluation(
            logprobs=_on_grid(token_logprobs(logp, rollout.tokens[rollout.action_mask]), rollout),
            entropy=_on_grid(entropies, rollout),
            values=None if self.value_head is None else _on_grid(self.values_of(hidden), rollout),
            exact_kl=exact,
        )

    def _action_logits(self, rollout: Rollout) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        """Logits and hidden states that chose each action, in row-major order of the action mask."""
        prompt_width, width = rollout.prompt_tokens.shape[1], rollout.tokens.shape[1]
        tokens = torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1)
        prompt_mask = length_mask(rollout.prompt_lengths, prompt_width).flip(-1)
        attention = torch.cat([prompt_mask, length_mask(rollout.lengths, width)], dim=1)
        chosen_at = torch.zeros_like(attention)
        chosen_at[:, completion_slice(prompt_width, width)] = rollout.action_mask
        with watch_head(self.lm, chosen_at) as seen:
            logits = self.lm(
                input_ids=tokens,
                attention_mask=attention.long(),
                position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            ).logits
        assert seen.hidden is not None
        return logits[0], seen.hidden[0]


def _on_grid(x: Float[Tensor, " N"], rollout: Rollout) -> Float[Tensor, "B T"]:
    """Values of the actions at their places; zero elsewhere."""
    return x.new_zeros(rollout.action_mask.shape).masked_scatter(rollout.action_mask, x)
