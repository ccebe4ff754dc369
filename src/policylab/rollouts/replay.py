"""The replay memory of finished sequences, for off-policy methods.

Flat arrays with one entry per token or sequence and no padding, so that the capacity limits memory: 13 bytes per token
(of a prompt or completion), and 37 per sequence. They are always in main memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.functional.masks import length_mask

PER_TOKEN = ("tokens", "actions", "logprobs", "ref_logprobs")


@dataclass(frozen=True)
class Memory:
    """Sequences one after another, the oldest first. ``S`` sequences, ``K`` tokens of all of them."""

    tokens: Int[Tensor, " K"]  #: prompt, completion, prompt, completion, ...
    actions: Bool[Tensor, " K"]  #: true where the policy chose the token
    logprobs: Float[Tensor, " K"]  #: under the distribution that the token was sampled from
    ref_logprobs: Float[Tensor, " K"]  #: under the reference
    prompt_lengths: Int[Tensor, " S"]
    lengths: Int[Tensor, " S"]
    prompt_ids: Int[Tensor, " S"]
    iterations: Int[Tensor, " S"]  #: iteration in which each was sampled
    rewards: Float[Tensor, " S"]
    ended: Bool[Tensor, " S"]

    @classmethod
    def empty(cls) -> Self:
        """No sequences."""
        number = torch.zeros(0)
        whole, long, yes = number.int(), number.long(), number.bool()
        return cls(whole, yes, number, number, long, long, long, long, number, yes)

    @classmethod
    def of(cls, rollout: Rollout, iteration: int) -> Self:
        """The sequences of a rollout that has rewards and the reference's log-probs."""
        rollout = rollout.to("cpu")
        prompt = length_mask(rollout.prompt_lengths, rollout.prompt_tokens.shape[1]).flip(-1)
        real = torch.cat([prompt, length_mask(rollout.lengths, rollout.tokens.shape[1])], 1)

        def flat(of_prompt: Tensor, of_completion: Tensor) -> Tensor:
            return torch.cat([of_prompt.expand_as(prompt), of_completion], 1)[real]

        assert rollout.rewards is not None
        assert rollout.ref_logprobs is not None
        zero = torch.zeros(())
        return cls(
            tokens=flat(rollout.prompt_tokens, rollout.tokens).int(),
            actions=flat(zero.bool(), rollout.action_mask),
            logprobs=flat(zero, rollout.logprobs),
            ref_logprobs=flat(zero, rollout.ref_logprobs),
            prompt_lengths=rollout.prompt_lengths,
            lengths=rollout.lengths,
            prompt_ids=rollout.prompt_ids,
            iterations=torch.full_like(rollout.lengths, iteration),
            rewards=rollout.rewards,
            ended=rollout.ended,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def join(self, later: Iterable[Self]) -> Self:
        """These sequences followed by the later ones."""
        parts = [self, *later]
        return type(self)(*[torch.cat([getattr(part, f.name) for part in parts]) for f in fields(self)])

    def newest(self, capacity: int) -> Self:
        """The latest sequences with at most ``capacity`` tokens together, prompts included."""
        sizes = self.prompt_lengths + self.lengths
        from_here_on = sizes.flip(0).cumsum(0).flip(0)
        gone = int((from_here_on > capacity).sum())
        gone_tokens = int(sizes[:gone].sum())
        firsts = [gone_tokens if f.name in PER_TOKEN else gone for f in fields(self)]
        # cloned, because a view would keep the whole tensor in memory
        return type(self)(
            *[getattr(self, f.name)[k:].clone() for f, k in zip(fields(self), firsts, strict=True)]
        )

    def rollout(self, rows: Int[Tensor, " N"]) -> Rollout:
        """The given sequences, padded to the longest. Sequences of one prompt form a group."""
        prompt_lengths, lengths = self.prompt_lengths[rows], self.lengths[rows]
        sizes = self.prompt_lengths + self.lengths
        starts = (sizes.cumsum(0) - sizes)[rows]
        prompt_width, width = int(prompt_lengths.max()), int(lengths.max())
        # positions in the flat arrays; those before a prompt or after a completion are masked
        at_prompt = (starts + prompt_lengths - prompt_width)[:, None] + torch.arange(prompt_width)
        at = (starts + prompt_lengths)[:, None] + torch.arange(width)
        prompt, completion = length_mask(prompt_lengths, prompt_width).flip(-1), length_mask(lengths, width)

        def padded(x: Tensor, where: Tensor, mask: Tensor) -> Tensor:
            return x[where.masked_fill(~mask, 0)].masked_fill(~mask, 0)

        return Rollout(
            prompt_tokens=padded(self.tokens, at_prompt, prompt).long(),
            prompt_lengths=prompt_lengths,
            tokens=padded(self.tokens, at, completion).long(),
            lengths=lengths,
            action_mask=padded(self.actions, at, completion),
            ended=self.ended[rows],
            group_ids=self.prompt_ids[rows],
            prompt_ids=self.prompt_ids[rows],
            logprobs=padded(self.logprobs, at, completion),
            ref_logprobs=padded(self.ref_logprobs, at, completion),
            rewards=self.rewards[rows],
        )

    def draw(self, uniform: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Indices of sequences, drawn uniformly with replacement, one for each uniform number in [0, 1)."""
        return (uniform * len(self)).long().clamp(max=len(self) - 1)

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, from which ``Memory(**state)`` is made again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
