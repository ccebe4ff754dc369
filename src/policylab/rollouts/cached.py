"""The default engine: our own decode loop over the model's KV cache.

A prompt is read once and its cache shared by the completions of its group. Rows that are finished leave
the batch. Log-probs and values are recorded while sampling, so no second forward pass is needed for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from policylab.functional.logprobs import log_distribution, token_logprobs
from policylab.functional.masks import length_mask
from policylab.models.head import watch_head
from policylab.models.policy import Policy
from policylab.rollouts.behaviour import Behaviour
from policylab.rollouts.engine import check_context, check_settings, pad_left
from policylab.rollouts.sampling import inverse_cdf
from policylab.rollouts.types import Prompt, Rollout

#: Finished rows leave the batch once they are this share of it: compacting the cache costs a copy.
COMPACT_AT = 0.25


@dataclass(frozen=True)
class CachedEngine:
    """Samples completions.

    Args:
        temperature: divides the logits, above 0. Training divides by the same number.
        max_new_tokens: completions are cut here.
    """

    temperature: float
    max_new_tokens: int

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.max_new_tokens)

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        noise: Float[Tensor, "B T"],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """``group_size`` completions of each prompt, those of one prompt in adjacent rows.

        Args:
            noise: uniform numbers, a row for each completion and ``max_new_tokens`` columns.
            behaviour: what is sampled from; None is the policy itself.

        Raises:
            UserError: when prompt and completion do not fit the model's context.
        """
        device = policy.device
        prompt_tokens, prompt_lengths = pad_left([p.tokens for p in prompts], device)
        check_context(policy, prompt_tokens.shape[1] + self.max_new_tokens)
        batch = _Decoding.prefill(policy, prompt_tokens, prompt_lengths, group_size)
        rows = len(prompts) * group_size
        tokens = torch.zeros(rows, self.max_new_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, self.max_new_tokens, device=device)
        critic = policy.critic if policy.critic is not None and policy.critic.trains_trunk else None
        values = None if critic is None else torch.zeros_like(logprobs)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        noise = noise.to(device)

        for t in range(self.max_new_tokens):
            logp = log_distribution(batch.logits, self.temperature)
            logp = logp if behaviour is None else behaviour(logp)
            drawn = inverse_cdf(logp, noise[batch.rows, t])
            open_rows = ~ended[batch.rows]
            at = batch.rows[open_rows]
            tokens[at, t] = drawn[open_rows]
            logprobs[at, t] = token_logprobs(logp, drawn)[open_rows]
            if critic is not None and values is not None:
                values[at, t] = critic.score(batch.hidden)[open_rows]
            lengths[at] = t + 1
            ended[at] = drawn[open_rows] == policy.eos_id
            if t + 1 == self.max_new_tokens or bool(ended.all()):
                break
            still = ~ended[batch.rows]
            if still.float().mean() <= 1 - COMPACT_AT:
                batch.keep(still)
                drawn = drawn[still]
            batch.step(drawn)

        width = int(lengths.max())
        group_ids = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        return Rollout(
            prompt_tokens=prompt_tokens.repeat_interleave(group_size, 0),
            prompt_lengths=prompt_lengths.repeat_interleave(group_size, 0),
            tokens=tokens[:, :width],
            lengths=lengths,
            action_mask=length_mask(lengths, width),
            ended=ended,
            group_ids=group_ids,
            prompt_ids=torch.tensor([p.id for p in prompts], device=device)[group_ids],
            logprobs=logprobs[:, :width],
            values=None if values is None else values[:, :width],
        )


class _Decoding:
    """Rows that are still being written: their cache, and the logits and hidden state of the next token."""

    def __init__(self, policy: Policy, attention: Bool[Tensor, "B S"], rows: Int[Tensor, " B"]) -> None:
        self.policy = policy
        self.cache = DynamicCache(config=policy.lm.config)
        self.attention = attention
        self.rows = rows  #: which rows of the rollout these are
        self.logits: Tensor
        self.hidden: Tensor

    @classmethod
    def prefill(
        cls, policy: Policy, tokens: Int[Tensor, "B P"], lengths: Int[Tensor, " B"], group_size: int
    ) -> _Decoding:
        """Reads each prompt once, then repeats its state for the completions of its group."""
        attention = length_mask(lengths, tokens.shape[1]).flip(-1)
        batch = cls(policy, attention, torch.arange(len(tokens) * group_size, device=tokens.device))
        batch._forward(tokens, (attention.cumsum(-1) - 1).clamp(min=0))
        if group_size > 1:
            batch.cache.batch_repeat_interleave(group_size)
            batch.attention = attention.repeat_interleave(group_size, 0)
            batch.logits = batch.logits.repeat_interleave(group_size, 0)
            batch.hidden = batch.hidden.repeat_interleave(group_size, 0)
        return batch

    def step(self, tokens: Int[Tensor, " B"]) -> None:
        """Appends one token to each row."""
        positions = self.attention.sum(-1, keepdim=True)
        self.attention = torch.cat([self.attention, torch.ones_like(self.attention[:, :1])], dim=1)
        self._forward(tokens[:, None], positions)

    def keep(self, still: Bool[Tensor, " B"]) -> None:
        """Drops the other rows."""
        index = still.nonzero().squeeze(-1)
        self.cache.batch_select_indices(index)
        self.attention = self.attention[index]
        self.rows = self.rows[index]

    def _forward(self, tokens: Int[Tensor, "B S"], positions: Int[Tensor, "B S"]) -> None:
        with watch_head(self.policy.lm) as seen:
            out = self.policy.lm(
                input_ids=tokens,
                attention_mask=self.attention.long(),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        assert seen.hidden is not None
        self.logits = out.logits[:, -1]
        self.hidden = seen.hidden[:, -1]
